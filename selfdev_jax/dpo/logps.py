"""Log-probabilities of completions."""

import jax
import jax.numpy as jnp
import optax

from selfdev_jax import models


def completion_logps(
    decoder: models.DecoderConfig,
    params: models.Params,
    adapter: models.Params | None,
    tokens: jax.Array,
    is_completion: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Sums the log-probabilities of each row's completion, EOS included.

  Args:
    decoder: the decoder's shape.
    params: its parameters.
    adapter: None or a LoRA adapter, `b` scaled.
    tokens: [batch, seq] int32, prompt and completion, padded on the right.
    is_completion: [batch, seq] bool, true on the completion and its EOS.

  Returns:
    (log-probabilities [batch] float32, completion tokens [batch] int32).
  """
  # Nothing before the padding sees the padding: causality is mask enough.
  hidden = models.forward(decoder, params, tokens, lora=adapter, remat="full")
  logits = models.logits(decoder, params, hidden[:, :-1])
  # The logsumexp in float32: bfloat16 loses several nats over 500 tokens, and
  # DPO is made of differences far smaller than that.
  losses = optax.softmax_cross_entropy_with_integer_labels(
      logits.astype(jnp.float32), tokens[:, 1:]
  )
  counted = is_completion[:, 1:]
  return (
      -jnp.sum(losses, axis=1, where=counted),
      jnp.sum(counted, axis=1, dtype=jnp.int32),
  )
