"""Merge methods called as the engine calls them."""

from collections.abc import Mapping
from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import merging
from selfdev_jax.merging import methods


class _Apply:
  """apply(name, base, experts, {"density": 0.3}, ...) -> NumPy float32.

  Compiled once a method, its options, its shape and its number of experts;
  other parameters are traced.
  """

  def __call__(
      self,
      name: str,
      base: np.ndarray | None,
      experts: Sequence[np.ndarray],
      parameters: Mapping | None = None,
      *,
      dtype: str = "float32",
      seed: int = 0,
      statistics: Sequence[np.ndarray | None] | None = None,
  ) -> np.ndarray:
    method = merging.METHODS[name]
    values = self.resolve(name, parameters or {}, len(experts))
    options, traced = {}, {}
    for parameter in method.parameters:
      value = values[parameter.name]
      if parameter.kind is float:
        traced[_argument(parameter.name)] = jnp.float32(value)
      else:
        options[_argument(parameter.name)] = value
    if method.random:
      traced["key"] = jax.random.key(seed)
    if method.statistics:
      traced["statistics"] = list(statistics)
    wide = lambda x: jnp.asarray(x, jnp.float32)
    found = _compiled(name, dtype, tuple(options.items()))(
        None if base is None else wide(base), list(map(wide, experts)), traced
    )
    assert found.dtype == jnp.float32
    return np.asarray(found)

  def resolve(self, name: str, parameters: Mapping, count: int) -> dict:
    """Every parameter of the method, a value an expert where it has those."""
    known = {p.name: p for p in merging.METHODS[name].parameters}
    assert parameters.keys() <= known.keys()
    values = {}
    for parameter in known.values():
      value = parameters.get(parameter.name, parameter.default)
      assert value is not None, f"{name} needs {parameter.name}"
      if parameter.per_expert:
        value = list(np.broadcast_to(value, count))
      values[parameter.name] = value
    return values


def _argument(name: str) -> str:
  return "lambda_" if name == "lambda" else name


@functools.cache
def _compiled(name, dtype, options):
  fn = merging.METHODS[name].fn
  rounding = methods.rounding(dtype)

  def method(base, experts, traced):
    return fn(base, experts, round=rounding, **traced, **dict(options))

  return jax.jit(method)


@pytest.fixture(scope="session")
def apply():
  return _Apply()
