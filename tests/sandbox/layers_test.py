"""Each layer holds, its absence shows, and a broken one is found out.

Layers are for good: all is tried in processes of its own.
"""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from selfdev_jax import config
from selfdev_jax import errors
from selfdev_jax import sandbox
from selfdev_jax.sandbox import layers as layers_lib

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("rlimits", "chroot", "uid", "landlock", "seccomp")
GOOD = "def merge(base, task_vectors):\n  return base + sum(task_vectors)\n"
LIMITS = config.Sandbox(timeout_s=60.0, memory_bytes=1 << 28)
_NOBODY = 65534
# Without JAX, whose threads do not go with fork and namespaces.
_HEAD = f"""
import ctypes, importlib.util, json, os, resource, signal, sys, tempfile, time
spec = importlib.util.spec_from_file_location("x", {layers_lib.__file__!r})
layers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layers)
root = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
every = {{
    layer.name: layer
    for layer in layers.child_layers(layers.Limits(1 << 28, 10.0), root.name)
}}
def stopped(call, *arguments):
  try:
    call(*arguments)
  except OSError:
    return True
  return False
def answer(value):
  # Where an entered layer leaves no more.
  os.write(1, json.dumps(value).encode())
  os._exit(0)
"""
# A zygote that finds a layer broken.
_BROKEN = """
import errno
from selfdev_jax.sandbox import layers, zygote
every = layers.child_layers
def broken():
  raise OSError(errno.ENOSYS, "broken by the test")
layers.child_layers = lambda *arguments: tuple(
    x._replace(enter=broken) if x.name == "seccomp" else x
    for x in every(*arguments)
)
zygote.main()
"""


def _python(script, **more):
  """What a script answers, in a process of its own."""
  done = subprocess.run(
      [sys.executable, "-c", _HEAD + textwrap.dedent(script)],
      capture_output=True,
      timeout=60,
      check=False,
      **more,
  )
  assert done.stdout, done.stderr.decode()
  return json.loads(done.stdout)


def _is_running(pid):
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
  except FileNotFoundError:
    return False
  return stat.rpartition(")")[2].split()[0] != "Z"


def _layer_or_skip(name):
  reason = _python("answer(layers.probe(list(every.values())))")[name]
  if reason:
    pytest.skip(f"{name}: {reason}")


# --- What is there -----------------------------------------------------------


def test_probe_says_what_this_machine_has():
  found = _python("answer(layers.probe(list(every.values())))")
  expected = _python("""
      status = open("/proc/self/status").read()
      capable = int(status.partition("CapEff:")[2].split()[0], 16)
      try:
        import pyseccomp
        has_library = True
      except (ImportError, RuntimeError):
        has_library = False
      whole = open("/proc/self/uid_map").read().split()[2] == "4294967295"
      answer({
          "rlimits": True,
          "chroot": bool(capable >> 18 & 1),
          "uid": os.getuid() == 0 and whole and bool(capable >> 7 & 1),
          "landlock": ctypes.CDLL(None).syscall(444, None, 0, 1) > 0,
          "seccomp": "Seccomp:" in status and has_library,
      })
  """)
  assert {name: not reason for name, reason in found.items()} == expected
  assert tuple(found) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_attack_needs_the_layer(name):
  # Else the probe would prove nothing.
  _layer_or_skip(name)
  before, after = _python(f"""
      before = stopped(every["{name}"].attack)
      every["{name}"].enter()
      answer([before, stopped(every["{name}"].attack)])
  """)
  assert (before, after) == (False, True)


def test_all_together():
  for name in NAMES:
    _layer_or_skip(name)
  # As the zygote does it: probed first, then entered one after the other.
  assert _python("""
      found = layers.probe(list(every.values()))
      for layer in every.values():
        layer.enter()
      answer([bool(x) for x in found.values()])
  """) == [False] * len(NAMES)


def test_layers_are_for_good():
  for name in ("chroot", "uid"):
    _layer_or_skip(name)
  assert _python("""
      os.mkdir(root.name + "/down")
      every["chroot"].enter()
      again = stopped(os.chroot, "/down")
      every["uid"].enter()
      back = stopped(os.setresuid, 0, 0, 0)
      answer([again, back, os.getuid()])
  """) == [True, True, _NOBODY]


def test_capabilities_do_not_come_back_with_exec():
  _layer_or_skip("chroot")
  assert _python("""
          status = os.open("/proc/self/status", os.O_RDONLY)
          every["chroot"].enter()
          text = os.pread(status, 9999, 0).decode()
          answer(text.partition("NoNewPrivs:")[2].split()[0])
      """) == "1"


def test_limits_only_go_down():
  # A batch system's limit on CPU time would else be an error, or be lifted.
  assert _python("""
      resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
      resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
      every["rlimits"].enter()
      answer([resource.getrlimit(x) for x in
              (resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)])
  """) == [[5, 5], [12, 12]]


def test_ends_with_its_parent_also_as_nobody():
  _layer_or_skip("uid")
  pid = _python("""
      read, write = os.pipe()
      if os.fork() == 0:
        every["uid"].enter()
        os.write(write, b"x")
        time.sleep(60)
      os.read(read, 1)
      answer(int(open(f"/proc/self/task/{os.getpid()}/children").read()))
  """)
  # A zombie has ended, too; who inherits it need not look after it.
  deadline = time.monotonic() + 5.0
  while _is_running(pid):
    assert time.monotonic() < deadline
    time.sleep(0.01)


# --- What is broken ----------------------------------------------------------


