"""LoRA adapters: PEFT reads ours, we read PEFT's, and all agree."""

import json
import pathlib

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import models

_MISTRAL = models.DecoderConfig(
    vocab_size=37,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    max_positions=128,
)
_GEMMA = models.DecoderConfig(
    vocab_size=37,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp=24,
    family="gemma2",
    activation="gelu_tanh",
    scaled_embedding=True,
    unit_offset_norms=True,
    post_norms=True,
    query_scale=24,
    attention_softcap=50.0,
    logit_softcap=30.0,
    window=5,
    local=(True, False),
    tied_head=True,
    max_positions=128,
)
_CONFIGS = {"mistral": _MISTRAL, "gemma2": _GEMMA}
_RANK, _ALPHA = 3, 6.0
_TOKENS = np.random.default_rng(1).integers(0, 37, (2, 12)).astype(np.int32)
_UP_A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"

_forward = jax.jit(models.forward, static_argnums=0)


@pytest.fixture(scope="module", params=list(_CONFIGS))
def base(request, random_params, tmp_path_factory):
  """(config, parameters, their directory) of a family."""
  config = _CONFIGS[request.param]
  params = random_params(config)
  directory = tmp_path_factory.mktemp("base") / request.param
  convert.save(directory, config, params)
  return config, params, directory


def _adapter(config, names=("q", "v", "down")):
  """All factors non-zero."""
  rng = np.random.default_rng(0)
  layers = models.abstract_params(config)["layers"]
  adapter = {}
  for group in ("attention", "mlp"):
    for name, leaf in layers[group].items():
      if name in names:
        count, outputs, inputs = leaf.shape
        draw = lambda *shape: 0.2 * rng.normal(size=shape).astype(np.float32)
        adapter.setdefault(group, {})[name] = {
            "a": draw(count, _RANK, inputs),
            "b": draw(count, outputs, _RANK),
        }
  return {"layers": adapter}


def _save(path, config=_MISTRAL, **kwargs):
  settings = {"rank": _RANK, "alpha": _ALPHA, "base": "base"} | kwargs
  convert.save_adapter(path, _adapter(config), config=config, **settings)


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
  _save(tmp_path / "adapter")
  return tmp_path / "adapter"


def _load_base(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="eager"
  )


def _logits(config, params, lora=None):
  hidden = _forward(config, params, _TOKENS, lora=lora)
  return np.asarray(models.logits(config, params, hidden))


def _torch_logits(model):
  with torch.no_grad():
    return model(torch.tensor(_TOKENS).long()).logits.numpy()


def _assert_all_agree(base, model, adapter):
  """Kept apart and applied, here and in PEFT."""
  config, params, _ = base
  apart = _logits(config, params, adapter.scaled())
  applied = convert.apply_adapter(params, adapter)
  applied = _logits(config, jax.tree.map(np.asarray, applied))
  expected = _torch_logits(model)
  merged = _torch_logits(model.merge_and_unload())
  # Float32, other orders of summation; logits of order 1.
  for got in (apart, applied, merged):
    np.testing.assert_allclose(got, expected, atol=1e-5)
  assert np.abs(apart - _logits(config, params)).max() > 0.1


@pytest.mark.slow
def test_peft_reads_what_is_written(base, tmp_path):
  config, _, directory = base
  _save(tmp_path / "adapter", config, base=str(directory))
  adapter = convert.load_adapter(tmp_path / "adapter", config)
  model = peft.PeftModel.from_pretrained(
      _load_base(directory), str(tmp_path / "adapter")
  )
  _assert_all_agree(base, model, adapter)


@pytest.mark.parametrize(
    "use_rslora", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_what_peft_writes_is_read(base, tmp_path, use_rslora):
  config, _, directory = base
  torch.manual_seed(0)
  settings = peft.LoraConfig(
      r=_RANK,
      lora_alpha=_ALPHA,
      target_modules=["q_proj", "v_proj", "down_proj"],
      init_lora_weights=False,  # Both factors are random.
      use_rslora=use_rslora,
      lora_dropout=0.1,
      task_type="CAUSAL_LM",
  )
  model = peft.get_peft_model(_load_base(directory), settings).eval()
  model.save_pretrained(tmp_path / "adapter")
  adapter = convert.load_adapter(tmp_path / "adapter", config)
  root = _RANK**0.5 if use_rslora else _RANK
  assert adapter.scale == pytest.approx(_ALPHA / root)
  _assert_all_agree(base, model, adapter)


def test_round_trip_is_bitwise(directory, tmp_path):
  adapter = convert.load_adapter(directory, _MISTRAL)
  expected = _adapter(_MISTRAL)
  assert jax.tree.structure(adapter.params) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, adapter.params, expected)
  assert adapter.scale == _ALPHA / _RANK
  settings = json.loads((directory / "adapter_config.json").read_text())
  assert settings["target_modules"] == ["down_proj", "q_proj", "v_proj"]
  assert (settings["r"], settings["lora_alpha"]) == (_RANK, _ALPHA)
  assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_applied_is_lazy_and_keeps_its_dtype(
    directory, random_params, tmp_path, dtype
):
  params = jax.tree.map(lambda x: x.astype(dtype), random_params(_MISTRAL))
  convert.save(tmp_path / "model", _MISTRAL, params)
  _, leaves = convert.open_leaves(tmp_path / "model")
  adapter = convert.load_adapter(directory, _MISTRAL)
  applied = convert.apply_adapter(leaves, adapter)
  assert applied["embed"] is leaves["embed"]
  assert applied["layers"]["mlp"]["up"] is leaves["layers"]["mlp"]["up"]
  convert.save(tmp_path / "out", _MISTRAL, applied, like=tmp_path / "model")
  _, merged = convert.load(tmp_path / "out")
  w = params["layers"]["mlp"]["down"]
  factors = adapter.params["layers"]["mlp"]["down"]
  update = _ALPHA / _RANK * factors["b"] @ factors["a"]
  expected = (w.astype(np.float32) + update).astype(dtype)
  got = merged["layers"]["mlp"]["down"]
  assert got.dtype == dtype
  np.testing.assert_allclose(
      np.asarray(got, np.float32),
      np.asarray(expected, np.float32),
      rtol=1e-6 if dtype == np.float32 else 2**-10,
      atol=1e-6,
  )
  np.testing.assert_array_equal(merged["embed"], params["embed"])


