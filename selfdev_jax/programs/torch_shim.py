"""PyTorch's names over jax.numpy, for programs that were written in PyTorch.

A `Tensor` holds one jax array, in a trace or not, and has torch's methods; the
functions have torch's names, arguments and defaults: `std` is unbiased,
`median` is the lower one, `max(dim)` returns values and indices, dtypes promote
as torch promotes them. What differs:

*   There are 32 bits at most: float64 is float32, int64 is int32.
*   `sign` of NaN is NaN, an index tensor that is out of range is clamped,
    `quantile` takes any size, and `F.softmax` needs its dim.
*   Random functions take an explicit `torch.Generator`, and its values are
    JAX's, not torch's.
*   Views share no memory. An in-place operation replaces the value of one
    Tensor; while another Tensor of the same storage is alive, as between `x`
    and `x.view(-1)` or `x[0]`, it is refused with an AliasingError. What torch
    decides by memory layout (`reshape`, `contiguous`) counts as a view.
*   What has no shape before it has values (`x[mask]`, `nonzero`, `unique`) is
    refused, and so is `out=`.

Nothing here needs a JAX backend, or torch.
"""

# ruff: noqa: N803  # Parameters have torch's names.

import collections
import functools
import inspect
import math
import operator
import types
from typing import Any
import weakref

import jax
import jax.numpy as jnp
import numpy as np


class AliasingError(RuntimeError):
  """An in-place operation whose effect on a view would be lost."""


_NO_GENERATOR = (
    "random numbers need an explicit generator: write"
    " g = torch.Generator().manual_seed(0) and pass generator=g."
)


class Tensor:
  """One array under torch's method names.

  Most methods are added by `_op` below. `Tensor(data)` is torch's old
  constructor: float32 from nested lists.
  """

  # _storage: the live Tensors that would share memory in torch, this included.
  # _wide: it would be of 64 bits in torch, so `float()` would be a copy.
  __slots__ = ("__weakref__", "_array", "_storage", "_wide")
  __array_ufunc__ = None  # A NumPy scalar on the left leaves it to us.
  __hash__ = object.__hash__
  requires_grad = False

  def __init__(self, data):
    _fill_slots(self, _from_data(data, np.float32))

  shape = property(lambda self: tuple(self._array.shape))
  dtype = property(lambda self: self._array.dtype)
  ndim = property(lambda self: self._array.ndim)
  device = property(lambda self: device("cpu"))
  data = property(lambda self: self.detach())

  @property
  def T(self):  # noqa: N802
    if self.ndim > 2:
      raise RuntimeError("x.T needs a matrix; use x.mT or x.permute().")
    return self.t()

  @property
  def mT(self):  # noqa: N802
    return self.transpose(-2, -1)

  def __jax_array__(self):
    return self._array

  def __repr__(self):
    return f"tensor({self._array})"

  def __format__(self, spec):
    return repr(self)  # While tracing there is no number to format.

  def __bool__(self):
    return bool(self._array)

  def __float__(self):
    return float(self._array)

  def __int__(self):
    return int(self._array)

  def __index__(self):
    return operator.index(self._array)

  def __len__(self):
    return len(self._array)

  def __iter__(self):
    return iter(self.unbind())

  def __contains__(self, element):
    return bool((self == element).any())

  def __getattr__(self, name):
    raise AttributeError(
        f"Tensor.{name} is not part of the torch shim; use an operation that"
        " is, or jax.numpy."
    )

  def __getitem__(self, key):
    key = _index(key, self.shape)
    if any(_is_mask(k) for k in key):
      raise TypeError(
          "x[mask] has a shape that depends on values; use"
          " torch.where(mask, x, 0), or the assignment x[mask] = value."
      )
    # In torch too, indexing by a 0-d tensor is a view.
    copies = any(isinstance(k, jax.Array | np.ndarray) and k.ndim for k in key)
    storage = None if copies else self._storage
    return _new(self._array[key], storage, self._wide)

  def __setitem__(self, key, value):
    key, value = _index(key, self.shape), unwrap(value)
    if any(_is_mask(k) for k in key):
      _store(self, _assign_by_mask(self._array, key, value))
    else:
      value = _cast(value, self.dtype)
      ones = next((i for i, n in enumerate(value.shape) if n != 1), value.ndim)
      value = value.reshape(value.shape[ones:])  # Torch broadcasts these away.
      _store(self, jnp.asarray(self._array).at[key].set(value))

  def item(self):
    return self._array.item()

  def tolist(self):
    return self._array.tolist()

  def size(self, dim=None):
    return self.shape if dim is None else self.shape[dim]

  def dim(self):
    return self.ndim

  def copy_(self, source):
    value = _cast(unwrap(source), self.dtype)
    return _store(self, jnp.broadcast_to(value, self.shape))

  def fill_(self, value):
    return self.copy_(value)

  def zero_(self):
    return self.copy_(0)

  def bernoulli_(self, p=0.5, *, generator=None):
    key, p = _key(generator), unwrap(p)
    return self.copy_(jax.random.bernoulli(key, p, self.shape))

  def uniform_(self, low=0.0, high=1.0, *, generator=None):
    key, dtype = _key(generator), np.float32
    return self.copy_(
        jax.random.uniform(key, self.shape, dtype, float(low), float(high))
    )

  def normal_(self, mean=0.0, std=1.0, *, generator=None):
    draw = jax.random.normal(_key(generator), self.shape, np.float32)
    return self.copy_(draw * np.float32(std) + np.float32(mean))

  def requires_grad_(self, requires_grad=True):
    if requires_grad:
      raise NotImplementedError("a merging program has no gradients.")
    return self

  def to(self, *args, dtype=None, device=None, copy=False, **_):
    """`to(dtype)`, `to(device)`, `to(other)`, in torch's argument orders."""
    for value in args:
      if isinstance(value, Tensor):
        dtype = value.dtype
      elif isinstance(value, np.dtype):
        dtype = value
      elif not isinstance(value, bool):
        device = value if device is None else device
    result = self if dtype is None else self._as(dtype)
    if device is not None and not str(device).startswith("cpu"):
      result = result.cuda()
    return result.clone() if copy else result

  def type(self, dtype):
    return self.to(dtype)

  def type_as(self, other):
    return self.to(other)

  def cpu(self):
    return self

  def cuda(self, device=None, **_):
    return self.detach()  # A copy or not: that depends on the machine.

  def _as(self, dtype):
    wide = dtype == _FLOAT64
    same = _dtype(dtype) == self.dtype
    if same and (wide or self._wide or self.dtype == np.int32):
      # In torch these may be 64 bits and 32, a copy, or one tensor.
      return _new(self._array, self._storage, wide)
    if same:
      return self  # As in torch: the very same tensor.
    return _new(_cast(self._array, _dtype(dtype)), wide=wide)


def wrap(array: jax.Array) -> Tensor:
  """A Tensor of an array of any shape and dtype, alone in its storage."""
  return _new(array)


def unwrap(value: Any) -> Any:
  """A Tensor's array; any other value as it is."""
  return value._array if isinstance(value, Tensor) else value


def _new(array, storage=None, wide=False):
  tensor = object.__new__(Tensor)
  _fill_slots(tensor, array, storage, wide)
  return tensor


def _fill_slots(tensor, array, storage=None, wide=False):
  tensor._array = array
  tensor._wide = wide
  tensor._storage = weakref.WeakSet() if storage is None else storage
  tensor._storage.add(tensor)


# So that jnp functions, jax.vmap and jax.lax take Tensors.
jax.tree_util.register_pytree_node(
    Tensor,
    lambda tensor: ((tensor._array,), None),
    lambda _, children: _new(*children),
)


def _store(tensor, array):
  """The one place where a Tensor's value is replaced."""
  if len(tensor._storage) > 1:
    raise AliasingError(
        "this tensor is a view, or has a view that is still in use, and views"
        " share no memory here; write x = x.clone() first, or use the"
        " out-of-place form."
    )
  if array.shape != tensor.shape:
    raise RuntimeError(
        f"an in-place operation cannot change the shape {tensor.shape} to"
        f" {array.shape}."
    )
  if _kind(array.dtype) > _kind(tensor.dtype):
    raise RuntimeError(
        f"a result of type {array.dtype} can't be stored in place in a tensor"
        f" of type {tensor.dtype}."
    )
  tensor._array = _cast(array, tensor.dtype)
  return tensor


