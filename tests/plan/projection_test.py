"""Projections against sums by hand, and what holds of all of them."""

import dataclasses
import itertools
import math

import pytest

from configs import paper_gsm8k
from configs import tiny
from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax.plan import cost
from selfdev_jax.plan import devices
from selfdev_jax.plan import estimate as estimate_lib
from selfdev_jax.plan import projection
from selfdev_jax.plan import shapes

_H200 = devices.DEVICES["H200"]
_PAPER = config_lib.from_config_dict(paper_gsm8k.get_config())
_LENGTHS = estimate_lib.Lengths(500, 1000, 900, 100, "by hand")
_MODEL = cost.Model(shapes.SHAPES["openchat/openchat-3.5-1210"], 2, "mlp")
_SIZES = (1, 2, 8, 64, 512)


def _config(**changes):
  """The demo's counts: 80 samples, 58 of them new, 300 items, 3 iterations."""
  config = config_lib.from_config_dict(tiny.get_config())
  return dataclasses.replace(config, **changes)


def _raced(config, racing):
  changed = dataclasses.replace(config.evaluate, racing=racing)
  return dataclasses.replace(config, evaluate=changed)


def _cut(config, times=1):
  config = projection.larger(config, times)
  return projection.cut(config, _MODEL, _LENGTHS, "vllm", _H200)


def _project(config, gpus, times=1, rate=None):
  on = projection.cluster(config, gpus, "vllm")
  return projection.project(_cut(config, times), on, times, rate)


def _seconds(row):
  return sum(row.seconds.values())


def _run(*parts):
  return projection.Run(parts, 0, 0, 0.0, 0.0)


def _row(part, gpus=8, group=1, rate=None):
  on = projection.Cluster(gpus, group, trainers=4, mesh=1)
  return projection.project(_run(part), on, 1, rate)


@pytest.mark.parametrize(
    ("gpus", "group", "waves"),
    [(1, 1, 20), (8, 1, 3), (8, 2, 5), (8, 8, 20), (20, 1, 1), (512, 1, 1)],
)
def test_the_last_wave_counts_whole(gpus, group, waves):
  part = projection.Part(projection.TEST, projection.GROUPS, 20, 7.0)
  row = _row(part, gpus, group)
  assert row.seconds[projection.TEST] == _seconds(row) == 7.0 * waves
  assert row.gpu_hours == pytest.approx(gpus * 7.0 * waves / 3600)
  assert row.work_gpu_hours == pytest.approx(group * 20 * 7.0 / 3600)
  assert row.bound_by == projection.GROUPS


def test_the_head_hands_out_so_many_pieces_a_second():
  rate = projection.HEAD_PIECES_PER_S
  part = projection.Part(
      projection.SWEEPS, projection.GROUPS, 512, 1.0, messages=round(5 * rate)
  )
  slow = _row(part, gpus=512)
  assert _seconds(slow) == pytest.approx(5.0, rel=0.1)
  assert slow.bound_by == projection.HEAD
  # 64 waves of a second take longer.
  fast = _row(part, gpus=8)
  assert _seconds(fast) == 64.0 and fast.bound_by == projection.GROUPS


def test_cpus_and_training_have_their_own_numbers():
  lanes = projection.Part(projection.ADMIT, projection.LANES, 160, 1.0)
  assert _seconds(_row(lanes, gpus=8)) == 20.0
  assert _seconds(_row(lanes, gpus=9)) == 10.0  # Two hosts.
  assert _row(lanes).work_gpu_hours == 0
  rows = projection.Part(projection.TRAIN, projection.TRAINERS, 16, 3.0)
  assert _seconds(_row(rows, gpus=8)) == _seconds(_row(rows, gpus=512)) == 12.0
  fixed = projection.Part(projection.START, projection.FIXED, 1, 9.0)
  assert _seconds(_row(fixed, gpus=512, rate=2.0)) == 9.0
  assert _row(fixed, gpus=512, rate=2.0).dollars == 2 * 512 * 9 / 3600
  assert _row(fixed).dollars is None


def test_one_gpu_takes_what_the_estimate_says():
  """Beside a start of workers and other CPU lanes."""
  config = _raced(_config(), False)
  found = estimate_lib.estimate(config, _MODEL, _LENGTHS, "vllm", _H200)
  admitting = [s.seconds for s in found.stages if s.name.endswith("admit")]
  wanted = found.seconds - sum(admitting) + projection.WORKER_START_S
  row = _project(config, 1)
  ours = _seconds(row) - row.seconds[projection.ADMIT]
  assert ours == pytest.approx(wanted)
  # Five iterations, of both arms, of ten waves of eight.
  assert row.seconds[projection.ADMIT] == pytest.approx(50 * cost.ADMIT_CPU_S)


def test_the_demo_s_pieces():
  """Counts as in estimate_test.py."""
  run = _cut(_raced(_config(), False))
  pieces = {
      stage: [p.pieces for p in run.parts if p.stage == stage]
      for stage in projection.STAGES
  }
  batches = math.ceil(80 / _config().propose.batch_size)
  assert pieces[projection.PROPOSE] == [batches] * 5
  assert pieces[projection.EVALUATE] == [4] + 5 * [58]
  assert pieces[projection.SWEEPS] == 3 * [174]
  assert pieces[projection.TEST] == [23]
  assert pieces[projection.ADMIT] == 5 * [80]
  assert run.programs == 400 and run.merged == 4 + 5 * 58 + 3 * 174
  messages = sum(p.messages for p in run.parts)
  assert messages == run.merged + 23  # One each without racing.


