"""Applies a merge to the leaves of stacked parameters, a kernel a leaf kind.

A leaf kind is a per-layer shape. Layers are vmapped, so a method or a program
sees one tensor at a time, and each kind is compiled once.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import concurrent.futures
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from selfdev_jax import errors
from selfdev_jax import models

# (base, task_vectors, coefficients) -> tensor of base's shape, float32.
TensorMerge = Callable[[jax.Array, Sequence[jax.Array], jax.Array], jax.Array]
# A per-layer shape -> the kernel for it and its coefficients.
Method = Callable[[tuple[int, ...]], tuple[TensorMerge, np.ndarray]]

MLP, ALL = "mlp", "all"
_VOCABULARY = ("embed", "head")


def constant(fn: TensorMerge, coefficients: Sequence[float]) -> Method:
  """A method that treats every shape alike."""
  values = np.asarray(coefficients, np.float32)
  return lambda shape: (fn, values)


def leaf_shapes(
    base: models.Params, experts: Sequence[models.Params], scope: str
) -> list[tuple[int, ...]]:
  """The distinct per-layer shapes that a merge of that scope meets, sorted."""
  kinds = _kinds(base, experts, scope)
  return sorted({shape for _, shape in kinds})


def check_experts(
    base: models.Params, experts: dict[str, models.Params], seed_model: str
):
  """Asserts that the experts share the seed model's tensors.

  The number of rows of the embedding and the head may differ: see `merge`.

  Raises:
    UserError: naming the expert, the tensor and both shapes.
  """
  expected = _shapes(base)
  for name, expert in experts.items():
    found = _shapes(expert)
    for path in sorted(expected.keys() | found.keys()):
      ours, theirs = expected.get(path), found.get(path)
      if ours and theirs and path in _VOCABULARY:
        ours, theirs = ours[1:], theirs[1:]
      if ours != theirs:
        raise errors.UserError(
            f"expert {name} does not fit seed model {seed_model}: {path} is"
            f" {found.get(path, 'absent')} there and"
            f" {expected.get(path, 'absent')} in the seed model; experts have"
            " to be fine-tunes of the seed model"
        )


def _shapes(params: models.Params) -> dict[str, tuple[int, ...]]:
  return {
      "/".join(str(key.key) for key in path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def vocabulary_notes(
    base: models.Params, experts: dict[str, models.Params], scope: str
) -> list[str]:
  """Says which experts have other vocabularies, and what `merge` does then."""
  if scope != ALL:
    return []
  rows = base["embed"].shape[0]
  shared = min(rows, *(tree["embed"].shape[0] for tree in experts.values()))
  return [
      f"expert {name} has {expert['embed'].shape[0]} rows of vocabulary, the"
      f" seed model {rows}: the first {shared} are merged, the others stay the"
      " seed model's"
      for name, expert in experts.items()
      if expert["embed"].shape[0] != rows
  ]


def merge(
    method: Method,
    base: models.Params,
    experts: Sequence[models.Params],
    scope: str,
) -> tuple[models.Params, bool]:
  """Merges the experts into the base model.

  Args:
    method: gives the kernel of each leaf kind.
    base: the seed model's parameters, layers stacked.
    experts: parameters of the same structure. Where embeddings and heads have
      different numbers of rows, those that all have are merged; the others
      stay the base's, and those that it lacks are left out.
    scope: `mlp` merges the MLP's weights, as the paper does, and leaves the
      others the base's; `all` merges every leaf.

  Returns:
    (merged parameters in the base's dtypes, whether all are finite).
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(base)
  expert_leaves = [jax.tree.leaves(expert) for expert in experts]
  merged = [leaf for _, leaf in leaves]
  # Looked up here: the cache of kernels does not lock, and threads would make
  # one twice.
  tasks = []
  for (is_stacked, shape), indices in _kinds(base, experts, scope).items():
    fn, coefficients = method(shape)
    tasks.append((_kernel(fn, is_stacked), coefficients, indices))

  def merge_kind(task):
    kernel, coefficients, indices = task
    finite = []
    for i in indices:
      of_experts = [tree[i] for tree in expert_leaves]
      merged[i], is_finite = kernel(merged[i], of_experts, coefficients)
      finite.append(is_finite)
    return finite

  # A new program costs more to compile than to apply, and XLA compiles outside
  # of Python's lock: the kinds are compiled side by side.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    finite = [flag for flags in pool.map(merge_kind, tasks) for flag in flags]
  return jax.tree.unflatten(structure, merged), all(map(bool, finite))


# A compiled kernel takes 1 to 2 MB, and a run meets thousands.
@functools.lru_cache(maxsize=128)
def _kernel(fn: TensorMerge, stacked: bool):
  """`fn` jitted, over layers where there are some; compiled once a shape."""

  def one(base, experts, coefficients):
    wide = base.astype(jnp.float32)
    deltas = [expert.astype(jnp.float32) - wide for expert in experts]
    merged = fn(wide, deltas, coefficients).astype(base.dtype)
    return merged, jnp.all(jnp.isfinite(merged))

  def kernel(base, experts, coefficients):
    over = jax.vmap(one, (0, 0, None)) if stacked else one
    rows = min(len(leaf) for leaf in (base, *experts))
    shared = [expert[:rows] for expert in experts]
    merged, finite = over(base[:rows], shared, coefficients)
    if rows < len(base):
      merged = jnp.concatenate([merged, base[rows:]])
    return merged, jnp.all(finite)

  return jax.jit(kernel)


def _is_stacked(path) -> bool:
  return path[0].key == "layers"


def _in_scope(path, scope: str) -> bool:
  return scope == ALL or any(key.key == "mlp" for key in path)


def _kinds(
    base, experts, scope
) -> dict[tuple[bool, tuple[int, ...]], list[int]]:
  """(is stacked, shape of what is merged) -> the numbers of such leaves."""
  kinds = collections.defaultdict(list)
  leaves = jax.tree_util.tree_leaves_with_path(base)
  of_experts = [jax.tree.leaves(expert) for expert in experts]
  for i, (path, leaf) in enumerate(leaves):
    if _in_scope(path, scope):
      rows = min(len(leaf), *(len(tree[i]) for tree in of_experts))
      shape = leaf.shape[1:] if _is_stacked(path) else (rows, *leaf.shape[1:])
      kinds[_is_stacked(path), shape].append(i)
  return kinds
