"""What one host does with its models: sample, merge and answer, train."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import pathlib
import time
from typing import Any

import jax
import transformers

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax.dpo import train as train_lib
from selfdev_jax.executors import work as work_lib
from selfdev_jax.sampling import engine as engine_lib
from selfdev_jax.sandbox import runner


class StoppedError(Exception):
  """Work that is no longer wanted was left."""


@dataclasses.dataclass(frozen=True)
class Models:
  """What is merged: the seed model, its experts and their tokenizer."""

  decoder: models.DecoderConfig
  seed: models.Params
  merges: runner.Merging
  tokenizer: transformers.PreTrainedTokenizerBase
  directory: pathlib.Path  # The seed model's.


def load(
    config: config_lib.Config,
    paths: Mapping[str, pathlib.Path],
    stack: contextlib.ExitStack,
) -> Models:
  """Reads the models of a config.

  Args:
    config: of the run.
    paths: directories, by the config's names.
    stack: gets what has to be closed again.
  """
  seed_path = paths[config.seed_model]
  decoder, seed = convert.load(seed_path)
  experts = {name: paths[name] for name in config.experts}
  for name, path in experts.items():
    for difference in _differences(decoder, convert.read_config(path)):
      progress.note(f"expert {name} {difference}")
  scope = config.merge.scope
  if jax.default_backend() == "tpu":
    progress.note(
        "one process has the TPU: merges run in this one, without a watchdog"
    )
    trees = {name: convert.load(path)[1] for name, path in experts.items()}
    merges = runner.Merges(seed, trees, scope)
  else:
    engine_lib.check_shared_device("the process that merges")
    merges = stack.enter_context(
        runner.Runner(seed, seed_path, experts, scope, config.merge.timeout_s)
    )
  for note in merges.notes:
    progress.note(note)
  tokenizer = convert.load_tokenizer(seed_path)
  return Models(decoder, seed, merges, tokenizer, seed_path)


def _differences(
    seed: models.DecoderConfig, expert: models.DecoderConfig
) -> list[str]:
  """Of what no tensor shows and a merged model has from the seed model."""
  free = ("vocab_size", "max_positions")
  names = [f.name for f in dataclasses.fields(seed) if f.name not in free]
  return [
      f"has {name} {getattr(expert, name)}, the seed model"
      f" {getattr(seed, name)}: it is merged and run with the seed model's"
      for name in names
      if getattr(expert, name) != getattr(seed, name)
  ]


def open_sampler(
    kind: str,
    settings: config_lib.Vllm,
    loaded: Models,
    longest: int,
    log_dir: pathlib.Path,
    python: str | None = None,
    address: str | None = None,
) -> sampling.Sampler:
  """`sampling.engine.open_sampler` for models that are loaded."""
  return engine_lib.open_sampler(
      kind,
      loaded.decoder,
      loaded.seed,
      loaded.tokenizer,
      loaded.directory,
      longest=longest,
      log_dir=log_dir,
      settings=settings,
      python=python,
      address=address,
  )


def sweep_settings(family: str, settings: str) -> tuple[str, dict[str, Any]]:
  """Method and parameters behind a name of one of `records.SWEEPS`."""
  values = [float(part.split("=")[-1]) for part in settings.split(",")]
  if family == "ties":
    density, scale = values
    return "ties", {"weight": 1.0, "density": density, "lambda_": scale}
  # One scale for all experts, or a weight for each.
  return "task_arithmetic", {"weight": values if values[1:] else values[0]}


def merge(loaded: Models, name: str, program: str = "") -> runner.Merged:
  """The model behind the name of a score.

  Args:
    loaded: what is merged.
    name: see `records.Score`.
    program: IR (JSON text), where a program is named.
  """
  family, _, settings = name.partition(":")
  if family == "seed":
    return runner.Merged(loaded.seed)
  if family == "expert":
    return loaded.merges.expert(settings)
  if name.startswith(records.PROGRAM):
    return loaded.merges.program(program)
  method, parameters = sweep_settings(family, settings)
  return loaded.merges.method(method, **parameters)


def unrepeated(name: str, failure: str) -> errors.UserError:
  """The error for a merge that was made before and now is not."""
  return errors.UserError(
      f"{name} was merged before and now is not ({failure}); free memory, or"
      " stop what else runs here: the same command resumes"
  )


def respond(
    sampler: sampling.Sampler,
    task: evaluation.Task,
    settings: config_lib.Evaluate,
    items: Sequence[evaluation.Item],
    first: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[records.Response]:
  """What the model that the sampler has says to items from `first` on.

  Raises:
    StoppedError: between two batches.
  """
  batches = sampler.generate(
      [item.prompt for item in items],
      max_new_tokens=settings.max_new_tokens,
      # The embedded sampler would fill a smaller batch up.
      batch_size=min(settings.batch_size, len(items)),
      stop=task.stop,
  )
  generations = []
  with contextlib.closing(batches):
    for batch in batches:
      generations += batch
      if is_stopped():
        raise StoppedError
  return evaluation.grade(task, items, generations, first)


class Worker:
  """Models, a sampler that has one of them, and the questions."""

  def __init__(
      self,
      loaded: Models,
      sampler: sampling.Sampler,
      settings: config_lib.Evaluate,
  ):
    """Holds on to its arguments.

    Args:
      loaded: what is merged.
      sampler: gets the weights; the caller closes it.
      settings: whose task and items are asked.
    """
    self._loaded = loaded
    self._sampler = sampler
    self._settings = settings
    self._task = evaluation.load(settings)
    self._items = evaluation.load_items(settings)
    self._held, self._weights = "", ""  # The model that the sampler has.

  def hold_factory(self, name: str, adapter: models.Params | None):
    """Gives the sampler a factory; `adapter` None: the seed model."""
    self._held = ""
    self._sampler.swap_weights(self._loaded.seed, name, adapter)

  def sample(
      self, prompt: str, keys: jax.Array, config: config_lib.Propose, **draw
  ):
    """Batches of the factory's texts, as from `Sampler.generate`."""
    return self._sampler.generate(
        [prompt] * len(keys),
        keys,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        **draw,
    )

  @property
  def engine(self) -> str:
    return self._sampler.engine

  def answer(
      self,
      work: work_lib.Answer,
      is_stopped: Callable[[], bool] = lambda: False,
  ) -> work_lib.Answered:
    """Merges, where the sampler does not have it yet, and answers.

    Raises:
      StoppedError: if `is_stopped` came true meanwhile.
    """
    start = merged = time.monotonic()
    if self._held != work.model:
      failure = self._hold(work)
      merged = time.monotonic()
      if failure:
        seconds = merged - start
        return work_lib.Answered((), failure, "", seconds, 0.0, self.engine)
    if is_stopped():
      raise StoppedError
    responses = respond(
        self._sampler,
        self._task,
        self._settings,
        self._items[work.split][work.first : work.before],
        work.first,
        is_stopped,
    )
    return work_lib.Answered(
        tuple(responses),
        "",
        self._weights,
        merged - start,
        time.monotonic() - merged,
        self.engine,
    )

  def _hold(self, work: work_lib.Answer) -> str:
    """Merges and swaps; says why it could not."""
    self._held = ""
    params, failure = merge(self._loaded, work.model, work.program)
    # Whoever has answered, or was chosen for its answers, was merged.
    if failure and work.is_known:
      params, failure = merge(self._loaded, work.model, work.program)
    if failure:
      return failure
    self._weights = models.checksum(params)
    self._sampler.swap_weights(params, work.model)
    self._held = work.model
    return ""

  def export(self, name: str, program: str, directory: pathlib.Path):
    """Writes a model that was merged before as a Hugging Face directory.

    Raises:
      UserError: if it cannot be merged any more.
    """
    self._held = ""  # The next merge may take its memory.
    params, failure = merge(self._loaded, name, program)
    if failure:
      raise unrepeated(name, failure)
    like = self._loaded.directory
    convert.save(directory, self._loaded.decoder, params, like=like)


def train(
    config: config_lib.Dpo,
    decoder: models.DecoderConfig,
    params: models.Params,
    tokenizer: transformers.PreTrainedTokenizerBase,
    training: work_lib.Training,
    on_step: Callable[[int, dict[str, float]], None],
) -> tuple[models.Params, list[dict[str, float]]]:
  """See `dpo.train.train`."""
  data = train_lib.prepare(config, decoder, tokenizer, training.pairs)
  return train_lib.train(
      config,
      decoder,
      params,
      training.adapter,
      data,
      jax.random.wrap_key_data(training.key),
      workdir=training.workdir,
      weights=training.weights,
      label=training.label,
      on_step=on_step,
  )
