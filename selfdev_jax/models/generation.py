"""Jitted generation with a KV cache: batched, greedy or at a temperature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from selfdev_jax.models import decoder


def pad_left(rows: list[list[int]], length: int, pad: int = 0):
  """Token rows as a left-padded array and its mask.

  Args:
    rows: token ids of each prompt; none longer than `length`.
    length: tokens a row of the result.
    pad: the filler.

  Returns:
    (tokens [len(rows), length] int32, mask of the same shape, bool).
  """
  tokens = np.full((len(rows), length), pad, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    if not 0 < len(row) <= length:
      raise ValueError(f"prompt {i} has {len(row)} tokens, not 1 to {length}")
    tokens[i, length - len(row) :] = row
    mask[i, length - len(row) :] = True
  return tokens, mask


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
  """Logits with -inf for all but the likeliest of probability `top_p`."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  probabilities = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
  least = jnp.take_along_axis(ordered, jnp.maximum(kept - 1, 0), axis=-1)
  return jnp.where(logits < least, -jnp.inf, logits)


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "eos"))
def generate(
    config: decoder.DecoderConfig,
    params: decoder.Params,
    prompts: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None = None,
    *,
    max_new_tokens: int,
    eos: tuple[int, ...],
    lora: decoder.Params | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Continues each prompt until EOS or `max_new_tokens`.

  A row depends on its prompt and its key alone, not on its neighbours.

  Args:
    config: the decoder's shape.
    params: its parameters.
    prompts: [batch, prompt] int32, left-padded; or [1, prompt], a prompt that
      all rows share and that is then read only once.
    mask: like `prompts`, bool, false on padding.
    keys: [batch] PRNG keys, one a row.
    temperature: scalar float32; 0 is greedy.
    top_p: scalar float32; draws are among the likeliest tokens that have this
      probability together (Holtzman et al., arXiv 1904.09751). None: all.
    max_new_tokens: tokens to write at most.
    eos: the tokens that end a row; at least one.
    lora: see `decoder.Decoder.__call__`.

  Returns:
    (tokens [batch, max_new_tokens] int32, filled up with `eos[0]`,
     finished [batch] bool, false where the limit cut the row).
  """
  model = decoder.bind(config, params)
  batch, length = keys.shape[0], prompts.shape[1]
  slots = length + max_new_tokens
  dtype = params["embed"].dtype
  shape = (config.layers, prompts.shape[0], slots)
  shape += (config.kv_heads, config.head_dim)
  cache = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
  # Slots that hold a real token; those still to be written count as real, the
  # causal part below hides them.
  real = jnp.pad(mask, ((0, 0), (0, max_new_tokens)), constant_values=True)
  positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)

  def attend(start, n):
    queries = start + jnp.arange(n)[:, None]
    return real[:, None, None, :] & (jnp.arange(slots) <= queries)

  hidden, cache = model(
      prompts, positions, attend(0, length), lora, (*cache, 0)
  )
  logits = model.logits(hidden[:, -1])
  position = positions[:, -1]
  if prompts.shape[0] != batch:
    repeat = lambda x, axis: jnp.repeat(
        x, batch, axis, total_repeat_length=batch
    )
    cache = tuple(repeat(x, 1) for x in cache)
    logits, position, real = (repeat(x, 0) for x in (logits, position, real))

  def draw(step, logits):
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    logits /= temperature
    if top_p is not None:
      logits = _nucleus(logits, top_p)
    return jax.vmap(jax.random.categorical)(step_keys, logits)

  def choose(step, logits):
    # A branch, not a select: random bits for a whole vocabulary cost as much
    # as a layer of a small model.
    return jax.lax.cond(
        temperature > 0,
        draw,
        lambda _, logits: jnp.argmax(logits, axis=-1),
        step,
        logits.astype(jnp.float32),
    ).astype(jnp.int32)

  def unfinished(state):
    step, _, done, *_ = state
    return (step < max_new_tokens) & ~jnp.all(done)

  def advance(state):
    step, tokens, done, logits, cache = state
    token = jnp.where(done, eos[0], choose(step, logits))
    tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
    done |= jnp.isin(token, jnp.array(eos, jnp.int32))
    hidden, cache = model(
        token[:, None],
        (position + 1 + step)[:, None],
        attend(length + step, 1),
        lora,
        (*cache, length + step),
    )
    return step + 1, tokens, done, model.logits(hidden[:, 0]), cache

  tokens = jnp.full((batch, max_new_tokens), eos[0], jnp.int32)
  done = jnp.zeros(batch, bool)
  _, tokens, done, *_ = jax.lax.while_loop(
      unfinished, advance, (jnp.int32(0), tokens, done, logits, cache)
  )
  return tokens, done
