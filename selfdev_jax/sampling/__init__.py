"""Where texts come from."""

from selfdev_jax.sampling.jax_sampler import Generation
from selfdev_jax.sampling.jax_sampler import JaxSampler
from selfdev_jax.sampling.jax_sampler import slots

__all__ = ["Generation", "JaxSampler", "slots"]
