"""config.json to `DecoderConfig` and back; names to paths."""

import dataclasses
import json

import jax
import pytest

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax.convert import families

_BASE = models.DecoderConfig(
    vocab_size=61,
    embed=32,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=12,
    mlp=48,
    max_positions=64,
)
_LLAMA3 = models.Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)
_LINEAR = models.Rope(1e6, "linear", 8.0)
_ALTERNATE = {"window": 5, "local": (True, False, True, False)}
_GEMMA = {
    "activation": "gelu_tanh",
    "scaled_embedding": True,
    "unit_offset_norms": True,
    "post_norms": True,
    "query_scale": 24,
}
_GEMMA3 = _GEMMA | {"qk_norm": True, "local_rope": models.Rope(1e3)}
_CONFIGS = {
    "mistral": [
        {},
        {"window": 6, "local": (True,) * 4, "tied_head": True},
        {"rope": _LINEAR, "norm_eps": 1e-6},
    ],
    "llama": [{"rope": _LLAMA3, "tied_head": True}, {"rope": _LINEAR}, {}],
    "qwen2": [
        {"qkv_bias": True},
        {"qkv_bias": True, "tied_head": True} | _ALTERNATE,
    ],
    "qwen3": [
        {"qk_norm": True, "rope": models.Rope(1e6)},
        {"qk_norm": True, "kv_heads": 4, "rope": _LLAMA3} | _ALTERNATE,
    ],
    "gemma2": [
        _GEMMA,
        _GEMMA
        | _ALTERNATE
        | {"attention_softcap": 50.0, "logit_softcap": 30.0, "tied_head": True},
    ],
    "gemma3_text": [
        _GEMMA3 | {"rope": _LINEAR, "tied_head": True} | _ALTERNATE,
        _GEMMA3 | {"logit_softcap": 30.0},
    ],
}
_CASES = [
    pytest.param(
        dataclasses.replace(_BASE, family=family, **fields), id=f"{family}_{i}"
    )
    for family, variants in _CONFIGS.items()
    for i, fields in enumerate(variants)
]


def _read(settings):
  return families.decoder_config(settings, "there")


@pytest.mark.parametrize("config", _CASES)
def test_config_round_trip(config):
  written = json.loads(json.dumps(families.hf_config(config)))
  before = json.dumps(written)
  assert _read(written) == config
  assert json.dumps(written) == before  # What is read is not changed.


@pytest.mark.parametrize("config", _CASES)
def test_table_names_every_parameter(config):
  paths = {
      "/".join(key.key for key in path)
      for path, _ in jax.tree_util.tree_leaves_with_path(
          models.abstract_params(config)
      )
  }
  table = families.FAMILIES[config.family].table
  assert paths | {"head"} == set(table)
  assert ("head" in paths) != config.tied_head
  assert len(set(table.values())) == len(table)
  for path, name in table.items():
    assert ("{}" in name) == path.startswith("layers/")


# As old and new releases write the keys that all families share.
_KEYS = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}


def _file(family, **keys):
  return {"model_type": family} | _KEYS | keys


def _rope(theta, **keys):
  return {"rope_type": "default", "rope_theta": theta} | keys


