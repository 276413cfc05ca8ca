"""Parameters cut along a mesh."""

import dataclasses

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from selfdev_jax import models

_DECODER = models.DecoderConfig(
    vocab_size=62,
    embed=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp=40,
    family="gemma2",
    unit_offset_norms=True,
    post_norms=True,
    qkv_bias=True,
    qk_norm=True,
    activation="gelu_tanh",
    attention_softcap=2.0,
    window=5,
    local=(True, False),
)


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh(
      (4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2
  )


def _specs(config, mesh):
  return jax.tree.map(lambda x: x.spec, models.shardings(config, mesh))


def test_specs(mesh):
  assert _specs(_DECODER, mesh) == {
      "embed": P("tensor", None),
      "head": P("tensor", "fsdp"),
      "final_norm": P(None),
      "layers": {
          "attention_norm": P(None, None),
          "attention_post_norm": P(None, None),
          "mlp_norm": P(None, None),
          "mlp_post_norm": P(None, None),
          "attention": {
              "q": P(None, "tensor", "fsdp"),
              "k": P(None, "tensor", "fsdp"),
              "v": P(None, "tensor", "fsdp"),
              "o": P(None, "fsdp", "tensor"),
              "q_bias": P(None, "tensor"),
              "k_bias": P(None, "tensor"),
              "v_bias": P(None, "tensor"),
              "q_norm": P(None, None),
              "k_norm": P(None, None),
          },
          "mlp": {
              "gate": P(None, "tensor", "fsdp"),
              "up": P(None, "tensor", "fsdp"),
              "down": P(None, "fsdp", "tensor"),
          },
      },
  }
  tied = dataclasses.replace(_DECODER, tied_head=True)
  assert "head" not in _specs(tied, mesh)


def test_what_an_axis_does_not_divide_is_replicated(mesh):
  odd = dataclasses.replace(_DECODER, vocab_size=61, embed=30, mlp=39)
  specs = _specs(odd, mesh)
  assert specs["embed"] == P(None, None)
  assert specs["head"] == P(None, None)
  # 30 is no multiple of 4, 39 none of 2; the heads still are.
  assert specs["layers"]["attention"]["q"] == P(None, "tensor", None)
  assert specs["layers"]["attention"]["o"] == P(None, None, "tensor")
  assert specs["layers"]["mlp"]["gate"] == P(None, None, None)


@pytest.mark.parametrize("axis", ["fsdp", "tensor", "data"])
def test_a_mesh_may_lack_axes(axis):
  mesh = jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,))
  keep = lambda name: name if name == axis else None
  q = _specs(_DECODER, mesh)["layers"]["attention"]["q"]
  assert q == P(None, keep("tensor"), keep("fsdp"))


def test_the_forward_pass_is_the_same(mesh, random_params):
  params = random_params(_DECODER)
  tokens = np.random.default_rng(0).integers(0, 62, (8, 12)).astype(np.int32)

  @jax.jit
  def run(params, tokens):
    hidden = models.forward(_DECODER, params, tokens)
    return models.logits(_DECODER, params, hidden)

  expected = run(params, tokens)
  sharded = jax.device_put(params, models.shardings(_DECODER, mesh))
  q = sharded["layers"]["attention"]["q"]
  assert q.addressable_shards[0].data.shape == (2, 12, 8)
  rows = jax.device_put(tokens, NamedSharding(mesh, P("fsdp", None)))
  got = run(sharded, rows)
  assert len(got.sharding.device_set) == 8
  # Sums in another order.
  np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)
