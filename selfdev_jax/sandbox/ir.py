"""The program IR: a jaxpr as data, and its JSON form.

A `Block` is straight-line code in static single assignment. Values are
numbered: the inputs first, then every output of every equation, in order, so
an operand that was not yet computed cannot even be written. An operand is such
a number or a scalar literal. `scan` and `cond` hold nested blocks; calls
(`jit`, custom derivatives, checkpointing) are inlined. In JSON:

    block    = {"inputs": n, "equations": [equation...],
                "outputs": [operand...]}
    equation = [primitive, [operand...], {parameter: ...}, number of outputs]
    operand  = n | [dtype, number, boolean, "nan", "inf", "-inf" or [re, im]]
    program  = {"version": 1, "num_experts": n,
                "leaves": [{"shape": [...], "block": block}...]}

Parameters are spelled out by a codec per primitive. What is not in
`PRIMITIVES` does not exist here, in either direction: it is refused by name.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
import math
import operator
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

VERSION = 1
MAX_SIZE = 2**31  # No dimension, axis or length is larger.
_MAX_NESTING = 8  # Loops within loops.
MAX_RANK = 16


class IRError(ValueError):
  """The program cannot be written as IR, or the IR is malformed.

  Attributes:
    code: a word, such as "primitive" or "malformed".
    message: one sentence.
  """

  def __init__(self, code: str, message: str):
    super().__init__(message)
    self.code = code
    self.message = message


class Literal(NamedTuple):
  """A scalar operand; `value` is a NumPy scalar of a strong dtype."""

  value: np.generic


class Equation(NamedTuple):
  """One primitive applied; its outputs are numbered by its place."""

  name: str
  operands: tuple[int | Literal, ...]
  params: dict[str, Any]
  num_outputs: int


@dataclasses.dataclass(frozen=True)
class Block:
  """Straight-line code.

  Attributes:
    inputs: how many values it is given.
    equations: in order.
    outputs: operands.
    avals: shape and dtype of every value by its number. Only on blocks that
      were read from a jaxpr, never on those from JSON.
  """

  inputs: int
  equations: tuple[Equation, ...]
  outputs: tuple[int | Literal, ...]
  avals: tuple[Any, ...] | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Program:
  """A merge function for every leaf shape: shape to Block."""

  num_experts: int
  leaves: dict[tuple[int, ...], Block]


def words(text):
  """The words of a text, as a set."""
  return frozenset(text.split())


def _malformed(what):
  return IRError("malformed", f"The program IR is malformed: {what}.")


# --- Scalars -----------------------------------------------------------------

_DTYPES = {name: jnp.dtype(name) for name in words("""
        bool int8 int16 int32 uint8 uint16 uint32 float16 bfloat16 float32
        complex64
    """)}


# NumPy makes a dtype's name anew each time, which takes longer than all else.
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _encode_dtype(dtype):
  try:
    return _NAMES[dtype]
  except (KeyError, TypeError):
    raise IRError("dtype", f"The dtype {dtype} is not supported.") from None


def _decode_dtype(node):
  if not isinstance(node, str) or node not in _DTYPES:
    raise _malformed("an unknown dtype")
  return _DTYPES[node]


def _encode_number(value):
  """A NumPy scalar as the shortest JSON value that reads back the same."""
  kind = value.dtype.kind
  if kind == "b":
    return bool(value)
  if kind in "iu":
    return int(value)
  if kind == "c":
    return [_encode_number(value.real), _encode_number(value.imag)]
  if not np.isfinite(value):
    return str(float(value))
  # The shortest decimal of that dtype, 0.3 and not 0.30000001192092896.
  return float(str(value))


# Looked up, not asked for: a text may hold a million numbers.
_INTEGERS = {
    dtype: (int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max))
    for dtype in _DTYPES.values()
    if jnp.issubdtype(dtype, jnp.integer)
}
# From here on they round to infinity. The shortest decimal of the largest
# number may lie above it.
_FLOATS = {
    dtype: math.ldexp(
        1 - 2.0 ** -(jnp.finfo(dtype).nmant + 2), int(jnp.finfo(dtype).maxexp)
    )
    for dtype in _DTYPES.values()
    if jnp.issubdtype(dtype, jnp.floating)
}


def _decode_number(node, dtype):
  if dtype in _FLOATS:
    if type(node) is not str or node not in ("nan", "inf", "-inf"):
      if type(node) not in (int, float):
        raise _malformed("a float literal")
      if not abs(node) < _FLOATS[dtype]:
        raise _malformed("a float literal out of range")
    node = float(node)
  elif dtype in _INTEGERS:
    low, high = _INTEGERS[dtype]
    if type(node) is not int or not low <= node <= high:
      raise _malformed("an integer literal")
  elif dtype == np.dtype(bool):
    if type(node) is not bool:
      raise _malformed("a boolean literal")
  else:
    if not isinstance(node, list) or len(node) != 2:
      raise _malformed("a complex literal")
    node = complex(*(_decode_number(x, _DTYPES["float32"]) for x in node))
  return dtype.type(node)


# --- Parameters --------------------------------------------------------------


class Codec(NamedTuple):
  """How one parameter is written and read.

  Attributes:
    encode: value of the jaxpr to JSON.
    decode: JSON to value; raises IRError.
    omit: the value is always the same, or is left to JAX: not in the JSON.
  """

  encode: Callable[[Any], Any]
  decode: Callable[[Any], Any]
  omit: bool = False


def _int(low=-MAX_SIZE, high=MAX_SIZE):
  def decode(node):
    if type(node) is not int or not low <= node <= high:
      raise _malformed("an integer parameter")
    return node

  return Codec(operator.index, decode)


def _bool_decode(node):
  if type(node) is not bool:
    raise _malformed("a boolean parameter")
  return node


def _tuple(item, max_length=1024):
  def decode(node):
    if not isinstance(node, list) or len(node) > max_length:
      raise _malformed("a list parameter")
    return tuple(item.decode(x) for x in node)

  return Codec(lambda value: [item.encode(x) for x in value], decode)


def _optional(codec):
  return Codec(
      lambda value: None if value is None else codec.encode(value),
      lambda node: None if node is None else codec.decode(node),
  )


def _choice(**values):
  """One of a few constants, written as its name."""

  def encode(value):
    for name, known in values.items():
      if value == known:
        return name
    raise IRError("parameter", f"The option {value} is not supported.")

  def decode(node):
    if not isinstance(node, str) or node not in values:
      raise _malformed("an unknown option")
    return values[node]

  return Codec(encode, decode)


def _fixed(*allowed):
  """Any of `allowed`, which all mean JAX's default."""

  def encode(value):
    if not any(value is x or value == x for x in allowed):
      raise IRError("parameter", f"The option {value} is not supported.")

  return Codec(encode, lambda node: None, omit=True)


