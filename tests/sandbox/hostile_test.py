"""What a program's author is told, and what the processes do around it.

The hostile programs themselves are in attacks.py.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from selfdev_jax import config
from selfdev_jax import sandbox

SHAPES = [(6, 4), (5,)]
LIMITS = config.Sandbox(timeout_s=1.5, memory_bytes=1 << 28, output_bytes=1000)
# On a machine under load, time must not be what a program meets first.
PATIENT = dataclasses.replace(LIMITS, timeout_s=60.0)
GOOD = "def merge(base, task_vectors):\n  return base + sum(task_vectors)\n"
# A zygote whose first two lines of feedback are switched off, and maybe all
# layers but the limits: what the zygote itself sees to shows then.
_NAKED = """
import builtins, errno
from selfdev_jax.programs import contract
from selfdev_jax.sandbox import layers, trace, zygote
every = layers.child_layers
def off():
  raise OSError(errno.EPERM, "switched off")
def weak(*arguments):
  limits, *others = every(*arguments)
  return limits, *(layer._replace(enter=off) for layer in others)
layers.child_layers = weak if {weak} else every
trace.filter_lib.check = lambda source: None
restricted = contract.namespace
contract.namespace = lambda: restricted() | dict(__builtins__=vars(builtins))
zygote.main()
"""


@pytest.fixture(scope="module")
def box():
  with sandbox.Sandbox(PATIENT, SHAPES, 2) as box:
    yield box


class _Undressed(sandbox.Sandbox):
  """With a zygote that another script starts."""

  def __init__(self, limits, weak=False):
    super().__init__(limits, SHAPES, 2, allow_weak=weak)
    self._script = _NAKED.format(weak=weak)

  def _start_zygote(self):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sandbox, "_ZYGOTE", ("-c", self._script))
      return super()._start_zygote()


@contextlib.contextmanager
def _undressed(limits, weak=False):
  with _Undressed(limits, weak) as box:
    assert isinstance(box.admit(GOOD), sandbox.Admitted)
    yield box


@pytest.fixture(scope="module")
def naked():
  with _undressed(LIMITS) as box:
    yield box


@pytest.fixture(scope="module")
def weak():
  with _undressed(LIMITS, weak=True) as box:
    yield box


def _merge(body, head=""):
  body = textwrap.indent(textwrap.dedent(body).strip(), "  ")
  return f"{head}\ndef merge(base, task_vectors):\n{body}\n"


def _holds(box):
  """The sandbox still works, and has one process without children."""
  assert isinstance(box.admit(GOOD), sandbox.Admitted)
  assert not _children(_zygote(box))


def _zygote(box):
  # Lanes are taken last in, first out: this one has done it all.
  return box._lanes[0]._running["zygote"].pid


def _children(pid):
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  return path.read_text().split()


def _alive(pid):
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    return False
  return stat.rpartition(")")[2].split()[0] != "Z"


def _gone(pid, timeout_s=5.0):
  deadline = time.monotonic() + timeout_s
  while _alive(pid):
    if time.monotonic() > deadline:
      return False
    time.sleep(0.01)
  return True


# --- Whatever the text -------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "stage", "code"),
    [
        ("", "filter", "empty"),
        ("\0", "filter", "syntax"),
        ("\ud800", "filter", "encoding"),
        ("x" * 5_000_000, "filter", "too_long"),
        ("(" * 15_000, "filter", "syntax"),
        ("x = " + "-" * 15_000 + "1", "filter", "nesting"),
        ("x = 1" + "+1" * 9000 + "\n" + GOOD, "filter", "nesting"),
        ("x = a" + ".b" * 9000 + "\n" + GOOD, "filter", "nesting"),
        ("x = " + "[" * 150 + "]" * 150 + "\n", "filter", "no_merge"),
        ("import os\n" + GOOD, "filter", "import"),
        (_merge("return ().__class__"), "filter", "attribute"),
        (
            _merge("return jax.vmap(lambda x: x if x[0] > 0 else -x)(base)"),
            "trace",
            "data_dependent_if",
        ),
        (
            _merge("return base if base > 0 else -base"),
            "trace",
            "data_dependent_if",
        ),
        (
            _merge("while base.sum() > 0:\n  base = base - 1\nreturn base"),
            "trace",
            "paths",
        ),
        (_merge("return base * float(base.sum())"), "trace", "data_dependent"),
        (_merge("return base[base > 0]"), "trace", "data_dependent"),
        (_merge("return None"), "trace", "output"),
        (_merge("return 1"), "trace", "output"),
        (_merge("return [base]"), "trace", "output"),
        (_merge("return base.T[None]"), "trace", "output_shape"),
        (_merge("return base > 0"), "trace", "output_dtype"),
        (_merge("return base.astype(jnp.bfloat16)"), "trace", "output_dtype"),
        (_merge("return undefined"), "trace", "name"),
        (_merge("raise ValueError('a\\nb')"), "trace", "value"),
        (_merge("return merge(base, task_vectors)"), "trace", "recursion"),
        (
            _merge(
                "return lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1,"
                " base)"
            ),
            "trace",
            "primitive",
        ),
        (
            _merge("return base + jax.random.poisson(jax.random.key(0), 1.0)"),
            "trace",
            "primitive",
        ),
        (
            _merge(
                "return lax.fori_loop(0, 10**9, lambda i, x: x + 1.0, base)"
            ),
            "verify",
            "loop_trips",
        ),
        (
            _merge("for _ in range(20_000):\n  base = base + 1.0\nreturn base"),
            "trace",
            None,
        ),
    ],
)
def test_rejected_with_a_reason(box, source, stage, code):
  verdict = box.admit(source)
  assert isinstance(verdict, sandbox.Rejection), verdict
  assert (verdict.stage, code or verdict.code) == (stage, verdict.code)
  assert 0 < len(verdict.message) <= 300
  assert verdict.message.isprintable()


# --- Time --------------------------------------------------------------------


def test_wall_clock(naked):
  start = time.monotonic()
  verdict = naked.admit(_merge("while base.ndim: pass"))
  assert (verdict.stage, verdict.code) == ("trace", "timeout")
  assert time.monotonic() - start < LIMITS.timeout_s + 2
  _holds(naked)


# --- Processes ---------------------------------------------------------------


def test_no_process_survives(weak, tmp_path):
  pids = tmp_path / "pids"
  pids.mkdir()
  # The name of an empty file carries the number: writing is not possible.
  verdict = weak.admit(_merge(f"""
      import os, time
      for leave in (False, True):
        if os.fork() == 0:
          if leave:
            os.setsid()
            if os.fork():
              os._exit(0)
          open("{pids}/%d" % os.getpid(), "w").close()
          time.sleep(100)
      while len(os.listdir("{pids}")) < 2: time.sleep(0.01)
      return base
  """))
  assert isinstance(verdict, (sandbox.Admitted, sandbox.Rejection))
  found = [int(name) for name in os.listdir(pids)]
  assert len(found) >= 2  # Once for every shape that was reached in time.
  assert all(_gone(pid) for pid in found)
  _holds(weak)


def test_zygote_killed_from_inside(weak):
  verdict = weak.admit(
      _merge(
          "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n"
          "while True: pass"
      )
  )
  assert (verdict.stage, verdict.code) == ("trace", "crash")
  _holds(weak)


def test_zygote_that_died_meanwhile_costs_no_program(box):
  box.admit(GOOD)
  os.kill(_zygote(box), signal.SIGKILL)
  assert _gone(_zygote(box))
  assert isinstance(box.admit(GOOD), sandbox.Admitted)


def test_zygote_follows_its_parent(tmp_path):
  # A parent that is killed while a child runs for ever.
  script = tmp_path / "parent.py"
  script.write_text(textwrap.dedent("""
      import threading, time
      from selfdev_jax import config, sandbox
      box = sandbox.Sandbox(config.Sandbox(timeout_s=60.0), [(2,)], 1)
      endless = "def merge(a, b):\\n  while a.ndim: pass\\n"
      box.admit("def merge(a, b):\\n  return a\\n")
      threading.Thread(target=box.admit, args=(endless,), daemon=True).start()
      zygote = box._lanes[0]._running["zygote"].pid
      path = f"/proc/{zygote}/task/{zygote}/children"
      while not open(path).read(): time.sleep(0.01)
      print(zygote, open(path).read(), flush=True)
      time.sleep(60)
  """))
  parent = subprocess.Popen(
      [sys.executable, script],
      stdout=subprocess.PIPE,
      env=os.environ | {"TMPDIR": str(tmp_path)},  # It cannot clean up.
  )
  with parent:
    pids = [int(x) for x in parent.stdout.readline().split()]
    parent.kill()
  assert len(pids) == 2
  assert all(_gone(pid) for pid in pids)


def test_close_ends_everything():
  with sandbox.Sandbox(LIMITS, SHAPES, 2) as box:
    box.admit(GOOD)
    scratch = box._scratch.name
    pids = [x.pid for x in box._lanes[0]._running.values()]
    assert len(pids) == 2
    # Not of the terminal's process group: Ctrl-C is the caller's alone.
    assert all(os.getsid(pid) == pid != os.getsid(0) for pid in pids)
    for place in ("zygote", "screener"):
      assert os.listdir(os.path.join(scratch, place)) == []
  assert all(_gone(pid) for pid in pids)
  assert not os.path.exists(scratch)
  box.close()


# --- What a program can reach ------------------------------------------------


def _says(box, expression):
  """What an expression is worth in the child, by way of an error message."""
  verdict = box.admit(_merge(f"raise ValueError({expression})"))
  return verdict.message.partition("ValueError: ")[2]


def test_descriptors_are_closed(weak):
  read, write = os.pipe()
  os.set_inheritable(write, True)
  try:
    listing = _says(weak, "__import__('os').listdir('/proc/self/fd')")
  finally:
    os.close(read)
    os.close(write)
  # The last one is the listing itself.
  assert listing == "['0', '1', '2', '3', '4']"


def test_files_cannot_be_filled(weak, tmp_path):
  target = tmp_path / "x"
  weak.admit(_merge(f"open('{target}', 'w').write('x' * 10)\nreturn base"))
  assert not target.exists() or target.stat().st_size == 0


def test_no_backend_is_initialised(naked):
  probe = (
      "str(__import__('jax').extend.backend and"
      " __import__('jax._src.xla_bridge', fromlist=['x'])"
      ".backends_are_initialized())"
  )
  assert _says(naked, f"__import__('jax.extend.backend') and {probe}") == (
      "False"
  )
  threads = pathlib.Path(f"/proc/{_zygote(naked)}/task")
  assert len(os.listdir(threads)) <= 2


# --- Forged answers ----------------------------------------------------------


def test_forged_reason_is_one_printable_line(naked):
  verdict = naked.admit(_merge(r"""
      import json, os
      reason = ["trace", "x", "\x1b[31m\u202e" + "a\n" * 5000]
      os.write(3, json.dumps({"rejected": reason}).encode())
      os._exit(0)
  """))
  assert verdict.code == "x"
  assert len(verdict.message) <= 300
  assert verdict.message.isprintable()


def test_many_threads_share_one_sandbox(box):
  verdicts = []
  threads = [
      threading.Thread(target=lambda: verdicts.append(box.admit(GOOD)))
      for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len({verdict.digest for verdict in verdicts}) == 1
  assert len(verdicts) == 4


def test_interrupt_in_the_caller_leaves_a_working_sandbox(naked):
  naked.admit(GOOD)
  timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
  timer.start()
  with pytest.raises(KeyboardInterrupt):
    naked.admit(_merge("while base.ndim: pass"))
  timer.join()
  assert isinstance(naked.admit(GOOD), sandbox.Admitted)
