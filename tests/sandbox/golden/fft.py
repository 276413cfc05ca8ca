def merge(base, task_vectors):
  spectrum = jnp.fft.fft(sum(task_vectors), axis=-1)
  keep = jnp.abs(spectrum) > jnp.abs(spectrum).mean()
  return base + jnp.real(jnp.fft.ifft(jnp.where(keep, spectrum, 0), axis=-1))