_NONE = _fixed(None)


def _encode_sharding(value):
  # On a mesh of no devices it says as much as None.
  if value is not None and not value.mesh.empty:
    raise IRError("parameter", "An array on several devices is not supported.")


_SHARDING = Codec(_encode_sharding, lambda node: None, omit=True)
# Performance hints, and closures that JAX makes again.
_IGNORED = Codec(lambda value: None, lambda node: None, omit=True)
_BOOL = Codec(bool, _bool_decode)
_DTYPE = Codec(_encode_dtype, _decode_dtype)
_SIZE = _int(0)
_SIZES = _tuple(_SIZE, MAX_RANK)
_AXIS = _int(0, MAX_RANK - 1)
_AXES = _tuple(_AXIS, MAX_RANK)
_NUMBER = Codec(
    lambda value: _encode_number(np.asarray(value)[()]),
    lambda node: _int(high=2 * MAX_SIZE).decode(node)
    if type(node) is int
    else float(_decode_number(node, _DTYPES["float32"])),
)
_PRECISION = _optional(_tuple(_choice(**{p.name: p for p in lax.Precision}), 2))
_MODE = _choice(**{m.name: m for m in lax.GatherScatterMode})


def _record(cls, **fields):
  """A NamedTuple-like class with a codec for each field."""

  def decode(node):
    if not isinstance(node, dict) or node.keys() != fields.keys():
      raise _malformed(cls.__name__)
    return cls(**{k: codec.decode(node[k]) for k, codec in fields.items()})

  def encode(value):
    return {k: codec.encode(getattr(value, k)) for k, codec in fields.items()}

  return Codec(encode, decode)


