"""Orbax checkpoints of parameters, written and read a leaf at a time.

A checkpoint is a directory with `params/`, Orbax's, and `hf/`, which is what a
Hugging Face directory holds beside its weights.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore

from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax.convert import files
from selfdev_jax.convert import hf
from selfdev_jax.convert.error import ConvertError

_PARAMS, _SETTINGS = "params", "hf"
# Large enough to read fast, small enough that a shard reads little else.
_CHUNK_BYTES = 16 * 2**20


class SavedLeaf(files.Lazy):
  """A leaf that still lies in its checkpoint."""

  def __init__(self, checkpoint: pathlib.Path, path: str, shape, dtype):
    self.shape, self.dtype = tuple(shape), np.dtype(dtype)
    self._checkpoint, self._path = checkpoint, path

  def read(self, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """The leaf on its devices; None: on the first."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=sharding)
    wanted: models.Params = {}
    hf.set_path(wanted, self._path, abstract)
    with _context(), _named(self._checkpoint.parent, "read"):
      return hf.get_path(ocp.load(self._checkpoint, wanted), self._path)

  def tensors(self) -> Iterator[np.ndarray]:
    # Orbax reads whole arrays; the store under it reads a layer of one.
    spec = {
        "driver": "zarr3",
        "fill_missing_data_reads": False,
        "kvstore": {
            "driver": "ocdbt",
            "base": f"file://{self._checkpoint / 'state'}/",
            "path": self._path.replace("/", ".") + "/",
        },
    }
    with _named(self._checkpoint.parent, "read"):
      array = tensorstore.open(spec, open=True, read=True).result()
    stacked = hf.is_stacked(self._path)
    for part in range(self.shape[0]) if stacked else [...]:
      with _named(self._checkpoint.parent, "read"):
        value = array[part].read().result()
      yield value


@contextlib.contextmanager
def _named(directory: str | os.PathLike, verb: str) -> Iterator[None]:
  """What goes wrong in a checkpoint is one line that names it."""
  try:
    yield
  except Exception as error:  # Orbax's, tensorstore's and the file system's.
    reason = str(error.__cause__ or error).partition("[tensorstore_spec")[0]
    raise ConvertError(
        f"{directory} cannot be {verb}: {' '.join(reason.split())}"
    ) from None


def _context() -> ocp.Context:
  context = ocp.Context()
  # Weights are noise to a compressor: it would cost minutes for nothing.
  context.array.saving.use_compression = False
  context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
  # Cut between layers first, so that one can be read alone.
  context.array.saving.storage_options.shard_axes = (0,)
  context.memory.deepcopy_host_arrays = False
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
  sizes = [files.nbytes(leaf) for _, leaf, _ in leaves]
  # One leaf at a time is there twice: see `_whole`.
  with (
      hf.new_directory(directory, sum(sizes) + max(sizes)) as new,
      _context(),
      progress.bar("Writing the checkpoint", len(leaves), "leaf") as shown,
  ):
    (new / _SETTINGS).mkdir()
    dtype = str(np.dtype(params["embed"].dtype))
    hf.write_settings(new / _SETTINGS, config, dtype, like)
    target = (new / _PARAMS).absolute()
    for path, leaf, _ in leaves:
      part: models.Params = {}
      hf.set_path(part, path, _whole(leaf, new))
      with _named(directory, "written"):
        ocp.partial.save(target, part)
      shown.update()
    with _named(directory, "written"):
      ocp.partial.finalize(target)


def _whole(leaf: Any, scratch: pathlib.Path) -> jax.Array | np.ndarray:
  """A leaf as Orbax wants it; one that is gathered lies on disk until then.

  Orbax copies what it writes: in memory it would be there twice.
  """
  if not isinstance(leaf, files.Lazy):
    return leaf
  if leaf.is_mapped:
    return np.asarray(leaf)
  with tempfile.TemporaryFile(dir=scratch) as file:
    # Without the space, writing to the mapping would kill the process.
    os.posix_fallocate(file.fileno(), 0, files.nbytes(leaf))
    mapped = np.memmap(file, leaf.dtype, shape=leaf.shape)
  leaf.gather(mapped)
  return np.asarray(mapped)


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
  with _named(directory, "read"):
    saved = ocp.metadata(path / _PARAMS).metadata
    if saved is None:  # Orbax has logged why.
      raise ValueError("its metadata is damaged")
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
