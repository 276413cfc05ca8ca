import jax.numpy as jnp


def merge(base, task_vectors):
  stacked = jnp.stack(task_vectors)
  trimmed = []
  for tv in task_vectors:
    threshold = jnp.quantile(jnp.abs(tv), 0.8)
    trimmed.append(jnp.where(jnp.abs(tv) >= threshold, tv, 0))
  trimmed = jnp.stack(trimmed)
  sign = jnp.sign(trimmed.sum(axis=0))
  agree = jnp.where(jnp.sign(trimmed) == sign, trimmed, 0.0)
  count = jnp.maximum((agree != 0).sum(axis=0), 1)
  return base + 0.7 * agree.sum(axis=0) / count + 0.0 * stacked.mean()
