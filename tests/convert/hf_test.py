"""Model directories: bitwise round trips, and one line for what is wrong."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models

_DECODER = models.DecoderConfig(
    vocab_size=37,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    rope_theta=5e5,
    norm_eps=1e-6,
    max_positions=128,
)
_UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture
def directory(tmp_path, params) -> pathlib.Path:
  convert.save(tmp_path / "model", _DECODER, params)
  return tmp_path / "model"


def _cast(params, dtype):
  return jax.tree.map(lambda x: np.asarray(x, dtype), params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bitwise(tmp_path, params, dtype, tied):
  config = models.DecoderConfig(**{**_DECODER.__dict__, "tied_head": tied})
  narrow = _cast(params, dtype)
  if tied:
    del narrow["head"]
  convert.save(tmp_path / "model", config, narrow)
  loaded_config, loaded = convert.load(tmp_path / "model")
  assert loaded_config == config == convert.read_config(tmp_path / "model")
  assert jax.tree.structure(loaded) == jax.tree.structure(narrow)

  def check(x, y):
    assert isinstance(y, np.ndarray) and x.dtype == y.dtype
    assert x.tobytes() == y.tobytes()

  jax.tree.map(check, narrow, loaded)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_reads_what_transformers_writes(tmp_path):
  hf = transformers.MistralForCausalLM(
      transformers.MistralConfig(
          vocab_size=37,
          hidden_size=16,
          intermediate_size=24,
          num_hidden_layers=2,
          num_attention_heads=4,
          num_key_value_heads=2,
          max_position_embeddings=128,
          rope_parameters={"rope_type": "default", "rope_theta": 5e5},
          sliding_window=None,
      )
  )
  hf.save_pretrained(tmp_path / "model")
  config, params = convert.load(tmp_path / "model")
  assert config == _DECODER
  tokens = np.arange(12, dtype=np.int32)[None]
  hidden = jax.jit(models.forward, static_argnums=0)(config, params, tokens)
  with torch.no_grad():
    expected = hf(torch.tensor(tokens).long()).logits.numpy()
  np.testing.assert_allclose(
      models.logits(config, params, hidden), expected, atol=5e-5
  )


def test_save_replaces_and_copies_the_tokenizer(directory, params, tmp_path):
  (directory / "stale").write_text("x")
  tokenizer = tmp_path / "tokenizer"
  tokenizer.mkdir()
  (tokenizer / "tokenizer.json").write_text("{}")
  (tokenizer / "other.bin").write_text("x")
  convert.save(directory, _DECODER, params, tokenizer)
  assert sorted(p.name for p in directory.iterdir()) == [
      "config.json",
      "model.safetensors",
      "tokenizer.json",
  ]


def test_digest(directory, params, tmp_path):
  convert.save(tmp_path / "same", _DECODER, params)
  convert.save(tmp_path / "other", _DECODER, _cast(params, np.float16))
  digests = [
      convert.digest(path)
      for path in (directory, tmp_path / "same", tmp_path / "other")
  ]
  assert digests[0] == digests[1] != digests[2]


def _edit_tensors(directory, edit):
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def _edit_config(directory, **changes):
  path = directory / "config.json"
  hf = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in hf.items() if v is not ...}))


def _replace(name, value):
  return lambda directory: _edit_tensors(
      directory, lambda tensors: tensors.update({name: value})
  )


_DAMAGE = {
    "missing tensor": (
        lambda d: _edit_tensors(d, lambda tensors: tensors.pop(_UP)),
        f"lacks tensor {_UP}",
    ),
    "unknown tensor": (
        _replace("model.extra.weight", np.zeros(3, np.float32)),
        "unknown tensor model.extra.weight",
    ),
    "other shape": (
        _replace(_UP, np.zeros((24, 17), np.float32)),
        f"{_UP} has shape .*24, 17.* asks for .*24, 16",
    ),
    "other number of dimensions": (
        _replace(_UP, np.zeros(24, np.float32)),
        f"{_UP} has shape",
    ),
    "a layer of another dtype": (
        _replace(_UP, np.zeros((24, 16), np.float16)),
        f"{_UP} .*float16.*float32",
    ),
    "integers": (
        _replace(_UP, np.zeros((24, 16), np.int32)),
        f"{_UP} .*int32",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "lacks model.safetensors",
    ),
    "cut weights": (
        lambda d: (d / "model.safetensors").write_bytes(b"12345678"),
        "model.safetensors cannot be read",
    ),
    "no config": (
        lambda d: (d / "config.json").unlink(),
        "is no Hugging Face model directory: config.json is missing",
    ),
    "config is no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        "config.json cannot be read",
    ),
    "config is no object": (
        lambda d: (d / "config.json").write_text("[]"),
        "config.json",
    ),
    "other model_type": (
        lambda d: _edit_config(d, model_type="gpt2"),
        "model_type 'gpt2'; supported: 'mistral'",
    ),
    "config lacks a key": (
        lambda d: _edit_config(d, intermediate_size=...),
        "config.json lacks 'intermediate_size'",
    ),
    "sliding window": (
        lambda d: _edit_config(d, sliding_window=8),
        "sliding window of 8",
    ),
    "scaled rope": (
        lambda d: _edit_config(
            d, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}
        ),
        "rope.*'yarn'",
    ),
    "other activation": (
        lambda d: _edit_config(d, hidden_act="gelu"),
        "hidden_act.*'gelu'",
    ),
}


@pytest.mark.parametrize("name", _DAMAGE)
def test_damage_is_named_in_one_line(name, directory):
  damage, message = _DAMAGE[name]
  damage(directory)
  with pytest.raises(convert.ConvertError, match=message) as caught:
    convert.load(directory)
  text = str(caught.value)
  assert "\n" not in text and str(directory) in text
  assert isinstance(caught.value, errors.UserError)


def test_missing_directory(tmp_path):
  for read in (convert.load, convert.read_config):
    with pytest.raises(convert.ConvertError, match="nowhere"):
      read(tmp_path / "nowhere")


def test_tokenizer_is_missing(directory):
  with pytest.raises(convert.ConvertError, match="tokenizer") as caught:
    convert.load_tokenizer(directory)
  assert "\n" not in str(caught.value)
  with pytest.raises(convert.ConvertError, match="nowhere"):
    convert.load_tokenizer(directory / "nowhere")


# Adapters. What PEFT makes of them is tested in tests/dpo/logps_test.py.


def _adapter(rank=3):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
      "layers": {
          "attention": {"q": {"a": draw(2, rank, 16), "b": draw(2, 16, rank)}},
          "mlp": {"down": {"a": draw(2, rank, 24), "b": draw(2, 16, rank)}},
      }
  }


@pytest.fixture
def adapter_directory(tmp_path) -> pathlib.Path:
  convert.save_adapter(
      tmp_path / "adapter", _adapter(), rank=3, alpha=6.0, base="base"
  )
  return tmp_path / "adapter"


def test_adapter_round_trip_is_bitwise(adapter_directory):
  loaded = convert.load_adapter(adapter_directory, _DECODER)
  assert jax.tree.structure(loaded) == jax.tree.structure(_adapter())
  jax.tree.map(np.testing.assert_array_equal, loaded, _adapter())
  settings = json.loads((adapter_directory / "adapter_config.json").read_text())
  assert settings["target_modules"] == ["down_proj", "q_proj"]
  assert (settings["r"], settings["lora_alpha"]) == (3, 6.0)


@pytest.mark.parametrize("change", ["missing", "unknown", "none", "cut"])
def test_damaged_adapter(adapter_directory, change):
  path = adapter_directory / "adapter_model.safetensors"
  name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
  tensors = safetensors.numpy.load_file(path)
  if change == "missing":
    del tensors[name]
  elif change == "unknown":
    tensors["extra"] = np.zeros(2, np.float32)
  safetensors.numpy.save_file(tensors, path)
  if change == "none":
    path.unlink()
  elif change == "cut":
    path.write_bytes(b"123")
  expected = {"missing": name, "unknown": "extra"}.get(change, str(path))
  with pytest.raises(convert.ConvertError, match=expected) as caught:
    convert.load_adapter(adapter_directory, _DECODER)
  assert "\n" not in str(caught.value)


def test_transformers_stops_where_the_tokenizer_ends_a_text(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  (source / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 9}')
  (source / "generation_config.json").write_text('{"eos_token_id": 5}')
  config = models.DecoderConfig(16, 8, 1, 2, 1, 4, 12)
  params = models.init_params(config, 0)
  convert.save(tmp_path / "out", config, params, tokenizer=source)
  loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  # As in the source: generation_config.json decides over config.json.
  assert loaded.generation_config.eos_token_id == 5
  assert loaded.config.bos_token_id == 7
