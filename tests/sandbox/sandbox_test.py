"""Lanes of a zygote and a screener: order, loss, and what they say."""

import functools
import os
import signal

import pytest

from selfdev_jax import config
from selfdev_jax import sandbox

_SHAPES = [(6, 4), (5,)]


@pytest.fixture(scope="module")
def box():
  limits = config.Sandbox(timeout_s=20.0)
  with sandbox.Sandbox(limits, _SHAPES, 2) as box:
    yield box


def _lane(box):
  """The one that serves next."""
  return box._free.queue[-1]


def _program(expression):
  return f"def merge(base, task_vectors):\n  return {expression}\n"


def test_many_at_a_time_in_order(box):
  expressions = [f"base + 0.{i} * task_vectors[0]" for i in range(1, 10)]
  expressions[3] = "base[0]"
  expressions[6] = "jnp.log(-jnp.abs(base))"
  verdicts = list(box.admit_all(map(_program, expressions)))
  for i, verdict in enumerate(verdicts):
    if i in (3, 6):
      assert isinstance(verdict, sandbox.Rejection)
      continue
    assert f'["float32",0.{i + 1}]' in verdict.program
    assert verdict == box.admit(_program(expressions[i]))
  assert verdicts[3].code == "output_shape"
  assert (verdicts[6].stage, verdicts[6].code) == ("run", "non_finite")


def test_a_caller_that_stops_early_leaves_a_working_sandbox(box):
  verdicts = box.admit_all([_program("base")] * 20)
  next(verdicts)
  verdicts.close()
  assert isinstance(box.admit(_program("base")), sandbox.Admitted)


@pytest.mark.parametrize("name", ["zygote", "screener"])
def test_a_process_that_died_meanwhile_costs_no_program(box, name):
  box.admit(_program("base"))
  lane = _lane(box)
  os.kill(lane._running[name].pid, signal.SIGKILL)
  lane._running[name]._process.wait()
  assert isinstance(box.admit(_program("base")), sandbox.Admitted)


def test_a_screener_that_always_dies_is_a_verdict(box, monkeypatch):
  lane = _lane(box)
  box.admit(_program("base"))
  process = type(lane._running["screener"])

  def kill_first(self, message):
    os.kill(self.pid, signal.SIGKILL)
    self._process.wait()
    return process.send(self, message)

  with monkeypatch.context() as patched:
    patched.setattr(lane, "start", _lame(lane.start, kill_first))
    verdict = box.admit(_program("base"))
  assert (verdict.stage, verdict.code) == ("verify", "crash")
  assert "ended its process" in verdict.message
  assert isinstance(box.admit(_program("base")), sandbox.Admitted)


def _lame(start, send):
  def lame(name):
    found = start(name)
    if name == "screener":
      found.send = functools.partial(send, found)
    return found

  return lame


def test_a_program_that_runs_too_long_on_the_probes():
  limits = config.Sandbox(timeout_s=1.5, max_flops=1e13)
  # 900,000 steps or so: the verifier lets them pass.
  source = _program(
      "lax.fori_loop(0, 150_000, lambda i, x: jnp.sin(x @ x.T @ x), base)"
  )
  with sandbox.Sandbox(limits, [(90, 90)], 2) as box:
    verdict = box.admit(source)
    assert (verdict.stage, verdict.code) == ("run", "timeout")
    assert "took more than 1.5 s" in verdict.message
    assert isinstance(box.admit(_program("base")), sandbox.Admitted)


def test_a_screener_is_replaced_now_and_then(box, monkeypatch):
  monkeypatch.setattr(sandbox, "_SCREENED", 3)
  pids = set()
  for _ in range(8):
    assert isinstance(box.admit(_program("base")), sandbox.Admitted)
    pids.add(_lane(box)._running["screener"].pid)
  assert 2 <= len(pids) <= 4


def test_nothing_is_imported_from_where_it_starts():
  with sandbox.Sandbox(config.Sandbox(), _SHAPES, 2) as box:
    assert isinstance(box.admit(_program("base")), sandbox.Admitted)
    running = _lane(box)._running
    places = {
        os.readlink(f"/proc/{running[name].pid}/cwd")
        for name in ("zygote", "screener")
    }
    assert len(places) == 2
    # What a program may have left there, where chroot does not hold.
    for place in places:
      with open(os.path.join(place, "jax.py"), "w") as file:
        file.write("raise SystemExit('imported')")
    for lane in box._lanes:
      lane.stop()
    assert isinstance(box.admit(_program("2 * base")), sandbox.Admitted)


def test_stand_ins():
  shapes = [(14336, 4096), (4096, 14336)]
  most = "base + 0.1 * sum(task_vectors)"
  with sandbox.Sandbox(config.Sandbox(), shapes, 2) as box:
    # What cannot do for one is admitted all the same.
    taken = box.admit(
        _program(f"({most}).reshape(-1, 4096).reshape(base.shape)")
    )
    assert isinstance(taken, sandbox.Admitted) and taken.fingerprint == ()
    # Up and down projections are told apart.
    verdicts = [
        box.admit(_program(text))
        for text in (
            most,
            f"{most} if base.shape[0] < base.shape[1] else 2 * base",
            f"{most} if base.shape[0] > base.shape[1] else 2 * base",
        )
    ]
  prints = [verdict.fingerprint for verdict in verdicts]
  assert sandbox.first_alike(prints) == [0, 1, 2]
  # Stand-ins are not kept.
  assert verdicts[0].program.count('"shape":[') == 2


def test_verdicts_are_not_piled_up(box):
  given = []

  def sources():
    for i in range(60):
      given.append(i)
      yield _program("base")

  verdicts = box.admit_all(sources())
  next(verdicts)
  assert len(given) <= 4 * len(box._lanes) + 1
  verdicts.close()


def test_close_twice():
  box = sandbox.Sandbox(config.Sandbox(), _SHAPES, 2)
  box.close()
  box.close()
