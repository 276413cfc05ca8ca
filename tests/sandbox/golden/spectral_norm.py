import jax.numpy as jnp


def merge(base, task_vectors):
  norms = [jnp.linalg.norm(t.reshape(t.shape[0], -1), ord=2)
           for t in task_vectors]
  return base + sum(t / (n + 1e-6) for t, n in zip(task_vectors, norms))
