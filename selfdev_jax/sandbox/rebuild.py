"""From program IR back to a JAX function, one primitive at a time."""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.extend.core.primitives as jex_primitives
import jax.numpy as jnp

from selfdev_jax.sandbox import ir

_IMPL = "threefry2x32"


def evaluate(
    block: ir.Block,
    arguments: Sequence[Any],
    literal: Callable[[ir.Literal], Any] = lambda literal: literal.value,
) -> list[Any]:
  """Runs a block on arrays or tracers.

  Args:
    block: the code.
    arguments: one value per input.
    literal: what a literal of the block itself stands for; called in order of
      equations and operands.

  Returns:
    One value per output.

  Raises:
    ir.IRError: a primitive returned another number of values than declared.
    Exception: whatever JAX raises where shapes or dtypes do not fit.
  """
  values = list(arguments)

  def read(operand):
    if isinstance(operand, ir.Literal):
      return literal(operand)
    return values[operand]

  for equation in block.equations:
    operands = [read(operand) for operand in equation.operands]
    outputs = _apply(equation, operands)
    if len(outputs) != equation.num_outputs:
      raise ir.IRError(
          "malformed",
          f"The program IR is malformed: {equation.name} gives"
          f" {len(outputs)} values.",
      )
    values.extend(outputs)
  return [read(operand) for operand in block.outputs]


def build(program: str) -> Callable[[Any, Sequence[Any]], Any]:
  """The merge function of an admitted program.

  Args:
    program: `Admitted.program`, JSON text that the verifier has passed.

  Returns:
    merge(base, task_vectors): `base` float32 of one of the program's shapes,
    `task_vectors` as many float32 arrays of that shape as it was made for;
    returns float32 of that shape. Works under jit, and under vmap over a
    stacked layer axis. A ValueError names a shape that it was not made for.

  Raises:
    ir.IRError: `program` is not program IR.
  """
  decoded = ir.loads(program)

  def merge(base, task_vectors):
    shape = tuple(jnp.shape(base))
    if shape not in decoded.leaves:
      raise ValueError(f"the program was not admitted for shape {shape}")
    arguments = [base, *task_vectors]
    if len(arguments) != 1 + decoded.num_experts:
      raise ValueError(
          f"the program takes {decoded.num_experts} task vectors, not"
          f" {len(arguments) - 1}"
      )
    if any(
        jnp.shape(x) != shape or jnp.result_type(x) != jnp.float32
        for x in arguments
    ):
      raise ValueError(f"the program takes float32 arrays of shape {shape}")
    (merged,) = evaluate(decoded.leaves[shape], arguments)
    return jnp.asarray(merged)

  return merge


def _apply(equation, operands):
  """The outputs of one equation, as a sequence."""
  _check(equation, operands)
  special = _SPECIAL.get(equation.name)
  if special:
    return special(*operands, **equation.params)
  # Absent parameters have one meaning, JAX's default: ir.PRIMITIVES.
  params = dict(equation.params)
  for key, codec in ir.PRIMITIVES[equation.name].items():
    if codec.omit:
      params[key] = _OMITTED.get((equation.name, key))
  primitive = getattr(jex_primitives, f"{equation.name}_p")
  outputs = primitive.bind(*operands, **params)
  return outputs if primitive.multiple_results else [outputs]


def _check(equation, operands):
  """Raises ValueError for what `bind`, unlike jnp, takes unseen."""
  name, params = equation.name, equation.params
  if name == "reshape" and (
      math.prod(params["new_sizes"]) != jnp.size(operands[0])
  ):
    raise ValueError("reshape changes the number of elements")
  if name == "dynamic_slice" and len(operands) != 1 + jnp.ndim(operands[0]):
    raise ValueError("dynamic_slice takes one index per axis")
  if name == "cond" and jnp.shape(operands[0]):
    raise ValueError("the index of cond is no scalar")
  for key in ("axes", "axis", "dimension", "dimensions"):
    if key not in params or not operands:
      continue  # `iota` has no operand, and its own function checks it.
    axes = params[key]
    axes = (axes,) if isinstance(axes, int) else axes
    rank = jnp.ndim(operands[0]) + (name == "stack")
    if len(set(axes)) < len(axes) or any(axis >= rank for axis in axes):
      raise ValueError(f"{name} has no axes {axes}")
  # It makes a value for each entry of the axis before they can be counted.
  if name == "unstack" and (
      jnp.shape(operands[0])[params["axis"]] != equation.num_outputs
  ):
    raise ir.IRError("malformed", "The program IR is malformed: unstack.")


_OMITTED = {
    ("convert_element_type", "weak_type"): False,
    ("qr", "pivoting"): False,
}


def _one(function):
  return lambda *operands, **params: [function(*operands, **params)]


def _many(function):
  return lambda *operands, **params: list(function(*operands, **params))


def _scatter(function):
  def apply(operand, indices, updates, *, dimension_numbers, **params):
    return [function(operand, indices, updates, dimension_numbers, **params)]

  return apply


def _scan(*operands, jaxpr, length, reverse, num_consts, num_carry):
  consts = operands[:num_consts]
  carry = operands[num_consts : num_consts + num_carry]

  def body(carry, xs):
    outputs = evaluate(jaxpr, [*consts, *carry, *(xs or ())])
    return tuple(outputs[:num_carry]), tuple(outputs[num_carry:])

  xs = operands[num_consts + num_carry :]
  carry, ys = lax.scan(
      body, tuple(carry), tuple(xs) or None, length, reverse=reverse
  )
  return [*carry, *ys]


def _cond(index, *operands, branches):
  # Bound as it was: lax.switch would clamp the index once more every time.
  avals = [jax.typeof(x) for x in operands]
  closed = tuple(
      jax.make_jaxpr(lambda *xs, block=block: evaluate(block, xs))(*avals)
      for block in branches
  )
  if any(c.out_avals != closed[0].out_avals for c in closed):
    raise TypeError("the branches of cond return different types")
  return jex_primitives.cond_p.bind(index, *operands, branches=closed)


# Primitives that jax.extend does not export, or whose parameters hold objects
# that JAX makes itself: reached through the public function that emits them.
_SPECIAL = {
    "const": _one(lambda *, value: jnp.asarray(value)),
    "iota": _one(
        lambda *, dtype, shape, dimension: lax.broadcasted_iota(
            dtype, shape, dimension
        )
    ),
    "stack": _one(lambda *xs, axis: jnp.stack(xs, axis)),
    "unstack": _many(lambda x, *, axis: jnp.unstack(x, axis=axis)),
    "tile": _one(lambda x, *, reps: jnp.tile(x, reps)),
    "split": _many(lax.split),
    "scatter": _scatter(lax.scatter),
    "scatter-add": _scatter(lax.scatter_add),
    "scatter-mul": _scatter(lax.scatter_mul),
    "scatter-min": _scatter(lax.scatter_min),
    "scatter-max": _scatter(lax.scatter_max),
    "lu_pivots_to_permutation": _one(lax.linalg.lu_pivots_to_permutation),
    "random_seed": _one(lambda seed: jax.random.key(seed, impl=_IMPL)),
    "random_wrap": _one(lambda x: jax.random.wrap_key_data(x, impl=_IMPL)),
    "random_unwrap": _one(jax.random.key_data),
    "scan": _scan,
    "cond": _cond,
}
