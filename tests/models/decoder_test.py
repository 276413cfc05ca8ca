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
_KEYS = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
_LOCAL, _FULL = "sliding_attention", "full_attention"
# The shortest wavelength is kept, the second one blended, others divided.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# (model_type, keys of transformers' config, whether the test is a slow one).
# Windows are shorter than the rows, caps as low as the logits they cap, and
# head dimensions neither powers of two nor hidden size / heads.
_SHAPES = {
    "mistral": ("mistral", {"head_dim": 8, "sliding_window": 6}, False),
    "mistral_tied": (
        "mistral",
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        True,
    ),
    "llama": ("llama", {"head_dim": 12, "rope_parameters": _LLAMA3}, False),
    "llama_linear": (
        "llama",
        {
            "hidden_size": 36,
            "num_attention_heads": 6,
            "head_dim": 20,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 500.0,
                "factor": 4.0,
            },
        },
        True,
    ),
    "llama_multi_head": (
        "llama",
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-2},
        True,
    ),
    "qwen2": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        False,
    ),
    "qwen2_full": (
        "qwen2",
        {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 12},
        True,
    ),
    "qwen3": ("qwen3", {"head_dim": 12, "rms_norm_eps": 1e-2}, False),
    "qwen3_window": (
        "qwen3",
        {
            "num_key_value_heads": 1,
            "head_dim": 20,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": [_LOCAL, _FULL, _LOCAL],
        },
        True,
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 20,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        False,
    ),
    "gemma2_untied": (
        "gemma2",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "sliding_window": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
        True,
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_key_value_heads": 1,
            "head_dim": 20,
            "sliding_window": 6,
            "query_pre_attn_scalar": 11,
            "layer_types": [_LOCAL, _FULL, _LOCAL],
            "rope_parameters": {
                _FULL: {
                    "rope_type": "linear",
                    "rope_theta": 1000.0,
                    "factor": 8.0,
                },
                _LOCAL: {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        False,
    ),
    "gemma3_capped": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
        },
        True,
    ),
}
_CASES = [
    pytest.param(
        name, id=name, marks=[pytest.mark.slow] if _SHAPES[name][2] else []
    )
    for name in _SHAPES
]

_forward = jax.jit(models.forward, static_argnums=0, static_argnames="remat")


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_GROUPED)


def _tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 61, shape).astype(np.int32)


def _theirs(name, dtype=torch.float32):
  """transformers' model of a shape, with norms and biases that matter."""
  family, settings, _ = _SHAPES[name]
  config = transformers.AutoConfig.for_model(family, **_KEYS | settings)
  model = transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation="eager", dtype=dtype
  )
  rng = np.random.default_rng(0)
  middle = 0.0 if family.startswith("gemma") else 1.0
  for path, weight in model.named_parameters():
    if path.endswith("norm.weight"):
      value = rng.uniform(middle - 0.5, middle + 0.5, weight.shape)
    else:
      wide = "bias" in path or "embed" in path
      std = 0.5 if wide else weight.shape[-1] ** -0.5
      value = rng.normal(0.0, std, weight.shape)
    weight.data.copy_(torch.from_numpy(value))
  return model.eval()


def _their_logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens).long()).logits.float().numpy()


@pytest.mark.parametrize("name", _CASES)
def test_logits_match_transformers(name, tmp_path):
  """Of a directory that they wrote; and of ours, when they read it."""
  model = _theirs(name)
  model.save_pretrained(tmp_path / "theirs")
  tokens = _tokens(2, 24)
  expected = _their_logits(model, tokens)
  config, params = convert.load(tmp_path / "theirs")
  got = models.logits(config, params, _forward(config, params, tokens))
  # Both sides in float32; these logits are of size 10 at most.
  np.testing.assert_allclose(got, expected, atol=5e-5, rtol=0)

  convert.save(tmp_path / "ours", config, params)
  back = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
  )
  np.testing.assert_array_equal(_their_logits(back, tokens), expected)


def test_bfloat16_is_close_to_transformers(tmp_path):
  """The family that casts in most places."""
  model = _theirs("gemma2", torch.bfloat16)
  model.save_pretrained(tmp_path / "theirs")
  tokens = _tokens(2, 24)
  config, params = convert.load(tmp_path / "theirs")
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
      jnp.dtype(jnp.bfloat16)
  }
  got = models.logits(config, params, _forward(config, params, tokens))
  assert got.dtype == jnp.bfloat16
  got = np.asarray(got, np.float32)
  expected = _their_logits(model, tokens)
  exact = _their_logits(model.float(), tokens)
  # Logits of size 3, where bfloat16 has steps of 1/64.
  np.testing.assert_allclose(got, expected, atol=0.25, rtol=0)
  ours, theirs = (np.abs(x - exact).mean() for x in (got, expected))
  assert ours < 1.25 * theirs


