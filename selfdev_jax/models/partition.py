"""Where the parameters lie on a mesh of devices."""

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from selfdev_jax.models.decoder import abstract_params
from selfdev_jax.models.decoder import DecoderConfig
from selfdev_jax.models.decoder import Params

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

# The last key of a path -> axes of its last dimensions. What is computed from
# the residual stream is cut by its outputs, what adds to it by its inputs
# (M. Shoeybi et al., Megatron-LM, arXiv 1909.08053).
_AXES = {
    # On both axes, XLA would rematerialise it whole at the gather.
    "embed": (TENSOR, None),
    "head": (TENSOR, FSDP),
    **dict.fromkeys(("q", "k", "v", "gate", "up"), (TENSOR, FSDP)),
    **dict.fromkeys(("o", "down"), (FSDP, TENSOR)),
    **dict.fromkeys(("q_bias", "k_bias", "v_bias"), (TENSOR,)),
}


_OF_HEADS = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias")


def shardings(config: DecoderConfig, mesh: Mesh) -> Params:
  """A `NamedSharding` for each leaf of the parameters.

  Args:
    config: the decoder's shape.
    mesh: with an axis `fsdp`, `tensor`, or both; on other axes everything is
      replicated, and so is along an axis what that axis does not divide.
  """

  def place(path, leaf):
    name = path[-1].key
    return _place(config, mesh, name, _AXES.get(name, ()), leaf.shape)

  return jax.tree_util.tree_map_with_path(place, abstract_params(config))


def adapter_shardings(
    config: DecoderConfig, adapter: Params, mesh: Mesh
) -> Params:
  """A `NamedSharding` for each factor: cut as the matrix that it belongs to.

  Args:
    config: the decoder's shape.
    adapter: `a` [layers, rank, in] and `b` [layers, out, rank] of each matrix,
      see `Decoder.__call__`; arrays or their shapes.
    mesh: see `shardings`.
  """

  def place(path, leaf):
    name = path[-2].key
    outputs, inputs = _AXES[name]
    axes = (None, inputs) if path[-1].key == "a" else (outputs, None)
    return _place(config, mesh, name, axes, leaf.shape)

  return jax.tree_util.tree_map_with_path(place, adapter)


def _place(config, mesh, name, axes, shape):
  """The last dimensions cut along `axes` where these divide them."""

  def fits(axis, size):
    if axis not in mesh.shape or size % mesh.shape[axis]:
      return False
    if axis != TENSOR or name not in _OF_HEADS:
      return True
    # A part of a head would be gathered again to be attended with.
    heads = config.kv_heads if name[0] in "kv" else config.heads
    return heads % mesh.shape[axis] == 0

  sizes = shape[len(shape) - len(axes) :]
  spec = [
      axis if fits(axis, size) else None
      for axis, size in zip(axes, sizes, strict=True)
  ]
  leading = [None] * (len(shape) - len(axes))
  return NamedSharding(mesh, PartitionSpec(*leading, *spec))
