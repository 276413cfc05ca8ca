"""Where on this machine things are kept between runs."""

import os
import pathlib


def directory() -> pathlib.Path:
  """`SELFDEV_CACHE`, or `selfdev_jax` in the user's cache directory."""
  root = os.environ.get("SELFDEV_CACHE")
  if root:
    return pathlib.Path(root)
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return pathlib.Path(home) / "selfdev_jax"
