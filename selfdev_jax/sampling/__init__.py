"""Where texts come from."""

from selfdev_jax.sampling.jax_sampler import JaxSampler
from selfdev_jax.sampling.jax_sampler import slots
from selfdev_jax.sampling.replay import Recorder
from selfdev_jax.sampling.replay import ReplaySampler
from selfdev_jax.sampling.sampler import Generation
from selfdev_jax.sampling.sampler import Sampler
from selfdev_jax.sampling.sampler import SamplerError
from selfdev_jax.sampling.vllm import find_python
from selfdev_jax.sampling.vllm import is_installed
from selfdev_jax.sampling.vllm import VllmSampler

__all__ = [
    "Generation",
    "JaxSampler",
    "Recorder",
    "ReplaySampler",
    "Sampler",
    "SamplerError",
    "VllmSampler",
    "find_python",
    "is_installed",
    "slots",
]
