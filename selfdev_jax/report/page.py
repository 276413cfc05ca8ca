"""The result of a run as a web page, here frozen into one HTML file.

The dashboard shows the same sections (selfdev_jax/dashboard).
"""

import base64
import collections
from collections.abc import Mapping
from collections.abc import Sequence
import datetime
import hashlib
import importlib.resources
import itertools
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
from selfdev_jax.inspection import queries
from selfdev_jax.inspection import stages
from selfdev_jax.inspection import text as text_lib
from selfdev_jax.report import figures
from selfdev_jax.report import reading
from selfdev_jax.report import summary as summary_lib
from selfdev_jax.report import words

_FILE = "report.html"
_ROWS = 300  # Programs in the file's table.
_MESSAGE_LENGTH = 140  # Characters of a rejection's example.
_INCIDENTS = 20  # The last of them.
_ID_LENGTH = 12  # Digits of a program's digest that are shown.

# In order, with what a list of contents calls them.
SECTIONS = {
    "verdict": "Result",
    "progress": "Progress",
    "scores": "Scores",
    "best": "Best so far",
    "baselines": "Baselines",
    "programs": "Programs",
    "rejections": "Rejections",
    "refining": "DPO",
    "time": "Time",
    "workers": "Workers",
    "world": "Toy world",
    "origin": "Configuration",
}


class Links:
  """Where the names on a page lead: in a file, to the programs shown in it.

  Every method gives an address, or an empty one where there is none.
  """

  def __init__(self, shown: Sequence[str] = ()):
    self._shown = frozenset(shown)

  def program(self, digest: str) -> str:
    return f"#program-{digest}" if digest in self._shown else ""

  def completion(self, arm: str, iteration: int, item: int) -> str:
    del arm, iteration, item
    return ""

  def completions(self, arm: str, iteration: int, admitted=False) -> str:
    """What an iteration sampled, or what of it was let through."""
    del arm, iteration, admitted
    return ""

  def answers(self, model: str, split: str) -> str:
    del model, split
    return ""

  def pairs(self, iteration: int) -> str:
    del iteration
    return ""

  def candidates(self, arm: str, iteration: int) -> str:
    """The programs that an iteration evaluated as its own."""
    del arm, iteration
    return ""

  def rejected(self, stage: str, code: str, arm: str, iteration: int) -> str:
    """What an iteration rejected for one reason; `arm` may be "both"."""
    del stage, code, arm, iteration
    return ""


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
  programs, total = queries.programs(store, limit=_ROWS)
  about = context(run) | {
      "programs": programs,
      "programs_total": total,
      "top": [
          _program(run, score)
          for score in run.top(records.LOOP, run.config["top_k"])
      ],
  }
  links = Links([program["digest"] for program in about["top"]])
  environment = make_environment(links)
  script = resource("table.js")
  digest = hashlib.sha256(script.encode()).digest()
  return environment.get_template("page.html").render(
      about,
      sections=sections(environment, about),
      # Of our own making; the page's policy names the script by its hash.
      style=markupsafe.Markup(resource("page.css")),
      script=markupsafe.Markup(script),
      script_hash=base64.b64encode(digest).decode(),
  )


def make_environment(links: Links, *packages: str) -> jinja2.Environment:
  """Templates, and the filters they use.

  Args:
    links: where names lead.
    *packages: whose templates come before this one's of the same name.
  """
  environment = jinja2.Environment(
      # Programs, messages and names of models are hostile text.
      autoescape=True,
      undefined=jinja2.StrictUndefined,
      trim_blocks=True,
      lstrip_blocks=True,
      loader=jinja2.ChoiceLoader(
          [jinja2.PackageLoader(p) for p in (*packages, "selfdev_jax.report")]
      ),
  )
  environment.globals |= {"links": links, "titles": SECTIONS}
  environment.filters |= {
      "percent": words.percent,
      "percents": words.percents,
      "points": lambda x: _minus(words.points(x)),
      "points_interval": lambda x: _minus(words.points_interval(x)),
      "duration": words.duration,
      "label": lambda name: text_lib.visible(words.label(name)),
      "rate": words.rate,
      "stage": words.stage,
      "moment": moment,
      "minus": lambda text: _minus(text_lib.visible(text)),
      "json": _text,
      "short": lambda digest: digest[:_ID_LENGTH],
      "shortened": _shortened,
      "visible": text_lib.visible,
      "python": highlight,
      "flat": _flat,
  }
  return environment


