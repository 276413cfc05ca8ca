def merge(base, task_vectors):
  x = jnp.atleast_2d(base)
  gram = x @ x.T + 3.0 * jnp.eye(x.shape[0])
  out = x + jnp.linalg.solve(gram, jnp.atleast_2d(sum(task_vectors)))
  q, r = jnp.linalg.qr(x)
  values, _ = jnp.linalg.eigh(gram)
  out = out + q @ r + jnp.linalg.inv(gram) @ x + values[-1]
  out = out + jnp.linalg.cholesky(gram) @ x + jnp.trace(gram)
  return out.reshape(base.shape)
