"""What generated text may not do to a terminal or a spreadsheet."""

import csv
import io

import pytest

from selfdev_jax.inspection import text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("é 漢", "é 漢"),
        ("\x1b[2J", "\\x1b[2J"),
        ("x\u202ey", "x\\u202ey"),
        ("\u2066\r\x00", "\\u2066\\r\\x00"),
    ],
)
def test_visible(given, shown):
  assert text.visible(given) == shown


def test_a_line_is_one():
  assert text.line(" a\n\tb\x07 ") == "a b\\x07"
  assert text.line("x" * 100, 10) == "x" * 9 + "…"


def test_a_table_shows_text_as_it_is():
  shown = text.table("T", ["name", "n", "share"], [("[red]\x1b", 3, 0.125)])
  title, header, _, row = shown.splitlines()
  assert title == "T" and header.split() == ["name", "n", "share"]
  assert row.split() == ["[red]\\x1b", "3", "12.5"]


@pytest.mark.parametrize("first", "=+-@\t\r")
def test_no_cell_is_a_formula(first):
  given = [f"{first}1", "a\nb,c", None, -0.25]
  header, row = csv.reader(
      io.StringIO(text.as_csv(["w", "x", "y", "z"], [given]))
  )
  assert header == ["w", "x", "y", "z"]
  assert row == [f"'{first}1", "a\nb,c", "", "-0.25"]
