"""Attention by kernels that keep no logits: cuDNN's on GPU, splash on TPU.

Both know one mask, the causal one, with a window or without. That serves rows
of one document as they are; the rows of `decoder.prefix_layout` are unpacked
for it, inside attention only: part c of a row becomes a row of its own,
[prompt | completion c], whatever follows it cannot be seen from it, and the
outputs are packed again. So the layers' products still meet a shared prompt
once, and attention does what it would do without sharing.

What was run: the unpacking and splash in interpret mode against the XLA path
on CPU, with gradients and on a mesh; and the lowering of both kernels, for TPU
and for CUDA. Neither has been run or timed on its own hardware by this project.

T. Dao, FlashAttention-2, arXiv 2307.08691. Prefix sharing: F. Wang, S. Hegde,
arXiv 2410.20305.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_LANES = 128  # Splash's blocks are multiples of it.
_BLOCKS = (512, 256, 128)


def kernel(
    device: jax.Device,
    dtype: jax.typing.DTypeLike,
    head_dim: int,
    softcap: float | None,
) -> str:
  """The kernel for such heads, by the conditions of jax 0.10: `xla` is none.

  Args:
    device: an NVIDIA GPU, a TPU or another.
    dtype: of queries, keys and values.
    head_dim: of each.
    softcap: see `decoder.DecoderConfig`.
  """
  if device.platform == "tpu":
    # Multiples whose lowering is tested; softcaps are no matter.
    return "splash" if head_dim % 64 == 0 else "xla"
  if device.platform != "gpu" or softcap is not None:
    return "xla"
  try:
    generation = float(device.compute_capability)  # 8: Ampere; 9: Hopper.
  except ValueError:  # AMD's are names.
    return "xla"
  widest = 256 if generation >= 9 else 128
  narrow = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  fits = head_dim % 8 == 0 and head_dim <= widest
  return "cudnn" if generation >= 8 and narrow and fits else "xla"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prompt", "slots", "places"],
    meta_fields=["kernel", "span", "sharding", "window"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
  """Who sees whom, in the place of a mask.

  Attributes:
    kernel: `cudnn` or `splash`.
    span: slots of the causal rows.
    sharding: of the hidden states; None: one device.
    window: how many tokens, itself included, a token sees; None: all.
    prompt: [batch] int32, tokens of the prompt; None, like the next two, where
      the rows are causal as they are.
    slots: [batch, parts, span] int32, where in its row each slot of a part is
      found; past the row's end where nowhere.
    places: [batch, length] int32, where in the parts, one after another, each
      slot of a row is found; `parts * span` if it is padding, one more if it
      lies beyond `span`.
  """

  kernel: str
  span: int
  sharding: jax.sharding.NamedSharding | None = None
  window: int | None = None
  prompt: jax.Array | None = None
  slots: jax.Array | None = None
  places: jax.Array | None = None

  def within(self, window: int) -> "Rows":
    """The same rows in a layer with this window."""
    if window >= self.span:
      return self
    return dataclasses.replace(self, window=window)


def rows(
    kernel: str,
    length: int,
    ends: jax.Array | None = None,
    span: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Rows:
  """Rows of `length` slots.

  Args:
    kernel: `cudnn` or `splash`.
    length: slots a row.
    ends: [batch, 1 + parts] int32, see `decoder.prefix_layout`; None: one
      document a row.
    span: no prompt and completion are longer together; None: `length`.
    sharding: of the hidden states, [batch, length, embed].
  """
  if kernel not in _KERNELS:
    raise ValueError(f"no attention kernel {kernel!r}: {sorted(_KERNELS)}")
  if not isinstance(sharding, jax.sharding.NamedSharding):
    sharding = None
  if ends is None:
    return Rows(kernel, length, sharding)
  span = min(span or length, length)
  prompt = ends[:, :1, None]
  starts, stops = ends[:, :-1, None], ends[:, 1:, None]
  slot = jnp.arange(span, dtype=jnp.int32)
  found = jnp.where(slot < prompt, slot, slot - prompt + starts)
  slots = jnp.where(slot < prompt + stops - starts, found, length)

  parts = ends.shape[1] - 1
  slot = jnp.arange(length, dtype=jnp.int32)
  inside = (slot >= starts) & (slot < stops)
  # The prompt's are found in part 0.
  part = jnp.argmax(inside, axis=1).astype(jnp.int32)
  start = jnp.take_along_axis(ends, part, axis=1)
  prompt = ends[:, :1]
  within = jnp.where(slot < prompt, slot, slot - start + prompt)
  places = jnp.where(within < span, part * span + within, parts * span + 1)
  places = jnp.where(slot < ends[:, -1:], places, parts * span)
  return Rows(kernel, span, sharding, None, prompt[:, 0], slots, places)


def _take(x, indices):
  """Of [batch, n, ...] by [batch, *m]: [batch, *m, ...], 0 past the end."""
  take = lambda x, i: x.at[i].get(mode="fill", fill_value=0)
  return jax.vmap(take)(x, indices)


# Unpacking and packing are each other's transposes but for a prompt's copies.
# Said by hand, because JAX transposes gathers to scatters: slow on TPU, and on
# GPU sums in any order.


def _shared(rows):
  """[batch, parts, span] bool, true for a copy of what part 0 has."""
  part = jnp.arange(rows.slots.shape[1])[:, None]
  return (part > 0) & (jnp.arange(rows.span) < rows.prompt[:, None, None])


def _flat(x):
  return x.reshape(x.shape[0], -1, *x.shape[3:])


@jax.custom_vjp
def _unpack(x, rows):
  """[batch, length, ...] -> [batch, parts, span, ...]."""
  return _take(x, rows.slots)


def _unpack_fwd(x, rows):
  return _unpack(x, rows), rows


def _unpack_bwd(rows, g):
  shared = _shared(rows)[..., *(None,) * (g.ndim - 3)]
  copies = jnp.sum(jnp.where(shared, g, 0), axis=1, dtype=jnp.float32)
  rest = rows.places.shape[1] - rows.span
  copies = jnp.pad(copies, [(0, 0), (0, rest)] + [(0, 0)] * (g.ndim - 3))
  own = _take(_flat(g), rows.places).astype(jnp.float32)
  return (own + copies).astype(g.dtype), None


_unpack.defvjp(_unpack_fwd, _unpack_bwd)


@jax.custom_vjp
def _pack(x, rows):
  """[batch, parts, span, ...] -> [batch, length, ...]; 0 where padding is."""
  flat = _flat(x)
  lost = rows.places > flat.shape[1]
  lost = lost[..., *(None,) * (x.ndim - 3)]
  # Loud: the caller's `span` was too small.
  return jnp.where(lost, jnp.nan, _take(flat, rows.places))


def _pack_fwd(x, rows):
  return _pack(x, rows), rows


def _pack_bwd(rows, g):
  own = jnp.where(_shared(rows), g.shape[1], rows.slots)
  return _take(g, own), None


_pack.defvjp(_pack_fwd, _pack_bwd)


def attend(
    rows: Rows,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    softcap: float | None,
) -> jax.Array:
  """Grouped-query attention of rows, their slots in order.

  Args:
    rows: see `Rows`.
    q: [batch, length, heads, head_dim].
    k: [batch, length, kv_heads, head_dim].
    v: like `k`.
    scale: of the logits.
    softcap: see `decoder.DecoderConfig`.

  Returns:
    Like `q`.
  """
  run = functools.partial(_attend, scale=scale, softcap=softcap)
  if rows.sharding is None or rows.sharding.mesh.size == 1:
    return run(rows, q, k, v)
  # XLA cannot cut a Mosaic kernel; and so the gathers stay at home, too.
  mesh, batch = rows.sharding.mesh, (*rows.sharding.spec, None)[0]
  taken = batch if isinstance(batch, tuple) else (batch,)
  free = tuple(name for name in mesh.axis_names if name not in taken)
  even = k.shape[2] % math.prod(mesh.shape[name] for name in free) == 0
  cut = PartitionSpec(batch, None, free if even else None)
  return jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(PartitionSpec(batch), cut, cut, cut),
      out_specs=cut,
      check_vma=False,
  )(rows, q, k, v)


def _attend(rows, q, k, v, scale, softcap):
  kernel = functools.partial(
      _KERNELS[rows.kernel], scale=scale, softcap=softcap, window=rows.window
  )
  if rows.slots is None:
    return kernel(q, k, v)
  parts = [_unpack(x, rows) for x in (q, k, v)]
  batch = parts[0].shape[:2]
  y = kernel(*(x.reshape(-1, *x.shape[2:]) for x in parts))
  return _pack(y.reshape(*batch, *y.shape[1:]), rows)


def _dot_product(q, k, v, scale, softcap, window, implementation="cudnn"):
  if softcap is not None:
    raise ValueError("cuDNN caps no attention logits")
  with jax.numpy_dtype_promotion("standard"):
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def _splash(q, k, v, scale, softcap, window, interpret=False):
  """Scales q itself, in q's dtype; logits and sums are float32."""
  length = q.shape[1]
  padded = -(-length // _LANES) * _LANES
  block = next(size for size in _BLOCKS if padded % size == 0)
  if window is None:
    mask = splash_attention.CausalMask((padded, padded))
  else:
    mask = splash_attention.LocalMask((padded, padded), (window - 1, 0), 0)
  kernel = splash_attention.make_splash_mha_single_device(
      splash_attention.MultiHeadMask([mask] * q.shape[2]),
      block_sizes=splash_attention.BlockSizes(
          block_q=block,
          block_kv=block,
          block_q_dkv=block,
          block_kv_dkv=block,
          block_q_dq=block,
          block_kv_dq=block,
      ),
      attn_logits_soft_cap=softcap,
      interpret=interpret,
  )
  heads_first = lambda x: jnp.pad(
      x, ((0, 0), (0, padded - length), (0, 0), (0, 0))
  ).swapaxes(1, 2)
  q, k, v = (heads_first(x) for x in (q * scale, k, v))
  return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :length]


_KERNELS = {"cudnn": _dot_product, "splash": _splash}
