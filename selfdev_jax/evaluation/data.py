"""Rows of published data sets: read from files or the hub, drawn by seed."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import random
from typing import Any
import unicodedata

from selfdev_jax import errors
from selfdev_jax import progress
from selfdev_jax import tables

Row = dict[str, str]

# Launch scripts that need no config take the test set by a flag.
_FILES = {
    "train": "evaluate.train_file",
    "test": "evaluate.test_file or --data",
}


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a split is published.

  Attributes:
    hub: id on the Hugging Face hub.
    configs: of that data set, read one after the other.
    split: "train" or "test"; `evaluate.train_file` or `.test_file` stands in.
    fields: that every row has, as text with something in it; others are left
      out.
    fault: row -> what is wrong with it, empty if nothing is.
  """

  hub: str
  configs: tuple[str, ...]
  split: str
  fields: tuple[str, ...]
  fault: Callable[[Row], str] = lambda row: ""


@functools.cache
def read(source: Source, file: str | None) -> tuple[Row, ...]:
  """All rows of a split in their published order; read once a process.

  Args:
    source: what to read.
    file: JSONL in the published format, one object a line; None: the hub's.

  Returns:
    At least one row, with the source's fields alone. Not to be changed: every
    caller gets the same ones.

  Raises:
    UserError: naming the file and the line, or how to do without the hub.
  """
  numbered = tables.read_lines(file) if file is not None else _read_hub(source)
  rows = tuple(_checked(row, where, source) for where, row in numbered)
  if not rows:
    raise errors.UserError(f"{file or source.hub} holds no row")
  return rows


def _read_hub(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
  """(where, row) of a split on the hub, or of its copy in the cache."""
  for config in source.configs:
    try:
      table = tables.from_hub(source.hub, config, source.split)
    except Exception as error:  # The hub's, HTTP's and the file system's.
      raise errors.UserError(
          f"the {source.split} split of {source.hub} could not be had from the"
          f" Hugging Face hub or its cache ({tables.one_line(error)}); give"
          f" {_FILES[source.split]}: JSONL in the published format"
      ) from None
    name = f"{source.hub} ({config}, {source.split})"
    for number, row in enumerate(table.with_format(None), 1):
      yield f"{name}, row {number}", row


def _checked(row: dict[str, Any], where: str, source: Source) -> Row:
  """The source's fields of a row."""
  kept = {name: text(row, name, where, source.fields) for name in source.fields}
  for name, value in kept.items():
    if not value.strip():
      raise errors.UserError(f"{where}: {name} is empty")
  fault = source.fault(kept)
  if fault:
    raise errors.UserError(f"{where}: {fault}")
  return kept


def text(
    row: dict[str, Any], name: str, where: str, needed: Sequence[str]
) -> str:
  """A field of a row.

  Args:
    row: as it was read.
    name: of the field.
    where: the row is, for the message.
    needed: all fields that such a row has, for the message.

  Raises:
    UserError: it is not there, or no text.
  """
  if name not in row:
    raise errors.UserError(
        f"{where} lacks {name!r}; a row needs {' and '.join(needed)}"
    )
  if not isinstance(row[name], str):
    raise errors.UserError(f"{where}: {name} is no text but {row[name]!r:.40}")
  return row[name]


def normal(question: str) -> str:
  """A question's letters and digits: what makes it another one, and more.

  Questions that differ in signs alone count as one, so that some are left out
  that need not be.
  """
  plain = unicodedata.normalize("NFKC", question).casefold()
  return "".join(c for c in plain if c.isalnum())


def draw(
    rows: Iterable[Row],
    without: Iterable[Row],
    seed: str,
    text_of: Callable[[Row], str],
) -> list[Row]:
  """All rows in a random order, save those whose question is known.

  The order is drawn before rows are left out, so that leaving out another one
  moves the rest up and does not deal anew.

  Args:
    rows: to draw from.
    without: rows whose questions may not come.
    seed: of the order.
    text_of: row -> its question; see `normal` for when two are the same.

  Returns:
    The rest, each question once.
  """
  order = list(rows)
  random.Random(seed).shuffle(order)
  known = {normal(text_of(row)) for row in without}
  found: dict[str, Row] = {}
  for row in order:
    question = normal(text_of(row))
    if question not in known:
      found.setdefault(question, row)
  return list(found.values())


def apart(
    rows: Sequence[Row], shots: Iterable[Row], text_of: Callable[[Row], str]
) -> list[Row]:
  """The rows without those whose answer stands among the shots; says so."""
  known = {normal(text_of(row)) for row in shots}
  kept = [row for row in rows if normal(text_of(row)) not in known]
  if len(kept) < len(rows):
    progress.note(
        f"{len(rows) - len(kept)} of {len(rows)} items are among the shots, and"
        " are left out"
    )
  return kept


def dev(
    rows: Iterable[Row],
    shots: Iterable[Row],
    test_rows: Iterable[Row],
    seed: int,
    text_of: Callable[[Row], str],
) -> list[Row]:
  """The development set: the training split without shots and test items.

  Args:
    rows: the training split.
    shots: worked examples of the prompts.
    test_rows: the test split.
    seed: `evaluate.split_seed`.
    text_of: row -> its question.

  Returns:
    All there are, in an order of the seed's; `first` takes its beginning.
  """
  return draw(rows, [*shots, *test_rows], f"dev {seed}", text_of)


def first(rows: Sequence[Row], n: int | None, split: str) -> list[Row]:
  """The first `n` rows; all where `n` is None.

  Args:
    rows: of a split.
    n: how many.
    split: "dev" or "test", for the message.

  Raises:
    UserError: there are fewer.
  """
  if n is not None and n > len(rows):
    raise errors.UserError(
        f"the {split} split has {len(rows)} items, not {n}; lower"
        f" evaluate.{split}_size or --limit"
    )
  return list(rows[:n])
