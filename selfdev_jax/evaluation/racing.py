"""Racing: models that cannot be chosen or rejected are not asked everything.

Which programs become preferences is decided by who is among the best and who
among the worst, not by the exact scores between. All models answer the items
in one order that was drawn without looking at them, block by block. After each
block, what a model can still reach on the whole set lies in an interval; one
that enough others surely beat, and that surely beats enough others, is asked
no further.

The interval is a confidence sequence for sampling without replacement, from
the ratio of prior to posterior (I. Waudby-Smith and A. Ramdas, Confidence
sequences for sampling without replacement, NeurIPS 2020): it holds after every
block at once, however one decides to stop. It is paired: what a model has
right is counted apart on the items that a reference, the seed model, has right
and on those that it has wrong, as most merges agree with it on most items.
With each model at error / models, all intervals of a race hold together, and
so does every comparison, with probability 1 - error at least.
"""

import bisect
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools

import numpy as np


def block_ends(size: int, block: int) -> tuple[int, ...]:
  """How many items a model has answered after each block of a race."""
  return (*range(block, size, block), size)


def _log_ratio(size: int, seen: int, right: int) -> np.ndarray:
  """Log of prior over posterior of how many of `size` items are right.

  The prior of the number is uniform, so the posterior of those among the rest
  is beta-binomial.

  Returns:
    [size - seen + 1] float64, by how many of the rest are right.
  """
  log_factorial = np.concatenate(
      [[0.0], np.cumsum(np.log(np.arange(1, size + 2)))]
  )
  rest, wrong = size - seen, seen - right
  more = np.arange(rest + 1)
  log_posterior = (
      log_factorial[rest]
      - log_factorial[more]
      - log_factorial[rest - more]
      + log_factorial[right + more]
      - log_factorial[right]
      + log_factorial[wrong + rest - more]
      - log_factorial[wrong]
      + log_factorial[seen + 1]
      - log_factorial[size + 1]
  )
  return -np.log(size + 1) - log_posterior


@functools.lru_cache(maxsize=1 << 16)
def interval(
    with_reference: tuple[int, int, int],
    without: tuple[int, int, int],
    log_odds: float,
) -> tuple[int, int]:
  """Bounds on how many of all items a model has right.

  Args:
    with_reference: (items in all, items answered, answers right) of those that
      the reference has right.
    without: likewise of those that it has wrong.
    log_odds: log(1 / error) of this interval.

  Returns:
    (low, high), both inclusive.
  """
  first, second = _log_ratio(*with_reference), _log_ratio(*without)
  lowest = int(np.argmin(second))
  allowed = np.flatnonzero(first + second[lowest] < log_odds)
  # The second falls to its minimum and rises again: how far from there it
  # stays within what the first leaves.
  room = log_odds - first[allowed]
  up = np.searchsorted(second[lowest:], room) - 1
  down = np.searchsorted(second[lowest::-1], room) - 1
  right = with_reference[2] + without[2] + allowed + lowest
  return int((right - down).min()), int((right + up).max())


