"""Orbax checkpoints of parameters, written and read a leaf at a time.

A checkpoint is a directory with `params/`, Orbax's, and `hf/`, which is what a
Hugging Face directory holds beside its weights.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax.convert import hf
from selfdev_jax.convert.error import ConvertError

_PARAMS, _SETTINGS = "params", "hf"
# Large enough to write fast, small enough that a shard reads little else.
_CHUNK_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class SavedLeaf:
  """A leaf that still lies in its checkpoint; `np.asarray` reads it."""

  checkpoint: pathlib.Path
  path: str
  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """The leaf on its devices; None: on the first."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted: models.Params = {}
    hf.set_path(
        wanted,
        self.path,
        jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=sharding),
    )
    with _context():
      return hf.get_path(ocp.load(self.checkpoint, wanted), self.path)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.array(self.read(), dtype, copy=copy)


def _context() -> ocp.Context:
  context = ocp.Context()
  # Weights are noise to a compressor: it would cost minutes for nothing.
  context.array.saving.use_compression = False
  context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
  context.pytree.loading.partial_load = True
  return context


def save_checkpoint(
    directory: str | os.PathLike,
    config: models.DecoderConfig,
    params: models.Params,
    like: str | os.PathLike | None = None,
):
  """Writes an Orbax checkpoint; whole or not at all.

  Args:
    directory: made anew; an existing one is replaced.
    config: the decoder's shape.
    params: leaves as in models/decoder.py; arrays, or what becomes one by
      `np.asarray`, which is called on one leaf at a time.
    like: a directory whose tokenizer, generation config and config.json are
      kept beside it.
  """
  like = None if like is None else pathlib.Path(like)
  leaves = list(hf.named_leaves(config, params))
  with (
      hf.new_directory(directory) as new,
      _context(),
      progress.bar("Writing the checkpoint", len(leaves), "leaf") as shown,
  ):
    (new / _SETTINGS).mkdir()
    dtype = str(np.dtype(params["embed"].dtype))
    hf.write_settings(new / _SETTINGS, config, dtype, like)
    target = (new / _PARAMS).absolute()
    for path, leaf, _ in leaves:
      part: models.Params = {}
      value = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
      hf.set_path(part, path, value)
      ocp.partial.save(target, part)
      shown.update()
    ocp.partial.finalize(target)


def open_checkpoint(
    directory: str | os.PathLike,
) -> tuple[models.DecoderConfig, models.Params, pathlib.Path]:
  """What `save_checkpoint` wrote, its leaves as `SavedLeaf`s.

  Returns:
    (config, params, the directory of the tokenizer and the other settings).

  Raises:
    ConvertError: if it is no such checkpoint, or lacks a leaf.
  """
  path = pathlib.Path(directory).absolute()
  if not (path / _PARAMS).is_dir() or not (path / _SETTINGS).is_dir():
    raise ConvertError(
        f"{directory} is no checkpoint of launch.convert: it has no"
        f" {_PARAMS}/ or {_SETTINGS}/"
    )
  config = hf.read_config(path / _SETTINGS)
  try:
    saved = ocp.metadata(path / _PARAMS).metadata
  except Exception as error:  # Orbax's, tensorstore's and the file system's.
    reason = " ".join(str(error).split())
    raise ConvertError(f"{directory} cannot be read: {reason}") from None
  params: models.Params = {}
  for name, abstract, _ in hf.named_leaves(
      config, models.abstract_params(config)
  ):
    try:
      leaf: Any = hf.get_path(saved, name)
    except KeyError:
      raise ConvertError(f"{directory} lacks the leaf {name}") from None
    if leaf.shape != abstract.shape:
      raise ConvertError(
          f"{directory}: {name} has shape {leaf.shape}, but config.json asks"
          f" for {abstract.shape}"
      )
    hf.set_path(
        params,
        name,
        SavedLeaf(path / _PARAMS, name, leaf.shape, np.dtype(leaf.dtype)),
    )
  return config, params, path / _SETTINGS


def restore(
    directory: str | os.PathLike, shardings: models.Params | None = None
) -> tuple[models.DecoderConfig, models.Params]:
  """Reads a checkpoint onto the devices, whatever mesh it was written from.

  Args:
    directory: what `save_checkpoint` wrote.
    shardings: a `jax.sharding.Sharding` for each leaf, see `models.shardings`;
      None: the first device.

  Raises:
    ConvertError: see `open_checkpoint`.
  """
  config, leaves, _ = open_checkpoint(directory)
  if shardings is None:
    return config, jax.tree.map(lambda leaf: leaf.read(), leaves)
  return config, jax.tree.map(lambda leaf, s: leaf.read(s), leaves, shardings)
