"""From the rows of an archive to what the two arms and the baselines did.

An archive may hold hundreds of thousands of scores: SQL counts and ranks them,
and only what is shown becomes a record.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import queries

# Development scores as they are by now.
_NOW = f"now AS ({store_lib.SCORES} WHERE s.split = 'dev')"
# What an arm evaluated, in its own order. Same factory, same keys: the first
# iteration is stored once, for both.
_EVALUATED = f"""
WITH {_NOW}, evaluated AS (
  SELECT arms.arm, iteration, position, now.*
  FROM (SELECT 'loop' AS arm UNION ALL SELECT 'control') arms
  JOIN candidates ON candidates.arm
    = CASE iteration WHEN 1 THEN 'loop' ELSE arms.arm END
  JOIN now ON now.model = 'program:' || digest
)
"""
_ACCURACIES = f"""
{_EVALUATED}
SELECT arm, iteration, correct * 1.0 / n AS accuracy, n = items AS is_whole,
  count(*) AS count
FROM evaluated GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3
"""
_FOUND = """
SELECT arm, iteration, item, source, digest FROM verdicts
WHERE digest = :digest AND arm = :arm ORDER BY iteration, item LIMIT 1
"""
_FAMILY = f"""
WITH {_NOW}
SELECT model FROM now WHERE model >= :name || ':' AND model < :name || ';'
"""
_BEST_OF_FAMILY = f"""
{_FAMILY} AND n = items AND correct IS NOT NULL
ORDER BY correct * 1.0 / n DESC, place LIMIT 1
"""
# Where the best so far rises, and when all until there was done.
_RISES = """
SELECT place, best, latest FROM (
  SELECT place, latest, best, lag(best) OVER (ORDER BY place) AS before FROM (
    SELECT place, max(accuracy) OVER upto AS best, max(at) OVER upto AS latest
    FROM placed WINDOW upto AS (ORDER BY place)))
WHERE best > coalesce(before, -1)
"""
_WHOLE = "CASE WHEN n = items THEN correct * 1.0 / n END AS accuracy, at"
_ARM_RISES = f"""
{_EVALUATED}, placed AS (
  SELECT row_number() OVER (ORDER BY iteration, position) AS place, {_WHOLE}
  FROM evaluated WHERE arm = :name)
"""
_FAMILY_RISES = f"""
WITH {_NOW}, placed AS (
  SELECT row_number() OVER (ORDER BY place) AS place, {_WHOLE}
  FROM now WHERE model >= :name || ':' AND model < :name || ';')
