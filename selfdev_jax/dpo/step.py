"""One step of DPO, jitted over a mesh (data, fsdp, tensor)."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.dpo import batches
from selfdev_jax.dpo import logps as logps_lib
from selfdev_jax.dpo import lora
from selfdev_jax.dpo import loss as loss_lib

_ROWS = (models.DATA, models.FSDP)


class State(NamedTuple):
  """What a step changes.

  Attributes:
    trained: float32 masters: an adapter, `b` unscaled, or every weight.
    optimizer: Optax's state.
  """

  trained: models.Params
  optimizer: Any


class _Seen(NamedTuple):
  """Of each pair's chosen and rejected completion, [..., pairs, 2] float32."""

  statistics: logps_lib.Statistics
  reference: jax.Array
  lengths: jax.Array


def make_mesh(config: config_lib.Dpo) -> Mesh:
  """All devices of all processes as (data, fsdp, tensor).

  Raises:
    UserError: if their number is not divided by fsdp x tensor.
  """
  devices, inner = jax.device_count(), config.fsdp * config.tensor
  if devices % inner:
    raise errors.UserError(
        f"{devices} devices cannot be shared out by dpo.fsdp={config.fsdp} x"
        f" dpo.tensor={config.tensor}; the product has to divide their number"
    )
  return jax.make_mesh(
      (devices // inner, config.fsdp, config.tensor),
      (models.DATA, models.FSDP, models.TENSOR),
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def rows_multiple(mesh: Mesh) -> int:
  """What the rows of a batch have to be divisible by."""
  return mesh.shape[models.DATA] * mesh.shape[models.FSDP]


def put(tree: Any, shardings: Any) -> Any:
  """Arrays that every process has, onto devices of all processes."""
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def place(leaf, sharding):
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
      return leaf
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: leaf[index]
    )

  return jax.tree.map(place, tree, shardings)


def fetch(tree: Any) -> Any:
  """The whole arrays as NumPy's, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(
      lambda leaf: np.asarray(
          multihost_utils.process_allgather(leaf, tiled=True)
      ),
      tree,
  )


def optimizer(config: config_lib.Dpo) -> optax.GradientTransformation:
  """AdamW (I. Loshchilov, F. Hutter, arXiv 1711.05101) on `schedule`.

  Norms and biases do not decay, as in transformers' trainer.
  """
  return optax.adamw(
      schedule(config), weight_decay=config.weight_decay, mask=_decays
  )


def schedule(config: config_lib.Dpo) -> optax.Schedule:
  """Linear warm-up from 0, cosine to 0; the first step's rate is at 0."""
  return optax.warmup_cosine_decay_schedule(
      0.0,
      config.learning_rate,
      min(round(config.warmup_fraction * config.steps), config.steps - 1),
      config.steps,
  )


def _decays(trained):
  return jax.tree_util.tree_map_with_path(
      lambda path, _: not path[-1].key.endswith(("norm", "bias")), trained
  )


@dataclasses.dataclass(frozen=True)
class Stepper:
  """The compiled functions of one kind of training.

  Attributes:
    frozen_shardings: of the parameters under an adapter; {} where all train.
    trained_shardings: of `State.trained`.
    state_shardings: of a `State`.
    rows_sharding: of `batches.Rows` outside a batch.
    batch_shardings: of a `batches.Batch`.
    init: trained parameters, of any float dtype, to a `State`.
    reference: (frozen, trained, rows) to log-probabilities [rows,
      completions] float32.
    step: (frozen, state, batch) to (state, metrics); takes `state` over. The
      metrics are float32 scalars under TRL's names.
  """

  frozen_shardings: models.Params
  trained_shardings: models.Params
  state_shardings: State
  rows_sharding: NamedSharding
  batch_shardings: batches.Batch
  init: Callable[..., State]
  reference: Callable[..., jax.Array]
  step: Callable[..., tuple[State, dict[str, jax.Array]]]


@functools.lru_cache(maxsize=8)
def stepper(
    config: config_lib.Dpo,
    decoder: models.DecoderConfig,
    dtype: Any,
    mesh: Mesh,
    span: int | None = None,
) -> Stepper:
  """Compiles nothing yet.

  Args:
    config: what is trained, and how.
    decoder: the model's shape.
    dtype: that it computes in.
    mesh: see `make_mesh`.
    span: see `logps.completion_statistics`.
  """
  is_lora = config.trains == "lora"
  model_shardings = models.shardings(decoder, mesh)
  trained = models.abstract_params(decoder)
  trained_shardings = model_shardings
  if is_lora:
    trained = jax.eval_shape(
        lambda: lora.init(
            jax.random.key(0), decoder, config.lora_rank, config.lora_targets
        )
    )
    trained_shardings = models.adapter_shardings(decoder, trained, mesh)
  everywhere = NamedSharding(mesh, PartitionSpec())
  optimize = optimizer(config)
  state_shardings = State(
      trained_shardings,
      optax.tree.map_params(
          optimize,
          lambda _, sharding: sharding,
          jax.eval_shape(optimize.init, trained),
          trained_shardings,
          transform_non_params=lambda _: everywhere,
      ),
  )
  by_row = NamedSharding(mesh, PartitionSpec(_ROWS))
  by_part = NamedSharding(mesh, PartitionSpec(None, _ROWS))
  statistics = functools.partial(
      logps_lib.completion_statistics,
      decoder,
      span=span,
      remat=config.remat,
      sharding=by_row if mesh.size > 1 else None,
  )

  def model(frozen, trained):
    """(params, adapter) as the forward pass takes them."""
    if not is_lora:
      return jax.tree.map(lambda leaf: leaf.astype(dtype), trained), None
    scale = lora.scale(config.lora_rank, config.lora_alpha, config.rslora)
    return frozen, models.scale_adapter(trained, scale)

  def init(trained):
    # A copy: `step` takes it over, and the caller may need theirs.
    trained = jax.tree.map(
        lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained
    )
    return State(trained, optimize.init(trained))

  def reference(frozen, trained, rows):
    return statistics(*model(frozen, trained), rows).logps

  def part_loss(trained, frozen, batch, pairs, chosen_tokens):
    """A part's share of the loss: of `pairs` and `chosen_tokens` in all."""
    params, adapter = model(frozen, trained)
    rows = batch.rows
    lengths = jnp.diff(rows.ends).astype(jnp.float32)
    of_pairs = lambda x: x.reshape(-1)[batch.pairs]
    seen = jax.tree.map(of_pairs, statistics(params, adapter, rows))
    under_reference = batch.reference
    if config.reference == "adapter_off":
      under_reference = jax.lax.stop_gradient(
          of_pairs(statistics(params, None, rows).logps)
      )
    lengths = of_pairs(lengths)
    losses = loss_lib.pair_losses(
        config.loss,
        seen.logps,
        under_reference,
        lengths,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        length_normalized=config.length_normalized,
    )
    loss = jnp.sum(losses) / pairs
    if config.sft_weight:
      loss -= config.sft_weight * jnp.sum(seen.logps[:, 0]) / chosen_tokens
    return loss, _Seen(seen, under_reference, lengths)

  def step(frozen, state, batch):
    parts, pairs, _ = batch.pairs.shape
    lengths = jnp.diff(batch.rows.ends).reshape(parts, -1)
    chosen = jnp.take_along_axis(lengths, batch.pairs[..., 0], axis=1)
    chosen_tokens = jnp.sum(chosen).astype(jnp.float32)

    def gradient(batch):
      return jax.value_and_grad(part_loss, has_aux=True)(
          state.trained, frozen, batch, parts * pairs, chosen_tokens
      )

    if parts == 1:
      (loss, seen), gradients = gradient(jax.tree.map(lambda x: x[0], batch))
    else:

      def accumulate(total, batch):
        (loss, seen), gradients = gradient(batch)
        return jax.tree.map(jnp.add, total, (loss, gradients)), seen

      zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.trained))
      (loss, gradients), seen = jax.lax.scan(accumulate, zeros, batch)
      seen = jax.tree.map(lambda x: x.reshape(-1, 2), seen)
    norm = optax.tree.norm(gradients)
    if config.max_grad_norm:
      # As PyTorch clips. Optax selects between two trees: more memory.
      factor = jnp.minimum(1.0, config.max_grad_norm / (norm + 1e-6))
      gradients = jax.tree.map(lambda leaf: leaf * factor, gradients)
    metrics = {"loss": loss, "grad_norm": norm, **_metrics(config, seen)}
    # Optax raises a Python float to its int32 step count.
    with jax.numpy_dtype_promotion("standard"):
      updates, moved = optimize.update(
          gradients, state.optimizer, state.trained
      )
    return State(optax.apply_updates(state.trained, updates), moved), metrics

  return Stepper(
      frozen_shardings=model_shardings if is_lora else {},
      trained_shardings=trained_shardings,
      state_shardings=state_shardings,
      rows_sharding=by_row,
      batch_shardings=batches.Batch(
          batches.Rows(*(by_part,) * 5), everywhere, everywhere
      ),
      init=jax.jit(init, out_shardings=state_shardings),
      reference=jax.jit(reference, out_shardings=everywhere),
      step=jax.jit(
          step, donate_argnums=1, out_shardings=(state_shardings, everywhere)
      ),
  )


def _metrics(config: config_lib.Dpo, seen: _Seen) -> dict[str, jax.Array]:
  """What TRL's DPOTrainer logs, of [pairs, 2] numbers."""
  of = seen.statistics
  tokens = jnp.sum(seen.lengths, axis=0)
  metrics = loss_lib.reward_metrics(of.logps, seen.reference, beta=config.beta)
  metrics |= {
      "entropy": jnp.sum(of.entropies) / jnp.sum(tokens),
      "logits/chosen": jnp.sum(of.mean_logits[:, 0]) / tokens[0],
      "logits/rejected": jnp.sum(of.mean_logits[:, 1]) / tokens[1],
      "mean_token_accuracy": jnp.sum(of.correct[:, 0]) / tokens[0],
  }
  if config.sft_weight:
    metrics["nll_loss"] = -jnp.sum(of.logps[:, 0]) / tokens[0]
  return metrics
