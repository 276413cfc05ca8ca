"""Names and sentences that the terminal and the page share."""

from collections.abc import Mapping
from collections.abc import Sequence
import re
from typing import Any

from selfdev_jax.inspection import text as text_lib

duration = text_lib.duration

_LABELS = {
    "best": "best program",
    "control": "control (no DPO)",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "random_weights": "random weights",
    "seed": "seed model",
}


_STAGES = {
    "weights": "random weights",
    "search": "end of search",
    "best": "test",
}


def label(name: str) -> str:
  """A baseline's name for people; an expert's loses its path or `tiny:`."""
  kind, _, rest = name.partition(":")
  if kind == "expert":
    return f"expert {re.split('[/:]', rest.rstrip('/'))[-1]}"
  return _LABELS.get(name, name)


def stage(name: str) -> str:
  """A stage's name for people."""
  return _STAGES.get(name, label(name))


def percent(fraction: float | None) -> str:
  return "" if fraction is None else f"{100 * fraction:.1f}"


def percents(interval: Sequence[float] | None) -> str:
  if interval is None:
    return ""
  return f"{percent(interval[0])} to {percent(interval[1])}"


def points(difference: float) -> str:
  """A difference of fractions in percentage points, with its sign."""
  return f"{100 * difference:+.1f}"


def points_interval(interval: Sequence[float]) -> str:
  return f"{points(interval[0])} to {points(interval[1])}"


def rate(units: int, seconds: float, unit: str) -> str:
  """Throughput: "1,248 programs an hour"."""
  each, per_s = f"{unit or 'unit'}s", units / seconds
  if per_s >= 10:
    return f"{per_s:,.0f} {each} a second"
  return f"{3600 * per_s:,.0f} {each} an hour"


def sampling(summary: Mapping[str, Any]) -> str:
  """What sampled, and which questions it could not be asked whole."""
  sentences = []
  if summary["sampled_by"]:
    sentences.append(f"Sampled by {' and '.join(summary['sampled_by'])}.")
  for split, n in summary["truncated"].items():
    if n:
      sentences.append(
          f"{n} {split} question{'s' * (n > 1)} did not fit the model and lost"
          " the beginning."
      )
  for split, troubles in summary["troubles"].items():
    for trouble, n in troubles.items():
      sentences.append(
          f"{n} {split} answer{'s' * (n > 1)} could not be compared"
          f" ({trouble}) and count{'s' * (n == 1)} as wrong."
      )
  return " ".join(sentences)


# What is missing may only be not done yet.
_OPEN = (
    "Some programs have not answered everything yet, or were stopped; they"
    " count by what they were asked, which the intervals of means leave out."
)


def racing(summary: Mapping[str, Any]) -> str:
  """What races and known fingerprints saved; empty where nothing."""
  answers = summary["answers"]
  asked, whole = answers["asked"], answers["without_race"]
  if not answers["search_over"]:
    return _OPEN if asked < whole else ""
  sentences = []
  if asked < whole:
    sentences.append(
        f"Racing asked {asked:,} of {whole:,} development answers"
        f" ({percent(asked / whole)} %): programs that could be neither chosen"
        " nor rejected were stopped. They count in means by what they were"
        " asked, which the intervals of means leave out."
    )
  if answers["reused"]:
    sentences.append(
        "Programs that do the same as known ones spared at most"
        f" {answers['reused']:,} answers."
    )
  return " ".join(sentences)


def verdict(summary: Mapping[str, Any]) -> str:
  """What the run showed, with intervals, also where it showed nothing."""
  return f"{lift_sentence(summary)} {best_sentence(summary)}"


def lift_sentence(summary: Mapping[str, Any]) -> str:
  """Did refining the factory raise what it writes?"""
  if not summary["lift"]:
    return (
        "There is no iteration in which the loop and its control can be"
        " compared."
    )
  last = summary["lift"][-1]
  return (
      f"In iteration {last['t']} the mean development score of new programs"
      f" {_relation(last['ci95'])} that of the control without DPO:"
      f" {points(last['difference'])} points (95 % interval"
      f" {points_interval(last['ci95'])}; {last['n_loop']} and"
      f" {last['n_control']} programs)."
  )


def best_sentence(summary: Mapping[str, Any]) -> str:
  """Does the best program beat each baseline on the test set?"""
  best, paired = summary["best"], summary["paired"]
  if best["program_id"] is None:
    return "There is no best program: none has been scored."
  if best["test"] is None:
    return "The best program has not been scored on the test set yet."
  sentence = (
      f"On the {best['n_test']} test problems the loop's best program has"
      f" {percent(best['test'])} % right (95 % interval"
      f" {percents(best['ci95'])})"
  )
  groups = {relation: [] for relation in _RELATIONS}
  experts = {relation: [] for relation in _RELATIONS}
  for name, p in paired.items():
    if p["same_model"]:
      continue
    if name.startswith("expert:"):
      experts[_relation(p["ci95"])].append(label(name))
    else:
      groups[_relation(p["ci95"])].append(
          f"{_NOUNS[name]} ({points_interval(p['ci95'])})"
      )
  for relation, names in experts.items():
    if names:
      everyone = len(names) == sum(map(len, experts.values()))
      groups[relation] += ["every expert"] if everyone else names
  clauses = [
      f"is the very program of {_NOUNS[name]}"
      for name, p in paired.items()
      if p["same_model"]
  ]
  clauses += [
      f"{relation} {_listed(items)}"
      for relation, items in groups.items()
      if items
  ]
  return "; it ".join([sentence, *clauses]) + "."


# As the subject of a comparison.
_NOUNS = {
    "control": "the control's best",
    "task_arithmetic": "the best task arithmetic",
    "ties": "the best TIES",
    "random_weights": "the best random weights",
    "seed": "the seed model",
}
_RELATIONS = ("is above", "cannot be told from", "is below")


def _relation(interval):
  """What a 95 % interval of a difference allows to say."""
  low, high = interval
  if low > 0:
    return "is above"
  return "is below" if high < 0 else "cannot be told from"


def _listed(items):
  *head, last = items
  return f"{', '.join(head)} and {last}" if head else last
