"""Merges models, by methods and by admitted programs, where it can be lost.

    python -m selfdev_jax.sandbox.runner

`Merges` does it in its own process. `Runner` has another process do it, which
is killed when a program takes too long, and started again when it died: what
the verifier let through can still be more than XLA compiles or a machine holds.
That process holds the experts, so that the caller need not; merged weights come
back through shared memory.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import mmap
import os
import pathlib
import sys
import tempfile
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import merging
from selfdev_jax import models
from selfdev_jax.sandbox import process as process_lib
from selfdev_jax.sandbox import wire
from selfdev_jax.sandbox.lift import kernels

_MAX_REQUEST_BYTES = 1 << 25
_MAX_ANSWER_BYTES = 1 << 22
_ALIGNMENT = 64
_LOAD_S = 3600.0  # Models from a slow disk.
# Of the environment: what JAX, its devices and the caches go by. No tokens.
_VARIABLES = (
    "CUDA", "HF_HOME", "HIP", "HOME", "JAX", "LD_LIBRARY", "NCCL", "NVIDIA",
    "OMP", "OPENBLAS", "PATH", "SELFDEV", "TMPDIR", "TPU", "XDG_CACHE", "XLA",
)  # fmt: skip


class Merged(NamedTuple):
  """A merged model.

  Attributes:
    params: like the seed model's; None where there are none.
    failure: empty, or why a program gave none: "non_finite", "memory",
      "exception", "timeout" or "crash".
  """

  params: models.Params | None
  failure: str = ""


class Merging(Protocol):
  """What merges a seed model with its experts.

  Attributes:
    shapes: of the tensors that a program is applied to, one layer's.
    notes: what a user should know of vocabularies that differ.
  """

  shapes: Sequence[tuple[int, ...]]
  notes: Sequence[str]

  def program(self, program: str) -> Merged:
    """By an admitted program, JSON text; failing is a result."""

  def method(self, name: str, **parameters: Any) -> Merged:
    """By a method of `merging`."""

  def expert(self, name: str) -> Merged:
    """An expert itself, with the seed model's rows of vocabulary."""


class Merges:
  """`Merging` in this process."""

  def __init__(
      self,
      seed: models.Params,
      experts: Mapping[str, models.Params],
      scope: str,
  ):
    """Checks that the models fit each other; see `merging.Merger`."""
    self._seed, self._experts = seed, experts
    self._merger = merging.Merger(seed, experts, scope=scope)
    self.shapes, self.notes = self._merger.shapes, self._merger.notes
    self._former: models.Params | None = None  # The last result's buffers.

  def program(self, program: str) -> Merged:
    into, self._former = self._former, None
    try:
      merged, is_finite = self._merger.run(kernels(program), into)
    except Exception as error:
      is_memory = process_lib.is_out_of_memory(error)
      return Merged(None, "memory" if is_memory else "exception")
    self._former = merged
    return Merged(merged) if is_finite else Merged(None, "non_finite")

  def method(self, name: str, **parameters: Any) -> Merged:
    into, self._former = self._former, None
    self._former = self._merger.merge(name, into=into, **parameters)
    return Merged(self._former)

  def expert(self, name: str) -> Merged:
    seed, expert = self._seed, self._experts[name]
    # Rows that it lacks are the seed model's, as in a merge.
    fitted = {
        name: jnp.concatenate([leaf, seed[name][len(leaf) :]])[
            : len(seed[name])
        ]
        for name, leaf in expert.items()
        if name in ("embed", "head") and len(leaf) != len(seed[name])
    }
    return Merged({**expert, **fitted})


