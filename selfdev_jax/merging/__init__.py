"""Merging: methods of one tensor, and the engine that applies them."""

from selfdev_jax.merging.engine import merge
from selfdev_jax.merging.engine import Merger
from selfdev_jax.merging.engine import Program
from selfdev_jax.merging.methods import MergeError
from selfdev_jax.merging.methods import METHODS

__all__ = ["METHODS", "MergeError", "Merger", "Program", "merge"]
