"""Merge methods people made, each a pure function of one tensor.

A method is `fn(base, task_vectors, coefficients) -> tensor`: `base` and every
task vector (expert minus base) are float32 of one shape, `coefficients` is a
float32 vector whose entries are traced, so that a sweep compiles once.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def linear(
    base: jax.Array, task_vectors: Sequence[jax.Array], weights: jax.Array
) -> jax.Array:
  """Weighted average of the experts; the weights are normalised.

  Args:
    base: any shape, float32.
    task_vectors: arrays like `base`.
    weights: [experts], with a sum other than 0.

  References:
    M. Wortsman et al., Model soups, arXiv 2203.05482.
  """
  return weighted(base, task_vectors, weights / jnp.sum(weights))


def weighted(
    base: jax.Array, task_vectors: Sequence[jax.Array], weights: jax.Array
) -> jax.Array:
  """Base + sum_i weights[i] tau_i: task arithmetic with a weight an expert.

  Args:
    base: any shape, float32.
    task_vectors: arrays like `base`.
    weights: [experts].
  """
  return base + sum(w * t for w, t in zip(weights, task_vectors, strict=True))


def task_arithmetic(
    base: jax.Array, task_vectors: Sequence[jax.Array], coefficients: jax.Array
) -> jax.Array:
  """Base + scale * sum_i tau_i.

  Args:
    base: any shape, float32.
    task_vectors: arrays like `base`.
    coefficients: [1], the scale.

  References:
    G. Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089.
  """
  (scale,) = coefficients
  return base + scale * sum(task_vectors)


def ties(
    base: jax.Array, task_vectors: Sequence[jax.Array], coefficients: jax.Array
) -> jax.Array:
  """Trims each task vector, elects a sign an entry, averages who agrees.

  Entries tied in magnitude at the threshold are all kept.

  Args:
    base: any shape, float32.
    task_vectors: arrays like `base`.
    coefficients: [2], the density kept in (0, 1] and the scale.

  References:
    P. Yadav et al., TIES-merging, arXiv 2306.01708.
  """
  density, scale = coefficients
  keep = jnp.maximum(jnp.round(density * base.size), 1).astype(jnp.int32)
  trimmed = jnp.stack([_keep_largest(t, keep) for t in task_vectors])
  sign = jnp.sign(jnp.sum(trimmed, axis=0))
  agrees = (jnp.sign(trimmed) == sign) & (trimmed != 0)
  total = jnp.sum(jnp.where(agrees, trimmed, 0.0), axis=0)
  count = jnp.sum(agrees, axis=0)
  return base + scale * total / jnp.maximum(count, 1).astype(total.dtype)


def _keep_largest(x: jax.Array, k: jax.Array) -> jax.Array:
  """Zeroes all but the `k` entries of largest magnitude."""
  # The bits of a non-negative float order as it does: a binary search over
  # them finds the k-th largest in 31 counts, several times faster than a sort.
  bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)

  def narrow(i, low):
    higher = low | (jnp.int32(1) << (30 - i))
    return jnp.where(jnp.sum(bits >= higher) >= k, higher, low)

  threshold = jax.lax.fori_loop(0, 31, narrow, jnp.int32(0))
  return jnp.where(bits >= threshold, x, 0.0)


METHODS = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "weights": weighted,
}
