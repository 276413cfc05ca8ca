"""The result of a run as one self-contained HTML file."""

import collections
import importlib.resources
import json
import os
import pathlib
import re
from typing import Any

import jinja2
import markupsafe
import pygments
import pygments.formatters
import pygments.lexers

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.report import figures
from selfdev_jax.report import reading
from selfdev_jax.report import summary as summary_lib
from selfdev_jax.report import words

_FILE = "report.html"
_MESSAGE_LENGTH = 140  # Characters of a rejection's example.

_ID_LENGTH = 12  # Digits of a program's digest that are shown.


def write(store: store_lib.Store) -> pathlib.Path:
  """Writes `report.html` into the workdir, replacing an earlier one.

  Args:
    store: an archive, also of an unfinished run.

  Returns:
    The file's path.

  Raises:
    errors.UserError: if the file cannot be written.
  """
  path = store.workdir / _FILE
  text = render(store)
  # A reader sees the old page or the new one, never half of it.
  draft = path.with_suffix(f".{os.getpid()}.tmp")
  try:
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
  except OSError as error:
    draft.unlink(missing_ok=True)
    raise errors.UserError(
        f"cannot write {path}: {error.strerror}; free some space or make the"
        " directory writable, then repeat"
    ) from None
  return path


def render(store: store_lib.Store) -> str:
  """The page's HTML; the same archive gives the same bytes."""
  run = reading.read(store)
  summary = summary_lib.summarize(store)
  steps = store.steps()
  environment = jinja2.Environment(
      # Programs, messages and names of models are hostile text.
      autoescape=True,
      undefined=jinja2.StrictUndefined,
      trim_blocks=True,
      lstrip_blocks=True,
  )
  environment.filters |= {
      "percent": words.percent,
      "percents": words.percents,
      "points": lambda x: _minus(words.points(x)),
      "points_interval": lambda x: _minus(words.points_interval(x)),
      "duration": words.duration,
      "label": words.label,
      "minus": _minus,
      "json": _text,
      "visible": visible,
  }
  template = environment.from_string(_resource("page.html"))
  return template.render(
      summary=summary,
      style=_resource("page.css"),
      lift_sentence=words.lift_sentence(summary),
      best_sentence=words.best_sentence(summary),
      finished=summary["best"]["test"] is not None,
      figures=_figures(run, summary, steps),
      iterations=summary_lib.iteration_rows(summary),
      models=_models(summary),
      chosen={n: _chosen(n, e) for n, e in _models(summary).items()},
      programs=[_program(run, score) for score in run.top()],
      rejections=_rejections(run),
      dpo_rounds=len({s.iteration for s in steps}),
      sampling=words.sampling(summary),
      racing=words.racing(summary),
      raced=summary["answers"]["asked"] < summary["answers"]["without_race"],
      seconds=_seconds(store),
      world=_world(run.config),
      config=sorted(run.config.items()),
      sessions=[
          sorted(config_lib.flatten(dict(session)).items())
          for session in run.sessions
      ],
      planned=run.config["iterations"],
      workdir=str(store.workdir),
  )


def visible(text: str) -> str:
  """Shows control characters and text-direction overrides as escapes.

  A program could otherwise display as other code than it is (CVE-2021-42574).
  """
  return "".join(
      c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text
  )


def _resource(name):
  file = importlib.resources.files("selfdev_jax.report") / name
  return file.read_text(encoding="utf-8")


def _text(value):
  """A config value as it stands in a table."""
  return value if isinstance(value, str) else json.dumps(value)


def _minus(text):
  """A true minus sign before numbers."""
  return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def _figures(run, summary, steps):
  """{name: (SVG for a screen, SVG for a telephone)}, without empty ones."""
  seed = summary["seed_model"]["dev"]
  drawings = {}
  if any(r.accuracies for r in run.arms[records.LOOP]):
    drawings["distribution"] = lambda w: figures.distribution(run.arms, seed, w)
    drawings["progress"] = lambda w: figures.progress(
        _curves(run), _boundaries(run), seed, w
    )
  if models := _models(summary):
    drawings["bars"] = lambda w: figures.bars(models, w)
  if any(m in s.metrics for s in steps for m in figures.DPO_PANELS):
    drawings["dpo"] = lambda w: figures.dpo(steps, w)
  return {
      # Markup of our own making: numbers and fixed words, escaped by
      # matplotlib where they are names.
      name: tuple(
          markupsafe.Markup(draw(w)) for w in (figures.WIDE, figures.NARROW)
      )
      for name, draw in drawings.items()
  }