# --- Registration ------------------------------------------------------------

_TORCH: dict[str, Any] = {}  # What torch.<name> is.
_IGNORED = ("device", "requires_grad", "memory_format", "layout", "pin_memory")
_ALIASES = {"axis": "dim", "keepdims": "keepdim"}


def _op(
    *names,
    table=_TORCH,
    function=True,
    method=True,
    inplace=False,
    view=False,
    numbers=False,
):
  """Registers a function of arrays under torch's names.

  Tensors become arrays in the arguments and arrays become Tensors in the
  result, also within tuples. Where the first parameter is called `input`, it
  has to be a tensor.

  Args:
    *names: the first is the one in error messages.
    table: where functions go.
    function: it is torch.<name>.
    method: it is Tensor.<name>.
    inplace: there is also Tensor.<name>_.
    view: the result shares its storage with the first tensor; or a function
      of the number of tensors that says so.
    numbers: the first argument may be a number, although called `input`.

  Returns:
    A decorator that returns the function of arrays unchanged.
  """

  def register(body):
    for name in names:
      call = _calling(name, body, view, numbers)
      if function:
        table[name] = call
      if method:
        setattr(Tensor, name, call)
      if inplace:
        setattr(Tensor, f"{name}_", _in_place(call))
    return body

  return register


def _calling(name, body, view, numbers):
  code = body.__code__
  needs_tensor = not numbers and code.co_varnames[:1] == ("input",)
  # f(2, 3) may be f(dims=(2, 3)) too.
  variadic = None
  if code.co_flags & inspect.CO_VARARGS:
    variadic = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]

  @functools.wraps(body)
  def call(*args, **kwargs):
    kwargs = {
        _ALIASES.get(key, key): value
        for key, value in kwargs.items()
        if key not in _IGNORED
    }
    if variadic in kwargs:
      args += (kwargs.pop(variadic),)
    if kwargs.pop("out", None) is not None:
      raise TypeError(f"{name}: out= is not supported; assign the result.")
    if needs_tensor:
      first = args[0] if args else kwargs.get("input")
      if not isinstance(first, Tensor | jax.Array | np.ndarray):
        raise TypeError(f"{name} takes a tensor, not {type(first).__name__}.")
    tensors, arrays = [], []
    for value in (*args, *kwargs.values()):
      arrays.append(_unwrap_all(value, tensors))
    wide = any(t._wide for t in tensors) or any(
        isinstance(value, np.dtype) and value == _FLOAT64 for value in arrays
    )
    result = body(
        *arrays[: len(args)],
        **dict(zip(kwargs, arrays[len(args) :], strict=True)),
    )
    shares = view(len(tensors)) if callable(view) else view
    storage = tensors[0]._storage if shares and tensors else None
    return _wrap_all(result, storage, wide)

  call.__name__ = call.__qualname__ = body.__qualname__ = name
  return call


def _unwrap_all(value, tensors):
  """Arrays for the Tensors in nested sequences; collects the Tensors."""
  if isinstance(value, Tensor):
    tensors.append(value)
    return value._array
  if type(value) in (list, tuple):
    return type(value)(_unwrap_all(v, tensors) for v in value)
  return value


