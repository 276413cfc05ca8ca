"""One name for programs that compute the same: the digest of a block.

Every value is named by a hash of what computes it (a Merkle tree), so equal
subexpressions have one name, what the output does not use has no say, and
neither order nor numbering of the equations is seen. On top of that, operands
of commutative primitives are sorted, x + 0 and x * 1 are x (`sum` starts at
0), x ** 2 is x * x, and a > b is b < a.
"""

from collections.abc import Sequence
import functools
import hashlib
import json
from typing import NamedTuple

from selfdev_jax.sandbox import ir

_COMMUTATIVE = ir.words("""
    add mul max min and or xor eq ne
""")
_MIRRORED = {"gt": "lt", "ge": "le"}
# Neutral right operands; a commutative primitive takes them on the left too.
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}


class _Value(NamedTuple):
  """A value's name and shape, and its number if it is filled with one."""

  name: str
  aval: tuple | None
  number: float | None = None


def digest(program: ir.Program) -> str:
  """The name of a program over all its shapes.

  Args:
    program: its blocks have avals, see `ir.from_jaxpr`.

  Returns:
    64 hex digits. Equal digests: equal functions of the weights, but for the
    order of floating-point operands and the sign of zero.
  """
  names = sorted(
      [list(shape), _block(block)] for shape, block in program.leaves.items()
  )
  return _hash(["program", program.num_experts, names])


def _block(block):
  """The name of a block as a function of its inputs."""
  values = [
      _Value(_hash(["input", i]), _aval(block.avals[i]))
      for i in range(block.inputs)
  ]
  for equation in block.equations:
    first = len(values)
    avals = block.avals[first : first + equation.num_outputs]
    operands = [_operand(x, values) for x in equation.operands]
    values.extend(_apply(equation, operands, [_aval(a) for a in avals]))
  outputs = [_operand(x, values).name for x in block.outputs]
  return _hash(["block", block.inputs, outputs])


def _aval(aval):
  return aval.shape, aval.dtype


@functools.cache
def _name(dtype) -> str:
  # NumPy makes it anew each time, which is a tenth of verifying a program.
  return str(dtype)


def _operand(operand, values: Sequence[_Value]):
  if isinstance(operand, ir.Literal):
    value = operand.value
    return _Value(
        _hash(["literal", _name(value.dtype), repr(value.item())]),
        ((), value.dtype),
        value.item(),
    )
  return values[operand]


def _apply(equation, operands, avals):
  name = equation.name
  if len(avals) == 1:
    same = _neutral(name, operands, avals[0])
    if same:
      return [same]
  if name in ("scan", "cond"):
    params = _control(equation)
  else:
    params = ir.encode_params(equation)
  if (name == "integer_pow" and params["y"] == 2) or name == "square":
    name, params, operands = "mul", {}, operands * 2
  if name in _MIRRORED:
    name, operands = _MIRRORED[name], operands[::-1]
  names = [operand.name for operand in operands]
  if name in _COMMUTATIVE:
    names.sort()
  tree = [name, params, names]
  number = operands[0].number if name == "broadcast_in_dim" else None
  return [
      _Value(_hash([*tree, i]), aval, number) for i, aval in enumerate(avals)
  ]


def _neutral(name, operands, aval):
  """The operand that an equation only hands through, if there is one."""
  if name == "convert_element_type" and operands[0].aval == aval:
    return operands[0]
  if name not in _NEUTRAL:
    return None
  pairs = [operands]
  if name in _COMMUTATIVE:
    pairs.append(operands[::-1])
  for value, other in pairs:
    # `aval`: a scalar plus an array of zeros is no scalar.
    if other.number == _NEUTRAL[name] and value.aval == aval:
      return value
  return None


def _control(equation):
  """Parameters of a loop or a branch, its blocks by name."""
  params = dict(equation.params)
  if equation.name == "cond":
    return {"branches": [_block(b) for b in params["branches"]]}
  return params | {"jaxpr": _block(params["jaxpr"])}


def _hash(tree):
  text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()
