r"""Shows what a step of DPO costs, for a model of which no weights are needed.

  python -m launch.profile_dpo --config=configs/dpo.py --shape=mistral-7b \
    --virtual_devices=8 --config.fsdp=8
  python -m launch.profile_dpo --config=configs/dpo.py --shape=mistral-7b --run

The first compiles the step for so many virtual CPU devices and says what each
would need: XLA's memory_analysis() of weights, of the training's state and of
what a step has in between. XLA on a CPU widens bfloat16 weights to float32
before it multiplies, a GPU or TPU does not: what is in between is less there.

The second draws random weights on the devices that there are and trains on
them. Its rates are medians of --steps steps after two more, blocked until
ready:

  tokens/s    of prompts and completions as TRL counts them, a prompt for each
              completion; `slots/s` counts what the rows hold, padding too
  MFU         the FLOPs of all matrix products of a step in which nothing is
              computed twice (but the logits, in the backward pass), a second,
              by the devices' peak (--peak_tflops, known for some); attention's
              only where XLA computes it, not where a kernel does

Prompts have --prompt_tokens tokens, completions --completion_tokens, all in the
vocabulary at random. Standard output ends in one line of JSON.
"""

import dataclasses
import functools
import json
import math
import statistics
import time

from absl import flags
import jax
import jax.extend as jex
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from launch import app
from launch.shapes import SHAPES
from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.dpo import batches
from selfdev_jax.dpo import data as data_lib
from selfdev_jax.dpo import lora
from selfdev_jax.dpo import step as step_lib

# Dense bfloat16, of a device whose kind begins so; the makers' data sheets.
_PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
}
_WARM_UP = 2

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), such as configs/dpo.py."
)
_SHAPE = flags.DEFINE_enum("shape", None, list(SHAPES), "Of the model.")
_MODEL = flags.DEFINE_string(
    "model", None, "Hugging Face directory whose shape is taken instead."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights."
)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 512, "A prompt.", 1)
_COMPLETION = flags.DEFINE_integer("completion_tokens", 256, "A completion.", 1)
_DEVICES = flags.DEFINE_integer(
    "virtual_devices", None, "CPU devices to compile for.", 1
)
_RUN = flags.DEFINE_bool("run", False, "Run it, with random weights.")
_STEPS = flags.DEFINE_integer("steps", 10, "To time, with --run.", 1)
_PEAK = flags.DEFINE_float(
    "peak_tflops", None, "Of one device, for MFU; none: known, or no MFU."
)
flags.mark_flag_as_required("config")


def _data(config, decoder) -> data_lib.Data:
  """As many random pairs as a batch has, each with a prompt of its own."""
  rng = np.random.default_rng(0)
  n = config.batch_size
  draw = lambda count, size: tuple(
      rng.integers(0, decoder.vocab_size, (count, size), np.int32)
  )
  return data_lib.Data(
      prompts=draw(n, _PROMPT.value),
      completions=draw(2 * n, _COMPLETION.value),
      prompt_of=np.repeat(np.arange(n, dtype=np.int32), 2),
      pairs=np.arange(2 * n, dtype=np.int32).reshape(n, 2),
      source=np.arange(n, dtype=np.int32),
      counts=data_lib.Counts(),
  )


def product_flops(jaxpr: jex.core.Jaxpr) -> int:
  """FLOPs of the matrix products in a program, all passes of its loops.

  Products inside a kernel (cuDNN, Pallas) are not seen.
  """
  total = 0
  for equation in jaxpr.eqns:
    times = 1
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += (
          2
          * math.prod(equation.outvars[0].aval.shape)
          * math.prod(left[axis] for axis in contracted)
      )
    elif equation.primitive.name == "scan":
      times = equation.params["length"]
    total += times * sum(
        map(product_flops, jex.core.jaxprs_in_params(equation.params))
    )
  return total


