"""Traces a program into IR. Runs generated Python: only in a zygote's child."""

import traceback

import jax
import numpy as np

from selfdev_jax.programs import contract
from selfdev_jax.sandbox import filter as filter_lib
from selfdev_jax.sandbox import ir

_FILENAME = "<program>"


class TraceError(ValueError):
  """A program that cannot be traced.

  Attributes:
    stage: "filter" or "trace".
    code: a word, such as "data_dependent" or "output".
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
) -> str:
  """Filters a program and traces it once for every shape.

  Args:
    source: Python text.
    shapes: of `base`, without repetition.
    num_experts: length of `task_vectors`.
    max_equations: more are refused, counted per shape.

  Returns:
    JSON text of an `ir.Program`, not yet verified.

  Raises:
    TraceError: the program is refused, or failed.
  """
  try:
    filter_lib.check(source)
    code = compile(source, _FILENAME, "exec", dont_inherit=True)
  except filter_lib.FilterError as error:
    raise TraceError("filter", error.code, error.message) from None
  except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
    raise TraceError("filter", "syntax", f"{_first_line(error)}.") from None
  leaves = {
      shape: _trace_shape(code, shape, num_experts, max_equations)
      for shape in shapes
  }
  return ir.dumps(ir.Program(num_experts, leaves))


def _trace_shape(code, shape, num_experts, max_equations):
  def call(base, *task_vectors):
    # The module level runs under the trace too: constants made there become
    # part of the program, and no JAX backend is ever needed.
    namespace = contract.namespace()
    exec(code, namespace)  # pylint: disable=exec-used
    merged = namespace[contract.ENTRY](base, list(task_vectors))
    _check_output(merged, shape)
    return merged

  try:
    # What a program's author expects of jnp, whatever this process is set to.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
      closed = jax.make_jaxpr(call)(*ir.specs(shape, num_experts))
    return ir.from_jaxpr(closed, max_equations)
  except TraceError:
    raise
  except ir.IRError as error:
    raise TraceError("trace", error.code, error.message) from None
  # SystemExit and KeyboardInterrupt too: a program may raise them.
  except BaseException as error:  # pylint: disable=broad-exception-caught
    raise _explain(error) from None


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
        f"merge returned {merged.dtype}; it has to" " return float32.",
    )


def _kind(value):
  return "None" if value is None else f"a {type(value).__name__}"


def _explain(error):
  """A TraceError in the words of someone who wrote the program."""
  where, message = _where(error), _first_line(error)
  # The second is what `if` on a whole array raises, before it is traced.
  if isinstance(error, jax.errors.TracerBoolConversionError) or (
      isinstance(error, ValueError) and "truth value of an array" in message
  ):
    return TraceError(
        "trace",
        "data_dependent_if",
        f"{where}a condition depends on tensor"
        " values; use jnp.where(condition, a, b) instead of if, and jnp.maximum"
        " instead of max.",
    )
  if isinstance(
      error,
      (
          jax.errors.ConcretizationTypeError,
          jax.errors.TracerArrayConversionError,
          jax.errors.TracerIntegerConversionError,
          jax.errors.NonConcreteBooleanIndexError,
      ),
  ):
    return TraceError(
        "trace",
        "data_dependent",
        f"{where}a Python number, a shape or a mask"
        " index depends on tensor values; keep it a jnp array, and use"
        " jnp.where for masks.",
    )
  if isinstance(error, RecursionError):
    return TraceError("trace", "recursion", f"{where}the recursion never ends.")
  if isinstance(error, MemoryError):
    return TraceError("trace", "memory", f"{where}out of memory.")
  return TraceError(
      "trace", "exception", f"{where}{type(error).__name__}:" f" {message}"
  )


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
