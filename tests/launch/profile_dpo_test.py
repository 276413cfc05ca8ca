"""A step's memory and FLOPs without weights, its rates with random ones."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

from absl import flags as absl_flags
import jax
import jax.numpy as jnp
import pytest

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "profile_dpo.py"
_DECODER = models.DecoderConfig(
    vocab_size=37,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    max_positions=128,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory, random_params) -> pathlib.Path:
  path = tmp_path_factory.mktemp("profile") / "model"
  convert.save(path, _DECODER, random_params(_DECODER))
  return path


def _profile(model, *flags):
  """Standard output's last line, of a process of its own: it sets devices."""
  environment = dict(os.environ)
  environment.pop("XLA_FLAGS")
  command = [sys.executable, "-m", "launch.profile_dpo"]
  command += ["--config=configs/dpo.py", f"--model={model}"]
  command += ["--prompt_tokens=20", "--completion_tokens=6", *flags]
  command += ["--config.lora_rank=2", "--config.batch_size=8"]
  run = subprocess.run(
      command, cwd=_ROOT, env=environment, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_compiled_for_virtual_devices(model):
  one, four = (
      _profile(model, f"--virtual_devices={n}", f"--config.fsdp={n}")
      for n in (1, 4)
  )
  assert (one["devices"], four["devices"]) == (1, 4)
  assert four["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
  # 20 tokens and two times 6, and 8 pairs.
  assert one["rows"] == four["rows"] == [1, 8, 32]
  assert 0 < four["arguments_gb"] < one["arguments_gb"]
  assert four["temporary_gb"] < one["temporary_gb"]
  # The whole step's, however many devices share it.
  assert one["flops"] == four["flops"] > one["model_flops"] > 0
  matrices = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24)
  norms, vocabulary = 5 * 16, 2 * 37 * 16
  assert one["frozen_parameters"] == matrices + norms + vocabulary
  # Forward and backward through every matrix, of every slot.
  assert one["model_flops"] > 2 * 2 * matrices * 8 * 32


@pytest.mark.slow
def test_run_on_random_weights(model):
  result = _profile(model, "--run", "--steps=2", "--peak_tflops=1")
  assert result["n"] == 2
  tokens = 2 * 8 * (20 + 6)
  assert result["tokens_per_s"] == pytest.approx(tokens / result["step_s"])
  rate = result["model_flops"] / result["step_s"]
  assert result["mfu"] == pytest.approx(rate / 1e12)


@pytest.fixture
def script():
  """What the script defines; its flags are taken back."""
  before = set(absl_flags.FLAGS)
  yield runpy.run_path(str(SCRIPT), run_name="launched")
  for name in set(absl_flags.FLAGS) - before:
    delattr(absl_flags.FLAGS, name)


def test_flops_of_products_in_loops(script):

  def program(x, w):
    y, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)
    return jax.checkpoint(lambda y: jnp.sum(y @ w))(y)

  x, w = jnp.zeros((3, 4)), jnp.zeros((4, 4))
  count = lambda f: script["product_flops"](jax.make_jaxpr(f)(x, w).jaxpr)
  once = 2 * 3 * 4 * 4
  assert count(program) == 6 * once
  # One product is computed again, and six have a product a gradient each.
  assert count(jax.grad(program, argnums=(0, 1))) in (18 * once, 19 * once)


# What ml_collections loads the file with.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "either --shape or --model"),
        ({"shape": "mistral-7b", "model": "x"}, "either --shape or --model"),
        ({"shape": "mistral-7b"}, "either --virtual_devices or --run"),
    ],
)
def test_flags_that_do_not_go_together(launch, flags, message):
  with pytest.raises(errors.UserError, match=message):
    launch(config=_ROOT / "configs" / "dpo.py", **flags)
