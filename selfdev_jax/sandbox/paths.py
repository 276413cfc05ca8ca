"""Traces Python's own `if` on tensor values: every path, joined by selects.

Under a trace a condition has no answer yet. Here it gets one: True at first;
then the function is traced again, from its start, with the last True turned
into False, and so on until every path was taken, depth first. What the two
halves of a condition return is joined by the primitive of jnp.where. So
`max(a, b)`, `sorted(..., key=...)`, `and` and early returns work too.

All paths are written into one block, every value once. So it is known which
conditions are the same: one that was answered on this path is not asked again,
and a function that does not repeat itself is found out.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import json
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np

from selfdev_jax.sandbox import ir

MAX_PATHS = 64


class PathError(Exception):
  """The paths cannot be joined.

  Attributes:
    code: a word, such as "paths".
    message: one sentence.
  """

  def __init__(self, code: str, message: str):
    super().__init__(message)
    self.code = code
    self.message = message


@dataclasses.dataclass
class _Decision:
  """A condition on the current path.

  Attributes:
    condition: its value in the joined block.
    aval: of that value.
    answer: the half that the path is in; True comes first.
    forced: there is no other half.
    merged: what the True half has returned.
  """

  condition: int | ir.Literal
  aval: Any
  answer: bool = True
  forced: bool = False
  merged: int | ir.Literal | None = None


class Paths:
  """The paths through one function."""

  def __init__(self, specs: Sequence[Any]):
    """Takes what the function is traced on: its arguments' avals."""
    self._specs = specs
    self._joined = _Writer(len(specs))
    self._decisions: list[_Decision] = []
    self._forks = 0  # There is one path more.

  @property
  def forked(self) -> bool:
    """Whether the function has come to a condition on tensor values."""
    return bool(self._decisions)

  def trace(self, function: Callable[..., Any], max_equations: int) -> ir.Block:
    """Traces every path.

    Args:
      function: of arrays, returns an array of one shape and dtype. It is called
        at least once for each path, and has to do the same when it gets the
        same answers.
      max_equations: more are refused, on each path.

    Returns:
      A block with one output, and with avals if there was only one path.

    Raises:
      PathError: there are more than MAX_PATHS, or `function` does not repeat.
      ir.IRError: a path cannot be written as IR.
      BaseException: what `function` raises, on whichever path.
    """
    while True:
      asked, error, closed = self._trace_path(function)
      block = ir.from_jaxpr(closed, max_equations)
      if error is None and not asked and not self._decisions:
        return block
      values = self._joined.inline(block)
      avals = [
          block.avals[x] if isinstance(x, int) else None for x in block.outputs
      ]
      conditions = list(zip(values, avals, strict=True))[: len(asked)]
      if not self._follow(conditions):
        continue
      if error is not None:
        raise error
      merged = self._join(values[-1])
      if merged is not None:
        return self._joined.block(merged)

  def _trace_path(self, function):
    """Runs once; returns conditions, error, and a jaxpr with what it has."""
    asked, errors = [], []

    def answer(tracer, ask):
      # Conditions of an inner trace (jit, vmap, scan) differ by element or by
      # trip: JAX refuses these, arrays of several elements, and random keys.
      if (
          tracer.size != 1
          or not isinstance(tracer.dtype, np.dtype)
          or jex_core.get_opaque_trace_state() != state
      ):
        return ask(tracer)
      index = next((i for i, x in enumerate(asked) if x is tracer), len(asked))
      if index == len(asked):
        new = index - len(self._decisions)
        # An endless `while` ends here too, on its very first path.
        if new >= 0 and self._forks + new + 2 > MAX_PATHS:
          errors.append(_too_many())
          raise errors[0]
        asked.append(tracer)
      known = index < len(self._decisions)
      return self._decisions[index].answer if known else True

    def call(*arguments):
      nonlocal state
      state = jex_core.get_opaque_trace_state()
      try:
        with _answering(answer):
          merged = function(*arguments)
        return asked if errors else [*asked, merged]
      except BaseException as error:  # A program may raise what it likes.
        errors.append(error)
        return asked

    state = None
    closed = jax.make_jaxpr(call)(*self._specs)
    # The first: a program may have caught ours.
    return asked, errors[0] if errors else None, closed

  def _follow(self, conditions):
    """Extends the decisions by a path; False where no input leads there."""
    if len(conditions) < len(self._decisions):
      raise _not_repeated()
    for i, (condition, aval) in enumerate(conditions):
      if i < len(self._decisions):
        if condition != self._decisions[i].condition:
          raise _not_repeated()
        continue
      answer = self._known(condition)
      forced = answer is not None
      self._decisions.append(
          _Decision(condition, aval, answer is not False, forced)
      )
      if not forced:
        self._forks += 1
      elif not answer:
        return False
    return True

  def _known(self, condition):
    """The answer to a condition that is no question, None for the others."""
    if isinstance(condition, ir.Literal):
      return bool(condition.value)
    for decision in self._decisions:
      if decision.condition == condition:
        return decision.answer
    return None

  def _join(self, merged):
    """Turns to the next path; returns the joined value if there is none."""
    while self._decisions:
      decision = self._decisions[-1]
      if decision.answer and not decision.forced:
        decision.answer, decision.merged = False, merged
        return None
      if not decision.forced:
        merged = self._select(decision, merged)
      self._decisions.pop()
    return merged

  def _select(self, decision, otherwise):
    """jnp.where(condition, merged, otherwise)."""
    if decision.merged == otherwise:
      return otherwise
    condition, dtype = decision.condition, decision.aval.dtype
    if dtype.name != "bool":
      zero = ir.Literal(dtype.type(0))
      condition = self._joined.add("ne", (condition, zero), {})
    if decision.aval.shape:
      condition = self._joined.add("reshape", (condition,), {"new_sizes": ()})
    return self._joined.add(
        "select_n", (condition, otherwise, decision.merged), {}
    )