def _wrap_all(value, storage, wide):
  if isinstance(value, jax.Array | np.ndarray):
    wide = wide and _kind(value.dtype) == 2
    return _new(value, storage, wide)
  if isinstance(value, tuple) and any(isinstance(v, jax.Array) for v in value):
    parts = [_wrap_all(v, storage, wide) for v in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
  return value


def _in_place(call):
  def changed(self, *args, **kwargs):
    return _store(self, call(self, *args, **kwargs)._array)

  return changed


def _refused(name, sentence):
  def refuse(*args, **kwargs):
    raise NotImplementedError(f"{name}: {sentence}")

  return refuse


class _Module(types.SimpleNamespace):
  """A facade with an error message for the names that it lacks."""

  def __init__(self, name, **members):
    super().__init__(_name=name, **members)

  def __getattr__(self, name):
    raise AttributeError(
        f"{self._name}.{name} is not part of the torch shim; use an operation"
        " that is, or jax.numpy."
    )


# --- Types -------------------------------------------------------------------

# int64 is int32 itself, so that indices are torch.long. float64 is known only
# by name: see Tensor._wide.
_FLOAT64 = np.dtype("float64")
_DTYPES = {
    name: jnp.dtype(dtype)
    for dtype, names in {
        "float32": "float32 float",
        "float64": "float64 double",
        "float16": "float16 half",
        "bfloat16": "bfloat16",
        "int32": "int64 long int32 int",
        "int16": "int16 short",
        "int8": "int8",
        "uint8": "uint8",
        "bool": "bool",
    }.items()
    for name in names.split()
}


def _dtype(dtype, default=None):
  """A dtype of at most 32 bits, or the default where there is none."""
  if dtype is None:
    return default
  dtype = np.dtype(dtype)
  if dtype.itemsize == 8 and dtype.kind in "fiu":
    return np.dtype(f"{dtype.kind}4")
  return dtype


def _kind(dtype):
  """0, 1, 2 for bool, integers and floats: what promotes to what."""
  if dtype == np.bool_:
    return 0
  return 1 if jnp.issubdtype(dtype, np.integer) else 2


def _dtype_of(value):
  if isinstance(value, bool):
    return np.dtype(bool)
  if isinstance(value, int):
    return np.dtype(np.int32)
  if isinstance(value, float):
    return np.dtype(np.float32)
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    return _dtype(value.dtype)
  raise TypeError(f"a tensor or a number was expected, not {value!r:.60}.")


def _promote_dtypes(a, b):
  if a is None or a == b:
    return b
  if _kind(a) != _kind(b):
    return max(a, b, key=_kind)
  if _kind(a) == 2:
    widths = a.itemsize, b.itemsize
    return a if widths[0] > widths[1] else b if widths != (2, 2) else _F32
  return np.promote_types(a, b)


_F32 = np.dtype(np.float32)


def _result_type(*values):
  """Tensors count before 0-d tensors, those before Python's numbers.

  A later group matters only where it is of a higher kind.
  """
  groups = [None, None, None]
  for value in values:
    dtype = _dtype_of(value)
    is_array = isinstance(value, jax.Array | np.ndarray)
    group = (0 if value.ndim else 1) if is_array else 2
    groups[group] = _promote_dtypes(groups[group], dtype)
  known = [dtype for dtype in groups if dtype is not None]
  return max(known, key=_kind)  # The first of the highest kind.


def _cast(value, dtype):
  if isinstance(value, jax.Array):
    return value if value.dtype == dtype else value.astype(dtype)
  with np.errstate(over="ignore"):  # A number may be beyond float32, as inf.
    return np.asarray(value).astype(dtype)


def _promote(*values):
  """Arrays of torch's result type; numbers become 0-d constants."""
  dtype = _result_type(*values)
  return [_cast(value, dtype) for value in values]


def _floating(*values):
  """Like `_promote`, and integers become float32."""
  dtype = _result_type(*values)
  dtype = dtype if _kind(dtype) == 2 else _F32
  return [_cast(value, dtype) for value in values]


def _need_float(input, name):
  if _kind(input.dtype) != 2:
    raise RuntimeError(f"{name} needs a floating-point tensor; use x.float().")


def _dims(dim):
  """An axis argument of jnp: torch's empty tuple means all of them."""
  if isinstance(dim, list | tuple):
    return tuple(dim) or None
  return dim


def _sizes(sizes):
  """A shape from `f(2, 3)` or `f((2, 3))`."""
  if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
    sizes = sizes[0]
  return tuple(operator.index(size) for size in sizes)


def _axis(dim, ndim):
  if not -max(ndim, 1) <= dim < max(ndim, 1):
    raise IndexError(f"dimension {dim} is out of range for {ndim} dimensions.")
  return dim % max(ndim, 1)


# --- Elementwise -------------------------------------------------------------


def _each(functions, body, **options):
  """Registers `body(function)` for every name and function."""
  for name, function in functions.items():
    _op(name, **options)(body(function))


def _words(text):
  return text.split()


def _from_jnp(names):
  return {name: getattr(jnp, name) for name in _words(names)}


_each(
    _from_jnp("""
        sqrt exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan
        sinh cosh tanh asinh acosh atanh reciprocal
    """)
    | {
        "rsqrt": jax.lax.rsqrt,
        "sigmoid": jax.nn.sigmoid,
        "erf": jax.lax.erf,
        "erfc": jax.lax.erfc,
    },
    lambda function: lambda input: function(*_floating(input)),
    inplace=True,
)
_each(
    _from_jnp("abs sign square")
    | {
        "absolute": jnp.abs,
        "sgn": jnp.sign,
        "relu": lambda x: jnp.maximum(x, _cast(0, x.dtype)),
    },
    lambda function: lambda input: function(input),
    inplace=True,
)
_each(
    _from_jnp("floor ceil trunc") | {"fix": jnp.trunc},
    lambda function: lambda input: (
        function(input) if _kind(input.dtype) == 2 else input
    ),
    inplace=True,
)
_each(
    _from_jnp("isnan isinf isfinite isposinf isneginf"),
    lambda function: lambda input: function(*_floating(input)),
)


@_op("neg", "negative", inplace=True)
def _neg(input):
  if not _kind(input.dtype):
    raise RuntimeError("a bool tensor has no negative; use ~x.")
  return jnp.negative(input)


@_op("positive", method=False, view=True)
def _positive(input):
  return input


@_op("round", inplace=True)
def _round(input, *, decimals=0):
  return jnp.round(input, decimals)


@_op("frac", inplace=True)
def _frac(input):
  return input - jnp.trunc(input)


@_op("nan_to_num", inplace=True)
def _nan_to_num(input, nan=0.0, posinf=None, neginf=None):
  if _kind(input.dtype) < 2:
    return input
  values = [None if v is None else float(v) for v in (nan, posinf, neginf)]
  return jnp.nan_to_num(
      input, nan=values[0] or 0.0, posinf=values[1], neginf=values[2]
  )


def _alpha(other, alpha):
  return other if alpha == 1 else _mul(other, alpha)


@_op("add", inplace=True)
def _add(input, other, *, alpha=1):
  return jnp.add(*_promote(input, _alpha(other, alpha)))


@_op("sub", "subtract", inplace=True)
def _sub(input, other, *, alpha=1):
  if not (_kind(_dtype_of(input)) and _kind(_dtype_of(other))):
    raise RuntimeError("a bool cannot be subtracted; use ~mask or x.float().")
  return jnp.subtract(*_promote(input, _alpha(other, alpha)))


@_op("rsub")
def _rsub(input, other, *, alpha=1):
  return _sub(other, input, alpha=alpha)


@_op("mul", "multiply", inplace=True, numbers=True)
def _mul(input, other):
  return jnp.multiply(*_promote(input, other))


@_op("div", "divide", "true_divide", inplace=True, numbers=True)
def _div(input, other, *, rounding_mode=None):
  if rounding_mode is None:
    return jnp.divide(*_floating(input, other))
  if rounding_mode == "floor":
    return _floor_divide(input, other)
  if rounding_mode != "trunc":
    raise ValueError("rounding_mode is None, 'floor' or 'trunc'.")
  dtype = _result_type(input, other)
  return _cast(jnp.trunc(jnp.divide(*_floating(input, other))), dtype)


@_op("floor_divide", inplace=True, numbers=True)
def _floor_divide(input, other):
  return jnp.floor_divide(*_promote(input, other))


@_op("remainder", inplace=True, numbers=True)
def _remainder(input, other):
  return jnp.remainder(*_promote(input, other))


@_op("fmod", inplace=True)
def _fmod(input, other):
  return jnp.fmod(*_promote(input, other))


@_op("pow", inplace=True, numbers=True)
def _pow(input, exponent):
  whole = isinstance(exponent, int | float) and exponent == int(
      exponent if math.isfinite(exponent) else 0
  )
  dtype = _result_type(input, exponent)
  if whole and _kind(dtype) == 1 and exponent < 0:
    raise RuntimeError("integers have no negative powers; use x.float().")
  # A whole number stays a Python integer, for JAX to multiply out.
  if whole and abs(exponent) <= 64 and isinstance(input, jax.Array):
    return jax.lax.integer_pow(_cast(input, dtype), int(exponent))
  return jnp.power(*_promote(input, exponent))


_each(
    _from_jnp("maximum minimum fmax fmin not_equal less greater")
    | {
        "eq": jnp.equal,
        "ne": jnp.not_equal,
        "lt": jnp.less,
        "le": jnp.less_equal,
        "less_equal": jnp.less_equal,
        "gt": jnp.greater,
        "ge": jnp.greater_equal,
        "greater_equal": jnp.greater_equal,
    },
    lambda function: lambda input, other: function(*_promote(input, other)),
)
_each(
    _from_jnp("hypot copysign logaddexp atan2"),
    lambda function: lambda input, other: function(*_floating(input, other)),
)
_each(
    _from_jnp("logical_and logical_or logical_xor"),
    lambda function: lambda input, other: function(
        _truth(input), _truth(other)
    ),
)
_each(
    _from_jnp("bitwise_and bitwise_or bitwise_xor"),
    lambda function: lambda input, other: function(
        *_need_bits(*_promote(input, other))
    ),
    inplace=True,
)


def _need_bits(*arrays):
  if _kind(arrays[0].dtype) == 2:
    raise RuntimeError("& | ^ ~ need bool or integer tensors.")
  return arrays


def _truth(value):
  return _cast(value, np.bool_)


@_op("logical_not")
def _logical_not(input):
  return jnp.logical_not(_truth(input))


@_op("bitwise_not", inplace=True)
def _bitwise_not(input):
  return jnp.bitwise_not(*_need_bits(input))


@_op("clamp", "clip", inplace=True)
def _clamp(input, min=None, max=None):
  if min is None and max is None:
    raise RuntimeError("clamp needs min or max.")
  dtype = _result_type(*(v for v in (input, min, max) if v is not None))
  input = _cast(input, dtype)
  if min is not None:
    input = jnp.maximum(input, _cast(min, dtype))
  if max is not None:
    input = jnp.minimum(input, _cast(max, dtype))
  return input


@_op("clamp_min", inplace=True)
def _clamp_min(input, min):
  return _clamp(input, min)


@_op("clamp_max", inplace=True)
def _clamp_max(input, max):
  return _clamp(input, None, max)


@_op("lerp", inplace=True)
def _lerp(input, end, weight):
  is_number = isinstance(weight, int | float)
  start, end, weight = _promote(input, end, weight)
  near = start + weight * (end - start)
  far = end - (end - start) * (_cast(1, weight.dtype) - weight)
  # As torch: exact at both ends.
  if is_number:
    return near if abs(weight) < 0.5 else far
  return jnp.where(jnp.abs(weight) < _cast(0.5, weight.dtype), near, far)


@_op("addcmul", inplace=True)
def _addcmul(input, tensor1, tensor2, *, value=1):
  return _add(input, _alpha(_mul(tensor1, tensor2), value))


@_op("addcdiv", inplace=True)
def _addcdiv(input, tensor1, tensor2, *, value=1):
  return _add(input, _alpha(_div(tensor1, tensor2), value))


@_op("where", method=False)
def _where(condition, *values):
  if len(values) != 2:
    raise NotImplementedError(
        "torch.where(condition) has a shape that depends on values; use"
        " torch.where(condition, a, b)."
    )
  return jnp.where(_need_mask(condition), *_promote(*values))


@_op("where", function=False)
def _where_method(input, condition, other):
  return _where(condition, input, other)


@_op("masked_fill", inplace=True)
def _masked_fill(input, mask, value):
  return jnp.where(_need_mask(mask), _cast(value, input.dtype), input)


def _need_mask(mask):
  if mask.dtype != np.bool_:
    raise RuntimeError(f"a mask has to be bool, not {mask.dtype}; use x != 0.")
  return mask


@_op("isclose")
def _isclose(input, other, rtol=1e-5, atol=1e-8, equal_nan=False):
  return jnp.isclose(*_promote(input, other), rtol, atol, equal_nan)


@_op("allclose")
def _allclose(input, other, rtol=1e-5, atol=1e-8, equal_nan=False):
  return bool(_isclose(input, other, rtol, atol, equal_nan).all())


@_op("equal")
def _equal(input, other):
  return input.shape == other.shape and bool(
      jnp.equal(*_promote(input, other)).all()
  )


# --- Reductions --------------------------------------------------------------

_Pair = collections.namedtuple("_Pair", ("values", "indices"))


def _summable(input, dtype):
  """Cast to the dtype asked for; integers and bools are added as int32."""
  default = input.dtype if _kind(input.dtype) == 2 else np.dtype(np.int32)
  return _cast(input, _dtype(dtype, default))


@_op("sum")
def _sum(input, dim=None, keepdim=False, *, dtype=None):
  input = _summable(input, dtype)
  return jnp.sum(input, _dims(dim), dtype=input.dtype, keepdims=keepdim)


@_op("nansum")
def _nansum(input, dim=None, keepdim=False, *, dtype=None):
  return _sum(_nan_to_num_only(input), dim, keepdim, dtype=dtype)


def _nan_to_num_only(input):
  return jnp.where(jnp.isnan(input), _cast(0, input.dtype), input)


@_op("mean")
def _mean(input, dim=None, keepdim=False, *, dtype=None):
  input = _cast(input, _dtype(dtype, input.dtype))
  _need_float(input, "mean")
  return jnp.mean(input, _dims(dim), keepdims=keepdim)


@_op("nanmean")
def _nanmean(input, dim=None, keepdim=False):
  count = _sum(~jnp.isnan(input), dim, keepdim)
  return _nansum(input, dim, keepdim) / _cast(count, input.dtype)


@_op("prod")
def _prod(input, dim=None, keepdim=False, *, dtype=None):
  input = _summable(input, dtype)
  return jnp.prod(input, dim, dtype=input.dtype, keepdims=keepdim)


@_op("var")
def _var(input, dim=None, unbiased=None, keepdim=False, *, correction=1):
  _need_float(input, "var")
  if isinstance(dim, bool):  # var(unbiased)
    dim, unbiased = None, dim
  if unbiased is not None:
    correction = int(unbiased)
  return jnp.var(input, _dims(dim), ddof=correction, keepdims=keepdim)


@_op("std")
def _std(input, dim=None, unbiased=None, keepdim=False, *, correction=1):
  return jnp.sqrt(_var(input, dim, unbiased, keepdim, correction=correction))


@_op("amax")
def _amax(input, dim=(), keepdim=False):
  return jnp.max(input, _dims(dim), keepdims=keepdim)


@_op("amin")
def _amin(input, dim=(), keepdim=False):
  return jnp.min(input, _dims(dim), keepdims=keepdim)


@_op("aminmax")
def _aminmax(input, *, dim=None, keepdim=False):
  result = collections.namedtuple("_MinMax", ("min", "max"))
  return result(_amin(input, dim, keepdim), _amax(input, dim, keepdim))


def _extreme(name, reduce, arg, elementwise):
  def body(input, dim=None, keepdim=False, *, other=None):
    if other is not None or isinstance(dim, jax.Array):
      return elementwise(*_promote(input, dim if other is None else other))
    if dim is None:
      return reduce(input)
    return _Pair(
        reduce(input, dim, keepdims=keepdim),
        _cast(arg(input, dim, keepdims=keepdim), np.int32),
    )

  _op(name)(body)


_extreme("max", jnp.max, jnp.argmax, jnp.maximum)
_extreme("min", jnp.min, jnp.argmin, jnp.minimum)


@_op("argmax")
def _argmax(input, dim=None, keepdim=False):
  return _cast(jnp.argmax(input, dim, keepdims=keepdim), np.int32)


@_op("argmin")
def _argmin(input, dim=None, keepdim=False):
  return _cast(jnp.argmin(input, dim, keepdims=keepdim), np.int32)


@_op("all")
def _all(input, dim=None, keepdim=False):
  return jnp.all(_truth(input), _dims(dim), keepdims=keepdim)


@_op("any")
def _any(input, dim=None, keepdim=False):
  return jnp.any(_truth(input), _dims(dim), keepdims=keepdim)


@_op("count_nonzero")
def _count_nonzero(input, dim=None):
  return _sum(_truth(input), dim)


@_op("cumsum", inplace=True)
def _cumsum(input, dim, *, dtype=None):
  return jnp.cumsum(_summable(input, dtype), dim)


@_op("cumprod", inplace=True)
def _cumprod(input, dim, *, dtype=None):
  return jnp.cumprod(_summable(input, dtype), dim)


@_op("logsumexp")
def _logsumexp(input, dim, keepdim=False):
  return jax.nn.logsumexp(*_floating(input), _dims(dim), keepdims=keepdim)


def _sorted(input, dim, descending=False):
  """Values and int32 indices along an axis, stable; NaN counts as largest."""
  if not input.ndim:
    return input, jnp.zeros((), np.int32)
  axis = _axis(dim, input.ndim)
  operands = (
      input,
      jax.lax.broadcasted_iota(np.int32, input.shape, axis),
  )
  # Flipped before and after, equal values keep their order.
  turn = (lambda x: jnp.flip(x, axis)) if descending else (lambda x: x)
  values, indices = jax.lax.sort(
      tuple(map(turn, operands)), dimension=axis, is_stable=True, num_keys=1
  )
  return turn(values), turn(indices)


@_op("sort")
def _sort(input, dim=-1, descending=False, stable=False):
  del stable  # Always.
  return _Pair(*_sorted(input, dim, descending))


@_op("argsort")
def _argsort(input, dim=-1, descending=False, stable=False):
  del stable
  return _sorted(input, dim, descending)[1]


def _slice(input, dim, start, length=1):
  if not input.ndim:
    return input
  return jax.lax.slice_in_dim(input, start, start + length, axis=dim)


@_op("topk")
def _topk(input, k, dim=-1, largest=True, sorted=True):
  del sorted  # Always.
  k, axis = operator.index(k), _axis(dim, input.ndim)
  if not 0 <= k <= (input.shape[axis] if input.ndim else 1):
    raise RuntimeError(f"topk: k={k} is out of range for the dimension.")
  if largest and input.ndim:
    last = jnp.moveaxis(input, axis, -1)
    return _Pair(*(jnp.moveaxis(x, -1, axis) for x in jax.lax.top_k(last, k)))
  return _Pair(*(_slice(x, axis, 0, k) for x in _sorted(input, axis)))


@_op("kthvalue")
def _kthvalue(input, k, dim=-1, keepdim=False):
  k, axis = operator.index(k), _axis(dim, input.ndim)
  if not 1 <= k <= (input.shape[axis] if input.ndim else 1):
    raise RuntimeError(f"kthvalue: k={k} is out of range for the dimension.")
  return _kth(_sorted(input, axis), k - 1, axis, keepdim)


def _kth(pair, position, axis, keepdim):
  pair = [_slice(x, axis, position) for x in pair]
  if not keepdim and pair[0].ndim:
    pair = [jnp.squeeze(x, axis) for x in pair]
  return _Pair(*pair)


@_op("median")
def _median(input, dim=None, keepdim=False):
  flat = dim is None
  if flat:
    input, dim = input.reshape(-1), 0
  axis = _axis(dim, input.ndim)
  size = input.shape[axis] if input.ndim else 1
  pair = _sorted(input, axis)
  result = _kth(pair, (size - 1) // 2, axis, keepdim)
  if _kind(input.dtype) == 2:
    # NaN is sorted to the end, and the median of what holds one is NaN.
    last = _kth(pair, size - 1, axis, keepdim)
    has_nan = jnp.isnan(last.values)
    result = _Pair(
        *(jnp.where(has_nan, b, a) for a, b in zip(result, last, strict=True))
    )
  return result.values if flat else result


@_op("quantile")
def _quantile(input, q, dim=None, keepdim=False, *, interpolation="linear"):
  _need_float(input, "quantile")
  return jnp.quantile(
      input,
      _cast(q, input.dtype),
      axis=dim,
      method=interpolation,
      keepdims=keepdim,
  )


# --- Norms and similarities --------------------------------------------------


@_op("norm")
def _norm(input, p="fro", dim=None, keepdim=False, dtype=None):
  input = _cast(input, _dtype(dtype, input.dtype))
  _need_float(input, "norm")
  if p == "nuc":
    return _matrix_norm(input, "nuc", (-2, -1) if dim is None else dim, keepdim)
  if isinstance(p, str) and p != "fro":
    raise RuntimeError(f"norm: there is no p={p!r}; use a number.")
  return _vector_norm(input, 2 if p in ("fro", None) else p, dim, keepdim)


@_op("vector_norm", function=False, method=False)
def _vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
  x = _cast(x, _dtype(dtype, x.dtype))
  _need_float(x, "vector_norm")
  axes = _dims(dim)
  if ord == 2:
    return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=keepdim))
  size = jnp.abs(x)
  if ord == math.inf:
    return jnp.max(size, axes, keepdims=keepdim)
  if ord == -math.inf:
    return jnp.min(size, axes, keepdims=keepdim)
  if ord == 0:
    count = _sum(x != _cast(0, x.dtype), dim, keepdim)
    return _cast(count, x.dtype)
  if ord == 1:
    return jnp.sum(size, axes, keepdims=keepdim)
  total = jnp.sum(_pow(size, ord), axes, keepdims=keepdim)
  return _pow(total, 1 / ord)


