"""What a generated program is, and which names it may use.

A program is Python source that defines

    def merge(base, task_vectors):  # -> array of base's shape

where `base` is one float32 weight tensor of the seed model and `task_vectors`
a list of arrays of the same shape, expert minus seed. It is traced, not run:
its names are facades over jax.numpy, jax.lax, jax.nn and jax.random that leave
out what reads, writes or calls back. The facades make honest programs work and
give an early no; they are no wall, see selfdev_jax/sandbox.

A program may also be written in PyTorch: then `base` and the task vectors are
`torch_shim.Tensor`s, and so is what it returns. See `torch_shim`.
"""

import ast
import builtins
from collections.abc import Callable
from collections.abc import Sequence
import functools
import itertools
import math
import sys
import types
import typing
from typing import Any

ENTRY = "merge"
MAX_SOURCE_CHARS = 20_000  # A completion of 512 tokens has about 2,000.


def _words(text):
  """The words of a text, as a set."""
  return frozenset(text.split())


BUILTINS = _words("""
    abs all any bool dict divmod enumerate filter float frozenset int
    isinstance iter len list map max min next pow print range repr reversed
    round set slice sorted str sum tuple zip ArithmeticError AssertionError
    Exception IndexError KeyError NotImplementedError RuntimeError
    StopIteration TypeError ValueError ZeroDivisionError True False None
""")

# Attributes that touch files, the host or global state, or lead to frames.
FORBIDDEN_ATTRIBUTES = _words("""
    save savez savez_compressed load loadtxt savetxt genfromtxt fromfile
    tofile dump dumps memmap frompyfunc from_dlpack fromiter fromregex
    get_printoptions set_printoptions printoptions callback pure_callback
    io_callback debug_callback host_callback custom_call ffi ffi_call config
    debug profiler experimental extend interpreters distributed export jax2tf
    infeed outfeed device_put device_get tracing gi_frame gi_code gi_yieldfrom
    cr_frame ag_frame tb_frame tb_next f_back f_globals f_locals f_builtins
    f_code mro
""")

FORBIDDEN_NAMES = _words("""
    open eval exec compile getattr setattr delattr hasattr globals locals vars
    dir input breakpoint help exit quit type object super memoryview bytearray
    classmethod staticmethod property id
""")

_TYPING = _words("""
    Any Callable Dict Iterable List Optional Sequence Tuple Union
""")


@functools.cache
def modules() -> dict[str, types.SimpleNamespace]:
  """Import name to facade: the only modules that a program can import."""
  # Here, and not on top: reading a prompt needs no jax.
  import jax  # pylint: disable=g-import-not-at-top
  import jax.numpy as jnp
  import jax.scipy.special

  from selfdev_jax.programs import torch_shim

  table = {
      "math": _facade(math),
      "functools": _pick(functools, ("partial", "reduce")),
      "itertools": _facade(itertools),
      "typing": _pick(typing, _TYPING),
      "jax.lax": _facade(jax.lax, linalg=_facade(jax.lax.linalg)),
      "jax.nn": _facade(jax.nn),
      "jax.numpy.linalg": _facade(jnp.linalg),
      "jax.numpy.fft": _facade(jnp.fft),
      "jax.random": _facade(jax.random),
      "jax.scipy.special": _facade(jax.scipy.special),
  }
  table["jax.numpy"] = _facade(
      jnp, linalg=table["jax.numpy.linalg"], fft=table["jax.numpy.fft"]
  )
  table["jax.scipy"] = types.SimpleNamespace(special=table["jax.scipy.special"])
  table["jax"] = _pick(
      jax,
      ("Array", "jit", "vmap"),
      **{
          name: table[f"jax.{name}"]
          for name in ("lax", "nn", "numpy", "random", "scipy")
      },
  )
  return table | torch_shim.module()


def _pick(module, names, **submodules):
  kept = {name: getattr(module, name) for name in names}
  return types.SimpleNamespace(**kept, **submodules)


def _facade(module, **submodules):
  """A copy of a module's public names, without its modules and file access."""
  names = [
      name
      for name in dir(module)
      if not name.startswith("_")
      and name not in FORBIDDEN_ATTRIBUTES
      and not isinstance(getattr(module, name), types.ModuleType)
  ]
  return _pick(module, names, **submodules)


def import_module(
    name: str, globals=None, locals=None, fromlist=(), level=0
) -> Any:
  """`__import__` for programs: a facade of `modules`, or an ImportError."""
  del globals, locals
  if isinstance(fromlist, list) and not fromlist and name in sys.modules:
    # PyImport_Import in C code that the program called: it takes the import
    # function of the calling frame, and ignores what that returns.
    return None
  if level or name not in modules():
    raise ImportError(f"a program cannot import {name!r}")
  return modules()[name if fromlist else name.partition(".")[0]]


def namespace() -> dict[str, Any]:
  """Fresh globals for one program: facades and the allowed builtins."""
  allowed = {name: getattr(builtins, name) for name in BUILTINS} | {
      "__import__": import_module
  }
  table = modules()
  return {
      "__builtins__": allowed,
      "__name__": "program",
      "jax": table["jax"],
      "jnp": table["jax.numpy"],
      "lax": table["jax.lax"],
      "math": table["math"],
      "torch": table["torch"],
  }


def is_torch_style(source: str) -> bool:
  """Whether a program is written in PyTorch: it imports or names torch.

  Args:
    source: text of a program that `sandbox.filter` has let pass.

  Returns:
    What `apply` takes as `torch_style`.
  """
  return any(_names_torch(node) for node in ast.walk(ast.parse(source)))


def _names_torch(node):
  if isinstance(node, ast.Import):
    names = [alias.name for alias in node.names]
  elif isinstance(node, ast.ImportFrom):
    names = [node.module or ""]
  else:
    return isinstance(node, ast.Name) and node.id == "torch"
  return any(name.partition(".")[0] == "torch" for name in names)


def apply(
    merge: Callable[..., Any],
    base: Any,
    task_vectors: Sequence[Any],
    torch_style: bool,
) -> Any:
  """Calls a program's entry.

  Args:
    merge: the function that the program defines.
    base: float32 array or tracer.
    task_vectors: arrays of base's shape and dtype.
    torch_style: the program expects torch's tensors and returns one.

  Returns:
    What the program returned, the array of it where that was a tensor.
  """
  if not torch_style:
    return merge(base, list(task_vectors))
  from selfdev_jax.programs import torch_shim  # Needs jax: see `modules`.

  tensors = [torch_shim.wrap(array) for array in (base, *task_vectors)]
  return torch_shim.unwrap(merge(tensors[0], tensors[1:]))
