"""Workers that hang, die and complain."""

import gc
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from selfdev_jax.evaluation import workers
from selfdev_jax.evaluation.task import Mark
from selfdev_jax.sandbox import layers

pytest.importorskip("math_verify")

_WORKER = pathlib.Path(workers.__file__).with_name("worker.py")

# The worker as it is, but for what its metrics do.
_SCRIPT = f"""
import ctypes, importlib.util, os, signal, socket, sys, time
spec = importlib.util.spec_from_file_location("worker", {str(_WORKER)!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

def echo(generation, gold):
  return generation, generation == gold, ""

def pid(generation, gold):
  return str(os.getpid()), True, ""

def hang(generation, gold):
  signal.signal(signal.SIGALRM, signal.SIG_IGN)
  time.sleep(1000)

def hold(generation, gold):
  '''Holds the interpreter: neither alarms nor other threads are heard.'''
  spin = sum(range(10 ** 12))

def die(generation, gold):
  os._exit(3)

def crash(generation, gold):
  ctypes.string_at(0)

def fail(generation, gold):
  raise ValueError(generation)

def eat(generation, gold):
  return str(len(bytearray(1 << 36))), True, ""

def chatter(generation, gold):
  print("x" * 100_000, flush=True)
  os.write(1, b"x" * 100_000)
  print("x" * 100_000, file=sys.stderr, flush=True)
  return generation, True, ""

def reach(generation, gold):
  '''Tries what a number has no need of.'''
  for attempt in (
      lambda: open("/etc/hostname").read(),
      lambda: open("/proc/%d/environ" % os.getppid(), "rb").read(),
      lambda: os.listdir("/"),
      lambda: open("/tmp/selfdev_worker", "w"),
      lambda: open(sys.prefix + "/selfdev_worker", "w"),
      lambda: socket.create_connection(("127.0.0.1", int(generation))),
  ):
    try:
      attempt()
    except PermissionError:
      continue
    except Exception as error:
      return repr(error), False, ""
    return "reached", False, ""
  return "nothing", True, ""

def garble(generation, gold):
  os.write(3, bytes([0, 0, 0, 2]) + b"{{]")
  os._exit(0)

worker.metrics = lambda: {{f.__name__: f for f in
    (echo, pid, hang, hold, die, crash, fail, eat, chatter, reach, garble)}}
if __name__ == "__main__":
  worker.main()
  os._exit(0)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
  path = tmp_path_factory.mktemp("workers") / "script.py"
  path.write_text(_SCRIPT)
  return path


@pytest.fixture(scope="module")
def pool(script):
  pool = workers.Pool(2, 5.0, script)
  yield pool
  pool.close()


def _echoes(n):
  return [("echo", str(i), str(i - i % 2)) for i in range(n)]


def _lost(trouble):
  return Mark(None, False, trouble)


def _pids(pool):
  return {worker.pid for worker in pool._workers}


def _is_gone(pid, within_s=5.0):
  """Whether a process ends, or is a zombie that nobody here can bury."""
  deadline = time.monotonic() + within_s
  while time.monotonic() < deadline:
    try:
      stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
      return True
    if stat.rpartition(")")[2].split()[0] == "Z":
      return True
    time.sleep(0.02)
  return False


def test_a_worker_reaches_neither_files_nor_the_network(pool):
  if layers._libc.syscall(444, None, 0, 1) < 4:
    pytest.skip("a kernel with no Landlock, or an old one")
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = str(server.getsockname()[1])
    assert pool.marks([("reach", port, "")]) == [Mark("nothing", True)]


def test_an_answer_that_is_none_costs_its_request_alone(pool):
  marks = pool.marks([("garble", "", ""), ("echo", "a", "a")])
  assert marks == [_lost("error"), Mark("a", True)]


def test_marks_come_in_the_order_of_the_requests(pool):
  wanted = [Mark(str(i), i % 2 == 0) for i in range(200)]
  assert pool.marks(_echoes(200)) == wanted
  assert pool.marks([]) == []


def test_all_workers_work(pool):
  marks = pool.marks([("pid", "", "")] * 50)
  assert {int(mark.extracted) for mark in marks} == _pids(pool)
  assert len(_pids(pool)) == 2


@pytest.mark.parametrize(
    ("metric", "trouble"),
    [
        ("hang", "timeout"),
        ("die", "error"),
        ("crash", "error"),
        ("fail", "error"),
        ("eat", "error"),
    ],
)
def test_what_is_lost_costs_itself_alone(pool, metric, trouble):
  requests = _echoes(20)
  wanted = pool.marks(requests)
  for i in (3, 11):
    requests[i], wanted[i] = (metric, "?", ""), _lost(trouble)
  assert pool.marks(requests) == wanted


def test_a_worker_that_holds_the_interpreter_is_killed(pool):
  start = time.monotonic()
  before = _pids(pool)
  marks = pool.marks([("hold", "", ""), *_echoes(3)])
  assert marks == [_lost("timeout"), *pool.marks(_echoes(3))]
  assert 1.0 <= time.monotonic() - start < 15
  assert all(map(_is_gone, before - _pids(pool)))
  assert len(_pids(pool)) == 2 and len(before - _pids(pool)) == 1


def test_what_a_metric_prints_is_no_answer(pool):
  marks = pool.marks([("chatter", str(i), "") for i in range(6)])
  assert marks == [Mark(str(i), True) for i in range(6)]


def test_a_request_too_long_to_be_sent(pool, monkeypatch):
  monkeypatch.setattr(workers, "_MAX_REQUEST_BYTES", 1000)
  marks = pool.marks([("echo", "a" * 1000, ""), ("echo", "a", "a")])
  assert marks == [_lost("error"), Mark("a", True)]


def test_any_text_is_sent(pool):
  texts = ["\ud800", "\0\n", '"', "é" * 1_000_000, "\U0001f600"]
  marks = pool.marks([("echo", text[:3], text[:3]) for text in texts])
  assert [mark.extracted for mark in marks] == [text[:3] for text in texts]
  assert pool.marks([("fail", text, text) for text in texts]) == [
      _lost("error")
  ] * len(texts)


def test_workers_that_died_meanwhile_are_replaced(pool):
  pool.marks(_echoes(2))
  before = _pids(pool)
  for pid in before:
    os.kill(pid, signal.SIGKILL)
    # With all its threads, which a zombie may still have.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
  assert all(mark.extracted for mark in pool.marks(_echoes(20)))
  assert not before & _pids(pool)


def test_one_request_starts_one_worker_and_close_ends_it(script):
  pool = workers.Pool(2, 2.0, script)
  assert not _pids(pool)
  pool.marks([("echo", "", "")])
  (pid,) = _pids(pool)
  pool.close()
  assert _is_gone(pid) and not _pids(pool)
  assert pool.marks([("echo", "a", "a")]) == [Mark("a", True)]
  pool.close()


def test_workers_end_with_the_last_who_holds_the_pool(script):
  pool = workers.Pool(2, 2.0, script)
  pool.marks(_echoes(2))
  pids = _pids(pool)
  assert len(pids) == 2
  del pool
  gc.collect()
  assert all(map(_is_gone, pids))


def test_a_worker_that_does_not_start(tmp_path):
  script = tmp_path / "script.py"
  script.write_text("raise SystemExit('no such library')")
  with pytest.raises(Exception, match=f"no such library.*{script}"):
    workers.Pool(1, 2.0, script).marks(_echoes(1))


# A process that has a pool, as a user's, and ends in one way or another.


def _owner(script, then):
  code = f"""
