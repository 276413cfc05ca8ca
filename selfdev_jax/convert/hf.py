"""Hugging Face directories in and out: one table, shapes asserted.

Reading needs config.json, model.safetensors and tokenizer files; nothing is
unpickled. The Mistral family for now; a family is a table more.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import transformers

from selfdev_jax import errors
from selfdev_jax import models

# Path in our tree -> name in the file. `{}` is the layer.
_TABLE = {
    "embed": "model.embed_tokens.weight",
    "layers/attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers/attention/q": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/k": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/v": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/o": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_DTYPES = ("float32", "bfloat16", "float16")
_WEIGHTS = "model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ADAPTER = "adapter_model.safetensors"


class ConvertError(errors.UserError):
  """A model directory that is missing, unreadable or not as expected."""


def get_path(tree: models.Params, path: str) -> Any:
  """`tree["a"]["b"]` for "a/b"; KeyError where there is none."""
  for key in path.split("/"):
    tree = tree[key]
  return tree


def set_path(tree: models.Params, path: str, value: Any):
  *parents, last = path.split("/")
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = value


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ConvertError(
        f"{path.parent} is no Hugging Face model directory: {path.name} is"
        " missing"
    ) from None
  except (ValueError, OSError) as error:
    raise ConvertError(f"{path} cannot be read: {error}") from None
  if not isinstance(value, dict):
    raise ConvertError(f"{path} cannot be read: it holds no JSON object")
  return value


def read_config(directory: str | os.PathLike) -> models.DecoderConfig:
  """The decoder's shape from config.json.

  Raises:
    ConvertError: if the directory or the file is missing, or the architecture
      is not supported.
  """
  path = pathlib.Path(directory)
  if not path.is_dir():
    raise ConvertError(f"model directory {directory} does not exist")
  hf = _read_json(path / "config.json")
  if hf.get("model_type") != "mistral":
    raise ConvertError(
        f"{directory} is of model_type {hf.get('model_type')!r}; supported:"
        " 'mistral'"
    )
  if hf.get("sliding_window") is not None:
    raise ConvertError(
        f"{directory} has a sliding window of {hf['sliding_window']}, which is"
        " not supported"
    )
  if hf.get("hidden_act", "silu") != "silu":
    raise ConvertError(
        f"{directory} has the hidden_act {hf['hidden_act']!r}; supported:"
        " 'silu'"
    )
  # transformers 5 moved rope_theta and rope_scaling into rope_parameters.
  rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  if rope_type != "default":
    raise ConvertError(
        f"{directory} has the rope_type {rope_type!r}; supported: 'default'"
    )
  try:
    heads = hf["num_attention_heads"]
    return models.DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp=hf["intermediate_size"],
        rope_theta=float(hf.get("rope_theta", rope.get("rope_theta", 1e4))),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        max_positions=hf.get("max_position_embeddings", 4096),
    )
  except KeyError as error:
    raise ConvertError(f"{path / 'config.json'} lacks {error}") from None
  except (TypeError, ValueError) as error:
    raise ConvertError(f"{path / 'config.json'} is wrong: {error}") from None


def _write_json(path: pathlib.Path, value: dict[str, Any]):
  path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _hf_config(config: models.DecoderConfig, dtype: str) -> dict[str, Any]:
  return {
      "architectures": ["MistralForCausalLM"],
      "model_type": "mistral",
      "vocab_size": config.vocab_size,
      "hidden_size": config.embed,
      "num_hidden_layers": config.layers,
      "num_attention_heads": config.heads,
      "num_key_value_heads": config.kv_heads,
      "head_dim": config.head_dim,
      "intermediate_size": config.mlp,
      "hidden_act": "silu",
      # At both places: transformers 4 and vLLM read the first, 5 the second.
      "rope_theta": config.rope_theta,
      "rope_parameters": {
          "rope_theta": config.rope_theta,
          "rope_type": "default",
      },
      "rms_norm_eps": config.norm_eps,
      "tie_word_embeddings": config.tied_head,
      "max_position_embeddings": config.max_positions,
      "sliding_window": None,
      "dtype": dtype,
  }


def _tensors(config: models.DecoderConfig, tree: models.Params):
  """(path, leaf of `tree`, names in the file) of a tree like the params."""
  for path, pattern in _TABLE.items():
    if path == "head" and config.tied_head:
      continue
    layers = range(config.layers) if "{}" in pattern else None
    names = [pattern.format(i) for i in layers] if layers else [pattern]
    yield path, get_path(tree, path), names


def load(
    directory: str | os.PathLike,
) -> tuple[models.DecoderConfig, models.Params]:
  """Reads a model directory into NumPy arrays, in the dtype of the file.

  Returns:
    (config, params); the params are laid out as in models/decoder.py.

  Raises:
    ConvertError: naming the directory, and the tensor that is missing, unknown
      or of another shape than config.json says or not of a float dtype.
  """
  config = read_config(directory)
  path = pathlib.Path(directory) / _WEIGHTS
  if not path.is_file():
    raise ConvertError(f"{directory} lacks {_WEIGHTS}")
  params: models.Params = {}
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      unknown = set(file.keys())
      for target, abstract, names in _tensors(
          config, models.abstract_params(config)
      ):
        stacked = target.startswith("layers/")
        leaf_shape = abstract.shape[1:] if stacked else abstract.shape
        parts = []
        for name in names:
          if name not in unknown:
            raise ConvertError(f"{path} lacks tensor {name}")
          unknown.remove(name)
          value = file.get_tensor(name)
          if value.shape != leaf_shape:
            raise ConvertError(
                f"{path}: {name} has shape {value.shape}, but"
                f" config.json asks for {leaf_shape}"
            )
          # Layers are stacked: of one dtype, and nothing is promoted.
          dtypes = [str(parts[0].dtype)] if parts else _DTYPES
          if str(value.dtype) not in dtypes:
            raise ConvertError(
                f"{path}: {name} has dtype {value.dtype}; expected:"
                f" {', '.join(dtypes)}"
            )
          parts.append(value)
        set_path(
            params, target, np.stack(parts) if stacked else parts[0].copy()
        )
  except (safetensors.SafetensorError, OSError) as error:
    raise ConvertError(f"{path} cannot be read: {error}") from None
  if unknown:
    raise ConvertError(f"{path} holds unknown tensor {min(unknown)}")
  return config, params


def _save_file(tensors: dict[str, np.ndarray], path: pathlib.Path):
  try:
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  except safetensors.SafetensorError as error:
    raise ConvertError(
        f"{path} cannot be written ({error}); make room, the same command"
        " resumes"
    ) from None


def save(
    directory: str | os.PathLike,
    config: models.DecoderConfig,
    params: models.Params,
    tokenizer: str | os.PathLike | None = None,
):
  """Writes a directory that `transformers` loads; whole or not at all.

  Args:
    directory: made anew; an existing one is replaced.
    config: the decoder's shape.
    params: arrays as in models/decoder.py.
    tokenizer: a directory whose tokenizer files are copied along.
  """
  tensors = {}
  for path, leaf, names in _tensors(config, params):
    leaf = np.asarray(leaf)
    parts = leaf if path.startswith("layers/") else [leaf]
    for name, part in zip(names, parts, strict=True):
      tensors[name] = part
  dtype = str(np.asarray(params["embed"]).dtype)
  with _new_directory(directory) as new:
    _save_file(tensors, new / _WEIGHTS)
    settings = _hf_config(config, dtype)
    if tokenizer is not None:
      settings |= _special_tokens(pathlib.Path(tokenizer))
      for name in _TOKENIZER_FILES:
        if (pathlib.Path(tokenizer) / name).is_file():
          shutil.copy(pathlib.Path(tokenizer) / name, new / name)
    _write_json(new / "config.json", settings)


def _special_tokens(directory: pathlib.Path) -> dict[str, Any]:
  """The ids that end, begin and fill a text, as a model directory has them.

  Without them `generate` in transformers takes the family's: Mistral's EOS is
  2, whatever the tokenizer says, and a text would run on.
  """
  found = {}
  for name in ("config.json", "generation_config.json"):
    if (directory / name).is_file():
      settings = _read_json(directory / name)
      found |= {k: settings[k] for k in _SPECIAL_TOKENS if k in settings}
  return found


@contextlib.contextmanager
def _new_directory(directory):
  """A directory to fill; only when it is whole does it take its name."""
  target = pathlib.Path(directory)
  partial = target.with_name(target.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  yield partial
  shutil.rmtree(target, ignore_errors=True)
  partial.rename(target)


def load_tokenizer(
    directory: str | os.PathLike,
) -> transformers.PreTrainedTokenizerBase:
  """The directory's tokenizer, through transformers, offline.

  Raises:
    ConvertError: if it is missing, unreadable or has no EOS token.
  """
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True
    )
  except Exception as error:  # tokenizers raises bare ones.
    reason = (str(error) or repr(error)).splitlines()[0]
    raise ConvertError(f"no tokenizer in {directory}: {reason}") from None
  if tokenizer.eos_token_id is None:
    raise ConvertError(f"the tokenizer in {directory} has no EOS token")
  return tokenizer


def digest(directory: str | os.PathLike) -> str:
  """SHA-256 over the weights, the config and the tokenizer, in hex."""
  whole = hashlib.sha256()
  for name in (_WEIGHTS, "config.json", "tokenizer.json"):
    try:
      with open(pathlib.Path(directory) / name, "rb") as file:
        whole.update(hashlib.file_digest(file, "sha256").digest())
    except FileNotFoundError:
      whole.update(b"absent")  # Not every tokenizer has a tokenizer.json.
    except OSError as error:
      raise ConvertError(f"{directory}: {error}") from None
  return whole.hexdigest()


# LoRA adapters under PEFT's names.

_PEFT_PREFIX = "base_model.model."


def save_adapter(
    directory: str | os.PathLike,
    adapter: models.Params,
    *,
    rank: int,
    alpha: float,
    base: str,
):
  """Writes a LoRA adapter that `peft` loads; whole or not at all.

  Args:
    directory: made anew; an existing one is replaced.
    adapter: {"layers": {"attention": {"q": {"a": [layers, rank, in],
      "b": [layers, out, rank]}, ...}, "mlp": ...}}, `b` without the scale.
    rank: r.
    alpha: the update is scaled by alpha / rank.
    base: name or path of the model that the adapter belongs to.
  """
  tensors, targets = {}, []
  for path, name in _TABLE.items():
    try:
      leaf = get_path(adapter, path)
    except KeyError:
      continue
    targets.append(name.split(".")[-2])
    for i, (a, b) in enumerate(zip(leaf["a"], leaf["b"], strict=True)):
      stem = _PEFT_PREFIX + name.format(i).removesuffix(".weight")
      tensors[f"{stem}.lora_A.weight"] = np.asarray(a)
      tensors[f"{stem}.lora_B.weight"] = np.asarray(b)
  settings = {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base,
      "r": rank,
      "lora_alpha": alpha,
      "lora_dropout": 0.0,
      "bias": "none",
      "fan_in_fan_out": False,
      "target_modules": sorted(targets),
      "inference_mode": True,
  }
  with _new_directory(directory) as new:
    _save_file(tensors, new / _ADAPTER)
    _write_json(new / "adapter_config.json", settings)


def load_adapter(
    directory: str | os.PathLike, config: models.DecoderConfig
) -> models.Params:
  """Reads what `save_adapter` wrote.

  Raises:
    ConvertError: if a tensor is missing or unknown.
  """
  path = pathlib.Path(directory) / _ADAPTER
  try:
    tensors = safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise ConvertError(f"{path} cannot be read: {error}") from None
  adapter: models.Params = {}
  for target, pattern in _TABLE.items():
    stems = [
        _PEFT_PREFIX + pattern.format(i).removesuffix(".weight")
        for i in range(config.layers)
    ]
    for part in ("a", "b"):
      names = [f"{stem}.lora_{part.upper()}.weight" for stem in stems]
      if names[0] in tensors:
        try:
          leaves = [tensors.pop(name) for name in names]
        except KeyError as error:
          raise ConvertError(f"{path} lacks tensor {error}") from None
        set_path(adapter, f"{target}/{part}", np.stack(leaves))
  if tensors:
    raise ConvertError(f"{path} holds unknown tensor {min(tensors)}")
  return adapter
