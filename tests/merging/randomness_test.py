"""The generator is uniform, and its streams and keys are independent."""

import jax
import numpy as np
import pytest

from selfdev_jax.merging import randomness

_SHAPE = (300, 400)
_N = 120_000


@pytest.fixture(scope="module")
def draw():
  compiled = jax.jit(
      lambda key: [randomness.uniform(key, i, _SHAPE) for i in range(2)]
  )
  return lambda seed: [np.asarray(x) for x in compiled(jax.random.key(seed))]


def test_is_uniform(draw):
  for u in (*draw(0), *draw(1)):
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    counts, _ = np.histogram(u, 256, (0, 1))
    # Chi-squared of 255 degrees of freedom: mean 255, deviation 22.6.
    chi2 = ((counts - _N / 256) ** 2 / (_N / 256)).sum()
    assert 255 - 5 * 22.6 < chi2 < 255 + 5 * 22.6


def test_neighbours_streams_and_keys_are_independent(draw):
  (a, b), (c, _) = draw(0), draw(1)
  pairs = [
      (a[:, 1:], a[:, :-1]),
      (a[1:], a[:-1]),
      (a[2:], a[:-2]),
      (a, b),
      (a, c),
      (b, c),
  ]
  for x, y in pairs:
    correlation = np.corrcoef(x.reshape(-1), y.reshape(-1))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(x.size)
  # Bits of the same place, too: each flips half the time.
  bits = [(u * 2**24).astype(np.uint32) for u in (a, b, c)]
  for i in range(24):
    for x, y in ((bits[0], bits[1]), (bits[0], bits[2])):
      flips = ((x ^ y) >> i & 1).mean()
      assert abs(flips - 0.5) < 5 * 0.5 / np.sqrt(_N)


def test_same_key_same_numbers_however_they_are_laid_out(draw):
  first, _ = draw(7)
  np.testing.assert_array_equal(first, draw(7)[0])
  one = jax.vmap(lambda key: randomness.uniform(key, 0, _SHAPE))
  keys = jax.random.split(jax.random.key(7), 2)
  both = jax.jit(one)(keys)
  assert not np.array_equal(both[0], both[1])
