"""Decoders in Flax NNX, their parameters as plain nested dicts."""

from selfdev_jax.models.checksum import checksum
from selfdev_jax.models.decoder import abstract_params
from selfdev_jax.models.decoder import attention_kernel
from selfdev_jax.models.decoder import bind
from selfdev_jax.models.decoder import causal_mask
from selfdev_jax.models.decoder import DecoderConfig
from selfdev_jax.models.decoder import forward
from selfdev_jax.models.decoder import init_params
from selfdev_jax.models.decoder import logits
from selfdev_jax.models.decoder import Params
from selfdev_jax.models.decoder import prefix_layout
from selfdev_jax.models.decoder import Rope
from selfdev_jax.models.decoder import scale_adapter
from selfdev_jax.models.generation import generate
from selfdev_jax.models.generation import pad_left
from selfdev_jax.models.partition import adapter_shardings
from selfdev_jax.models.partition import DATA
from selfdev_jax.models.partition import FSDP
from selfdev_jax.models.partition import shardings
from selfdev_jax.models.partition import TENSOR

__all__ = [
    "DATA",
    "FSDP",
    "TENSOR",
    "DecoderConfig",
    "Params",
    "Rope",
    "abstract_params",
    "adapter_shardings",
    "attention_kernel",
    "bind",
    "causal_mask",
    "checksum",
    "forward",
    "generate",
    "init_params",
    "logits",
    "pad_left",
    "prefix_layout",
    "scale_adapter",
    "shardings",
]