_GATHER_DIMENSIONS = _record(
    lax.GatherDimensionNumbers,
    offset_dims=_AXES,
    collapsed_slice_dims=_AXES,
    start_index_map=_AXES,
    operand_batching_dims=_AXES,
    start_indices_batching_dims=_AXES,
)
_SCATTER_DIMENSIONS = _record(
    lax.ScatterDimensionNumbers,
    update_window_dims=_AXES,
    inserted_window_dims=_AXES,
    scatter_dims_to_operand_dims=_AXES,
    operand_batching_dims=_AXES,
    scatter_indices_batching_dims=_AXES,
)


def _encode_array(value):
  value = np.asarray(value)
  return {
      "dtype": _encode_dtype(value.dtype),
      "shape": list(value.shape),
      "data": [_encode_number(x) for x in value.ravel()],
  }


def _decode_array(node):
  if not isinstance(node, dict) or node.keys() != {"dtype", "shape", "data"}:
    raise _malformed("a constant")
  dtype, shape = _decode_dtype(node["dtype"]), _SIZES.decode(node["shape"])
  data = node["data"]
  if not isinstance(data, list) or math.prod(shape) != len(data):
    raise _malformed("the size of a constant")
  if not data and math.prod(max(size, 1) for size in shape) > MAX_SIZE:
    raise _malformed("the size of an empty constant")
  return np.array([_decode_number(x, dtype) for x in data], dtype).reshape(
      shape
  )


def _encode_impl(value):
  if getattr(value, "name", None) != "threefry2x32":
    raise IRError("parameter", "Only threefry random keys are supported.")


_IMPL = Codec(_encode_impl, lambda node: None, omit=True)
# Blocks are read with their depth: see `_decode_params`.
_BLOCK = Codec(lambda block: encode_block(block), None)
_BLOCKS = Codec(lambda blocks: [encode_block(b) for b in blocks], None)

_ARRAY = Codec(_encode_array, _decode_array)
_REDUCE = {"axes": _AXES}
_CUMULATIVE = {"axis": _AXIS, "reverse": _BOOL}
_ACCURACY = {"accuracy": _NONE}
_ARG = {"axes": _AXES, "index_dtype": _DTYPE}
_SCATTER = {
    "dimension_numbers": _SCATTER_DIMENSIONS,
    "indices_are_sorted": _BOOL,
    "unique_indices": _BOOL,
    "mode": _MODE,
    "update_jaxpr": _IGNORED,
    "update_consts": _fixed(()),
}

