"""95 % intervals of differences: between two models, between two arms."""

from collections.abc import Sequence
import math

import numpy as np

_Z95 = 1.959963984540054


def paired(better: int, worse: int, n: int) -> tuple[float, float]:
  """Interval of the difference of two accuracies on the same items.

  Adds half an item to each of the four cells of the table; the plain
  interval is too short where few items differ, and empty where none does.

  Args:
    better: items that only the first model has right.
    worse: items that only the second has right.
    n: items in all, at least 1.

  Returns:
    (low, high) of first minus second.

  References:
    A. Agresti, Y. Min, Simple improved confidence intervals for comparing
    matched proportions, Statistics in Medicine 24 (2005).
  """
  m = n + 2
  centre = (better - worse) / m
  spread = (better + worse + 1) - (better - worse) ** 2 / m
  half = _Z95 * math.sqrt(spread) / m
  return max(-1.0, centre - half), min(1.0, centre + half)


def mean_difference(
    first: Sequence[float], second: Sequence[float], resamples: int = 4000
) -> tuple[float, float]:
  """Percentile bootstrap of mean(first) - mean(second), with a fixed seed.

  Args:
    first: scores of independent programs, at least one.
    second: likewise.
    resamples: draws of either list.

  Returns:
    (low, high), the same at every call.
  """
  rng = np.random.default_rng(0)

  def means(values):
    # Accuracies have few values: how often each is drawn says all.
    distinct, counts = np.unique(np.asarray(values), return_counts=True)
    n = len(values)
    return rng.multinomial(n, counts / n, resamples) @ distinct / n

  low, high = np.quantile(means(first) - means(second), [0.025, 0.975])
  return float(low), float(high)
