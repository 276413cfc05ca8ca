"""Tasks, their splits, and how answers are graded."""

from selfdev_jax.evaluation.tasks import get
from selfdev_jax.evaluation.tasks import grade
from selfdev_jax.evaluation.tasks import Item
from selfdev_jax.evaluation.tasks import Task
from selfdev_jax.evaluation.tasks import TASKS

__all__ = ["TASKS", "Item", "Task", "get", "grade"]