def _matrix_norm(A, ord="fro", dim=(-2, -1), keepdim=False, *, dtype=None):
  A = _cast(A, _dtype(dtype, A.dtype))
  _need_float(A, "matrix_norm")
  return jnp.linalg.norm(A, ord, axis=tuple(dim), keepdims=keepdim)


def _linalg_norm(A, ord=None, dim=None, keepdim=False, *, dtype=None):
  if isinstance(dim, int):
    dim = (dim,)
  is_matrix = len(dim) == 2 if dim is not None else A.ndim == 2
  if ord is None or not is_matrix:
    if ord is not None and dim is None and A.ndim > 2:
      raise RuntimeError("linalg.norm with ord needs 1 or 2 dimensions, or dim")
    return _vector_norm(A, 2 if ord is None else ord, dim, keepdim, dtype=dtype)
  dim = (-2, -1) if dim is None else dim
  return _matrix_norm(A, ord, dim, keepdim, dtype=dtype)


@_op("dist")
def _dist(input, other, p=2):
  return _vector_norm(_sub(input, other), p)


_F: dict[str, Any] = {}  # torch.nn.functional


@_op("normalize", table=_F, method=False)
def _normalize(input, p=2.0, dim=1, eps=1e-12):
  size = _vector_norm(input, p, dim, True)
  return input / jnp.maximum(size, _cast(eps, input.dtype))


