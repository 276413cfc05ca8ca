"""Every tensor arrives whole, under its name, whatever it goes through."""

import base64
import ctypes
import dataclasses
import errno
import itertools
import os
import stat
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax import sampling
from selfdev_jax.sampling import vllm
from selfdev_jax.sampling.vllm import transport

_MISTRAL = models.DecoderConfig(
    vocab_size=61,
    embed=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=12,
    mlp=48,
    max_positions=64,
)
_GEMMA = {
    "activation": "gelu_tanh",
    "scaled_embedding": True,
    "unit_offset_norms": True,
    "post_norms": True,
    "tied_head": True,
}
_CONFIGS = {
    "mistral": _MISTRAL,
    "one layer": dataclasses.replace(_MISTRAL, layers=1),
    "tied": dataclasses.replace(_MISTRAL, family="llama", tied_head=True),
    "qwen2": dataclasses.replace(_MISTRAL, family="qwen2", qkv_bias=True),
    "qwen3": dataclasses.replace(_MISTRAL, family="qwen3", qk_norm=True),
    "gemma2": dataclasses.replace(_MISTRAL, family="gemma2", **_GEMMA),
    "gemma3": dataclasses.replace(
        _MISTRAL, family="gemma3_text", qk_norm=True, **_GEMMA
    ),
}
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _params(config, dtype=np.float32):
  """Each tensor's numbers are its own."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(dtype),
      models.abstract_params(config),
  )


def _paths(config, params):
  return {path for path, *_ in convert.named_leaves(config, params)}


def _tensors(config, params):
  """Name -> array, by way of the files of `convert`."""
  found = {}
  for path, leaf, names in convert.named_leaves(config, params):
    parts = leaf if path.startswith("layers/") else [leaf]
    found |= dict(zip(names, parts, strict=True))
  return found


class Client:
  """Copies what it is sent, `delay_s` after the call."""

  def __init__(self, delay_s=0.0, fail_at=None):
    self.received, self.updates, self.opened = {}, [], None
    self._delay_s, self._fail_at = delay_s, fail_at
    self.threads = set()

  def init_weight_transfer_engine(self, info):
    self.opened = info
    self._maps = [
        np.memmap(path, np.uint8, "r", shape=info["nbytes"])
        for path in info["buffers"]
    ]

  def update_weights(self, info):
    self.threads.add(threading.get_ident())
    if self._fail_at == len(self.updates):
      raise vllm.EngineError("/update_weights: gone")
    self.updates.append(info)
    time.sleep(self._delay_s)
    buffer = self._maps[info["buffer"]]
    for name, dtype, shape, offset in info["tensors"]:
      dtype = jnp.dtype(dtype)
      data = buffer[offset : offset + dtype.itemsize * int(np.prod(shape))]
      assert name not in self.received
      self.received[name] = np.array(data).view(dtype).reshape(shape)


@pytest.fixture
def staged(tmp_path):
  """staged(nbytes) -> a transport through files of that size."""
  made = []

  def make(nbytes):
    memory = transport.SharedMemory(nbytes, tmp_path)
    made.append(transport.Staged(memory))
    return made[-1]

  yield make
  for each in made:
    each.close()
    each.close()


def _check_same(got, expected):
  assert got.keys() == expected.keys()
  for name, array in expected.items():
    assert got[name].dtype == array.dtype, name
    assert got[name].shape == array.shape, name
    assert got[name].tobytes() == np.asarray(array).tobytes(), name


def _least_bytes(config, dtype):
  return max(transport._group_bytes(config, dtype))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("where", ["host", "device", "mesh"])
@pytest.mark.parametrize("kind", _CONFIGS)
def test_every_tensor_arrives_under_its_name(staged, kind, where, dtype):
  config = _CONFIGS[kind]
  given = params = _params(config, dtype)
  if where == "device":
    given = jax.device_put(params)
  if where == "mesh":
    mesh = jax.make_mesh((2,), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    given = jax.device_put(params, everywhere)
  way = staged(_least_bytes(config, dtype))
  client = Client()
  way.connect(client, {})
  paths = _paths(config, given)
  way.send(client, transport.groups(config, given, paths))
  _check_same(client.received, _tensors(config, params))


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma3"])
def test_what_vllm_fuses_comes_in_one_update(staged, kind):
  config = _CONFIGS[kind]
  params = _params(config)
  way = staged(_least_bytes(config, np.float32))
  client = Client()
  way.connect(client, {})
  way.send(client, transport.groups(config, params, _paths(config, params)))
  assert len(client.updates) > config.layers
  for update in client.updates:
    names = {name for name, *_ in update["tensors"]}
    for name in names:
      *stem, part, ending = name.split(".")
      for fused in _FUSED:
        if part in fused:
          assert {".".join([*stem, p, ending]) for p in fused} <= names


def test_buffers_alternate_and_offsets_are_aligned(staged):
  config = _CONFIGS["qwen3"]  # Some of its norms have 48 bytes.
  params = _params(config)
  nbytes = _least_bytes(config, np.float32)
  way = staged(nbytes)
  client = Client()
  way.connect(client, {"key": 1})
  assert client.opened["model"] == {"key": 1}
  assert client.opened["nbytes"] == nbytes
  way.send(client, transport.groups(config, params, _paths(config, params)))
  buffers = [update["buffer"] for update in client.updates]
  assert buffers == [i % 2 for i in range(len(buffers))] and len(buffers) > 2
  assert client.threads.isdisjoint({threading.get_ident()})
  for update in client.updates:
    end = 0
    for _, dtype, shape, offset in update["tensors"]:
      assert offset % 64 == 0 and offset >= end
      end = offset + np.dtype(dtype).itemsize * int(np.prod(shape))
    assert end <= nbytes


def test_a_buffer_is_not_written_while_it_is_read(staged):
  tensors = [[(str(i), np.full((16, 16), i, np.float32))] for i in range(8)]
  way = staged(16 * 16 * 4)
  client = Client(delay_s=0.05)
  way.connect(client, {})
  way.send(client, iter(tensors))
  assert len(client.updates) == len(tensors)
  _check_same(client.received, dict(group[0] for group in tensors))


def test_the_next_buffer_is_written_while_one_is_read(staged):
  client = Client(delay_s=0.3)
  way = staged(1024)
  way.connect(client, {})
  seen = []

  def tensors():
    for i in range(3):
      seen.append(len(client.updates))
      yield [(str(i), np.full(256, i, np.float32))]

  began = time.monotonic()
  way.send(client, tensors())
  assert 0.9 <= time.monotonic() - began < 2.0
  # The third was asked for before the first one's update had ended.
  assert seen[0] == seen[1] == 0 and seen[2] <= 1


def test_several_groups_share_an_update_where_they_fit(staged):
  params = _params(_MISTRAL)
  way = staged(sum(transport._group_bytes(_MISTRAL, np.float32)))
  client = Client()
  way.connect(client, {})
  way.send(client, transport.groups(_MISTRAL, params, _paths(_MISTRAL, params)))
  assert len(client.updates) == 1
  _check_same(client.received, _tensors(_MISTRAL, params))


def test_nothing_to_send_is_no_update(staged):
  client = Client()
  way = staged(64)
  way.connect(client, {})
  way.send(client, iter([]))
  assert not client.updates


def test_an_update_that_fails_ends_the_others(staged):
  params = _params(_MISTRAL)
  way = staged(_least_bytes(_MISTRAL, np.float32))
  client = Client(fail_at=1)
  way.connect(client, {})
  tensors = transport.groups(_MISTRAL, params, _paths(_MISTRAL, params))
  with pytest.raises(vllm.EngineError, match="gone"):
    way.send(client, tensors)
  assert len(client.updates) == 1


# Groups.


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", _CONFIGS)
def test_a_buffer_holds_the_largest_group(kind, dtype):
  config = _CONFIGS[kind]
  params = _params(config, dtype)
  found = list(transport.groups(config, params, _paths(config, params)))
  sizes = transport._group_bytes(config, dtype)
  assert len(found) == len(sizes)
  for group, size in zip(found, sizes, strict=True):
    needed = sum(transport._aligned(array.nbytes) for _, array in group)
    assert needed <= size
  way = transport.make("shm", config, dtype, 1)
  try:
    assert isinstance(way, transport.Staged)
    assert way._buffers.nbytes >= max(sizes)
  finally:
    way.close()


def test_a_large_model_goes_through_small_buffers(monkeypatch):
  monkeypatch.setattr(transport, "_BUFFER_BYTES", 1024)
  way = transport.make("shm", _MISTRAL, np.float32, 1)
  assert way._buffers.nbytes == transport._aligned(
      _least_bytes(_MISTRAL, np.float32)
  )
  way.close()


# Weights and biases: vLLM has them in one module, and loads it whole.
_QKV = {f"layers/attention/{x}{end}" for x in "qkv" for end in ("", "_bias")}


@pytest.mark.parametrize(
    ("paths", "whole"),
    [
        ({"embed"}, {"embed"}),
        (
            {"layers/attention/k"},
            _QKV,
        ),
        (
            {"layers/attention/v_bias"},
            _QKV,
        ),
        (
            {"layers/mlp/up", "head"},
            {"layers/mlp/up", "layers/mlp/gate", "head"},
        ),
        ({"layers/mlp/down"}, {"layers/mlp/down"}),
        ({"layers/attention/q_norm"}, {"layers/attention/q_norm"}),
        (set(), set()),
    ],
)
def test_fused_leaves_belong_together(paths, whole):
  assert transport.whole_groups(paths) == whole


def test_a_layer_is_a_group_of_what_changed():
  params = _params(_MISTRAL)
  paths = {"layers/mlp/up", "layers/mlp/gate", "final_norm"}
  found = list(transport.groups(_MISTRAL, params, paths))
  names = [[name for name, _ in group] for group in found]
  assert names == [["model.norm.weight"]] + [
      [f"model.layers.{i}.mlp.{part}_proj.weight" for part in ("gate", "up")]
      for i in range(3)
  ]
  assert found[2][1][1].shape == (48, 32)
  # Host memory is not copied on the way.
  assert np.shares_memory(found[2][1][1], params["layers"]["mlp"]["up"])
  assert not list(transport.groups(_MISTRAL, params, set()))


def test_chunks_hold_whole_groups():
  sizes = [3, 1, 1, 2, 4, 1, 1, 1, 1, 5]  # Of 64 bytes each.
  groups = [
      [(f"{i}{part}", np.zeros(64 * size, np.uint8)) for part in "ab"]
      for i, size in enumerate(sizes)
  ]
  chunks = list(transport._chunks(iter(groups), 64 * 8))
  assert [len(chunk) // 2 for chunk in chunks] == [2, 2, 1, 4, 1]
  chained = itertools.chain.from_iterable
  assert list(chained(chunks)) == list(chained(groups))


def test_a_chunk_counts_the_room_between_tensors():
  groups = [[(str(i), np.zeros(65, np.uint8))] for i in range(4)]
  chunks = list(transport._chunks(iter(groups), 300))
  assert [len(chunk) for chunk in chunks] == [2, 2]


def test_leaves_are_read_when_their_layer_is_sent(staged):
  params = _params(_MISTRAL)
  lora = {"a": np.ones((3, 2, 32), np.float32)}
  lora["b"] = np.ones((3, 48, 2), np.float32)
  adapter = convert.Adapter({"layers": {"mlp": {"up": lora}}}, 0.5)
  merged = convert.apply_adapter(params, adapter)
  assert isinstance(merged["layers"]["mlp"]["up"], convert.Lazy)
  paths = {"layers/mlp/up", "layers/mlp/gate"}
  way = staged(_least_bytes(_MISTRAL, np.float32))
  client = Client()
  way.connect(client, {})
  way.send(client, transport.groups(_MISTRAL, merged, paths))
  for i in range(3):
    got = client.received[f"model.layers.{i}.mlp.up_proj.weight"]
    np.testing.assert_allclose(got, params["layers"]["mlp"]["up"][i] + 1, 1e-5)
  assert len(client.received) == 6


def test_leaves_of_files_arrive(staged, tmp_path):
  params = _params(_MISTRAL)
  convert.save(tmp_path / "model", _MISTRAL, params)
  _, leaves = convert.open_leaves(tmp_path / "model")
  way = staged(_least_bytes(_MISTRAL, np.float32))
  client = Client()
  way.connect(client, {})
  way.send(client, transport.groups(_MISTRAL, leaves, _paths(_MISTRAL, leaves)))
  _check_same(client.received, _tensors(_MISTRAL, params))


# Shared memory.


def test_only_the_user_may_open_the_files(tmp_path):
  previous = os.umask(0)
  try:
    memory = transport.SharedMemory(4096, tmp_path)
  finally:
    os.umask(previous)
  paths = list(tmp_path.iterdir())
  assert {str(path) for path in paths} == set(memory.info["buffers"])
  for path in paths:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == 4096
    assert path.stat().st_blocks * 512 >= 4096  # Room that is there.
  memory.close()
  memory.close()
  assert not list(tmp_path.iterdir())


def test_names_are_gone_once_the_engine_has_the_files(staged, tmp_path):
  way = staged(256)
  assert len(list(tmp_path.iterdir())) == 2
  client = Client()
  way.connect(client, {})
  assert not list(tmp_path.iterdir())
  way.send(client, [[("x", np.arange(64, dtype=np.float32))]])
  assert client.received["x"][-1] == 63


def test_two_transports_of_a_process_do_not_meet(staged, tmp_path):
  staged(64), staged(64)
  assert len(list(tmp_path.iterdir())) == 4


def test_files_of_the_dead_are_removed(staged, tmp_path):
  with subprocess.Popen(["true"]) as process:
    dead = process.pid
  prefix = transport._PREFIX
  orphan = tmp_path / f"{prefix}{dead}-abc-0"
  living = tmp_path / f"{prefix}{os.getppid()}-abc-0"
  other = tmp_path / f"another-{dead}-abc-0"
  for path in (orphan, living, other):
    path.touch()
  staged(64)
  assert not orphan.exists() and living.exists() and other.exists()


def test_files_of_another_user_are_let_alone(staged, tmp_path, monkeypatch):
  path = tmp_path / f"{transport._PREFIX}999999999-abc-0"
  path.touch()
  unlink = type(path).unlink

  def refuse(self, missing_ok=False):
    if self == path:
      raise PermissionError(errno.EPERM, "Operation not permitted", str(self))
    unlink(self, missing_ok)

  monkeypatch.setattr(type(path), "unlink", refuse)
  staged(64)


def test_no_room_is_told_and_leaves_no_file(tmp_path, monkeypatch):
  calls, really = [], os.posix_fallocate

  def fallocate(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
      raise OSError(errno.ENOSPC, "No space left on device")
    really(*arguments)

  monkeypatch.setattr(os, "posix_fallocate", fallocate)
  with pytest.raises(sampling.SamplerError) as error:
    transport.SharedMemory(3_000_000, tmp_path)
  said = str(error.value)
  assert "\n" not in said and "--shm-size" in said
  assert f"{tmp_path} has no room for weights: 6 MB are needed" in said
  assert not list(tmp_path.iterdir())


def test_a_size_that_no_disk_has_is_told(tmp_path):
  with pytest.raises(sampling.SamplerError, match="has no room for weights"):
    transport.SharedMemory(1 << 60, tmp_path)
  assert not list(tmp_path.iterdir())


# Libraries that are not here: stand-ins that work on host memory.


class Cuda:
  """The CUDA runtime's functions that are called."""

  def __init__(self, fail=None):
    self.memory, self.calls, self._fail = {}, [], fail

  def _status(self, name):
    self.calls.append(name)
    return 2 if name == self._fail else 0

  def cudaMalloc(self, pointer, size):  # noqa: N802
    status = self._status("cudaMalloc")
    if not status:
      block = ctypes.create_string_buffer(size.value)
      pointer._obj.value = ctypes.addressof(block)
      self.memory[pointer._obj.value] = block
    return status

  def cudaIpcGetMemHandle(self, handle, pointer):  # noqa: N802
    address = pointer.value.to_bytes(8, "little")
    ctypes.memmove(handle, address.ljust(64, b"\0"), 64)
    return self._status("cudaIpcGetMemHandle")

  def cudaMemcpy(self, to, source, size, kind):  # noqa: N802
    assert kind == 4
    starts = [
        address
        for address, block in self.memory.items()
        if address <= to.value
        and to.value + size.value <= address + ctypes.sizeof(block)
    ]
    assert len(starts) == 1
    ctypes.memmove(to, source, size.value)
    return self._status("cudaMemcpy")

  def cudaDeviceSynchronize(self):  # noqa: N802
    return self._status("cudaDeviceSynchronize")

  def cudaFree(self, pointer):  # noqa: N802
    del self.memory[pointer.value]
    return self._status("cudaFree")


