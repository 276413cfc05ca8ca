"""A local, read-only web page over the archive of a run."""

from selfdev_jax.dashboard.server import serve

__all__ = ["serve"]