def main(_):
  config = app.load_config(_CONFIG, config_lib.Dpo)
  if (_SHAPE.value is None) == (_MODEL.value is None):
    raise errors.UserError("give either --shape or --model")
  if (_DEVICES.value is None) == (not _RUN.value):
    raise errors.UserError("give either --virtual_devices or --run")
  if _DEVICES.value is not None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  decoder = (
      SHAPES[_SHAPE.value]
      if _MODEL.value is None
      else convert.read_config(_MODEL.value)
  )
  dtype = jnp.dtype(_DTYPE.value)
  mesh = step_lib.make_mesh(config)
  plan = batches.plan(
      _data(config, decoder),
      jax.random.key(0),
      steps=_WARM_UP + _STEPS.value,
      batch_size=config.batch_size,
      parts=config.parts,
      per_row=batches.COMPLETIONS[config.layout],
      multiple=step_lib.rows_multiple(mesh),
  )
  reference = np.zeros(2 * config.batch_size, np.float32)
  stepper = step_lib.stepper(config, decoder, dtype, mesh, plan.span)
  frozen, trained = _abstract(config, decoder, dtype, stepper)
  state = _placed(
      jax.eval_shape(stepper.init, trained), stepper.state_shardings
  )
  batch = _placed(plan.batch(0, reference), stepper.batch_shardings)

  start = time.monotonic()
  compiled = stepper.step.lower(frozen, state, batch).compile()
  flops = {
      name: product_flops(
          _traced(config, remat, decoder, dtype, mesh)(frozen, state, batch)
      )
      for name, remat in (("flops", config.remat), ("model_flops", None))
  }
  memory = compiled.memory_analysis()
  result = {
      "devices": mesh.size,
      "mesh": dict(mesh.shape),
      "rows": batch.rows.tokens.shape,
      "compile_s": time.monotonic() - start,
      "arguments_gb": memory.argument_size_in_bytes / 1e9,
      "temporary_gb": memory.temp_size_in_bytes / 1e9,
      "trained_parameters": _size(trained),
      "frozen_parameters": _size(frozen),
      **flops,
  }
  print(
      f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh"
      f" {dict(mesh.shape)}\na step's rows: {batch.rows.tokens.shape}; compiled"
      f" in {result['compile_s']:.0f} s\nof each device, GB:"
      f" {result['arguments_gb']:.2f} weights, state and batch,"
      f" {result['temporary_gb']:.2f} in between\nof all, TFLOP a step:"
      f" {flops['flops'] / 1e12:.3g} done, {flops['model_flops'] / 1e12:.3g}"
      " needed"
  )
  if _RUN.value:
    result |= _run(stepper, plan, reference, frozen, trained, flops, mesh)
  print(json.dumps(result))


def _abstract(config, decoder, dtype, stepper):
  """(frozen, trained) as shapes that say where they lie."""
  cast = lambda tree: jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree
  )
  params = cast(models.abstract_params(decoder))
  frozen, trained = {}, params
  if config.trains == "lora":
    frozen = params
    trained = jax.eval_shape(
        lambda: lora.init(
            jax.random.key(0), decoder, config.lora_rank, config.lora_targets
        )
    )
  return (
      _placed(frozen, stepper.frozen_shardings),
      _placed(trained, stepper.trained_shardings),
  )


def _placed(tree, shardings):
  return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=sharding
      ),
      tree,
      shardings,
  )


def _size(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _traced(config, remat, decoder, dtype, mesh):
  """The step's program where the backward pass computes `remat` anew."""
  config = dataclasses.replace(config, remat=remat)
  stepper = step_lib.stepper(config, decoder, dtype, mesh)
  return lambda *args: jax.make_jaxpr(stepper.step)(*args).jaxpr


def _run(stepper, plan, reference, frozen, trained, flops, mesh):
  """Rates of steps that were taken."""

  @functools.partial(jax.jit, static_argnums=1)
  def draw(key, leaf):
    return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

  def random(tree):
    return jax.tree.map(
        lambda leaf: jax.device_put(
            draw(jax.random.key(_size(leaf)), leaf), leaf.sharding
        ),
        tree,
    )

  frozen, trained = random(frozen), random(trained)
  state = stepper.init(trained)
  del trained
  seconds = []
  for i in range(_WARM_UP + _STEPS.value):
    batch = plan.batch(i, reference)
    placed = step_lib.put(batch, stepper.batch_shardings)
    start = time.monotonic()
    state, metrics = jax.block_until_ready(stepper.step(frozen, state, placed))
    seconds.append(time.monotonic() - start)
  median = statistics.median(seconds[_WARM_UP:])
  kind = mesh.devices.flat[0].device_kind
  known = (v for k, v in _PEAK_TFLOPS.items() if kind.startswith(k))
  peak = _PEAK.value or next(known, None)
  result = {
      "device": kind,
      "n": _STEPS.value,
      "step_s": median,
      "tokens_per_s": plan.tokens(0) / median,
      "slots_per_s": batch.rows.tokens.size / median,
      "loss": float(metrics["loss"]),
      "mfu": None,
  }
  if peak is not None:
    per_device = flops["model_flops"] / mesh.size / median
    result["mfu"] = per_device / (peak * 1e12)
  mfu = "not known" if peak is None else f"{100 * result['mfu']:.1f} %"
  print(
      f"{median:.3f} s a step, {result['tokens_per_s']:,.0f} tokens/s,"
      f" {result['slots_per_s']:,.0f} slots/s, MFU {mfu}"
  )
  return result


if __name__ == "__main__":
  app.run(main)
