"""Timing that can be trusted, as far as a busy machine can tell."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax.merging import roofline


@pytest.mark.parametrize(
    "bandwidth", [roofline.copy_bandwidth, roofline.triad_bandwidth]
)
def test_bandwidth_is_that_of_some_machine(bandwidth):
  # From an overloaded memory to more than a small cache gives.
  assert 1e7 < bandwidth(nbytes=2**20, repeats=3) < 1e13


def test_results_are_written_over():
  x = jnp.arange(1000, dtype=jnp.float32)
  call = roofline.reusing(lambda x: 2 * x, x)
  first = call()
  np.testing.assert_array_equal(first, 2 * np.arange(1000))
  where = first.unsafe_buffer_pointer()
  second = call()
  assert first.is_deleted() and not x.is_deleted()
  assert second.unsafe_buffer_pointer() == where
  np.testing.assert_array_equal(second, 2 * np.arange(1000))


def test_every_round_runs_all_ways():
  ran = []

  def way(name, seconds):
    def call():
      ran.append(name)
      time.sleep(seconds)
      return {"a": jnp.zeros(1)}

    return call

  ways = {name: way(name, s) for name, s in [("a", 0.0), ("b", 0.01), ("c", 0)]}
  seconds = roofline.interleaved(ways, 8)
  assert seconds.keys() == ways.keys()
  assert all(len(taken) == 8 for taken in seconds.values())
  assert min(seconds["b"]) > 0.01
  rounds = [ran[i : i + 3] for i in range(0, 27, 3)]
  assert len(ran) == 27 and all(set(names) == set("abc") for names in rounds)
  assert len(set(map(tuple, rounds))) > 1
  ran.clear()
  roofline.interleaved(ways, 8)
  assert [ran[i : i + 3] for i in range(0, 27, 3)] == rounds


def test_results_are_waited_for():
  x = jnp.ones((300, 300))

  @jax.jit
  def slow(x):
    return jax.lax.fori_loop(0, 20, lambda _, y: x @ y / 300, x)

  slow(x).block_until_ready()
  start = time.perf_counter()
  slow(x).block_until_ready()
  alone = time.perf_counter() - start
  (taken,) = roofline.interleaved({"": lambda: slow(x)}, 1)[""]
  assert taken > alone / 20


def test_compile_time_is_apart_from_run_time():
  @jax.jit
  def inner(x):
    return jnp.sin(x)

  @jax.jit
  def fn(x):
    return inner(x) + jnp.cos(x)

  x = jnp.ones(7)

  def call():
    time.sleep(0.2)
    return fn(x)

  start = time.perf_counter()
  result, seconds = roofline.compile_seconds(call)
  assert 0 < seconds < time.perf_counter() - start - 0.2
  np.testing.assert_allclose(result, np.sin(1) + np.cos(1), rtol=1e-6)
  assert roofline.compile_seconds(call)[1] == 0


def test_leaves_are_sorted_by_kind():
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  params = {
      "embed": leaf(9, 4),
      "final_norm": leaf(4),
      "layers": {
          "attention": {"q": leaf(2, 9, 4), "o": leaf(2, 4, 4)},
          "mlp": {"down": leaf(2, 4, 4)},
          "mlp_norm": leaf(2, 4),
      },
  }
  kinds = roofline.leaf_kinds(params)
  assert kinds == {
      (False, (9, 4)): ["embed"],
      (False, (4,)): ["final_norm"],
      (True, (4, 4)): ["layers/attention/o", "layers/mlp/down"],
      (True, (9, 4)): ["layers/attention/q"],
      (True, (4,)): ["layers/mlp_norm"],
  }
  assert roofline.pick(params, kinds[True, (4, 4)]) == {
      "layers": {
          "attention": {"o": leaf(2, 4, 4)},
          "mlp": {"down": leaf(2, 4, 4)},
      }
  }