PRIMITIVES: dict[str, dict[str, Codec]] = (
    {name: {} for name in words("""
            abs acos acosh add and asin asinh atan atan2 atanh ceil clamp
            complex digamma div eq eq_to erf erf_inv erfc floor ge gt imag
            is_finite le le_to lgamma lt lt_to max min ne neg nextafter not or
            population_count real rem select_n shift_left
            shift_right_arithmetic shift_right_logical sign sinh cosh square
            sub threefry2x32 xor clz random_unwrap random_fold_in
        """)}
    | {name: _ACCURACY for name in words("""
            cbrt cos exp exp2 expm1 log log1p logistic rsqrt sin sqrt tan tanh
        """)}
    | {
        "const": {"value": _ARRAY},
        "conj": {"input_dtype": _IGNORED},
        "mul": {"out_dtype": _NONE},
        "pow": {},
        "integer_pow": {"y": _int(-1024, 1024)},
        "round": {
            "rounding_method": _choice(
                **{m.name: m for m in lax.RoundingMethod}
            )
        },
        "reduce_precision": {
            "exponent_bits": _int(1, 64),
            "mantissa_bits": _int(0, 64),
        },
        "convert_element_type": {
            "new_dtype": _DTYPE,
            "weak_type": _IGNORED,
            "sharding": _SHARDING,
        },
        "bitcast_convert_type": {"new_dtype": _DTYPE},
        # Reductions and scans along an axis.
        "reduce_sum": _REDUCE | {"out_sharding": _SHARDING},
        "reduce_max": _REDUCE,
        "reduce_min": _REDUCE,
        "reduce_prod": _REDUCE,
        "reduce_and": _REDUCE,
        "reduce_or": _REDUCE,
        "reduce_xor": _REDUCE,
        "argmax": _ARG,
        "argmin": _ARG,
        "cumsum": _CUMULATIVE,
        "cumprod": _CUMULATIVE,
        "cummax": _CUMULATIVE,
        "cummin": _CUMULATIVE,
        "cumlogsumexp": _CUMULATIVE,
        "sort": {
            "dimension": _AXIS,
            "is_stable": _BOOL,
            "num_keys": _int(1, 64),
        },
        "top_k": {"k": _SIZE, "axis": _AXIS},
        # Shapes.
        "broadcast_in_dim": {
            "shape": _SIZES,
            "broadcast_dimensions": _AXES,
            "sharding": _SHARDING,
        },
        "reshape": {
            "new_sizes": _SIZES,
            "dimensions": _NONE,
            "sharding": _SHARDING,
        },
        "squeeze": {"dimensions": _AXES},
        "transpose": {"permutation": _AXES},
        "rev": {"dimensions": _AXES},
        "iota": {
            "dtype": _DTYPE,
            "shape": _SIZES,
            "dimension": _AXIS,
            "sharding": _SHARDING,
        },
        "concatenate": {"dimension": _AXIS},
        "stack": {"axis": _AXIS},
        "unstack": {"axis": _AXIS},
        "tile": {"reps": _SIZES},
        "split": {"sizes": _tuple(_SIZE, 4096), "axis": _AXIS},
        "pad": {"padding_config": _tuple(_tuple(_int(), 3), MAX_RANK)},
        "slice": {
            "start_indices": _SIZES,
            "limit_indices": _SIZES,
            "strides": _optional(_SIZES),
        },
        "dynamic_slice": {"slice_sizes": _SIZES},
        "dynamic_update_slice": {},
        "gather": {
            "dimension_numbers": _GATHER_DIMENSIONS,
            "slice_sizes": _SIZES,
            "indices_are_sorted": _BOOL,
            "unique_indices": _BOOL,
            "mode": _MODE,
            "fill_value": _optional(_NUMBER),
        },
        "scatter": _SCATTER,
        "scatter-add": _SCATTER,
        "scatter-sub": _SCATTER,
        "scatter-mul": _SCATTER,
        "scatter-min": _SCATTER,
        "scatter-max": _SCATTER,
        # Linear algebra.
        "dot_general": {
            "dimension_numbers": _tuple(_tuple(_AXES, 2), 2),
            "precision": _PRECISION,
            "preferred_element_type": _optional(_DTYPE),
            "out_sharding": _SHARDING,
        },
        "svd": {
            "full_matrices": _BOOL,
            "compute_uv": _BOOL,
            "subset_by_index": _NONE,
            "algorithm": _NONE,
        },
        "eigh": {
            "lower": _BOOL,
            "sort_eigenvalues": _BOOL,
            "subset_by_index": _NONE,
            "algorithm": _NONE,
        },
        "qr": {
            "pivoting": _fixed(False),
            "full_matrices": _BOOL,
            "use_magma": _NONE,
        },
        "householder_product": {},
        "cholesky": {},
        "lu": {},
        "triangular_solve": {
            "left_side": _BOOL,
            "lower": _BOOL,
            "transpose_a": _BOOL,
            "conjugate_a": _BOOL,
            "unit_diagonal": _BOOL,
        },
        "fft": {
            "fft_type": _choice(**{t.name: t for t in lax.FftType}),
            "fft_lengths": _SIZES,
        },
        # Random numbers from an explicit key.
        "random_seed": {"impl": _IMPL},
        "random_wrap": {"impl": _IMPL},
        "random_bits": {"bit_width": _int(8, 32), "shape": _SIZES},
        "random_split": {"shape": _SIZES},
        # Control flow whose cost is known beforehand.
        "scan": {
            "jaxpr": _BLOCK,
            "length": _SIZE,
            "reverse": _BOOL,
            "num_consts": _SIZE,
            # vmap traces the body anew for each carry that depends on the
            # one before.
            "num_carry": _int(0, 64),
            "unroll": _IGNORED,
        },
        "cond": {"branches": _BLOCKS},
    }
)