class _Writer:
  """A block that grows, with one equation for all that compute the same."""

  def __init__(self, inputs):
    self._inputs = inputs
    self._equations = {}  # By what they compute: first output, equation.
    self._size = inputs

  def add(self, name, operands, params, num_outputs=1):
    """Appends an equation unless it is there; returns its first output."""
    equation = ir.Equation(name, tuple(operands), params, num_outputs)
    key = _key(equation)
    if key not in self._equations:
      self._equations[key] = self._size, equation
      self._size += num_outputs
    return self._equations[key][0]

  def inline(self, block):
    """Appends a block of the same inputs; returns its outputs."""
    values = list(range(block.inputs))
    for equation in block.equations:
      operands = _renumber(equation.operands, values)
      first = self.add(
          equation.name, operands, equation.params, equation.num_outputs
      )
      values.extend(range(first, first + equation.num_outputs))
    return _renumber(block.outputs, values)

  def block(self, output):
    """The block that computes one value, and nothing else."""
    needed, kept = {output}, []
    for first, equation in reversed(self._equations.values()):
      outputs = range(first, first + equation.num_outputs)
      if not needed.isdisjoint(outputs):
        kept.append((outputs, equation))
        needed.update(x for x in equation.operands if isinstance(x, int))
    numbers = {i: i for i in range(self._inputs)}
    equations = []
    for outputs, equation in reversed(kept):
      operands = tuple(_renumber(equation.operands, numbers))
      equations.append(equation._replace(operands=operands))
      numbers.update((x, len(numbers) + i) for i, x in enumerate(outputs))
    outputs = tuple(_renumber([output], numbers))
    return ir.Block(self._inputs, tuple(equations), outputs)


def _renumber(operands, numbers):
  return [x if isinstance(x, ir.Literal) else numbers[x] for x in operands]


def _key(equation):
  """Equal for equations that compute the same."""
  if equation.name == "const":  # It may be long, and JSON is slow.
    value = equation.params["value"]
    return str(value.dtype), value.shape, value.tobytes()
  return json.dumps(ir.encode_block(ir.Block(0, (equation,), ())))


@contextlib.contextmanager
def _answering(answer):
  """Has `answer(tracer, ask)` say what is true. Not thread-safe."""
  ask = jax.core.Tracer.__bool__
  jax.core.Tracer.__bool__ = lambda tracer: answer(tracer, ask)
  try:
    yield
  finally:
    jax.core.Tracer.__bool__ = ask


def _too_many():
  return PathError(
      "paths",
      f"conditions on tensor values lead to more than {MAX_PATHS} paths through"
      " the program; use jnp.where(condition, a, b) instead of if, jnp.maximum"
      " instead of max, and a for loop instead of while.",
  )


def _not_repeated():
  return PathError(
      "unrepeatable",
      "the program does not do the same every time it is run, as conditions on"
      " tensor values need; use jnp.where(condition, a, b) instead.",
  )
