"""The model card of a program's model."""

from collections.abc import Mapping
from collections.abc import Sequence
import shlex
from typing import Any

from selfdev_jax import records
from selfdev_jax.merging import card as card_lib
from selfdev_jax.report import words

_SPLITS = {records.DEV: "development", records.TEST: "test"}
_VERSIONS = (
    "selfdev-jax",
    "git",
    "python",
    "jax",
    "flax",
    "optax",
    "transformers",
    "device",
    "devices",
    "cpus",
    "machine",
)


def card(provenance: Mapping[str, Any], source: str, name: str) -> str:
  """Writes the README.md of a package.

  Args:
    provenance: what provenance.json holds.
    source: the program as it was written.
    name: of the merged model.

  Returns:
    Markdown, with the front matter in YAML that the hub reads.
  """
  named = [model["name"] for model in provenance["models"]]
  made = card_lib.card(source, None, named, named[0], name)
  sections = {
      "Scores": _scores(provenance),
      "Where it comes from": _origin(provenance),
      "How to make it again": _again(provenance),
      "Limits": _limits(provenance),
  }
  for title, paragraphs in sections.items():
    made += "\n" + "\n\n".join([f"## {title}", *paragraphs]) + "\n"
  return made


def _table(rows: Sequence[Sequence[Any]]) -> str:
  """Of lines of cells, the first one's being the heads."""
  lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
  lines.insert(1, f"|{' --- |' * len(rows[0])}")
  return "\n".join(lines)


def _scores(provenance):
  own = {}
  for split, suffix in ((records.DEV, "_dev"), (records.TEST, "")):
    s = provenance["scores"].get(split, {})
    own[split] = s.get("accuracy")
    own |= {f"n_{split}": s.get("n"), f"ci95{suffix}": s.get("ci95")}
  others = provenance["baselines"].items()
  rows = [("model", "development, %", "95 %", "n", "test, %", "95 %", "n")]
  rows += [
      (label, *_cells(scores))
      for label, scores in [
          ("**this program**", own),
          *((words.label(key), scores) for key, scores in others),
      ]
  ]
  paragraphs = [
      f"Answers of the task `{provenance['task']}` that are right, greedy, with"
      " 95 % Wilson intervals over the items. Sampled by"
      f" {' and '.join(provenance['sampled_by']) or 'what is not known'}.",
      _table(rows),
      _meaning(provenance),
  ]
  for split, s in provenance["scores"].items():
    if s["reused"]:
      paragraphs.append(
          f"The {_SPLITS[split]} score was not asked of this model: it is that"
          f" of `{s['reused']}`, which does the same to the sandbox's probes."
      )
    elif s["n"] < s["items"]:
      paragraphs.append(
          f"It was asked {s['n']} of {s['items']} {_SPLITS[split]} items: a"
          " race stopped it there."
      )
  return paragraphs


def _cells(scores):
  cells = []
  for split, interval in ((records.DEV, "ci95_dev"), (records.TEST, "ci95")):
    cells += [
        words.percent(scores[split]),
        words.percents(scores.get(interval)),
        scores.get(f"n_{split}") or "",
    ]
  return cells


def _meaning(provenance):
  text = (
      f"The run evaluated {provenance['chosen_among']} programs and chose by"
      " the development score, a baseline's best setting likewise: what chose"
      " the best flatters it, the more so the more were tried."
  )
  if not provenance["is_best"]:
    text += " This program is not the one that it chose."
  if records.TEST in provenance["scores"]:
    return text + " The test score chose nothing."
  return text + " This program has no test score."


def _origin(provenance):
  found = provenance["found"]
  completion = found["completion"]
  factory = completion["factory"]
  writer = (
      "the seed model itself"
      if factory == 1
      else f"the seed model after {factory - 1} round{'s' * (factory > 2)} of"
      " DPO"
  )
  models = [("", "model", "sha256 of its weights, configs and tokenizer")]
  models += [
      (model["role"], f"`{model['path']}`", f"`{model['digest']}`")
      for model in provenance["models"]
  ]
  return [
      f"The program was written by {writer}, as completion"
      f" {completion['item']} of iteration {completion['iteration']} of the arm"
      f" `{completion['arm']}`. It merges {_SCOPES[provenance['scope']]}.",
      _table(models),
      _table(
          [
              ("", ""),
              ("program", f"`{provenance['program']}`"),
              ("weights", f"`{provenance['weights']}`"),
          ]
      ),
      "`program.json` is the program as it was verified and as it ran,"
      " `program.py` what the model wrote, and `provenance.json` holds"
      " everything that is known: all scores, the completion, the config, and"
      " versions and hardware of each session.",
  ]


_SCOPES = {
    "mlp": "the MLPs' weights; all others are the seed model's",
    "all": "every weight",
}


def _again(provenance):
  seed, *experts = (model["path"] for model in provenance["models"])
  run = provenance["sessions"][0]
  merge = [
      "--program=program.json",
      f"--base={seed}",
      f"--experts={','.join(experts)}",
      f"--scope={provenance['scope']}",
      "--out=NEW",
  ]
  digest = provenance["program"][:16]
  commands = [
      "# The merge, by this directory's program.json, of the models above"
      + (
          ",\n# which the run makes in its cache, ~/.cache/selfdev_jax."
          if provenance["is_toy"]
          else "."
      ),
      f"python -m launch.merge {shlex.join(merge)}",
      "# Weights and scores, where the run's directory is.",
      f"python -m launch.replay --workdir=WORKDIR --program={digest}",
  ]
  if run.get("command"):
    commands += [
        "# The whole run.",
        f"python -m launch.{run['command']}",
    ]
  versions = [("", "")] + [
      (key, run[key]) for key in _VERSIONS if run.get(key) not in (None, "")
  ]
  return [
      "```\n" + "\n".join(commands) + "\n```",
      f"The weights have the checksum `{provenance['weights']}`"
      " (`models.checksum`; `launch.merge` prints it). It comes out bit for bit"
      " with the same versions on the same kind of processor; elsewhere last"
      " bits may differ. Applied from `program.py`, a tensor at a time, a"
      " program without sums over a tensor gives these bits too, others give"
      " them up to rounding.",
      f"Seed {provenance['seed']}, config `{provenance['config_digest']}`. The"
      " run began with:",
      _table(versions),
  ]


def _limits(provenance):
  limits = []
  if provenance["is_toy"]:
    limits.append(
        "This is a model of a toy world: a tiny decoder that was trained from"
        " nothing in minutes, and experts that were made so that the structure"
        " of a program matters. It shows that the search works and is of no"
        " other use; its scores do not say how large a gain real models would"
        " have."
    )
  limits += [
      "One run with one seed: another run may find another program. The"
      " intervals are over items, not over runs.",
      "Nothing but the task above was measured. What the models before could"
      " do may be lost, and their biases and licences are this model's too.",
  ]
  return ["\n".join(f"- {limit}" for limit in limits)]
