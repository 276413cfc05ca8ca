"""How weights get from JAX into a running vLLM, without a checkpoint.

Tensors go under their Hugging Face names, layer by layer, through two buffers:
while vLLM reads one, the next layers are written into the other.
"""

import base64
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import ctypes
import functools
import mmap
import os
import pathlib
import shutil
from typing import Any
from typing import Protocol

import jax
import numpy as np

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax.sampling import sampler
from selfdev_jax.sampling.vllm import background
from selfdev_jax.sampling.vllm import client as client_lib

# What vLLM keeps in one matrix arrives together or not at all.
_FUSED = (
    ("q", "k", "v", "q_bias", "k_bias", "v_bias"),
    ("gate", "up"),
)
_SHARED_MEMORY = pathlib.Path("/dev/shm")
_PREFIX = "selfdev-weights-"
# Fewer, larger updates: each costs a few milliseconds of HTTP.
_BUFFER_BYTES = 1 << 26
_ALIGNMENT = 64

# nccl.h: ncclDataType_t and ncclRedOp_t.
_NCCL_TYPES = {"float32": 7, "float16": 6, "bfloat16": 9}
_NCCL_SUM = 0
_CUDA_MEMCPY_DEFAULT = 4  # From wherever the pointers point to.

# (tensor name, array) of tensors that belong together.
Group = list[tuple[str, Any]]


def whole_groups(paths: Iterable[str]) -> set[str]:
  """`paths` of leaves, and what vLLM fuses with one of them."""
  found = set(paths)
  for path in list(found):
    *parents, last = path.split("/")
    for fused in _FUSED:
      if last in fused:
        found.update("/".join([*parents, other]) for other in fused)
  return found


def groups(
    config: models.DecoderConfig, params: models.Params, paths: set[str]
) -> Iterator[Group]:
  """The tensors of the leaves at `paths`: a layer's together, one by one.

  Args:
    config: the decoder's shape.
    params: arrays, or `convert.Lazy` leaves.
    paths: such as "layers/mlp/up", fused ones together.
  """
  found = [
      (names, leaf)
      for path, leaf, names in convert.named_leaves(config, params)
      if path in paths
  ]
  single = lambda names: len(names) == 1 and ".layers." not in names[0]
  for names, leaf in found:
    if single(names):
      is_lazy = isinstance(leaf, convert.Lazy)
      yield [(names[0], np.asarray(leaf) if is_lazy else leaf)]
  stacked = [(names, leaf) for names, leaf in found if not single(names)]
  if stacked:
    names = zip(*(names for names, _ in stacked), strict=True)
    layers = zip(*(_layers(leaf) for _, leaf in stacked), strict=True)
    for of_layer, arrays in zip(names, layers, strict=True):
      yield list(zip(of_layer, arrays, strict=True))


def _layers(leaf: Any) -> Iterator[Any]:
  if isinstance(leaf, convert.Lazy):
    return iter(leaf.tensors())
  # Host memory is sliced as it lies; a device gives up a layer at a time.
  if isinstance(leaf, np.ndarray) or _on_host(leaf):
    return iter(np.asarray(leaf))
  return (leaf[i] for i in range(len(leaf)))


def _on_host(leaf: jax.Array) -> bool:
  return len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == (
      "cpu"
  )


