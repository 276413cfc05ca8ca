"""Training on preference pairs, resumable between any two steps."""

from collections.abc import Callable
from collections.abc import Sequence
import hashlib
import json
import math
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import transformers

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax.dpo import batches
from selfdev_jax.dpo import data as data_lib
from selfdev_jax.dpo import step as step_lib
from selfdev_jax.dpo import workdir as workdir_lib

# What may change when a training is taken up again.
_FREE = ("fsdp", "tensor", "save_every", "remat")


def prepare(
    config: config_lib.Dpo,
    decoder: models.DecoderConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
) -> data_lib.Data:
  """Token ids of preference pairs; says how many were skipped or cut.

  Args:
    config: for its `max_length`.
    decoder: the model's shape.
    tokenizer: its tokenizer.
    rows: see `data.tokenize`, which also says what it raises.
  """
  positions = decoder.max_positions
  data = data_lib.tokenize(
      rows,
      tokenizer,
      vocab_size=decoder.vocab_size,
      max_length=min(config.max_length or positions, positions),
  )
  if data.counts.note():
    progress.note(data.counts.note())
  return data


def train(
    config: config_lib.Dpo,
    decoder: models.DecoderConfig,
    params: models.Params,
    adapter: models.Params | None,
    data: data_lib.Data,
    key: jax.Array,
    *,
    workdir: str | os.PathLike,
    weights: str,
    label: str = "DPO",
    on_step: Callable[[int, dict[str, float]], None] = lambda *_: None,
) -> tuple[models.Params, list[dict[str, float]]]:
  """Trains an adapter, or every weight.

  Equal arguments give equal bits where the device's sums have one order (not a
  GPU's scatter-adds). Several processes call it with equal arguments.

  Args:
    config: what is trained, and how.
    decoder: the model's shape.
    params: the model; read only.
    adapter: where to start; as from `lora.init`, unscaled; left as it is. None
      where `config.trains` is `full`.
    data: the pairs.
    key: PRNG key of the order of pairs.
    workdir: keeps checkpoints, metrics and the reference; a training that was
      killed is taken up from there.
    weights: names the model's weights and its tokenizer, a digest.
    label: of the progress bar.
    on_step: is told each step that is taken, from 1, and its metrics; where a
      checkpoint is due, after it was begun, when the one before it is whole.

  Returns:
    (what was trained, as NumPy arrays, float32; metrics of each step under
    TRL's names).

  Raises:
    UserError: naming the step at which loss or gradient was not finite; or if
      the workdir belongs to another training.
  """
  mesh = step_lib.make_mesh(config)
  dtype = params["embed"].dtype
  if dtype == jnp.float16:
    # Float16 has no small numbers, and DPO's gradients are small.
    dtype = jnp.dtype(jnp.bfloat16)
  plan = batches.plan(
      data,
      key,
      steps=config.steps,
      batch_size=config.batch_size,
      parts=config.parts,
      per_row=batches.COMPLETIONS[config.layout],
      multiple=step_lib.rows_multiple(mesh),
  )
  stepper = step_lib.stepper(config, decoder, dtype, mesh, plan.span)
  settings = config_lib.to_dict(config).items()
  made_from = {f"dpo.{k}": str(v) for k, v in settings if k not in _FREE}
  made_from |= {
      "weights": weights,
      "adapter": "none" if adapter is None else _digest(adapter),
      "data": data.digest(),
      "key": str(jax.random.key_data(key)),
  }
  _agree(made_from, mesh)
  with workdir_lib.Workdir(workdir, made_from) as kept:
    frozen = {}
    if adapter is not None:
      frozen = jax.tree.map(lambda leaf: _as(leaf, dtype), params)
      frozen = step_lib.put(frozen, stepper.frozen_shardings)
    trained = params if adapter is None else adapter
    trained = step_lib.put(trained, stepper.trained_shardings)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        jax.eval_shape(stepper.init, trained),
        stepper.state_shardings,
    )
    # In each step, where the adapter is switched off for it.
    reference = np.zeros(len(data.completions), np.float32)
    if config.reference == "precomputed":
      reference = kept.read_reference(made_from)
      if reference is None:
        reference = _reference(stepper, frozen, trained, plan, label)
        kept.write_reference(made_from, reference)
    # Where all weights are trained: one copy less beside the state.
    if kept.has_checkpoint():
      del params, trained
      state, done = kept.restore(abstract)
    else:
      state, done = stepper.init(trained), 0
      del params, trained
    history = kept.begin_metrics(done)
    state = _steps(
        config,
        stepper,
        frozen,
        state,
        plan,
        reference,
        kept,
        history,
        label,
        on_step,
    )
    kept.finish()
    return step_lib.fetch(state.trained), history


