"""What the loop asks for, whoever does it."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Protocol

import jax

from selfdev_jax import config as config_lib
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import sandbox
from selfdev_jax.executors import work as work_lib
from selfdev_jax.executors import worker as worker_lib

# Gives the work that is wanted by now, the next one first.
Upcoming = Callable[[], Iterator[work_lib.Answer]]


def with_program(
    work: work_lib.Answer, program_of: Callable[[str], str]
) -> work_lib.Answer:
  """The work with its program, where that is not in it yet."""
  program = work.program or program_of(work.model)
  return dataclasses.replace(work, program=program)


class Executor(Protocol):
  """Samples, admits, merges, answers and trains for a run.

  What it gives depends on what it is asked alone, not on where or in which
  order it is computed.

  Attributes:
    decoder: the seed model's shape.
    engine: of what was sampled last, name and version.
  """

  decoder: models.DecoderConfig
  engine: str

  def sample(
      self, work: work_lib.Sample, adapter: models.Params | None
  ) -> Iterator[list[sampling.Generation]]:
    """Batches of texts, in the order of the keys.

    Args:
      work: what is drawn.
      adapter: the factory's, scaled; None: it is the seed model.
    """

  def admit(
      self, sources: Sequence[str]
  ) -> Iterator[sandbox.Admitted | sandbox.Rejection]:
    """Verdicts, in the order of the sources."""

  def answer(
      self, upcoming: Upcoming, program_of: Callable[[str], str]
  ) -> Iterator[work_lib.Answered]:
    """Does the first of `upcoming()`, yields it, and asks again, to the end.

    What comes after the first is what would be asked next if nothing changed:
    it may be done ahead, and is dropped when it is not wanted any more.

    Args:
      upcoming: what is wanted by now, in its order.
      program_of: the IR behind a model's name; empty for a baseline's.

    Raises:
      UserError: where a model that was merged before cannot be any more.
    """

  def train(
      self,
      training: work_lib.Training,
      on_step: Callable[[int, dict[str, float]], None],
  ) -> tuple[models.Params, list[dict[str, float]]]:
    """The trained adapter and the metrics of each step; see `dpo.train`."""

  def export(self, name: str, program: str, directory: pathlib.Path) -> None:
    """Writes a merged model as a Hugging Face directory."""

  def incidents(self) -> list[records.Incident]:
    """What happened to workers since this was asked last."""


class Local:
  """An `Executor` in this process."""

  def __init__(
      self,
      config: config_lib.Config,
      loaded: worker_lib.Models,
      box: sandbox.Sandbox,
      sampler: sampling.Sampler,
  ):
    """Holds on to its arguments; the caller closes them."""
    self.decoder = loaded.decoder
    self._config = config
    self._loaded = loaded
    self._box = box
    self._worker = worker_lib.Worker(loaded, sampler, config.evaluate)

  @property
  def engine(self) -> str:
    return self._worker.engine

  def sample(
      self, work: work_lib.Sample, adapter: models.Params | None
  ) -> Iterator[list[sampling.Generation]]:
    """See `Executor.sample`."""
    self._worker.hold_factory(work.factory, adapter)
    return self._worker.sample(
        work.prompt,
        jax.random.wrap_key_data(work.keys),
        self._config.propose,
        temperature=work.temperature,
    )

  def admit(
      self, sources: Sequence[str]
  ) -> Iterator[sandbox.Admitted | sandbox.Rejection]:
    """See `Executor.admit`."""
    return self._box.admit_all(sources)

  def answer(
      self, upcoming: Upcoming, program_of: Callable[[str], str]
  ) -> Iterator[work_lib.Answered]:
    """See `Executor.answer`."""
    while (work := next(upcoming(), None)) is not None:
      answered = self._worker.answer(with_program(work, program_of))
      if answered.failure and work.is_known:
        raise worker_lib.unrepeated(work.model, answered.failure)
      yield answered

  def train(
      self,
      training: work_lib.Training,
      on_step: Callable[[int, dict[str, float]], None],
  ) -> tuple[models.Params, list[dict[str, float]]]:
    """See `Executor.train`."""
    return worker_lib.train(
        self._config.dpo,
        self._loaded.decoder,
        self._loaded.seed,
        self._loaded.tokenizer,
        training,
        on_step,
    )

  def export(self, name: str, program: str, directory: pathlib.Path) -> None:
    """See `Executor.export`."""
    self._worker.export(name, program, directory)

  def incidents(self) -> list[records.Incident]:
    """None: there is one worker."""
    return []
