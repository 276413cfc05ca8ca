"""LoRA adapters: a pytree of their own beside the frozen parameters.

E. J. Hu et al., LoRA, arXiv 2106.09685.
"""

import jax
import jax.numpy as jnp

from selfdev_jax import models

_GROUPS = ("attention", "mlp")


def init(
    key: jax.Array, config: models.DecoderConfig, rank: int
) -> models.Params:
  """A fresh adapter on every matrix of every layer; it changes nothing yet.

  Args:
    key: PRNG key.
    config: the decoder's shape.
    rank: r.

  Returns:
    {"layers": {"attention": {"q": {"a": [layers, rank, in],
    "b": [layers, out, rank]}, ...}, "mlp": ...}}, float32. `a` is uniform in
    +-1/sqrt(in), which is what PEFT's kaiming_uniform_(a=sqrt(5)) comes to;
    `b` is zero.
  """
  layers = models.abstract_params(config)["layers"]
  matrices = {group: layers[group] for group in _GROUPS}
  leaves, tree = jax.tree.flatten(matrices)

  def pair(key, matrix):
    n, outputs, inputs = matrix.shape
    bound = inputs**-0.5
    shape = (n, rank, inputs)
    return {
        "a": jax.random.uniform(key, shape, jnp.float32, -bound, bound),
        "b": jnp.zeros((n, outputs, rank), jnp.float32),
    }

  keys = jax.random.split(key, len(leaves))
  pairs = [pair(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
  return {"layers": jax.tree.unflatten(tree, pairs)}