_LLAMA3_KEYS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LOCAL, _FULL = "sliding_attention", "full_attention"
# Name -> (old spelling, new spelling, fields that tell that both are read).
_SPELLINGS = {
    "theta": (
        _file("mistral", rope_theta=1e6, sliding_window=None),
        _file("mistral", rope_parameters=_rope(1e6), sliding_window=None),
        {"rope": models.Rope(1e6), "head_dim": 12, "local": ()},
    ),
    "theta_twice": (
        _file("qwen3", rope_theta=1e6, rope_parameters=_rope(1e6)),
        _file("qwen3", rope_parameters=_rope(1e6)),
        {"rope": models.Rope(1e6), "head_dim": 128},
    ),
    "type_linear": (
        _file(
            "llama",
            rope_theta=1e6,
            rope_scaling={"type": "linear", "factor": 8.0},
        ),
        _file(
            "llama", rope_parameters=_rope(1e6, rope_type="linear", factor=8.0)
        ),
        {"rope": _LINEAR},
    ),
    "llama3": (
        _file(
            "llama",
            rope_theta=5e5,
            rope_scaling=_LLAMA3_KEYS | {"rope_type": "llama3"},
        ),
        _file(
            "llama",
            rope_parameters=_rope(5e5, rope_type="llama3", **_LLAMA3_KEYS),
        ),
        {"rope": _LLAMA3},
    ),
    "no_kv_heads": (
        _file("llama", num_key_value_heads=None),
        _file("llama", num_key_value_heads=4, head_dim=12),
        {"kv_heads": 4, "head_dim": 12},
    ),
    "mistral_window": (
        _file("mistral", sliding_window=6),
        _file("mistral", sliding_window=6, head_dim=12),
        {"window": 6, "local": (True,) * 4},
    ),
    # transformers' Llama has no windows, whatever its file says.
    "llama_stray_window": (
        _file("llama", sliding_window=6),
        _file("llama"),
        {"window": None, "local": ()},
    ),
    "qwen2_no_windows": (
        _file(
            "qwen2",
            use_sliding_window=False,
            sliding_window=5,
            max_window_layers=1,
        ),
        _file("qwen2", sliding_window=None, layer_types=[_FULL] * 4),
        {"window": None, "local": (), "head_dim": 12, "qkv_bias": True},
    ),
    "qwen2_windows": (
        _file(
            "qwen2",
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=3,
        ),
        _file(
            "qwen2",
            use_sliding_window=True,
            sliding_window=5,
            layer_types=[_FULL] * 3 + [_LOCAL],
        ),
        {"window": 5, "local": (False, False, False, True)},
    ),
    "gemma2": (
        _file("gemma2", sliding_window=5),
        _file(
            "gemma2",
            sliding_window=5,
            layer_types=[_LOCAL, _FULL] * 2,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            tie_word_embeddings=True,
        ),
        {
            "window": 5,
            "local": (True, False, True, False),
            "attention_softcap": 50.0,
            "logit_softcap": 30.0,
            "tied_head": True,
            "query_scale": 256,
        },
    ),
    "gemma3": (
        _file(
            "gemma3_text",
            sliding_window=5,
            sliding_window_pattern=3,
            rope_theta=1e6,
            rope_local_base_freq=1e3,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        _file(
            "gemma3_text",
            sliding_window=5,
            layer_types=[_LOCAL, _LOCAL, _FULL, _LOCAL],
            rope_parameters={
                _FULL: _rope(1e6, rope_type="linear", factor=8.0),
                _LOCAL: _rope(1e3),
            },
        ),
        {
            "window": 5,
            "local": (True, True, False, True),
            "rope": _LINEAR,
            "local_rope": models.Rope(1e3),
        },
    ),
}


@pytest.mark.parametrize("name", _SPELLINGS)
def test_old_spellings_read_like_new_ones(name):
  old, new, fields = _SPELLINGS[name]
  config = _read(old)
  assert config == _read(new)
  assert {field: getattr(config, field) for field in fields} == fields


def _error(settings):
  with pytest.raises(convert.ConvertError) as info:
    _read(settings)
  message = str(info.value)
  assert "\n" not in message
  assert message.startswith("there")
  return message


@pytest.mark.parametrize("name", ["phi3", None])
def test_an_unknown_family_lists_the_known_ones(name):
  message = _error(_file(name))
  assert repr(name) in message
  assert all(family in message for family in _CONFIGS)
  assert set(_CONFIGS) == set(families.FAMILIES)


_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        ("qwen3", {"rope_scaling": _YARN}, ("rope_type", "yarn", "llama3")),
        ("llama", {"rope_parameters": _YARN}, ("rope_type", "yarn", "linear")),
        (
            "gemma3_text",
            {"rope_parameters": {_FULL: _rope(1e6), _LOCAL: _YARN}},
            ("rope_type", "yarn"),
        ),
        (
            "llama",
            {"rope_parameters": _rope(1e4, partial_rotary_factor=0.5)},
            ("partial_rotary_factor",),
        ),
        ("llama", {"attention_bias": True}, ("attention_bias", "True")),
        ("qwen3", {"attention_bias": True}, ("attention_bias", "True")),
        ("gemma2", {"attention_bias": True}, ("attention_bias", "True")),
        ("llama", {"mlp_bias": True}, ("mlp_bias", "True")),
        ("mistral", {"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ("qwen2", {"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ("gemma2", {"hidden_activation": "gelu"}, ("hidden_activation",)),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            ("use_bidirectional_attention",),
        ),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            ("use_bidirectional_attention",),
        ),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            ("attn_logit_softcapping",),
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            ("quantization_config",),
        ),
        ("llama", {"hidden_size": "wide"}, ("hidden_size",)),
        ("gemma2", {"num_attention_heads": 5}, ("config.json",)),
        ("qwen3", {"layer_types": ["odd"] * 4}, ("layer_types",)),
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 4},
            ("layer_types", "chunked_attention"),
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear"}},
            ("factor",),
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": None}},
            ("factor",),
        ),
        ("llama", {"rope_theta": None}, ("rope_theta",)),
        ("llama", {"num_hidden_layers": 0}, ("num_hidden_layers 0",)),
        ("llama", {"num_key_value_heads": 3}, ("no multiple of 3",)),
        ("mistral", {"sliding_window": 0}, ("sliding_window 0",)),
        ("llama", {"model_type": ["llama"]}, ("model_type", "llama")),
    ],
)
def test_what_is_not_supported_is_named(family, keys, named):
  message = _error(_file(family, **keys))
  assert all(word in message for word in named), message
