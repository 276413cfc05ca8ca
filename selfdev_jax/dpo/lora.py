"""LoRA adapters: a pytree of their own beside the frozen parameters.

E. J. Hu et al., LoRA, arXiv 2106.09685.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from selfdev_jax import models

_GROUPS = {
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
}


def scale(rank: int, alpha: float, rslora: bool) -> float:
  """Of the update B A: alpha / rank, or alpha / sqrt(rank).

  The root keeps the update's size where the rank grows: D. Kalajdzievski, A
  Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv 2312.03732.
  """
  return alpha / (rank**0.5 if rslora else rank)


def init(
    key: jax.Array,
    config: models.DecoderConfig,
    rank: int,
    targets: Sequence[str] = tuple(_GROUPS),
) -> models.Params:
  """A fresh adapter on matrices of every layer; it changes nothing yet.

  Args:
    key: PRNG key.
    config: the decoder's shape.
    rank: r.
    targets: among q, k, v, o, gate, up, down.

  Returns:
    {"layers": {"attention": {"q": {"a": [layers, rank, in],
    "b": [layers, out, rank]}, ...}, "mlp": ...}}, float32. `a` is uniform in
    +-1/sqrt(in), which is what PEFT's kaiming_uniform_(a=sqrt(5)) comes to;
    `b` is zero.
  """
  layers = models.abstract_params(config)["layers"]
  matrices: models.Params = {}
  for name in targets:
    group = _GROUPS[name]
    matrices.setdefault(group, {})[name] = layers[group][name]
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
