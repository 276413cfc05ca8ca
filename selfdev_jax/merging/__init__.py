"""Merging: methods of one tensor, and the engine that applies them."""

from selfdev_jax.merging.engine import check_experts
from selfdev_jax.merging.engine import constant
from selfdev_jax.merging.engine import leaf_shapes
from selfdev_jax.merging.engine import merge
from selfdev_jax.merging.engine import Method
from selfdev_jax.merging.engine import TensorMerge
from selfdev_jax.merging.engine import vocabulary_notes
from selfdev_jax.merging.methods import linear
from selfdev_jax.merging.methods import METHODS
from selfdev_jax.merging.methods import task_arithmetic
from selfdev_jax.merging.methods import ties
from selfdev_jax.merging.methods import weighted

__all__ = [
    "METHODS",
    "Method",
    "TensorMerge",
    "check_experts",
    "constant",
    "leaf_shapes",
    "linear",
    "merge",
    "task_arithmetic",
    "ties",
    "vocabulary_notes",
    "weighted",
]
