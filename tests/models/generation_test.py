"""Generation with a KV cache against transformers and against full passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import models

_DECODER = models.DecoderConfig(
    vocab_size=61,
    embed=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    max_positions=64,
)
_LOCAL = {"window": 5, "local": (True, False)}
_GEMMA = {
    "activation": "gelu_tanh",
    "scaled_embedding": True,
    "unit_offset_norms": True,
    "post_norms": True,
    "tied_head": True,
    "query_scale": 7,
}
# What each family has beyond the others, and shapes of their own.
# What is theirs is in the fast ones, too.
_SLOW = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
_FAMILIES = {
    "mistral": {"kv_heads": 1, "window": 5, "local": (True, True)},
    "llama": {
        "kv_heads": 4,
        "head_dim": 12,
        "rope": models.Rope(1000.0, "llama3", 8.0, 1.0, 4.0, 32),
    },
    "qwen2": {"head_dim": 12, "qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 12, "tied_head": True} | _LOCAL,
    "gemma2": {
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "head_dim": 20,
    }
    | _GEMMA
    | _LOCAL,
    "gemma3_text": {
        "qk_norm": True,
        "kv_heads": 1,
        "head_dim": 20,
        "rope": models.Rope(1000.0, "linear", 8.0),
        "local_rope": models.Rope(100.0),
    }
    | _GEMMA
    | _LOCAL,
}
_EOS = 0
_NEW = 12
# Left-padded into one batch: prompts of 3, 7, 5 and 7 tokens.
_PROMPTS = [
    np.random.default_rng(i).integers(1, 61, n).tolist()
    for i, n in enumerate((3, 7, 5, 7))
]


@pytest.fixture(scope="module")
def params(random_params):
  """With an EOS that is likely enough to come up."""
  params = random_params(_DECODER)
  params["head"][_EOS] *= 1.5
  return params


def _keys(n):
  return jax.random.split(jax.random.key(7), n)


def _generate(params, prompts=_PROMPTS, keys=None, temperature=0.0, **options):
  tokens, mask = models.pad_left(prompts, 8)
  keys = _keys(len(prompts)) if keys is None else keys
  tokens, finished = models.generate(
      _DECODER,
      params,
      tokens,
      mask,
      keys,
      np.float32(temperature),
      **{"max_new_tokens": _NEW, "eos": (_EOS,)} | options,
  )
  return np.asarray(tokens), np.asarray(finished)


def _hf(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="eager"
  )


def _hf_generate(hf, prompt, new, eos):
  prompt = torch.tensor([prompt])
  hf.generation_config.eos_token_id = eos
  return hf.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=new,
      do_sample=False,
      pad_token_id=_EOS,
  )[0, prompt.shape[1] :].numpy()


def test_greedy_matches_transformers(params, tmp_path):
  convert.save(tmp_path / "model", _DECODER, params)
  hf = _hf(tmp_path / "model")
  tokens, finished = _generate(params)
  for prompt, row, done in zip(_PROMPTS, tokens, finished, strict=True):
    expected = _hf_generate(hf, prompt, _NEW, _EOS)
    np.testing.assert_array_equal(row[: len(expected)], expected)
    assert done == (_EOS in expected)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[pytest.mark.slow] if f in _SLOW else [])
        for f in _FAMILIES
    ],
)
def test_64_greedy_tokens_match_transformers(family, tmp_path, random_params):
  """Left-padded together here, each prompt alone there; no EOS."""
  config = dataclasses.replace(
      _DECODER, family=family, max_positions=128, **_FAMILIES[family]
  )
  params = random_params(config)
  # Blocks that outweigh the embedding, and attention that picks: else it
  # would write a token over and over.
  attention = params["layers"]["attention"]
  params["embed"] *= 0.1
  for matrix in (
      attention["q"],
      attention["o"],
      params["layers"]["mlp"]["down"],
  ):
    matrix *= 4
  convert.save(tmp_path / "model", config, params)
  hf = _hf(tmp_path / "model")
  prompts = _PROMPTS[:3]
  tokens, mask = models.pad_left(prompts, 8)
  tokens, finished = models.generate(
      config,
      params,
      tokens,
      mask,
      _keys(3),
      np.float32(0.0),
      max_new_tokens=64,
      eos=(-1,),
  )
  assert not np.any(finished)
  for prompt, row in zip(prompts, np.asarray(tokens), strict=True):
    expected = _hf_generate(hf, prompt, 64, None)
    np.testing.assert_array_equal(row, expected)
  assert len(np.unique(tokens)) >= 16


def test_any_of_several_tokens_ends_a_row(params):
  plain, _ = _generate(params)
  # A token after which a row went on.
  goes_on = (plain[:, :-1] != _EOS) & (plain[:, 1:] != _EOS)
  other = int(plain[:, :-1][goes_on][0])
  tokens, finished = _generate(params, eos=(_EOS, other))
  for row, before, done in zip(tokens, plain, finished, strict=True):
    ends = np.flatnonzero((before == _EOS) | (before == other))
    assert done == bool(len(ends))
    stop = ends[0] + 1 if done else _NEW
    np.testing.assert_array_equal(row[:stop], before[:stop])
    assert (row[stop:] == _EOS).all()


def test_left_padding_changes_nothing(params):
  tokens, finished = _generate(params)
  for i, prompt in enumerate(_PROMPTS):
    # As long as the batch's rows, but with no neighbour.
    alone, done = _generate(params, [prompt] * 4)
    np.testing.assert_array_equal(alone[0], tokens[i])
    assert done[0] == finished[i]


def test_a_row_depends_on_its_key_alone(params):
  tokens, _ = _generate(params, temperature=1.0)
  reverse, _ = _generate(
      params, _PROMPTS[::-1], _keys(4)[::-1], temperature=1.0
  )
  np.testing.assert_array_equal(tokens, reverse[::-1])
  again, _ = _generate(
      params, [_PROMPTS[0]] * 4, _keys(4)[jnp.array([0, 0, 1, 2])], 1.0
  )
  np.testing.assert_array_equal(again[0], tokens[0])
  np.testing.assert_array_equal(again[0], again[1])
  assert np.any(again[1] != again[2])


def test_shared_prompt_equals_repeated_prompt(params):
  tokens, mask = models.pad_left(_PROMPTS[1:2], 8)
  shared, _ = models.generate(
      _DECODER,
      params,
      tokens,
      mask,
      _keys(4),
      np.float32(1.0),
      max_new_tokens=_NEW,
      eos=(_EOS,),
  )
  repeated, _ = _generate(params, [_PROMPTS[1]] * 4, temperature=1.0)
  np.testing.assert_array_equal(shared, repeated)


def test_stops_at_eos(params):
  prompts = [
      np.random.default_rng(i).integers(1, 61, 5).tolist() for i in range(64)
  ]
  tokens, finished = _generate(params, prompts, temperature=1.5)
  assert 0 < finished.sum() < 64
  for row, done in zip(tokens, finished, strict=True):
    ends = np.flatnonzero(row == _EOS)
    assert done == bool(len(ends))
    if done:  # Nothing but EOS from the first one on.
      assert (row[ends[0] :] == _EOS).all()


@pytest.mark.slow
def test_temperature_samples_the_softmax(params):
  """The first token of 4,000 rows against its probabilities."""
  tokens, mask = models.pad_left(_PROMPTS[:1], 8)
  drawn, _ = models.generate(
      _DECODER,
      params,
      tokens,
      mask,
      _keys(4000),
      np.float32(1.3),
      max_new_tokens=1,
      eos=(_EOS,),
  )
  forward = jax.jit(models.forward, static_argnums=0)
  hidden = forward(_DECODER, params, np.array(_PROMPTS[:1], np.int32))
  logits = models.logits(_DECODER, params, hidden)[0, -1]
  expected = np.asarray(jax.nn.softmax(logits / 1.3))
  seen = np.bincount(np.asarray(drawn)[:, 0], minlength=61) / 4000
  # Five standard errors of the likeliest token.
  np.testing.assert_allclose(seen, expected, atol=5 * (0.25 / 4000) ** 0.5)


@pytest.mark.slow
def test_adapter_equals_merged_weights(params):
  rng = np.random.default_rng(5)
  up = params["layers"]["mlp"]["up"]
  a = rng.normal(size=(2, 3, 32)).astype(np.float32)
  b = 0.3 * rng.normal(size=(2, 48, 3)).astype(np.float32)
  lora = {"layers": {"mlp": {"up": {"a": a, "b": b}}}}
  mlp = params["layers"]["mlp"] | {"up": up + b @ a}
  merged = params | {"layers": params["layers"] | {"mlp": mlp}}
  one, _ = _generate(params, lora=lora)
  other, _ = _generate(merged)
  np.testing.assert_array_equal(one, other)
  assert np.any(one != _generate(params)[0])


@pytest.mark.parametrize("row", [[], [1] * 9])
def test_pad_left_refuses(row):
  with pytest.raises(ValueError, match=f"prompt 1 has {len(row)} tokens"):
    models.pad_left([[1], row], 8)
