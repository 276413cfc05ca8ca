from jax import lax


def merge(base, task_vectors):
  merged = base
  for tv in task_vectors:
    flat = jnp.abs(tv).ravel()
    values, indices = lax.top_k(flat, max(1, flat.size // 10))
    mask = jnp.zeros_like(flat).at[indices].set(1.0)
    merged = merged + tv * mask.reshape(tv.shape) + 0.0 * values[-1]
  return merged
