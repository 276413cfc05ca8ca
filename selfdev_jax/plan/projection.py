"""What a run would take on many GPUs: time, GPU hours, dollars.

An estimate has the seconds that each stage takes one group of devices. Here a
stage is cut into the pieces that a cluster shares out, and takes as long as the
groups need for them: the last wave counts whole, nothing takes less than one
piece, and no stage is faster than one head process hands out its pieces.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import math

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax.evaluation import racing
from selfdev_jax.plan import cost
from selfdev_jax.plan import estimate as estimate_lib
from selfdev_jax.plan import reading
from selfdev_jax.plan import words
from selfdev_jax.plan.devices import Device
from selfdev_jax.tiny import world

# Pieces that one head process hands out and whose scores it stores, in a
# second: `python -m launch.benchmark_executor --seconds=0` gave 222 with 64
# workers on two shared cores; less what dealing to 512 takes (BUILD_NOTES.md,
# "Many hosts").
HEAD_PIECES_PER_S = 170.0
# Of the answers, what racing asks: measured on the demo's programs with batches
# of 256 of 1,000 items; 47.1 % with batches of 100 (BUILD_NOTES.md,
# "Evaluation").
RACING_SHARE = 0.545
GPUS_PER_HOST = 8
LANES_PER_HOST = 8  # Programs that a host traces at once.
WORKER_START_S = 60.0  # Of a host's workers: Python, JAX, the device.
# Of the archive; BUILD_NOTES.md, "The archive, the dashboard, handing on": with
# verdicts and completions.
PROGRAM_BYTES = 4190

# The columns of the table, and what shares out the work.
START, PROPOSE, ADMIT, EVALUATE, SWEEPS, TRAIN, TEST = STAGES = (
    "start, export",
    "propose",
    "admit",
    "evaluate",
    "sweeps",
    "DPO",
    "test",
)
GROUPS, LANES, TRAINERS = "GPUs", "CPU lanes", "training GPUs"
FIXED, HEAD = "fixed", "head"


@dataclasses.dataclass(frozen=True)
class Part:
  """Pieces of work of equal length, which wait for no other of them.

  Attributes:
    stage: one of `STAGES`.
    by: what does them: GROUPS of devices, LANES of CPUs, TRAINERS; or it is
      FIXED: one host does it, or all do the same.
    pieces: how many.
    piece_s: that one of those takes for a piece.
    messages: how many the head hands out and takes back, in all.
  """

  stage: str
  by: str
  pieces: int
  piece_s: float
  messages: int = 0


@dataclasses.dataclass(frozen=True)
class Run:
  """A run cut into parts, each of which begins when the one before has ended.

  Attributes:
    parts: in order.
    programs: that are sampled, in all arms.
    merged: models that are evaluated on the development set.
    archive_bytes: of the archive at the end.
    device_bytes: of the stage that holds most on a device.
  """

  parts: Sequence[Part]
  programs: int
  merged: int
  archive_bytes: float
  device_bytes: float


@dataclasses.dataclass(frozen=True)
class Cluster:
  """GPUs, all of one kind.

  Attributes:
    gpus: in all.
    group: GPUs that hold one model together.
    trainers: meshes that share out a step of DPO.
    mesh: GPUs of each of these.
  """

  gpus: int
  group: int
  trainers: int
  mesh: int

  @property
  def hosts(self) -> int:
    return math.ceil(self.gpus / GPUS_PER_HOST)

  def workers(self, by: str) -> int:
    """How many work on the pieces of a part."""
    return {
        GROUPS: self.gpus // self.group,
        LANES: self.hosts * LANES_PER_HOST,
        TRAINERS: self.trainers,
        FIXED: 1,
    }[by]


@dataclasses.dataclass(frozen=True)
class Row:
  """One run on one cluster.

  Attributes:
    times: as many samples an iteration as the config's.
    cluster: its GPUs.
    run: what is done.
    seconds: by stage.
    waits: the same seconds by what they are spent waiting for.
    gpu_hours: of all GPUs, from the beginning to the end.
    work_gpu_hours: of these, those in which a GPU has something to do.
    dollars: None where no rate is known.
  """

  times: int
  cluster: Cluster
  run: Run
  seconds: Mapping[str, float]
  waits: Mapping[str, float]
  gpu_hours: float
  work_gpu_hours: float
  dollars: float | None

  @property
  def bound_by(self) -> str:
    """What most of the time is spent waiting for."""
    return max(self.waits, key=self.waits.get)


def cluster(config: config_lib.Config, gpus: int, sampler: str) -> Cluster:
  """So many GPUs as the config uses them.

  Raises:
    UserError: if they do not make up groups, or are too few to train.
  """
  group = config.vllm.tensor_parallel if sampler == "vllm" else 1
  if gpus % group:
    raise errors.UserError(
        f"{gpus} GPUs cannot be shared out in groups of vllm.tensor_parallel ="
        f" {group}; give a multiple of {group}"
    )
  mesh = config.dpo.fsdp * config.dpo.tensor
  training = min(gpus, config.ray.train_hosts * GPUS_PER_HOST)
  if training < mesh:
    raise errors.UserError(
        f"dpo.fsdp x dpo.tensor is {mesh}, but {training} of {gpus} GPUs train;"
        " give more GPUs or ray.train_hosts"
    )
  # A row of the batch is the least that a mesh can take.
  trainers = min(training // mesh, config.dpo.batch_size)
  return Cluster(gpus, group, trainers, mesh)


def larger(config: config_lib.Config, times: int) -> config_lib.Config:
  """The run with so many times the samples of each iteration."""
  propose = dataclasses.replace(
      config.propose, samples=times * config.propose.samples
  )
  return dataclasses.replace(config, propose=propose)


def cut(
    config: config_lib.Config,
    model: cost.Model,
    lengths: estimate_lib.Lengths,
    sampler: str,
    device: Device,
) -> Run:
  """The estimate's stages as parts; arguments are those of `estimate`."""
  return _Cutter(config, model, lengths, sampler, device).cut()


