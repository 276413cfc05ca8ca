"""One decoder for every family, in Flax NNX, its layers stacked and scanned.

Modules live in this file; everywhere else parameters are a plain nested dict,
matrices [out, in] as in PyTorch and in the files of Hugging Face:

  embed                         [vocab, embed]
  layers/attention_norm         [layers, embed]
  layers/attention/q            [layers, heads * head_dim, embed]
  layers/attention/{k, v}       [layers, kv_heads * head_dim, embed]
  layers/attention/o            [layers, embed, heads * head_dim]
  layers/attention/q_bias, ...  [layers, heads * head_dim]; with qkv_bias
  layers/attention/{q, k}_norm  [layers, head_dim]; with qk_norm
  layers/attention_post_norm    [layers, embed]; with post_norms
  layers/mlp_norm               [layers, embed]
  layers/mlp_post_norm          [layers, embed]; with post_norms
  layers/mlp/{gate, up}         [layers, mlp, embed]
  layers/mlp/down               [layers, embed, mlp]
  final_norm                    [embed]
  head                          [vocab, embed]; absent when it is tied

A. Q. Jiang et al., Mistral 7B, arXiv 2310.06825. Llama Team, The Llama 3 Herd
of Models, arXiv 2407.21783. Qwen Team, arXiv 2407.10671 and 2505.09388. Gemma
Team, arXiv 2408.00118 and 2503.19786.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from selfdev_jax.models import flash

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rope:
  """The wavelengths of a rotary position embedding.

  `linear` divides every frequency by `factor` (S. Chen et al., arXiv
  2306.15595); `llama3` divides those whose wavelength exceeds
  `original_positions / low_frequency_factor`, keeps those below
  `original_positions / high_frequency_factor` and blends in between.
  """

  theta: float = 10_000.0
  scaling: str = "default"  # Or "linear", "llama3".
  factor: float = 1.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_positions: int = 8192

  def frequencies(self, head_dim: int) -> np.ndarray:
    """[head_dim // 2] float32, radians a position; rounded as in PyTorch."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    # NumPy's float32 power is off by more than a rounding; PyTorch's is not.
    powers = np.power(self.theta, exponents, dtype=np.float64)
    plain = 1 / powers.astype(np.float32)
    if self.scaling == "default":
      return plain
    if self.scaling == "linear":
      return plain / np.float32(self.factor)
    # PyTorch divides a number by a tensor as the product with its reciprocal.
    turns = self.original_positions * (1 / (2 * np.pi * (1 / plain)))
    low, high = self.low_frequency_factor, self.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * plain / self.factor + kept * plain).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The shape of a decoder; hashable, a static argument of jitted functions.

  Attributes:
    family: whose names it has on disk (`convert`); the block does not read it.
    local_rope: of the layers with a window; None: `rope` too.
    unit_offset_norms: norms scale by 1 + w instead of w.
    post_norms: attention and MLP are normed before they are added, too.
    activation: of the gate, `silu` or `gelu_tanh`.
    scaled_embedding: embeddings are multiplied by sqrt(embed).
    query_scale: attention divides by its root; None: head_dim.
    attention_softcap: c tanh(x / c) on attention logits; None: no cap.
    logit_softcap: the same on the model's logits.
    window: how many tokens, itself included, a token sees in `local` layers.
    local: for each layer whether it has the window; empty: none has.
  """

  vocab_size: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  family: str = "mistral"
  rope: Rope = Rope()
  local_rope: Rope | None = None
  norm_eps: float = 1e-5
  unit_offset_norms: bool = False
  post_norms: bool = False
  qk_norm: bool = False
  qkv_bias: bool = False
  activation: str = "silu"
  scaled_embedding: bool = False
  query_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  window: int | None = None
  local: tuple[bool, ...] = ()
  tied_head: bool = False
  max_positions: int = 4096


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, unit_offset: bool = False
) -> jax.Array:
  """[..., embed] normalised by its root mean square, in float32 inside.

  B. Zhang, R. Sennrich, Root Mean Square Layer Normalization, 2019.
  """
  wide = x.astype(jnp.float32)
  wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
  if unit_offset:  # Gemma rounds after the product, Llama before it.
    return (wide * (1 + scale.astype(jnp.float32))).astype(x.dtype)
  return wide.astype(x.dtype) * scale


def _angles(rope: Rope, head_dim: int, positions: jax.Array):
  """(cosines, sines), both [batch, seq, 1, head_dim // 2] float32."""
  frequencies = jnp.asarray(rope.frequencies(head_dim))
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary position embedding in the half-split layout of Hugging Face.

  Args:
    x: [batch, seq, heads, head_dim].
    cos: [batch, seq, 1, head_dim // 2] float32.
    sin: likewise.

  Returns:
    Like `x`.

  References:
    J. Su et al., RoFormer, arXiv 2104.09864.
  """
  left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = (left * cos - right * sin, right * cos + left * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | flash.Rows,
    scale: float,
    softcap: float | None,
) -> jax.Array:
  """Grouped-query attention (J. Ainslie et al., arXiv 2305.13245).

  Args:
    q: [batch, seq, heads, head_dim].
    k: [batch, keys, kv_heads, head_dim].
    v: like `k`.
    mask: [batch, 1, seq, keys] bool, true where a query sees a key; or rows
      that a kernel attends to.
    scale: of the logits.
    softcap: see `DecoderConfig`.

  Returns:
    Like `q`.
  """
  if isinstance(mask, flash.Rows):
    return flash.attend(mask, q, k, v, scale, softcap)
  if softcap is None:
    # Inside, it takes the logits from bfloat16 to float32 by promotion.
    with jax.numpy_dtype_promotion("standard"):
      return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)
  groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  logits = scale * jnp.einsum(
      "bqhgd,bkhd->bhgqk", groups, k, preferred_element_type=jnp.float32
  )
  logits = softcap * jnp.tanh(logits / softcap)
  logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhgqk,bkhd->bqhgd", weights, v).reshape(q.shape)


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


def _norm_scale(config, size=None):
  value = jnp.zeros if config.unit_offset_norms else jnp.ones
  return nnx.Param(value(size or config.embed))


class Attention(nnx.Module):

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    d, queries = config.embed, config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    self.q = _matrix(rngs, queries, d)
    self.k = _matrix(rngs, keys, d)
    self.v = _matrix(rngs, keys, d)
    self.o = _matrix(rngs, d, queries)
    if config.qkv_bias:
      self.q_bias = nnx.Param(jnp.zeros(queries))
      self.k_bias = nnx.Param(jnp.zeros(keys))
      self.v_bias = nnx.Param(jnp.zeros(keys))
    if config.qk_norm:
      self.q_norm = _norm_scale(config, config.head_dim)
      self.k_norm = _norm_scale(config, config.head_dim)

  def __call__(self, x, mask, cos, sin, lora, cache, inputs):
    """See `Decoder.__call__`; `cache` is (keys, values, layer, start)."""
    c, lora = self.config, lora or {}
    inputs["q"] = x
    q = _linear(x, self.q[...], lora.get("q"))
    k = _linear(x, self.k[...], lora.get("k"))
    v = _linear(x, self.v[...], lora.get("v"))
    if c.qkv_bias:
      q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
    q, k, v = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in (q, k, v))
    if c.qk_norm:
      q = rms_norm(q, self.q_norm[...], c.norm_eps, c.unit_offset_norms)
      k = rms_norm(k, self.k_norm[...], c.norm_eps, c.unit_offset_norms)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if cache is not None:
      keys, values, layer, start = cache
      at = (layer, 0, start, 0, 0)
      keys = jax.lax.dynamic_update_slice(keys, k[None], at)
      values = jax.lax.dynamic_update_slice(values, v[None], at)
      k = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
      v = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)
      cache = keys, values
    scale = (c.query_scale or c.head_dim) ** -0.5
    y = attend(q, k, v, mask, scale, c.attention_softcap)
    y = inputs["o"] = y.reshape(*y.shape[:2], -1)
    return _linear(y, self.o[...], lora.get("o")), cache


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Mlp(nnx.Module):
  """A gated MLP (N. Shazeer, arXiv 2002.05202)."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.gate = _matrix(rngs, config.mlp, config.embed)
    self.up = _matrix(rngs, config.mlp, config.embed)
    self.down = _matrix(rngs, config.embed, config.mlp)

  def __call__(self, x, lora, inputs):
    lora = lora or {}
    inputs["gate"] = x
    activate = _ACTIVATIONS[self.config.activation]
    gate = activate(_linear(x, self.gate[...], lora.get("gate")))
    up = _linear(x, self.up[...], lora.get("up"))
    y = inputs["down"] = gate * up
    return _linear(y, self.down[...], lora.get("down"))


class Block(nnx.Module):
  """One layer: attention and MLP, each normed before, or before and after."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.attention_norm = _norm_scale(config)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = _norm_scale(config)
    self.mlp = Mlp(config, rngs=rngs)
    if config.post_norms:
      self.attention_post_norm = _norm_scale(config)
      self.mlp_post_norm = _norm_scale(config)

  def __call__(self, x, mask, cos, sin, lora, cache, inputs):
    """See `Decoder.__call__`; fills `inputs`, see `Decoder.observe`."""
    c, lora = self.config, lora or {}
    norm = lambda y, scale: rms_norm(
        y, scale[...], c.norm_eps, c.unit_offset_norms
    )
    y = norm(x, self.attention_norm)
    y, cache = self.attention(
        y, mask, cos, sin, lora.get("attention"), cache, inputs
    )
    x += norm(y, self.attention_post_norm) if c.post_norms else y
    y = self.mlp(norm(x, self.mlp_norm), lora.get("mlp"), inputs)
    x += norm(y, self.mlp_post_norm) if c.post_norms else y
    return x, cache


_REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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
    self.final_norm = _norm_scale(config)
    if not config.tied_head:
      self.head = _matrix(rngs, config.vocab_size, config.embed)

  def __call__(
      self,
      tokens,
      positions,
      mask,
      lora=None,
      cache=None,
      remat=None,
      sharding=None,
  ):
    """Hidden states after the final norm.

    Args:
      tokens: [batch, seq] int32.
      positions: [batch, seq] int32.
      mask: see `attend`.
      lora: None or {"layers": {"attention": {"q": {"a", "b"}, ...}, ...}} with
        a leading layer axis; `b` already carries the scale alpha / rank.
      cache: None or (keys, values, start): two arrays [layers, batch, keys,
        kv_heads, head_dim] and the slot of the first of `tokens`.
      remat: what the backward pass computes anew instead of keeping it: None,
        nothing; `full`, each layer; `dots`, all of it but its products with
        weights.
      sharding: of the hidden states, [batch, seq, embed]; None: XLA's choice.

    Returns:
      ([batch, seq, embed], cache), the cache as (keys, values) or None.
    """
    x, kv, _ = self._run(tokens, positions, mask, lora, cache, remat, sharding)
    return x, kv

  def observe(self, tokens, positions, mask, fn):
    """What `fn` makes of each layer's inputs: a pytree, its leaves stacked.

    Args:
      tokens: see `__call__`.
      positions: likewise.
      mask: likewise.
      fn: takes {"q", "o", "gate", "down"}: what these matrices of a layer are
        applied to, [batch, seq, in]; k and v share q's, up shares gate's.
    """
    return self._run(tokens, positions, mask, observe=fn)[2]

  def _run(
      self,
      tokens,
      positions,
      mask,
      lora=None,
      cache=None,
      remat=None,
      sharding=None,
      observe=lambda inputs: None,
  ):
    c = self.config
    graph, layers = nnx.split(self.layers)
    context = self._contexts(positions, mask, cache)

    def constrain(x):
      if sharding is None:
        return x
      return jax.lax.with_sharding_constraint(x, sharding)

    def body(carry, xs):
      x, kv = carry
      layer, state, lora = xs
      at = None if kv is None else (*kv, layer, cache[2])
      block, inputs = nnx.merge(graph, state), {}
      x, kv = block(x, *context(layer), lora, at, inputs)
      return (constrain(x), kv), observe(inputs)

    if remat is not None:
      # A scan's iterations are not merged: nothing need keep them apart.
      body = jax.checkpoint(body, prevent_cse=False, policy=_REMAT[remat])
    xs = (
        jnp.arange(c.layers),
        layers,
        None if lora is None else lora["layers"],
    )
    x = self.embed[...][tokens]
    if c.scaled_embedding:
      x *= jnp.asarray(c.embed**0.5, x.dtype)
    (x, kv), observed = jax.lax.scan(
        body, (constrain(x), None if cache is None else cache[:2]), xs
    )
    x = rms_norm(x, self.final_norm[...], c.norm_eps, c.unit_offset_norms)
    return x, kv, observed

  def _contexts(self, positions, mask, cache):
    """Of a layer: (mask, cosines, sines)."""
    c = self.config
    full = (mask, *_angles(c.rope, c.head_dim, positions))
    if not any(c.local):
      return lambda layer: full
    if isinstance(mask, flash.Rows):
      near = mask.within(c.window)
      if near.window is not None and not all(c.local):
        raise ValueError("kernels attend with one window in all layers")
    elif cache is None:
      queries, keys = positions[:, None, :, None], positions[:, None, None, :]
      near = mask & (keys > queries - c.window)
    else:  # Its slots are as far apart as the positions of what they hold.
      queries = cache[2] + jnp.arange(mask.shape[2])[:, None]
      near = mask & (jnp.arange(mask.shape[3]) > queries - c.window)
    rope = c.local_rope or c.rope
    local = (near, *_angles(rope, c.head_dim, positions))
    if all(c.local):
      return lambda layer: local
    is_local = jnp.array(c.local)
    return lambda layer: jax.tree.map(
        functools.partial(jnp.where, is_local[layer]), local, full
    )

  def logits(self, hidden):
    """[..., embed] -> [..., vocab] in the dtype of `hidden`."""
    head = self.embed if self.config.tied_head else self.head
    y, cap = hidden @ head[...].T, self.config.logit_softcap
    return y if cap is None else cap * jnp.tanh(y / cap)


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
  """The module over `params`; it computes in the embedding's dtype."""
  dtype = params["embed"].dtype
  params = jax.tree.map(
      lambda leaf: leaf if leaf.dtype == dtype else leaf.astype(dtype), params
  )
  return nnx.merge(_graph(config)[0], params)


def scale_adapter(adapter: Params, scale: float) -> Params:
  """A LoRA adapter with `b` times `scale`, as `forward` takes it.

  Args:
    adapter: {"layers": {"attention": {"q": {"a": [layers, rank, in],
      "b": [layers, out, rank]}, ...}, "mlp": ...}}.
    scale: alpha / rank.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf * scale if path[-1].key == "b" else leaf, adapter
  )


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


def prefix_layout(ends: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
  """Of rows [prompt | completion | completion ... | padding].

  A completion sees the prompt and itself, and its positions follow on the
  prompt's, as if each stood in a row of its own (arXiv 2410.20305).

  Args:
    ends: [batch, 1 + completions] int32, the slots at which the prompt and each
      completion end; where there are fewer, the last end again.
    length: slots a row.

  Returns:
    (positions [batch, length] int32, mask [batch, 1, length, length] bool).
  """
  slots = jnp.arange(length, dtype=jnp.int32)
  # 0 is the prompt, the last is padding.
  part = jnp.sum(slots[:, None] >= ends[:, None], axis=-1, dtype=jnp.int32)
  prompt = ends[:, :1]
  starts = jnp.concatenate([jnp.zeros_like(prompt), ends], axis=1)
  start = jnp.take_along_axis(starts, part, axis=1)
  positions = jnp.where(part == 0, slots, slots - start + prompt)
  same = part[:, :, None] == part[:, None, :]
  sees = (same | (part == 0)[:, None, :]) & (slots[:, None] >= slots)
  return positions, sees[:, None]


def attention_kernel(
    config: DecoderConfig,
    dtype: jax.typing.DTypeLike,
    length: int,
    device: jax.Device | None = None,
) -> str:
  """What attends in whole rows: `xla`, `cudnn` or `splash`.

  XLA does in every case; the kernels never hold a row's logits or its mask, but
  know one window for all layers.

  Args:
    config: the decoder's shape.
    dtype: of its parameters.
    length: slots a row, or the span of `forward`.
    device: where it runs; None: JAX's default.
  """
  device = device or jax.devices()[0]
  windowed = any(config.local) and config.window < length
  if windowed and not all(config.local):
    return "xla"
  return flash.kernel(device, dtype, config.head_dim, config.attention_softcap)


def forward(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    *,
    ends: jax.Array | None = None,
    lora: Params | None = None,
    remat: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
    attention: str = "xla",
    span: int | None = None,
) -> jax.Array:
  """Hidden states of whole rows; `logits` turns them into logits.

  Args:
    config: the decoder's shape.
    params: its parameters.
    tokens: [batch, seq] int32.
    segments: [batch, seq] int32 as in `causal_mask`; None: one document a row.
    positions: [batch, seq] int32; None: 0, 1, 2, ...
    ends: see `prefix_layout`; instead of `segments` and `positions`.
    lora: see `Decoder.__call__`.
    remat: likewise.
    sharding: likewise; on several devices kernels need it.
    attention: see `attention_kernel`. Rows with `segments` or `positions` are
      for XLA whatever it says.
    span: with `ends` and a kernel, slots that a prompt and a completion fill
      at most, which makes it faster; NaN where they fill more. None: all.

  Returns:
    [batch, seq, embed]. What it holds of padding depends on `attention`.
  """
  plain = segments is None and positions is None
  if ends is not None:
    positions, mask = prefix_layout(ends, tokens.shape[1])
  else:
    if segments is None:
      segments = jnp.ones_like(tokens)
    if positions is None:
      positions = jnp.broadcast_to(
          jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
      )
    mask = causal_mask(segments)
  if plain and attention != "xla":
    mask = flash.rows(attention, tokens.shape[1], ends, span, sharding)
  model = bind(config, params)
  return model(tokens, positions, mask, lora, None, remat, sharding)[0]


def logits(
    config: DecoderConfig, params: Params, hidden: jax.Array
) -> jax.Array:
  """[..., embed] -> [..., vocab]."""
  return bind(config, params).logits(hidden)
