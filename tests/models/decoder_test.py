"""The decoder against transformers, and against itself laid out otherwise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import models

_GROUPED = models.DecoderConfig(
    vocab_size=61,
    embed=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    max_positions=64,
)
_VARIANTS = {
    "grouped": _GROUPED,
    "multi_head": dataclasses.replace(_GROUPED, kv_heads=4),
    "tied_wide_heads": dataclasses.replace(
        _GROUPED,
        kv_heads=1,
        head_dim=16,
        tied_head=True,
        rope_theta=1e6,
        norm_eps=1e-3,
    ),
}

_forward = jax.jit(models.forward, static_argnums=0, static_argnames="remat")


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_GROUPED)


def _tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 61, shape).astype(np.int32)


def _hf(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32
  )


@pytest.mark.parametrize("name", _VARIANTS)
def test_logits_match_transformers(name, tmp_path, random_params):
  config = _VARIANTS[name]
  weights = random_params(config)
  convert.save(tmp_path / "model", config, weights)
  tokens = _tokens(2, 24)
  hidden = _forward(config, weights, tokens)
  got = models.logits(config, weights, hidden)
  with torch.no_grad():
    expected = _hf(tmp_path / "model")(torch.tensor(tokens).long()).logits
  # Both sides in float32; these logits are of size 10 at most.
  np.testing.assert_allclose(got, expected.numpy(), atol=5e-5)


def test_params_are_as_documented(params):
  c = _GROUPED
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == {
      "embed": (61, 32),
      "final_norm": (32,),
      "head": (61, 32),
      "layers": {
          "attention_norm": (2, 32),
          "mlp_norm": (2, 32),
          "attention": {
              "q": (2, 32, 32),
              "k": (2, 16, 32),
              "v": (2, 16, 32),
              "o": (2, 32, 32),
          },
          "mlp": {"gate": (2, 48, 32), "up": (2, 48, 32), "down": (2, 32, 48)},
      },
  }
  abstract = models.abstract_params(c)
  assert jax.tree.map(lambda x: x.shape, abstract) == shapes
  assert "head" not in models.abstract_params(_VARIANTS["tied_wide_heads"])


def test_init_is_seeded():
  one, same, other = (models.init_params(_GROUPED, s) for s in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  assert np.any(one["embed"] != other["embed"])
  gate = np.asarray(one["layers"]["mlp"]["gate"])
  assert np.any(gate[0] != gate[1])  # Each layer draws its own.


def test_packed_segments_equal_separate_rows(params):
  first, second = _tokens(1, 10), _tokens(1, 7, seed=1)
  packed = np.concatenate([first, second, _tokens(1, 3, seed=2)], axis=1)
  segments = np.array([[1] * 10 + [2] * 7 + [0] * 3], np.int32)
  positions = np.array([[*range(10), *range(7), *range(3)]], np.int32)
  hidden = _forward(_GROUPED, params, packed, segments, positions)
  for rows, got in ((first, hidden[:, :10]), (second, hidden[:, 10:17])):
    # Sums over other numbers of zeros.
    np.testing.assert_allclose(got, _forward(_GROUPED, params, rows), atol=1e-5)


def test_a_later_token_changes_nothing_before_it(params):
  tokens = _tokens(1, 12)
  other = tokens.copy()
  other[0, 8] = (other[0, 8] + 1) % 61
  one, two = (_forward(_GROUPED, params, x) for x in (tokens, other))
  np.testing.assert_array_equal(one[:, :8], two[:, :8])
  assert np.all(np.abs(one[:, 8:] - two[:, 8:]).max(axis=-1) > 1e-4)


def test_causal_mask():
  mask = models.causal_mask(np.array([[1, 1, 2, 0]], np.int32))
  expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
  assert mask.shape == (1, 1, 4, 4)
  np.testing.assert_array_equal(mask[0, 0], np.array(expected, bool))


def test_remat_has_the_same_gradient(params):
  tokens = _tokens(2, 12)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(remat, params):

    def loss(p):
      return jnp.sum(models.forward(_GROUPED, p, tokens, remat=remat) ** 2)

    return jax.grad(loss)(params)

  one, other = (gradient(remat, params) for remat in (False, True))
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(
          x, y, rtol=1e-4, atol=1e-5 * np.abs(x).max()
      ),
      one,
      other,
  )
  # Every parameter gets some, the head excepted: no logits here.
  zero = [
      jax.tree_util.keystr(path)
      for path, leaf in jax.tree_util.tree_leaves_with_path(one)
      if not np.any(leaf)
  ]
  assert zero == ["['head']"]