def _curves(run):
  """Accuracies in order of evaluation, of each way to spend the budget."""
  known = lambda score: score.accuracy if score.complete else None
  curves = {
      arm: [known(s) for r in rounds for s in r.scores]
      for arm, rounds in run.arms.items()
  }
  for family in records.SWEEPS:
    name = "random_weights" if family == "weights" else family
    curves[name] = [known(s) for s in run.family(family)]
  return {name: curve for name, curve in curves.items() if curve}


def _boundaries(run):
  ends, total = [], 0
  for r in run.arms[records.LOOP]:
    if r.scores:
      total += len(r.scores)
      ends.append(total)
  return ends


def _models(summary):
  """The best program and every baseline, in the summary's order."""
  best = {"best": summary["best"]} if summary["best"]["program_id"] else {}
  return best | summary["baselines"]


def _chosen(name, entry):
  """What the search settled on, of a model that is the best of several."""
  if name == "best":
    return entry["program_id"][:_ID_LENGTH]
  kind, _, settings = entry["model"].partition(":")
  if kind in ("seed", "expert"):
    return ""
  return settings[:_ID_LENGTH] if kind == "program" else settings


def _program(run, score) -> dict[str, Any]:
  verdict = run.found(score.model)
  return {
      "id": verdict.digest[:_ID_LENGTH],
      "iteration": verdict.iteration,
      "item": verdict.item,
      "dev": score,
      "test": run.test.get(score.model),
      "source": _highlight(verdict.source),
  }


def _highlight(source):
  """Python source as HTML; pygments escapes what it does not know."""
  markup = pygments.highlight(
      visible(source),
      pygments.lexers.PythonLexer(),
      pygments.formatters.HtmlFormatter(nowrap=True),
  )
  return markupsafe.Markup(markup)


def _rejections(run):
  """Columns and rows of the table of what was rejected and why."""
  columns = [("both", r) for r in run.arms[records.LOOP] if r.iteration == 1]
  columns += [
      (arm, r)
      for arm, rounds in run.arms.items()
      for r in rounds
      if r.iteration > 1
  ]
  rounds = [r for _, r in columns]
  examples = collections.defaultdict(collections.Counter)
  for r in rounds:
    for stage, code, message in r.rejections:
      examples[stage, code][message] += 1
  return {
      "columns": [(arm, r.iteration) for arm, r in columns],
      "sampled": [r.sampled for r in rounds],
      "admitted": [len(r.admitted) for r in rounds],
      "rows": [
          {
              "stage": stage,
              "code": code,
              "counts": counts,
              "example": _shortened(examples[stage, code].most_common(1)[0][0]),
          }
          for (stage, code), counts in reading.rejection_counts(rounds).items()
      ],
  }


def _shortened(message):
  line = " ".join(visible(message).split())
  if len(line) <= _MESSAGE_LENGTH:
    return line
  return line[:_MESSAGE_LENGTH] + "\N{HORIZONTAL ELLIPSIS}"


def _seconds(store):
  """(stage, {arm: seconds}, sum) by sum, and the sum of all."""
  stages = collections.defaultdict(lambda: collections.defaultdict(float))
  for timing in store.timings():
    arm = timing.arm if timing.iteration else "other"
    stages[timing.stage][arm] += timing.seconds
  rows = sorted(
      (
          (stage, dict(arms), sum(arms.values()))
          for stage, arms in stages.items()
      ),
      key=lambda row: -row[2],
  )
  return {"rows": rows, "total": sum(row[2] for row in rows)}


def _world(config):
  """The kind of toy world that the run's models come from, None if none do."""
  names = [config["seed_model"], *config["experts"]]
  is_toy = any(name.startswith("tiny:") for name in names)
  return config.get("tiny.kind") if is_toy else None
