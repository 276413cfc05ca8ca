"""Log-probabilities and adapters against transformers and PEFT."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax.dpo import logps as logps_lib
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
_RANK, _ALPHA = 4, 6.0

_completion_logps = jax.jit(logps_lib.completion_logps, static_argnums=0)
_forward = jax.jit(models.forward, static_argnums=0)


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, params) -> pathlib.Path:
  path = tmp_path_factory.mktemp("logps") / "model"
  convert.save(path, _DECODER, params)
  return path


@pytest.fixture(scope="module")
def adapter():
  """Both factors non-zero."""
  return jax.tree.map(
      lambda x: x
      + 0.05
      * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
      lora.init(jax.random.key(1), _DECODER, _RANK),
  )


def _rows():
  """Right-padded rows of 20, 13 and 9 tokens; padded with the EOS, 0."""
  rng = np.random.default_rng(0)
  tokens = np.zeros((3, 20), np.int32)
  is_completion = np.zeros((3, 20), bool)
  for i, (prompt, end) in enumerate(((5, 20), (6, 13), (1, 9))):
    tokens[i, : end - 1] = rng.integers(1, 61, end - 1)
    is_completion[i, prompt:end] = True  # The last of them is the EOS.
  return tokens, is_completion


def _torch_logps(model, tokens, is_completion):
  with torch.no_grad():
    out = model(torch.tensor(tokens, dtype=torch.long)).logits.double()
  logps = torch.log_softmax(out[:, :-1], dim=-1)
  targets = torch.tensor(tokens[:, 1:], dtype=torch.long)
  picked = logps.gather(-1, targets[..., None])[..., 0].numpy()
  return (picked * is_completion[:, 1:]).sum(axis=1)


def _load(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32
  )


def test_matches_transformers(params, directory):
  tokens, is_completion = _rows()
  sums, counts = _completion_logps(
      _DECODER, params, None, tokens, is_completion
  )
  expected = _torch_logps(_load(directory), tokens, is_completion)
  assert sums.dtype == jnp.float32
  # Logits agree to 5e-5 (float32 on both sides); these are sums of 15.
  np.testing.assert_allclose(sums, expected, atol=1e-4)
  np.testing.assert_array_equal(counts, [15, 7, 8])


def test_the_eos_counts_where_it_is_the_padding_too(params):
  tokens, is_completion = _rows()
  sums, _ = _completion_logps(_DECODER, params, None, tokens, is_completion)
  without = is_completion & (tokens != 0)  # What `ids != pad` would count.
  fewer, counts = _completion_logps(_DECODER, params, None, tokens, without)
  np.testing.assert_array_equal(counts, [14, 6, 7])
  assert (np.asarray(sums) < np.asarray(fewer)).all()


def test_padding_changes_nothing(params):
  tokens, is_completion = _rows()

  def logps(*rows):
    return _completion_logps(_DECODER, params, None, *rows)[0]

  padded = np.where(is_completion | (tokens > 0), tokens, 17)
  np.testing.assert_array_equal(
      logps(tokens, is_completion), logps(padded, is_completion)
  )
  np.testing.assert_allclose(
      logps(tokens[1:2, :13], is_completion[1:2, :13]),
      logps(tokens, is_completion)[1:2],
      rtol=1e-6,
  )


@pytest.mark.slow
def test_bfloat16_logits_lose_little(params):
  """The same bf16 hidden states, the logsumexp in float64."""
  tokens, is_completion = _rows()
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  sums, _ = _completion_logps(_DECODER, narrow, None, tokens, is_completion)
  hidden = _forward(_DECODER, narrow, tokens)
  out = np.asarray(models.logits(_DECODER, narrow, hidden[:, :-1]))
  out = out.astype(np.float64)
  picked = np.take_along_axis(out, tokens[:, 1:, None], axis=-1)[..., 0]
  logps = picked - np.log(np.exp(out).sum(axis=-1))
  expected = (logps * is_completion[:, 1:]).sum(axis=1)
  assert sums.dtype == jnp.float32
  np.testing.assert_allclose(sums, expected, atol=1e-2)


def test_fresh_adapter_is_the_identity(params):
  tokens, is_completion = _rows()
  fresh = lora.init(jax.random.key(0), _DECODER, _RANK)
  fresh = models.scale_adapter(fresh, _ALPHA / _RANK)
  np.testing.assert_array_equal(
      *(
          _completion_logps(_DECODER, params, adapter, tokens, is_completion)[0]
          for adapter in (None, fresh)
      )
  )


@pytest.mark.slow
def test_init_is_pefts():
  """Shapes, dtypes and the uniform bound 1/sqrt(in)."""
  fresh = lora.init(jax.random.key(0), _DECODER, 64)
  matrices = fresh["layers"]["attention"] | fresh["layers"]["mlp"]
  assert set(matrices) == {"q", "k", "v", "o", "gate", "up", "down"}

  def shape(x):
    return x.shape, str(x.dtype)

  assert shape(matrices["down"]["a"]) == ((3, 64, 48), "float32")
  assert shape(matrices["down"]["b"]) == ((3, 32, 64), "float32")
  assert shape(matrices["k"]["b"]) == ((3, 16, 64), "float32")
  for factors in matrices.values():
    bound = factors["a"].shape[2] ** -0.5
    assert 0.98 * bound < np.abs(factors["a"]).max() <= bound
    assert not np.any(factors["b"])
  # Every matrix and layer draws its own.
  assert np.any(matrices["gate"]["a"] != matrices["up"]["a"])
  assert np.any(matrices["q"]["a"][0] != matrices["q"]["a"][1])


def test_adapter_equals_merged_weights(params, adapter):
  tokens, _ = _rows()
  scaled = models.scale_adapter(adapter, _ALPHA / _RANK)
  layers = dict(params["layers"])
  for group, matrices in adapter["layers"].items():
    layers[group] = {
        name: params["layers"][group][name]
        + _ALPHA / _RANK * np.asarray(ab["b"]) @ np.asarray(ab["a"])
        for name, ab in matrices.items()
    }
  np.testing.assert_allclose(
      _forward(_DECODER, params, tokens, lora=scaled),
      _forward(_DECODER, params | {"layers": layers}, tokens),
      atol=2e-5,  # Float32, other orders of summation.
  )


# PEFT 0.21 asks for a property that transformers 5.23 renamed.
def test_peft_loads_the_adapter(params, adapter, directory, tmp_path):
  tokens, _ = _rows()
  convert.save_adapter(
      tmp_path / "adapter",
      adapter,
      config=_DECODER,
      rank=_RANK,
      alpha=_ALPHA,
      base=str(directory),
  )
  base = _load(directory)
  model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
  scaled = models.scale_adapter(adapter, _ALPHA / _RANK)
  hidden = _forward(_DECODER, params, tokens, lora=scaled)
  with torch.no_grad():
    expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(
      models.logits(_DECODER, params, hidden), expected, atol=5e-5
  )
  # The adapter does something.
  plain = _forward(_DECODER, params, tokens)
  assert np.abs(np.asarray(hidden) - np.asarray(plain)).max() > 0.1
  loaded = convert.load_adapter(tmp_path / "adapter", _DECODER)
  assert loaded.scale == _ALPHA / _RANK
  jax.tree.map(np.testing.assert_array_equal, loaded.params, adapter)
