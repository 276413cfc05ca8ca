"""A name for weights, computed where they are."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from selfdev_jax.models.decoder import Params

_LANES = 4  # Of 32 bits.
_GOLDEN = 0x9E3779B9  # 2^32 / phi: multiples of it are far from each other.


def checksum(params: Params) -> str:
  """128 bits, as 32 hex digits, that name a tree of weights.

  Each bit of each leaf counts, with its place in the leaf, and so do the
  leaves' paths, dtypes and shapes. The leaves stay where they are: four
  numbers a leaf come to the host. They are sums of integers modulo 2^32, which
  no order changes: the name does not depend on the kind of device, nor on how
  the leaves are cut over several.

  One changed element of up to 4 bytes is always seen; other changes, such as
  exchanged elements, layers or leaves, are but for one case in 2^128, as if by
  chance. It is no protection against
  someone who looks for two trees of one name: for that take a cryptographic
  hash of the files, `convert.digest`.

  Args:
    params: a tree of arrays, of JAX or what `np.asarray` takes, of numbers of
      1, 2, 4 or 8 bytes.
  """
  table = [
      [
          jax.tree_util.keystr(path, simple=True, separator="/"),
          np.dtype(leaf.dtype).name,
          list(leaf.shape),
          # Waited for: one leaf of the host's at a time is on the device.
          np.asarray(_lanes(_for_device(leaf))).tolist(),
      ]
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  ]
  return hashlib.sha256(json.dumps(table).encode()).hexdigest()[:32]


def _for_device(leaf) -> jax.Array | np.ndarray:
  """A leaf that JAX takes as it is; it would round float64 to float32."""
  if isinstance(leaf, jax.Array):
    return leaf
  array = np.ascontiguousarray(leaf)
  width = min(array.itemsize, 4)
  parts = () if array.itemsize == width else (array.itemsize // width,)
  words = array.reshape(-1).view(f"u{width}")
  return words.reshape((*leaf.shape, *parts))


@jax.jit
def _lanes(leaf):
  """[4] uint32: sums over a leaf's elements, each mixed with its place."""
  unsigned = jnp.dtype(f"u{min(leaf.dtype.itemsize, 4)}")
  # [..., 2] of 8 bytes: the lower half first.
  bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
  if not bits.ndim:
    bits = bits[None]
  mixed = [_mix(bits ^ _places(bits.shape, lane)) for lane in range(_LANES)]
  # All four in one pass over the leaf, which `jnp.sum` would read four times;
  # row by row, as XLA gives the results of one reduction to several cores.
  rows = jax.lax.reduce(
      mixed,
      [jnp.uint32(0)] * _LANES,
      lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
      [bits.ndim - 1],
  )
  return jnp.stack([jnp.sum(row, dtype=jnp.uint32) for row in rows])


def _places(shape, lane):
  """A number for each element: one for its place on each axis, added up.

  The places on an axis, not in the whole leaf: these may exceed 32 bits.
  """
  total = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(shape):
    start = jnp.uint32((1 + lane + axis * _LANES) * _GOLDEN % 2**32)
    places = _mix(jnp.arange(size, dtype=jnp.uint32) + start)
    total += jax.lax.broadcast_in_dim(places, shape, [axis])
  return total


def _mix(x):
  """Murmur3's finaliser: one to one, and each bit in flips half of those out.

  References:
    A. Appleby, github.com/aappleby/smhasher, MurmurHash3.cpp, fmix32.
  """
  x ^= x >> jnp.uint32(16)
  x *= jnp.uint32(0x85EBCA6B)
  x ^= x >> jnp.uint32(13)
  x *= jnp.uint32(0xC2B2AE35)
  return x ^ (x >> jnp.uint32(16))
