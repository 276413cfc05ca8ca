"""Merges in a process that is lost, and what comes of them."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.sandbox import ir
from selfdev_jax.sandbox import runner
from selfdev_jax.sandbox import trace

_DECODER = models.DecoderConfig(
    vocab_size=300, embed=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp=12
)
_SHAPES = [(12, 8), (8, 12)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models")
  for i, name in enumerate(("seed", "a", "b")):
    params = models.init_params(_DECODER, i)
    convert.save(directory / name, _DECODER, params)
  return directory


def _start(directory, timeout_s=60.0, scope="mlp"):
  _, seed = convert.load(directory / "seed")
  experts = {name: directory / name for name in ("a", "b")}
  return runner.Runner(seed, directory / "seed", experts, scope, timeout_s)


@pytest.fixture(scope="module")
def both(directory):
  """The same models, merged here and in another process."""
  trees = {n: convert.load(directory / n)[1] for n in ("seed", "a", "b")}
  here = runner.Merges(trees.pop("seed"), trees, "mlp")
  with _start(directory) as there:
    yield here, there


def _program(expression, shapes=_SHAPES):
  source = f"def merge(base, task_vectors):\n  return {expression}\n"
  return trace.trace(source, shapes, 2, 5000)


def test_shapes_and_notes(both):
  here, there = both
  assert sorted(there.shapes) == sorted(here.shapes) == sorted(_SHAPES)
  assert there.notes == here.notes == []


def test_directories_may_be_relative(directory, monkeypatch):
  monkeypatch.chdir(directory)
  with _start(pathlib.Path()) as there:
    assert not there.expert("b").failure


def test_the_same_weights(both):
  here, there = both
  for merge in (
      lambda m: m.program(_program("base + 0.3 * sum(task_vectors)")),
      lambda m: m.method("task_arithmetic", weight=0.5),
      lambda m: m.method("ties", weight=1.0, density=0.5, lambda_=0.7),
      lambda m: m.expert("b"),
  ):
    theirs, mine = merge(there), merge(here)
    assert theirs.failure == mine.failure == ""
    # This process compiles without most optimizations: tests/conftest.py.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        theirs.params,
        mine.params,
    )


def test_a_result_outlives_the_next_merge(both):
  _, there = both
  first = there.program(_program("2 * base")).params
  kept = jax.tree.map(np.array, first)
  there.program(_program("3 * base"))
  jax.tree.map(np.testing.assert_array_equal, first, kept)


def test_what_is_out_of_scope_is_the_seed_itself(both):
  _, there = both
  merged = there.program(_program("2 * base")).params
  seed = jax.tree.unflatten(there._structure, there._leaves)
  assert merged["embed"] is seed["embed"]


@pytest.mark.parametrize(
    ("expression", "failure"),
    [
        ("base / 0.0", "non_finite"),
        (  # 8 TB, which the verifier would have refused.
            "base + jnp.ones((10**6, 2 * 10**6)).cumsum(0).max()",
            "memory",
        ),
    ],
)
def test_a_failure_is_a_result(both, expression, failure):
  _, there = both
  before = there._process.pid
  assert there.program(_program(expression)) == (None, failure)
  assert there._process.pid == before
  assert there.program(_program("base")).failure == ""


def test_a_program_for_other_shapes(both):
  _, there = both
  assert there.program(_program("base", [(3, 3)])).failure == "exception"


@pytest.mark.slow
def test_a_program_that_takes_too_long(directory):
  endless = _program("lax.fori_loop(0, 2**31 - 1, lambda i, x: x + 1e-9, base)")
  with _start(directory, timeout_s=3.0) as there:
    before, start = there._process.pid, time.monotonic()
    assert there.program(endless) == (None, "timeout")
    assert time.monotonic() - start < 10.0
    # The next program has a process again.
    there._timeout_s = 60.0
    assert there.program(_program("base")).failure == ""
    assert there._process.pid != before
    last = there._process.pid
  assert not os.path.exists(f"/proc/{last}")


@pytest.mark.slow
def test_a_process_that_dies_is_started_again(directory):
  with _start(directory) as there:
    os.kill(there._process.pid, signal.SIGKILL)
    there._process._process.wait()
    assert there.program(_program("base")).failure == ""
    # In the middle of a merge: asked once more, as it need not be to blame.
    long = _program("lax.fori_loop(0, 10**8, lambda i, x: x + 1e-9, base)")
    timer = threading.Timer(1.0, os.kill, (there._process.pid, signal.SIGKILL))
    timer.start()
    assert there.program(long).failure == ""
    timer.join()


@pytest.mark.slow
def test_a_program_that_kills_its_process_twice(directory, monkeypatch):
  with _start(directory) as there:
    process = type(there._process)
    send, killed = process.send, []

    def send_and_kill(self, message):
      send(self, message)
      if message.startswith(b'{"program"'):
        killed.append(self.pid)
        os.kill(self.pid, signal.SIGKILL)

    with monkeypatch.context() as patched:
      patched.setattr(process, "send", send_and_kill)
      assert there.program(_program("base")) == (None, "crash")
    assert len(set(killed)) == 2
    assert there.program(_program("base")).failure == ""


@pytest.mark.slow
def test_an_interrupt_leaves_no_answer_behind(directory):
  long = _program("lax.fori_loop(0, 10**7, lambda i, x: x + 1e-9, base)")
  with _start(directory) as there:
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
      while True:
        there.program(long)
    timer.join()
    merged = there.program(_program("2 * base")).params
    up = merged["layers"]["mlp"]["up"]
    seed = jax.tree.unflatten(there._structure, there._leaves)
    np.testing.assert_array_equal(up, 2 * seed["layers"]["mlp"]["up"])


_CALLER = """
import pathlib, sys, threading, time
from selfdev_jax import convert
from selfdev_jax.sandbox import runner
directory, program = map(pathlib.Path, sys.argv[1:])
_, seed = convert.load(directory / "seed")
experts = {name: directory / name for name in ("a", "b")}
there = runner.Runner(seed, directory / "seed", experts, "mlp", 600.0)
text = program.read_text()
threading.Thread(target=there.program, args=(text,), daemon=True).start()
time.sleep(1)
print(there._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_it_ends_with_its_caller_in_the_middle_of_a_merge(directory, tmp_path):
  program = tmp_path / "program"
  program.write_text(
      _program("lax.fori_loop(0, 2**31 - 1, lambda i, x: x + 1e-9, base)")
  )
  command = [sys.executable, "-c", _CALLER, directory, program]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as caller:
    pid = int(caller.stdout.readline())
    caller.kill()
  deadline = time.monotonic() + 10
  while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
def test_a_method_that_is_lost_is_told(directory):
  with (
      _start(directory, timeout_s=0.001) as there,
      pytest.raises(errors.UserError, match=r"stop what else runs"),
  ):
    there.method("task_arithmetic", weight=0.5)


@pytest.mark.slow
def test_models_that_do_not_fit_are_told(directory, tmp_path):
  _, seed = convert.load(directory / "seed")
  with pytest.raises(errors.UserError, match=str(tmp_path / "none")):
    runner.Runner(
        seed, directory / "seed", {"a": tmp_path / "none"}, "mlp", 60.0
    )


@pytest.mark.slow
def test_the_process_has_no_credentials(directory, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "secret")
  with _start(directory) as there:
    with open(f"/proc/{there._process.pid}/environ", "rb") as file:
      assert b"secret" not in file.read()
    with open(f"/proc/{there._process.pid}/oom_score_adj") as file:
      assert file.read().strip() == "1000"


def test_ir_is_checked_there_too(both):
  _, there = both
  assert there.program("{}").failure == "exception"
  with pytest.raises(ir.IRError):
    ir.loads("{}")
