"""Tensors in safetensors files: read in place, written aligned.

A file is eight bytes of length, a JSON header, and the tensors' bytes without
a gap (https://huggingface.co/docs/safetensors). XLA uses a host buffer as it
is where it starts at a multiple of 64 bytes, so the header is padded to that,
and the tensors of one leaf follow each other: a leaf of many layers can then be
used straight from the page cache.
"""

import abc
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import json
import math
import mmap
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from selfdev_jax.convert.error import ConvertError

ALIGNMENT = 64
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor where it lies in its file.

  Attributes:
    path: the file.
    name: the tensor's.
    dtype: as the file spells it: F32, BF16, ...
    shape: its shape.
    file: the whole file's bytes, mapped, uint8.
    begin: of its bytes in the file.
    end: likewise.
    inode: of the file.
  """

  path: pathlib.Path
  name: str
  dtype: str
  shape: tuple[int, ...]
  file: np.ndarray = dataclasses.field(repr=False)
  begin: int
  end: int
  inode: int

  @property
  def data(self) -> np.ndarray:
    """Its bytes, a view of the file."""
    return self.file[self.begin : self.end]

  def mapped(self) -> np.ndarray | None:
    """The tensor as a view of its file, fetched ahead; None if not aligned."""
    if self.begin % ALIGNMENT:
      return None
    data = self.data
    with open(self.path, "rb", buffering=0) as file:
      os.posix_fadvise(
          file.fileno(), self.begin, data.size, os.POSIX_FADV_WILLNEED
      )
    return data.view(DTYPES[self.dtype]).reshape(self.shape)

  def forget(self):
    """Gives mapped pages back; the system still has them, if it has room."""
    start = self.begin - self.begin % mmap.PAGESIZE
    mapping = self.file.base.obj  # Of the memoryview that NumPy made of it.
    mapping.madvise(mmap.MADV_DONTNEED, start, self.end - start)

  def read_into(self, buffer: np.ndarray):
    """Copies it; by reading, as touching mapped pages costs twice the time."""
    rest = memoryview(buffer.reshape(-1).view(np.uint8))
    with open(self.path, "rb", buffering=0) as file:
      if os.fstat(file.fileno()).st_ino != self.inode:
        raise ConvertError(f"{self.path} was replaced while it was read")
      file.seek(self.begin)
      while rest:
        n = file.readinto(rest)
        if not n:
          raise ConvertError(f"{self.path} was cut while it was read")
        rest = rest[n:]


def read(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a file by name; nothing of them is read yet.

  Raises:
    ConvertError: if the file is missing, cut or malformed.
  """
  try:
    # The library checks the header: sizes, no gaps, nothing behind the end.
    with safetensors.safe_open(path, framework="numpy"):
      with open(path, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
      file = np.frombuffer(mapped, np.uint8)
      inode = path.stat().st_ino
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise ConvertError(
        f"{path} cannot be read: {error}; it may be cut short: fetch it again"
    ) from None
  start = 8 + int(file[:8].view("<u8")[0])
  header = json.loads(bytes(file[8:start]))
  header.pop("__metadata__", None)
  tensors = {}
  for name, entry in header.items():
    begin, end = (start + offset for offset in entry["data_offsets"])
    tensors[name] = Tensor(
        path,
        name,
        entry["dtype"],
        tuple(entry["shape"]),
        file,
        begin,
        end,
        inode,
    )
  return tensors


class Lazy(abc.ABC):
  """A leaf of the parameters that is read when it is asked for.

  Whole, by `np.asarray`, or one tensor after the other where it may be too
  large for that.

  Attributes:
    shape: [layers, ...], or a tensor's own where it has no layers.
    dtype: float32, bfloat16 or float16.
    is_mapped: whether `np.asarray` is a view of a file.
  """

  is_mapped = False
  shape: tuple[int, ...]
  dtype: np.dtype

  @abc.abstractmethod
  def tensors(self) -> Iterator[np.ndarray]:
    """The tensors of its layers, or its one tensor."""

  def gather(self, buffer: np.ndarray):
    """Fills a contiguous array of its shape."""
    flat, start = buffer.reshape(-1), 0
    for tensor in self.tensors():
      flat[start : start + tensor.size] = tensor.reshape(-1)
      start += tensor.size

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    buffer = aligned_empty(self.shape, self.dtype)
    self.gather(buffer)
    return np.array(buffer, dtype, copy=copy)


class Leaf(Lazy):
  """A leaf that still lies in its files.

  Indexing gives what that part of the leaf holds, as a view of the file where
  the layers lie one behind the other, else gathered into an aligned buffer.

  Attributes:
    parts: its tensors, one a layer, or one.
  """

  def __init__(self, tensors: Sequence[Tensor], stacked: bool):
    first = tensors[0]
    self.dtype = DTYPES[first.dtype]
    self.shape = (len(tensors), *first.shape) if stacked else first.shape
    self._stacked = stacked
    self.parts = tensors
    self._whole = _joined(tensors)
    self.is_mapped = self._whole is not None

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """`index` is a slice for each dimension."""
    if self._whole is not None:
      return self._whole.view(self.dtype).reshape(self.shape)[index]
    layers, inner = slice(None), index
    if self._stacked:
      layers, *inner = index
    extents = zip(index, self.shape, strict=True)
    buffer = aligned_empty(
        [len(range(*part.indices(size))) for part, size in extents], self.dtype
    )
    rows = buffer if self._stacked else buffer[None]
    for row, tensor in zip(rows, self.parts[layers], strict=True):
      if row.shape == tensor.shape:
        tensor.read_into(row)
      else:
        row[...] = self._value(tensor)[tuple(inner)]
    return buffer

  def _value(self, tensor: Tensor) -> np.ndarray:
    data = tensor.data
    if tensor.begin % self.dtype.itemsize:  # No view of misplaced floats.
      data = data.copy()
    return data.view(self.dtype).reshape(tensor.shape)

  def tensors(self) -> Iterator[np.ndarray]:
    return map(self._value, self.parts)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.array(self[(slice(None),) * len(self.shape)], dtype, copy=copy)


def _joined(tensors: Sequence[Tensor]) -> np.ndarray | None:
  """The bytes of all, where they are aligned and one behind the other."""
  first, last = tensors[0], tensors[-1]
  for left, right in itertools.pairwise(tensors):
    if left.file is not right.file or left.end != right.begin:
      return None
  return None if first.begin % ALIGNMENT else first.file[first.begin : last.end]


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An array that XLA can use as it is."""
  size = dtype.itemsize * math.prod(shape)
  raw = np.empty(size + ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % ALIGNMENT
  return raw[start : start + size].view(dtype).reshape(shape)


def find(
    where: pathlib.Path,
    tensors: Mapping[str, Tensor],
    names: Sequence[str],
    shape: tuple[int, ...],
    asks: str,
    stacked: bool = True,
) -> Leaf:
  """The leaf of the tensors with these names, checked.

  Args:
    where: the directory, for errors.
    tensors: all it has.
    names: one a layer, or one.
    shape: of each.
    asks: who asks for that shape, for errors.
    stacked: whether they are layers.

  Raises:
    ConvertError: naming the tensor that is missing, or of another shape, or of
      a dtype that is not supported or not that of the other layers.
  """
  found = []
  for name in names:
    if name not in tensors:
      raise ConvertError(f"{where} lacks tensor {name}")
    tensor = tensors[name]
    if tensor.dtype not in DTYPES:
      raise ConvertError(
          f"{tensor.path}: {name} has dtype {tensor.dtype}; supported:"
          f" {', '.join(DTYPES)}"
      )
    if tensor.shape != shape:
      raise ConvertError(
          f"{tensor.path}: {name} has shape {tensor.shape}, but {asks} for"
          f" {shape}"
      )
    # Layers are stacked: of one dtype, and nothing is promoted.
    if found and tensor.dtype != found[0].dtype:
      raise ConvertError(
          f"{tensor.path}: {name} has dtype {tensor.dtype}, but"
          f" {found[0].name} has {found[0].dtype}"
      )
    found.append(tensor)
  return Leaf(found, stacked)


def put(leaf: Leaf, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
  """The leaf on its devices, each shard read on its own.

  On a CPU nothing is copied that lies aligned in its file or was gathered into
  a buffer: the array holds on to it. Donating such an array saves nothing, XLA
  copies it.
  """
  if sharding is None:
    return jax.device_put(np.asarray(leaf), may_alias=True)
  indices = sharding.addressable_devices_indices_map(leaf.shape)
  shards = [
      jax.device_put(leaf[index], device, may_alias=True)
      for device, index in indices.items()
  ]
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def write(path: pathlib.Path, leaves: Iterable[tuple[list[str], Any, bool]]):
  """Writes leaves one after the other, lazy ones a tensor at a time.

  Args:
    path: the file.
    leaves: (names, array, stacked): one name, or where it is stacked the names
      of `array[0]`, `array[1]`, ...; the array may be a `Lazy` one.

  Raises:
    OSError: if the disk is full or the directory not writable.
  """
  # What could put those behind it out of line comes last.
  leaves = sorted(leaves, key=lambda leaf: nbytes(leaf[1]) % ALIGNMENT != 0)
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for names, leaf, stacked in leaves:
    size = nbytes(leaf) // len(names)
    for name in names:
      header[name] = {
          "dtype": _CODES[np.dtype(leaf.dtype)],
          "shape": list(leaf.shape[1:] if stacked else leaf.shape),
          "data_offsets": [end, end + size],
      }
      end += size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-(8 + len(text)) % ALIGNMENT)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for _, leaf, _ in leaves:
      parts = leaf.tensors() if isinstance(leaf, Lazy) else [np.asarray(leaf)]
      for part in parts:
        file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


def nbytes(leaf: Any) -> int:
  return np.dtype(leaf.dtype).itemsize * math.prod(leaf.shape)
