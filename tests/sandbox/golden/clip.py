def merge(base, task_vectors):
  total = sum(task_vectors)
  limit = 2.0 * jnp.std(total) + total.var()
  return base + jnp.clip(total, -limit, limit)
