"""From program IR back to a JAX function, one primitive at a time."""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.extend.core.primitives as jex_primitives
import jax.numpy as jnp
import numpy as np

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
    ir.IRError: a primitive returned another number of values than declared,
      or an array larger than the IR can say.
    Exception: whatever JAX raises where shapes or dtypes do not fit.
  """
  values = list(arguments)

  def read(operand):
    if isinstance(operand, ir.Literal):
      return literal(operand)
    return values[operand]

  for equation in block.equations:
    operands = [read(operand) for operand in equation.operands]
    outputs = apply(equation, operands)
    if len(outputs) != equation.num_outputs:
      raise ir.IRError(
          "malformed",
          f"The program IR is malformed: {equation.name} gives"
          f" {len(outputs)} values.",
      )
    # At once: the next one might compute with sizes that overflow.
    for x in outputs:
      if x.ndim > ir.MAX_RANK or max(x.shape, default=0) > ir.MAX_SIZE:
        raise ir.IRError(
            "memory", "The program makes an array that is too large."
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


def apply(equation, operands):
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


# Random keys may be moved and used; no other primitive can be relied on to
# refuse them before it is lowered.
_TAKE_KEYS = ir.words("""
    broadcast_in_dim concatenate cond dynamic_slice dynamic_update_slice gather
    random_bits random_fold_in random_split random_unwrap reshape rev scan
    select_n slice split squeeze stack transpose unstack
""")
# What LAPACK has, and JAX lowers: no halves, though their types pass.
_LAPACK = (jnp.float32, jnp.complex64)


def _check(equation, operands):
  """Raises ValueError for what `bind`, unlike jnp, takes unseen."""
  name, params = equation.name, equation.params
  avals = [jax.typeof(x) for x in operands]
  # Keys alone have a type that is none of NumPy's; issubdtype is slow.
  are_keys = [not isinstance(x.dtype, np.dtype) for x in avals]

  def require(condition, what):
    if not condition:
      raise ValueError(f"{name} {what}")

  require(name in _TAKE_KEYS or not any(are_keys), "takes no random key")
  match name:
    case "reshape":
      same = math.prod(params["new_sizes"]) == math.prod(avals[0].shape)
      require(same, "changes the number of elements")
    case "dynamic_slice":
      one_each = len(avals) == 1 + avals[0].ndim
      require(one_each, "takes one index per axis")
    case "cond":
      index = avals[0]
      is_index = index.shape == () and index.dtype == jnp.int32
      require(is_index, "takes an int32 scalar as its index")
    case "sort":
      require(params["num_keys"] <= len(avals), "has fewer operands than keys")
    case "argmax" | "argmin":
      is_ordered = not jnp.issubdtype(avals[0].dtype, jnp.complexfloating)
      require(is_ordered, "takes no complex numbers")
    case "cumlogsumexp":
      is_inexact = jnp.issubdtype(avals[0].dtype, jnp.inexact)
      require(is_inexact, "takes no integers")
    case "fft":
      _check_fft(avals[0].shape, require, **params)
    case "threefry2x32":
      key0, key1, count0, count1 = (x.shape for x in avals)
      are_pairs = key0 == key1 and count0 == count1
      require(are_pairs, "takes pairs of one shape")
    case "random_seed":
      is_integer = jnp.issubdtype(avals[0].dtype, jnp.integer)
      require(is_integer, "takes an integer")
    case "random_bits" | "random_split" | "random_fold_in":
      require(are_keys == [True] + [False] * (len(avals) - 1), "takes one key")
  if name in ir.FACTORIZATIONS:
    require(all(x.dtype in _LAPACK for x in avals), "takes float32")
    if name == "householder_product":
      batches = {avals[0].shape[:-2], avals[1].shape[:-1]}
    else:
      batches = {x.shape[:-2] for x in avals}
    require(len(batches) == 1, "takes batches of one shape")
  for key in ("axes", "axis", "dimension", "dimensions"):
    if key not in params or not operands:
      continue  # `iota` has no operand, and its own function checks it.
    axes = params[key]
    axes = (axes,) if isinstance(axes, int) else axes
    rank = avals[0].ndim + (name == "stack")
    distinct = len(set(axes)) == len(axes)
    require(
        distinct and all(axis < rank for axis in axes), f"lacks axes {axes}"
    )
  # It makes a value for each entry of the axis before they can be counted.
  if name == "unstack" and (
      avals[0].shape[params["axis"]] != equation.num_outputs
  ):
    raise ir.IRError("malformed", "The program IR is malformed: unstack.")


def _check_fft(shape, require, *, fft_type, fft_lengths):
  require(1 <= len(fft_lengths) <= 3, "has one to three axes")
  if fft_type == lax.FftType.IRFFT:
    half = fft_lengths[-1] // 2 + 1
    require(shape[-1:] == (half,), f"takes {half} frequencies")


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
    "conj": _one(lax.conj),
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
    "scatter-sub": _scatter(lax.scatter_sub),
    "scatter-mul": _scatter(lax.scatter_mul),
    "scatter-min": _scatter(lax.scatter_min),
    "scatter-max": _scatter(lax.scatter_max),
    "random_seed": _one(lambda seed: jax.random.key(seed, impl=_IMPL)),
    "random_wrap": _one(lambda x: jax.random.wrap_key_data(x, impl=_IMPL)),
    "random_unwrap": _one(jax.random.key_data),
    "scan": _scan,
    "cond": _cond,
}
