"""Generated text shown as what it is; tables for a terminal and as CSV."""

from collections.abc import Iterable
from collections.abc import Sequence
import csv
import io
from typing import Any

import rich.box
import rich.console
import rich.table

_WIDTH = 100
# What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def visible(text: str) -> str:
  """Shows control characters and text-direction overrides as escapes.

  A program could otherwise display as other code than it is (CVE-2021-42574).
  """
  return "".join(
      c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text
  )


def line(text: str, width: int = 60) -> str:
  """The beginning of a text, in one line."""
  text = " ".join(visible(text[: 4 * width]).split())
  if len(text) <= width:
    return text
  return text[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def indented(text: str) -> str:
  return "".join(f"  {row}\n" for row in visible(text).split("\n")).rstrip("\n")


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> str:
  """A table with a title; None is empty, floats are taken for fractions.

  A column of words is flush left, as its first row shows.
  """
  rows = [list(row) for row in rows]
  console = rich.console.Console(
      width=_WIDTH, highlight=False, markup=False, emoji=False
  )
  grid = rich.table.Table(
      box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
  )
  for i, column in enumerate(columns):
    is_text = bool(rows) and isinstance(rows[0][i], str)
    grid.add_column(
        column, justify="left" if is_text else "right", overflow="fold"
    )
  for row in rows:
    grid.add_row(*map(_cell, row))
  with console.capture() as capture:
    console.print(grid)
  lines = [row.rstrip() for row in capture.get().splitlines()]
  return "\n".join([title, *(row for row in lines if row)])


def _cell(value):
  if value is None:
    return ""
  if isinstance(value, float):
    return percent(value)
  return visible(str(value))


def percent(fraction: float) -> str:
  return f"{100 * fraction:.1f}"


def duration(seconds: float) -> str:
  if seconds < 90:
    return f"{seconds:.1f} s"
  if seconds < 90 * 60:
    return f"{seconds / 60:.1f} min"
  return f"{seconds / 3600:.1f} h"


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """One header line, then the rows; no cell is a spreadsheet's formula."""
  out = io.StringIO()
  # Quotes around all text: a lone \r in it would end a row for some readers.
  writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
  writer.writerow(columns)
  for row in rows:
    writer.writerow(
        f"'{value}"
        if isinstance(value, str) and value.startswith(_FORMULA)
        else value
        for value in row
    )
  return out.getvalue().rstrip("\n")