@pytest.mark.parametrize(
    ("enter", "reason"),
    [
        ("raise OSError(1, 'as the kernel says it')", "as the kernel says it"),
        ("raise OSError('without number')", "without number"),
        ("raise ValueError('of the library')", "of the library"),
        ("pass", "did not stop"),
        ("time.sleep(60)", "died"),
        ("while True: pass", "died"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "died"),
        ("os._exit(0)", "died"),
    ],
)
def test_broken_layer_is_reported(enter, reason):
  found = _python(f"""
      layers._PROBE_S = 1
      def enter():
        {enter}
      layer = every["chroot"]._replace(enter=enter)
      answer(layers.probe([layer, every["rlimits"]]))
  """)
  assert reason in found["chroot"]
  assert found["rlimits"] == ""


def test_without_the_library(monkeypatch):
  del monkeypatch
  found = _python("""
      sys.modules["pyseccomp"] = None
      answer(layers.probe([every["seccomp"]]))
  """)
  assert "libseccomp2 is missing" in found["seccomp"]


@pytest.fixture
def weak(monkeypatch):
  monkeypatch.setattr(
      layers_lib, "probe_bubblewrap", lambda *unused: "bwrap is not installed"
  )
  monkeypatch.setattr(sandbox, "_ZYGOTE", ("-c", _BROKEN))


def test_too_weak_is_an_error_that_says_how_to_go_on(weak):
  with sandbox.Sandbox(LIMITS, [(5,)], 2) as box:
    with pytest.raises(errors.UserError) as raised:
      box.admit(GOOD)
    message = str(raised.value)
    for words in (
        "--allow_weak_sandbox",
        "seccomp (broken by the test)",
        "bubblewrap (bwrap is not installed)",
        "install libseccomp2 or bubblewrap",
    ):
      assert words in message
    # Nothing runs on meanwhile.
    assert not any(lane._running for lane in box._lanes)


def test_too_weak_goes_on_where_that_is_wanted(weak):
  with sandbox.Sandbox(LIMITS, [(5,)], 2, allow_weak=True) as box:
    assert isinstance(box.admit(GOOD), sandbox.Admitted)
    found = box.layers()
  assert found["seccomp"] == "broken by the test"
  assert found["bubblewrap"] == "bwrap is not installed"


# --- Around the zygote -------------------------------------------------------


def test_namespaces():
  done = subprocess.run(
      [
          sys.executable,
          layers_lib.__file__,
          sys.executable,
          "-c",
          _HEAD + "answer([layers.namespaces_of(), os.getuid()])",
      ],
      capture_output=True,
      check=True,
  )
  inside, _ = json.loads(done.stdout)
  outside = layers_lib.namespaces_of()
  shared = {kind for kind in outside if inside[kind] == outside[kind]}
  if shared == set(outside):
    pytest.skip("namespaces are not permitted here")
  assert not shared


def test_what_the_sandbox_reports():
  with sandbox.Sandbox(LIMITS, [(5,)], 2, allow_weak=True) as box:
    found = box.layers()
    pid = box._lanes[0]._running["zygote"].pid
    own = layers_lib.namespaces_of(str(pid))
  assert set(found) == {*NAMES, "namespaces", "bubblewrap"}
  is_apart = not set(own.values()) & set(layers_lib.namespaces_of().values())
  assert is_apart == (found["namespaces"] == "") or found["bubblewrap"] == ""


def test_as_a_user_without_rights(tmp_path):
  if os.getuid():
    pytest.skip("the other tests are that already")
  as_nobody = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
  try:
    subprocess.run([sys.executable, "-c", ""], check=True, **as_nobody)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip(f"nobody may not run {os.path.realpath(sys.executable)}")
  tmp_path.chmod(0o755)
  home = tmp_path / "home"
  home.mkdir()
  os.chown(home, _NOBODY, _NOBODY)
  for parent in tmp_path.parents[:2]:  # Those of pytest are the user's alone.
    parent.chmod(0o755)
  script = f"""
      import json
      from selfdev_jax import config, sandbox
      limits = config.Sandbox(timeout_s=60.0)
      with sandbox.Sandbox(limits, [(5,)], 2, allow_weak=True) as box:
        print(json.dumps([type(box.admit({GOOD!r})).__name__, box.layers()]))
  """
  done = subprocess.run(
      [sys.executable, "-c", textwrap.dedent(script)],
      capture_output=True,
      check=True,
      cwd=home,
      env={
          "HOME": str(home),
          "TMPDIR": str(home),
          "SELFDEV_CACHE": str(home),
          "JAX_PLATFORMS": "cpu",
          "PATH": os.defpath,
          "PYTHONPATH": str(ROOT),
      },
      **as_nobody,
  )
  verdict, found = json.loads(done.stdout)
  assert verdict == "Admitted"
  assert found["uid"] == "only root can become nobody"
  assert found["rlimits"] == ""
  # In a user namespace of its own it may have these two.
  assert (found["chroot"] == "") == (found["namespaces"] == "")
  here = _python("answer(layers.probe(list(every.values())))")
  assert {x: found[x] for x in ("landlock", "seccomp")} == {
      x: here[x] for x in ("landlock", "seccomp")
  }


def test_what_is_said_of_layers_is_in_security():
  text = " ".join((ROOT / "SECURITY.md").read_text().split())
  stops = [layers_lib.NAMESPACES_STOP, layers_lib.BUBBLEWRAP_STOPS]
  stops += layers_lib.NOTHING_STOPS
  limits = layers_lib.Limits(1, 1.0)
  stops += [layer.stops for layer in layers_lib.child_layers(limits, "/")]
  for claim in stops:
    assert claim in text