def project(run: Run, on: Cluster, times: int, rate: float | None) -> Row:
  """A run on a cluster.

  Args:
    run: what is done.
    on: where.
    times: that the run was made larger.
    rate: dollars of a GPU for an hour.
  """
  seconds = dict.fromkeys(STAGES, 0.0)
  waits: dict[str, float] = {}
  work_s = 0.0
  for part in run.parts:
    taken, reason = _makespan(part, on)
    seconds[part.stage] += taken
    waits[reason] = waits.get(reason, 0.0) + taken
    size = {GROUPS: on.group, TRAINERS: on.mesh}.get(part.by, 0)
    work_s += size * part.pieces * part.piece_s
  gpu_hours = on.gpus * sum(seconds.values()) / 3600
  return Row(
      times,
      on,
      run,
      seconds,
      waits,
      gpu_hours,
      work_s / 3600,
      None if rate is None else rate * gpu_hours,
  )


def _makespan(part: Part, on: Cluster) -> tuple[float, str]:
  """(seconds, what they are spent waiting for)."""
  taken = math.ceil(part.pieces / on.workers(part.by)) * part.piece_s
  handed_out = part.messages / HEAD_PIECES_PER_S
  return (handed_out, HEAD) if handed_out > taken else (taken, part.by)


class _Cutter(estimate_lib.Estimator):
  """Goes through the stages as an estimate does, and keeps their pieces."""

  def __init__(self, config, model, lengths, sampler, device):
    super().__init__(config, model, lengths, sampler, device)
    self._parts: list[Part] = []
    self._answers = self._programs = self._merged = 0

  def cut(self) -> Run:
    found = self.all()
    one, none = self._disk_bytes(1, 0), self._disk_bytes(0, 0)
    answer_bytes = (one - none) / self._config.evaluate.dev_size
    archive = self._answers * answer_bytes + self._programs * PROGRAM_BYTES
    return Run(
        self._parts, self._programs, self._merged, archive, found.device_bytes
    )

  def _start(self):
    stage = super()._start()
    taken = stage.seconds + WORKER_START_S  # At all hosts at once.
    self._parts.append(Part(START, FIXED, 1, taken))
    return stage

  def _propose(self, name, arm, t):
    stage, settings = super()._propose(name, arm, t), self._config.propose
    self._programs += settings.samples
    batches = math.ceil(settings.samples / settings.batch_size)
    self._parts.append(Part(PROPOSE, GROUPS, batches, stage.seconds / batches))
    return stage

  def _admit(self, name):
    samples = self._config.propose.samples
    self._parts.append(Part(ADMIT, LANES, samples, cost.ADMIT_CPU_S))
    return super()._admit(name)

  def _scored(self, name, n, compiled, split, races=False):
    settings = self._config.evaluate
    items = settings.dev_size if split == records.DEV else settings.test_size
    is_race = races and settings.racing
    ends = racing.block_ends(items, settings.racing_block if is_race else items)
    sizes = [b - a for a, b in zip((0, *ends), ends, strict=False)]
    first_s, *rest_s = map(self._answer_seconds, sizes)
    compile_s = self._model.leaf_kinds * cost.COMPILE_KIND_S
    begun_s = self._merge_seconds() + compiled / n * compile_s
    kind = SWEEPS if name in records.SWEEPS else EVALUATE
    kind = TEST if split == records.TEST else kind
    self._parts.append(Part(kind, GROUPS, n, begun_s + first_s, n))
    # The second pass: whoever goes on is merged again, and asked all the rest.
    again = math.ceil(n * _going_on(ends)) if is_race else 0
    if again:
      self._parts.append(
          Part(kind, GROUPS, again, begun_s + sum(rest_s), again * len(rest_s))
      )
    self._answers += n * ends[0] + again * (items - ends[0])
    self._merged += n if split == records.DEV else 0
    return super()._scored(name, n, compiled, split, races)

  def _refine(self, t):
    stage, dpo = super()._refine(t), self._config.dpo
    chosen, rejected, _ = self.pairs(t)
    rows = cost.dpo_step(
        dpo, chosen, rejected, self._lengths.prompt, self._completion
    ).rows
    compile_s = 2 * cost.COMPILE_MODEL_S
    row_s = (stage.seconds - compile_s) / rows / (dpo.fsdp * dpo.tensor)
    self._parts += [
        Part(TRAIN, FIXED, 1, compile_s),
        Part(TRAIN, TRAINERS, rows, row_s),
    ]
    return stage

  def _export(self):
    stage = super()._export()
    self._parts.append(Part(START, FIXED, 1, stage.seconds))
    return stage