import pathlib, sys
from selfdev_jax.evaluation import workers
if __name__ == "__main__":
  pool = workers.Pool(2, 60.0, pathlib.Path({str(script)!r}))
  pool.marks([("echo", "", "")] * 2)
  print(*[worker.pid for worker in pool._workers], flush=True)
  {then}
"""
  owner = subprocess.Popen(
      [sys.executable, "-c", code],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      start_new_session=True,
      cwd=pathlib.Path(workers.__file__).parents[2],
  )
  pids = list(map(int, owner.stdout.readline().split()))
  assert len(pids) == 2
  return owner, pids


_HANG = 'pool.marks([("hang", "", "")] * 2)'


# Slow as it imports JAX, all three.
@pytest.mark.slow
def test_workers_end_with_their_owner(script):
  owner, pids = _owner(script, "")
  owner.communicate()
  assert owner.returncode == 0
  assert all(map(_is_gone, pids))


@pytest.mark.slow
def test_workers_end_when_their_owner_is_killed(script):
  owner, pids = _owner(script, _HANG)
  time.sleep(0.5)
  owner.kill()
  owner.communicate()
  assert all(map(_is_gone, pids))


@pytest.mark.slow
def test_ctrl_c_is_for_the_owner_who_leaves_at_once(script):
  owner, pids = _owner(script, _HANG)
  time.sleep(0.5)
  start = time.monotonic()
  os.killpg(owner.pid, signal.SIGINT)
  _, complaints = owner.communicate()
  assert time.monotonic() - start < 5
  assert b"KeyboardInterrupt" in complaints.splitlines()[-1]
  assert all(map(_is_gone, pids))


@pytest.mark.slow
def test_a_worker_that_holds_the_interpreter_outlives_nobody_long(script):
  # The limit of CPU time is set at the start, by the pool's.
  code = (
      "impatient = workers.Pool(1, 1.0, pool._script);"
      ' impatient.marks([("echo", "", "")]);'
      " (worker,) = impatient._workers; worker._limit_s = 100.0;"
      " print(worker.pid, flush=True);"
      ' impatient.marks([("hold", "", "")])'
  )
  owner, _ = _owner(script, code)
  pid = int(owner.stdout.readline())
  time.sleep(0.5)
  owner.kill()
  owner.communicate()
  assert not _is_gone(pid, 1.0)  # Deaf to the end of its stdin.
  assert _is_gone(pid, 60.0)  # 7 s of CPU time.


# The worker as it is.

_GOLD = "so $x=\\boxed{\\frac{1}{2}}$."
_SAID = (
    "So $\\boxed{0.5}$.",
    "Final Answer: The final answer is $\\frac12$. I hope it is correct.",
    "Final Answer: The final answer is $\\{2, 1\\}$. I hope it is correct.",
    "x" * 100_000,
    "((((((((((" * 1000,
    "",
    "3",
)


def test_marks_do_not_depend_on_the_number_of_workers():
  requests = [
      (metric, said, _GOLD)
      for said in _SAID
      for metric in ("math_verify", "exact_match")
  ]
  marks = []
  for size in (1, 2):
    pool = workers.Pool(size)
    marks.append(pool.marks(requests))
    pool.close()
  assert marks[0] == marks[1]
  assert [mark.correct for mark in marks[0][:4]] == [True, False, True, True]
  assert not any(mark.correct for mark in marks[0][4:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "said",
    [
        "9**9**9**9",
        "$1000000000!$",
        "$" + "{" * 20_000 + "1" + "}" * 20_000 + "$",
        "$" + "\\frac{1}{" * 3000 + "1" + "}" * 3000 + "$",
        "1" * 10_000_000,
        "\\boxed{" * 1_400_000,
        "$\\int_0^1 \\sin(\\sin(\\sin(\\sin(x))))^{x^x} dx$",
    ],
    ids=lambda said: said[:12],
)
def test_hostile_texts_end(said):
  """10 to 45 s each on two busy cores."""
  pool = workers.Pool(2)
  sentence = f"Final Answer: The final answer is {said}. I hope it is correct."
  start = time.monotonic()
  marks = pool.marks([
      (metric, text, _GOLD)
      for text in (said, sentence)
      for metric in ("math_verify", "exact_match")
  ])  # fmt: skip
  assert time.monotonic() - start < 100
  assert not any(mark.correct for mark in marks)
  assert json.dumps([mark.extracted for mark in marks])
  pool.close()
