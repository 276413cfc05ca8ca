"""Every method against a float64 twin in NumPy, written from its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import merging


def _linear(base, taus, weights):
  experts = [base + tau for tau in taus]
  return sum(w * e for w, e in zip(weights, experts, strict=True)) / sum(
      weights
  )


def _task_arithmetic(base, taus, coefficients):
  return base + coefficients[0] * sum(taus)


def _weights(base, taus, weights):
  return base + sum(w * tau for w, tau in zip(weights, taus, strict=True))


def _ties(base, taus, coefficients):
  density, scale = coefficients
  trimmed = []
  for tau in taus:
    keep = max(round(density * tau.size), 1)
    threshold = np.sort(np.abs(tau), axis=None)[-keep]
    trimmed.append(np.where(np.abs(tau) >= threshold, tau, 0.0))
  sign = np.sign(sum(trimmed))
  merged = np.zeros_like(base)
  for index in np.ndindex(base.shape):
    agreeing = [t[index] for t in trimmed if t[index] * sign[index] > 0]
    if agreeing:
      merged[index] = np.mean(agreeing)
  return base + scale * merged


_TWINS = {
    "linear": (_linear, [0.2, 0.5, 0.9]),
    "task_arithmetic": (_task_arithmetic, [0.35]),
    "ties": (_ties, [0.4, 1.3]),
    "weights": (_weights, [0.2, -0.5, 0.9]),
}


@pytest.mark.parametrize("name", merging.METHODS)
@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 4)])
def test_matches_float64_twin(name, shape):
  rng = np.random.default_rng(0)
  base, *taus = rng.normal(size=(4, *shape))
  twin, coefficients = _TWINS[name]
  expected = twin(
      *jax.tree.map(lambda x: x.astype(np.float32).astype(float), (base, taus)),
      coefficients,
  )
  found = jax.jit(merging.METHODS[name])(
      *jax.tree.map(jnp.float32, (base, taus)), jnp.float32(coefficients)
  )
  assert found.dtype == jnp.float32
  # A few roundings of float32, whose epsilon is 1.2e-7, at values up to 5.
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_ties_keeps_all_that_tie_at_the_threshold(density):
  rng = np.random.default_rng(1)
  taus = rng.integers(-3, 4, size=(3, 6, 8)).astype(np.float32)
  base = np.zeros((6, 8), np.float32)
  found = merging.ties(base, list(taus), jnp.float32([density, 1.0]))
  np.testing.assert_allclose(
      found, _ties(base, taus, [density, 1.0]), rtol=1e-6
  )


def test_ties_of_zero_task_vectors_is_the_base():
  base = jnp.arange(6.0)
  found = merging.ties(base, [0 * base] * 3, jnp.float32([0.5, 1.0]))
  np.testing.assert_array_equal(found, base)