def _going_on(ends: Sequence[int]) -> float:
  """Share of a race's models that answer more than the first block.

  As if each of them answered all: so many make up `RACING_SHARE`.
  """
  first = ends[0] / ends[-1]
  return max(0.0, (RACING_SHARE - first) / (1 - first)) if first < 1 else 0.0


# The whole of it, as text and as data.


def show(
    config: config_lib.Config,
    gpus: Sequence[int],
    times: Sequence[int],
    device: Device,
    rate: float | None = None,
):
  """Prints a Markdown table, what it assumes, and a last line of JSON.

  Args:
    config: the run's.
    gpus: of each cluster.
    times: how much larger each run is.
    device: the GPUs.
    rate: dollars of a GPU for an hour.

  Raises:
    UserError: if nothing is known of the seed model, or the GPUs do not fit.
  """
  model, lengths, known_by = _read(config)
  sampler = "jax" if config.sampler == "jax" else "vllm"
  clusters = [cluster(config, n, sampler) for n in gpus]
  rows = []
  for n in times:
    run = cut(larger(config, n), model, lengths, sampler, device)
    rows += [project(run, on, n, rate) for on in clusters]
  said = assumptions(config, device, sampler, rows)
  print(f"{config.name} on {device.name}; the model's shape: {known_by}\n")
  print(table(rows))
  print("\nAssumed; no GPU was measured:\n")
  print("\n".join(f"- {line}" for line in said))
  print(
      json.dumps(
          {
              "projection": config.name,
              "config": config_lib.digest(config),
              "device": dataclasses.asdict(device),
              "sampler": sampler,
              "lengths": dataclasses.asdict(lengths),
              "head_pieces_per_s": HEAD_PIECES_PER_S,
              "dollars_per_gpu_hour": rate,
              "rows": [_data(row) for row in rows],
              "assumed": said,
          }
      )
  )


def _read(config):
  """(model, lengths, how the shape is known) of a config of real models."""
  if config.seed_model.startswith(world.PREFIX):
    raise errors.UserError(
        f"{config.name} is a run of the toy world, which needs no GPU; give a"
        " config of real models, such as configs/paper_gsm8k.py"
    )
  place = reading.places(config)[config.seed_model]
  known = reading.shape(place, config)
  if known is None:
    raise errors.UserError(
        f"nothing is known of the shape of {config.seed_model}; fetch it, or"
        " give its directory"
    )
  decoder, itemsize, known_by = known
  model = cost.Model(decoder, itemsize, config.merge.scope)
  items = reading.items(config)
  lengths = reading.lengths(config, items, reading.tokenizer(place))
  return model, lengths, known_by


