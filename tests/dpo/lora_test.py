"""Adapters: their scale, how they begin, and how they are cut."""

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from selfdev_jax import models
from selfdev_jax.dpo import lora

_DECODER = models.DecoderConfig(
    vocab_size=61,
    embed=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    max_positions=64,
)
_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def _matrices(adapter):
  assert set(adapter) == {"layers"}
  matrices: dict = {}
  for group in adapter["layers"].values():
    matrices |= group
  return matrices


def test_scale():
  assert lora.scale(16, 32.0, rslora=False) == 2.0
  assert lora.scale(16, 32.0, rslora=True) == 8.0
  assert lora.scale(1, 3.0, rslora=True) == lora.scale(1, 3.0, rslora=False)


@pytest.mark.slow
def test_init_is_pefts():
  """Shapes, dtypes and the uniform bound 1/sqrt(in)."""
  rank = 64
  fresh = lora.init(jax.random.key(0), _DECODER, rank)
  assert set(fresh["layers"]["mlp"]) == {"gate", "up", "down"}
  matrices = _matrices(fresh)
  assert set(matrices) == set(_TARGETS)
  # (out, in) of each.
  for name, (outputs, inputs) in {
      "q": (32, 32),
      "k": (16, 32),
      "v": (16, 32),
      "o": (32, 32),
      "gate": (48, 32),
      "up": (48, 32),
      "down": (32, 48),
  }.items():
    a, b = matrices[name]["a"], matrices[name]["b"]
    assert a.shape == (3, rank, inputs) and a.dtype == np.float32
    assert b.shape == (3, outputs, rank) and b.dtype == np.float32
    bound = inputs**-0.5
    assert 0.98 * bound < np.abs(a).max() <= bound
    assert 0.95 * bound / 3**0.5 < np.std(a) < 1.05 * bound / 3**0.5
    assert not np.any(b)
  # Every matrix and layer draws its own.
  assert np.any(matrices["gate"]["a"] != matrices["up"]["a"])
  assert np.any(matrices["q"]["a"][0] != matrices["q"]["a"][1])


def test_init_is_a_function_of_the_key():
  one, same, other = (
      lora.init(jax.random.key(key), _DECODER, 4, ["v"]) for key in (0, 0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, one, same)
  a = lambda adapter: _matrices(adapter)["v"]["a"]
  assert np.any(a(one) != a(other))


@pytest.mark.parametrize("targets", [("q",), ("down",), ("v", "q", "up")])
def test_only_the_targets_get_one(targets):
  fresh = jax.eval_shape(
      lambda: lora.init(jax.random.key(0), _DECODER, 4, targets)
  )
  assert set(_matrices(fresh)) == set(targets)
  groups = {"attention", "mlp"} & set(fresh["layers"])
  assert all(fresh["layers"][group] for group in groups)
  assert ("mlp" in groups) == any(name in ("up", "down") for name in targets)


def test_an_unknown_target():
  with pytest.raises(KeyError):
    lora.init(jax.random.key(0), _DECODER, 4, ["q", "lm_head"])


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh(
      (4, 2),
      ("fsdp", "tensor"),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def _specs(adapter, mesh):
  placed = models.adapter_shardings(_DECODER, adapter, mesh)
  return _matrices(jax.tree.map(lambda x: x.spec, placed))


def test_factors_are_cut_as_their_matrix_is(mesh):
  adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), _DECODER, 4))
  # The rank is never cut, though 4 and 2 divide it.
  by_output = {"a": P(None, None, "fsdp"), "b": P(None, "tensor", None)}
  by_input = {"a": P(None, None, "tensor"), "b": P(None, "fsdp", None)}
  assert _specs(adapter, mesh) == {
      **dict.fromkeys(("q", "k", "v", "gate", "up"), by_output),
      **dict.fromkeys(("o", "down"), by_input),
  }
  weights = models.shardings(_DECODER, mesh)["layers"]
  for group, matrices in models.adapter_shardings(_DECODER, adapter, mesh)[
      "layers"
  ].items():
    for name, factors in matrices.items():
      _, outputs, inputs = weights[group][name].spec
      assert factors["a"].spec[2] == inputs
      assert factors["b"].spec[1] == outputs


def test_what_an_axis_does_not_divide_is_whole(mesh):
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
  adapter = {
      "layers": {
          "attention": {"q": {"a": shape(4, 8, 30), "b": shape(4, 32, 8)}},
          "mlp": {"down": {"a": shape(4, 8, 48), "b": shape(4, 30, 8)}},
      }
  }
  assert _specs(adapter, mesh) == {
      "q": {"a": P(None, None, None), "b": P(None, "tensor", None)},
      "down": {"a": P(None, None, "tensor"), "b": P(None, None, None)},
  }
  placed = jax.device_put(
      jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), adapter),
      models.adapter_shardings(_DECODER, adapter, mesh),
  )
  b = placed["layers"]["attention"]["q"]["b"]
  assert b.addressable_shards[0].data.shape == (4, 16, 8)


def test_axes_that_the_mesh_lacks():
  mesh = jax.make_mesh(
      (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), _DECODER, 4))
  for factors in _specs(adapter, mesh).values():
    assert factors == {"a": P(None, None, None), "b": P(None, None, None)}
