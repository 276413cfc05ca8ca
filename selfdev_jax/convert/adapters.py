"""LoRA adapters under PEFT's names and in its orientation."""

from collections.abc import Iterator
import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selfdev_jax import models
from selfdev_jax.convert import families
from selfdev_jax.convert import files
from selfdev_jax.convert import hf
from selfdev_jax.convert.error import ConvertError

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
# What changes the forward pass beyond W + scale B A.
_ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
}
# Initialisations that take B A out of the base: W + scale B A would be wrong.
_SHIFTS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A low-rank update of some matrices (E. J. Hu et al., arXiv 2106.09685).

  Attributes:
    params: {"layers": {"attention": {"q": {"a": [layers, rank, in],
      "b": [layers, out, rank]}, ...}, "mlp": ...}}, `b` without the scale.
    scale: W becomes W + scale * B A.
  """

  params: models.Params
  scale: float

  def scaled(self) -> models.Params:
    """As `models.forward` and `models.generate` take it."""
    return models.scale_adapter(self.params, self.scale)


def save_adapter(
    directory: str | os.PathLike,
    adapter: models.Params,
    *,
    config: models.DecoderConfig,
    rank: int,
    alpha: float,
    rslora: bool = False,
    base: str,
):
  """Writes a LoRA adapter that `peft` loads; whole or not at all.

  Args:
    directory: made anew; an existing one is replaced.
    adapter: as `Adapter.params`.
    config: the shape of the decoder that it belongs to.
    rank: r.
    alpha: the update is scaled by alpha / rank, or
    rslora: by alpha / sqrt(rank).
    base: name or path of the model that the adapter belongs to.
  """
  leaves, targets = [], []
  for path, pattern in families.FAMILIES[config.family].table.items():
    try:
      factors = hf.get_path(adapter, path)
    except KeyError:
      continue
    targets.append(pattern.split(".")[-2])
    for factor, names in _names(pattern, config.layers).items():
      leaves.append((names, np.asarray(factors[factor]), True))
  settings = {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base,
      "r": rank,
      "lora_alpha": alpha,
      "use_rslora": rslora,
      "lora_dropout": 0.0,
      "bias": "none",
      "fan_in_fan_out": False,
      "target_modules": sorted(targets),
      "inference_mode": True,
  }
  nbytes = sum(files.nbytes(leaf) for _, leaf, _ in leaves)
  with hf.new_directory(directory, nbytes) as new:
    files.write(new / _WEIGHTS, leaves)
    hf.write_json(new / _CONFIG, settings)


def load_adapter(
    directory: str | os.PathLike, config: models.DecoderConfig
) -> Adapter:
  """Reads a directory of PEFT's.

  Args:
    directory: with adapter_config.json and adapter_model.safetensors.
    config: the shape of the decoder that it belongs to.

  Raises:
    ConvertError: naming the tensor that is missing, unknown or of a shape that
      does not fit the decoder, or the setting that is not supported.
  """
  path = pathlib.Path(directory)
  settings = hf.read_json(path / _CONFIG)
  for key, supported in _ONLY.items():
    if settings.get(key, supported[0]) not in supported:
      raise ConvertError(
          f"{path}: {key} {settings[key]!r} is not supported in an adapter"
      )
  init = str(settings.get("init_lora_weights"))
  if init.lower().startswith(_SHIFTS_BASE):
    raise ConvertError(
        f"{path}: init_lora_weights {init!r} is not supported in an adapter;"
        " save it with PEFT's path_initial_model_for_weight_conversion"
    )
  try:
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
  except (KeyError, TypeError, ValueError) as error:
    raise ConvertError(f"{path / _CONFIG} is wrong: {error}") from None
  if not (path / _WEIGHTS).is_file():
    raise ConvertError(f"{path} lacks {_WEIGHTS}")
  tensors = files.read(path / _WEIGHTS)
  unknown = set(tensors)
  params: models.Params = {}
  abstract = models.abstract_params(config)
  for target, matrix, _ in hf.named_leaves(config, abstract):
    pattern = families.FAMILIES[config.family].table[target]
    factors = _names(pattern, config.layers)
    if matrix.ndim != 3 or unknown.isdisjoint(factors["a"] + factors["b"]):
      continue
    for factor, names in factors.items():
      shape = (
          (rank, matrix.shape[2]) if factor == "a" else (matrix.shape[1], rank)
      )
      leaf = files.find(
          path, tensors, names, shape, "the decoder and the rank ask"
      )
      unknown.difference_update(names)
      hf.set_path(params, f"{target}/{factor}", np.asarray(leaf))
  if unknown:
    raise ConvertError(
        f"{path} holds {min(unknown)}, which is no LoRA factor of a"
        f" {config.family} decoder"
    )
  if not params:
    raise ConvertError(f"{path} holds no LoRA factor")
  root = rank**0.5 if settings.get("use_rslora") else rank
  return Adapter(params, alpha / root)


def _names(pattern: str, layers: int) -> dict[str, list[str]]:
  """Factor -> the tensors' names, one a layer."""
  stem = _PREFIX + pattern.removesuffix(".weight")
  return {
      factor: [
          f"{stem.format(i)}.lora_{factor.upper()}.weight"
          for i in range(layers)
      ]
      for factor in ("a", "b")
  }


def apply_adapter(params: models.Params, adapter: Adapter) -> models.Params:
  """W + scale * B A, in float32, rounded to the dtype of W.

  Args:
    params: leaves as in models/decoder.py; `files.Leaf`s are read one by one.
    adapter: of the same decoder.

  Returns:
    The same tree; what the adapter leaves alone is the leaf that was given,
    the others are `Lazy`: computed when they are asked for.
  """

  def apply(path, leaf):
    try:
      factors = hf.get_path(adapter.params, "/".join(k.key for k in path))
    except KeyError:
      return leaf
    return _Applied(leaf, factors["a"], factors["b"], adapter.scale)

  return jax.tree_util.tree_map_with_path(apply, params)


class _Applied(files.Lazy):
  """A matrix of each layer with its update."""

  def __init__(self, leaf: Any, a: np.ndarray, b: np.ndarray, scale: float):
    self.shape, self.dtype = leaf.shape, np.dtype(leaf.dtype)
    self._leaf, self._a, self._b, self._scale = leaf, a, b, scale

  def tensors(self) -> Iterator[np.ndarray]:
    leaf = self._leaf
    layers = leaf.tensors() if isinstance(leaf, files.Lazy) else leaf
    for matrix, a, b in zip(layers, self._a, self._b, strict=True):
      yield np.asarray(_merge(matrix, a, b, self._scale))


@jax.jit
def _merge(matrix, a, b, scale):
  wide = matrix.astype(jnp.float32)
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  # A GPU would multiply in TF32.
  update = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
  return (wide + scale * update).astype(matrix.dtype)
