"""What is asked of an executor and what it gives back: small frozen messages.

None of them holds weights or questions: a worker has these already. A program
is a few kilobytes of verified IR, and the answers to items are text. Whoever
reads messages alone need not load JAX.
"""

from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from selfdev_jax import config as config_lib
from selfdev_jax import records


@dataclasses.dataclass(frozen=True)
class Sample:
  """Texts of one factory.

  Attributes:
    factory: names its weights.
    prompt: of all of them.
    keys: [n, words] uint32, the data of a PRNG key for each.
    temperature: of the draw.
  """

  factory: str
  prompt: str
  keys: np.ndarray
  temperature: float


@dataclasses.dataclass(frozen=True)
class Answer:
  """One merged model answers items of a split.

  Attributes:
    model: its name, see `records.Score`.
    split: whose items.
    first: the first item.
    before: the item before which it ends.
    is_known: it was merged before, so that a failure would be this host's.
    program: IR (JSON text) of a generated program's model, which the executor
      puts in where it is needed; else empty.
  """

  model: str
  split: str
  first: int
  before: int
  is_known: bool
  program: str = ""


@dataclasses.dataclass(frozen=True)
class Answered:
  """What came of an `Answer`.

  Attributes:
    responses: one an item; none where there is no merged model.
    failure: why, see `runner.Merged`; else empty.
    weights: checksum of the merged model.
    merge_s: seconds until the sampler had it; 0 where it had it.
    evaluate_s: seconds of the answers.
    engine: that gave them, name and version.
  """

  responses: tuple[records.Response, ...]
  failure: str
  weights: str
  merge_s: float
  evaluate_s: float
  engine: str


@dataclasses.dataclass(frozen=True)
class Training:
  """One factory's training; arguments are those of `dpo.train.train`.

  Attributes:
    pairs: dicts with "prompt", "chosen" and "rejected".
    adapter: where it starts, unscaled; a tree of NumPy arrays.
    key: uint32, the data of a PRNG key.
    workdir: on storage that every host sees.
    weights: digest of the seed model.
    label: of progress.
  """

  pairs: Sequence[Mapping[str, Any]]
  adapter: Any
  key: np.ndarray
  workdir: str
  weights: str
  label: str


@dataclasses.dataclass(frozen=True)
class Files:
  """A model's files in Ray's object store.

  Attributes:
    digest: over the names and contents of all of them, hexadecimal.
    parts: of each file, references to what it consists of.
  """

  digest: str
  parts: Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a worker is told once.

  Attributes:
    config: of the run.
    models: the config's names to directories that every host sees, or to
      `org/name[@revision]` on the hub.
    digests: of the models, as the head has them.
    items: digest of all questions, likewise.
    kind: of the sampler.
    longest: positions that a prompt and what follows it need at most.
    vllm_python: the interpreter that has vLLM.
    allow_weak_sandbox: see `sandbox.Sandbox`.
    workdir: of the run, on storage that every host sees.
    decoder: the seed model's shape, a `models.DecoderConfig`.
    files: of each model; None: a worker reads `models`.
    token: names the file that the head has put there.
    lanes: of the sandbox, see `sandbox.Sandbox`.
  """

  config: config_lib.Config
  models: Mapping[str, str]
  digests: Mapping[str, str]
  items: str
  kind: str
  longest: int
  vllm_python: str | None
  allow_weak_sandbox: bool
  workdir: str
  decoder: Any
  files: Mapping[str, Files] | None = None
  token: str = ""
  lanes: int = 1

  @property
  def seen(self) -> pathlib.Path:
    """The file by which a worker knows that it sees the head's workdir."""
    return pathlib.Path(self.workdir) / f"seen-{self.token}.tmp"


@dataclasses.dataclass(frozen=True)
class Hello:
  """What a worker says when it is ready.

  Attributes:
    engine: of its sampler, name and version.
    layers: of its sandbox, as `Sandbox.layers` has them.
    device: what it computes on.
    canary: [tokens - 1] float32, log-probabilities under the seed model.
  """

  engine: str
  layers: Mapping[str, Any]
  device: str
  canary: np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
  """Work for one worker; equal where kind and key are.

  Attributes:
    kind: "sample", "admit", "answer" or "export".
    key: which one.
    about: what it works with, a model or a factory; None: nothing that takes
      time to get.
    payload: what the worker is told.
  """

  kind: str
  key: Hashable
  about: str | None = dataclasses.field(compare=False)
  payload: Any = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a worker says of a piece.

  Attributes:
    value: the result.
    error: one line for the user instead.
    is_stopped: it was left, as it was told.
    seconds: that it took.
    canary: as in `Hello`, now and then.
  """

  value: Any = None
  error: str = ""
  is_stopped: bool = False
  seconds: float = 0.0
  canary: np.ndarray | None = None