class Runner:
  """`Merging` in a process that can be lost; a context manager."""

  def __init__(
      self,
      seed: models.Params,
      directory: pathlib.Path,
      experts: Mapping[str, pathlib.Path],
      scope: str,
      timeout_s: float,
  ):
    """Starts the process, which reads the models.

    Args:
      seed: the seed model's parameters, as `directory` has them.
      directory: the seed model's.
      experts: name to directory.
      scope: what programs and methods merge, `mlp` or `all`.
      timeout_s: for one merge, compilation included.

    Raises:
      UserError: for models that cannot be read or do not fit.
    """
    self._leaves, self._structure = jax.tree.flatten(seed)
    self._offsets, size = _offsets(self._leaves)
    self._timeout_s = timeout_s
    self._scratch = tempfile.TemporaryDirectory(prefix="selfdev_runner_")
    self._shared = os.memfd_create("selfdev_runner")
    os.truncate(self._shared, size)
    self._memory = mmap.mmap(self._shared, size)
    # The process has a working directory of its own.
    self._setup = {
        "seed": str(directory.absolute()),
        "experts": {k: str(path.absolute()) for k, path in experts.items()},
        "scope": scope,
        "shared": self._shared,
        "compiled": jax.config.jax_compilation_cache_dir,
    }
    self._process: process_lib.Process | None = None
    try:
      hello = self._start().hello
      if "error" in hello:
        raise errors.UserError(hello["error"])
    except BaseException:
      self.close()
      raise
    self.shapes = [tuple(shape) for shape in hello["shapes"]]
    self.notes = hello["notes"]

  def __enter__(self) -> "Runner":
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()

  def program(self, program: str) -> Merged:
    try:
      return self._ask({"program": program})
    except process_lib.LostError as error:
      if error.code == "timeout":
        return Merged(None, error.code)
    # It need not have been the program that ended the process.
    try:
      return self._ask({"program": program})
    except process_lib.LostError as error:
      return Merged(None, error.code)

  def method(self, name: str, **parameters: Any) -> Merged:
    return self._must({"method": name, "parameters": parameters})

  def expert(self, name: str) -> Merged:
    return self._must({"expert": name})

  def close(self) -> None:
    """Ends the process. May be called again."""
    if self._process is not None:
      self._process.stop()
      self._process = None
    if self._shared >= 0:
      os.close(self._shared)
      self._shared = -1
      self._scratch.cleanup()

  def _must(self, request):
    try:
      return self._ask(request)
    except process_lib.LostError as error:
      raise errors.UserError(
          f"the process that merges was lost ({error.code}) over"
          f" {json.dumps(request)[:80]}; free memory, or stop what else runs"
          " here: the same command resumes"
          + (f". It said: {error.words}" if error.words else "")
      ) from None

  def _ask(self, request) -> Merged:
    process = self._start()
    try:
      process.send(json.dumps(request).encode())
      answer = json.loads(process.receive(_MAX_ANSWER_BYTES, self._timeout_s))
    except BaseException:
      process.stop(0.0)  # Else its answer would be the next request's.
      raise
    if answer["failure"]:
      return Merged(None, answer["failure"])
    leaves = list(self._leaves)
    for i in answer["leaves"]:
      leaves[i] = self._received(i)
    return Merged(jax.tree.unflatten(self._structure, leaves))

  def _received(self, i):
    leaf = self._leaves[i]
    # The memory is written again by the next merge: this is a copy.
    new = jnp.array(_view(self._memory, self._offsets[i], leaf))
    return jax.device_put(new, leaf.sharding)

  def _start(self) -> process_lib.Process:
    if self._process is not None and not self._process.is_alive():
      self._process.stop()
      self._process = None
    if self._process is None:
      variables = {
          name: value
          for name, value in os.environ.items()
          if name.startswith(_VARIABLES)
      }
      variables |= process_lib.PYTHON
      # Two processes share the device.
      variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
      self._process = process_lib.Process(
          [sys.executable, "-m", "selfdev_jax.sandbox.runner"],
          self._setup,
          variables,
          self._scratch.name,
          inherited=(self._shared,),
          start_s=_LOAD_S,
      )
    return self._process


def _offsets(leaves) -> tuple[list[int], int]:
  """Where each leaf lies in the shared memory, and how much there is."""
  offsets, size = [], 0
  for leaf in leaves:
    offsets.append(size)
    size += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
  return offsets, size


def _view(memory, offset, leaf) -> np.ndarray:
  flat = np.frombuffer(memory, leaf.dtype, leaf.size, offset)
  return flat.reshape(leaf.shape)


# --- The other process -------------------------------------------------------


class _Setup(NamedTuple):
  seed: str
  experts: dict[str, str]
  scope: str
  shared: int  # Descriptor of the memory.
  compiled: str | None  # Where XLA keeps what it has compiled.


def main() -> None:
  """Serves requests until stdin ends."""
  # Where memory runs out this goes before the run does.
  with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
    file.write("1000")
  try:
    setup = _Setup(**json.loads(wire.receive(0, _MAX_REQUEST_BYTES)))
    process_lib.exit_with_caller()
    try:
      seed, merges = _load(setup)
    except errors.UserError as error:
      _send({"error": str(error)})
      return
    _send({"shapes": merges.shapes, "notes": list(merges.notes)})
    leaves, _ = jax.tree.flatten(seed)
    offsets, size = _offsets(leaves)
    memory = mmap.mmap(setup.shared, size)
    while True:
      request = json.loads(wire.receive(0, _MAX_REQUEST_BYTES))
      merged = _merge(merges, request)
      changed = []
      if merged.params is not None:
        results = jax.tree.leaves(merged.params)
        changed = [i for i, x in enumerate(results) if x is not leaves[i]]
        for i in changed:
          _view(memory, offsets[i], leaves[i])[...] = np.asarray(results[i])
      _send({"failure": merged.failure, "leaves": changed})
  except (wire.WireError, BrokenPipeError):
    return


def _load(setup) -> tuple[models.Params, Merges]:
  if setup.compiled:
    jax.config.update("jax_compilation_cache_dir", setup.compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_max_size", 1 << 28)
  _, seed = convert.load(setup.seed)
  experts = {
      name: convert.load(path)[1] for name, path in setup.experts.items()
  }
  return seed, Merges(seed, experts, setup.scope)


def _merge(merges, request) -> Merged:
  if "program" in request:
    return merges.program(request["program"])
  if "expert" in request:
    return merges.expert(request["expert"])
  return merges.method(request["method"], **request["parameters"])


def _send(answer):
  wire.send(1, json.dumps(answer).encode())


if __name__ == "__main__":
  main()
  # XLA's threads need not be waited for.
  os._exit(0)