class Race:
  """One race; whoever runs it asks whose turn it is, and tells the answers.

  What it does follows from the answers alone, so a race that is set up again
  from those that were kept goes on as it would have.
  """

  def __init__(
      self,
      models: int,
      reference: Sequence[bool],
      ends: Sequence[int],
      top: int,
      bottom: int,
      error: float,
  ):
    """A race in which no one has answered yet.

    Args:
      models: how many run; of equal scores the earlier one's counts as better
        among the best, and as worse among the worst.
      reference: [items], which ones the reference has right, in their order.
      ends: items that are answered after each block; the last is all.
      top: how many of the best are to be known, with all of their answers.
      bottom: likewise of the worst.
      error: the probability that the race may differ from asking everything.
    """
    reference = np.asarray(reference, bool)
    size = len(reference)
    # [2, items]: those that the reference has right, and has wrong.
    self._strata = np.stack([reference, ~reference])
    self._ends = tuple(ends)
    self._top, self._bottom = top, bottom
    self._log_odds = float(np.log(max(models, 1) / error))
    self._done = np.zeros(models, int)
    self._right = np.zeros((models, 2), int)  # By stratum.
    self._scores = np.zeros(models, int)  # On the first block.
    self._low = np.zeros(models, int)
    self._high = np.full(models, size)
    # Places as numbers, of equal bounds the earlier model's first. Where models
    # stand for sure among the best and among the worst, sorted, and the first
    # place in each that a model may get to.
    self._best = list(range(models))
    self._worst = list(range(size * models, (size + 1) * models))
    self._hopes = np.arange(models) - models * size
    self._fears = np.arange(models)
    # Who is next is last.
    self._unasked = list(range(models))[::-1]
    self._waiting: list[int] | None = None

  def add(self, model: int, answers: Sequence[bool]):
    """Takes a model's answers to its next items, right or wrong."""
    answers = np.asarray(answers, bool)
    first = int(self._done[model])
    last = first + len(answers)
    self._scores[model] += answers[: max(self._ends[0] - first, 0)].sum()
    low, high = self._low[model], self._high[model]
    done = first
    for end in sorted({last, *(e for e in self._ends if first < e <= last)}):
      right = self._strata[:, done:end] & answers[done - first : end - first]
      self._right[model] += right.sum(1)
      done = end
      if end in self._ends:
        bounds = self._interval(end, self._right[model])
        low, high = max(low, bounds[0]), min(high, bounds[1])
    self._done[model] = done
    self._bound(model, int(low), int(high))

  def fail(self, model: int):
    """The model has no answers: it is worse than any that has."""
    self._done[model] = self._ends[-1]
    self._right[model] = self._scores[model] = 0
    self._bound(model, -1, -1)

  def turn(self) -> tuple[int, int, int] | None:
    """(model, item, item): who answers next, from which item to before which.

    First all models answer the first block. Then those at the edges go on,
    each to its end, as the others are measured against them.
    """
    return next(self.ahead(), None)

  def ahead(self) -> Iterator[tuple[int, int, int]]:
    """This turn and those after it, if nobody drops out meanwhile.

    Who goes on after the first blocks is known when all are in: before, these
    are all there is. Ask anew after each `add` and `fail`.
    """
    if self._waiting is None:
      is_unasked = lambda model: not self._done[model]
      for model in _last_first(self._unasked, is_unasked):
        yield model, 0, self._ends[0]
      if self._unasked:
        return
      self._waiting = self._order()[::-1]
    goes_on = lambda model: (
        self._done[model] < self._ends[-1] and not self.is_out(model)
    )
    for model in _last_first(self._waiting, goes_on):
      done = int(self._done[model])
      for end in self._ends[bisect.bisect_right(self._ends, done) :]:
        yield model, done, end
        done = end

  @property
  def missing(self) -> int:
    """Answers that may be asked yet."""
    left = self._ends[-1] - self._done
    return int(left[~self._are_out(slice(None))].sum())

  def is_out(self, model: int) -> bool:
    """Whether it is surely neither among the best nor among the worst.

    It stays so, whatever else is answered: intervals only shrink.
    """
    return bool(self._are_out(model))

  def _are_out(self, model):
    """`is_out` of a model, or of a slice of them."""
    # The last of as many as are to be known is surely better, and worse.
    better = _nth(self._best, self._top) < self._hopes[model]
    worse = _nth(self._worst, self._bottom) < self._fears[model]
    return better & worse

  def _bound(self, model, low, high):
    """Says what a model can reach."""
    models = len(self._low)
    for keys, bounds, bound, sign in (
        (self._best, self._low, low, -1),
        (self._worst, self._high, high, 1),
    ):
      before = model + sign * models * int(bounds[model])
      del keys[bisect.bisect_left(keys, before)]
      bisect.insort(keys, model + sign * models * bound)
      bounds[model] = bound
    self._hopes[model] = model - models * high
    self._fears[model] = model + models * low

  def _interval(self, end, right):
    parts = [
        (int(stratum.sum()), int(stratum[:end].sum()), int(n))
        for stratum, n in zip(self._strata, right, strict=True)
    ]
    return interval(*parts, self._log_odds)

  def _order(self):
    """From both ends of the first block's scores to their middle."""
    scores = self._scores
    edges = [
        _ranks(order) / wanted
        for order, wanted in ((-scores, self._top), (scores, self._bottom))
        if wanted
    ]
    nearest = np.min(edges, axis=0) if edges else np.zeros(len(scores))
    return list(map(int, np.argsort(nearest, kind="stable")))


def _ranks(values: np.ndarray) -> np.ndarray:
  """[models]: how many come before each, ties in the order of models."""
  ranks = np.empty(len(values), int)
  ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
  return ranks


def _nth(keys: Sequence[int], n: int) -> float:
  """The n-th of sorted keys, from 1; infinite where there is none."""
  if not n:
    return -np.inf
  return keys[n - 1] if n <= len(keys) else np.inf


def _last_first(
    models: list[int], holds: Callable[[int], bool]
) -> Iterator[int]:
  """From the end of a list those that something holds for; drops the others.

  What is dropped stands near the end, so that little is moved.
  """
  for place in reversed(range(len(models))):
    if holds(models[place]):
      yield models[place]
    else:
      del models[place]