def resource(name: str) -> str:
  """A style sheet or a script of this package."""
  file = importlib.resources.files("selfdev_jax.report") / name
  return file.read_text(encoding="utf-8")


def sections(
    environment: jinja2.Environment, about: Mapping[str, Any]
) -> dict[str, markupsafe.Markup]:
  """{name: HTML} in order, without those that have nothing to say yet."""
  drawn = {
      name: environment.get_template(f"sections/{name}.html").render(about)
      for name in SECTIONS
  }
  return {
      name: markupsafe.Markup(text.strip())
      for name, text in drawn.items()
      if text.strip()
  }


def context(run: reading.Run) -> dict[str, Any]:
  """What the sections say, but for programs."""
  store = run.store
  summary = summary_lib.of(run)
  steps = store.steps()
  models = _models(summary)
  most_dots = figures.most_dots(run.arms)
  return {
      "summary": summary,
      "lift_sentence": words.lift_sentence(summary),
      "best_sentence": words.best_sentence(summary),
      "finished": summary["best"]["test"] is not None,
      "figures": _figures(run, summary, steps),
      "most_dots": most_dots,
      "thinned": any(
          len(r.accuracies) > most_dots
          for rounds in run.arms.values()
          for r in rounds
      ),
      "iterations": summary_lib.iteration_rows(summary),
      "models": models,
      "chosen": {name: _chosen(entry) for name, entry in models.items()},
      "rejections": _rejections(store, run),
      "dpo_rounds": sorted({s.iteration for s in steps}),
      "sampling": words.sampling(summary),
      "racing": words.racing(summary),
      "raced": summary["answers"]["asked"] < summary["answers"]["without_race"],
      "time": _time(store),
      "incidents": _incidents(store),
      "world": _world(run.config),
      "config": sorted(run.config.items()),
      "sessions": [_flat(session) for session in run.sessions],
      "planned": run.config["iterations"],
      "workdir": str(store.workdir),
  } | progress(store)


def progress(store: store_lib.Store) -> dict[str, Any]:
  """What the section on progress says; it is quick to ask for."""
  found = stages.stages(store)
  by_group = lambda s: (s.iteration, s.arm if s.iteration else "")
  groups = [list(members) for _, members in itertools.groupby(found, by_group)]
  left = [s.left_s for s in found if s.state != "done"]
  known = [seconds for seconds in left if seconds is not None]
  spent = sum(s.seconds for s in found)
  return {
      "groups": [
          {
              "title": _group_title(members[0], is_first=not i),
              "stages": members,
              "is_done": all(s.state == "done" for s in members),
              "seconds": sum(s.seconds for s in members),
          }
          for i, members in enumerate(groups)
      ],
      "running": [s for s in found if s.state == "running"],
      "stopped": [s for s in found if s.state == "stopped"],
      "is_running": store_lib.is_running(store.workdir),
      "left": sum(known),
      "left_is_all": len(known) == len(left),
      "share": spent / (spent + sum(known)) if spent else 0.0,
      "is_complete": not left,
  }


def _group_title(stage, is_first):
  if not stage.iteration:
    return f"{'before' if is_first else 'after'} the iterations"
  arm = "both arms" if stage.iteration == 1 else stage.arm
  return f"iteration {stage.iteration}, {arm}"


def highlight(source: str) -> markupsafe.Markup:
  """Python source as HTML; pygments escapes what it does not know."""
  markup = pygments.highlight(
      text_lib.visible(source),
      pygments.lexers.PythonLexer(),
      pygments.formatters.HtmlFormatter(nowrap=True),
  )
  return markupsafe.Markup(markup)


def moment(seconds: float | None) -> str:
  """Unix time for people, in UTC; empty where it is not known."""
  if seconds is None:
    return ""
  time = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _text(value):
  """A config value as it stands in a table."""
  return value if isinstance(value, str) else json.dumps(value)


def _flat(provenance):
  """Keys and values of nested mappings, sorted."""
  return sorted(config_lib.flatten(dict(provenance)).items())