class CudaClient(Client):

  def __init__(self, cuda):
    super().__init__()
    self._cuda = cuda

  def init_weight_transfer_engine(self, info):
    assert info["kind"] == "cuda"
    self._maps = []
    for handle in info["buffers"]:
      raw = bytes.fromhex(handle)
      assert len(raw) == 64
      block = self._cuda.memory[int.from_bytes(raw[:8], "little")]
      self._maps.append(np.frombuffer(block, np.uint8))


@pytest.mark.parametrize("where", ["host", "device"])
def test_memory_of_a_gpu_takes_the_same_bytes(where):
  params = _params(_MISTRAL, jnp.bfloat16)
  given = params if where == "host" else jax.device_put(params)
  cuda = Cuda()
  nbytes = _least_bytes(_MISTRAL, jnp.bfloat16)
  way = transport.Staged(transport.CudaMemory(nbytes, cuda))
  assert len(cuda.memory) == 2
  client = CudaClient(cuda)
  way.connect(client, {})
  way.send(client, transport.groups(_MISTRAL, given, _paths(_MISTRAL, given)))
  _check_same(client.received, _tensors(_MISTRAL, params))
  copies = cuda.calls[cuda.calls.index("cudaMemcpy") :]
  # What is copied is there before vLLM is told.
  assert copies == ["cudaMemcpy", "cudaDeviceSynchronize"] * (len(copies) // 2)
  del client._maps
  way.close()
  way.close()
  assert not cuda.memory and cuda.calls.count("cudaFree") == 2


@pytest.mark.parametrize(
    "name",
    [
        "cudaMalloc",
        "cudaIpcGetMemHandle",
        "cudaMemcpy",
        "cudaDeviceSynchronize",
    ],
)
def test_a_cuda_error_is_one_line(name):
  with pytest.raises(sampling.SamplerError) as error:
    memory = transport.CudaMemory(64, Cuda(fail=name))
    memory.write(0, 0, np.zeros(4, np.float32))
  assert str(error.value) == (
      f"{name} gave CUDA error 2; --config.vllm.transport=shm goes through"
      " host memory"
  )


class Nccl:
  """NCCL's functions that are called, and the workers at the other end."""

  def __init__(self, fail=None):
    self.calls, self.broadcast, self._fail = [], [], fail

  def _status(self, name, *details):
    self.calls.append((name, *details))
    return 5 if name == self._fail else 0

  def ncclGetUniqueId(self, unique):  # noqa: N802
    ctypes.memmove(unique, bytes(range(128)), 128)
    return self._status("ncclGetUniqueId")

  def ncclCommInitRank(self, communicator, world, unique, rank):  # noqa: N802
    communicator._obj.value = 77
    return self._status("ncclCommInitRank", world, bytes(unique), rank)

  def ncclAllReduce(  # noqa: N802
      self, source, to, count, kind, operation, communicator, stream
  ):
    assert source.value == to.value and communicator.value == 77
    details = count.value, kind, operation, stream
    return self._status("ncclAllReduce", *details)

  def ncclBroadcast(  # noqa: N802
      self, source, to, count, kind, root, communicator, stream
  ):
    assert source.value == to.value and communicator.value == 77
    assert (root, stream) == (0, None)
    size = count.value * {6: 2, 7: 4, 9: 2}[kind]
    self.broadcast.append(ctypes.string_at(source, size))
    return self._status("ncclBroadcast")

  def ncclCommDestroy(self, communicator):  # noqa: N802
    assert communicator.value == 77
    return self._status("ncclCommDestroy")


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_nccl_broadcasts_what_it_announced(dtype):
  params = jax.device_put(_params(_MISTRAL, dtype))
  nccl, client = Nccl(), NcclClient()
  way = transport.Nccl(3, nccl)
  way.connect(client, {"ignored": 1})
  info = client.init_info
  assert base64.b64decode(info.pop("nccl_unique_id_b64")) == bytes(range(128))
  assert info == {"rank_offset": 1, "world_size": 4, "packed": False}
  assert nccl.calls == [
      ("ncclGetUniqueId",),
      ("ncclCommInitRank", 4, bytes(range(128)), 0),
      ("ncclAllReduce", 1, 7, 0, None),
  ]
  paths = _paths(_MISTRAL, params)
  way.send(client, transport.groups(_MISTRAL, params, paths))
  announced = [
      (name, kind, shape)
      for update in client.updates
      for name, kind, shape in zip(
          update["names"],
          update["dtype_names"],
          update["shapes"],
          strict=True,
      )
  ]
  got = {
      name: np.frombuffer(data, jnp.dtype(kind)).reshape(shape)
      for (name, kind, shape), data in zip(
          announced, nccl.broadcast, strict=True
      )
  }
  _check_same(got, _tensors(_MISTRAL, params))
  way.close()
  way.close()
  assert [c for c in nccl.calls if c[0] == "ncclCommDestroy"] == [
      ("ncclCommDestroy",)
  ]


class NcclClient:

  def __init__(self):
    self.updates = []

  def init_weight_transfer_engine(self, info):
    self.init_info = info

  def update_weights(self, info):
    self.updates.append(info)


@pytest.mark.parametrize(
    "name",
    ["ncclGetUniqueId", "ncclCommInitRank", "ncclAllReduce", "ncclBroadcast"],
)
def test_an_nccl_error_is_one_line(name):
  way = transport.Nccl(1, Nccl(fail=name))
  client = NcclClient()
  with pytest.raises(sampling.SamplerError) as error:
    way.connect(client, {})
    way.send(client, [[("x", jnp.zeros(3))]])
  assert str(error.value).startswith(f"{name} gave NCCL error 5; ")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["cuda_ipc", "nccl"])
def test_a_library_that_is_missing_is_told(kind, monkeypatch):
  def missing(name):
    raise OSError(f"{name}: cannot open shared object file")

  monkeypatch.setattr(ctypes, "CDLL", missing)
  with pytest.raises(sampling.SamplerError):
    transport.make(kind, _MISTRAL, np.float32, 1)