# What is left to LAPACK, or to a loop like it.
FACTORIZATIONS = words("""
    svd eigh qr lu cholesky triangular_solve householder_product
""")

# Primitives that hand their operands through.
_IDENTITIES = words("""
    copy copy_p stop_gradient name sharding_constraint device_put
    optimization_barrier random_clone
""")
# What only gradients use, by its other name.
_SYNONYMS = {"add_any": "add"}
# Calls, and the parameter that holds what they call.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_lin": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


# --- From jaxprs -------------------------------------------------------------


def from_jaxpr(closed: Any, max_equations: int = 1 << 30) -> Block:
  """Reads a closed jaxpr, inlining every call.

  Args:
    closed: a ClosedJaxpr, as `jax.make_jaxpr` returns it.
    max_equations: the reader stops beyond, since inlining may be exponential.

  Returns:
    A Block with avals.

  Raises:
    IRError: naming the first primitive or parameter that the IR lacks.
  """
  return _Reader([max_equations]).block(closed)


class _Reader:
  """Numbers the values of one block; nested blocks get their own reader."""

  def __init__(self, budget):
    self._budget = budget  # One cell, shared with the nested readers.
    self._equations = []
    self._avals = []

  def block(self, closed):
    avals = [var.aval for var in closed.jaxpr.invars]
    self._avals.extend(avals)
    outputs = self._inline(closed, range(len(avals)))
    return Block(
        len(avals), tuple(self._equations), tuple(outputs), tuple(self._avals)
    )

  def _append(self, name, operands, params, avals):
    self._budget[0] -= 1
    if self._budget[0] < 0:
      raise IRError("equations", "The program has too many operations.")
    first = len(self._avals)
    self._avals.extend(avals)
    self._equations.append(Equation(name, tuple(operands), params, len(avals)))
    return range(first, len(self._avals))

  def _constant(self, value, aval):
    if not hasattr(aval.dtype, "type") or jnp.issubdtype(
        aval.dtype, jax.dtypes.extended
    ):
      raise IRError("constant", "A random key must be made inside merge().")
    value = np.asarray(value)
    if value.ndim == 0:
      return Literal(value.astype(_decode_dtype(_encode_dtype(aval.dtype)))[()])
    return self._append("const", (), {"value": value}, [aval])[0]

  def _inline(self, closed, arguments):
    """Appends the equations of a jaxpr; returns the operands it outputs."""
    jaxpr = getattr(closed, "jaxpr", closed)
    names = dict(zip(jaxpr.invars, arguments, strict=True))
    for var, value in zip(
        jaxpr.constvars, getattr(closed, "consts", ()), strict=True
    ):
      names[var] = self._constant(value, var.aval)

    def read(atom):
      if isinstance(atom, jex_core.Literal):
        return self._constant(atom.val, atom.aval)
      return names[atom]

    for equation in jaxpr.eqns:
      operands = [read(atom) for atom in equation.invars]
      outputs = self._equation(equation, operands)
      names.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _equation(self, equation, operands):
    name, params = equation.primitive.name, equation.params
    name = _SYNONYMS.get(name, name)
    if name in _IDENTITIES:
      return operands
    if name in _CALLS:
      return self._inline(params[_CALLS[name]], operands)
    if name == "platform_index":
      return [None]  # Read by the next case alone.
    if name == "cond" and params.get("branches_platforms") is not None:
      # An implementation per platform; the default one runs everywhere.
      default = params["branches_platforms"].index(None)
      return self._inline(params["branches"][default], operands[1:])
    if name == "custom_linear_solve":
      lengths, jaxprs = params["const_lengths"], params["jaxprs"]
      start = lengths.matvec + lengths.vecmat
      solve = operands[start : start + lengths.solve]
      return self._inline(jaxprs.solve, solve + operands[sum(lengths) :])
    if name not in PRIMITIVES:
      raise IRError("primitive", _refusal(name))
    kept = {}
    for key, value in params.items():
      codec = PRIMITIVES[name].get(key)
      if codec is None:
        if key == "branches_platforms":
          continue
        raise IRError(
            "parameter", f"The option {key} of {name} is not supported."
        )
      if codec is _BLOCK:
        value = _Reader(self._budget).block(value)
      elif codec is _BLOCKS:
        value = tuple(_Reader(self._budget).block(b) for b in value)
      elif codec.omit:
        codec.encode(value)  # Refuses what is not the default.
        continue
      kept[key] = value
    return self._append(
        name, operands, kept, [var.aval for var in equation.outvars]
    )


