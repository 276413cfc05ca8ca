"""What a benchmark is: its items, and how its answers are marked."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import hashlib
import json
from typing import Any

from selfdev_jax import records


@dataclasses.dataclass(frozen=True)
class Item:
  """One question.

  Attributes:
    prompt: as the model sees it, shots included.
    gold: the published answer; of GSM8K and MATH the whole worked solution.
  """

  prompt: str
  gold: str


# Troubles of a comparison.
TIMEOUT, ERROR = "timeout", "error"


@dataclasses.dataclass(frozen=True)
class Mark:
  """What one metric says of one generation.

  Attributes:
    extracted: the answer that it read, None where it found none.
    correct: whether that is the gold answer.
    trouble: "timeout" or "error" where the comparison did not come to an end
      by itself; empty otherwise.
  """

  extracted: str | None
  correct: bool
  trouble: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
  """A benchmark.

  Attributes:
    items: (split, n) -> the first n items of that split, in the task's fixed
      order; n None: all of them. The development set's is a random one, or
      spreads kinds evenly: races (racing.py) rely on it.
    metrics: names of its metrics, lm-evaluation-harness's where it has them;
      the first is the headline.
    score: (generations, golds) -> for each generation a mark by each metric.
    stop: texts that end a generation.
    shots: worked examples that a prompt begins with.
  """

  items: Callable[[str, int | None], list[Item]]
  metrics: tuple[str, ...]
  score: Callable[[Sequence[str], Sequence[str]], list[dict[str, Mark]]]
  stop: tuple[str, ...] = ()
  shots: int = 0

  @property
  def headline(self) -> str:
    return self.metrics[0]


def digest(items: Sequence[Item]) -> str:
  """SHA-256 of prompts and golds, in hex."""
  text = json.dumps([[item.prompt, item.gold] for item in items])
  return hashlib.sha256(text.encode()).hexdigest()


def summarize(marks: Sequence[Mark]) -> dict[str, Any]:
  """What the marks by one metric, at least one, amount to.

  Returns:
    "correct"; "accuracy" and its Wilson interval "ci95", fractions; and how
    many answers were not found, timed out or failed in the scorer:
    "unextracted", "timeouts", "errors".
  """
  n, correct = len(marks), sum(mark.correct for mark in marks)
  troubles = [mark.trouble for mark in marks]
  return {
      "correct": correct,
      "accuracy": correct / n,
      "ci95": list(records.wilson(correct, n)),
      "unextracted": sum(mark.extracted is None for mark in marks),
      "timeouts": troubles.count(TIMEOUT),
      "errors": troubles.count(ERROR),
  }
