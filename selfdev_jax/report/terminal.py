"""The result of a run as a table in a terminal."""

from collections.abc import Mapping
from typing import Any

import rich.box
import rich.console
import rich.table

from selfdev_jax.report import summary as summary_lib
from selfdev_jax.report import words

_WIDTH = 100


def table(summary: Mapping[str, Any]) -> str:
  """Iterations, baselines and the best program, and what they amount to.

  Args:
    summary: of `summary.summarize`.

  Returns:
    Lines of at most 100 columns; without escape codes unless standard output
    is a terminal.
  """
  # Not the default 80 columns, which some environments force on pipes.
  # Names are text, not markup.
  console = rich.console.Console(
      width=_WIDTH, highlight=False, markup=False, emoji=False
  )
  with console.capture() as capture:
    if summary["iterations"]:
      console.print(_iterations(summary))
    if summary["baselines"]:
      console.print(_models(summary))
    console.print(words.verdict(summary))
    if said := words.sampling(summary):
      console.print(said)
    if said := words.racing(summary):
      console.print(said)
    if summary["seconds"]:
      console.print(_times(summary["seconds"]))
  return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _table(title, *columns):
  grid = rich.table.Table(
      title=title,
      title_justify="left",
      title_style="bold",
      box=rich.box.SIMPLE_HEAD,
      pad_edge=False,
      padding=(0, 1, 0, 0),
  )
  for i, column in enumerate(columns):
    grid.add_column(column, justify="right" if i else "left", no_wrap=True)
  return grid


def _iterations(summary):
  grid = _table(
      "New programs of each iteration (development accuracy, %)",
      "t",
      "arm",
      "sampled",
      "admitted",
      "distinct",
      "evaluated",
      "mean",
      "median",
      "best",
      "mean: loop - control",
  )
  for arm, row, lift in summary_lib.iteration_rows(summary):
    grid.add_row(
        *_iteration(arm, row),
        lift and _signed(lift),
    )
  return grid


def _iteration(arm, row):
  counts = ("sampled", "admitted", "distinct", "evaluated")
  scores = ("mean_dev", "median_dev", "best_dev")
  return (
      str(row["t"]),
      arm,
      *(str(row[key]) for key in counts),
      *(words.percent(row[key]) for key in scores),
  )


def _models(summary):
  best = summary["best"]
  sizes = {
      key: next(
          (m[key] for m in (best, *summary["baselines"].values()) if m[key]),
          None,
      )
      for key in ("n_dev", "n_test")
  }
  grid = _table(
      "Accuracy in %, with 95 % intervals; each chosen on development alone",
      "model",
      "tried",
      f"dev, n = {sizes['n_dev']}",
      f"test, n = {sizes['n_test'] or '-'}",
      "best - this, test",
  )
  rows = {}
  if best["program_id"]:
    rows[f"best program {best['program_id'][:12]}"] = (
        str(best["evaluated"]),
        best,
        None,
    )
  for name, entry in summary["baselines"].items():
    rows[words.label(name)] = (
        str(entry["evaluated"]),
        entry,
        summary["paired"].get(name),
    )
  for name, (tried, entry, paired) in rows.items():
    grid.add_row(
        name,
        tried,
        _score(entry["dev"], entry["ci95_dev"]),
        _score(entry["test"], entry["ci95"]),
        paired and _signed(paired),
    )
  return grid


def _score(accuracy, interval):
  if accuracy is None:
    return "-"
  low, high = map(words.percent, interval)
  return f"{words.percent(accuracy)} [{low}, {high}]"


def _signed(comparison):
  low, high = map(words.points, comparison["ci95"])
  return f"{words.points(comparison['difference'])} [{low}, {high}]"


def _times(seconds):
  stages = sorted(seconds.items(), key=lambda item: -item[1])
  total = words.duration(sum(seconds.values()))
  each = ", ".join(f"{k} {words.duration(v)}" for k, v in stages)
  return f"Time: {total} ({each})."