def _refusal(name):
  if name == "while":
    return (
        "A loop whose number of trips depends on tensor values is not allowed;"
        " use a Python for loop or lax.fori_loop with constant bounds."
    )
  return f"The JAX primitive {name!r} is not allowed in a program."


# --- JSON --------------------------------------------------------------------


def encode_block(block: Block) -> dict[str, Any]:
  """The JSON form of a block."""
  return {
      "inputs": block.inputs,
      "equations": [
          [
              e.name,
              [_encode_operand(x) for x in e.operands],
              encode_params(e),
              e.num_outputs,
          ]
          for e in block.equations
      ],
      "outputs": [_encode_operand(x) for x in block.outputs],
  }


def encode_params(equation: Equation) -> dict[str, Any]:
  """The JSON form of an equation's parameters."""
  codecs = PRIMITIVES[equation.name]
  return {k: codecs[k].encode(v) for k, v in equation.params.items()}


def _encode_operand(operand):
  if isinstance(operand, Literal):
    value = operand.value
    return [_encode_dtype(value.dtype), _encode_number(value)]
  return operand


def decode_block(node: Any, depth: int = 0) -> Block:
  """Reads a block's JSON form and checks its structure, not its types.

  Args:
    node: anything that a JSON parser returns.
    depth: how many loops enclose it.

  Returns:
    A Block without avals.

  Raises:
    IRError: `node` is no block.
  """
  if depth > _MAX_NESTING:
    raise _malformed("loops are nested too deeply")
  keys = {"inputs", "equations", "outputs"}
  if not isinstance(node, dict) or node.keys() != keys:
    raise _malformed("a block has other keys")
  inputs = _int(0, 4096).decode(node["inputs"])
  if not isinstance(node["equations"], list):
    raise _malformed("the equations are no list")
  equations, known = [], inputs
  for item in node["equations"]:
    if not isinstance(item, list) or len(item) != 4:
      raise _malformed("an equation")
    name, operands, params, num_outputs = item
    if not isinstance(name, str) or name not in PRIMITIVES:
      raise IRError("primitive", _refusal(str(name)[:40]))
    num_outputs = _int(0, 4096).decode(num_outputs)
    equations.append(
        Equation(
            name,
            _decode_operands(operands, known),
            _decode_params(name, params, depth),
            num_outputs,
        )
    )
    known += num_outputs
  outputs = _decode_operands(node["outputs"], known)
  return Block(inputs, tuple(equations), outputs)


