"""Names of weights: what changes one, and what must not."""

import hashlib
import importlib
import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np
import pytest

from selfdev_jax import models

# The package's name for it is the function's.
checksum_lib = importlib.import_module("selfdev_jax.models.checksum")

_RNG = np.random.default_rng(0)


def _leaf(dtype, shape=(3, 8, 16)):
  return _RNG.normal(size=shape).astype(dtype)


def _mix(x):
  x = x ^ (x >> 16)
  x = x * np.uint64(0x85EBCA6B) % 2**32
  x = x ^ (x >> 13)
  x = x * np.uint64(0xC2B2AE35) % 2**32
  return x ^ (x >> 16)


def _twin(params):
  """The same in NumPy, in 64 bits, an axis of places at a time."""
  table = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = "/".join(key.key for key in path)
    width = min(leaf.dtype.itemsize, 4)
    bits = leaf.reshape(*leaf.shape, 1).view(f"u{width}").astype(np.uint64)
    if leaf.shape and leaf.dtype.itemsize == width:
      bits = bits[..., 0]
    sums = []
    for lane in range(4):
      places = np.zeros(bits.shape, np.uint64)
      for axis, index in enumerate(np.indices(bits.shape, np.uint64)):
        start = (1 + lane + 4 * axis) * 0x9E3779B9 % 2**32
        places += _mix((index + start) % 2**32)
      sums.append(int(_mix(bits ^ (places % 2**32)).sum() % 2**32))
    table.append([name, leaf.dtype.name, list(leaf.shape), sums])
  return hashlib.sha256(json.dumps(table).encode()).hexdigest()[:32]


@pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64, np.int8]
)
def test_equals_its_numpy_twin(dtype):
  params = {
      "b": {"x": _leaf(dtype), "one": _leaf(dtype, ())},
      "a": _leaf(dtype),
  }
  found = models.checksum(params)
  assert len(found) == 32 and found == _twin(params)
  if dtype != np.float64:
    assert models.checksum(jax.tree.map(jnp.asarray, params)) == found


def test_float64_on_the_device():
  leaf = _leaf(np.float64)
  with jax.enable_x64(True):
    assert models.checksum({"x": jnp.asarray(leaf)}) == _twin({"x": leaf})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_bit_changes_it(dtype):
  leaf = _leaf(dtype, (2, 3))
  names = {models.checksum({"x": leaf})}
  bits = leaf.view(f"u{leaf.itemsize}")
  for place in np.ndindex(leaf.shape):
    for bit in range(8 * leaf.itemsize):
      bits[place] ^= 1 << bit
      names.add(models.checksum({"x": leaf}))
      bits[place] ^= 1 << bit
  assert len(names) == 1 + leaf.size * 8 * leaf.itemsize


def test_every_exchange_changes_it():
  leaf = _leaf(np.float32, (4, 6))
  names, places = {models.checksum({"x": leaf})}, list(np.ndindex(leaf.shape))
  pairs = [(a, b) for i, a in enumerate(places) for b in places[:i]]
  for a, b in pairs:
    other = leaf.copy()
    other[a], other[b] = leaf[b], leaf[a]
    names.add(models.checksum({"x": other}))
  assert len(names) == 1 + len(pairs)


def test_what_else_changes_it():
  x, y = _leaf(np.float32, (4, 4)), _leaf(np.float32, (4, 4))
  trees = [
      {"x": x, "y": y},
      {"x": y, "y": x},
      {"x": x, "z": y},
      {"x": x[[1, 0, 2, 3]], "y": y},
      {"x": x[:, [1, 0, 2, 3]], "y": y},
      {"x": x.T, "y": y},
      {"x": x.reshape(2, 8), "y": y},
      {"x": x.reshape(1, 4, 4), "y": y},
      {"x": x.view(np.int32), "y": y},
      {"x": x.view(np.uint16), "y": y},
      {"x": x},
      {"x": np.zeros((4, 4), np.float32), "y": y},
      {"x": -np.zeros((4, 4), np.float32), "y": y},
      {},
  ]
  assert len({models.checksum(tree) for tree in trees}) == len(trees)


@pytest.mark.parametrize(
    "spec", [P("a"), P(None, "b"), P(None, None, "a"), P(("a", "b")), P()]
)
def test_sharded_equals_unsharded(spec):
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  leaf = _leaf(ml_dtypes.bfloat16, (8, 4, 16))
  cut = jax.device_put(leaf, NamedSharding(mesh, spec))
  assert models.checksum({"x": cut}) == models.checksum({"x": leaf})


def test_compiles_once_for_a_shape():
  trees = [{"x": jnp.asarray(_leaf(np.float32, (5, 7)))} for _ in range(3)]
  models.checksum(trees[0])
  before = checksum_lib._lanes._cache_size()
  for tree in trees:
    models.checksum(tree)
  assert checksum_lib._lanes._cache_size() == before


def test_mapped_equals_one_by_one():
  leaves = jnp.asarray(_leaf(np.float32))
  mapped = jax.vmap(checksum_lib._lanes)(leaves)
  np.testing.assert_array_equal(
      mapped, np.stack([checksum_lib._lanes(leaf) for leaf in leaves])
  )
