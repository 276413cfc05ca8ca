"""Decides whether program IR from the sandbox may run. It trusts nothing.

The IR's structure is checked by `ir.loads`. Here JAX itself infers every shape
and dtype by tracing the rebuilt program on abstract values, where nothing is
allocated, and the jaxpr that JAX made, not the one that was sent, is what is
costed, hashed and kept.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import numpy as np

from selfdev_jax import config as config_lib
from selfdev_jax.sandbox import canonical
from selfdev_jax.sandbox import ir
from selfdev_jax.sandbox import rebuild

# Small leaves are not held to a multiple of next to nothing.
_MIN_INPUT_BYTES = 1 << 16
# Loop bodies times trips: each trip has a cost of its own, however small.
_MAX_STEPS = 1_000_000
# An operation of a thousand operands takes a thousand times as long to trace.
_MAX_VALUES_PER_EQUATION = 10


class VerifyError(ValueError):
  """The program may not run.

  Attributes:
    code: a word, such as "flops" or "malformed".
    message: one sentence.
  """

  def __init__(self, code: str, message: str):
    super().__init__(message)
    self.code = code
    self.message = message


@dataclasses.dataclass(frozen=True)
class Verified:
  """A program that may run.

  Attributes:
    program: its JSON text, written anew from what JAX inferred.
    digest: of its canonical form.
    stats: "equations", "flops", "peak_bytes", "peak_multiple" (of its input)
      and "constants", each the largest over the shapes.
    blocks: of every shape, stand-ins among them, with avals.
  """

  program: str
  digest: str
  stats: dict[str, float]
  blocks: dict[tuple[int, ...], ir.Block] = dataclasses.field(
      default_factory=dict, compare=False
  )


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one run of a block costs."""

  flops: float = 0.0
  steps: float = 0.0  # Primitives that are run, every trip counted.
  peak_bytes: float = 0.0  # Live values, inputs included.


def verify(
    text: str | bytes,
    limits: config_lib.Sandbox,
    shapes: Sequence[tuple[int, ...]],
    num_experts: int,
    stand_ins: Sequence[tuple[int, ...]] = (),
) -> Verified:
  """Checks program IR from an untrusted source.

  Args:
    text: anything; an honest child sends `ir.dumps` of a program.
    limits: the cost bounds.
    shapes: the program has to have exactly one block for each.
    num_experts: number of task vectors.
    stand_ins: shapes that it may have a block for; checked like the others,
      and in `blocks` alone.

  Returns:
    The program as it may run.

  Raises:
    VerifyError: it may not. Nothing else is raised, whatever `text` is.
  """
  try:
    return _verify(text, limits, shapes, num_experts, stand_ins)
  except VerifyError:
    raise
  except MemoryError as error:
    raise VerifyError(
        "memory", "Checking the program took too much memory."
    ) from error
  except ir.IRError as error:
    raise VerifyError(error.code, error.message) from error
  except RecursionError as error:
    raise VerifyError(
        "malformed", "The program IR is nested too deeply."
    ) from (error)
  except Exception as error:
    # Shape and dtype rules of JAX raise what they like.
    reason = str(error).partition("\n")[0][:200]
    raise VerifyError(
        "ill_typed", f"JAX refuses the program: {reason}"
    ) from error


def _verify(text, limits, shapes, num_experts, stand_ins):
  if len(text) > limits.ir_bytes:
    raise VerifyError("ir_bytes", "The traced program is too large.")
  sent = ir.loads(text)
  found, needed = sent.leaves.keys(), set(shapes)
  if sent.num_experts != num_experts or not (
      needed <= found <= needed.union(stand_ins)
  ):
    raise VerifyError("malformed", "The program is for other shapes.")
  blocks, stats = {}, {}
  for shape, block in sent.leaves.items():
    blocks[shape], cost = _verify_leaf(block, shape, num_experts, limits)
    for key, value in cost.items() if shape in shapes else ():
      stats[key] = max(value, stats.get(key, 0))
  program = ir.Program(num_experts, {shape: blocks[shape] for shape in shapes})
  return Verified(ir.dumps(program), canonical.digest(program), stats, blocks)