@_op("cosine_similarity", method=False)
def _cosine_similarity(x1, x2, dim=1, eps=1e-8):
  x1, x2 = jnp.broadcast_arrays(*_promote(x1, x2))
  eps = _cast(eps, x1.dtype)
  x1, x2 = (
      x / jnp.maximum(_vector_norm(x, 2, dim, True), eps) for x in (x1, x2)
  )
  return jnp.sum(x1 * x2, dim)


# --- Activations -------------------------------------------------------------


@_op("softmax")
def _softmax(input, dim, dtype=None):
  return jax.nn.softmax(_cast(input, _dtype(dtype, input.dtype)), dim)


@_op("log_softmax")
def _log_softmax(input, dim, dtype=None):
  return jax.nn.log_softmax(_cast(input, _dtype(dtype, input.dtype)), dim)


@_op("gelu", table=_F, method=False)
def _gelu(input, approximate="none"):
  return jax.nn.gelu(input, approximate == "tanh")


@_op("silu", table=_F, method=False)
def _silu(input):
  return jax.nn.silu(input)


@_op("leaky_relu", table=_F, method=False)
def _leaky_relu(input, negative_slope=0.01):
  zero = _cast(0, input.dtype)
  slope = _cast(negative_slope, input.dtype)
  return jnp.where(input > zero, input, slope * input)


@_op("softplus", table=_F, method=False)
def _softplus(input):
  return jax.nn.softplus(input)


# --- Shapes ------------------------------------------------------------------


@_op("detach", "contiguous", function=False, view=True)
def _detach(input):
  return input


@_op("clone")
def _clone(input):
  return input


@_op("view", function=False, view=True)
def _view(input, *size):
  if any(isinstance(part, np.dtype) for part in size):
    raise NotImplementedError("view(dtype) is not supported; use x.to(dtype).")
  return jnp.reshape(input, _sizes(size))


@_op("reshape", view=True)
def _reshape(input, *shape):
  return jnp.reshape(input, _sizes(shape))


@_op("view_as", "reshape_as", function=False, view=True)
def _view_as(input, other):
  return jnp.reshape(input, other.shape)


@_op("ravel", view=True)
def _ravel(input):
  return jnp.reshape(input, (-1,))


@_op("flatten", view=True)
def _flatten(input, start_dim=0, end_dim=-1):
  if not input.ndim:
    return jnp.reshape(input, (1,))
  start, end = _axis(start_dim, input.ndim), _axis(end_dim, input.ndim)
  shape = input.shape
  middle = math.prod(shape[start : end + 1])
  return jnp.reshape(input, (*shape[:start], middle, *shape[end + 1 :]))


