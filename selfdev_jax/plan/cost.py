"""Bytes, FLOPs and seconds of single pieces of work, from a model's shape.

Nothing here is measured: a piece takes as long as its FLOPs or its bytes take
at a share of what the device's data sheet promises. The shares are below, by
name, and a plan prints them.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax.dpo import batches
from selfdev_jax.plan.devices import Device

# Of the peak FLOP/s, where prompts are read and where DPO trains.
PREFILL_MFU = 0.45
DPO_MFU = 0.35
# Of the peak bandwidth: tokens written one by one, and merges.
DECODE_BANDWIDTH = 0.6
MERGE_BANDWIDTH = 0.5
# Bytes/s from one buffer of the host to another, in one thread, and of a disk.
HOST_COPY_BYTES_PER_S = 6e9
DISK_BYTES_PER_S = 1e9
# Seconds: XLA for one program and one leaf kind, for a generation or a step.
# BUILD_NOTES.md has 0.26 CPU s for the former on a CPU; GPUs take longer.
COMPILE_KIND_S = 1.5
COMPILE_MODEL_S = 60.0
VLLM_START_S = 90.0
# CPU seconds of an admission (BUILD_NOTES.md, "The sandbox": 110 and 179 ms).
ADMIT_CPU_S = 0.18
# What a process with CUDA, its libraries and compiled code has of the device.
CONTEXT_BYTES = 0.7e9
# What vLLM keeps for itself beside weights and KV cache.
VLLM_OWN_BYTES = 1.5e9

_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_WIDE = 4  # Bytes of a float32.


@dataclasses.dataclass(frozen=True)
class Model:
  """A model's size.

  Attributes:
    decoder: its shape.
    itemsize: bytes of a parameter.
    scope: what is merged, `mlp` or `all`.
  """

  decoder: models.DecoderConfig
  itemsize: int
  scope: str

  def _leaves(self) -> dict[str, tuple[int, ...]]:
    params = models.abstract_params(self.decoder)
    named = convert.named_leaves(self.decoder, params)
    return {path: leaf.shape for path, leaf, _ in named}

  @property
  def parameters(self) -> int:
    return sum(map(math.prod, self._leaves().values()))

  @property
  def nbytes(self) -> int:
    return self.parameters * self.itemsize

  def _merged(self) -> dict[str, tuple[int, ...]]:
    return {
        path: shape
        for path, shape in self._leaves().items()
        if self.scope == "all" or "mlp" in path.split("/")
    }

  @property
  def merged_bytes(self) -> int:
    """Of the leaves that a merge writes."""
    return sum(map(math.prod, self._merged().values())) * self.itemsize

  @property
  def leaf_kinds(self) -> int:
    """Shapes that a program is compiled for."""
    return len(
        {
            shape[1:] if path.startswith("layers/") else shape
            for path, shape in self._merged().items()
        }
    )

  @property
  def largest_wide_leaf_bytes(self) -> int:
    """Of the largest merged leaf, all layers, in float32."""
    return max(map(math.prod, self._merged().values())) * _WIDE

  def matrices(self) -> dict[str, tuple[int, int]]:
    """[out, in] of each matrix of a layer."""
    return {
        path.split("/")[-1]: shape[1:]
        for path, shape in self._leaves().items()
        if path.split("/")[-1] in _MATRICES
    }

  @property
  def products(self) -> int:
    """Parameters of the layers' matrices: what a token is multiplied with."""
    layer = sum(map(math.prod, self.matrices().values()))
    return self.decoder.layers * layer

  @property
  def head(self) -> int:
    return self.decoder.vocab_size * self.decoder.embed

  @property
  def cache_bytes(self) -> int:
    """Of the keys and values of one token."""
    d = self.decoder
    return 2 * d.layers * d.kv_heads * d.head_dim * self.itemsize

  def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
    sides = (sum(self.matrices()[name]) for name in targets)
    return self.decoder.layers * rank * sum(sides)

  def attention_flops(self, rows: int, length: int) -> int:
    """Of one pass over rows of that length, masked halves included."""
    d = self.decoder
    return 4 * d.layers * d.heads * d.head_dim * rows * length**2


def prefill_seconds(
    model: Model, device: Device, rows: int, length: int
) -> float:
  """To read `rows` prompts of `length` tokens: bound by FLOPs."""
  flops = 2 * model.products * rows * length
  flops += model.attention_flops(rows, length) / 2  # The causal half.
  return flops / (PREFILL_MFU * device.tflops * 1e12)


def decode_seconds(
    model: Model,
    device: Device,
    rows: int,
    batch: int,
    new: float,
    context: float,
) -> float:
  """To write `new` tokens in each of `rows` texts, `batch` at a time.

  A step reads all weights once and every row's keys and values, or multiplies
  every row with all weights, whichever takes longer.
  """
  batch = min(batch, rows)
  read = model.nbytes + batch * context * model.cache_bytes
  memory_s = read / (DECODE_BANDWIDTH * device.bytes_per_s)
  flops = 2 * (model.products + model.head) * batch
  arithmetic_s = flops / (PREFILL_MFU * device.tflops * 1e12)
  return math.ceil(rows / batch) * new * max(memory_s, arithmetic_s)


