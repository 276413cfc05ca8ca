"""How far a run is, from its activities."""

import pytest

from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import stages as stages_lib

LOOP, CONTROL = records.ARMS


def _by_key(workdir):
  with store_lib.Store.read(workdir) as store:
    found = stages_lib.stages(store)
  return {(s.arm, s.iteration, s.name): s for s in found}


def _kill(workdir, config, stage, total, done):
  """A session that was killed within a stage of the first iteration."""
  with (
      pytest.raises(RuntimeError, match="killed"),
      store_lib.Store.create(workdir, config, {}, {}) as store,
      store.activity(LOOP, 1, stage, total, "unit"),
  ):
    store.advance(done)
    raise RuntimeError("killed")


def test_a_finished_run(workdir):
  stages = _by_key(workdir)
  assert [key for key in stages if key[1] == 2] == [
      (LOOP, 2, "propose"),
      (LOOP, 2, "admit"),
      (LOOP, 2, "evaluate"),
      (CONTROL, 2, "propose"),
      (CONTROL, 2, "admit"),
      (CONTROL, 2, "evaluate"),
  ]
  assert {s.state for s in stages.values()} == {"done"}
  assert {s.left_s for s in stages.values()} == {0.0}
  stage = stages[LOOP, 1, "admit"]
  assert (stage.done, stage.total, stage.unit) == (4, 4, "program")


def test_a_run_that_was_left(build, tmp_path):
  stages = _by_key(build(tmp_path, "refined"))
  assert stages[LOOP, 1, "refine"].state == "done"
  waiting = stages[LOOP, 2, "evaluate"]
  assert waiting.state == "waiting"
  # As the first iteration took, and the control as the loop.
  assert waiting.left_s == stages[LOOP, 1, "evaluate"].seconds > 0
  assert stages[CONTROL, 2, "evaluate"].left_s == waiting.left_s
  assert stages[LOOP, 0, "weights"].left_s == 2 * waiting.left_s
  assert stages[LOOP, 0, "best"].left_s is None


def test_the_stage_that_is_worked_on(build, tmp_path, config):
  """Also when it was begun before, and had been stopped."""
  build(tmp_path, "begun")
  with store_lib.lock(tmp_path):
    _kill(tmp_path, config, "propose", 10, 4)
    assert _by_key(tmp_path)[LOOP, 1, "propose"].state == "running"
    with (
        store_lib.Store.create(tmp_path, config, {}, {}) as store,
        store.activity(LOOP, 1, "propose", 6, "program"),
    ):
      store.advance(3)
      stage = _by_key(tmp_path)[LOOP, 1, "propose"]
  assert (stage.state, stage.done, stage.total) == ("running", 7, 10)
  assert _by_key(tmp_path)[LOOP, 1, "propose"].state == "done"


def test_what_was_cut_short_and_has_no_process_is_stopped(
    build, tmp_path, config
):
  build(tmp_path, "first")
  _kill(tmp_path, config, "refine", 10, 5)
  stage = _by_key(tmp_path)[LOOP, 1, "refine"]
  assert stage.state == "stopped"
  # Half is done: as long again.
  assert stage.left_s == pytest.approx(stage.seconds)


def test_throughput_adds_up(workdir):
  with store_lib.Store.read(workdir) as store:
    found = {name: rest for name, *rest in stages_lib.throughput(store)}
    total = sum(a.seconds for a in store.activities())
  assert sum(seconds for seconds, *_ in found.values()) == pytest.approx(total)
  _, writing, units, unit = found["propose"]
  assert writing > 0 and (units, unit) == (9, "program")
