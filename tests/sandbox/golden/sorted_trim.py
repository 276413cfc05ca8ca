def merge(base, task_vectors):
  ordered = jnp.sort(jnp.stack(task_vectors), axis=0)
  order = jnp.argsort(jnp.stack(task_vectors), axis=0)
  return base + ordered[1:].mean(0) + 1e-3 * order[0].astype(jnp.float32)