def merge_seconds(model: Model, device: Device, experts: int) -> float:
  """To apply one compiled merge, and to bring its result to the run.

  Read are the seed's and the experts' leaves, written is the result; then it
  goes to the host, through memory that both processes share, and to the device
  again.
  """
  on_device = (experts + 2) * model.merged_bytes
  moved_s = on_device / (MERGE_BANDWIDTH * device.bytes_per_s)
  return moved_s + _through_host_seconds(model.merged_bytes, device)


def swap_seconds(model: Model, device: Device, sampler: str) -> float:
  """To hand a merged model to the sampler."""
  if sampler != "vllm":
    return 0.0
  return _through_host_seconds(model.merged_bytes, device)


def _through_host_seconds(nbytes: float, device: Device) -> float:
  return 2 * nbytes / device.host_bytes_per_s + nbytes / HOST_COPY_BYTES_PER_S


def jax_sampler_bytes(
    model: Model, batch: int, prompt: int, new: int, shared: bool
) -> float:
  """Beside the weights, while a batch is generated in JAX.

  Args:
    model: which.
    batch: rows.
    prompt: tokens of a prompt.
    new: tokens to write at most.
    shared: whether all rows have one prompt, read once.
  """
  d = model.decoder
  read = prompt * (1 if shared else batch)
  cache = (batch * new + read) * model.cache_bytes
  # Logits and weights of attention exist whole, in float32 and narrow.
  attention = d.heads * read * prompt * (_WIDE + model.itemsize)
  mlp = 3 * read * d.mlp * model.itemsize
  logits = 3 * batch * d.vocab_size * _WIDE
  return cache + max(attention, mlp) + 4 * read * d.embed * _WIDE + logits


@dataclasses.dataclass(frozen=True)
class DpoStep:
  """What one step of DPO multiplies and holds.

  Attributes:
    rows: that a step computes.
    length: slots of a row.
    targets: completions' tokens of a row.
  """

  rows: int
  length: int
  targets: int


def dpo_step(
    config: Any, chosen: int, rejected: int, prompt: int, completion: int
) -> DpoStep:
  """A step's rows: each distinct completion once, two to a prompt if shared.

  Args:
    config: a `config.Dpo`.
    chosen: distinct completions that pairs choose.
    rejected: likewise.
    prompt: tokens of the one prompt.
    completion: tokens of a completion.
  """
  distinct = sum(_distinct(n, config.batch_size) for n in (chosen, rejected))
  per_row = batches.COMPLETIONS[config.layout]
  length = batches.bucket(prompt + per_row * completion)
  return DpoStep(math.ceil(distinct / per_row), length, per_row * completion)


def _distinct(n: int, drawn: int) -> float:
  """Expected number of different ones of `n` in so many draws."""
  return n * (1 - (1 - 1 / n) ** drawn) if n else 0.0


def dpo_flops(model: Model, config: Any, step: DpoStep) -> tuple[float, float]:
  """(done, needed) FLOPs of the matrix products of one step.

  Needed is what a step takes in which nothing is computed twice but the logits,
  in the backward pass. With `remat="full"` the layers are computed again, save
  each layer's last product, which nothing in the backward pass asks for; with
  `dots`, attention alone.
  """
  slots = step.rows * step.length
  forward = 2 * model.products * slots
  attention = model.attention_flops(step.rows, step.length)
  logits = 2 * model.head * step.rows * step.targets
  matrices, layers = model.matrices(), model.decoder.layers
  down = 2 * layers * math.prod(matrices["down"]) * slots
  if config.trains == "full":
    adapter = 0
    needed = 3 * forward + 3 * attention + 4 * logits
  else:
    adapter = (
        2 * slots * model.lora_parameters(config.lora_rank, config.lora_targets)
    )
    # Frozen matrices get no gradient of their own.
    needed = 2 * forward + 3 * adapter + 3 * attention + 3 * logits
    if "down" in config.lora_targets:
      out = matrices["down"][0]
      down += 2 * layers * config.lora_rank * out * slots
  if config.remat == "dots":
    return needed + attention, needed
  return needed + forward + adapter + attention - down, needed


def dpo_bytes(model: Model, config: Any, step: DpoStep) -> Mapping[str, float]:
  """Device bytes of training, beside the seed model's weights, by what."""
  d = model.decoder
  trained = model.lora_parameters(config.lora_rank, config.lora_targets)
  shards = config.fsdp * config.tensor
  slots = math.ceil(step.rows / config.parts) * step.length
  kept = slots * d.embed * model.itemsize * d.layers
  if config.remat == "dots":
    outputs = sum(out for out, _ in model.matrices().values())
    kept += slots * outputs * model.itemsize * d.layers
  # One layer's forward and backward pass; attention by a fused kernel.
  layer = slots * (6 * d.mlp + 12 * d.embed) * model.itemsize
  return {
      "adapter and Adam's moments": 3 * trained * _WIDE / shards,
      "gradients": trained * _WIDE / shards,
      "kept for the backward pass": kept,
      "one layer at work": layer,
  }
