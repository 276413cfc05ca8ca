"""A Mistral decoder in Flax NNX, its layers stacked and scanned.

Modules live in this file; everywhere else parameters are a plain nested dict,
matrices [out, in] as in PyTorch and in the files of Hugging Face:

  embed                         [vocab, embed]
  layers/attention_norm         [layers, embed]
  layers/attention/q            [layers, heads * head_dim, embed]
  layers/attention/{k, v}       [layers, kv_heads * head_dim, embed]
  layers/attention/o            [layers, embed, heads * head_dim]
  layers/mlp_norm               [layers, embed]
  layers/mlp/{gate, up}         [layers, mlp, embed]
  layers/mlp/down               [layers, embed, mlp]
  final_norm                    [embed]
  head                          [vocab, embed]; absent when it is tied

A. Q. Jiang et al., Mistral 7B, arXiv 2310.06825.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The shape of a decoder; hashable, a static argument of jitted functions."""

  vocab_size: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tied_head: bool = False
  max_positions: int = 4096


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """[..., embed] normalised by its root mean square, in float32 inside.

  B. Zhang, R. Sennrich, Root Mean Square Layer Normalization, 2019.
  """
  wide = x.astype(jnp.float32)
  wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
  return wide.astype(x.dtype) * scale


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding in the half-split layout of Hugging Face.

  Args:
    x: [batch, seq, heads, head_dim].
    positions: [batch, seq] int32.
    theta: base of the wavelengths.

  Returns:
    Like `x`.

  References:
    J. Su et al., RoFormer, arXiv 2104.09864.
  """
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
  left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = (left * cos - right * sin, right * cos + left * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _linear(x, weight, lora):
  """`x @ weight.T`, plus the low-rank update x (B A)^T where there is one."""
  y = x @ weight.T
  if lora is not None:
    y += (x @ lora["a"].astype(x.dtype).T) @ lora["b"].astype(x.dtype).T
  return y


def _matrix(rngs, outputs, inputs):
  std = inputs**-0.5
  return nnx.Param(
      std * jax.random.normal(rngs.params(), (outputs, inputs), jnp.float32)
  )


class Attention(nnx.Module):
  """Grouped-query attention (J. Ainslie et al., arXiv 2305.13245)."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    d, queries = config.embed, config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    self.q = _matrix(rngs, queries, d)
    self.k = _matrix(rngs, keys, d)
    self.v = _matrix(rngs, keys, d)
    self.o = _matrix(rngs, d, queries)

  def __call__(self, x, positions, mask, lora, cache):
    """See `Decoder.__call__`; `cache` is (keys, values, layer, start)."""
    c, lora = self.config, lora or {}
    heads = lambda y: y.reshape(*y.shape[:2], -1, c.head_dim)
    q = heads(_linear(x, self.q[...], lora.get("q")))
    k = heads(_linear(x, self.k[...], lora.get("k")))
    v = heads(_linear(x, self.v[...], lora.get("v")))
    q = rotate(q, positions, c.rope_theta)
    k = rotate(k, positions, c.rope_theta)
    if cache is not None:
      keys, values, layer, start = cache
      at = (layer, 0, start, 0, 0)
      keys = jax.lax.dynamic_update_slice(keys, k[None], at)
      values = jax.lax.dynamic_update_slice(values, v[None], at)
      k = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
      v = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)
      cache = keys, values
    # Inside, it takes the logits from bfloat16 to float32 by promotion.
    with jax.numpy_dtype_promotion("standard"):
      y = jax.nn.dot_product_attention(q, k, v, mask=mask)
    y = y.reshape(*y.shape[:2], -1)
    return _linear(y, self.o[...], lora.get("o")), cache


class Mlp(nnx.Module):
  """SwiGLU (N. Shazeer, arXiv 2002.05202)."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.gate = _matrix(rngs, config.mlp, config.embed)
    self.up = _matrix(rngs, config.mlp, config.embed)
    self.down = _matrix(rngs, config.embed, config.mlp)

  def __call__(self, x, lora):
    lora = lora or {}
    gate = jax.nn.silu(_linear(x, self.gate[...], lora.get("gate")))
    up = _linear(x, self.up[...], lora.get("up"))
    return _linear(gate * up, self.down[...], lora.get("down"))


class Block(nnx.Module):
  """One pre-norm layer."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.attention_norm = nnx.Param(jnp.ones(config.embed))
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = nnx.Param(jnp.ones(config.embed))
    self.mlp = Mlp(config, rngs=rngs)

  def __call__(self, x, positions, mask, lora, cache):
    eps, lora = self.config.norm_eps, lora or {}
    y = rms_norm(x, self.attention_norm[...], eps)
    y, cache = self.attention(y, positions, mask, lora.get("attention"), cache)
    x += y
    y = rms_norm(x, self.mlp_norm[...], eps)
    return x + self.mlp(y, lora.get("mlp")), cache


