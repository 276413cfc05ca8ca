"""A training's directory: what it is of, its checkpoints and its metrics.

  run.json               what the training is made from
  reference.safetensors  log-probabilities under the reference
  checkpoints/           Orbax's, the last two
  metrics.jsonl          a line a step
  tensorboard/           the same for TensorBoard

Processes of one training share it; the first writes all but the checkpoints.
"""

import contextlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
import tensorboardX

from selfdev_jax import errors

_RUN = "run.json"
_REFERENCE = "reference.safetensors"
_METRICS = "metrics.jsonl"
_CHECKPOINTS = "checkpoints"


class Workdir:
  """Opened for one training; a context manager.

  Args:
    directory: made where it is missing.
    made_from: name -> text; what has to be the same for training to go on.

  Raises:
    UserError: if it belongs to a training that was made from something else.
  """

  def __init__(self, directory: pathlib.Path, made_from: dict[str, str]):
    # Orbax takes absolute paths alone.
    self._directory = pathlib.Path(directory).absolute()
    self._made_from = made_from
    self._first = jax.process_index() == 0
    self._check()
    self._manager = ocp.CheckpointManager(
        self._directory / _CHECKPOINTS,
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    )
    self._writer = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()
    if self._writer is not None:
      self._writer.close()

  def _check(self):
    """Says what this directory is of, or refuses it."""
    path = self._directory / _RUN
    if path.is_file():
      try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
      except (TypeError, ValueError) as error:
        raise errors.UserError(
            f"{path} is damaged ({error}); name another --workdir"
        ) from None
      for name in self._made_from:
        if found.get(name) != self._made_from[name]:
          raise errors.UserError(
              f"{self._directory} belongs to another training: {name} was"
              f" {found.get(name)!r}, is {self._made_from[name]!r}; name"
              " another --workdir"
          )
    elif self._first:
      self._directory.mkdir(parents=True, exist_ok=True)
      _write_whole(path, json.dumps(self._made_from, indent=2) + "\n")

  # The reference.

  def read_reference(self, key: dict[str, str]) -> np.ndarray | None:
    """[completions] float32, or None where it was not computed yet.

    Args:
      key: name -> text; what the log-probabilities depend on.

    Raises:
      UserError: if they were computed from something else.
    """
    path = self._directory / _REFERENCE
    if not path.is_file():
      return None
    try:
      with safetensors.safe_open(path, "numpy") as file:
        found, logps = file.metadata() or {}, file.get_tensor("logps")
    except safetensors.SafetensorError as error:
      raise errors.UserError(
          f"{path} is damaged ({error}); remove it, it is computed again"
      ) from None
    for name in key:
      if found.get(name) != key[name]:
        raise errors.UserError(
            f"{path} is stale: it was computed with other {name}; remove it,"
            " it is computed again"
        )
    return logps

  def write_reference(self, key: dict[str, str], logps: np.ndarray):
    if self._first:
      path = self._directory / _REFERENCE
      partial = path.with_suffix(".partial")
      safetensors.numpy.save_file({"logps": logps}, partial, key)
      partial.replace(path)

  # Checkpoints.

  def has_checkpoint(self) -> bool:
    return self._manager.latest_step() is not None

  def restore(self, abstract: Any) -> tuple[Any, int]:
    """The last whole state, on the devices that `abstract` names.

    Args:
      abstract: pytree of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      (state, how many steps it has seen).

    Raises:
      UserError: if it is damaged.
    """
    step = self._manager.latest_step()
    try:
      restored = self._manager.restore(
          step, args=ocp.args.StandardRestore(abstract)
      )
    except (ValueError, FileNotFoundError, KeyError) as error:
      reason = " ".join(str(error).split())[:300]
      raise errors.UserError(
          f"the checkpoint of step {step} in {self._directory} cannot be read"
          f" ({reason}); remove checkpoints/{step} to go on from the one before"
      ) from None
    return restored, step

  def save(self, step: int, state: Any):
    """Begins to write a state in the background.

    Raises:
      UserError: if this save or the last could not be written.
    """
    with self._writing():
      self._manager.check_for_errors()
      self._manager.save(step, args=ocp.args.StandardSave(state))

  def finish(self):
    """Waits until all is written.

    Raises:
      UserError: if a save could not be.
    """
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except Exception as error:  # Orbax's, tensorstore's, the file system's.
      reason = " ".join(str(error.__cause__ or error).split())[:300]
      raise errors.UserError(
          f"a checkpoint in {self._directory} cannot be written ({reason});"
          " once there is room, the same command resumes"
      ) from error

  # Metrics.

  def begin_metrics(self, steps: int) -> list[dict[str, float]]:
    """The metrics of the first `steps` steps; what came after is dropped.

    Those steps were seen by no checkpoint and are computed again.
    """
    path = self._directory / _METRICS
    lines, history = [], []
    try:
      if path.is_file():
        lines = path.read_bytes().splitlines()[:steps]
      for step, line in enumerate(lines, 1):
        metrics = json.loads(line)
        if metrics.pop("step") != step:
          raise ValueError(f"line {step} is of another step")
        history.append(metrics)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise errors.UserError(
          f"{path} is damaged ({error}); name another --workdir"
      ) from None
    if len(lines) < steps:
      raise errors.UserError(
          f"{path} has {len(lines)} steps, the checkpoint {steps}; name another"
          " --workdir"
      )
    if self._first:
      _write_whole(path, "".join(line.decode() + "\n" for line in lines))
      self._writer = tensorboardX.SummaryWriter(
          str(self._directory / "tensorboard"), purge_step=1
      )
      # A killed process had some of them in memory only.
      for step, metrics in enumerate(history, 1):
        self._show(step, metrics)
    return history

  def log(self, step: int, metrics: dict[str, float]):
    """A step's line, steps counted from 1."""
    if not self._first:
      return
    with open(self._directory / _METRICS, "a", encoding="utf-8") as file:
      file.write(json.dumps({"step": step, **metrics}) + "\n")
      file.flush()
      os.fsync(file.fileno())  # No checkpoint without its metrics.
    self._show(step, metrics)

  def _show(self, step: int, metrics: dict[str, float]):
    for name, value in metrics.items():
      self._writer.add_scalar(f"train/{name}", value, step)

  def write_lines(self, name: str, rows: list[dict[str, Any]]) -> pathlib.Path:
    """Writes JSON lines into the directory and returns the file's path."""
    path = self._directory / name
    if self._first:
      _write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def _write_whole(path: pathlib.Path, text: str):
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  partial.replace(path)


def discard_checkpoints(directory: pathlib.Path):
  """Removes them, so that a kill in the middle leaves none rather than half."""
  doomed = directory / "discarded"
  shutil.rmtree(doomed, ignore_errors=True)
  with contextlib.suppress(FileNotFoundError):
    (directory / _CHECKPOINTS).rename(doomed)
  shutil.rmtree(doomed, ignore_errors=True)