def table(rows: Sequence[Row]) -> str:
  """Markdown, a line a row."""
  priced = any(row.dollars is not None for row in rows)
  head = [
      "samples",
      "GPUs",
      *STAGES,
      "in all",
      "GPU hours",
      "at work",
      "bound by",
      "archive",
      *(["dollars"] if priced else []),
  ]
  lines = [head, ["---"] * len(head)]
  for row in rows:
    lines.append(
        [
            f"x {row.times:,}",
            f"{row.cluster.gpus:,}",
            *map(words.duration, row.seconds.values()),
            words.duration(sum(row.seconds.values())),
            f"{row.gpu_hours:,.1f}",
            f"{row.work_gpu_hours / row.gpu_hours:.0%}",
            row.bound_by,
            words.gigabytes(row.run.archive_bytes),
            *([f"{row.dollars:,.0f}"] if priced else []),
        ]
    )
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _data(row: Row) -> dict:
  on = row.cluster
  return {
      "times": row.times,
      "gpus": on.gpus,
      "hosts": on.hosts,
      "training_gpus": on.trainers * on.mesh,
      "programs": row.run.programs,
      "merged": row.run.merged,
      "stage_seconds": row.seconds,
      "seconds": sum(row.seconds.values()),
      "gpu_hours": row.gpu_hours,
      "work_gpu_hours": row.work_gpu_hours,
      "waits_seconds": row.waits,
      "bound_by": row.bound_by,
      "archive_bytes": row.run.archive_bytes,
      "dollars": row.dollars,
  }


def assumptions(
    config: config_lib.Config,
    device: Device,
    sampler: str,
    rows: Sequence[Row],
) -> list[str]:
  """What the rows rest on, in sentences."""
  propose, settings = config.propose, config.evaluate
  share = estimate_lib.new_programs(config) / propose.samples
  training = sorted({row.cluster.trainers * row.cluster.mesh for row in rows})
  runs = {row.times: row.run for row in rows}
  sizes = "; ".join(
      f"x {n:,}: {run.programs:,} programs sampled, {run.merged:,} models"
      " merged and evaluated"
      for n, run in runs.items()
  )
  said = [
      f"Larger is propose.samples alone, {propose.samples:,} in the config, and"
      " with it the candidates, the control and the sweeps; iterations, items,"
      f" DPO's steps and the test stay as they are. {sizes}.",
      "Seconds of a piece are plan/cost.py's, of the data sheet of"
      f" {device.name}: {cost.PREFILL_MFU:.0%} of the peak FLOP/s while reading"
      f" and {cost.DPO_MFU:.0%} in DPO, {cost.DECODE_BANDWIDTH:.0%} of the peak"
      f" bandwidth while writing and {cost.MERGE_BANDWIDTH:.0%} while merging,"
      f" {cost.COMPILE_KIND_S:g} s to compile a program for a leaf kind;"
      f" {share:.0%} of the programs are admitted and new. The"
      f" {cost.ADMIT_CPU_S * 1000:.0f} ms of a trace were measured, on a CPU.",
      f"A host has {GPUS_PER_HOST} GPUs, traces {LANES_PER_HOST} programs at a"
      f" time, reads the models three times at"
      f" {cost.DISK_BYTES_PER_S / 1e9:g} GB/s, all hosts at once, and"
      f" starts its workers in {WORKER_START_S:g} s.",
      f"A batch of propose.batch_size = {propose.batch_size:,} is sampled by"
      " one group, a model is merged and evaluated by one.",
  ]
  if sampler == "vllm" and config.vllm.tensor_parallel > 1:
    said.append(
        f"{config.vllm.tensor_parallel} GPUs of a group are as fast as one:"
        " they share its memory."
    )
  if settings.racing:
    said.append(
        f"Racing asks {RACING_SHARE:.1%} of the answers, as measured on the"
        " demo's programs, not on 7B models, however many groups there are;"
        f" after the first {settings.racing_block:,} items, whoever goes on is"
        " merged again."
    )
  said += [
      f"The head hands out and stores {HEAD_PIECES_PER_S:g} pieces a second, a"
      " piece being one block of items of one model, or all where it does not"
      " race: python -m launch.benchmark_executor measures it. What it does"
      " for samples and verdicts is not counted.",
      f"DPO trains on {' or '.join(map(str, training))} GPUs, those of"
      f" ray.train_hosts = {config.ray.train_hosts}, at most one a pair of"
      f" dpo.batch_size = {config.dpo.batch_size}; all others wait. Sums of"
      " gradients over the network are not counted.",
      "GPU hours are those of all GPUs, held from the beginning to the end; at"
      " work is the share in which a GPU has a piece. Bound by says what most"
      f" of the time goes with; {FIXED} are start, DPO's compiling and export."
      " Not counted: what the control samples more, marking answers, faults,"
      " the new factory's way to the hosts.",
  ]
  most = max(row.run.device_bytes for row in rows)
  if most > device.memory_bytes:
    said.append(
        f"It would not fit: {words.gigabytes(most)} are needed of a device"
        f" that has {words.gigabytes(device.memory_bytes)}."
    )
  return said
