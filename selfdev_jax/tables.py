"""Rows from JSONL files and from the Hugging Face hub, and nothing else."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
from typing import Any

import huggingface_hub.utils

from selfdev_jax import errors

# Kinds of data sets on the hub whose files hold nothing but tables; "cache" is
# what `datasets` wrote itself when it fetched one before. Others are declined:
# some of them unpickle in versions of `datasets` that we allow.
_KINDS = ("parquet", "arrow", "cache")


def read_lines(file: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
  """("FILE:LINE", object) of a JSONL file; empty lines are passed over.

  Raises:
    UserError: naming the file, and the line that is no JSON object.
  """
  path = pathlib.Path(file)
  try:
    with path.open("rb") as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          where = f"{path}:{number}"
          yield where, _parse(line, where)
  except OSError as error:
    raise errors.UserError(
        f"{path} cannot be read: {error.strerror or error}"
    ) from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
  try:
    row = json.loads(line.decode("utf-8-sig"))
    if b"\\u" in line:
      # An escaped half of a surrogate pair parses, but is no text.
      json.dumps(row, ensure_ascii=False).encode()
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f"{where} is no JSON: {one_line(error)}") from None
  if not isinstance(row, dict):
    raise errors.UserError(f"{where} is no JSON object")
  return row


def from_hub(name: str, config: str | None, split: str) -> Any:
  """A split of a data set on the hub, or of its copy in the cache.

  Args:
    name: `org/name`.
    config: one of its configurations; None: the default one.
    split: such as "train".

  Returns:
    A `datasets.Dataset`.

  Raises:
    Exception: the hub's, HTTP's or the file system's; ValueError where it is
      stored as something else than tables.
  """
  import datasets  # Here, as it takes seconds.

  with without_progress_bars(datasets):
    # load_dataset in its three steps, so that the kind is known before
    # anything is read.
    builder = datasets.load_dataset_builder(name, config)
    if builder.name not in _KINDS:
      raise ValueError(f"it is stored as {builder.name}, not as Parquet")
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


@contextlib.contextmanager
def without_progress_bars(*modules: Any) -> Iterator[None]:
  """Silences `datasets` and the hub's client, if they are not yet."""
  modules = [*modules, huggingface_hub.utils]
  loud = [m for m in modules if not m.are_progress_bars_disabled()]
  try:
    for module in loud:
      module.disable_progress_bars()
    yield
  finally:
    for module in loud:
      module.enable_progress_bars()


def one_line(error: BaseException) -> str:
  """The first paragraph of an error's text, or its name if it has none."""
  words = " ".join(str(error).split("\n\n")[0].split())
  return words or type(error).__name__
