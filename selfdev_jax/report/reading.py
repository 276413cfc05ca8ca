"""From the rows of an archive to what the two arms and the baselines did."""

import collections
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

from selfdev_jax import records
from selfdev_jax import sandbox
from selfdev_jax import store as store_lib


@dataclasses.dataclass(frozen=True)
class Round:
  """One iteration of one arm.

  Attributes:
    iteration: from 1.
    sampled: completions of the factory.
    verdicts: in order of item.
    scores: on the development set, of the programs that were new to the arm
      and within the budget of evaluations, in order of item.
    broken: digest to why there is no merged model, of any arm.
  """

  iteration: int
  sampled: int
  verdicts: tuple[records.Verdict, ...]
  scores: tuple[records.Score, ...]
  broken: Mapping[str, str]

  @property
  def admitted(self) -> list[str]:
    """Digests, one for each completion that gave a merged model."""
    return [
        v.digest
        for v in self.verdicts
        if v.admitted and v.digest not in self.broken
    ]

  @property
  def accuracies(self) -> list[float]:
    """Of the new programs on what they were asked; failed ones have none."""
    return [s.accuracy for s in self.scores if s.accuracy is not None]

  @property
  def rejections(self) -> list[tuple[str, str, str]]:
    """(stage, code, message) of each completion that gave no model."""
    reasons = []
    for v in self.verdicts:
      if not v.admitted:
        reasons.append((v.stage, v.code, v.message))
      elif v.digest in self.broken:
        reasons.append(
            ("run", self.broken[v.digest], "the merge failed on the weights")
        )
    return reasons


@dataclasses.dataclass(frozen=True)
class Run:
  """What the report needs of an archive.

  Attributes:
    config: flat keys to values.
    sessions: versions and hardware, one entry for each start of the run.
    dev: scores on the development set, in the order they were written.
    test: likewise on the test set.
    arms: the rounds of the loop and of its control; both begin with the same.
  """

  config: Mapping[str, Any]
  sessions: Sequence[Mapping[str, Any]]
  dev: Mapping[str, records.Score]
  test: Mapping[str, records.Score]
  arms: Mapping[str, tuple[Round, ...]]

  def candidates(self, arm: str) -> list[records.Score]:
    """Development scores of an arm's programs, in the arm's own order.

    Not in the order of the archive: what the other arm wrote too may have
    been scored there first.
    """
    return [s for r in self.arms[arm] for s in r.scores]

  def family(self, name: str) -> list[records.Score]:
    return [
        score
        for model, score in self.dev.items()
        if model.partition(":")[0] == name
    ]

  def top(self) -> list[records.Score]:
    """The loop's best programs by development score alone."""
    return ranked(self.candidates(records.LOOP))[: self.config["top_k"]]

  def found(self, model: str) -> records.Verdict:
    """The loop's first completion that gave the program `model`."""
    digest = digest_of(model)
    return next(
        v
        for r in self.arms[records.LOOP]
        for v in r.verdicts
        if v.digest == digest
    )


def read(store: store_lib.Store) -> Run:
  """Reads a finished, running or broken-off run."""
  config = store.meta("config")
  dev = store.scores(records.DEV)
  steps = range(1, config["iterations"] + 1)
  loop = _rounds(store, dev, [(records.LOOP, t) for t in steps])
  # Same factory, same keys: the first iteration is stored once, for both.
  control = _rounds(
      store,
      dev,
      [(records.LOOP if t == 1 else records.CONTROL, t) for t in steps],
  )
  return Run(
      config=config,
      sessions=store.meta("sessions"),
      dev=dev,
      test=store.scores(records.TEST),
      arms={records.LOOP: loop, records.CONTROL: _budgeted(control, loop)},
  )


def digest_of(model: str) -> str:
  return model.removeprefix(records.PROGRAM)


def ranked(scores: Iterable[records.Score]) -> list[records.Score]:
  """Best first, ties in the given order, of those with all answers."""
  known = [s for s in scores if s.complete and s.accuracy is not None]
  return sorted(known, key=lambda s: -s.accuracy)


def best(scores: Iterable[records.Score]) -> records.Score | None:
  return next(iter(ranked(scores)), None)


def _rounds(store, dev, keys):
  """Rounds of one arm, each without the programs of the ones before it."""
  broken = {
      digest_of(model): score.failure or "non_finite"
      for model, score in dev.items()
      if model.startswith(records.PROGRAM) and score.correct is None
  }
  fingerprints = store.fingerprints()
  rounds, seen = [], []
  for arm, iteration in keys:
    sampled = len(store.completions(arm, iteration))
    if not sampled:
      continue
    verdicts = store.verdicts(arm, iteration)
    seen.append([v.digest for v in verdicts if v.admitted])
    new = [
        records.PROGRAM + digest
        for digest in sandbox.new_by_round(seen, fingerprints)[-1]
    ]
    rounds.append(
        Round(
            iteration=iteration,
            sampled=sampled,
            verdicts=tuple(verdicts),
            scores=tuple(dev[model] for model in new if model in dev),
            broken=broken,
        )
    )
  return tuple(rounds)


def _budgeted(control, loop):
  """The control's rounds, with no more evaluations than the loop's.

  A program beyond the control's budget may have a score all the same, when
  the loop wrote that program too.
  """
  budget = {r.iteration: len(r.scores) for r in loop}
  return tuple(
      dataclasses.replace(r, scores=r.scores[: budget.get(r.iteration)])
      for r in control
  )


def rejection_counts(
    rounds: Iterable[Round],
) -> dict[tuple[str, str], list[int]]:
  """{(stage, code): count in each round}, most frequent first."""
  counters = [
      collections.Counter((stage, code) for stage, code, _ in r.rejections)
      for r in rounds
  ]
  total = sum(counters, collections.Counter())
  return {key: [c[key] for c in counters] for key, _ in total.most_common()}
