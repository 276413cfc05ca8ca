"""Log-probabilities of completions, without the logits of a whole batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from selfdev_jax import models
from selfdev_jax.dpo import batches

# Logits of this many tokens of the vocabulary exist at a time.
_CHUNK = 4096


class Statistics(NamedTuple):
  """Of each token, or summed over the tokens of each completion; float32."""

  logps: jax.Array  # Log-probability of the token.
  entropies: jax.Array  # Of the distribution that it was drawn from, nats.
  mean_logits: jax.Array  # Over the vocabulary.
  correct: jax.Array  # 1 where it is the likeliest.


def completion_statistics(
    decoder: models.DecoderConfig,
    params: models.Params,
    adapter: models.Params | None,
    rows: batches.Rows,
    *,
    span: int | None = None,
    remat: str | None = "full",
    sharding: jax.sharding.Sharding | None = None,
) -> Statistics:
  """What each completion's tokens come to, EOS included.

  Args:
    decoder: the decoder's shape.
    params: its parameters.
    adapter: None or a LoRA adapter, `b` scaled.
    rows: [rows, ...]; a row holds a prompt and some completions of it.
    span: slots that a prompt with one completion fills at most; None: the
      row's length. Where a kernel attends, the less the faster.
    remat: see `models.forward`.
    sharding: likewise.

  Returns:
    Sums, each [rows, completions]; only `logps` has a gradient.
  """
  length = rows.tokens.shape[1]
  span = min(span or length, length)
  hidden = models.forward(
      decoder,
      params,
      rows.tokens,
      ends=rows.ends,
      lora=adapter,
      remat=remat,
      sharding=sharding,
      attention=models.attention_kernel(decoder, params["embed"].dtype, span),
      span=span,
  )
  # The prompt's last token predicts the first of each completion.
  hidden = jnp.take_along_axis(hidden, rows.sources[..., None], axis=1)
  head = params["embed" if decoder.tied_head else "head"]
  tokens = token_statistics(
      hidden,
      head.astype(hidden.dtype),
      rows.targets,
      decoder.logit_softcap,
      trains_head=adapter is None,
  )
  completions = rows.ends.shape[1] - 1
  owned = rows.owner[..., None] == jnp.arange(completions)
  return jax.tree.map(
      lambda x: jnp.sum(x[..., None], axis=1, where=owned), tokens
  )


def token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    softcap: float | None = None,
    *,
    trains_head: bool = True,
) -> Statistics:
  """Log-softmax at the targets, a part of the vocabulary at a time.

  Logits are float32 whatever the inputs are, and are computed again in the
  backward pass: [batch, seq, vocab] never exists. A logsumexp in bfloat16 loses
  several nats over 500 tokens, and DPO is made of far smaller differences.

  Args:
    hidden: [batch, seq, embed].
    head: [vocab, embed], of the same dtype.
    targets: [batch, seq] int32.
    softcap: see `models.DecoderConfig.logit_softcap`.
    trains_head: whether `head` is to get a gradient; it gets zeros if not.

  Returns:
    Each [batch, seq]; only `logps` has a gradient.
  """
  logps, *rest = _token_statistics(softcap, trains_head, hidden, head, targets)
  return Statistics(logps, *map(jax.lax.stop_gradient, rest))


def _parts(head):
  """[vocab, embed] as [vocab / parts, parts, embed], and the filler's size.

  A part is every so-manieth token: cut like this, a vocabulary that is sharded
  over devices is so in each part.
  """
  vocab = head.shape[0]
  least = -(-vocab // _CHUNK)
  even = (n for n in range(least, 2 * least) if vocab % n == 0)
  parts = next(even, least)
  filler = -vocab % parts
  head = jnp.pad(head, ((0, filler), (0, 0))) if filler else head
  return head.reshape(-1, parts, head.shape[1])


def _logits(hidden, parts, i, vocab, softcap):
  """Of part `i`: (raw, capped), [batch, seq, vocab / parts] float32."""
  raw = jnp.einsum(
      "bsd,vd->bsv",
      hidden,
      parts[:, i],
      # A GPU would multiply float32 in TF32.
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
  )
  capped = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
  if parts.shape[0] * parts.shape[1] != vocab:
    ids = jnp.arange(parts.shape[0]) * parts.shape[1] + i
    capped = jnp.where(ids < vocab, capped, -jnp.inf)
  return raw, capped


def _is_target(targets, parts, i):
  """[batch, seq, vocab / parts] bool, within part `i`."""
  ids = jnp.arange(parts.shape[0], dtype=jnp.int32) * parts.shape[1] + i
  return targets[..., None] == ids


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_statistics(softcap, trains_head, hidden, head, targets):
  return _forward(softcap, trains_head, hidden, head, targets)[0]


def _forward(softcap, trains_head, hidden, head, targets):
  del trains_head
  parts, vocab = _parts(head), head.shape[0]

  def part(carry, i):
    top, total, weighted, plain, target = carry
    _, logits = _logits(hidden, parts, i, vocab, softcap)
    higher = jnp.maximum(top, jnp.max(logits, axis=-1))
    weights = jnp.exp(logits - higher[..., None])
    real = jnp.where(jnp.isneginf(logits), 0.0, logits)
    shrunk = jnp.exp(top - higher)
    hit = _is_target(targets, parts, i)
    return (
        higher,
        total * shrunk + jnp.sum(weights, axis=-1),
        weighted * shrunk + jnp.sum(weights * real, axis=-1),
        plain + jnp.sum(real, axis=-1),
        target + jnp.sum(logits, axis=-1, where=hit),
    ), None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  start = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros, zeros)
  (top, total, weighted, plain, target), _ = jax.lax.scan(
      part, start, jnp.arange(parts.shape[1], dtype=jnp.int32)
  )
  logsumexp = top + jnp.log(total)
  out = (
      target - logsumexp,
      logsumexp - weighted / total,
      plain / vocab,
      (target >= top).astype(jnp.float32),
  )
  return out, (hidden, head, targets, logsumexp)


def _backward(softcap, trains_head, kept, cotangents):
  hidden, head, targets, logsumexp = kept
  parts, vocab = _parts(head), head.shape[0]
  up = cotangents[0][..., None]

  def part(totals, i):
    to_hidden, to_head = totals
    raw, logits = _logits(hidden, parts, i, vocab, softcap)
    hit = _is_target(targets, parts, i).astype(jnp.float32)
    error = up * (hit - jnp.exp(logits - logsumexp[..., None]))
    if softcap is not None:
      error *= 1 - jnp.tanh(raw / softcap) ** 2
    error = error.astype(hidden.dtype)
    to_hidden += jnp.einsum(
        "bsv,vd->bsd", error, parts[:, i], preferred_element_type=jnp.float32
    )
    if trains_head:
      to_head = to_head.at[:, i].set(
          jnp.einsum(
              "bsv,bsd->vd", error, hidden, preferred_element_type=jnp.float32
          )
      )
    return (to_hidden, to_head), None

  start = (
      jnp.zeros(hidden.shape, jnp.float32),
      jnp.zeros(parts.shape if trains_head else (), jnp.float32),
  )
  (to_hidden, to_head), _ = jax.lax.scan(
      part, start, jnp.arange(parts.shape[1], dtype=jnp.int32)
  )
  if trains_head:
    to_head = to_head.reshape(-1, head.shape[1])[:vocab].astype(head.dtype)
  else:
    to_head = jnp.zeros_like(head)
  return to_hidden.astype(hidden.dtype), to_head, None


_token_statistics.defvjp(_forward, _backward)
