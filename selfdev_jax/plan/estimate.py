"""A run, stage by stage: how often what is done, with what it takes."""

from collections.abc import Sequence
import dataclasses
import os

from selfdev_jax import config as config_lib
from selfdev_jax import records
from selfdev_jax.plan import cost
from selfdev_jax.plan import words
from selfdev_jax.plan.devices import Device

# Of the programs sampled, those that an iteration evaluates: the paper has 100
# to 300 of 3,000. The toy world's factory has read such programs: 173 of 240
# (BUILD_NOTES.md, "The demo").
NEW_SHARE = 0.07
_NEW_SHARE_TINY = 0.72
# Of propose.max_new_tokens, what a program has on average.
COMPLETION_SHARE = 0.6
# Bytes of a response's row in the archive, beside its text, and of a character
# of text in a token.
_ROW_BYTES = 90
_CHARS_PER_TOKEN = 3.5
_CONTROL_AT_MOST = 3  # Times the samples; loop.py draws no more.
_VLLM_SEQUENCES = 256  # That vLLM runs at once, unless it is told.
_LANES = 8  # Of the sandbox, at most.
_LANE_BYTES = 0.6e9  # BUILD_NOTES.md: two lanes and their caller, 1.2 GB.
# Of the host, for Python and JAX, and for a device's driver and libraries.
_PROCESS_BYTES, _DRIVER_BYTES = 1e9, 2e9


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Tokens.

  Attributes:
    prompt: of the factory's prompt.
    question: of an evaluation's prompt, on average, shots included.
    shared: of these the beginning that all questions share.
    answer: of an answer, on average.
    where: how they are known.
  """

  prompt: int
  question: float
  shared: float
  answer: float
  where: str


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of one iteration.

  Attributes:
    name: as the archive has it, with arm and iteration.
    does: in words.
    tokens: read and written, together.
    device_bytes: of all processes on the device while it lasts; None where it
      does not use it.
    seconds: None where no device is known.
  """

  name: str
  does: str
  tokens: float
  device_bytes: float | None
  seconds: float | None


@dataclasses.dataclass(frozen=True)
class Estimate:
  """All stages, and what they need at once.

  Attributes:
    stages: in order.
    compiled: programs and leaf kinds that are compiled for.
    host_bytes: of the host's memory.
    disk_bytes: of the workdir.
    download_bytes: of the hub's cache, if nothing is there.
    vllm_texts: evaluations that vLLM's share of the device has room for at
      once; None without vLLM or a device.
  """

  stages: Sequence[Stage]
  compiled: int
  host_bytes: float
  disk_bytes: float
  download_bytes: float
  vllm_texts: int | None

  @property
  def seconds(self) -> float | None:
    parts = [stage.seconds for stage in self.stages]
    return None if None in parts else sum(parts)

  @property
  def device_bytes(self) -> float:
    return max(s.device_bytes for s in self.stages if s.device_bytes)


def new_programs(config: config_lib.Config) -> int:
  """Programs that an iteration is expected to evaluate."""
  share = _NEW_SHARE_TINY if config.tiny is not None else NEW_SHARE
  return max(1, round(share * config.propose.samples))


def estimate(
    config: config_lib.Config,
    model: cost.Model,
    lengths: Lengths,
    sampler: str,
    device: Device | None,
) -> Estimate:
  """What the run takes on that device; no seconds without one.

  Args:
    config: the run.
    model: the seed model's size; experts are taken to have the same.
    lengths: of its texts.
    sampler: "vllm" or "jax".
    device: one accelerator.
  """
  return Estimator(config, model, lengths, sampler, device).all()


