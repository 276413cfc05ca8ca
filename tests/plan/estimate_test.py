"""A plan's counts against the loop's own."""

import dataclasses

import pytest

from configs import smoke
from configs import tiny
from selfdev_jax import config as config_lib
from selfdev_jax.plan import cost
from selfdev_jax.plan import devices
from selfdev_jax.plan import estimate as estimate_lib
from selfdev_jax.plan import reading

_LENGTHS = estimate_lib.Lengths(500, 1000, 900, 100, "by hand")
_H200 = devices.DEVICES["H200"]


def _config(**changes):
  config = config_lib.from_config_dict(tiny.get_config())
  return dataclasses.replace(config, **changes)


def _estimate(config, device=None, sampler="jax"):
  place = reading.Place(config.seed_model, None)
  decoder, itemsize, _ = reading.shape(place, config)
  model = cost.Model(decoder, itemsize, config.merge.scope)
  return estimate_lib.estimate(config, model, _LENGTHS, sampler, device)


def _names(estimate):
  return [stage.name for stage in estimate.stages]


def test_the_stages_are_the_loop_s_in_their_order():
  config = config_lib.from_config_dict(smoke.get_config())
  assert _names(_estimate(config)) == [
      "start",
      "single models",
      "1 loop: propose",
      "1 loop: admit",
      "1 loop: evaluate",
      "1 loop: refine",
      "2 loop: propose",
      "2 loop: admit",
      "2 loop: evaluate",
      "2 control: propose",
      "2 control: admit",
      "2 control: evaluate",
      "task_arithmetic",
      "ties",
      "weights",
      "finalists",
      "best, on test",
      "export",
  ]


def test_the_demo_s_counts():
  """BUILD_NOTES.md, "The demo": 173 evaluated a sweep, 22 or 23 on test."""
  estimate = _estimate(_config())
  does = {stage.name: stage.does for stage in estimate.stages}
  assert "merges 174 models" in does["ties"]
  assert "merges 4 models" in does["single models"]
  assert "merges 23 models, answers 1,200 test items" in does["best, on test"]
  # The programs of the loop's three iterations and of the control's two.
  assert estimate.compiled == 5 * 58


def test_no_seconds_without_a_device():
  estimate = _estimate(_config())
  assert estimate.seconds is None
  assert all(stage.seconds is None for stage in estimate.stages)
  assert _estimate(_config(), _H200).seconds > 0


def test_more_programs_and_items_take_longer():
  base = _estimate(_config(), _H200)
  config = _config()
  twice = dataclasses.replace(config.propose, samples=160)
  assert _estimate(_config(propose=twice), _H200).seconds > 1.5 * base.seconds
  items = dataclasses.replace(config.evaluate, dev_size=600)
  more = _estimate(_config(evaluate=items), _H200)
  assert more.seconds > base.seconds
  assert more.disk_bytes > base.disk_bytes
  # A refinement less.
  shorter = _estimate(_config(iterations=1), _H200)
  assert not [name for name in _names(shorter) if "refine" in name]


def test_what_racing_spares_is_not_promised():
  settings = _config().evaluate
  whole, raced = (
      _estimate(
          _config(evaluate=dataclasses.replace(settings, racing=racing)), _H200
      )
      for racing in (False, True)
  )
  assert raced.seconds == whole.seconds
  does = {stage.name: stage.does for stage in raced.stages}
  assert "at most 300 dev items" in does["1 loop: evaluate"]
  assert "at most 300 dev items" in does["ties"]
  assert "at most" not in does["single models"]
  assert set(does) - {stage.name for stage in whole.stages} == {"finalists"}


def test_vllm_reads_what_prompts_share_once_and_has_its_share_of_memory():
  config = _config()
  in_jax = _estimate(config, _H200)
  vllm = _estimate(config, _H200, "vllm")
  assert in_jax.vllm_texts is None and vllm.vllm_texts > 0
  share = config.vllm.gpu_memory_utilization * _H200.memory_bytes
  assert vllm.device_bytes > share
  little = config_lib.Vllm(gpu_memory_utilization=0.01)
  assert _estimate(_config(vllm=little), _H200, "vllm").vllm_texts == 0


@pytest.mark.parametrize(("t", "chosen"), [(1, 9), (2, 12), (3, 15)])
def test_pairs_are_products_with_three_elites_an_iteration(t, chosen):
  config = _config()
  place = reading.Place(config.seed_model, None)
  decoder, itemsize, _ = reading.shape(place, config)
  model = cost.Model(decoder, itemsize, "all")
  made = estimate_lib.Estimator(config, model, _LENGTHS, "jax", None)
  # 58 new programs: 15 and 30 % of them.
  assert made.pairs(t) == (chosen, 17, chosen * 17)
