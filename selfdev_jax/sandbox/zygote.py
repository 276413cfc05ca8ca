"""A warm process that forks one throw-away child for every program.

    python -m selfdev_jax.sandbox.zygote

Started by `sandbox.Sandbox` with a scrubbed environment. It imports JAX and
traces one program, so that a fork has everything loaded, but never initialises
a JAX backend: tracing needs none, and threads do not survive a fork. It holds
no secrets, weights or data: a child inherits its memory. A child enters every
layer of `layers` that holds here, and opens no file after that: what tracing
imports late is imported here.

The first message on stdin is `Setup` in JSON, answered by what `layers.probe`
found, in JSON. Every other one is a program's source, as a JSON string. The
answer to that on stdout is two messages: a JSON
header {"status", "output"} by this process, and the child's bytes, which nobody
here reads. The end of stdin ends the zygote, also in the middle
of a request; that is how it follows its parent into death. (Not by
PR_SET_PDEATHSIG: it fires when the parent's *thread* ends.)
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import selectors
import signal
import sys
import time
from typing import NamedTuple

from selfdev_jax.sandbox import layers as layers_lib
from selfdev_jax.sandbox import trace as trace_lib
from selfdev_jax.sandbox import wire

# jax.numpy's functions are jitted, and a jit's trace is cached by shape: what
# is traced here, on the real shapes, no child has to trace again. The letter is
# there because Python imports what it takes to read it.
_WARM_UP = """
def merge(base, task_vectors):
  stacked = jnp.stack(task_vectors)
  λ = 0.5
  merged = base + λ * sum(task_vectors)
  for x in (stacked, task_vectors[0], task_vectors[0].ravel()):
    size = jnp.abs(x)
    for q in (jnp.quantile(size, 0.5), jnp.percentile(size, 50), size.mean()):
      merged = merged + jnp.where(size >= q, x, 0.0).sum()
    merged = merged + jnp.clip(x, -1, 1).sum() + jnp.sort(x).max()
    merged = merged + jnp.median(x) + jnp.std(x) + jnp.var(x) + x.min()
    merged = merged + jnp.linalg.norm(x) if x.ndim < 3 else merged
    merged = merged + jnp.sum(jnp.maximum(x, 0.0)) + jax.nn.relu(x).sum()
    merged = merged + jnp.mean(jnp.where(jnp.sign(x) == 1.0, x, 0))
    merged = merged + jnp.argsort(x).astype(jnp.float32).sum()
    merged = merged + jax.nn.softmax(x, axis=0).sum() + jax.nn.gelu(x).sum()
    merged = merged + jax.nn.sigmoid(x).sum()
  norms = jnp.array([jnp.linalg.norm(x) for x in task_vectors])
  weights = jax.nn.softmax(norms) + norms / norms.sum()
  merged = merged + jnp.einsum("i,i...->...", weights, stacked)
  merged = merged + jnp.tensordot(weights, stacked, axes=1)
  merged = merged + jnp.vdot(task_vectors[0], base) + stacked[jnp.argmax(norms)]
  merged = merged + jnp.median(stacked, axis=0) + jnp.std(stacked, axis=0)
  merged = merged + jnp.sign(jnp.sum(jnp.sign(stacked), axis=0))
  merged = merged + jnp.quantile(stacked, 0.5, axis=0)
  merged = merged + stacked.var(axis=0) + jnp.argmax(jnp.abs(stacked), axis=0)
  key = jax.random.PRNGKey(0)
  merged = merged + jax.random.bernoulli(key, 0.5, base.shape)
  merged = merged + jax.random.normal(key, base.shape)
  merged = merged + jax.random.uniform(key, base.shape)
  if base.ndim == 2:
    u, s, vt = jnp.linalg.svd(task_vectors[0], full_matrices=False)
    merged = merged + (u * s) @ vt
  return lax.fori_loop(0, 2, lambda i, x: 0.5 * x, merged)
