"""Flax pytrees to and from Hugging Face directories."""

from selfdev_jax.convert.hf import ConvertError
from selfdev_jax.convert.hf import digest
from selfdev_jax.convert.hf import load
from selfdev_jax.convert.hf import load_adapter
from selfdev_jax.convert.hf import load_tokenizer
from selfdev_jax.convert.hf import read_config
from selfdev_jax.convert.hf import save
from selfdev_jax.convert.hf import save_adapter

__all__ = [
    "ConvertError",
    "digest",
    "load",
    "load_adapter",
    "load_tokenizer",
    "read_config",
    "save",
    "save_adapter",
]
