"""What a benchmark is: its items, and how its answers are marked."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses


@dataclasses.dataclass(frozen=True)
class Item:
  """One question.

  Attributes:
    prompt: as the model sees it, shots included.
    gold: the published answer; of GSM8K and MATH the whole worked solution.
  """

  prompt: str
  gold: str


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
      order; n None: all of them.
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
