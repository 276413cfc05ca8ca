"""Thresholds by counting against NumPy's sort, ties and all."""

import functools

from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax.merging import select

_SHAPE = (12, 30)
_SIZE = 360


def _keys(inputs):
  return [select.magnitude_keys(x) for x in inputs]


@functools.partial(jax.jit, static_argnames=("exact",))
def _thresholds(arrays, ranks, exact):
  return select.thresholds(_keys, arrays, ranks, exact)


@functools.partial(jax.jit, static_argnames=("exact_k",))
def _masks(arrays, counts, exact_k):
  cuts = select.largest(_keys, arrays, counts, exact_k)
  return [cut.mask(_keys(arrays)) for cut in cuts]


def _floats(levels):
  """Arrays of few distinct magnitudes, of signs and sizes of all kinds."""
  rng = np.random.default_rng(levels[1])
  kind, _ = levels
  if kind == "normal":
    x = rng.normal(size=_SHAPE)
  elif kind == "few":
    x = rng.choice([0.0, 1.0, -1.0, 0.5, 2.0**-20], size=_SHAPE)
  elif kind == "constant":
    x = np.full(_SHAPE, -0.75)
  elif kind == "zeros":
    x = np.zeros(_SHAPE)
  elif kind == "wide":
    x = rng.choice([-1, 1], _SHAPE) * 10.0 ** rng.uniform(-44, 38, _SHAPE)
  elif kind == "spike":
    x = np.where(rng.random(_SHAPE) < 0.99, 1e-30, 1e30)
  else:  # What is sampled differs from the rest.
    x = np.arange(_SIZE).reshape(_SHAPE) % 7 * 1e-3 + (
        np.arange(_SIZE).reshape(_SHAPE) % 2
    )
  return x.astype(np.float32)


_KINDS = ("normal", "few", "constant", "zeros", "wide", "spike", "biased")
_ARRAYS = st.tuples(st.sampled_from(_KINDS), st.integers(0, 5))


@settings(max_examples=30, deadline=None)
@given(_ARRAYS, _ARRAYS, st.integers(0, _SIZE), st.integers(0, _SIZE))
@example(("zeros", 0), ("constant", 0), 1, _SIZE)
@example(("wide", 0), ("spike", 0), 3, 357)
def test_thresholds_are_order_statistics(one, two, first, second):
  arrays = [_floats(one), _floats(two)]
  ranks = np.int32([[first, second], [second, first]])
  for exact in (False, True):
    keys, reached = _thresholds(arrays, ranks, exact)
    for array, row, limits, counts in zip(
        arrays, ranks, np.asarray(keys), np.asarray(reached), strict=True
    ):
      ordered = np.sort(np.abs(array), axis=None)[::-1]
      bits = ordered.view(np.int32)
      for rank, limit, count in zip(row, limits, counts, strict=True):
        if rank == 0:
          assert count == 0 and limit > bits[0]
          continue
        kth = bits[rank - 1]
        # As many as reach the k-th magnitude itself, and no other.
        assert count == (bits >= limit).sum() == (bits >= kth).sum()
        if exact:
          assert limit == kth


@settings(max_examples=60, deadline=None)
@given(_ARRAYS, st.integers(0, _SIZE), st.integers(0, _SIZE))
@example(("constant", 0), 17, 0)
def test_exactly_k_are_kept_the_first_of_those_that_tie(kind, first, second):
  array = _floats(kind)
  order = np.argsort(-np.abs(array), axis=None, kind="stable")
  counts = [jnp.int32([first]), jnp.int32([second])]
  masks = _masks([array], counts, exact_k=True)
  for k, (mask,) in zip((first, second), masks, strict=True):
    expected = np.zeros(_SIZE, bool)
    expected[order[:k]] = True
    np.testing.assert_array_equal(np.asarray(mask).reshape(-1), expected)


@pytest.mark.parametrize("shape", [(1,), (5,), (3000,), (2, 3, 4)])
def test_any_shape(shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  k = max(x.size // 3, 1)
  ((mask,),) = jax.jit(_masks, static_argnums=2)([x], [jnp.int32([k])], True)
  assert mask.shape == shape and mask.sum() == k
  assert np.abs(x[mask]).min() >= np.abs(x[~mask]).max(initial=0)


@pytest.mark.slow
def test_bfloat16_differences_take_few_passes(monkeypatch):
  """Their magnitudes are few: neighbours of sampled ones settle them."""
  passes = []
  while_loop = jax.lax.while_loop

  def counted(is_open, step, state):
    result = while_loop(is_open, step, state)
    if isinstance(result, select._Bracket):
      passes.append(int(result.passes))
    return result

  monkeypatch.setattr(select.lax, "while_loop", counted)
  rng = np.random.default_rng(0)
  base = jnp.asarray(rng.normal(0, 0.02, (256, 300)), jnp.bfloat16)
  near = base.astype(jnp.float32) + rng.normal(0, 2e-3, base.shape).astype(
      np.float32
  )
  expert = near.astype(jnp.bfloat16)
  tau = expert.astype(jnp.float32) - base.astype(jnp.float32)
  for share in (0.1, 0.2, 0.5, 0.8):
    select.thresholds(_keys, [tau], jnp.int32([[int(share * tau.size)]]))
  assert len(passes) == 4 and max(passes) <= 6


def test_rows_are_ordered_by_magnitude_then_column():
  rng = np.random.default_rng(0)
  rows = rng.integers(-3, 4, (20, 50)).astype(np.float32)
  keys, ordered = jax.jit(select.row_order)(rows)
  np.testing.assert_array_equal(np.sort(keys, axis=1), ordered)
  for row, key in zip(rows, np.asarray(keys), strict=True):
    np.testing.assert_array_equal(
        np.argsort(key), np.argsort(np.abs(row), kind="stable")
    )


def test_counts_and_sums():
  x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
  assert select.count(x > 0) == (x > 0).sum()
  np.testing.assert_allclose(
      select.sums([x, x * x]), [x.sum(), (x * x).sum()], rtol=1e-5
  )
  found = jax.jit(lambda x: select.apart(lambda x: {"max": x.max()}, x))(x)
  assert found["max"] == x.max()