"""
MAX_REQUEST_BYTES = 1 << 22
_PR_SET_CHILD_SUBREAPER = 36
_REPLY_FD = 3  # The only descriptor of a child besides 0, 1 and 2.
_ORPHAN_ROUNDS = 1000
_libc = ctypes.CDLL(None, use_errno=True)


class Setup(NamedTuple):
  """What holds for every program; the limits are those of `config.Sandbox`."""

  shapes: list[list[int]]
  stand_ins: list[list[int]]  # A program need not do for those.
  num_experts: int
  timeout_s: float
  memory_bytes: int
  output_bytes: int
  ir_bytes: int
  max_equations: int
  scratch: str  # An empty directory: a child's root.
  namespaces: dict[str, str]  # The caller's.


def main() -> None:
  """Serves requests until stdin ends."""
  try:
    setup = Setup(**json.loads(wire.receive(0, MAX_REQUEST_BYTES)))
  except wire.WireError:
    return
  _warm_up(setup)
  # Orphans of a child come back here, where they are killed.
  _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
  # Nothing is collected in a child: pages stay shared, and it soon ends.
  gc.collect()
  gc.freeze()
  layers = layers_lib.child_layers(
      layers_lib.Limits(setup.memory_bytes, setup.timeout_s), setup.scratch
  )
  found = layers_lib.probe(layers)
  entered = [layer for layer in layers if not found[layer.name]]
  found["namespaces"] = _namespaces(setup)
  wire.send(1, json.dumps(found).encode())
  with contextlib.suppress(wire.WireError, BrokenPipeError):
    while True:
      _answer(setup, entered)


def _answer(setup, layers):
  # A function of its own: its variables would be one program's view of the
  # last one, by way of the stack's frames.
  message = wire.receive(0, MAX_REQUEST_BYTES)
  header, reply = _serve(setup, layers, json.loads(message))
  wire.send(1, json.dumps(header).encode())
  wire.send(1, reply)


def _warm_up(setup):
  # It may not fit every shape: what it got to is warm.
  with contextlib.suppress(trace_lib.TraceError):
    _trace(setup, _WARM_UP)


def _trace(setup, source):
  shapes, stand_ins = (
      [tuple(shape) for shape in kind]
      for kind in (setup.shapes, setup.stand_ins)
  )
  return trace_lib.trace(
      source, shapes, setup.num_experts, setup.max_equations, stand_ins
  )


def _namespaces(setup):
  own = layers_lib.namespaces_of()
  shared = [k for k, v in setup.namespaces.items() if own[k] == v]
  return f"not permitted here: {', '.join(shared)}" if shared else ""


def _serve(setup, layers, source):
  """Runs one child to its end; returns the header and the child's bytes."""
  reply_read, reply_write = os.pipe()
  output_read, output_write = os.pipe()
  pid = os.fork()
  if pid == 0:
    try:
      _child(setup, layers, source, reply_write, output_write)
    finally:
      os._exit(1)
  os.close(reply_write)
  os.close(output_write)
  try:
    status, reply, output = _collect(setup, reply_read, output_read)
  finally:
    code = _kill(pid)
    os.close(reply_read)
    os.close(output_read)
  if status == "done" and code != 0:
    status = f"crash {code}"
  return {"status": status, "output": output.decode("utf-8", "replace")}, reply


def _collect(setup, reply_fd, output_fd):
  """Reads both pipes until the reply ends, and enforces the wall clock."""
  deadline = time.monotonic() + setup.timeout_s
  reply, output = bytearray(), bytearray()
  with selectors.DefaultSelector() as selector:
    for fd in (0, reply_fd, output_fd):
      selector.register(fd, selectors.EVENT_READ)
    while True:
      ready = selector.select(max(0.0, deadline - time.monotonic()))
      if time.monotonic() >= deadline:
        return "timeout", b"", output
      for key, _ in ready:
        if key.fd == 0:
          # The parent waits for us: this can only be the end of file.
          sys.exit(0)
        data = os.read(key.fd, 1 << 16)
        if key.fd == output_fd:
          # Read to the end, so that the program never blocks; kept up to a cap.
          output += data[: setup.output_bytes - len(output)]
          if not data:
            selector.unregister(output_fd)
        elif data:
          reply += data
          if len(reply) > setup.ir_bytes:
            return "too_big", b"", output
        else:
          return "done", bytes(reply), output


def _kill(pid):
  """Ends a child, its session and its orphans; returns the exit code."""
  # A child whose reply has ended is exiting: it gets 50 ms to do so by itself.
  # WNOWAIT keeps it a zombie, so that its number names nobody else below.
  for _ in range(50):
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
      break
    time.sleep(0.001)
  os.kill(pid, signal.SIGKILL)
  # What it forked into its own session, if it came as far as having one.
  with contextlib.suppress(ProcessLookupError):
    os.killpg(pid, signal.SIGKILL)
  _, status = os.waitpid(pid, 0)
  # Descendants that left the session were handed to us, the subreaper. Each
  # round may reveal the children of those that the last round killed.
  for _ in range(_ORPHAN_ROUNDS):
    orphans = _children()
    if not orphans:
      break
    for orphan in orphans:
      os.kill(orphan, signal.SIGKILL)
      os.waitpid(orphan, 0)
  return os.waitstatus_to_exitcode(status)


def _children():
  try:
    with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
      return [int(x) for x in file.read().split()]
  except FileNotFoundError:  # A kernel without CONFIG_PROC_CHILDREN.
    return []


def _child(setup, layers, source, reply_fd, output_fd):
  """Confines this process, traces the program, writes the reply, exits."""
  os.setsid()
  layers_lib.die_with_parent()
  _confine_descriptors(reply_fd, output_fd)
  for layer in layers:
    layer.enter()
  try:
    reply = _trace(setup, source)
  except trace_lib.TraceError as error:
    reply = json.dumps(
        {"rejected": [error.stage, error.code, error.message[:1000]]}
    )
  data = memoryview(reply.encode())
  while data:
    data = data[os.write(_REPLY_FD, data) :]
  os._exit(0)


def _confine_descriptors(reply_fd, output_fd):
  # The parent's pipes are among those that close: a child cannot answer in
  # the zygote's name.
  null = os.open(os.devnull, os.O_RDONLY)
  reply_fd, output_fd = os.dup(reply_fd), os.dup(output_fd)
  for source, target in ((null, 0), (output_fd, 1), (output_fd, 2)):
    os.dup2(source, target)
  os.dup2(reply_fd, _REPLY_FD)
  os.closerange(_REPLY_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


if __name__ == "__main__":
  main()
