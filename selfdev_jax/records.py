"""What a run writes down: plain frozen records, one per row of the archive."""

import dataclasses
import math
from typing import Any

LOOP = "loop"  # The arm whose factory is refined by DPO.
CONTROL = "control"  # The same loop without DPO.
ARMS = (LOOP, CONTROL)

# How the name of a score begins: a generated program, and the baselines that
# are sweeps over settings.
PROGRAM = "program:"
SWEEPS = ("task_arithmetic", "ties", "weights")

DEV = "dev"
TEST = "test"

# Standard normal quantile of a two-sided 95 % interval.
_Z95 = 1.959963984540054


def wilson(correct: int, n: int) -> tuple[float, float]:
  """95 % Wilson score interval of a proportion.

  Args:
    correct: successes, 0 <= correct <= n.
    n: trials, at least 1.

  Returns:
    (low, high), both in [0, 1].

  References:
    E. B. Wilson, Probable inference, JASA 22 (1927).
  """
  if not 0 <= correct <= n or n < 1:
    raise ValueError(f"{correct} of {n} is no proportion")
  p, z2 = correct / n, _Z95**2
  centre = (p + z2 / (2 * n)) / (1 + z2 / n)
  half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
  # Rounding leaves the ends of these just inside.
  low = centre - half if correct else 0.0
  return low, centre + half if correct < n else 1.0


@dataclasses.dataclass(frozen=True)
class Completion:
  """One sampled text of the factory."""

  arm: str
  iteration: int  # From 1.
  item: int  # Position within the iteration.
  text: str
  finished: bool  # False when cut at the token limit.
  engine: str = ""  # What sampled it: "jax 0.10.2", "vllm 0.32.0".
  factory: int = 1  # Iteration of the factory; the seed model is the first.


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What admission said of one completion.

  `digest` names the admitted program; a rejected one has stage, code, message.
  """

  arm: str
  iteration: int
  item: int
  source: str
  digest: str | None = None
  stage: str = ""
  code: str = ""
  message: str = ""

  @property
  def admitted(self) -> bool:
    return self.digest is not None


@dataclasses.dataclass(frozen=True)
class Response:
  """One answer of a merged model."""

  item: int
  prompt: str
  text: str
  gold: str
  extracted: str | None
  correct: bool
  truncated: bool = False  # The prompt did not fit and lost its beginning.
  trouble: str = ""  # The scorer's: "timeout" or "error", counted as wrong.


@dataclasses.dataclass(frozen=True)
class Score:
  """Accuracy of one merged model on one split.

  `model` is `program:DIGEST`, or a baseline such as `ties:density=0.5,...`,
  `seed`, `expert:NAME`. `correct` is None where there is no merged model to
  evaluate; `failure` says why: "non_finite", "memory", "timeout", "crash" or
  "exception". `reused` names the model whose score this is: a program with
  another digest and the same fingerprint, which was not evaluated again.
  `items` counts the whole split: a model that answered fewer, `n`, was stopped
  by a race (evaluation/racing.py), or is not done. `weights` is the checksum of
  the merged model (models/checksum.py).
  """

  model: str
  split: str
  n: int
  correct: int | None
  merge_s: float = 0.0
  evaluate_s: float = 0.0
  engine: str = ""  # As in `Completion`.
  failure: str = ""
  reused: str = ""
  items: int | None = None  # Becomes n where it is not given.
  weights: str = ""

  def __post_init__(self):
    if self.items is None:
      object.__setattr__(self, "items", self.n)

  @property
  def complete(self) -> bool:
    return self.n == self.items

  @property
  def accuracy(self) -> float | None:
    return None if self.correct is None else self.correct / self.n

  @property
  def interval(self) -> tuple[float, float] | None:
    return None if self.correct is None else wilson(self.correct, self.n)


@dataclasses.dataclass(frozen=True)
class Pair:
  """One preference: items of completions that share the factory's prompt."""

  iteration: int  # Of the factory that the pair will refine.
  item: int
  prompt: str
  chosen: str
  rejected: str
  chosen_digest: str
  rejected_digest: str | None  # None: the rejected program did not run.
  chosen_iteration: int  # Whose completion `chosen_item` was chosen.
  chosen_item: int
  rejected_item: int


@dataclasses.dataclass(frozen=True)
class Step:
  """Metrics of one DPO step, under TRL's names."""

  iteration: int
  step: int
  metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Incident:
  """What happened to a worker of a run over many hosts.

  No result depends on it: whoever has the work of a worker that is lost gives
  the same answers. But what a host gave shortly before it was drained may be
  wrong.
  """

  kind: str  # "started", "joined", "lost", "drained" or "duplicated".
  worker: str
  host: str
  detail: str
  at: float | None = None  # Unix time; the archive sets it.


@dataclasses.dataclass(frozen=True)
class Activity:
  """One stretch of work on a stage; a resumed stage has several.

  `seconds` are wall-clock seconds, of one that was killed until its last
  write; `writing_s` of them went into the archive. `done` of `total` units are
  done since it started.
  """

  id: int
  session: int
  arm: str
  iteration: int  # 0 for what belongs to no iteration.
  stage: str
  seed: int
  started: float | None  # Unix time; None in archives before schema 5.
  seconds: float
  writing_s: float = 0.0
  done: int = 0
  total: int | None = None
  unit: str = ""
  finished: bool = True
