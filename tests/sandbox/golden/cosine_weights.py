import jax.numpy as jnp
from functools import reduce


def cosine(a, b):
  return jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b) + 1e-8)


def merge(base, task_vectors):
  mean = reduce(lambda a, b: a + b, task_vectors) / len(task_vectors)
  weights = jnp.stack([jnp.maximum(cosine(t, mean), 0.0)
                       for t in task_vectors])
  weights = weights / (weights.sum() + 1e-8)
  return base + sum(w * t for w, t in zip(weights, task_vectors))
