"""vLLM's side of the weight bridge; runs in vLLM's interpreter, without JAX.

Imported by each worker through `--worker-extension-cls`. Weights arrive in two
alternating buffers, shared memory or CUDA memory, as offsets: while one is read
the other is written. vLLM's reference for such an engine is the docstring of
`vllm.distributed.weight_transfer.base.WeightTransferEngine`.
"""

import ctypes
import dataclasses
import logging
import re

import torch
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer import factory
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.model_executor.model_loader import reload

# Projections that vLLM keeps in one matrix: a part of them would be loaded into
# a matrix whose other parts are garbage.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_IPC_LAZY_PEER_ACCESS = 1


@dataclasses.dataclass
class Init(base.WeightTransferInitInfo):
  """Two buffers of `nbytes`, and the model that the other side means.

  `kind` is "shm", and `buffers` are paths, or "cuda", and they are CUDA IPC
  handles in hex.
  """

  kind: str
  buffers: list
  nbytes: int
  model: dict  # Key of config.json -> value; `dtype` among them.


@dataclasses.dataclass
class Update(base.WeightTransferUpdateInfo):
  """Tensors of whole layers, in one of the buffers."""

  buffer: int
  tensors: list  # [name, dtype, shape, offset] each.


class _CudaBuffer:
  """Memory of another process, as PyTorch takes it."""

  def __init__(self, runtime, handle: str, nbytes: int):
    self._runtime, self._pointer = runtime, ctypes.c_void_p()
    raw = (ctypes.c_char * 64).from_buffer_copy(bytes.fromhex(handle))

    class Handle(ctypes.Structure):
      _fields_ = [("reserved", ctypes.c_char * 64)]

    status = runtime.cudaIpcOpenMemHandle(
        ctypes.byref(self._pointer),
        Handle.from_buffer_copy(raw),
        ctypes.c_uint(_IPC_LAZY_PEER_ACCESS),
    )
    if status:
      raise RuntimeError(f"cudaIpcOpenMemHandle gave error {status}")
    self.__cuda_array_interface__ = {
        "shape": (nbytes,),
        "typestr": "|u1",
        "data": (self._pointer.value, True),
        "version": 3,
    }

  def close(self):
    self._runtime.cudaIpcCloseMemHandle(self._pointer)


class Engine(base.WeightTransferEngine[Init, Update]):
  """Loads whole fused groups, a few layers at a time."""

  init_info_cls = Init
  update_info_cls = Update
  _open = ()
  _buffers = ()

  def init_transfer_engine(self, init_info: Init) -> None:
    ours = self.model_config.hf_text_config.to_dict()
    ours["dtype"] = str(self.model_config.dtype).removeprefix("torch.")
    for key, value in init_info.model.items():
      if ours.get(key) != value:
        raise ValueError(
            f"this engine serves a model with {key} {ours.get(key)!r}, the"
            f" weights are of one with {value!r}"
        )
    self.shutdown()
    if init_info.kind == "cuda":
      major = torch.version.cuda.partition(".")[0]
      runtime = ctypes.CDLL(f"libcudart.so.{major}")
      with torch.cuda.device(self.device):
        self._open = [
            _CudaBuffer(runtime, handle, init_info.nbytes)
            for handle in init_info.buffers
        ]
        self._buffers = [
            torch.as_tensor(buffer, device=self.device) for buffer in self._open
        ]
      return
    self._buffers = [
        torch.from_file(
            path, shared=True, size=init_info.nbytes, dtype=torch.uint8
        )
        for path in init_info.buffers
    ]

  def start_weight_update(self) -> None:
    self._names: set[str] = set()
    reload.initialize_layerwise_reload(self.model)

  def receive_weights(self, update_info: Update) -> None:
    names = {name for name, *_ in update_info.tensors}
    for name in names:
      for group in _FUSED:
        part = re.search(rf"\.({'|'.join(group)})\.", name)
        whole = part and {
            name.replace(f".{part[1]}.", f".{other}.") for other in group
        }
        if whole and not whole <= names:
          raise ValueError(
              f"{name} came without {', '.join(sorted(whole - names))}, with"
              " which vLLM keeps it in one matrix"
          )
    weights = []
    for name, dtype, shape, offset in update_info.tensors:
      dtype = getattr(torch, dtype)
      nbytes = torch.Size(shape).numel() * dtype.itemsize
      data = self._buffers[update_info.buffer][offset : offset + nbytes]
      tensor = data.view(dtype).reshape(shape)
      weights.append(
          (name, tensor.clone() if self._waits(name, shape) else tensor)
      )
    if names & self._names:
      raise ValueError(f"{min(names & self._names)} came twice in one update")
    self._names |= names
    self.model.load_weights(weights)

  def _waits(self, name: str, shape: list) -> bool:
    """Whether vLLM uses a tensor when the update ends: then it needs a copy.

    It does with a vocabulary that it pads or shares out; by then the buffer
    holds something else.
    """
    if ".layers." in name:
      return False
    is_whole = self.parallel_config.tensor_parallel_size == 1
    padding = vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE
    return not is_whole or shape[0] % padding != 0

  def finish_weight_update(self) -> None:
    reload.finalize_layerwise_reload(self.model, self.model_config)
    has_vocabulary = any(".layers." not in name for name in self._names)
    if has_vocabulary and self.device.type == "cpu":
      self._repack()

  def _repack(self):
    """Packs anew what shares a weight that came: a tied head keeps its own."""
    from vllm.model_executor.layers import utils

    for module in self.model.modules():
      if hasattr(module, "cpu_linear") and module.weight.numel():
        utils.dispatch_cpu_unquantized_gemm(module, remove_weight=False)

  def shutdown(self) -> None:
    self._buffers = ()  # Shared memory goes with the last tensor that uses it.
    for buffer in self._open:
      buffer.close()
    self._open = ()


class Extension:
  """Nothing of its own; to name it is to import this module."""


# It warns of every module that an update leaves alone.
logging.getLogger(reload.layerwise.__name__).setLevel(logging.ERROR)
factory.WeightTransferEngineFactory.register_engine("selfdev", Engine)