class Decoder(nnx.Module):
  """Embedding, `config.layers` blocks under one scan, final norm, head."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
      return Block(config, rngs=rngs)

    self.config = config
    self.embed = nnx.Param(
        0.02
        * jax.random.normal(
            rngs.params(), (config.vocab_size, config.embed), jnp.float32
        )
    )
    self.layers = stack(rngs)
    self.final_norm = nnx.Param(jnp.ones(config.embed))
    if not config.tied_head:
      self.head = _matrix(rngs, config.vocab_size, config.embed)

  def __call__(
      self, tokens, positions, mask, lora=None, cache=None, remat=False
  ):
    """Hidden states after the final norm.

    Args:
      tokens: [batch, seq] int32.
      positions: [batch, seq] int32.
      mask: [batch, 1, seq, keys] bool, true where a query sees a key.
      lora: None or {"layers": {"attention": {"q": {"a", "b"}, ...}, ...}} with
        a leading layer axis; `b` already carries the scale alpha / rank.
      cache: None or (keys, values, start): two arrays [layers, batch, keys,
        kv_heads, head_dim] and the slot of the first of `tokens`.
      remat: recompute each layer in the backward pass instead of keeping it.

    Returns:
      ([batch, seq, embed], cache), the cache as (keys, values) or None.
    """
    graph, layers = nnx.split(self.layers)

    def body(carry, xs):
      x, kv = carry
      layer, state, lora = xs
      at = None if kv is None else (*kv, layer, cache[2])
      return nnx.merge(graph, state)(x, positions, mask, lora, at), None

    if remat:
      body = jax.checkpoint(body)
    xs = (
        jnp.arange(self.config.layers),
        layers,
        None if lora is None else lora["layers"],
    )
    x = self.embed[...][tokens]
    (x, kv), _ = jax.lax.scan(
        body, (x, None if cache is None else cache[:2]), xs
    )
    return rms_norm(x, self.final_norm[...], self.config.norm_eps), kv

  def logits(self, hidden):
    """[..., embed] -> [..., vocab] in the dtype of `hidden`."""
    head = self.embed if self.config.tied_head else self.head
    return hidden @ head[...].T


@functools.cache
def _graph(config: DecoderConfig):
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(model)
  return graph, nnx.to_pure_dict(state)


def abstract_params(config: DecoderConfig) -> Params:
  """The parameters' shapes and dtypes, nothing allocated."""
  return _graph(config)[1]


def init_params(config: DecoderConfig, seed: int) -> Params:
  """Random float32 parameters: normal, std 1/sqrt(fan in), 0.02 embedded."""
  return _init(config, jax.random.key(seed))


@functools.partial(jax.jit, static_argnames="config")
def _init(config: DecoderConfig, key: jax.Array) -> Params:
  model = Decoder(config, rngs=nnx.Rngs(key))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def bind(config: DecoderConfig, params: Params) -> Decoder:
  """The module over `params`."""
  return nnx.merge(_graph(config)[0], params)


def causal_mask(segments: jax.Array) -> jax.Array:
  """Who sees whom in packed or padded rows.

  Args:
    segments: [batch, seq] int32; 0 is padding, each document has its number.

  Returns:
    [batch, 1, seq, seq] bool: same document, not later.
  """
  length = segments.shape[-1]
  same = segments[:, None, :, None] == segments[:, None, None, :]
  return same & jnp.tril(jnp.ones((length, length), bool))


def forward(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    lora: Params | None = None,
    remat: bool = False,
) -> jax.Array:
  """Hidden states of whole rows; `logits` turns them into logits.

  Args:
    config: the decoder's shape.
    params: its parameters.
    tokens: [batch, seq] int32.
    segments: [batch, seq] int32 as in `causal_mask`; None: one document a row.
    positions: [batch, seq] int32; None: 0, 1, 2, ...
    lora: see `Decoder.__call__`.
    remat: likewise.

  Returns:
    [batch, seq, embed].
  """
  if segments is None:
    segments = jnp.ones_like(tokens)
  if positions is None:
    positions = jnp.broadcast_to(
        jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
    )
  mask = causal_mask(segments)
  model = bind(config, params)
  return model(tokens, positions, mask, lora, remat=remat)[0]


def logits(
    config: DecoderConfig, params: Params, hidden: jax.Array
) -> jax.Array:
  """[..., embed] -> [..., vocab]."""
  return bind(config, params).logits(hidden)
