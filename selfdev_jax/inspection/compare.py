"""What differs between two runs."""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from selfdev_jax import config as config_lib
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import queries


@dataclasses.dataclass(frozen=True)
class Difference:
  """One key's values; None where a run has none."""

  key: str
  here: Any
  there: Any


@dataclasses.dataclass(frozen=True)
class ScoreDifference:
  """Two scores of one program, each as (right, answered).

  Right is None where there was no merged model.
  """

  digest: str
  split: str
  here: tuple[int | None, int]
  there: tuple[int | None, int]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two runs side by side.

  Attributes:
    config: keys that differ.
    identity: likewise of what else makes a run: weights, prompt, items.
    versions: likewise of versions and hardware; of each run all values that
      its sessions had.
    iterations: of one arm and number each; None where a run has it not.
    only_here: (digest, development accuracy) of programs, the best first.
    only_there: likewise.
    both: how many programs both have.
    scores: of these, scores on one split that differ.
  """

  config: list[Difference]
  identity: list[Difference]
  versions: list[Difference]
  iterations: list[tuple[queries.Iteration | None, queries.Iteration | None]]
  only_here: list[tuple[str, float | None]]
  only_there: list[tuple[str, float | None]]
  both: int
  scores: list[ScoreDifference]


@dataclasses.dataclass(frozen=True)
class _Side:
  """What one run has: iterations by number and arm, scores by digest."""

  iterations: dict[tuple[int, int], queries.Iteration]
  digests: set[str]
  dev: dict[str, tuple[int | None, int]]
  test: dict[str, tuple[int | None, int]]


# Of a session, not of what it ran on.
_PASSING = ("time", "command")


def compare(here: store_lib.Store, there: store_lib.Store) -> Comparison:
  """Compares two archives."""
  ours, theirs = _read(here), _read(there)
  keys = sorted(ours.iterations.keys() | theirs.iterations.keys())
  return Comparison(
      config=_differences(here.meta("config"), there.meta("config")),
      identity=_differences(here.meta("identity"), there.meta("identity")),
      versions=_differences(_versions(here), _versions(there)),
      iterations=[
          (ours.iterations.get(key), theirs.iterations.get(key)) for key in keys
      ],
      only_here=_ranked(ours.digests - theirs.digests, ours.dev),
      only_there=_ranked(theirs.digests - ours.digests, theirs.dev),
      both=len(ours.digests & theirs.digests),
      scores=[
          *_differing(ours.dev, theirs.dev, records.DEV),
          *_differing(ours.test, theirs.test, records.TEST),
      ],
  )


def _read(store):
  iterations = queries.iterations(store)
  return _Side(
      {(i.iteration, records.ARMS.index(i.arm)): i for i in iterations},
      _digests(store),
      _scores(store, records.DEV),
      _scores(store, records.TEST),
  )


def _differences(
    here: Mapping[str, Any], there: Mapping[str, Any]
) -> list[Difference]:
  return [
      Difference(key, here.get(key), there.get(key))
      for key in sorted(here.keys() | there.keys())
      if here.get(key) != there.get(key)
  ]


def _versions(store):
  """Key to all values of the sessions, in order."""
  values = {}
  for session in store.sessions():
    for key, value in config_lib.flatten(session).items():
      if key not in _PASSING and value not in values.setdefault(key, []):
        values[key].append(value)
  return {key: v[0] if len(v) == 1 else v for key, v in values.items()}


def _columns(store, query, **values):
  """Columns of a long answer; in JSON arrays they come much faster."""
  (row,) = store.rows(query, **values)
  return map(json.loads, row)


def _digests(store):
  (digests,) = _columns(store, "SELECT json_group_array(digest) FROM programs")
  return set(digests)


def _scores(store, split) -> dict[str, tuple[int | None, int]]:
  """Digest to (right, answered)."""
  now = lambda name: (
      f"json_group_array(CASE WHEN s.reused IS NULL THEN s.{name}"
      f" ELSE o.{name} END)"
  )
  digests, right, n = _columns(
      store,
      f"SELECT json_group_array(s.program), {now('correct')}, {now('n')}"
      " FROM scores s LEFT JOIN scores o ON o.model = s.reused"
      " AND o.split = s.split WHERE s.program IS NOT NULL AND s.split = :split",
      split=split,
  )
  return dict(zip(digests, zip(right, n, strict=True), strict=True))


def _differing(ours, theirs, split):
  digests = [
      digest
      for digest, outcome in ours.items()
      if theirs.get(digest, outcome) != outcome
  ]
  return [
      ScoreDifference(digest, split, ours[digest], theirs[digest])
      for digest in sorted(digests)
  ]


def _ranked(digests, scores):
  """(digest, development accuracy), the best first and unknown ones last."""
  found = []
  for digest in sorted(digests):
    right, n = scores.get(digest, (None, 0))
    found.append((digest, None if right is None else right / n))
  return sorted(found, key=lambda pair: 1.0 if pair[1] is None else -pair[1])
