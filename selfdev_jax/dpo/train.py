"""One round of DPO: the adapter moves, the model under it stays."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax.dpo import data as data_lib
from selfdev_jax.dpo import logps as logps_lib
from selfdev_jax.dpo import loss as loss_lib


def train(
    config: config_lib.Dpo,
    decoder: models.DecoderConfig,
    params: models.Params,
    adapter: models.Params,
    pairs: Sequence[records.Pair],
    encode: Callable[..., list[int]],
    eos: int,
    key: jax.Array,
    *,
    label: str = "DPO",
) -> tuple[models.Params, list[dict[str, float]]]:
  """Trains an adapter on preference pairs; equal arguments, equal bits.

  The reference is the model with the adapter it starts from; its
  log-probabilities are computed once, before the first step.

  Args:
    config: learning rate, steps, beta, ...
    decoder: the model's shape.
    params: the model under the adapter; read only.
    adapter: where to start; as from `lora.init`, unscaled; left as it is.
    pairs: at least one.
    encode: the tokenizer's `encode`, see `data.tokenize`.
    eos: the token that ends a completion.
    key: PRNG key of the order of pairs.
    label: of the progress bar.

  Returns:
    (adapter as NumPy arrays, metrics of each step under TRL's names).

  Raises:
    UserError: naming the step at which loss or gradient was not finite; or
      see `data.tokenize`.
  """
  data = data_lib.tokenize(pairs, encode, eos, decoder.max_positions)
  order = data_lib.order(key, len(pairs), config.steps, config.batch_size)
  batches, size = data_lib.distinct_rows(data.pairs[order], jax.device_count())
  mesh = jax.make_mesh(
      (jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,)
  )
  everywhere = NamedSharding(mesh, PartitionSpec())
  by_row = NamedSharding(mesh, PartitionSpec("data"))
  params = jax.device_put(params, everywhere)
  # A copy: `_step` takes its buffers over.
  adapter = jax.device_put(jax.tree.map(jnp.array, adapter), everywhere)
  state = jax.jit(_optimizer(config).init, out_shardings=everywhere)(adapter)

  def put(rows):
    """The token rows of these numbers, shared out among the devices."""
    return jax.device_put((data.tokens[rows], data.is_completion[rows]), by_row)

  reference = []
  for start in range(0, len(data.tokens), size):
    # A last, smaller batch is filled up: another shape would compile anew.
    rows = np.minimum(start + np.arange(size), len(data.tokens) - 1)
    logps, _ = _logps(config, decoder, params, adapter, *put(rows))
    reference.append(np.asarray(logps))
  reference = np.concatenate(reference)[: len(data.tokens)]

  history = []
  with progress.bar(label, config.steps) as shown:
    for step, (rows, pairs_of_rows) in enumerate(batches):
      adapter, state, metrics = _step(
          config,
          decoder,
          params,
          adapter,
          state,
          *put(rows),
          *jax.device_put((reference[rows], pairs_of_rows), everywhere),
      )
      metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
      for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
          raise errors.UserError(
              f"{label}: {name} is {metrics[name]} at step {step} of"
              f" {config.steps}; lower dpo.learning_rate"
          )
      history.append(metrics)
      shown.update()
  return jax.device_get(adapter), history


def _optimizer(config: config_lib.Dpo) -> optax.GradientTransformation:
  """AdamW, linear warm-up from 0, cosine to 0, as transformers counts them."""
  schedule = optax.warmup_cosine_decay_schedule(
      0.0,
      config.learning_rate,
      min(round(config.warmup_fraction * config.steps), config.steps - 1),
      config.steps,
  )
  adamw = optax.adamw(schedule, weight_decay=config.weight_decay)
  if not config.max_grad_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


@functools.partial(jax.jit, static_argnames=("config", "decoder"))
def _logps(
    config: config_lib.Dpo,
    decoder: models.DecoderConfig,
    params: models.Params,
    adapter: models.Params,
    tokens: jax.Array,
    is_completion: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities and lengths, both [rows], of [rows, seq] tokens."""
  scaled = models.scale_adapter(adapter, config.lora_alpha / config.lora_rank)
  return logps_lib.completion_logps(
      decoder, params, scaled, tokens, is_completion
  )


@functools.partial(
    jax.jit,
    static_argnames=("config", "decoder"),
    donate_argnames=("adapter", "state"),
)
def _step(
    config: config_lib.Dpo,
    decoder: models.DecoderConfig,
    params: models.Params,
    adapter: models.Params,
    state: Any,
    tokens: jax.Array,
    is_completion: jax.Array,
    reference: jax.Array,
    pairs: jax.Array,
) -> tuple[models.Params, Any, dict[str, jax.Array]]:
  """One update of the adapter on [rows, seq] tokens, paired by [batch, 2]."""

  def loss_fn(adapter):
    logps, counts = _logps(
        config, decoder, params, adapter, tokens, is_completion
    )
    return loss_lib.sigmoid(
        logps[pairs],
        reference[pairs],
        counts[pairs[:, 0]],
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        sft_weight=config.sft_weight,
    )

  gradients, metrics = jax.grad(loss_fn, has_aux=True)(adapter)
  metrics["grad_norm"] = optax.tree.norm(gradients)
  # Optax raises a Python float to its int32 step count.
  with jax.numpy_dtype_promotion("standard"):
    updates, state = _optimizer(config).update(gradients, state, adapter)
  return optax.apply_updates(adapter, updates), state, metrics
