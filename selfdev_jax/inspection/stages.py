"""How far a run is, what it spends its time on, and how much is left."""

import dataclasses

from selfdev_jax import records
from selfdev_jax import store as store_lib

# What an arm does in an iteration; "select" and "reuse" belong to "evaluate".
_ROUND = ("propose", "admit", "evaluate")
_LAST = "export"


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of the run, over all sessions that worked on it.

  `state` is "waiting", "running", "done" or "stopped"; `left_s` an estimate,
  None where there is nothing to estimate it from.
  """

  arm: str
  iteration: int
  name: str
  state: str
  done: int
  total: int | None
  unit: str
  seconds: float
  left_s: float | None


def stages(store: store_lib.Store) -> list[Stage]:
  """All stages of the run, in order, with what is known of the time left."""
  plan = _plan(store.config().iterations)
  by_stage = {key: [] for key in plan}
  activities = store.activities()
  for activity in activities:
    by_stage.get(_key(activity), []).append(activity)
  is_over = store.is_done(records.LOOP, 0, _LAST)
  last = activities[-1] if activities else None
  reached = max((i for i, key in enumerate(plan) if by_stage[key]), default=-1)
  open_state = "running" if store_lib.is_running(store.workdir) else "stopped"
  found = []
  for i, key in enumerate(plan):
    if last and not last.finished and key == _key(last):
      state = open_state
    else:
      state = "done" if is_over or i <= reached else "waiting"
    found.append(_stage(key, state, by_stage[key], found))
  return found


def _plan(iterations):
  """(arm, iteration, stage) in the order of selfdev_jax/loop.py."""
  loop, control = records.ARMS
  plan = [(loop, 0, "single models")]
  for t in range(1, iterations + 1):
    plan += [(loop, t, name) for name in _ROUND]
    plan += [(control, t, name) for name in _ROUND if t > 1]
    plan += [(loop, t, "refine")] if t < iterations else []
  plan += [(loop, 0, family) for family in records.SWEEPS]
  plan += [(arm, 0, "finalists") for arm in records.ARMS]
  plan += [(loop, 0, name) for name in (store_lib.SEARCH, "best", _LAST)]
  return plan


def _key(activity):
  """The stage of the plan that an activity belongs to."""
  name = activity.stage
  if name in ("select", "reuse"):
    name = "evaluate" if activity.iteration else "finalists"
  return activity.arm, activity.iteration, name


def _stage(key, state, activities, before):
  """One stage; `before` are those before it, which say how long it takes."""
  seconds = sum(a.seconds for a in activities)
  own = [a for a in activities if a.stage == key[-1]]
  done = sum(a.done for a in own)
  total, unit = None, ""
  if own:
    now = own[-1]
    unit = now.unit
    if now.total is not None:
      total = done - now.done + now.total
  left = 0.0
  if state != "done":
    left = _left(key, seconds, own, before)
  return Stage(*key, state, done, total, unit, seconds, left)


def _left(key, seconds, own, before):
  """Seconds: by the stage's own rate, or by what was like it."""
  now = own[-1] if own else None
  if now and now.done and now.total is not None:
    return max(now.total - now.done, 0) * now.seconds / now.done
  guess = _guess(key, before)
  return None if guess is None else max(guess - seconds, 0.0)


def _guess(key, before):
  arm, _, name = key
  whole = lambda s: None if s.left_s is None else s.seconds + s.left_s
  if name in records.SWEEPS:
    sweeps = [whole(s) for s in before if s.name in records.SWEEPS]
    if sweeps:
      return sweeps[-1]
    # As many models as the loop evaluated.
    rounds = [
        whole(s)
        for s in before
        if s.name == "evaluate" and s.arm == records.LOOP
    ]
    return None if None in rounds else sum(rounds)
  like = [s for s in before if s.name == name and whole(s) is not None]
  like = [s for s in like if s.arm == arm] or like
  return whole(like[-1]) if like else None


def throughput(
    store: store_lib.Store,
) -> list[tuple[str, float, float, int, str]]:
  """(stage, seconds, seconds of these writing, units, unit), longest first."""
  rows = store.rows(
      "SELECT stage, sum(seconds), sum(writing_s), sum(done), max(unit)"
      " FROM activities GROUP BY stage ORDER BY 2 DESC, stage"
  )
  return [tuple(row) for row in rows]
