"""Traces a program into IR. Runs generated Python: only in a zygote's child."""

from collections.abc import Sequence
import contextlib
import re
import traceback

import jax
import numpy as np

from selfdev_jax.programs import contract
from selfdev_jax.programs import torch_shim
from selfdev_jax.sandbox import filter as filter_lib
from selfdev_jax.sandbox import ir
from selfdev_jax.sandbox import paths as paths_lib

_FILENAME = "<program>"


class TraceError(ValueError):
  """A program that cannot be traced.

  Attributes:
    stage: "filter" or "trace".
    code: a word, such as "data_dependent" or "output"; see `_REASONS`.
    message: one sentence, with the line where there is one.
  """

  def __init__(self, stage: str, code: str, message: str):
    super().__init__(message)
    self.stage = stage
    self.code = code
    self.message = message


def trace(
    source: str,
    shapes: list[tuple[int, ...]],
    num_experts: int,
    max_equations: int,
    stand_ins: Sequence[tuple[int, ...]] = (),
) -> str:
  """Filters a program and traces it once for every shape.

  Args:
    source: Python text.
    shapes: of `base`, without repetition.
    num_experts: length of `task_vectors`.
    max_equations: more are refused, counted per shape.
    stand_ins: other shapes; those that the program cannot do are left out.

  Returns:
    JSON text of an `ir.Program`, not yet verified.

  Raises:
    TraceError: the program is refused, or failed.
  """
  try:
    filter_lib.check(source)
    code = compile(source, _FILENAME, "exec", dont_inherit=True)
    torch_style = contract.is_torch_style(source)
  except filter_lib.FilterError as error:
    raise TraceError("filter", error.code, error.message) from None
  except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
    raise TraceError("filter", "syntax", f"{_first_line(error)}.") from None
  leaves = {
      shape: _trace_shape(code, torch_style, shape, num_experts, max_equations)
      for shape in shapes
  }
  for shape in stand_ins:
    with contextlib.suppress(TraceError):
      leaves[shape] = _trace_shape(
          code, torch_style, shape, num_experts, max_equations
      )
  try:
    return ir.dumps(ir.Program(num_experts, leaves))
  except ir.IRError as error:  # A dtype or a parameter that IR lacks.
    raise TraceError("trace", error.code, error.message) from None


def _trace_shape(code, torch_style, shape, num_experts, max_equations):
  paths = paths_lib.Paths(ir.specs(shape, num_experts))

  def run(base, *task_vectors):
    # The module level runs under the trace too: constants made there become
    # part of the program, and no JAX backend is ever needed. It runs anew on
    # every path, which so finds no state that another has left.
    namespace = contract.namespace()
    exec(code, namespace)  # pylint: disable=exec-used
    merged = contract.apply(
        namespace[contract.ENTRY], base, task_vectors, torch_style
    )
    _check_output(merged, shape)
    return merged

  try:
    # What a program's author expects of jnp, whatever this process is set to.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
      return paths.trace(run, max_equations)
  except TraceError:
    raise
  except ir.IRError as error:
    raise TraceError("trace", error.code, error.message) from None
  except paths_lib.PathError as error:
    raise TraceError(
        "trace", error.code, _where(error) + error.message
    ) from None
  # SystemExit and KeyboardInterrupt too: a program may raise them.
  except BaseException as error:  # pylint: disable=broad-exception-caught
    raise _explain(error, shape, paths.forked) from None


def _check_output(merged, shape):
  if not isinstance(merged, (jax.Array, np.ndarray)):
    raise TraceError(
        "trace",
        "output",
        f"merge returned {_kind(merged)}; it has to return"
        " one array of base's shape.",
    )
  if merged.shape != shape:
    raise TraceError(
        "trace",
        "output_shape",
        "merge returned an array of shape"
        f" {merged.shape} for a base of shape {shape}; the shapes have to be"
        " equal.",
    )
  if merged.dtype != np.float32:
    raise TraceError(
        "trace",
        "output_dtype",
        f"merge returned {merged.dtype}; it has to return float32.",
    )


def _kind(value):
  return "None" if value is None else f"a {type(value).__name__}"


