"""Tasks, their splits, and how answers are graded."""

from selfdev_jax.evaluation.task import digest
from selfdev_jax.evaluation.task import Item
from selfdev_jax.evaluation.task import Mark
from selfdev_jax.evaluation.task import Task
from selfdev_jax.evaluation.tasks import digest_items
from selfdev_jax.evaluation.tasks import grade
from selfdev_jax.evaluation.tasks import load
from selfdev_jax.evaluation.tasks import load_items
from selfdev_jax.evaluation.tasks import TASKS

__all__ = [
    "TASKS",
    "Item",
    "Mark",
    "Task",
    "digest",
    "digest_items",
    "grade",
    "load",
    "load_items",
]
