"""Random numbers that cost less than the memory traffic of what they decide.

JAX's own generator takes 100 times as long as the merge it would be used for.
This one is a counter put through an integer hash of two rounds, so that it is
computed where it is used, again if need be, and does not depend on how an
array is laid out over devices.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


def uniform(key: jax.Array, stream: int, shape: tuple[int, ...]) -> jax.Array:
  """float32 array in [0, 1), multiples of 2**-24.

  Args:
    key: a PRNG key.
    stream: streams of one key are independent.
    shape: of the array, of less than 2**32 elements.

  References:
    C. Wellons, Prospecting for hash functions (nullprogram.com), 2018: the
    hash with the least bias of its size.
  """
  words = jax.random.key_data(jax.random.fold_in(key, stream)).reshape(-1)
  place = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    index = lax.broadcasted_iota(jnp.uint32, shape, axis)
    place += index * np.uint32(stride % 2**32)
    stride *= shape[axis]
  bits = _hash(_hash(place ^ words[0]) ^ words[-1])
  return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def _hash(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)