def _group_bytes(config: models.DecoderConfig, dtype: Any) -> list[int]:
  """Bytes of each group of all leaves, with room to align its tensors."""
  leaves = models.abstract_params(config)
  itemsize = np.dtype(dtype).itemsize
  sizes, layer = [], 0
  for path, leaf, _ in convert.named_leaves(config, leaves):
    size = leaf.size * itemsize
    if path.startswith("layers/"):
      layer += -(-size // config.layers) + _ALIGNMENT
    else:
      sizes.append(size + _ALIGNMENT)
  return sizes + [layer] * config.layers


class Buffers(Protocol):
  """Two places that this process writes and vLLM reads."""

  nbytes: int  # Of each.
  info: Mapping[str, Any]  # What the other side opens them by.

  def write(self, buffer: int, offset: int, array: Any):
    """Puts an array's bytes there, and returns when they are there."""

  def opened(self):
    """Told once the other side has them open."""

  def close(self):
    """Gives them back; may be called twice."""


class SharedMemory:
  """Files in /dev/shm that only this user may open.

  Their names go as soon as vLLM has mapped them, so that nothing is left of
  them when both processes have ended, however they did.
  """

  def __init__(self, nbytes: int, directory: pathlib.Path = _SHARED_MEMORY):
    """Makes them.

    Args:
      nbytes: of each.
      directory: on a file system in memory.

    Raises:
      SamplerError: if there is no room.
    """
    self.nbytes = nbytes
    _remove_orphans(directory)
    self._paths, self._maps = [], []
    try:
      for i in range(2):
        path = directory / f"{_PREFIX}{os.getpid()}-{id(self):x}-{i}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._paths.append(path)
        try:
          # Room that is only promised would end in SIGBUS.
          os.posix_fallocate(file, 0, nbytes)
          self._maps.append(mmap.mmap(file, nbytes))
        finally:
          os.close(file)
    except OSError as error:
      self.close()
      free = shutil.disk_usage(directory).free
      raise sampler.SamplerError(
          f"{directory} has no room for weights: {2 * nbytes / 1e6:,.0f} MB"
          f" are needed, {free / 1e6:,.0f} MB are free ({error}); in a"
          " container raise --shm-size"
      ) from None
    self._views = [np.frombuffer(m, np.uint8) for m in self._maps]
    self.info = {"kind": "shm", "buffers": [str(path) for path in self._paths]}

  def write(self, buffer: int, offset: int, array: Any):
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    self._views[buffer][offset : offset + data.size] = data

  def opened(self):
    for path in self._paths:
      path.unlink(missing_ok=True)
    self._paths = []

  def close(self):
    self.opened()
    self._views = self._maps = []


def _remove_orphans(directory: pathlib.Path):
  """Files of processes that died before vLLM had opened them."""
  for path in directory.glob(f"{_PREFIX}*"):
    pid = path.name.removeprefix(_PREFIX).partition("-")[0]
    if not pathlib.Path(f"/proc/{pid}").exists():
      with contextlib.suppress(OSError):  # Another user's.
        path.unlink()


def _library(name: str) -> ctypes.CDLL:
  try:
    return ctypes.CDLL(name)
  except OSError as error:
    raise sampler.SamplerError(
        f"{name} cannot be loaded ({error}); --config.vllm.transport=shm goes"
        " through host memory"
    ) from None


class CudaMemory:
  """Memory of the GPU that JAX and vLLM share; experimental, not measured.

  The allocations are our own, made by the CUDA runtime that JAX brings, so that
  neither PyTorch nor a pickle is needed to hand them over.
  """

  def __init__(self, nbytes: int, runtime: Any = None):
    self.nbytes = nbytes
    self._runtime = runtime or _library("libcudart.so.12")
    self._pointers = []
    handles = []
    try:
      for _ in range(2):
        pointer, handle = ctypes.c_void_p(), (ctypes.c_char * 64)()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        self._pointers.append(pointer)
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
        handles.append(bytes(handle).hex())
    except sampler.SamplerError:
      self.close()
      raise
    self.info = {"kind": "cuda", "buffers": handles}

  def _call(self, name: str, *arguments: Any):
    status = getattr(self._runtime, name)(*arguments)
    if status:
      raise sampler.SamplerError(
          f"{name} gave CUDA error {status}; --config.vllm.transport=shm goes"
          " through host memory"
      )

  def write(self, buffer: int, offset: int, array: Any):
    array = jax.block_until_ready(jax.numpy.asarray(array))
    to = ctypes.c_void_p(self._pointers[buffer].value + offset)
    source = ctypes.c_void_p(array.unsafe_buffer_pointer())
    size = ctypes.c_size_t(array.nbytes)
    self._call("cudaMemcpy", to, source, size, _CUDA_MEMCPY_DEFAULT)
    self._call("cudaDeviceSynchronize")

  def opened(self):
    pass

  def close(self):
    for pointer in self._pointers:
      self._runtime.cudaFree(pointer)
    self._pointers = []


class Transport(Protocol):
  """A way for weights into one engine.

  Attributes:
    backend: its name in vLLM's `--weight-transfer-config`.
  """

  backend: str

  def connect(self, client: client_lib.Client, model: Mapping[str, Any]):
    """Meets the engine, which has to serve a model of that config.json."""

  def send(self, client: client_lib.Client, tensors: Iterable[Group]):
    """Sends them between `start_weight_update` and `finish_weight_update`."""

  def close(self):
    """Gives back what it holds; may be called twice."""


class Staged:
  """Through two alternating buffers, into our own engine on vLLM's side."""

  backend = "selfdev"

  def __init__(self, buffers: Buffers):
    self._buffers = buffers

  def connect(self, client: client_lib.Client, model: Mapping[str, Any]):
    client.init_weight_transfer_engine(
        {
            **self._buffers.info,
            "nbytes": self._buffers.nbytes,
            "model": dict(model),
        }
    )
    self._buffers.opened()

  def send(self, client: client_lib.Client, tensors: Iterable[Group]):
    reading = None
    for i, chunk in enumerate(_chunks(tensors, self._buffers.nbytes)):
      update = self._write(i % 2, chunk)
      if reading is not None:
        reading.result()
      (reading,) = background.submit(
          [functools.partial(client.update_weights, update)]
      )
    if reading is not None:
      reading.result()

  def _write(self, buffer: int, chunk: Group) -> dict[str, Any]:
    offset, tensors = 0, []
    for name, array in chunk:
      self._buffers.write(buffer, offset, array)
      shape, dtype = list(array.shape), str(array.dtype)
      tensors.append([name, dtype, shape, offset])
      offset = _aligned(offset + array.nbytes)
    return {"buffer": buffer, "tensors": tensors}

  def close(self):
    self._buffers.close()


def _aligned(offset: int) -> int:
  return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _chunks(tensors: Iterable[Group], nbytes: int) -> Iterator[Group]:
  """As many whole groups at a time as a buffer holds."""
  chunk, room = [], nbytes
  for group in tensors:
    size = sum(_aligned(array.nbytes) for _, array in group)
    if chunk and size > room:
      yield chunk
      chunk, room = [], nbytes
    chunk, room = chunk + group, room - size
  if chunk:
    yield chunk


class Nccl:
  """Broadcast to the GPUs of vLLM's workers; experimental, not measured.

  vLLM's `nccl` backend as its documentation has it for trainers without
  PyTorch: rank 0 is ours, by the NCCL that JAX brings, and the workers learn
  its unique id over HTTP.
  """

  backend = "nccl"

  def __init__(self, workers: int, library: Any = None):
    self._workers = workers
    self._nccl = library or _library("libnccl.so.2")
    self._communicator = ctypes.c_void_p()

  def connect(self, client: client_lib.Client, model: Mapping[str, Any]):
    del model  # vLLM's own engine asks for nothing of it.

    class UniqueId(ctypes.Structure):
      _fields_ = [("internal", ctypes.c_byte * 128)]

    unique = UniqueId()
    self._call("ncclGetUniqueId", ctypes.byref(unique))
    world = self._workers + 1
    init_info = {
        "nccl_unique_id_b64": base64.b64encode(bytes(unique)).decode(),
        "rank_offset": 1,
        "world_size": world,
        "packed": False,
    }
    # The workers wait there for rank 0.
    (waiting,) = background.submit(
        [functools.partial(client.init_weight_transfer_engine, init_info)]
    )
    self._call(
        "ncclCommInitRank", ctypes.byref(self._communicator), world, unique, 0
    )
    # vLLM's workers begin with a sum of one element, and wait for ours.
    one = jax.block_until_ready(jax.numpy.zeros(1, np.float32))
    self._collective("ncclAllReduce", one, _NCCL_SUM)
    waiting.result()

  def _collective(self, name, array, argument):
    """In place; `argument` is a sum's operation, or a broadcast's root."""
    pointer = ctypes.c_void_p(array.unsafe_buffer_pointer())
    kind, count = _NCCL_TYPES[str(array.dtype)], ctypes.c_size_t(array.size)
    self._call(
        name, pointer, pointer, count, kind, argument, self._communicator, None
    )

  def _call(self, name: str, *arguments: Any):
    status = getattr(self._nccl, name)(*arguments)
    if status:
      raise sampler.SamplerError(
          f"{name} gave NCCL error {status}; --config.vllm.transport=shm goes"
          " through host memory"
      )

  def send(self, client: client_lib.Client, tensors: Iterable[Group]):
    for group in tensors:
      # On the device, and alive until the workers have them.
      group = [(name, jax.numpy.asarray(array)) for name, array in group]
      jax.block_until_ready([array for _, array in group])
      update = {
          "names": [name for name, _ in group],
          "dtype_names": [str(array.dtype) for _, array in group],
          "shapes": [list(array.shape) for _, array in group],
      }
      (waiting,) = background.submit(
          [functools.partial(client.update_weights, update)]
      )
      for _, array in group:
        self._collective("ncclBroadcast", array, 0)
      waiting.result()

  def close(self):
    if self._communicator:
      self._nccl.ncclCommDestroy(self._communicator)
      self._communicator = ctypes.c_void_p()


def make(
    kind: str, config: models.DecoderConfig, dtype: Any, workers: int
) -> Transport:
  """The transport of that name: shm, cuda_ipc or nccl."""
  if kind == "nccl":
    return Nccl(workers)
  sizes = _group_bytes(config, dtype)
  nbytes = _aligned(max(max(sizes), min(sum(sizes), _BUFFER_BYTES)))
  return Staged(
      CudaMemory(nbytes) if kind == "cuda_ipc" else SharedMemory(nbytes)
  )
