"""Lanes of a zygote and a screener: order, loss, and what they say."""

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
  receive = process.receive

  def kill_first(self, max_bytes, timeout_s):
    if self.hello == {}:  # A screener's.
      os.kill(self.pid, signal.SIGKILL)
    return receive(self, max_bytes, timeout_s)

  with monkeypatch.context() as patched:
    patched.setattr(lane, "start", _lame(lane.start, process, kill_first))
    verdict = box.admit(_program("base"))
  assert (verdict.stage, verdict.code) == ("verify", "crash")
  assert "ended its process" in verdict.message
  assert isinstance(box.admit(_program("base")), sandbox.Admitted)


def _lame(start, process, receive):
  def lame(name):
    found = start(name)
    if name == "screener":
      found.receive = receive.__get__(found, process)
    return found

  return lame


def test_a_program_that_runs_too_long_on_the_probes():
  limits = config.Sandbox(timeout_s=2.0)
  # 900,000 steps or so: the verifier lets them pass.
  source = _program(
      "lax.fori_loop(0, 150_000, lambda i, x: jnp.sin(x @ x.T @ x), base)"
  )
  with sandbox.Sandbox(limits, [(48, 48)], 2) as box:
    verdict = box.admit(source)
    assert (verdict.stage, verdict.code) == ("run", "timeout")
    assert "took more than 2 s" in verdict.message
    assert isinstance(box.admit(_program("base")), sandbox.Admitted)


def test_a_screener_is_replaced_now_and_then(box, monkeypatch):
  monkeypatch.setattr(sandbox, "_SCREENED", 3)
  pids = set()
  for _ in range(8):
    assert isinstance(box.admit(_program("base")), sandbox.Admitted)
    pids.add(_lane(box)._running["screener"].pid)
  assert 2 <= len(pids) <= 4


def test_close_twice():
  box = sandbox.Sandbox(config.Sandbox(), _SHAPES, 2)
  box.close()
  box.close()
