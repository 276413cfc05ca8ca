"""Generated programs as text: the contract, the prompt, the extraction."""

from selfdev_jax.programs.contract import ENTRY
from selfdev_jax.programs.extract import extract
from selfdev_jax.programs.extract import ExtractionError
from selfdev_jax.programs.prompt import load as load_prompt

__all__ = ["ENTRY", "ExtractionError", "extract", "load_prompt"]
