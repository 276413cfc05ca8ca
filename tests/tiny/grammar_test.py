import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax.tiny import grammar


def _run(body, base, task_vectors):
  """Runs one of our own grammar's programs."""
  scope = {"jnp": jnp}
  exec("def merge(base, task_vectors):\n" + body, scope)
  return scope["merge"](base, task_vectors)


@pytest.mark.slow
def test_every_program_runs_and_keeps_the_shape():
  rng = random.Random(0)
  keys = jax.random.split(jax.random.key(0), 4)
  for shape in ((5, 7), (6,)):
    base, *taus = (jax.random.normal(key, shape) for key in keys)
    for _ in range(60):
      body = grammar.body(rng)
      merged = _run(body, base, taus)
      assert merged.shape == shape, body
      assert np.isfinite(merged).all(), body


def test_the_grammar_is_varied_and_repeats_by_seed():
  rng, same = random.Random(1), random.Random(1)
  bodies = [grammar.body(rng) for _ in range(500)]
  assert bodies == [grammar.body(same) for _ in range(500)]
  assert len(set(bodies)) > 450


def test_what_is_to_be_discovered_is_not_in_it():
  rng = random.Random(2)
  text = "".join(grammar.body(rng) for _ in range(3000))
  # A median of three is entry 1 of the sorted stack; an inverse norm divides
  # by the norm alone.
  assert "median" not in text
  assert "z[1]" not in text
  assert "/ jnp.linalg.norm" not in text and "/ x" not in text
  assert "1.0 / " not in text