def test_norms_of_another_dtype_are_cast(params):
  """Merged QLoRA fine-tunes come with float32 norms among bfloat16 matrices."""
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  mixed = jax.tree_util.tree_map_with_path(
      lambda path, x: x.astype(jnp.float32) if "norm" in path[-1].key else x,
      narrow,
  )
  tokens = _tokens(2, 8)
  hidden = _forward(_GROUPED, mixed, tokens)
  assert hidden.dtype == jnp.bfloat16
  np.testing.assert_array_equal(hidden, _forward(_GROUPED, narrow, tokens))


@pytest.mark.parametrize("head_dim", [12, 20, 128])
@pytest.mark.parametrize("theta", [500.0, 1e4, 1e6])
def test_rope_frequencies_are_those_of_transformers(theta, head_dim):
  ropes = {
      "default": (models.Rope(theta), {}),
      "linear": (models.Rope(theta, "linear", 8.0), {"factor": 8.0}),
      "llama3": (
          models.Rope(theta, "llama3", 8.0, 1.0, 4.0, 32),
          _LLAMA3 | {"rope_theta": theta},
      ),
  }
  for scaling, (rope, keys) in ropes.items():
    parameters = {"rope_theta": theta, "rope_type": scaling} | keys
    config = transformers.LlamaConfig(
        head_dim=head_dim, rope_parameters=parameters
    )
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        config
    ).inv_freq.numpy()
    got = rope.frequencies(head_dim)
    assert got.dtype == np.float32
    np.testing.assert_array_max_ulp(got, expected, maxulp=1)


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
  full = dataclasses.replace(
      c, tied_head=True, qkv_bias=True, qk_norm=True, post_norms=True
  )
  shapes = jax.tree.map(lambda x: x.shape, models.abstract_params(full))
  assert "head" not in shapes
  layers = shapes["layers"]
  assert layers["attention_post_norm"] == layers["mlp_post_norm"] == (2, 32)
  attention = layers["attention"]
  assert attention["q_norm"] == attention["k_norm"] == (2, 8)
  assert attention["q_bias"] == (2, 32)
  assert attention["k_bias"] == attention["v_bias"] == (2, 16)


def test_init_is_seeded():
  one, same, other = (models.init_params(_GROUPED, s) for s in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  assert np.any(one["embed"] != other["embed"])
  gate = np.asarray(one["layers"]["mlp"]["gate"])
  assert np.any(gate[0] != gate[1])  # Each layer draws its own.


@pytest.mark.parametrize("local", [(), (True, False)])
def test_packed_segments_equal_separate_rows(local, params):
  """The second document starts within a window of the first one's end."""
  config = _GROUPED
  if local:
    config = dataclasses.replace(_GROUPED, window=4, local=local)
  first, second = _tokens(1, 10), _tokens(1, 7, seed=1)
  packed = np.concatenate([first, second, _tokens(1, 3, seed=2)], axis=1)
  segments = np.array([[1] * 10 + [2] * 7 + [0] * 3], np.int32)
  positions = np.array([[*range(10), *range(7), *range(3)]], np.int32)
  hidden = _forward(config, params, packed, segments, positions)
  # One shape for both documents; the filler comes after them.
  alone = _forward(config, params, np.pad(first, ((0, 0), (0, 2))))
  other = _forward(config, params, np.pad(second, ((0, 0), (0, 5))))
  # Sums over other numbers of zeros.
  np.testing.assert_allclose(hidden[:, :10], alone[:, :10], atol=1e-5)
  np.testing.assert_allclose(hidden[:, 10:17], other[:, :7], atol=1e-5)


def test_a_window_hides_what_is_before_it(params):
  config = dataclasses.replace(_GROUPED, layers=1, window=4, local=(True,))
  params = params | {
      "layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])
  }
  tokens = _tokens(1, 12)
  other = tokens.copy()
  other[0, 3] = (other[0, 3] + 1) % 61
  one, two = (_forward(config, params, x) for x in (tokens, other))
  changed = np.any(one != two, axis=-1)[0]
  assert np.flatnonzero(changed).tolist() == [3, 4, 5, 6]


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


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_has_the_same_gradient(params, remat):
  tokens = _tokens(2, 12)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(remat, params):

    def loss(p):
      return jnp.sum(models.forward(_GROUPED, p, tokens, remat=remat) ** 2)

    return jax.grad(loss)(params)

  one, other = (gradient(remat, params) for remat in (None, remat))
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
