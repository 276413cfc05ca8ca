"""The cost model against what was counted or measured elsewhere."""

import dataclasses
import math

import jax
import pytest

from launch.shapes import SHAPES
from selfdev_jax import config as config_lib
from selfdev_jax import models
from selfdev_jax.plan import cost
from selfdev_jax.plan import devices
from selfdev_jax.plan import shapes

_MISTRAL = cost.Model(SHAPES["mistral-7b"], 2, "mlp")
# BUILD_NOTES.md, "Scale by compilation": 16 rows of 1,024, prompts of 512 and
# two completions of 256 tokens.
_STEP = cost.DpoStep(rows=16, length=1024, targets=512)


def test_sizes_are_those_of_the_parameters():
  params = models.abstract_params(_MISTRAL.decoder)
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
  assert _MISTRAL.parameters == sum(sizes) == 7_241_732_096
  mlp = jax.tree.leaves(params["layers"]["mlp"])
  assert _MISTRAL.merged_bytes == 2 * sum(math.prod(x.shape) for x in mlp)
  assert _MISTRAL.leaf_kinds == 2
  assert dataclasses.replace(_MISTRAL, scope="all").leaf_kinds == 6
  # 671M of 7,242M, as launch.profile_dpo counts them.
  rank = config_lib.Dpo()
  trained = _MISTRAL.lora_parameters(rank.lora_rank, rank.lora_targets)
  assert round(trained / 1e6) == 671


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("openchat/openchat-3.5-1210", 7242),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1544),
        ("Qwen/Qwen3-4B-Instruct-2507", 4022),
        ("meta-llama/Llama-3.1-8B-Instruct", 8030),
    ],
)
def test_the_table_s_shapes_have_as_many_parameters_as_the_models(
    name, millions
):
  found = cost.Model(shapes.SHAPES[name], 2, "mlp").parameters / 1e6
  assert found == pytest.approx(millions, abs=1)


@pytest.mark.parametrize(
    ("changes", "done", "needed"),
    [
        ({}, 753, 556),
        ({"remat": "dots"}, 565, 556),
        ({"trains": "full"}, 897, 721),
    ],
)
def test_dpo_flops_are_those_that_were_counted_in_the_program(
    changes, done, needed
):
  config = config_lib.Dpo(**changes)
  found = cost.dpo_flops(_MISTRAL, config, _STEP)
  assert [round(n / 1e12) for n in found] == [done, needed]


def test_dpo_holds_the_adapter_and_its_moments_beside_the_weights():
  held = cost.dpo_bytes(_MISTRAL, config_lib.Dpo(), _STEP)
  # BUILD_NOTES.md: 22.54 GB of weights, state and batch on one device.
  state = _MISTRAL.nbytes + held["adapter and Adam's moments"]
  assert state / 1e9 == pytest.approx(22.54, rel=0.01)
  halved = cost.dpo_bytes(_MISTRAL, config_lib.Dpo(parts=2), _STEP)
  name = "kept for the backward pass"
  assert halved[name] == held[name] / 2


def test_a_step_computes_each_distinct_completion_once():
  config = config_lib.Dpo(batch_size=16)
  step = cost.dpo_step(config, 6, 20, prompt=512, completion=256)
  # Of 6 and of 20, sixteen draws meet 5.7 and 11.2.
  assert (step.rows, step.length, step.targets) == (9, 1024, 512)
  padded = cost.dpo_step(
      dataclasses.replace(config, layout="padded"), 6, 20, 512, 256
  )
  assert (padded.rows, padded.length) == (17, 768)
  assert cost.dpo_step(config, 1, 1, 512, 256).rows == 1


def test_writing_is_bound_by_bandwidth_until_batches_are_large():
  device = devices.DEVICES["H200"]
  seconds = lambda batch: cost.decode_seconds(
      _MISTRAL, device, 4096, batch, 100, 1
  )
  per_step = _MISTRAL.nbytes / (cost.DECODE_BANDWIDTH * device.bytes_per_s)
  assert seconds(1) == pytest.approx(4096 * 100 * per_step, rel=1e-3)
  assert seconds(64) == pytest.approx(seconds(1) / 64, rel=0.01)
  # From some batch on the products take longer than reading the weights.
  assert seconds(4096) > seconds(1) / 4096 * 1.5


def test_reading_takes_two_flops_a_parameter_and_token():
  device = devices.DEVICES["A100-80GB"]
  seconds = cost.prefill_seconds(_MISTRAL, device, 10, 100)
  flops = seconds * cost.PREFILL_MFU * device.tflops * 1e12
  assert flops == pytest.approx(2 * _MISTRAL.products * 1000, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4-24GB"),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("cpu", None),
    ],
)
def test_devices_by_the_name_that_jax_has(kind, name):
  found = devices.of_kind(kind)
  assert (found and found.name) == name