def _agree(made_from: dict[str, str], mesh: jax.sharding.Mesh):
  """Refuses processes that were not started with the same arguments."""
  if jax.process_count() == 1:
    return
  text = json.dumps([made_from, dict(mesh.shape)], sort_keys=True)
  mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  if np.any(multihost_utils.process_allgather(mine) != mine):
    raise errors.UserError(
        "the processes were not started alike: config, model, pairs, adapter"
        " and seed have to be the same for all of them"
    )


def _as(leaf, dtype):
  """Float16 as bfloat16, other leaves as they are."""
  return leaf.astype(dtype) if leaf.dtype == jnp.float16 else leaf


def _digest(adapter: models.Params) -> str:
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(adapter):
    found.update(np.ascontiguousarray(leaf).view(np.uint8))
  return found.hexdigest()


def _reference(stepper, frozen, trained, plan, label) -> np.ndarray:
  """[completions] float32, of those that a step sees; each computed once."""
  data = plan.data
  seen = np.unique(data.pairs[plan.order])
  filled = batches.fill(data, seen, plan.per_row)
  filled.sort(key=lambda row: batches.tokens(data, row))
  lots = [
      filled[at : at + plan.rows] for at in range(0, len(filled), plan.rows)
  ]
  shapes = batches.shapes([batches.most_tokens(data, lot) for lot in lots])
  logps = np.zeros(len(data.completions), np.float32)
  with progress.bar(f"{label}: reference", len(filled), "row") as shown:
    for lot, shape in zip(lots, shapes, strict=True):
      rows = batches.pack(data, lot, plan.per_row, plan.rows, shape)
      rows = step_lib.put(rows, batches.Rows(*(stepper.rows_sharding,) * 5))
      found = np.asarray(stepper.reference(frozen, trained, rows))
      for i, row in enumerate(lot):
        logps[row] = found[i, : len(row)]
      shown.update(len(lot))
  return logps


def _steps(
    config,
    stepper,
    frozen,
    state,
    plan,
    reference,
    kept,
    history,
    label,
    on_step,
) -> step_lib.State:
  """The steps that `history` lacks; their metrics are appended to it."""
  schedule = step_lib.schedule(config)
  done = len(history)
  tokens = history[-1]["num_tokens"] if history else 0.0
  if done == config.steps:
    return state
  with progress.bar(label, config.steps, done=done) as shown:
    for step in range(done, config.steps):
      if step == done:
        batch = plan.batch(step, reference)
      placed = step_lib.put(batch, stepper.batch_shardings)
      state, metrics = stepper.step(frozen, state, placed)
      if step + 1 < config.steps:  # While the devices work.
        batch = plan.batch(step + 1, reference)
      tokens += plan.tokens(step)
      metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
      for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
          path = kept.write_lines(
              f"not_finite_step_{step + 1}.jsonl", plan.describe(step)
          )
          raise errors.UserError(
              f"{label}: {name} is {metrics[name]} at step {step + 1} of"
              f" {config.steps}; its pairs are in {path}. Lower"
              " dpo.learning_rate, or take the pairs out, with another"
              " --workdir"
          )
      metrics |= {
          "learning_rate": float(schedule(step)),
          "num_tokens": tokens,
          "epoch": (step + 1) * config.batch_size / len(plan.data.pairs),
      }
      history.append(metrics)
      kept.log(step + 1, metrics)
      if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
        # Waits for the save before it, not for its own end.
        kept.save(step + 1, state)
      on_step(step + 1, metrics)
      shown.update()
  return state
