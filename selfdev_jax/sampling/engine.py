"""Opens the sampler that generates for a model."""

import os
import pathlib

import jax
import transformers

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax.sampling import jax_sampler
from selfdev_jax.sampling import sampler
from selfdev_jax.sampling import vllm

KINDS = ("jax", "vllm")


def open_sampler(
    kind: str,
    decoder: models.DecoderConfig,
    params: models.Params,
    tokenizer: transformers.PreTrainedTokenizerBase,
    directory: pathlib.Path,
    *,
    longest: int,
    log_dir: pathlib.Path,
    settings: config_lib.Vllm,
    python: str | None = None,
    address: str | None = None,
) -> sampler.Sampler:
  """A sampler for weights like `params`; the caller swaps them in and closes.

  Args:
    kind: one of `KINDS`.
    decoder: the model's shape.
    params: weights of that shape, of which the dtypes count.
    tokenizer: the model's.
    directory: the model's; what ends a text stands there, and a vLLM server
      begins with it.
    longest: positions that a prompt and what follows it need at most.
    log_dir: gets the logs of vLLM servers.
    settings: of vLLM.
    python: the interpreter that has vLLM; None: `.venv-vllm`, or this.
    address: of a vLLM server that is there; None: one is started.

  Raises:
    SamplerError: if it cannot be had, or does not take such weights.
  """
  eos = convert.end_tokens(directory, tokenizer)
  if kind == "jax":
    return jax_sampler.JaxSampler(decoder, tokenizer, eos)
  if kind != "vllm":
    raise ValueError(f"no sampler is called {kind!r}")
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
  if len(dtypes) > 1:
    raise sampler.SamplerError(
        f"the model has tensors of {' and '.join(sorted(dtypes))}, vLLM serves"
        " one dtype; use the sampler jax"
    )
  check_shared_device("vLLM")
  return vllm.VllmSampler(
      decoder,
      tokenizer,
      eos,
      directory=directory,
      dtype=params["embed"].dtype,
      max_length=longest,
      log_dir=log_dir,
      python=python,
      address=address,
      transport=settings.transport,
      workers=settings.tensor_parallel,
      arguments=[
          f"--gpu-memory-utilization={settings.gpu_memory_utilization}",
          f"--tensor-parallel-size={settings.tensor_parallel}",
      ],
      start_timeout_s=settings.start_timeout_s,
      stall_timeout_s=settings.stall_timeout_s,
  )


def check_shared_device(other: str):
  """Says so where JAX leaves no room on the GPU for another process.

  Args:
    other: what that process is called.
  """
  if jax.default_backend() == "gpu" and (
      os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") != "false"
  ):
    progress.note(
        f"JAX takes most of the GPU's memory ahead of {other}: set"
        " XLA_PYTHON_CLIENT_PREALLOCATE=false"
    )
