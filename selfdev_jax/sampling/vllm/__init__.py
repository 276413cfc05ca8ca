"""vLLM as a sampler: its server, the way for weights, and who uses both."""

from selfdev_jax.sampling.vllm.error import EngineError
from selfdev_jax.sampling.vllm.server import find_python
from selfdev_jax.sampling.vllm.server import is_installed
from selfdev_jax.sampling.vllm.vllm_sampler import VllmSampler

__all__ = ["EngineError", "VllmSampler", "find_python", "is_installed"]