# What is refused.


def _assert_refused(directory, pattern, config=_MISTRAL):
  with pytest.raises(convert.ConvertError, match=pattern) as caught:
    convert.load_adapter(directory, config)
  text = str(caught.value)
  assert "\n" not in text and str(directory) in text


def _edit_settings(directory, **changes):
  path = directory / "adapter_config.json"
  settings = json.loads(path.read_text()) | changes
  path.write_text(
      json.dumps({k: v for k, v in settings.items() if v is not ...})
  )


def _edit_tensors(directory, edit):
  path = directory / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_settings_that_change_the_model(directory, key, value):
  _edit_settings(directory, **{key: value})
  _assert_refused(directory, f"{key} .* is not supported in an adapter")


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(
            ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
        ),
        {"bias": ..., "fan_in_fan_out": ..., "use_rslora": False},
        {"init_lora_weights": True},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.5, "target_modules": "all-linear"},
    ],
)
def test_settings_that_do_not(directory, changes):
  _edit_settings(directory, **changes)
  assert convert.load_adapter(directory, _MISTRAL).scale == _ALPHA / _RANK


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"r": ...}, "adapter_config.json is wrong.*'r'"),
        ({"lora_alpha": None}, "adapter_config.json is wrong"),
        ({"r": 0}, "adapter_config.json is wrong|has shape"),
        ({"r": 4}, r"has shape \(3, 16\).* ask for \(4, 16\)"),
    ],
)
def test_the_rank_is_wrong(directory, changes, pattern):
  _edit_settings(directory, **changes)
  _assert_refused(directory, pattern)


_NAME = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
_DAMAGE = {
    "missing": (
        lambda d: _edit_tensors(d, lambda x: x.pop(_NAME)),
        f"lacks tensor {_NAME}",
    ),
    "half a pair": (
        lambda d: _edit_tensors(
            d,
            lambda x: [x.pop(n) for n in list(x) if "down_proj.lora_B" in n],
        ),
        "lacks .*down_proj.lora_B",
    ),
    "unknown": (
        lambda d: _edit_tensors(d, lambda x: x.update(extra=np.zeros(2))),
        "holds extra, which is no LoRA factor of a mistral decoder",
    ),
    "of the head": (
        lambda d: _edit_tensors(
            d,
            lambda x: x.update(
                {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 16))}
            ),
        ),
        "holds base_model.model.lm_head.lora_A.weight, which is no",
    ),
    "transposed": (
        lambda d: _edit_tensors(d, lambda x: x.update({_NAME: x[_NAME].T})),
        rf"{_NAME} has shape",
    ),
    "integers": (
        lambda d: _edit_tensors(
            d, lambda x: x.update({_NAME: x[_NAME].astype(np.int32)})
        ),
        f"{_NAME} has dtype I32",
    ),
    "mixed": (
        lambda d: _edit_tensors(
            d, lambda x: x.update({_NAME: x[_NAME].astype(np.float16)})
        ),
        f"{_NAME} has dtype F16",
    ),
    "gone": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        "lacks adapter_model.safetensors",
    ),
    "cut": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b"123"),
        "adapter_model.safetensors cannot be read",
    ),
    "no settings": (
        lambda d: (d / "adapter_config.json").unlink(),
        "adapter_config.json is missing",
    ),
    "empty": (
        lambda d: _edit_tensors(d, lambda x: x.clear()),
        "holds no LoRA factor",
    ),
}


@pytest.mark.parametrize("name", _DAMAGE)
def test_damage_is_named_in_one_line(directory, name):
  damage, pattern = _DAMAGE[name]
  damage(directory)
  _assert_refused(directory, pattern)


def test_an_adapter_of_another_decoder(directory):
  _assert_refused(directory, "has shape", _GEMMA)
  with pytest.raises(convert.ConvertError, match="nowhere"):
    convert.load_adapter(directory.parent / "nowhere", _MISTRAL)
