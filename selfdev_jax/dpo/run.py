"""From files to files: a model and preference pairs to a better model."""

from collections.abc import Callable
import contextlib
import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax import store
from selfdev_jax.dpo import data as data_lib
from selfdev_jax.dpo import lora
from selfdev_jax.dpo import step as step_lib
from selfdev_jax.dpo import train as train_lib


def run(
    config: config_lib.Dpo,
    model: str,
    pairs: str,
    workdir: str | os.PathLike,
    *,
    adapter: str | None = None,
    export: str | None = None,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] = lambda *_: None,
) -> dict[str, Any]:
  """Trains a model on a file of pairs, or goes on where that was stopped.

  Args:
    config: what is trained, and how.
    model: a Hugging Face directory, or `org/name[@revision]` on the hub.
    pairs: see `data.read`.
    workdir: see `workdir.Workdir`; gets `adapter/` too, a PEFT directory.
    adapter: a PEFT directory to start from; None: a fresh adapter.
    export: a new directory for the whole model, the adapter added to its
      weights; None: none is written.
    seed: of the fresh adapter and of the order of pairs.
    on_step: see `train.train`.

  Returns:
    The last step's metrics, and how many pairs and steps there were.

  Raises:
    UserError: for models, pairs, adapters or workdirs that do not fit.
  """
  if export is not None and pathlib.Path(export).exists():
    raise errors.UserError(f"--export={export} exists; name a new directory")
  if adapter is not None and config.trains == "full":
    raise errors.UserError(
        "--adapter goes with --config.trains=lora; launch.convert adds an"
        " adapter to the weights"
    )
  directory = convert.resolve(model)
  tokenizer = convert.load_tokenizer(directory)
  decoder = convert.read_config(directory)
  data = train_lib.prepare(config, decoder, tokenizer, data_lib.read(pairs))
  key = jax.random.key(seed)
  start = None
  if adapter is not None:
    start = _read_adapter(config, decoder, adapter)
  elif config.trains == "lora":
    start = lora.init(
        jax.random.fold_in(key, 0),
        decoder,
        config.lora_rank,
        config.lora_targets,
    )
  shardings = models.shardings(decoder, step_lib.make_mesh(config))
  is_first = jax.process_index() == 0
  with store.lock(workdir) if is_first else contextlib.nullcontext():
    trained, history = train_lib.train(
        config,
        decoder,
        convert.load(directory, shardings)[1],
        start,
        data,
        jax.random.fold_in(key, 1),
        workdir=workdir,
        weights=convert.digest(directory),
        on_step=on_step,
    )
    if is_first:
      workdir = pathlib.Path(workdir)
      _write(config, decoder, directory, trained, workdir, export)
    if jax.process_count() > 1:
      # Or the others would be gone while the first still writes.
      multihost_utils.sync_global_devices("written")
  return {"pairs": len(data.pairs), "steps": len(history), **history[-1]}


def _read_adapter(config, decoder, directory) -> models.Params:
  """The factors on disk, which have to be what the config describes."""
  loaded = convert.load_adapter(directory, decoder)
  shapes = lambda tree: {
      jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  wanted = shapes(
      jax.eval_shape(
          lambda: lora.init(
              jax.random.key(0), decoder, config.lora_rank, config.lora_targets
          )
      )
  )
  found = shapes(loaded.params)
  for name in sorted(wanted.keys() | found.keys()):
    if wanted.get(name) != found.get(name):
      raise errors.UserError(
          f"--adapter={directory} holds {name} of shape {found.get(name)}, but"
          f" dpo.lora_rank={config.lora_rank} and dpo.lora_targets="
          f"{','.join(config.lora_targets)} ask for {wanted.get(name)}; let"
          " them describe the adapter"
      )
  scale = lora.scale(config.lora_rank, config.lora_alpha, config.rslora)
  if not math.isclose(scale, loaded.scale):
    raise errors.UserError(
        f"--adapter={directory} is scaled by {loaded.scale:g}, but"
        f" dpo.lora_alpha={config.lora_alpha:g} and dpo.rslora={config.rslora}"
        f" ask for {scale:g}; let them describe the adapter"
    )
  return loaded.params


def _write(config, decoder, directory, trained, workdir, export):
  """The adapter, and where it is asked for the whole model."""
  if config.trains == "lora":
    convert.save_adapter(
        workdir / "adapter",
        trained,
        config=decoder,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        rslora=config.rslora,
        base=str(directory),
    )
  if export is None:
    if config.trains == "full":
      progress.note(
          "the weights are in the workdir's checkpoint; the same command with"
          " --export=DIR writes them as a Hugging Face directory"
      )
    return
  _, leaves = convert.open_leaves(directory)
  if config.trains == "lora":
    scale = lora.scale(config.lora_rank, config.lora_alpha, config.rslora)
    leaves = convert.apply_adapter(leaves, convert.Adapter(trained, scale))
  else:
    leaves = jax.tree.map(
        lambda new, old: _Rounded(new, np.dtype(old.dtype)), trained, leaves
    )
  convert.save(export, decoder, leaves, like=directory)


@dataclasses.dataclass(frozen=True)
class _Rounded:
  """A float32 leaf in another dtype; made when it is asked for."""

  leaf: np.ndarray
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return self.leaf.shape

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy
    return self.leaf.astype(dtype or self.dtype)
