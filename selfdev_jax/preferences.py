"""Development scores to preference pairs (paper, section 3.3).

This module sees what it is given and nothing else: it opens no archive, and a
score of any other split than development is refused.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import random

from selfdev_jax import config as config_lib
from selfdev_jax import records


@dataclasses.dataclass(frozen=True)
class Writing:
  """A completion of the loop, as the factory wrote it."""

  iteration: int
  item: int
  text: str


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A program that was merged and scored.

  Attributes:
    writing: the completion that it was taken from.
    digest: its name.
    score: of its merged model, on the development split; one that is not
      complete was stopped by a race and is among neither end.
  """

  writing: Writing
  digest: str
  score: records.Score


def bands(config: config_lib.Preferences, candidates: int) -> tuple[int, int]:
  """How many at either end of an iteration's ranking `build` looks at."""
  top = max(_count(config.top_fraction, candidates), config.elites)
  return top, _count(config.bottom_fraction, candidates)


def build(
    config: config_lib.Preferences,
    iteration: int,
    candidates: Sequence[Candidate],
    earlier: Sequence[Sequence[Candidate]],
    invalid: Sequence[Writing],
    prompt: str,
    seed: int,
) -> list[records.Pair]:
  """Pairs better with worse programs.

  Chosen are the top `top_fraction` of the candidates and the `elites` best of
  every earlier iteration; rejected are the bottom `bottom_fraction`, of which
  `invalid_fraction` give their place to completions that did not run. Both
  sides get at least one program where the candidates' scores differ. A tie at
  a threshold goes to the earlier item, and a program that is chosen is not
  rejected. Chosen always scored strictly higher than its rejected; a program
  whose merge was not finite counts as worse than any that could be evaluated.

  Args:
    config: fractions, pairing and the cap on pairs.
    iteration: whose factory the pairs refine.
    candidates: the iteration's distinct programs, in the order of items.
    earlier: likewise, one sequence for each earlier iteration.
    invalid: the iteration's completions that did not run.
    prompt: the factory's.
    seed: the run's.

  Returns:
    The pairs, numbered from 0; none where nothing can be preferred.

  Raises:
    ValueError: if a score is not of the development split.
  """
  for candidate in itertools.chain(candidates, *earlier):
    if candidate.score.split != records.DEV:
      raise ValueError(
          f"program {candidate.digest} comes with a {candidate.score.split!r}"
          f" score; preferences are made of {records.DEV!r} scores alone"
      )
  rng = random.Random(f"{seed} preferences {iteration}")
  chosen = _chosen(config, candidates, earlier)
  rejected = _rejected(config, candidates, chosen)
  slots = _count(config.bottom_fraction, len(candidates))
  taken = {candidate.writing.text for candidate in chosen}
  failed = {}  # The first of equal texts.
  for writing in invalid:
    if writing.text not in taken:
      failed.setdefault(writing.text, writing)
  drawn = min(round(config.invalid_fraction * slots), len(failed))
  worse = [
      *((c.writing, c.digest, _value(c)) for c in rejected[: slots - drawn]),
      *(
          (writing, None, float("-inf"))
          for writing in rng.sample(list(failed.values()), drawn)
      ),
  ]
  pairs = [
      (better, writing, digest)
      for better, (writing, digest, value) in _PAIRINGS[config.pairing](
          chosen, worse
      )
      if _value(better) > value
  ]
  if len(pairs) > config.max_pairs:
    kept = sorted(rng.sample(range(len(pairs)), config.max_pairs))
    pairs = [pairs[i] for i in kept]
  return [
      records.Pair(
          iteration=iteration,
          item=item,
          prompt=prompt,
          chosen=better.writing.text,
          rejected=worse.text,
          chosen_digest=better.digest,
          rejected_digest=digest,
          chosen_iteration=better.writing.iteration,
          chosen_item=better.writing.item,
          rejected_item=worse.item,
      )
      for item, (better, worse, digest) in enumerate(pairs)
  ]


def _value(candidate: Candidate) -> float:
  accuracy = candidate.score.accuracy
  return -1.0 if accuracy is None else accuracy


def _count(fraction: float, candidates: int) -> int:
  return max(1, round(fraction * candidates))


def _complete(candidates: Sequence[Candidate]) -> list[Candidate]:
  return [c for c in candidates if c.score.complete]


def _best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
  # sorted() is stable: among equals the earlier item comes first.
  return sorted(candidates, key=lambda candidate: -_value(candidate))


def _chosen(config, candidates, earlier) -> list[Candidate]:
  """The top of this iteration, then the elites; each program once."""
  known = _complete(candidates)
  # The lowest score of all is no merit, however large the fraction.
  lowest = min(map(_value, known), default=0.0)
  top = _best_first(known)[: _count(config.top_fraction, len(candidates))]
  top = [candidate for candidate in top if _value(candidate) > lowest]
  for iteration in earlier:
    evaluated = [
        c for c in _complete(iteration) if c.score.accuracy is not None
    ]
    top += _best_first(evaluated)[: config.elites]
  by_digest = {}
  for candidate in top:
    by_digest.setdefault(candidate.digest, candidate)
  return list(by_digest.values())


def _rejected(config, candidates, chosen) -> list[Candidate]:
  """The bottom of this iteration, worst first, without the chosen."""
  digests = {candidate.digest for candidate in chosen}
  known = _complete(candidates)
  highest = max(map(_value, known), default=0.0)
  worst = sorted(known, key=_value)
  bottom = [
      candidate
      for candidate in worst
      if candidate.digest not in digests and _value(candidate) < highest
  ]
  return bottom[: _count(config.bottom_fraction, len(candidates))]


def _product(chosen, rejected):
  return list(itertools.product(chosen, rejected))


def _matched(chosen, rejected):
  """The i-th with the i-th, the shorter list over and over."""
  n = max(len(chosen), len(rejected)) if chosen and rejected else 0
  return [
      (chosen[i % len(chosen)], rejected[i % len(rejected)]) for i in range(n)
  ]


_PAIRINGS = {"product": _product, "matched": _matched}