def _verify_leaf(block, shape, num_experts, limits):
  # Counted before anything is traced: these bound the work below.
  equations, values, constants = _count(block).tolist()
  _bound("equations", equations, limits.max_equations, "operations")
  _bound(
      "equations",
      values,
      _MAX_VALUES_PER_EQUATION * limits.max_equations,
      "operands and results",
  )
  _bound("constants", constants, limits.max_constants, "elements in constants")
  closed, output = jax.make_jaxpr(
      lambda *arguments: rebuild.evaluate(block, arguments), return_shape=True
  )(*ir.specs(shape, num_experts))
  (result,) = output
  if result.shape != shape or result.dtype != np.float32:
    raise VerifyError(
        "output",
        f"The program returns {result.dtype}{list(result.shape)} for"
        f" a base of float32{list(shape)}.",
    )
  block = ir.from_jaxpr(closed, 4 * limits.max_equations + 100)
  cost = measure(block)
  input_bytes = 4.0 * math.prod(shape) * (1 + num_experts)
  multiple = cost.peak_bytes / max(input_bytes, _MIN_INPUT_BYTES)
  _bound("flops", cost.flops, limits.max_flops, "floating-point operations")
  _bound("loop_trips", cost.steps, _MAX_STEPS, "operations, loops unrolled")
  _bound(
      "memory",
      multiple,
      limits.max_peak_multiple,
      "times the memory of its input",
  )
  return block, {
      "equations": equations,
      "flops": cost.flops,
      "peak_bytes": cost.peak_bytes,
      "peak_multiple": round(multiple, 3),
      "constants": constants,
  }


def _bound(code, value, limit, what):
  if not value <= limit:
    raise VerifyError(
        code,
        f"The program needs {value:.4g} {what}; at most {limit:.4g} are"
        " allowed.",
    )


def _blocks(equation):
  """The blocks inside a loop or a branch."""
  params = equation.params
  if equation.name == "cond":
    return params["branches"]
  return (params["jaxpr"],) if equation.name == "scan" else ()


def _count(block):
  """Equations, values that go in or out, and elements of constants.

  Those of nested blocks are included; such a block counts as an equation, for
  it takes as long to trace even if it is empty.
  """
  counts = np.zeros(3, int)
  for equation in block.equations:
    counts += 1, len(equation.operands) + equation.num_outputs, 0
    if equation.name == "const":
      counts[2] += equation.params["value"].size
    for inner in _blocks(equation):
      counts += _count(inner)
      counts += 1, inner.inputs + len(inner.outputs), 0
  return counts


def measure(block: ir.Block) -> Cost:
  """Estimates what one run of a block costs.

  Args:
    block: with avals.

  Returns:
    FLOPs (an element touched counts as one), steps, and the peak of live
    values in program order; XLA's fusion may need less.
  """
  last_use = {}
  for i, equation in enumerate(block.equations):
    last_use.update((x, i) for x in equation.operands if isinstance(x, int))
  last_use.update(
      (x, len(block.equations)) for x in block.outputs if isinstance(x, int)
  )
  dies = {}
  for value, i in last_use.items():
    dies.setdefault(i, []).append(value)
  sizes = [_bytes(aval) for aval in block.avals]
  # Inputs are the caller's: they live throughout.
  live = sum(sizes[: block.inputs])
  flops, steps, peak, first = 0.0, 0.0, live, block.inputs
  for i, equation in enumerate(block.equations):
    outputs = range(first, first + equation.num_outputs)
    first += equation.num_outputs
    live += sum(sizes[x] for x in outputs)
    inner = _inner_cost(equation)
    flops += inner.flops + _flops(equation, block, outputs)
    steps += inner.steps + 1
    peak = max(peak, live + inner.peak_bytes)
    dead = [x for x in dies.get(i, ()) if x >= block.inputs]
    dead += [x for x in outputs if x not in last_use]
    live -= sum(sizes[x] for x in dead)
  return Cost(flops, steps, peak)


def _inner_cost(equation):
  costs = [measure(block) for block in _blocks(equation)]
  if not costs:
    return Cost()
  # An empty trip takes time too. Of branches, all are run under vmap.
  trips = equation.params["length"] if equation.name == "scan" else 1
  return Cost(
      trips * sum(c.flops for c in costs),
      trips * sum(c.steps + 1 for c in costs),
      max(c.peak_bytes for c in costs),
  )


def _bytes(aval):
  # A random key is two words.
  return _size(aval) * float(getattr(aval.dtype, "itemsize", 8))


def _size(aval):
  # XLA multiplies the other sizes before it sees the zero among them.
  return float(math.prod(max(size, 1) for size in aval.shape))


_CUMULATIVE = ir.words("cumlogsumexp cummax cummin cumprod cumsum")


def _flops(equation, block, outputs):
  """Operations of one equation, nested blocks left out."""
  operands = [block.avals[x] for x in equation.operands if isinstance(x, int)]
  results = sum(_size(block.avals[x]) for x in outputs)
  size = max([results, *map(_size, operands)])
  if equation.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    # Without axes to contract, the first operand may be a literal.
    depth = math.prod(operands[0].shape[axis] for axis in contracted)
    return 2.0 * depth * results + size
  if equation.name in ir.FACTORIZATIONS:
    return 20.0 * size * min(operands[0].shape[-2:]) + size
  if equation.name in ("sort", "top_k", "fft"):
    return 5.0 * size * max(1.0, math.log2(size))
  if equation.name in _CUMULATIVE:
    return 16.0 * size  # XLA makes a tree of windows of 16.
  return size
