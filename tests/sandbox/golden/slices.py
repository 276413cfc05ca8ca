def merge(base, task_vectors):
  half = base.shape[0] // 2
  top = jnp.concatenate([task_vectors[0][:half], task_vectors[1][half:]])
  rolled = jnp.roll(task_vectors[2], 1, axis=0)
  changed = base.at[0].add(1.0).at[-1].multiply(2.0)
  return changed + top + rolled[::-1] + jnp.percentile(rolled, 30.0)
