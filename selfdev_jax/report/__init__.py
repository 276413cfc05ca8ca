"""What a run found, from its archive alone: JSON, a table, one web page."""

from selfdev_jax.report.page import write
from selfdev_jax.report.summary import summarize
from selfdev_jax.report.terminal import table

__all__ = ["summarize", "table", "write"]
