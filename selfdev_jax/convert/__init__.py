"""Models in and out: Hugging Face and PEFT directories, Orbax checkpoints."""

from selfdev_jax.convert.adapters import Adapter
from selfdev_jax.convert.adapters import apply_adapter
from selfdev_jax.convert.adapters import load_adapter
from selfdev_jax.convert.adapters import save_adapter
from selfdev_jax.convert.checkpoint import open_checkpoint
from selfdev_jax.convert.checkpoint import restore
from selfdev_jax.convert.checkpoint import save_checkpoint
from selfdev_jax.convert.error import ConvertError
from selfdev_jax.convert.families import FAMILIES
from selfdev_jax.convert.files import aligned_empty
from selfdev_jax.convert.files import DTYPES
from selfdev_jax.convert.files import Lazy
from selfdev_jax.convert.files import Tensor
from selfdev_jax.convert.hf import digest
from selfdev_jax.convert.hf import end_tokens
from selfdev_jax.convert.hf import file_names
from selfdev_jax.convert.hf import get_path
from selfdev_jax.convert.hf import load
from selfdev_jax.convert.hf import load_tokenizer
from selfdev_jax.convert.hf import named_leaves
from selfdev_jax.convert.hf import open_leaves
from selfdev_jax.convert.hf import read_config
from selfdev_jax.convert.hf import resolve
from selfdev_jax.convert.hf import save
from selfdev_jax.convert.hf import set_path
from selfdev_jax.convert.hf import TOKENIZER_FILES

__all__ = [
    "DTYPES",
    "FAMILIES",
    "TOKENIZER_FILES",
    "Adapter",
    "ConvertError",
    "Lazy",
    "Tensor",
    "aligned_empty",
    "apply_adapter",
    "digest",
    "end_tokens",
    "file_names",
    "get_path",
    "load",
    "load_adapter",
    "load_tokenizer",
    "named_leaves",
    "open_checkpoint",
    "open_leaves",
    "read_config",
    "resolve",
    "restore",
    "save",
    "save_adapter",
    "save_checkpoint",
    "set_path",
]
