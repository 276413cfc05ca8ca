import math

import jax.numpy as jnp

WEIGHTS = jnp.array([0.1, 0.2, 0.3])
SCALE = math.sqrt(2)


def merge(base, task_vectors):
  return base + SCALE * jnp.tensordot(WEIGHTS, jnp.stack(task_vectors), axes=1)
