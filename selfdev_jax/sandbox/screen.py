"""Verifies programs and tries them on probes, in a process that can be lost.

    python -m selfdev_jax.sandbox.screen

Started by `sandbox.Sandbox`, without weights or data. Its code is trusted, what
it reads is not: should JAX or XLA crash, hang or run out of memory over it,
that costs this process alone.

The first message on stdin is `Setup` in JSON, answered by {}. Every other one
is what a zygote's child sent, answered by two messages in JSON: of `verify`,
then, if that went well, of the probes. Either is {"rejected": [stage, code,
message]} instead.
"""

import gc
import json
import math
import os
import resource
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from selfdev_jax import config as config_lib
from selfdev_jax.sandbox import fingerprint
from selfdev_jax.sandbox import layers
from selfdev_jax.sandbox import process
from selfdev_jax.sandbox import verify as verify_lib
from selfdev_jax.sandbox import wire

_MAX_SETUP_BYTES = 1 << 22
_COMPILER_BYTES = 1 << 30  # What XLA may take besides the program.


class Setup(NamedTuple):
  """What holds for every program."""

  limits: dict[str, Any]  # Of `config.Sandbox`.
  shapes: list[list[int]]
  probes: list[list[int]]  # What `fingerprint.probe_shapes` makes of them.
  num_experts: int
  cache: str  # Where XLA keeps what it has compiled.


def main() -> None:
  """Serves requests until stdin ends."""
  try:
    setup = Setup(**json.loads(wire.receive(0, _MAX_SETUP_BYTES)))
    limits = config_lib.Sandbox(**setup.limits)
    _prepare(setup, limits)
    process.exit_with_caller()
    wire.send(1, b"{}")
    while True:
      text = wire.receive(0, limits.ir_bytes)
      for answer in _answers(text, setup, limits):
        wire.send(1, json.dumps(answer).encode())
  except (wire.WireError, BrokenPipeError):
    return


def _prepare(setup, limits):
  jax.config.update("jax_compilation_cache_dir", setup.cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  jax.config.update("jax_compilation_cache_max_size", 1 << 28)
  # What is loaded late, LAPACK among it, counts as the process's own.
  jnp.linalg.svd(jnp.eye(2))
  limit = layers.mapped_bytes() + limits.memory_bytes + _COMPILER_BYTES
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  gc.freeze()


def _answers(text, setup, limits):
  shapes, probes = (
      [tuple(shape) for shape in kind] for kind in (setup.shapes, setup.probes)
  )
  try:
    verified = verify_lib.verify(
        text, limits, shapes, setup.num_experts, probes
    )
  except verify_lib.VerifyError as error:
    yield {"rejected": ["verify", error.code, error.message]}
    return
  yield {
      "program": verified.program,
      "digest": verified.digest,
      "stats": verified.stats,
  }
  yield _try(verified.blocks, probes)


def _try(blocks, probes):
  # A stand-in is nothing that a program has to do for.
  done = [shape for shape in probes if shape in blocks]
  try:
    numbers = fingerprint.compute(blocks, done)
  except Exception as error:
    # What passed the verifier can still be more than XLA compiles or this
    # process may hold.
    message = " ".join(str(error).split())[:200]
    code = "memory" if process.is_out_of_memory(error) else "exception"
    return {"rejected": ["run", code, f"Running the program failed: {message}"]}
  if any(map(math.isnan, numbers)):
    return {
        "rejected": [
            "run",
            "non_finite",
            "The merged weights are NaN or infinite; guard divisions, roots"
            " and logarithms, for example with + 1e-8.",
        ]
    }
  return {"fingerprint": numbers if done == probes else []}


if __name__ == "__main__":
  main()
  # XLA's threads need not be waited for.
  os._exit(0)