_MAX_CHARS = 160
_LIST = (
    "task_vectors is a list of arrays, and jnp.stack(task_vectors) is one array"
)
# What an exception means to someone who wrote the program: its types, what its
# text has to match, a code, and a sentence where its own ({}) will not do. The
# first that fits is taken.
_REASONS = (
    (
        jax.errors.TracerBoolConversionError,
        "",
        "data_dependent_if",
        "a condition depends on tensor values inside a function that JAX"
        " transforms (jit, vmap, a loop's body); use jnp.where(condition, a, b)"
        " there.",
    ),
    (  # What `if` on a whole array raises, before it is traced.
        ValueError,
        "truth value of an",
        "data_dependent_if",
        "a condition is a whole array; use jnp.where(condition, a, b) instead"
        " of if, jnp.maximum instead of max, or condition.any() or .all().",
    ),
    (
        (
            jax.errors.ConcretizationTypeError,
            jax.errors.TracerArrayConversionError,
            jax.errors.TracerIntegerConversionError,
            jax.errors.NonConcreteBooleanIndexError,
        ),
        "",
        "data_dependent",
        "a Python number (float(), int(), .item()), a shape or a mask index"
        " depends on tensor values; keep it an array, and use jnp.where for"
        " masks.",
    ),
    (
        jax.errors.UnexpectedTracerError,
        "",
        "leak",
        "an array made inside a function that JAX transforms (jit, vmap, a"
        " loop's body) is used outside; return it from that function.",
    ),
    (RecursionError, "", "recursion", "the recursion never ends."),
    (MemoryError, "", "memory", "out of memory."),
    (torch_shim.AliasingError, "", "aliasing", "{}"),
    (
        TypeError,
        "arrays are immutable",
        "immutable",
        "arrays cannot be changed in place; write x = x.at[i].set(v) instead of"
        " x[i] = v.",
    ),
    (
        (TypeError, ValueError, RuntimeError),
        r"(?i)\b(shape|ax[ie]s|dimension|size)s?\b",
        "shape",
        None,
    ),
    (NameError, "", "name", None),
    (ImportError, "", "import", None),
    (AttributeError, "", "attribute", None),
    (LookupError, "", "index", None),
    (ArithmeticError, "", "arithmetic", None),
    (AssertionError, "", "assertion", None),
    (NotImplementedError, "", "unsupported", None),
    (TypeError, "", "type", None),
    (ValueError, "", "value", None),
    (RuntimeError, "", "runtime", None),
    (BaseException, "", "exception", None),
)
# What to do, by what the exception says.
_HINTS = (
    (r"^NameError", "jnp, jax, lax, math and torch need no import"),
    (r"^AttributeError: an array", "torch's names need import torch"),
    (
        r"keyword argument '(keep)?dim'",
        "jnp says axis and keepdims, not dim and keepdim",
    ),
    (r"^(Type|Attribute)Error.*\b(list|sequence)\b", _LIST),
)


def _explain(error, shape, branched):
  """A TraceError in the words of someone who wrote the program."""
  where, message = _where(error), _first_line(error)
  code, sentence = next(
      (code, sentence)
      for types, pattern, code, sentence in _REASONS
      if isinstance(error, types) and re.search(pattern, message)
  )
  if sentence is not None:
    sentence = sentence.format(message)
  else:
    sentence = f"{type(error).__name__}: {_rename(error, message)}"
    hints = [hint for pattern, hint in _HINTS if re.search(pattern, sentence)]
    if code in ("shape", "index"):
      hints.append(f"base has shape {shape}")
    if branched:
      hints.append(
          "both branches of a condition on tensor values are traced, and"
          " neither may raise"
      )
    if hints:
      # Messages are cut later: not the hints, which come last.
      sentence = "; ".join([sentence[:_MAX_CHARS].rstrip("."), *hints]) + "."
  return TraceError("trace", code, where + sentence)


def _rename(error, message):
  """Says what JAX and our facades call otherwise."""
  if isinstance(error, AttributeError) and isinstance(error.obj, jax.Array):
    return f"an array has no attribute {error.name!r}"
  if isinstance(error, AttributeError) and "SimpleNamespace" in message:
    for name, module in contract.modules().items():
      if error.obj is module:
        return f"{name} has no attribute {error.name!r}"
  return re.sub(r"\b\w+Tracer\b", "array", message)


def _where(error):
  """The innermost line of the program that the error passed through."""
  try:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__, limit=-200)
        if frame.filename == _FILENAME
    ]
  except Exception:  # pylint: disable=broad-exception-caught
    lines = []  # The exception is the program's own object.
  return f"line {lines[-1]}: " if lines else ""


def _first_line(error):
  try:
    return str(error).strip().partition("\n")[0]
  except Exception:  # pylint: disable=broad-exception-caught
    return "an exception without a message"
