"""The result of a run as one JSON object."""

from collections.abc import Mapping
import statistics
from typing import Any

from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.report import intervals
from selfdev_jax.report import reading

# What the best settings of each family are called in the result.
_BASELINES = {
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "weights": "random_weights",
}


def summarize(store: store_lib.Store) -> dict[str, Any]:
  """The result of a run, or as much of it as there is.

  Everything but "seconds" is the same however often the run was interrupted.

  Args:
    store: an archive, also of an unfinished run.

  Returns:
    A dict that `json.dumps` takes. Accuracies are fractions; what has not
    been computed yet is None or absent. "distinct" counts the different
    programs an iteration admitted; "evaluated" those that no earlier
    iteration admitted, which were merged; the statistics of scores are over
    the ones among them whose merge was finite. "ci95"
    belongs to the test score, "ci95_dev" to the development score; the
    latter is too favourable where the model was chosen by it. "paired" is
    the best program minus each baseline, on the items of the test set;
    "lift" is the loop minus its control, from the second iteration.
    "truncated" counts questions that did not fit the model and lost their
    beginning, "troubles" answers that the scorer could not compare. "answers"
    says what the search cost: "asked" of the development set, "without_race"
    what asking everything of the same models would have cost, "reused", what
    programs took over from others with the same fingerprint and would have
    cost at most, and "search_over", whether that is all.
  """
  return of(reading.read(store))


def of(run: reading.Run) -> dict[str, Any]:
  """`summarize` of an archive that was read already."""
  store = run.store
  best = next(iter(run.top(records.LOOP, 1)), None)
  chosen = _chosen(run)
  loop, control = run.arms[records.LOOP], run.arms[records.CONTROL]
  return {
      "config": run.config["name"],
      "seed_model": {
          split: _accuracy(store.score("seed", split))
          for split in (records.DEV, records.TEST)
      },
      "iterations": [_iteration(r) for r in loop],
      "control": [_iteration(r) for r in control],
      "baselines": {
          name: {"model": score.model, "evaluated": n} | _scores(store, score)
          for name, (score, n) in chosen.items()
      },
      "best": {
          "program_id": best and reading.digest_of(best.model),
          "evaluated": sum(r.evaluated for r in loop),
      }
      | _scores(store, best),
      "paired": {
          name: comparison
          for name, (score, _) in chosen.items()
          if best and (comparison := _paired(store, best.model, score.model))
      },
      "lift": _lift(loop, control),
      "sampled_by": store.engines(),
      "truncated": {s: store.truncated(s) for s in (records.DEV, records.TEST)},
      "troubles": {s: store.troubles(s) for s in (records.DEV, records.TEST)},
      "answers": _answers(store),
      "seconds": seconds(store),
  }


_ANSWERS = f"""
SELECT
  coalesce(sum(CASE WHEN reused = '' THEN n END), 0) AS asked,
  coalesce(sum(CASE WHEN reused = '' THEN items END), 0) AS without_race,
  coalesce(sum(CASE WHEN reused != '' THEN items END), 0) AS reused
FROM ({store_lib.SCORES} WHERE s.split = 'dev') WHERE correct IS NOT NULL
"""


def _answers(store):
  (row,) = store.rows(_ANSWERS)
  is_over = store.is_done(records.LOOP, 0, store_lib.SEARCH)
  return {**row._mapping, "search_over": is_over}


def seconds(store: store_lib.Store) -> dict[str, float]:
  """Wall-clock seconds of each stage, over arms, iterations and sessions."""
  total = {}
  for activity in store.activities():
    stage = activity.stage
    total[stage] = total.get(stage, 0.0) + activity.seconds
  return total


def iteration_rows(
    summary: Mapping[str, Any],
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]]:
  """(arm, iteration, lift) of each line of a table of the iterations.

  The first iteration is the same in both arms and has one line, "both"; the
  lift stands with the control, whose mean it subtracts.
  """
  control = {row["t"]: row for row in summary["control"]}
  lifts = {row["t"]: row for row in summary["lift"]}
  rows = []
  for row in summary["iterations"]:
    t = row["t"]
    rows.append(("both" if t == 1 else records.LOOP, row, None))
    if t > 1 and t in control:
      rows.append((records.CONTROL, control[t], lifts.get(t)))
  return rows


def _chosen(run):
  """{baseline: (its best score on the development set, how many it tried)}."""
  found = {
      "control": (
          next(iter(run.top(records.CONTROL, 1)), None),
          sum(r.evaluated for r in run.arms[records.CONTROL]),
      )
  }
  for family, name in _BASELINES.items():
    curve = run.curves.get(family)
    found[name] = run.best_of(family), curve and curve.evaluated
  for model in ("seed", *run.family("expert")):
    found[model] = run.store.score(model, records.DEV), 1
  return {
      name: (score, tried)
      for name, (score, tried) in found.items()
      if score and score.accuracy is not None
  }


def _accuracy(score):
  return score and score.accuracy


def _scores(store, dev):
  """Both scores of the model whose development score is `dev`."""
  test = dev and store.score(dev.model, records.TEST)
  return {
      "dev": _accuracy(dev),
      "test": _accuracy(test),
      "n_test": test and test.n,
      "ci95": _interval(test),
      "n_dev": dev and dev.n,
      "ci95_dev": _interval(dev),
  }


def _interval(score):
  interval = score and score.interval
  return interval and list(interval)


def _iteration(r):
  accuracies = r.accuracies.tolist()
  return {
      "t": r.iteration,
      "sampled": r.sampled,
      "admitted": r.admitted,
      "distinct": r.distinct,
      "evaluated": r.evaluated,
      "mean_dev": statistics.fmean(accuracies) if accuracies else None,
      "median_dev": statistics.median(accuracies) if accuracies else None,
      "best_dev": r.best,
  }


def _paired(store, first, second):
  """First minus second model on the test items; None before both are known."""
  a, b = (
      {r.item: r.correct for r in store.responses(model, records.TEST)}
      for model in (first, second)
  )
  items = a.keys() & b.keys()
  if not items:
    return None
  better = sum(a[i] and not b[i] for i in items)
  worse = sum(b[i] and not a[i] for i in items)
  # A model does not differ from itself: the control may find the same program.
  same = first == second
  return {
      "difference": (better - worse) / len(items),
      "ci95": [0.0, 0.0]
      if same
      else list(intervals.paired(better, worse, len(items))),
      "n": len(items),
      "better": better,
      "worse": worse,
      "same_model": same,
  }


def _lift(loop, control):
  """Mean of the loop's new programs minus the control's, each iteration."""
  theirs = {r.iteration: r.accuracies for r in control}
  lifts = []
  for r in loop:
    ours, others = r.accuracies, theirs.get(r.iteration, r.accuracies[:0])
    # The first iteration is the same in both by construction.
    if r.iteration > 1 and len(ours) and len(others):
      mean = lambda values: statistics.fmean(values.tolist())
      lifts.append(
          {
              "t": r.iteration,
              "difference": mean(ours) - mean(others),
              "ci95": list(intervals.mean_difference(ours, others)),
              "n_loop": len(ours),
              "n_control": len(others),
          }
      )
  return lifts
