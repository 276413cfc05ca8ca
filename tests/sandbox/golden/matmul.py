def merge(base, task_vectors):
  x = jnp.atleast_2d(base)
  out = x
  for t in task_vectors:
    t = jnp.atleast_2d(t)
    out = out + 0.01 * (x @ x.T) @ t + jnp.matmul(t, t.T, precision="highest") @ x
  return out.reshape(base.shape)