"""
_EXTENT = "SELECT count(*), count(at), max(at) FROM placed"


@dataclasses.dataclass(frozen=True)
class Round:
  """One iteration of one arm.

  Attributes:
    iteration: from 1.
    sampled: completions of the factory.
    admitted: of these, with a merged model.
    distinct: programs among them.
    evaluated: programs that were new to the arm, within its budget, that have
      a development score or turned out to have no merged model.
    accuracies: [n] float64, ascending; of those with a merged model, on what
      they were asked.
    best: the highest of those that were asked everything.
  """

  iteration: int
  sampled: int
  admitted: int
  distinct: int
  evaluated: int
  accuracies: np.ndarray
  best: float | None


@dataclasses.dataclass(frozen=True)
class Curve:
  """The best development accuracy so far, where it rises.

  Models that have none, or that a race stopped, count as evaluated.

  Attributes:
    evaluations: [k] models evaluated until then.
    hours: [k] hours of work until then; None in archives that do not know.
    best: [k] accuracy.
    evaluated: models in all.
    total_hours: of work in all; None likewise.
  """

  evaluations: np.ndarray
  hours: np.ndarray | None
  best: np.ndarray
  evaluated: int
  total_hours: float | None


@dataclasses.dataclass(frozen=True)
class Run:
  """What the report needs of an archive.

  Attributes:
    store: the archive; open as long as this is used.
    config: flat keys to values.
    sessions: versions and hardware, one entry for each start of the run.
    arms: the rounds of the loop and of its control; both begin with the same.
    curves: of each arm and each family of baselines that has scores.
  """

  store: store_lib.Store
  config: Mapping[str, Any]
  sessions: Sequence[Mapping[str, Any]]
  arms: Mapping[str, tuple[Round, ...]]
  curves: Mapping[str, Curve]

  def top(self, arm: str, count: int) -> list[records.Score]:
    """Development scores of `queries.top`."""
    return [
        self.store.score(records.PROGRAM + digest, records.DEV)
        for digest in queries.top(self.store, arm, count)
    ]

  def family(self, name: str) -> list[str]:
    """Models of a family of baselines with a development score, in order."""
    rows = self.store.rows(f"{_FAMILY} ORDER BY place", name=name)
    return [model for (model,) in rows]

  def best_of(self, family: str) -> records.Score | None:
    rows = self.store.rows(_BEST_OF_FAMILY, name=family)
    return self.store.score(rows[0][0], records.DEV) if rows else None

  def found(self, model: str) -> records.Verdict:
    """The loop's first completion that gave the program `model`."""
    digest = digest_of(model)
    (row,) = self.store.rows(_FOUND, digest=digest, arm=records.LOOP)
    return records.Verdict(*row)


def read(store: store_lib.Store) -> Run:
  """Reads a finished, running or broken-off run."""
  config = store.meta("config")
  counts = queries.counts(store)
  groups = {}
  for row in store.rows(_ACCURACIES):
    groups.setdefault((row.arm, row.iteration), []).append(row)
  arms = {arm: [] for arm in records.ARMS}
  for arm, rounds in arms.items():
    for t in range(1, config["iterations"] + 1):
      source = (records.LOOP if t == 1 else arm), t
      if source in counts:
        rounds.append(_round(t, counts[source], groups.get((arm, t), ())))
  activities = store.activities()
  curves = {
      name: _curve(store, name, activities)
      for name in (*records.ARMS, *records.SWEEPS)
  }
  return Run(
      store=store,
      config=config,
      sessions=store.sessions(),
      arms={arm: tuple(rounds) for arm, rounds in arms.items()},
      curves={name: curve for name, curve in curves.items() if curve.evaluated},
  )


def digest_of(model: str) -> str:
  return model.removeprefix(records.PROGRAM)


def _round(t, counts, groups):
  known = [row for row in groups if row.accuracy is not None]
  return Round(
      t,
      counts.sampled,
      counts.admitted,
      counts.distinct,
      evaluated=sum(row.count for row in groups),
      accuracies=np.repeat(
          np.array([row.accuracy for row in known], np.float64),
          [row.count for row in known],
      ),
      best=max((row.accuracy for row in known if row.is_whole), default=None),
  )


def _curve(store, name, activities):
  placed = _ARM_RISES if name in records.ARMS else _FAMILY_RISES
  ((evaluated, timed, last),) = store.rows(placed + _EXTENT, name=name)
  rises = store.rows(placed + _RISES, name=name)
  evaluations, best, latest = zip(*rises, strict=True) if rises else ((),) * 3
  own = [a for a in activities if _is_work_of(name, a)]
  hours = total_hours = None
  if timed == evaluated and all(a.started is not None for a in own):
    *hours, total_hours = _hours(own, [*latest, last or 0.0])
    hours = np.array(hours)
  return Curve(
      np.array(evaluations, np.int64),
      hours,
      np.array(best, np.float64),
      evaluated,
      total_hours,
  )


def _hours(activities, times):
  """[n] hours of an arm's work until each of the Unix times."""
  times = np.asarray(times, np.float64)
  spent = np.zeros(len(times))
  for a in activities:
    spent += np.clip(times - a.started, 0, a.seconds)
  return spent / 3600


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
