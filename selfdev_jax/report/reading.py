"""From the rows of an archive to what the two arms and the baselines did."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from selfdev_jax import records
from selfdev_jax import store as store_lib

_COUNTS = """
SELECT arm, iteration, count(*) AS sampled FROM completions
GROUP BY arm, iteration
"""
# A score without a count of right answers has no merged model.
_ADMITTED = """
SELECT verdicts.arm, verdicts.iteration, count(*) AS admitted,
  count(DISTINCT digest) AS distinct_
FROM verdicts
LEFT JOIN scores ON scores.program = digest AND split = 'dev'
WHERE digest IS NOT NULL AND (model IS NULL OR correct IS NOT NULL)
GROUP BY verdicts.arm, verdicts.iteration
"""
_FOUND = """
SELECT arm, iteration, item, source, digest FROM verdicts
WHERE digest = :digest AND arm = :arm ORDER BY iteration, item LIMIT 1
"""
_TIMES = "SELECT model, at FROM scores WHERE split = :split"


@dataclasses.dataclass(frozen=True)
class Round:
  """One iteration of one arm.

  Attributes:
    iteration: from 1.
    sampled: completions of the factory.
    admitted: of these, with a merged model.
    distinct: programs among them.
    scores: on the development set, of the programs that were new to the arm
      and within the budget of evaluations, in order of item.
  """

  iteration: int
  sampled: int
  admitted: int
  distinct: int
  scores: tuple[records.Score, ...]

  @property
  def accuracies(self) -> list[float]:
    """Of the new programs on what they were asked; failed ones have none."""
    return [s.accuracy for s in self.scores if s.accuracy is not None]


@dataclasses.dataclass(frozen=True)
class Run:
  """What the report needs of an archive.

  Attributes:
    store: the archive; open as long as this is used.
    config: flat keys to values.
    sessions: versions and hardware, one entry for each start of the run.
    dev: scores on the development set, in the order they were written.
    test: likewise on the test set.
    arms: the rounds of the loop and of its control; both begin with the same.
    hours: of each arm and each baseline's family, one for each of its scores
      in order: hours of its work until the score was done. None in archives
      that do not know.
  """

  store: store_lib.Store
  config: Mapping[str, Any]
  sessions: Sequence[Mapping[str, Any]]
  dev: Mapping[str, records.Score]
  test: Mapping[str, records.Score]
  arms: Mapping[str, tuple[Round, ...]]
  hours: Mapping[str, Sequence[float] | None]

  def candidates(self, arm: str) -> list[records.Score]:
    """Development scores of an arm's programs, in the arm's own order.

    Not in the order of the archive: what the other arm wrote too may have
    been scored there first.
    """
    return [s for r in self.arms[arm] for s in r.scores]

  def family(self, name: str) -> list[records.Score]:
    return _family(self.dev, name)

  def top(self) -> list[records.Score]:
    """The loop's best programs by development score alone."""
    return ranked(self.candidates(records.LOOP))[: self.config["top_k"]]

  def found(self, model: str) -> records.Verdict:
    """The loop's first completion that gave the program `model`."""
    (row,) = self.store.rows(_FOUND, digest=digest_of(model), arm=records.LOOP)
    return records.Verdict(*row)


def read(store: store_lib.Store) -> Run:
  """Reads a finished, running or broken-off run."""
  config = store.meta("config")
  dev = store.scores(records.DEV)
  steps = range(1, config["iterations"] + 1)
  # Same factory, same keys: the first iteration is stored once, for both.
  keys = {
      records.LOOP: [(records.LOOP, t) for t in steps],
      records.CONTROL: [
          (records.LOOP if t == 1 else records.CONTROL, t) for t in steps
      ],
  }
  sampled = {(a, t): n for a, t, n in store.rows(_COUNTS)}
  admitted = {(a, t): counts for a, t, *counts in store.rows(_ADMITTED)}
  arms = {
      arm: tuple(
          Round(
              t,
              sampled[source, t],
              *admitted.get((source, t), (0, 0)),
              tuple(
                  dev[records.PROGRAM + digest]
                  for digest in store.candidates(source, t)
                  if records.PROGRAM + digest in dev
              ),
          )
          for source, t in rounds
          if (source, t) in sampled
      )
      for arm, rounds in keys.items()
  }
  scored = {
      arm: [score for r in rounds for score in r.scores]
      for arm, rounds in arms.items()
  } | {name: _family(dev, name) for name in records.SWEEPS}
  return Run(
      store=store,
      config=config,
      sessions=store.sessions(),
      dev=dev,
      test=store.scores(records.TEST),
      arms=arms,
      hours=_hours(store, scored),
  )


def _family(dev, name):
  return [
      score for model, score in dev.items() if model.partition(":")[0] == name
  ]


def _hours(store, scored):
  """See `Run.hours`."""
  times = dict(map(tuple, store.rows(_TIMES, split=records.DEV)))
  activities = store.activities()
  hours = {}
  for name, scores in scored.items():
    own = [a for a in activities if _is_work_of(name, a)]
    at = [times[score.model] for score in scores]
    if None in at or any(a.started is None for a in own):
      hours[name] = None
      continue
    at, spent = np.asarray(at, np.float64), np.zeros(len(at))
    for a in own:
      spent += np.clip(at - a.started, 0, a.seconds)
    # What the other arm had found before is had at no cost, not in the past.
    hours[name] = np.maximum.accumulate(spent / 3600).tolist()
  return hours


def _is_work_of(name: str, activity: records.Activity) -> bool:
  """Whether an arm, or a family of baselines, had to do this."""
  if name in records.SWEEPS:
    return activity.stage == name
  if not activity.iteration:
    return activity.arm == name and activity.stage == "finalists"
  if activity.arm == name:
    return True
  # The control's first iteration is the loop's, but for its refinement.
  return activity.iteration == 1 and activity.stage != "refine"


def digest_of(model: str) -> str:
  return model.removeprefix(records.PROGRAM)


def ranked(scores: Iterable[records.Score]) -> list[records.Score]:
  """Best first, ties in the given order, of those with all answers."""
  known = [s for s in scores if s.complete and s.accuracy is not None]
  return sorted(known, key=lambda s: -s.accuracy)


def best(scores: Iterable[records.Score]) -> records.Score | None:
  return next(iter(ranked(scores)), None)