@_op("unflatten", view=True)
def _unflatten(input, dim, sizes):
  axis, shape = _axis(dim, input.ndim), input.shape
  rest = math.prod(size for size in sizes if size != -1)
  sizes = [shape[axis] // rest if size == -1 else size for size in sizes]
  return jnp.reshape(input, (*shape[:axis], *sizes, *shape[axis + 1 :]))


@_op("squeeze", view=True)
def _squeeze(input, dim=None):
  if dim is None:
    return jnp.squeeze(input)
  dims = dim if isinstance(dim, list | tuple) else (dim,)
  axes = [_axis(d, input.ndim) for d in dims]
  ones = [axis for axis in axes if input.ndim and input.shape[axis] == 1]
  return jnp.squeeze(input, tuple(ones))


@_op("unsqueeze", view=True)
def _unsqueeze(input, dim):
  return jnp.expand_dims(input, dim)


@_op("permute", view=True)
def _permute(input, *dims):
  return jnp.transpose(input, _sizes(dims))


@_op("transpose", "swapaxes", "swapdims", view=True)
def _transpose(input, dim0, dim1):
  return jnp.swapaxes(input, dim0, dim1) if input.ndim else input


@_op("t", view=True)
def _t(input):
  if input.ndim > 2:
    raise RuntimeError("t() needs a matrix; use transpose(dim0, dim1).")
  return jnp.transpose(input)


@_op("movedim", "moveaxis", view=True)
def _movedim(input, source, destination):
  return jnp.moveaxis(input, source, destination)


@_op("expand", function=False, view=True)
def _expand(input, *size):
  sizes = _sizes(size)
  old = (1,) * (len(sizes) - input.ndim) + tuple(input.shape)
  shape = [o if n == -1 else n for n, o in zip(sizes, old, strict=True)]
  return jnp.broadcast_to(input, shape)


@_op("broadcast_to", view=True)
def _broadcast_to(input, size):
  return _expand(input, size)


@_op("expand_as", function=False, view=True)
def _expand_as(input, other):
  return jnp.broadcast_to(input, other.shape)


@_op("repeat", function=False)
def _repeat(input, *repeats):
  sizes = _sizes(repeats)
  if len(sizes) < input.ndim:
    raise RuntimeError("repeat needs a number for each dimension.")
  return jnp.tile(input, sizes)


@_op("tile")
def _tile(input, *dims):
  return jnp.tile(input, _sizes(dims))


@_op("repeat_interleave")
def _repeat_interleave(input, repeats, dim=None):
  return jnp.repeat(input, operator.index(repeats), dim)


@_op("flip")
def _flip(input, *dims):
  return jnp.flip(input, _sizes(dims))


@_op("roll")
def _roll(input, shifts, dims=None):
  return jnp.roll(input, shifts, _dims(dims))


@_op("tril", inplace=True)
def _tril(input, diagonal=0):
  return jnp.tril(input, diagonal)


@_op("triu", inplace=True)
def _triu(input, diagonal=0):
  return jnp.triu(input, diagonal)


@_op("diag")
def _diag(input, diagonal=0):
  return jnp.diag(input, diagonal)


@_op("diagonal", view=True)
def _diagonal(input, offset=0, dim1=0, dim2=1):
  return jnp.diagonal(input, offset, dim1, dim2)


@_op("diag_embed")
def _diag_embed(input):
  eye = jnp.eye(input.shape[-1], dtype=np.bool_)
  return jnp.where(eye, input[..., None], _cast(0, input.dtype))


@_op("trace")
def _trace(input):
  return _sum(jnp.diagonal(input))


@_op("unfold", function=False, view=True)
def _unfold(input, dimension, size, step):
  axis = _axis(dimension, input.ndim)
  starts = range(0, input.shape[axis] - size + 1, step)
  windows = [
      jnp.moveaxis(_slice(input, axis, start, size), axis, -1)
      for start in starts
  ]
  return jnp.stack(windows, axis)


def _needs_list(tensors, name):
  if not isinstance(tensors, list | tuple) or not tensors:
    raise TypeError(f"{name} takes a list of tensors.")
  return tensors


@_op("stack", method=False)
def _stack(tensors, dim=0):
  return jnp.stack(_promote(*_needs_list(tensors, "stack")), dim)


@_op("cat", "concat", "concatenate", method=False)
def _cat(tensors, dim=0):
  return jnp.concatenate(_promote(*_needs_list(tensors, "cat")), dim)


@_op("hstack", method=False)
def _hstack(tensors):
  return jnp.hstack(_promote(*_needs_list(tensors, "hstack")))


@_op("vstack", method=False)
def _vstack(tensors):
  return jnp.vstack(_promote(*_needs_list(tensors, "vstack")))


@_op("split", view=True)
def _split(input, split_size_or_sections, dim=0):
  total = input.shape[dim]
  sizes = split_size_or_sections
  if isinstance(sizes, list | tuple):
    if sum(sizes) != total:
      raise RuntimeError(f"split: the sizes do not add up to {total}.")
  else:
    size = operator.index(sizes)
    sizes = [min(size, total - i) for i in range(0, total, size)]
  ends = np.cumsum(sizes)
  return tuple(
      _slice(input, dim, int(end) - size, size)
      for end, size in zip(ends, sizes, strict=True)
  )


@_op("chunk", view=True)
def _chunk(input, chunks, dim=0):
  return _split(input, max(1, -(-input.shape[dim] // chunks)), dim)


@_op("unbind", view=True)
def _unbind(input, dim=0):
  if not input.ndim:
    raise TypeError("a tensor without dimensions cannot be unbound.")
  return tuple(
      jnp.squeeze(_slice(input, dim, i), dim) for i in range(input.shape[dim])
  )


@_op("narrow", view=True)
def _narrow(input, dim, start, length):
  return _slice(input, dim, operator.index(start), operator.index(length))


@_op("select", view=True)
def _select(input, dim, index):
  index = operator.index(index) % input.shape[dim]
  return jnp.squeeze(_slice(input, dim, index), dim)


@_op("numel", "nelement")
def _numel(input):
  return input.size


@_op("is_floating_point")
def _is_floating_point(input):
  return _kind(input.dtype) == 2


Tensor.ndimension = Tensor.dim


# --- Indexing ----------------------------------------------------------------


def _index(key, shape):
  """A tuple for jnp, with torch's limits; lists and Tensors become arrays."""
  keys = key if isinstance(key, tuple) else (key,)
  keys = [unwrap(k) for k in keys]
  keys = [_from_data(k) if isinstance(k, list) else k for k in keys]
  # How many dimensions each takes up.
  widths = [
      0 if k is None or k is Ellipsis else k.ndim if _is_mask(k) else 1
      for k in keys
  ]
  if sum(widths) > len(shape):
    raise IndexError(f"too many indices for a tensor of shape {shape}.")
  full, axis = [], 0
  for k, width in zip(keys, widths, strict=True):
    if isinstance(k, bool):
      raise TypeError("a Python bool is no index; use torch.where.")
    if getattr(k, "dtype", None) == np.uint8:
      raise TypeError("in torch uint8 is a mask; write x.bool() or x.long().")
    if isinstance(k, slice) and (k.step or 1) < 1:
      raise ValueError("a slice needs a step above zero; use flip.")
    if isinstance(k, int) and not -shape[axis] <= k < shape[axis]:
      raise IndexError(f"index {k} is out of range for size {shape[axis]}.")
    if k is Ellipsis:
      width = len(shape) - sum(widths)
      full += [slice(None)] * width
    else:
      full.append(k)
    axis += width
  return tuple(full)


def _is_mask(key):
  return isinstance(key, jax.Array | np.ndarray) and key.dtype == np.bool_


def _assign_by_mask(array, key, value):
  """`array[key] = value`, where key is one mask among whole slices."""
  places = [i for i, k in enumerate(key) if _is_mask(k)]
  others = [k for k in key if not _is_mask(k)]
  if len(places) != 1 or any(k != slice(None) for k in others):
    raise TypeError(
        "a mask can be mixed with : only; use torch.where(mask, value, x)."
    )
  mask = key[places[0]]
  rest = array.ndim - places[0] - mask.ndim
  covered = array.shape[places[0] : places[0] + mask.ndim]
  if covered != mask.shape:
    raise IndexError(f"a mask of shape {mask.shape} is not of {covered}.")
  # A longer value has an element for each place of the mask that is true.
  value = _cast(value, array.dtype)
  if value.size > 1 and (value.ndim > rest or places[0]):
    raise TypeError(
        "x[mask] = values needs one number, since how many values fit depends"
        " on the mask; use x = torch.where(mask, values, x)."
    )
  if value.ndim > rest:
    value = value.reshape(())
  return jnp.where(mask.reshape(*mask.shape, *(1,) * rest), value, array)


def _grid(index, dim):
  """Index arrays of every axis, with `index` in place of that of dim."""
  axis = _axis(dim, index.ndim)
  grid = [
      jax.lax.broadcasted_iota(np.int32, index.shape, i)
      for i in range(index.ndim)
  ]
  return *grid[:axis], index, *grid[axis + 1 :]


@_op("gather")
def _gather(input, dim, index):
  return input[_grid(index, dim)]


@_op("scatter", inplace=True)
def _scatter(input, dim, index, src=None, *, value=None, reduce=None):
  if reduce is not None:
    raise NotImplementedError("scatter(reduce=) is not supported.")
  return input.at[_grid(index, dim)].set(_source(input, index, src, value))


def _source(input, index, src, value):
  src = _cast(value if src is None else src, input.dtype)
  return src[tuple(map(slice, index.shape))] if src.ndim else src


@_op("scatter_add", inplace=True)
def _scatter_add(input, dim, index, src):
  return input.at[_grid(index, dim)].add(_source(input, index, src, None))


@_op("index_select")
def _index_select(input, dim, index):
  return input[(slice(None),) * _axis(dim, input.ndim) + (index,)]


@_op("index_add", inplace=True)
def _index_add(input, dim, index, source, *, alpha=1):
  key = (slice(None),) * _axis(dim, input.ndim) + (index,)
  return input.at[key].add(_cast(_alpha(source, alpha), input.dtype))


@_op("index_copy", inplace=True)
def _index_copy(input, dim, index, source):
  key = (slice(None),) * _axis(dim, input.ndim) + (index,)
  return input.at[key].set(_cast(source, input.dtype))


@_op("index_fill", inplace=True)
def _index_fill(input, dim, index, value):
  return _index_copy(input, dim, index, value)


@_op("take")
def _take(input, index):
  return input.reshape(-1)[index]


@_op("take_along_dim")
def _take_along_dim(input, indices, dim=None):
  if dim is None:
    return input.reshape(-1)[indices.reshape(-1)]
  return jnp.take_along_axis(input, indices, dim)


# --- Linear algebra ----------------------------------------------------------

_LINALG: dict[str, Any] = {}  # torch.linalg


def _same_dtype(name, *arrays):
  if len({array.dtype for array in arrays}) > 1:
    raise RuntimeError(f"{name} needs tensors of one dtype; use x.to(y.dtype).")


def _product(names, function, ndims):
  """Registers a product of two arrays with these numbers of dimensions."""

  def body(input, other):
    if ndims and (input.ndim, other.ndim) != ndims:
      raise RuntimeError(f"{names[0]} needs {ndims} dimensions; use matmul.")
    _same_dtype(names[0], input, other)
    return function(input, other)

  _op(*names)(body)


_product(("matmul",), jnp.matmul, None)
_product(("mm",), jnp.matmul, (2, 2))
_product(("mv",), jnp.matmul, (2, 1))
_product(("bmm",), jnp.matmul, (3, 3))
_product(("dot", "vdot"), jnp.dot, (1, 1))
_product(("inner",), jnp.inner, None)


@_op("outer", "ger")
def _outer(input, vec2):
  if (input.ndim, vec2.ndim) != (1, 1):
    raise RuntimeError("outer needs two vectors.")
  a, b = _promote(input, vec2)
  return a[:, None] * b


# Of one operand it may be a transposed view.
@_op("einsum", method=False, view=lambda operands: operands == 1)
def _einsum(equation, *operands):
  if len(operands) == 1 and isinstance(operands[0], list | tuple):
    operands = operands[0]
  _same_dtype("einsum", *operands)
  return jnp.einsum(equation, *operands)


@_op("tensordot", method=False)
def _tensordot(a, b, dims=2):
  _same_dtype("tensordot", a, b)
  return jnp.tensordot(a, b, dims)


_LINALG_OP = functools.partial(_op, table=_LINALG, method=False)
_LINALG_OP("norm")(_linalg_norm)
_LINALG_OP("vector_norm")(_vector_norm)
_LINALG_OP("matrix_norm")(_matrix_norm)
_SVD = collections.namedtuple("_SVD", ("U", "S", "Vh"))
_OldSVD = collections.namedtuple("_OldSVD", ("U", "S", "V"))
_QR = collections.namedtuple("_QR", ("Q", "R"))
_Eigh = collections.namedtuple("_Eigh", ("eigenvalues", "eigenvectors"))
_Slogdet = collections.namedtuple("_Slogdet", ("sign", "logabsdet"))


@_LINALG_OP("svd")
def _svd(A, full_matrices=True):
  return _SVD(*jnp.linalg.svd(A, full_matrices=full_matrices))


@_op("svd")
def _old_svd(input, some=True, compute_uv=True):
  if not compute_uv:
    raise NotImplementedError("compute_uv=False: use torch.linalg.svdvals.")
  U, S, Vh = jnp.linalg.svd(input, full_matrices=not some)
  return _OldSVD(U, S, jnp.swapaxes(Vh, -2, -1))


@_LINALG_OP("svdvals")
def _svdvals(A):
  return jnp.linalg.svd(A, compute_uv=False)


@_op("qr", table=_LINALG, method=False)
def _qr(A, mode="reduced"):
  if mode == "r":
    raise NotImplementedError("mode='r' is not supported; use 'reduced'.")
  return _QR(*jnp.linalg.qr(A, mode))


@_LINALG_OP("eigh")
def _eigh(A, UPLO="L"):
  # Only the named triangle counts, as in torch.
  return _Eigh(*jnp.linalg.eigh(A, UPLO=UPLO, symmetrize_input=False))


@_LINALG_OP("eigvalsh")
def _eigvalsh(A, UPLO="L"):
  return _eigh(A, UPLO).eigenvalues


@_LINALG_OP("inv")
def _inv(A):
  return jnp.linalg.inv(A)


_op("inverse")(_inv)


@_LINALG_OP("pinv")
def _pinv(A, *, rtol=None):
  if rtol is None:  # torch's default; that of jnp is ten times larger.
    rtol = max(A.shape[-2:]) * float(jnp.finfo(A.dtype).eps)
  return jnp.linalg.pinv(A, rtol=rtol)


_op("pinverse")(_pinv)


@_LINALG_OP("solve")
def _solve(A, B):
  _same_dtype("solve", A, B)
  if B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1]):
    return jnp.linalg.solve(A, B[..., None])[..., 0]
  return jnp.linalg.solve(A, B)


@_LINALG_OP("cholesky")
def _cholesky(A):
  return jnp.linalg.cholesky(A, symmetrize_input=False)


_op("cholesky")(_cholesky)


@_LINALG_OP("det")
def _det(A):
  return jnp.linalg.det(A)


_op("det")(_det)


@_LINALG_OP("slogdet")
def _slogdet(A):
  return _Slogdet(*jnp.linalg.slogdet(A))


_op("slogdet")(_slogdet)


# --- Creation ----------------------------------------------------------------


def _from_data(data, dtype=None):
  """An array of a number, an array or nested sequences of both."""
  data = _unwrap_all(data, [])
  if isinstance(data, jax.Array | np.ndarray):
    array = data
  elif isinstance(data, list | tuple) and _holds_array(data):
    array = jnp.stack(_promote(*(_from_data(item) for item in data)))
  else:
    array = np.asarray(data)
    if array.dtype == object or array.dtype.kind not in "bif":
      raise TypeError(f"a tensor cannot be made of {data!r:.60}.")
    if not array.size and array.ndim:
      array = array.astype(np.float32)
  return jnp.asarray(_cast(array, _dtype(dtype, array.dtype)))


def _holds_array(data):
  if isinstance(data, list | tuple):
    return any(_holds_array(item) for item in data)
  return isinstance(data, jax.Array)


@_op("tensor", method=False)
def _tensor(data, *, dtype=None):
  return _from_data(data, dtype)


def _as_tensor(data, dtype=None, device=None):
  del device
  if isinstance(data, Tensor):
    return data.to(dtype)
  return _TORCH["tensor"](data, dtype=dtype)


_TORCH["as_tensor"] = _TORCH["asarray"] = _as_tensor


@_op("zeros", method=False)
def _zeros(*size, dtype=None):
  return jnp.zeros(_sizes(size), _dtype(dtype, _F32))


@_op("ones", method=False)
def _ones(*size, dtype=None):
  return jnp.ones(_sizes(size), _dtype(dtype, _F32))


@_op("full", method=False)
def _full(size, fill_value, *, dtype=None):
  dtype = _dtype(dtype, _dtype_of(fill_value))
  return jnp.full(_sizes((size,)), _cast(fill_value, dtype))


@_op("full_like", method=False)
def _full_like(input, fill_value, *, dtype=None):
  return _full(input.shape, fill_value, dtype=_dtype(dtype, input.dtype))


@_op("zeros_like", method=False)
def _zeros_like(input, *, dtype=None):
  return _full_like(input, 0, dtype=dtype)


@_op("ones_like", method=False)
def _ones_like(input, *, dtype=None):
  return _full_like(input, 1, dtype=dtype)


@_op("new_zeros", function=False)
def _new_zeros(input, *size, dtype=None):
  return _zeros(*size, dtype=_dtype(dtype, input.dtype))


@_op("new_ones", function=False)
def _new_ones(input, *size, dtype=None):
  return _ones(*size, dtype=_dtype(dtype, input.dtype))


@_op("new_full", function=False)
def _new_full(input, size, fill_value, *, dtype=None):
  return _full(size, fill_value, dtype=_dtype(dtype, input.dtype))


@_op("new_tensor", function=False)
def _new_tensor(input, data, *, dtype=None):
  return _from_data(data, _dtype(dtype, input.dtype))


@_op("arange", method=False)
def _arange(start, end=None, step=1, *, dtype=None):
  if end is None:
    start, end = 0, start
  dtype = _dtype(dtype, _result_type(start, end, step))
  # By their count, as torch: floats are start + i * step.
  count = max(0, math.ceil((end - start) / step))
  index = jax.lax.iota(np.int32, count)
  if _kind(dtype) == 2:
    index = _cast(index, dtype)
  return _cast(index * _cast(step, index.dtype), dtype) + _cast(start, dtype)


@_op("linspace", method=False)
def _linspace(start, end, steps, *, dtype=None):
  return jnp.linspace(start, end, steps, dtype=_dtype(dtype, _F32))


@_op("eye", method=False)
def _eye(n, m=None, *, dtype=None):
  return jnp.eye(n, m, dtype=_dtype(dtype, _F32))


# --- Random numbers ----------------------------------------------------------


class Generator:
  """torch.Generator on a jax key: the n-th draw is `fold_in(key, n)`."""

  __slots__ = ("_draws", "_seed")

  def __init__(self, device=None):
    del device
    self.manual_seed(0)

  def manual_seed(self, seed):
    self._seed, self._draws = operator.index(seed), 0
    return self

  def initial_seed(self):
    return self._seed

  def _next(self):
    key = jax.random.key(np.uint32(self._seed % 2**32))
    self._draws += 1
    return jax.random.fold_in(key, np.uint32(self._draws - 1))


def _key(generator):
  if not isinstance(generator, Generator):
    raise TypeError(_NO_GENERATOR)
  return generator._next()


@_op("rand", method=False)
def _rand(*size, generator=None, dtype=None):
  dtype = _dtype(dtype, _F32)
  return jax.random.uniform(_key(generator), _sizes(size), dtype)


@_op("randn", method=False)
def _randn(*size, generator=None, dtype=None):
  dtype = _dtype(dtype, _F32)
  return jax.random.normal(_key(generator), _sizes(size), dtype)


@_op("rand_like", method=False)
def _rand_like(input, *, generator=None, dtype=None):
  dtype = _dtype(dtype, input.dtype)
  return _rand(input.shape, generator=generator, dtype=dtype)


@_op("randn_like", method=False)
def _randn_like(input, *, generator=None, dtype=None):
  dtype = _dtype(dtype, input.dtype)
  return _randn(input.shape, generator=generator, dtype=dtype)


@_op("bernoulli")
def _bernoulli(input, p=None, *, generator=None):
  p = input if p is None else p
  draw = jax.random.bernoulli(_key(generator), p, input.shape)
  return _cast(draw, input.dtype)


@_op("normal", method=False)
def _normal(mean=0.0, std=1.0, size=None, *, generator=None):
  mean, std = _floating(mean, std)
  shape = jnp.broadcast_shapes(mean.shape, std.shape) if size is None else size
  return mean + std * _randn(shape, generator=generator)


@_op("randint", method=False)
def _randint(low, high, size=None, *, generator=None, dtype=None):
  if size is None:  # randint(high, size)
    low, high, size = 0, low, high
  dtype = _dtype(dtype, np.dtype(np.int32))
  key = _key(generator)
  return _cast(jax.random.randint(key, _sizes((size,)), low, high), dtype)


@_op("randperm", method=False)
def _randperm(n, *, generator=None):
  return jax.random.permutation(_key(generator), n)


# --- Operators ---------------------------------------------------------------


_OPERANDS = (Tensor, jax.Array, np.ndarray, np.generic, float, int)


def _swapped(call):
  return lambda self, other: call(other, self)


def _operators():
  """Tensor's operators, from the methods of the same meaning."""

  def operands(function):
    def call(self, other):
      if isinstance(other, _OPERANDS):
        return function(self, other)
      return NotImplemented

    return call

  for python, name in {
      "add": "add",
      "sub": "sub",
      "mul": "mul",
      "truediv": "div",
      "floordiv": "floor_divide",
      "mod": "remainder",
      "pow": "pow",
      "and": "bitwise_and",
      "or": "bitwise_or",
      "xor": "bitwise_xor",
      "matmul": "matmul",
  }.items():
    call = _TORCH[name]
    swapped = _TORCH["rsub"] if python == "sub" else call
    if python not in ("add", "sub", "and", "or", "xor"):
      swapped = _swapped(call)
    setattr(Tensor, f"__{python}__", operands(call))
    setattr(Tensor, f"__r{python}__", operands(swapped))
    if python != "matmul":  # torch has no in-place one.
      in_place = getattr(Tensor, f"{name}_")
      setattr(Tensor, f"__i{python}__", operands(in_place))
  for python in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tensor, f"__{python}__", operands(_TORCH[python]))
  Tensor.__neg__ = _TORCH["neg"]
  Tensor.__pos__ = _TORCH["positive"]
  Tensor.__abs__ = _TORCH["abs"]
  Tensor.__invert__ = _TORCH["bitwise_not"]
  for name in _words("float double half bfloat16 int long short bool"):
    setattr(Tensor, name, functools.partialmethod(Tensor._as, _DTYPES[name]))


_operators()


# --- Facades -----------------------------------------------------------------


class device:  # noqa: N801
  """torch.device: a name that changes nothing."""

  __slots__ = ("index", "type")

  def __init__(self, type, index=None):
    name, _, number = str(type).partition(":")
    self.type = name
    self.index = int(number) if number else index

  def __eq__(self, other):
    return isinstance(other, device) and repr(self) == repr(other)

  def __hash__(self):
    return hash(repr(self))

  def __repr__(self):
    return self.type if self.index is None else f"{self.type}:{self.index}"


class no_grad:  # noqa: N801
  """torch.no_grad as a context manager and a decorator; it does nothing."""

  __slots__ = ()

  def __new__(cls, function=None, **_):
    # `@torch.no_grad` and `@torch.no_grad()` both.
    return function if callable(function) else object.__new__(cls)

  def __call__(self, function):
    return function

  def __enter__(self):
    return self

  def __exit__(self, *_):
    return False


def _limits(info, number, *names):
  def limits(dtype):
    values = info(_dtype(dtype))
    # Python's numbers: they promote no tensor.
    return types.SimpleNamespace(
        bits=values.bits,
        **{name: number(getattr(values, name)) for name in names},
    )

  return limits


_SHAPE_OF_VALUES = (
    "the shape of its result depends on values; use torch.where with a mask of"
    " the tensor's shape."
)
_REFUSED = (
    dict.fromkeys(
        ("nonzero", "argwhere", "unique", "unique_consecutive"),
        _SHAPE_OF_VALUES,
    )
    | dict.fromkeys(
        ("masked_select", "masked_scatter", "masked_scatter_"), _SHAPE_OF_VALUES
    )
    | dict.fromkeys(
        ("empty", "empty_like"),
        "memory without values does not exist here; use torch.zeros_like.",
    )
    | {
        "manual_seed": _NO_GENERATOR,
        "numpy": "a program has no NumPy; keep the tensor.",
        "backward": "a merging program has no gradients.",
    }
)


@functools.cache
def module() -> dict[str, types.SimpleNamespace]:
  """The namespaces that a program imports, by their import names."""
  refused = {name: _refused(name, text) for name, text in _REFUSED.items()}
  for name, function in refused.items():
    setattr(Tensor, name, function)
  functional = _Module(
      "torch.nn.functional",
      dropout=_refused("dropout", "use torch.bernoulli with a generator."),
      **{
          name: _TORCH[name]
          for name in _words(
              "relu sigmoid tanh softmax log_softmax cosine_similarity"
          )
      },
      **_F,
  )
  linalg = _Module(
      "torch.linalg",
      matmul=_TORCH["matmul"],
      **_LINALG,
  )
  nn = _Module("torch.nn", functional=functional)
  torch = _Module(
      "torch",
      nn=nn,
      linalg=linalg,
      cuda=_Module("torch.cuda", is_available=lambda: False),
      Tensor=Tensor,
      Generator=Generator,
      device=device,
      no_grad=no_grad,
      inference_mode=no_grad,
      is_tensor=lambda value: isinstance(value, Tensor),
      finfo=_limits(jnp.finfo, float, "eps", "min", "max", "tiny"),
      iinfo=_limits(jnp.iinfo, int, "min", "max"),
      inf=math.inf,
      nan=math.nan,
      pi=math.pi,
      e=math.e,
      **_DTYPES,
      **refused,
      **_TORCH,
  )
  return {
      "torch": torch,
      "torch.nn": nn,
      "torch.nn.functional": functional,
      "torch.linalg": linalg,
  }
