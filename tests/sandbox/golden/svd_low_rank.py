import jax.numpy as jnp


def merge(base, task_vectors):
  merged = base
  for tv in task_vectors:
    if tv.ndim < 2:
      merged = merged + 0.5 * tv
      continue
    u, s, vt = jnp.linalg.svd(tv, full_matrices=False)
    k = max(1, s.shape[0] // 2)
    merged = merged + (u[:, :k] * s[:k]) @ vt[:k]
  return merged