class Estimator:
  """The stages of loop.py, counted instead of done."""

  def __init__(self, config, model, lengths, sampler, device):
    self._config = config
    self._model = model
    self._lengths = lengths
    self._sampler = sampler
    self._device = device
    self._experts = len(config.experts)
    self._new = new_programs(config)
    self._completion = round(COMPLETION_SHARE * config.propose.max_new_tokens)

  def all(self) -> Estimate:
    config, last = self._config, self._config.iterations
    budget, singles = last * self._new, 1 + self._experts
    stages = [
        self._start(),
        self._scored("single models", singles, 0, records.DEV),
    ]
    for t in range(1, last + 1):
      stages += self._iteration(records.LOOP, t)
      if t > 1:
        stages += self._iteration(records.CONTROL, t)
      if t < last:
        stages.append(self._refine(t))
    for family in records.SWEEPS:
      stages.append(self._scored(family, budget, 1, records.DEV, races=True))
    if config.evaluate.racing:
      asked = f"asks the best {config.top_k} of all iterations what is missing"
      time = None if self._device is None else 0.0
      stages.append(Stage("finalists", asked, 0, None, time))
    # The control's programs, and a best of each sweep and of the control.
    test = singles + len(records.SWEEPS) + min(config.top_k, budget) + 1
    stages.append(self._scored("best, on test", test, test, records.TEST))
    stages.append(self._export())
    programs = budget + (last - 1) * self._new
    return Estimate(
        stages,
        compiled=programs,
        host_bytes=self._host_bytes(),
        disk_bytes=self._disk_bytes(singles + 3 * budget + programs, test),
        download_bytes=singles * self._model.nbytes,
        vllm_texts=self._vllm_texts(),
    )

  # What processes hold.

  def _merging_bytes(self) -> float:
    """Of the process that merges: all models, and the last result."""
    kept = (1 + self._experts) * self._model.nbytes + self._model.merged_bytes
    return kept + self._context_bytes()

  def _context_bytes(self) -> float:
    return cost.CONTEXT_BYTES if self._device is not None else 0.0

  def _sampler_bytes(self, batch, prompt, new, shared) -> float:
    if self._sampler == "vllm":
      return self._vllm_bytes()
    return cost.jax_sampler_bytes(self._model, batch, prompt, new, shared)

  def _vllm_bytes(self) -> float:
    if self._sampler != "vllm":
      return 0.0
    if self._device is None:
      return self._model.nbytes + cost.VLLM_OWN_BYTES
    share = self._config.vllm.gpu_memory_utilization
    return share * self._device.memory_bytes

  def _base_bytes(self) -> float:
    """Of every stage: who merges, and this process with the seed model."""
    return self._merging_bytes() + self._model.nbytes + self._context_bytes()

  def _running(self, batch: int, context: float) -> int:
    """Texts that are written at once; as if there was room where there is none.

    Whether there is stands among the checks.
    """
    if self._sampler != "vllm":
      return batch
    most, fits = min(batch, _VLLM_SEQUENCES), self._fitting(context)
    return min(most, fits) if fits else most

  def _fitting(self, context: float) -> int:
    """Texts of that length whose keys and values vLLM has room for."""
    room = self._vllm_bytes() - self._model.nbytes - cost.VLLM_OWN_BYTES
    return max(0, int(room / (context * self._model.cache_bytes)))

  # Stages.

  def _start(self) -> Stage:
    nbytes = (1 + self._experts) * self._model.nbytes
    seconds = None
    if self._device is not None:
      # Read for the digests, by this process, and by the one that merges.
      seconds = 3 * nbytes / cost.DISK_BYTES_PER_S
      seconds += cost.VLLM_START_S if self._sampler == "vllm" else 0.0
    return Stage(
        "start",
        f"reads {1 + self._experts} models, {words.gigabytes(nbytes)},"
        " three times",
        0,
        self._base_bytes(),
        seconds,
    )

  def _iteration(self, arm: str, t: int) -> list[Stage]:
    name = f"{t} {arm}"
    return [
        self._propose(name, arm, t),
        self._admit(name),
        self._scored(
            f"{name}: evaluate", self._new, self._new, records.DEV, races=True
        ),
    ]

  def _propose(self, name: str, arm: str, t: int) -> Stage:
    propose, n = self._config.propose, self._config.propose.samples
    prompt, new = self._lengths.prompt, propose.max_new_tokens
    # vLLM ends a text by itself, JAX a batch with its longest.
    written = self._completion if self._sampler == "vllm" else new
    held = self._base_bytes() + self._sampler_bytes(
        propose.batch_size, prompt, new, True
    )
    if arm == records.LOOP and t > 1:
      dpo = self._config.dpo
      if self._sampler == "vllm":  # The adapter is added to the weights.
        held += self._model.nbytes
      trained = self._model.lora_parameters(dpo.lora_rank, dpo.lora_targets)
      held += 4 * trained
    seconds = None
    if self._device is not None:
      running = self._running(propose.batch_size, prompt + new)
      seconds = cost.decode_seconds(
          self._model,
          self._device,
          n,
          running,
          written,
          prompt + self._completion / 2,
      )
      if t == 1:
        seconds += cost.COMPILE_MODEL_S if self._sampler == "jax" else 0
    more = (
        f", up to {_CONTROL_AT_MOST * n:,} where many are known"
        if arm == records.CONTROL
        else ""
    )
    temperature = self._config.temperature(t)
    return Stage(
        f"{name}: propose",
        f"samples {n:,} programs at temperature {temperature:.3g}{more}",
        n * self._completion + prompt,
        held,
        seconds,
    )

  def _admit(self, name: str) -> Stage:
    n, lanes = self._config.propose.samples, _lanes()
    seconds = None
    if self._device is not None:
      seconds = n * cost.ADMIT_CPU_S / lanes
    return Stage(
        f"{name}: admit",
        f"traces {n:,} programs, {lanes} at a time; about {self._new:,} are"
        " new",
        0,
        None,
        seconds,
    )

  def _scored(
      self, name: str, n: int, compiled: int, split: str, races: bool = False
  ) -> Stage:
    """`n` models merged and evaluated, of which so many are compiled for."""
    settings = self._config.evaluate
    items = settings.dev_size if split == records.DEV else settings.test_size
    lengths = self._lengths
    sampling = self._sampler_bytes(
        settings.batch_size,
        round(lengths.question),
        settings.max_new_tokens,
        False,
    )
    merged = self._model.merged_bytes
    # The next merged model arrives while the sampler still has the last: with
    # vLLM beside its memory, in JAX after its batches.
    if self._sampler == "vllm":
      sampling += merged
    held = self._base_bytes() + merged + max(merged, sampling)
    seconds = None
    if self._device is not None:
      seconds = n * (self._merge_seconds() + self._answer_seconds(items))
      seconds += compiled * self._model.leaf_kinds * cost.COMPILE_KIND_S
    most = "at most " if races and settings.racing else ""
    return Stage(
        name,
        f"merges {n:,} models, answers {most}{items:,} {split} items with each",
        n * items * (lengths.question + lengths.answer),
        held,
        seconds,
    )

  def _merge_seconds(self) -> float:
    merged = cost.merge_seconds(self._model, self._device, self._experts)
    return merged + cost.swap_seconds(self._model, self._device, self._sampler)

  def _answer_seconds(self, items: int) -> float:
    lengths, new = self._lengths, self._config.evaluate.max_new_tokens
    # vLLM keeps what prompts share and ends a text at its stop; in JAX every
    # prompt is read, and a batch goes on to its longest answer.
    is_vllm = self._sampler == "vllm"
    read = lengths.question - (lengths.shared if is_vllm else 0)
    running = self._running(
        self._config.evaluate.batch_size, lengths.question + lengths.answer
    )
    return cost.prefill_seconds(
        self._model, self._device, items, round(read)
    ) + cost.decode_seconds(
        self._model,
        self._device,
        items,
        running,
        min(lengths.answer, new) if is_vllm else new,
        lengths.question + lengths.answer / 2,
    )

  def pairs(self, t: int) -> tuple[int, int, int]:
    """(chosen, rejected, pairs) of an iteration."""
    settings = self._config.preferences
    count = lambda fraction: max(1, round(fraction * self._new))
    chosen = count(settings.top_fraction) + settings.elites * (t - 1)
    rejected = count(settings.bottom_fraction)
    pairs = (
        chosen * rejected
        if settings.pairing == "product"
        else max(chosen, rejected)
    )
    return chosen, rejected, min(pairs, settings.max_pairs)

  def _refine(self, t: int) -> Stage:
    dpo, device = self._config.dpo, self._device
    chosen, rejected, pairs = self.pairs(t)
    step = cost.dpo_step(
        dpo, chosen, rejected, self._lengths.prompt, self._completion
    )
    done, _ = cost.dpo_flops(self._model, dpo, step)
    slots = dpo.steps * step.rows * step.length
    held = self._base_bytes() + self._vllm_bytes()
    held += sum(cost.dpo_bytes(self._model, dpo, step).values())
    seconds = None
    if device is not None:
      per_step = done / (cost.DPO_MFU * device.tflops * 1e12)
      seconds = dpo.steps * per_step + 2 * cost.COMPILE_MODEL_S
    trained = self._model.lora_parameters(dpo.lora_rank, dpo.lora_targets)
    return Stage(
        f"{t} loop: refine",
        f"DPO on about {pairs:,} pairs of {chosen} and {rejected} programs,"
        f" {dpo.steps} steps of {dpo.batch_size}; {step.rows} rows of"
        f" {step.length} tokens, {words.count(done)}FLOP a step;"
        f" {words.count(trained)} parameters",
        slots,
        held,
        seconds,
    )

  def _export(self) -> Stage:
    seconds = None
    if self._device is not None:
      seconds = self._merge_seconds()
      seconds += self._model.nbytes / cost.DISK_BYTES_PER_S
    return Stage(
        "export",
        f"writes the best model, {words.gigabytes(self._model.nbytes)}",
        0,
        self._base_bytes() + self._vllm_bytes() + self._model.merged_bytes,
        seconds,
    )

  # The rest.

  def _vllm_texts(self) -> int | None:
    if self._sampler != "vllm" or self._device is None:
      return None
    return self._fitting(self._lengths.question + self._lengths.answer)

  def _host_bytes(self) -> float:
    processes = 3 if self._sampler == "vllm" else 2
    each = _PROCESS_BYTES + (_DRIVER_BYTES if self._device else 0)
    # A model passes through the host whole; results through shared memory.
    return (
        self._model.nbytes
        + 2 * self._model.merged_bytes
        + _lanes() * _LANE_BYTES
        + processes * each
    )

  def _disk_bytes(self, dev: int, test: int) -> float:
    config, refinements = self._config, self._config.iterations - 1
    dpo = config.dpo
    trained = self._model.lora_parameters(dpo.lora_rank, dpo.lora_targets)
    adapters = refinements * trained * 4
    # Two checkpoints at a time, of adapter and moments.
    checkpoints = 2 * 3 * 4 * trained if refinements else 0
    sizes = config.evaluate
    responses = dev * sizes.dev_size + test * sizes.test_size
    answers = responses * (_ROW_BYTES + self._lengths.answer * _CHARS_PER_TOKEN)
    completions = (2 * config.iterations - 1) * config.propose.samples
    texts = 2 * completions * self._completion * _CHARS_PER_TOKEN
    return self._model.nbytes + adapters + checkpoints + answers + texts


def _lanes() -> int:
  return min(_LANES, len(os.sched_getaffinity(0)))
