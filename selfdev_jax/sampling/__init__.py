"""Where texts come from."""

from selfdev_jax.sampling.jax_sampler import Generation
from selfdev_jax.sampling.jax_sampler import JaxSampler

__all__ = ["Generation", "JaxSampler"]
