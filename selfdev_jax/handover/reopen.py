"""A run's models, opened again as they were."""

from collections.abc import Mapping
import contextlib
import os
import pathlib

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import store as store_lib
from selfdev_jax.executors import worker as worker_lib


def read_config(workdir: str | os.PathLike) -> config_lib.Config:
  """The config of a run.

  Raises:
    UserError: if there is none.
  """
  with store_lib.Store.read(workdir) as archive:
    return archive.config()


def load(
    archive: store_lib.Store,
    directories: Mapping[str, pathlib.Path],
    stack: contextlib.ExitStack,
) -> worker_lib.Models:
  """Reads the models of a run, if they are what they were.

  Args:
    archive: of the run.
    directories: where models behind names are, as in `loop.run`.
    stack: gets what has to be closed again.

  Raises:
    UserError: naming the model that is gone or has changed.
  """
  config, identity = archive.config(), archive.meta("identity")
  paths = {}
  for name in (config.seed_model, *config.experts):
    path = paths[name] = convert.resolve(directories.get(name, name))
    found, expected = convert.digest(path), identity[f"model {name}"]
    if found != expected:
      raise errors.UserError(
          f"model {name} is not what the run in {archive.workdir} merged: its"
          f" weights, config or tokenizer in {path} have changed (digest"
          f" {expected[:12]} there, {found[:12]} here); put back what was there"
      )
  return worker_lib.load(config, paths, stack)
