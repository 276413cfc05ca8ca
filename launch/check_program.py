r"""Tells whether programs would be admitted, without any model.

  python -m launch.check_program merge.py
  python -m launch.check_program --shapes=4096x4096,4096 --experts=3 *.py
  python -m launch.check_program --layers

One line of JSON a file: {"file", "status": "admitted" or "rejected", "stage",
"code", "reason", "hash", "fingerprint", "equations", "flops", "peak_bytes",
"ms"}. Programs of equal hash are the same function; equal fingerprints, up to
1 in 10,000, say that they do the same to random tensors. Numbers are the
largest over the shapes, `ms` is wall clock. The exit status is 0 when every
file was decided on, either way.

--layers lists what surrounds a program on this machine, what each layer stops
and what nothing stops.
"""

import json
import pathlib
import time

from absl import flags

from launch import app
from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import sandbox
from selfdev_jax.sandbox import layers

_SHAPES = flags.DEFINE_list(
    "shapes",
    ["14336x4096", "4096x14336"],
    "Of the weights that it would merge; by default Mistral-7B's MLP.",
)
_EXPERTS = flags.DEFINE_integer(
    "experts", 3, "Length of task_vectors.", lower_bound=1, upper_bound=1023
)
_LAYERS = flags.DEFINE_bool("layers", False, "List the layers instead.")
_ALLOW_WEAK = flags.DEFINE_bool(
    "allow_weak_sandbox",
    False,
    "Go on where neither seccomp nor bubblewrap is to be had.",
)


def main(argv):
  paths = argv[1:]
  if _LAYERS.value == bool(paths):
    raise errors.UserError("give either files with programs or --layers")
  sources = {path: _read(path) for path in paths}
  with sandbox.Sandbox(
      config_lib.Sandbox(),
      [_shape(text) for text in _SHAPES.value],
      _EXPERTS.value,
      # To list them runs nothing.
      _ALLOW_WEAK.value or _LAYERS.value,
  ) as box:
    if _LAYERS.value:
      print(_table(box.layers()))
      return
    box.layers()  # What starting takes is no program's.
    for path, source in sources.items():
      start = time.monotonic()
      verdict = box.admit(source)
      ms = round(1000 * (time.monotonic() - start), 1)
      line = {"file": path, **_describe(verdict), "ms": ms}
      print(json.dumps(line), flush=True)


def _read(path):
  try:
    return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
  except OSError as error:
    raise errors.UserError(f"{path} cannot be read: {error.strerror}") from None


def _shape(text):
  try:
    shape = tuple(map(int, text.split("x")))
  except ValueError:
    shape = ()
  if not shape or min(shape) < 1 or len(shape) > 8:
    raise errors.UserError(
        f"--shapes: {text!r} is no shape; write --shapes=4096x14336,4096"
    )
  return shape


def _describe(verdict):
  if isinstance(verdict, sandbox.Rejection):
    return {
        "status": "rejected",
        "stage": verdict.stage,
        "code": verdict.code,
        "reason": verdict.message,
        "hash": None,
        "fingerprint": None,
        "equations": None,
        "flops": None,
        "peak_bytes": None,
    }
  return {
      "status": "admitted",
      "stage": None,
      "code": None,
      "reason": None,
      "hash": verdict.digest,
      "fingerprint": [float(f"{x:.6g}") for x in verdict.fingerprint],
      "equations": verdict.stats["equations"],
      "flops": verdict.stats["flops"],
      "peak_bytes": verdict.stats["peak_bytes"],
  }


def _table(found):
  stops = {x.name: x.stops for x in layers.child_layers(layers.NO_LIMITS, "/")}
  stops |= {
      "namespaces": layers.NAMESPACES_STOP,
      "bubblewrap": layers.BUBBLEWRAP_STOPS,
  }
  lines = []
  for name, reason in found.items():
    state = f"not active: {reason}" if reason else "active"
    lines += [f"{name} ({state})", f"  stops {stops[name]}"]
  lines += [
      "Around all: a process a program, killed with what it started when its"
      " time is up; no weights, data or credentials in it; an answer that is"
      " data, and verified",
      "Nothing here stops:",
      *(f"  {text}" for text in layers.NOTHING_STOPS),
  ]
  return "\n".join(lines)


if __name__ == "__main__":
  app.run(main, takes_files=True)