def test_a_race_has_two_passes(monkeypatch):
  monkeypatch.setattr(projection, "RACING_SHARE", 0.6)
  changed = dataclasses.replace(
      _config().evaluate, racing=True, dev_size=300, racing_block=60
  )
  run = _cut(_config(evaluate=changed))
  sweeps = [p for p in run.parts if p.stage == projection.SWEEPS]
  # After 20 % of the items half of the 174 go on, and answer four blocks more.
  assert [p.pieces for p in sweeps] == 3 * [174, 87]
  assert [p.messages for p in sweeps] == 3 * [174, 4 * 87]
  whole = [
      p
      for p in _cut(_raced(_config(), False)).parts
      if p.stage == projection.SWEEPS
  ]
  merge_s = cost.merge_seconds(_MODEL, _H200, len(_config().experts))
  merge_s += cost.swap_seconds(_MODEL, _H200, "vllm")
  first, second = sweeps[0].piece_s, sweeps[1].piece_s
  assert second > first
  # Whoever goes on is merged once more; blocks fill the batches a little less.
  assert first + second == pytest.approx(whole[0].piece_s + merge_s, rel=0.05)
  assert first + second > whole[0].piece_s + merge_s
  # The archive has fewer answers; the test is no race.
  assert run.archive_bytes < _cut(_raced(_config(), False)).archive_bytes


def test_a_block_that_is_everything_leaves_no_second_pass():
  changed = dataclasses.replace(
      _config().evaluate, racing=True, racing_block=300, dev_size=300
  )
  raced = _project(_config(evaluate=changed), 8)
  assert raced == _project(_raced(_config(), False), 8)


@pytest.mark.parametrize("racing", [False, True])
@pytest.mark.parametrize("times", [1, 100])
def test_more_gpus_are_never_slower_and_never_cheaper_than_the_work(
    times, racing
):
  config = _raced(_PAPER, racing)
  rows = [_project(config, gpus, times) for gpus in _SIZES]
  for few, many in itertools.pairwise(rows):
    assert _seconds(many) <= _seconds(few)
    for stage in projection.STAGES:
      assert many.seconds[stage] <= few.seconds[stage]
  for row in rows:
    assert row.gpu_hours >= row.work_gpu_hours
    assert row.work_gpu_hours == pytest.approx(rows[0].work_gpu_hours)
    assert sum(row.waits.values()) == pytest.approx(_seconds(row))


def test_512_gpus_wait_for_the_head_or_for_what_does_not_divide(monkeypatch):
  monkeypatch.setattr(projection, "HEAD_PIECES_PER_S", 1000.0)
  small = _project(_PAPER, 512)
  # 210 programs of an iteration are fewer than the GPUs.
  assert small.work_gpu_hours < 0.2 * small.gpu_hours
  assert small.bound_by == projection.FIXED
  monkeypatch.setattr(projection, "HEAD_PIECES_PER_S", 5.0)
  large = _project(_PAPER, 512, times=100)
  assert large.bound_by == projection.HEAD
  sweeps = [p for p in large.run.parts if p.stage == projection.SWEEPS]
  assert large.seconds[projection.SWEEPS] == pytest.approx(
      sum(p.messages for p in sweeps) / 5.0
  )


def test_larger_is_more_samples_alone():
  small, large = _cut(_PAPER), _cut(_PAPER, 100)
  assert large.programs == 100 * small.programs == 1_500_000
  assert large.merged == 100 * (small.merged - 4) + 4
  assert large.archive_bytes > 95 * small.archive_bytes
  total = lambda run, by: sum(
      p.pieces * p.piece_s for p in run.parts if p.by == by
  )
  for by in (projection.GROUPS, projection.LANES):
    assert total(large, by) == pytest.approx(100 * total(small, by), rel=0.02)
  assert total(large, projection.FIXED) == total(small, projection.FIXED)
  # Only that more of a step's rows are distinct.
  training = [total(run, projection.TRAINERS) for run in (small, large)]
  assert training[0] <= training[1] < 2 * training[0]


def test_training_gpus():
  trainers = lambda gpus, **ray: projection.cluster(
      dataclasses.replace(_PAPER, ray=config_lib.Ray(**ray)), gpus, "vllm"
  ).trainers
  assert trainers(4) == 4
  assert trainers(64) == 8  # One host.
  assert trainers(64, train_hosts=2) == trainers(64, train_hosts=4) == 16
  shared = dataclasses.replace(_PAPER.dpo, fsdp=2, tensor=2)
  config = dataclasses.replace(_PAPER, dpo=shared)
  on = projection.cluster(config, 8, "vllm")
  assert (on.trainers, on.mesh) == (2, 4)
  with pytest.raises(errors.UserError, match="is 4, but 2 of 2 GPUs train"):
    projection.cluster(config, 2, "vllm")


def test_groups_have_to_divide_the_gpus():
  two = dataclasses.replace(_PAPER.vllm, tensor_parallel=2)
  config = dataclasses.replace(_PAPER, vllm=two)
  assert projection.cluster(config, 8, "vllm").workers(projection.GROUPS) == 4
  assert projection.cluster(config, 7, "jax").workers(projection.GROUPS) == 7
  with pytest.raises(errors.UserError, match="multiple of 2"):
    projection.cluster(config, 7, "vllm")
