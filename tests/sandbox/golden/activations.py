from jax import nn


def merge(base, task_vectors):
  x = sum(task_vectors)
  gate = nn.sigmoid(x) + nn.relu(x) + nn.gelu(x) + jnp.tanh(x) + nn.silu(x)
  return base + x * gate + jnp.logaddexp(x, 0.0) + nn.softplus(x)