def _minus(text):
  """A true minus sign before numbers."""
  return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def _figures(run, summary, steps):
  """{name: (SVG for a screen, SVG for a telephone)}, without empty ones."""
  seed = summary["seed_model"]["dev"]
  drawings = {}
  if any(len(r.accuracies) for r in run.arms[records.LOOP]):
    drawings["distribution"] = lambda w: figures.distribution(run.arms, seed, w)
  curves = {
      _curve_name(key): curve
      for key, curve in run.curves.items()
      if len(curve.best)
  }
  if curves:
    drawings["progress"] = lambda w: figures.progress(
        curves, _boundaries(run), seed, w
    )
  timed = {
      name: curve for name, curve in curves.items() if curve.hours is not None
  }
  if timed:
    drawings["hours"] = lambda w: figures.hours(timed, seed, w)
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


def _curve_name(key):
  return "random_weights" if key == "weights" else key


def _boundaries(run):
  ends, total = [], 0
  for r in run.arms[records.LOOP]:
    if r.evaluated:
      total += r.evaluated
      ends.append(total)
  return ends


def _models(summary):
  """The best program and every baseline, in the summary's order."""
  best = summary["best"]
  if not best["program_id"]:
    return summary["baselines"]
  model = records.PROGRAM + best["program_id"]
  return {"best": best | {"model": model}} | summary["baselines"]


def _chosen(entry):
  """What the search settled on, of a model that is the best of several."""
  kind, _, settings = entry["model"].partition(":")
  if kind in ("seed", "expert"):
    return ""
  return settings[:_ID_LENGTH] if kind == "program" else settings


def _program(run, score) -> dict[str, Any]:
  verdict = run.found(score.model)
  return {
      "digest": verdict.digest,
      "iteration": verdict.iteration,
      "item": verdict.item,
      "dev": score,
      "test": run.store.score(score.model, records.TEST),
      "source": verdict.source,
  }


def _rejections(store, run):
  """Columns and rows of the table of what was rejected and why."""
  columns = [("both", r) for r in run.arms[records.LOOP] if r.iteration == 1]
  columns += [
      (arm, r)
      for arm, rounds in run.arms.items()
      for r in rounds
      if r.iteration > 1
  ]
  found = collections.defaultdict(dict)
  for each in queries.rejections(store):
    arm = "both" if each.iteration == 1 else each.arm
    found[each.stage, each.code][arm, each.iteration] = each
  rows = []
  for (stage, code), cells in found.items():
    counts = [
        cells[arm, r.iteration].count if (arm, r.iteration) in cells else 0
        for arm, r in columns
    ]
    most = max(cells.values(), key=lambda each: each.count)
    rows.append(
        {
            "stage": stage,
            "code": code,
            "counts": counts,
            "example": most.example,
        }
    )
  return {
      "columns": [(arm, r.iteration) for arm, r in columns],
      "sampled": [r.sampled for _, r in columns],
      "admitted": [r.admitted for _, r in columns],
      "rows": sorted(rows, key=lambda row: -sum(row["counts"])),
  }


def _shortened(message):
  line = " ".join(text_lib.visible(message).split())
  if len(line) <= _MESSAGE_LENGTH:
    return line
  return line[:_MESSAGE_LENGTH] + "\N{HORIZONTAL ELLIPSIS}"


def _time(store):
  """Each stage's seconds by arm and its rate, by seconds, and their sums."""
  arms = collections.defaultdict(lambda: collections.defaultdict(float))
  for activity in store.activities():
    arm = activity.arm if activity.iteration else "other"
    arms[activity.stage][arm] += activity.seconds
  rows = [
      {
          "stage": stage,
          "arms": dict(arms[stage]),
          "seconds": seconds,
          "writing_s": writing_s,
          "units": units,
          "unit": unit,
      }
      for stage, seconds, writing_s, units, unit in stages.throughput(store)
  ]
  rows.sort(key=lambda row: -row["seconds"])
  return {
      "rows": rows,
      "seconds": sum(row["seconds"] for row in rows),
      "writing_s": sum(row["writing_s"] for row in rows),
  }


def _incidents(store):
  """What happened to workers: counts by kind, and the last of it."""
  counts = queries.incident_counts(store)
  total = sum(counts.values())
  last, _ = queries.incidents(store, _INCIDENTS, max(total - _INCIDENTS, 0))
  return {"counts": counts, "total": total, "last": last}


def _world(config):
  """The kind of toy world that the run's models come from, None if none do."""
  names = [config["seed_model"], *config["experts"]]
  is_toy = any(name.startswith("tiny:") for name in names)
  return config.get("tiny.kind") if is_toy else None
