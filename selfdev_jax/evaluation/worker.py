"""Marks generations of MATH until its stdin ends. Started by `workers`.

    python selfdev_jax/evaluation/worker.py

A script, not a module: it reads its three neighbours by their path, since to
import them through the package would bring in JAX, three seconds and 150 MB of
it, and workers are lost and replaced.

The first message on stdin is its limits in JSON, answered by {}. Every other
one is [metric, generation, gold], answered by [extracted, correct, trouble].
"""

from collections.abc import Callable
import contextlib
import importlib.util
import json
import os
import pathlib
import resource
import select
import sys
import threading

_HERE = pathlib.Path(__file__).resolve().parent
_MAX_SETUP_BYTES = 1 << 16


def _module(path: pathlib.Path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[path.stem] = module
  spec.loader.exec_module(module)
  return module


wire = _module(_HERE.parent / "sandbox" / "wire.py")
layers = _module(_HERE.parent / "sandbox" / "layers.py")


def metrics() -> dict[str, Callable[[str, str], tuple[str | None, bool, str]]]:
  """By name; raises where a library is missing, or not what it was."""
  equivalence = _module(_HERE / "equivalence.py")
  found = {
      "math_verify": equivalence.math_verify,
      "exact_match": equivalence.exact_match,
  }
  # What is loaded late is loaded now.
  said = r"Final Answer: The final answer is $\frac12$. I hope it is correct."
  for mark in found.values():
    if not mark(said, r"$\boxed{\frac{2}{4}}$").correct:
      raise RuntimeError("1/2 is not 2/4 to the libraries installed here")
  return found


def main() -> None:
  """Serves requests until stdin ends."""
  try:
    setup = json.loads(wire.receive(0, _MAX_SETUP_BYTES))
    answers = _silence()
    marking = metrics()
    _exit_with_caller()
    _limit_memory(setup["memory_bytes"])
    _limit_cpu(setup["cpu_s"])
    _shut()
    wire.send(answers, b"{}")
    while True:
      request = wire.receive(0, setup["message_bytes"])
      _limit_cpu(setup["cpu_s"])
      wire.send(answers, json.dumps(_mark(request, marking)).encode())
  except (wire.WireError, BrokenPipeError):
    return


def _mark(request, marking):
  try:
    metric, generation, gold = json.loads(request)
    return marking[metric](generation, gold)
  except Exception:
    return None, False, "error"


def _exit_with_caller():
  def watch():
    poll = select.poll()
    poll.register(0, 0)  # Of itself it tells of the other side's end.
    poll.poll()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _silence() -> int:
  """Where answers go: what libraries print is none."""
  answers = os.dup(1)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  return answers


def _shut():
  """From here on only what Python and its packages consist of can be read.

  math-verify evaluates what it takes for numbers, and only its expressions
  keep the rest of a generation out of that.
  """
  # What the parsers complain about would fill a disk.
  os.dup2(1, 2)
  with contextlib.suppress(OSError):  # A kernel without it.
    layers.restrict_files([sys.prefix, sys.base_prefix])
  layers.lower_limit(resource.RLIMIT_FSIZE, 0)


def _limit_memory(more_bytes: int):
  layers.lower_limit(resource.RLIMIT_AS, layers.mapped_bytes() + more_bytes)
  layers.lower_limit(resource.RLIMIT_CORE, 0)


def _limit_cpu(more_s: int):
  """Ends a step that neither an alarm nor the watch can break into.

  A product of huge numbers holds the interpreter until it is done; should the
  caller be killed meanwhile, nobody else ends it.
  """
  used = resource.getrusage(resource.RUSAGE_SELF)
  seconds = int(used.ru_utime + used.ru_stime) + 1 + more_s
  hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
  if hard != resource.RLIM_INFINITY:
    seconds = min(seconds, hard)
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))


if __name__ == "__main__":
  main()
  os._exit(0)
