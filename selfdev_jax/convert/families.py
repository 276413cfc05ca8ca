"""Families of decoders: their names on disk and what makes each of them.

A family is a table from paths of `models.Params` to tensor names, `{}` being
the layer. Matrices are [out, in] on both sides, so nothing is permuted.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import transformers

from selfdev_jax import models
from selfdev_jax.convert.error import ConvertError

_LAYER = "model.layers.{}."
_TABLE = {
    "embed": "model.embed_tokens.weight",
    "layers/attention_norm": _LAYER + "input_layernorm.weight",
    "layers/attention/q": _LAYER + "self_attn.q_proj.weight",
    "layers/attention/k": _LAYER + "self_attn.k_proj.weight",
    "layers/attention/v": _LAYER + "self_attn.v_proj.weight",
    "layers/attention/o": _LAYER + "self_attn.o_proj.weight",
    "layers/mlp_norm": _LAYER + "post_attention_layernorm.weight",
    "layers/mlp/gate": _LAYER + "mlp.gate_proj.weight",
    "layers/mlp/up": _LAYER + "mlp.up_proj.weight",
    "layers/mlp/down": _LAYER + "mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_QKV_BIAS = {
    "layers/attention/q_bias": _LAYER + "self_attn.q_proj.bias",
    "layers/attention/k_bias": _LAYER + "self_attn.k_proj.bias",
    "layers/attention/v_bias": _LAYER + "self_attn.v_proj.bias",
}
_QK_NORM = {
    "layers/attention/q_norm": _LAYER + "self_attn.q_norm.weight",
    "layers/attention/k_norm": _LAYER + "self_attn.k_norm.weight",
}
_POST_NORMS = {
    "layers/attention_post_norm": _LAYER + "post_attention_layernorm.weight",
    "layers/mlp_norm": _LAYER + "pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm": _LAYER + "post_feedforward_layernorm.weight",
}

# Field of `DecoderConfig` -> key of config.json.
_KEYS = {
    "vocab_size": "vocab_size",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}
_SIZES = (
    "vocab_size",
    "embed",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
)
_GEMMA_KEYS = _KEYS | {
    "query_scale": "query_pre_attn_scalar",
    "logit_softcap": "final_logit_softcapping",
}
_GEMMA_TRAITS = {
    "activation": "gelu_tanh",
    "scaled_embedding": True,
    "unit_offset_norms": True,
    "post_norms": True,
}


@dataclasses.dataclass(frozen=True)
class Family:
  """How a family is called and what sets it apart.

  Attributes:
    architecture: the class in transformers.
    table: path -> tensor name.
    keys: field of `models.DecoderConfig` -> key of config.json.
    traits: fields of `models.DecoderConfig` that all members share.
    only: key of config.json -> the one value that is supported.
  """

  architecture: str
  table: Mapping[str, str]
  keys: Mapping[str, str]
  traits: Mapping[str, Any]
  only: Mapping[str, Any]


_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}

FAMILIES = {
    "mistral": Family("MistralForCausalLM", _TABLE, _KEYS, {}, _SILU),
    "llama": Family(
        "LlamaForCausalLM",
        _TABLE,
        _KEYS,
        {},
        _SILU | {"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _TABLE | _QKV_BIAS,
        _KEYS,
        {"qkv_bias": True},
        _SILU,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _TABLE | _QK_NORM,
        _KEYS,
        {"qk_norm": True},
        _SILU | {"attention_bias": False},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _TABLE | _POST_NORMS,
        _GEMMA_KEYS | {"attention_softcap": "attn_logit_softcapping"},
        _GEMMA_TRAITS,
        _GELU | {"use_bidirectional_attention": None},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _TABLE | _POST_NORMS | _QK_NORM,
        _GEMMA_KEYS,
        _GEMMA_TRAITS | {"qk_norm": True},
        _GELU
        | {
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
        },
    ),
}

# Scaling -> field of `models.Rope` -> key of rope_parameters.
_ROPE_KEYS = {
    "default": {"theta": "rope_theta"},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_positions": "original_max_position_embeddings",
    },
}
_LOCAL, _FULL = "sliding_attention", "full_attention"
# The one family with a RoPE for each type of layer.
_TWO_ROPES = "gemma3_text"
# Those whose configs do not give a type to each layer.
_UNTYPED = ("mistral", "llama")


def decoder_config(hf: dict[str, Any], where: str) -> models.DecoderConfig:
  """The decoder's shape from a config.json, whichever version wrote it.

  transformers fills in what a file leaves to its family's defaults, and brings
  old spellings (`rope_theta` and `rope_scaling`) to new ones
  (`rope_parameters`).

  Args:
    hf: the file's contents.
    where: the model, for errors.

  Raises:
    ConvertError: if the architecture or a value of a key is not supported.
  """
  name = str(hf.get("model_type"))
  if name not in FAMILIES:
    raise ConvertError(
        f"{where} is of model_type {name!r}; supported: {', '.join(FAMILIES)}"
    )
  if hf.get("quantization_config"):
    raise ConvertError(
        f"{where} is quantized (quantization_config); take the weights it was"
        " made from"
    )
  family = FAMILIES[name]
  try:
    hf = transformers.CONFIG_MAPPING[name].from_dict(dict(hf)).to_dict()
  except Exception as error:  # The library's strict checks have many types.
    reason = " ".join(str(error).split())
    raise ConvertError(f"{where}: config.json is wrong: {reason}") from None
  for key, value in family.only.items():
    if (hf.get(key) or None) != (value or None):
      raise ConvertError(
          f"{where} has {key} {hf[key]!r}; supported for {name}: {value!r}"
      )
  # Qwen2's configs have no head_dim, unless one was put in.
  fields = {field: hf.get(key) for field, key in family.keys.items()}
  heads = fields["heads"]
  fields["kv_heads"] = fields["kv_heads"] or heads
  fields["head_dim"] = fields["head_dim"] or fields["embed"] // heads
  for field in _SIZES:
    if fields[field] < 1:
      raise ConvertError(f"{where} has {family.keys[field]} {fields[field]}")
  if heads % fields["kv_heads"]:
    raise ConvertError(
        f"{where} has {heads} heads, no multiple of {fields['kv_heads']}"
        " key-value heads"
    )
  rope = hf["rope_parameters"]
  if name == _TWO_ROPES:
    fields["local_rope"] = _read_rope(rope[_LOCAL], where)
    rope = rope[_FULL]
  window = hf.get("sliding_window")
  if name in _UNTYPED:  # A window is on all layers or on none.
    types = [_LOCAL if name == "mistral" else _FULL] * fields["layers"]
  else:
    types = hf["layer_types"]
  if not set(types) <= {_LOCAL, _FULL}:
    raise ConvertError(
        f"{where} has the layer_types {', '.join(sorted(set(types)))};"
        f" supported: {_LOCAL}, {_FULL}"
    )
  local = tuple(window is not None and kind == _LOCAL for kind in types)
  if any(local):
    if window < 1:
      raise ConvertError(f"{where} has sliding_window {window}")
    fields |= {"window": window, "local": local}
  return models.DecoderConfig(
      family=name, rope=_read_rope(rope, where), **fields, **family.traits
  )


def _read_rope(rope: dict[str, Any], where: str) -> models.Rope:
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise ConvertError(
        f"{where} rotates a part of each head (partial_rotary_factor): not"
        " supported"
    )
  scaling = rope["rope_type"]
  if scaling not in _ROPE_KEYS:
    raise ConvertError(
        f"{where} has the rope_type {scaling!r}; supported:"
        f" {', '.join(_ROPE_KEYS)}"
    )
  fields = {}
  for field, key in (_ROPE_KEYS["default"] | _ROPE_KEYS[scaling]).items():
    fields[field] = rope.get(key)
    if not isinstance(fields[field], int | float):
      raise ConvertError(
          f"{where} has the {key} {fields[field]!r}, not a number"
      )
  return models.Rope(scaling=scaling, **fields)


def hf_config(decoder: models.DecoderConfig) -> dict[str, Any]:
  """A config.json for `decoder`, as transformers 5 reads it.

  Raises:
    ConvertError: if the family has no such decoders.
  """
  family = FAMILIES[decoder.family]
  rope = _write_rope(decoder.rope)
  settings = {
      "architectures": [family.architecture],
      "model_type": decoder.family,
      **{key: getattr(decoder, field) for field, key in family.keys.items()},
      **family.only,
      # At both places: transformers 4 and vLLM read the first, 5 the second.
      "rope_theta": decoder.rope.theta,
      "rope_parameters": rope,
  }
  if decoder.rope.scaling != "default":
    settings["rope_scaling"] = rope
  if decoder.family == _TWO_ROPES:
    local = decoder.local_rope or decoder.rope
    settings["rope_local_base_freq"] = local.theta
    settings["rope_parameters"] = {_FULL: rope, _LOCAL: _write_rope(local)}
  if decoder.family != "llama":
    settings["sliding_window"] = decoder.window
  if decoder.family.startswith("qwen"):
    settings["use_sliding_window"] = decoder.window is not None
  if decoder.family not in _UNTYPED:
    settings["layer_types"] = [
        _LOCAL if is_local else _FULL
        for is_local in decoder.local or [False] * decoder.layers
    ]
  found = decoder_config(settings, decoder.family)
  for field in dataclasses.fields(decoder):
    value = getattr(decoder, field.name)
    if getattr(found, field.name) != value:
      raise ConvertError(
          f"no {decoder.family} decoder has {field.name} {value!r}"
      )
  return settings


def _write_rope(rope: models.Rope) -> dict[str, Any]:
  keys = _ROPE_KEYS["default"] | _ROPE_KEYS[rope.scaling]
  written = {key: getattr(rope, field) for field, key in keys.items()}
  return written | {"rope_type": rope.scaling}