def _decode_params(name, node, depth):
  codecs = PRIMITIVES[name]
  if not isinstance(node, dict) or node.keys() != {
      key for key, codec in codecs.items() if not codec.omit
  }:
    raise _malformed(f"the parameters of {name}")
  params = {}
  for key, value in node.items():
    if codecs[key] is _BLOCK:
      params[key] = decode_block(value, depth + 1)
    elif codecs[key] is _BLOCKS:
      if not isinstance(value, list) or not 1 <= len(value) <= 64:
        raise _malformed("the branches of cond")
      params[key] = tuple(decode_block(b, depth + 1) for b in value)
    else:
      params[key] = codecs[key].decode(value)
  # JAX fills this in itself, and cannot lower a gather without it.
  if (
      name == "gather"
      and params["mode"] is lax.GatherScatterMode.FILL_OR_DROP
      and params["fill_value"] is None
  ):
    raise _malformed("a gather that fills without a fill_value")
  return params


def _decode_operands(node, known):
  if not isinstance(node, list) or len(node) > 4096:
    raise _malformed("a list of operands")
  operands = []
  for item in node:
    if isinstance(item, list) and len(item) == 2:
      dtype = _decode_dtype(item[0])
      operands.append(Literal(_decode_number(item[1], dtype)))
    elif type(item) is int and 0 <= item < known:
      operands.append(item)
    else:
      raise _malformed("an operand that is not known yet")
  return tuple(operands)


def dumps(program: Program) -> str:
  """A program as JSON text without spaces, the same text every time."""
  return json.dumps(
      {
          "version": VERSION,
          "num_experts": program.num_experts,
          "leaves": [
              {"shape": list(shape), "block": encode_block(block)}
              for shape, block in program.leaves.items()
          ],
      },
      separators=(",", ":"),
      sort_keys=True,
  )


def loads(text: str | bytes) -> Program:
  """Reads a program's JSON text.

  Raises:
    IRError: it is not the text of a program of this version.
  """
  try:
    node = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise _malformed("it is not JSON") from error
  keys = {"version", "num_experts", "leaves"}
  if not isinstance(node, dict) or node.keys() != keys:
    raise _malformed("a program has other keys")
  if node["version"] != VERSION or not isinstance(node["leaves"], list):
    raise _malformed(f"it is not of version {VERSION}")
  num_experts = _int(1, 1024).decode(node["num_experts"])
  leaves = {}
  for leaf in node["leaves"]:
    if not isinstance(leaf, dict) or leaf.keys() != {"shape", "block"}:
      raise _malformed("a leaf has other keys")
    shape = _SIZES.decode(leaf["shape"])
    if shape in leaves:
      raise _malformed(f"two blocks for shape {shape}")
    leaves[shape] = decode_block(leaf["block"])
    if leaves[shape].inputs != 1 + num_experts:
      raise _malformed("the number of inputs")
    if len(leaves[shape].outputs) != 1:
      raise _malformed("the number of outputs")
  return Program(num_experts, leaves)


def specs(shape: Sequence[int], num_experts: int) -> list[Any]:
  """Abstract base and task vectors: float32 of one shape."""
  return [jax.ShapeDtypeStruct(tuple(shape), np.float32)] * (1 + num_experts)
