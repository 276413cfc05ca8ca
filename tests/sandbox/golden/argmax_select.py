def merge(base, task_vectors):
  stacked = jnp.stack(task_vectors)
  winner = jnp.argmax(jnp.abs(stacked), axis=0)
  picked = jnp.take_along_axis(stacked, winner[None], axis=0)[0]
  best = jnp.argmax(jnp.stack([jnp.sum(t**2) for t in task_vectors]))
  return base + picked + 0.1 * stacked[best]
