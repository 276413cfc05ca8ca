"""What the memory allows: bandwidths, and timing that is fair to each way.

S. Williams et al., Roofline, CACM 52(4), 2009. J. McCalpin, STREAM, 1995.
"""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import random
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from selfdev_jax import models

# (whether layers are stacked, the shape of a layer's tensor).
Kind = tuple[bool, tuple[int, ...]]

_REPEATS = 9
_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


def copy_bandwidth(nbytes: int | None = None, repeats: int = _REPEATS) -> float:
  """Bytes a second, read and written, of a copy into a donated array.

  Args:
    nbytes: of an array, float32. None: 64 MB; on an accelerator 2 GB, as it
      would copy 64 MB in less time than a call takes to start.
    repeats: the median of which is taken.
  """
  x = _array(nbytes)
  return _bandwidth(reusing(jnp.copy, x), 2 * x.nbytes, repeats)


def triad_bandwidth(
    nbytes: int | None = None, repeats: int = _REPEATS
) -> float:
  """Bytes a second, read and written, of c = a + 0.4 b, c donated.

  Args:
    nbytes: see `copy_bandwidth`.
    repeats: likewise.
  """
  a, b = _array(nbytes), _array(nbytes)
  return _bandwidth(
      reusing(lambda a, b: a + 0.4 * b, a, b), 3 * a.nbytes, repeats
  )


def _array(nbytes: int | None) -> jax.Array:
  if nbytes is None:
    nbytes = 2**26 if jax.default_backend() == "cpu" else 2**31
  return jnp.ones(nbytes // 4, jnp.float32)


def _bandwidth(call: Callable[[], Any], nbytes: int, repeats: int) -> float:
  return nbytes / statistics.median(interleaved({"": call}, repeats)[""])


def reusing(
    fn: Callable[..., jax.Array], *inputs: jax.Array
) -> Callable[[], jax.Array]:
  """`fn(*inputs)`, jitted, as a call that writes over its last result.

  Memory that was never touched costs several times the arithmetic.

  Args:
    fn: gives an array like the first of its inputs.
    inputs: arrays, kept.

  Returns:
    A function without arguments; what it returned before is deleted.
  """
  write = jax.jit(
      lambda out, *inputs: fn(*inputs), donate_argnums=0, keep_unused=True
  )
  out = jnp.zeros_like(inputs[0])

  def call():
    nonlocal out
    out = write(out, *inputs)
    return out

  return call


def interleaved(
    ways: Mapping[str, Callable[[], Any]], repeats: int, seed: int = 0
) -> dict[str, list[float]]:
  """Seconds of each way, all of them run in every round, in a drawn order.

  What ran before leaves caches and memory warm or cold, and a machine has its
  moments; so each way meets all of it.

  Args:
    ways: functions that return arrays or pytrees of them; these are waited
      for.
    repeats: rounds that count; one before them, which compiles, does not.
    seed: of the order.

  Returns:
    `repeats` seconds of each way, in the order in which they were measured.
  """
  seconds = {name: [] for name in ways}
  order = random.Random(seed)
  for repeat in range(repeats + 1):
    for name, call in order.sample(list(ways.items()), len(ways)):
      start = time.perf_counter()
      jax.block_until_ready(call())
      taken = time.perf_counter() - start
      if repeat:
        seconds[name].append(taken)
  return seconds


def compile_seconds(call: Callable[[], Any]) -> tuple[Any, float]:
  """(what `call` returns, for how long JAX compiled meanwhile).

  Tracing and lowering included, as in `jit(f).lower().compile()`; programs
  that are compiled side by side count once.
  """
  spans = []

  def note(event, duration, **_):
    if event in _EVENTS:
      end = time.perf_counter()
      spans.append((end - duration, end))

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    result = jax.block_until_ready(call())
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  total, until = 0.0, 0.0
  for start, end in sorted(spans):
    total += max(end - max(start, until), 0.0)
    until = max(until, end)
  return result, total


def leaf_kinds(params: models.Params) -> dict[Kind, list[str]]:
  """The leaves of each kind, as paths such as "layers/mlp/up".

  Args:
    params: arrays, or anything with a shape.
  """
  kinds = collections.defaultdict(list)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    stacked = path[0].key == "layers"
    name = "/".join(key.key for key in path)
    kinds[stacked, leaf.shape[1:] if stacked else leaf.shape].append(name)
  return dict(kinds)


def pick(params: models.Params, paths: Sequence[str]) -> models.Params:
  """The tree with these leaves alone."""
  picked: models.Params = {}
  for path in paths:
    *parents, last = path.split("/")
    source, target = params, picked
    for key in parents:
      source, target = source[key], target.setdefault(key, {})
    target[last] = source[last]
  return picked
