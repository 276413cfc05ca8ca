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
    self._reference = np.asarray(reference, bool)
    self._ends = tuple(ends)
    self._top, self._bottom = top, bottom
    self._log_odds = float(np.log(max(models, 1) / error))
    self._answers = [np.zeros(0, bool) for _ in range(models)]
    self._low = np.zeros(models, int)
    self._high = np.full(models, len(self._reference))
    self._waiting: list[int] | None = None

  def add(self, model: int, answers: Sequence[bool]):
    """Takes a model's answers to its next items, right or wrong."""
    before = len(self._answers[model])
    answers = np.concatenate([self._answers[model], np.asarray(answers, bool)])
    self._answers[model] = answers
    for end in self._ends:
      if before < end <= len(answers):
        low, high = self._interval(answers[:end])
        self._low[model] = max(self._low[model], low)
        self._high[model] = min(self._high[model], high)

  def fail(self, model: int):
    """The model has no answers: it is worse than any that has."""
    self._answers[model] = np.zeros(len(self._reference), bool)
    self._low[model] = self._high[model] = -1

  def turn(self) -> tuple[int, int, int] | None:
    """(model, item, item): who answers next, from which item to before which.

    First all models answer the first block. Then those at the edges go on,
    each to its end, as the others are measured against them.
    """
    for model, answers in enumerate(self._answers):
      if not len(answers):
        return model, 0, self._ends[0]
    if self._waiting is None:
      self._waiting = self._order()
    while self._waiting:
      model = self._waiting[0]
      done = len(self._answers[model])
      if done < self._ends[-1] and not self.is_out(model):
        return model, done, next(end for end in self._ends if end > done)
      self._waiting.pop(0)
    return None

  @property
  def missing(self) -> int:
    """Answers that may be asked yet."""
    return sum(
        self._ends[-1] - len(answers)
        for model, answers in enumerate(self._answers)
        if not self.is_out(model)
    )

  def is_out(self, model: int) -> bool:
    """Whether it is surely neither among the best nor among the worst.

    It stays so, whatever else is answered: intervals only shrink.
    """
    low, high = self._low[model], self._high[model]
    earlier = np.arange(len(self._low)) < model
    better = (self._low > high) | ((self._low == high) & earlier)
    worse = (self._high < low) | ((self._high == low) & earlier)
    return better.sum() >= self._top and worse.sum() >= self._bottom

  def _interval(self, answers):
    parts = []
    for stratum in (self._reference, ~self._reference):
      seen = stratum[: len(answers)]
      parts.append(
          (int(stratum.sum()), int(seen.sum()), int(answers[seen].sum()))
      )
    return interval(*parts, self._log_odds)

  def _order(self):
    """From both ends of the first block's scores to their middle."""
    first = self._ends[0]
    scores = np.array([answers[:first].sum() for answers in self._answers])
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
