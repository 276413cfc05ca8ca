import jax
import jax.numpy as jnp


def merge(base, task_vectors):
  key = jax.random.PRNGKey(0)
  merged = base
  for i, tv in enumerate(task_vectors):
    keep = jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, tv.shape)
    merged = merged + 0.5 * jnp.where(keep, tv / 0.5, 0.0)
  return merged
