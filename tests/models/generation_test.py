"""Generation with a KV cache against transformers and against full passes."""

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
      **{"max_new_tokens": _NEW, "eos": _EOS} | options,
  )
  return np.asarray(tokens), np.asarray(finished)


def test_greedy_matches_transformers(params, tmp_path):
  convert.save(tmp_path / "model", _DECODER, params)
  hf = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "model", dtype=torch.float32
  )
  tokens, finished = _generate(params)
  for prompt, row, done in zip(_PROMPTS, tokens, finished, strict=True):
    prompt = torch.tensor([prompt])
    expected = hf.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_NEW,
        do_sample=False,
        eos_token_id=_EOS,
        pad_token_id=_EOS,
    )[0, prompt.shape[1] :].numpy()
    np.testing.assert_array_equal(row[: len(expected)], expected)
    assert done == (_EOS in expected)


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
      eos=_EOS,
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
      eos=_EOS,
  )
  forward = jax.jit(models.forward, static_argnums=0)
  hidden = forward(_DECODER, params, np.array(_PROMPTS[:1], np.int32))
  logits = models.logits(_DECODER, params, hidden)[0, -1]
  expected = np.asarray(jax.nn.softmax(logits / 1.3))
  seen = np.bincount(np.asarray(drawn)[:, 0], minlength=61) / 4000
  # Five standard errors of the likeliest token.
  np.testing.assert_allclose(seen, expected, atol=5 * (0.25 / 4000) ** 0.5)


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
