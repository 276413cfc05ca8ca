"""Every program of `attacks`, and every claim of SECURITY.md.

They run three times: in the sandbox as it is; with all of Python, as if filter
and names had been bypassed; and so with one kernel layer at a time, and with
none, where they have to succeed: else they would prove nothing.
"""

import contextlib
import ctypes
import dataclasses
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import tempfile

import numpy as np
import pytest

from selfdev_jax import config
from selfdev_jax import sandbox
from selfdev_jax.sandbox import layers as layers_lib
from tests.sandbox import attacks as attacks_lib

ROOT = pathlib.Path(__file__).parents[2]
ATTACKS = attacks_lib.ATTACKS
KERNEL = ("rlimits", "chroot", "uid", "landlock", "seccomp", "namespaces")
GOOD = "def merge(base, task_vectors):\n  return base + sum(task_vectors)\n"
SHAPES = [(6, 4), (5,)]
CANARY = "the-canary-of-this-test"
# Time must not be what a program meets first, where the machine is busy.
PATIENT = config.Sandbox(
    timeout_s=60.0, memory_bytes=1 << 28, output_bytes=1000, ir_bytes=1 << 20
)
HASTY = dataclasses.replace(PATIENT, timeout_s=1.5)
_SEGMENT = 0x5E1FDE0  # A System V shared memory key.
_SEGMENT_BYTES = 4096
# A zygote without filter and restricted names, where only some layers hold.
_NAKED = """
import builtins, errno
from selfdev_jax.programs import contract
from selfdev_jax.sandbox import layers, trace, zygote
trace.filter_lib.check = lambda source: None
restricted = contract.namespace
contract.namespace = lambda: restricted() | {"__builtins__": builtins.__dict__}
every = layers.child_layers
def off():
  raise OSError(errno.EPERM, "switched off")
def some(*arguments):
  for layer in every(*arguments):
    yield layer if layer.name in %r else layer._replace(enter=off)
layers.child_layers = lambda *arguments: tuple(some(*arguments))
zygote.main()
"""


# --- The world around --------------------------------------------------------


class World:
  """What the programs are after, and whether they got it."""

  def __init__(self):
    self._directory = pathlib.Path(tempfile.mkdtemp(prefix="selfdev_victim_"))
    # All may read here, unlike in pytest's own directories.
    self._directory.chmod(0o755)
    self._victim = self._directory / "victim"
    self.plain = self._directory / "plain.py"  # Instead of namespaces.
    self.plain.write_text(
        "import os, sys\nos.execv(sys.argv[1], sys.argv[1:])\n"
    )
    self._by_path = None
    self._sockets = []
    self.targets = {
        "victim": self._victim,
        "public": self._directory / "public",
        "private": self._directory / "private",
        "tcp": self._listen(socket.SOCK_STREAM),
        "udp": self._listen(socket.SOCK_DGRAM),
        "abstract": f"selfdev_{os.getpid()}",
        "segment": _SEGMENT + os.getpid(),
        "caller": os.getpid(),
    }
    for name, mode in (("public", 0o644), ("private", 0o600)):
      self.targets[name].write_text(CANARY)
      self.targets[name].chmod(mode)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0" + self.targets["abstract"])
    self._accept(listener)
    self._libc = ctypes.CDLL(None)
    self._segment = self._libc.shmget(
        self.targets["segment"], _SEGMENT_BYTES, 0o1666
    )
    self.restore()

  def _listen(self, kind):
    listener = socket.socket(socket.AF_INET, kind)
    listener.bind(("127.0.0.1", 0))
    self._accept(listener)
    return listener.getsockname()[1]

  def _accept(self, listener):
    if listener.type == socket.SOCK_STREAM:
      listener.listen()
    listener.setblocking(False)
    self._sockets.append(listener)

  def restore(self):
    """Everything as it was before an attack."""
    shutil.rmtree(self._victim, ignore_errors=True)
    (self._victim / "directory").mkdir(parents=True)
    (self._victim / "file").write_text(CANARY)
    (self._victim / "link").symlink_to("file")
    np.save(self._victim / "array.npy", np.zeros(2))
    if self._by_path:
      self._sockets.remove(self._by_path)
      self._by_path.close()
    self._by_path = socket.socket(socket.AF_UNIX)
    self._by_path.bind(str(self._victim / "socket"))
    self._accept(self._by_path)
    self._connections()
    self._victim.chmod(0o755)
    (self._victim / "array.npy").chmod(0o644)
    self._before = self._files()

  def _files(self):
    return {
        str(path): (
            (status := path.lstat()).st_mode,
            status.st_uid,
            status.st_nlink,
            status.st_mtime_ns,
            status.st_ctime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(self._directory.rglob("*"))
    }

  def changes(self):
    """What was done to files; connections that came."""
    found = ["files changed"] if self._files() != self._before else []
    return found + ["someone connected"] * self._connections()

  def _connections(self):
    count = 0
    for listener in self._sockets:
      with contextlib.suppress(BlockingIOError):
        if listener.type == socket.SOCK_STREAM:
          listener.accept()[0].close()
        else:
          listener.recv(9)
        count += 1
    return count

  def close(self):
    for listener in self._sockets:
      listener.close()
    self._libc.shmctl(self._segment, 0, None)
    shutil.rmtree(self._directory)


@pytest.fixture(scope="module")
def world():
  world = World()
  patch = pytest.MonkeyPatch()
  patch.setenv("HF_TOKEN", CANARY)
  yield world
  patch.undo()
  world.close()


def _state():
  """What of this process a program could have changed."""
  kinds = [x for x in dir(resource) if x.startswith("RLIMIT_")]
  return {
      "directory": os.getcwd(),
      "environment": dict(os.environ),
      "signals": [signal.getsignal(x) for x in signal.valid_signals()],
      "limits": [resource.getrlimit(getattr(resource, x)) for x in kinds],
      "descriptors": len(os.listdir("/proc/self/fd")),
      "namespaces": layers_lib.namespaces_of(),
  }


def _strangers(box):
  """Processes of that sandbox that are none of its own."""
  scratch = os.path.join(box._scratch.name, "zygote")
  own = {x.pid for lane in box._lanes for x in lane._running.values()}
  found = set()
  for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
    with contextlib.suppress(OSError):
      places = [os.readlink(f"/proc/{pid}/{x}") for x in ("cwd", "root")]
      if pid not in own and any(x.startswith(scratch) for x in places):
        found.add(pid)
  return found


def _zygote(box):
  return box._lanes[0]._running["zygote"].pid


def _admit(box, world, attack):
  targets = world.targets | {
      "scratch": os.path.join(box._scratch.name, "zygote")
  }
  return box.admit(attacks_lib.aim(attack, targets))


def _harm(box, world, verdict, zygote, others):
  """What a program got, in words; nothing is what it should."""
  message = getattr(verdict, "message", "")
  found = [x for x in (attacks_lib.HARM, CANARY) if x in message]
  found += world.changes()
  left = _strangers(box) - others
  found += [f"process {pid} is left" for pid in left]
  if _zygote(box) != zygote:
    found.append("the zygote was killed")
  if os.listdir(os.path.join(box._scratch.name, "zygote")):
    found.append("a file is left")
  return found


def _attack(box, world, attack):
  """Runs one; its verdict, after all that must hold whatever it was."""
  state, zygote, others = _state(), _zygote(box), _strangers(box)
  verdict = _admit(box, world, attack)
  harm = _harm(box, world, verdict, zygote, others)
  if harm:
    world.restore()
  assert not harm, verdict
  assert _state() == state
  return verdict


def _stage(stopper):
  """Stages and codes of the Rejection, by what stopped a program."""
  return {
      "filter": {"stage": ("filter",)},
      "verifier": {"stage": ("verify",)},
      "screener": {"stage": ("run",)},
      "wall clock": {"stage": ("trace",), "code": ("timeout",)},
      "pipe cap": {"stage": ("trace",), "code": ("ir_bytes",)},
      "rlimits": {"stage": ("trace",), "code": ("memory", "crash")},
  }.get(stopper, {"stage": ("trace", "verify")})


def _fits(verdict, stopper):
  return all(getattr(verdict, k) in v for k, v in _stage(stopper).items())


def _is_endless(attack):
  return "wall clock" in attack.alone


def _programs(attacks):
  return pytest.mark.parametrize(
      "attack", [pytest.param(x, id=x.name) for x in attacks]
  )


_ENDING = _programs([x for x in ATTACKS if not _is_endless(x)])
_ENDLESS = _programs([x for x in ATTACKS if _is_endless(x)])


class _Undressed(sandbox.Sandbox):
  """Without filter and restricted names, with some of the layers."""

  def __init__(self, limits, names, world):
    super().__init__(limits, SHAPES, 2, allow_weak=True)
    self._names = names
    self._plain = str(world.plain)

  def _start_zygote(self):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sandbox, "_ZYGOTE", ("-c", _NAKED % (self._names,)))
      if "namespaces" not in self._names:
        patch.setattr(layers_lib, "__file__", self._plain)
      return super()._start_zygote()


@contextlib.contextmanager
def _started(box):
  with box:
    digest = box.admit(GOOD).digest
    yield box
    assert box.admit(GOOD).digest == digest


# --- As it is ----------------------------------------------------------------


@pytest.fixture(scope="module", params=[PATIENT], ids=["patient"])
def full(request, world):
  del world  # Its secrets are there first.
  with _started(sandbox.Sandbox(request.param, SHAPES, 2)) as box:
    yield box


def _check(box, world, attack):
  verdict = _attack(box, world, attack)
  if attack.stopped_by == "nothing":
    assert isinstance(verdict, sandbox.Admitted), verdict
  else:
    assert _fits(verdict, attack.stopped_by), verdict


@_ENDING
def test_stopped_in_the_sandbox(full, world, attack):
  _check(full, world, attack)


@pytest.mark.slow
@_ENDLESS
@pytest.mark.parametrize("full", [HASTY], indirect=True, ids=["hasty"])
def test_endless_in_the_sandbox(full, world, attack):
  _check(full, world, attack)


# --- With all of Python ------------------------------------------------------


@pytest.fixture(scope="module", params=[PATIENT], ids=["patient"])
def naked(request, world):
  with _started(_Undressed(request.param, KERNEL, world)) as box:
    if missing := [x for x in ("rlimits", "seccomp") if box.layers()[x]]:
      pytest.skip(f"they could do harm: here is no {missing}")
    yield box


def _check_naked(box, world, attack):
  verdict = _attack(box, world, attack)
  if isinstance(verdict, sandbox.Admitted):
    assert attack.alone in ((), ("nothing",))
  elif attack.alone and not attack.control:
    assert _fits(verdict, *attack.alone), verdict


@pytest.mark.slow
@_ENDING
def test_stopped_with_all_of_python(naked, world, attack):
  _check_naked(naked, world, attack)


@pytest.mark.slow
@_ENDLESS
@pytest.mark.parametrize("naked", [HASTY], indirect=True, ids=["hasty"])
def test_endless_with_all_of_python(naked, world, attack):
  _check_naked(naked, world, attack)


def test_programs_do_not_see_each_other(naked):
  digest = naked.admit(GOOD).digest
  for attack in ATTACKS:
    if attack.kind == "later programs":
      naked.admit(attacks_lib.aim(attack, dict.fromkeys(("victim",), "/x")))
      assert naked.admit(GOOD).digest == digest, attack.name


# --- One layer ---------------------------------------------------------------


_ROOT_ONLY = pytest.mark.skipif(
    os.getuid() != 0, reason="only root has all layers"
)


def _succeed(world, names):
  """The programs that get what they want where only these layers hold."""
  found = set()
  with _started(_Undressed(PATIENT, names, world)) as box:
    held = {name for name in KERNEL if not box.layers()[name]}
    if held != set(names):
      pytest.skip(f"not to be had here: {set(names) - held}")
    for attack in ATTACKS:
      if attack.control:
        verdict = _admit(box, world, attack)
        world.restore()
        if attacks_lib.HARM in getattr(verdict, "message", ""):
          found.add(attack.name)
  return found


@pytest.fixture(scope="module")
def helpless(world):
  return _succeed(world, ())


@_ROOT_ONLY
@pytest.mark.slow
def test_without_a_layer_they_succeed(helpless):
  failed = {x.name for x in ATTACKS if x.control} - helpless
  # What a kernel was built without can neither be attacked nor defended.
  assert failed <= {"bpf", "io_uring", "mptcp", "new_keyring", "vsock"}


@_ROOT_ONLY
@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL)
def test_each_layer_alone(helpless, world, name):
  succeeded = _succeed(world, (name,))
  claimed = {x.name for x in ATTACKS if name in x.alone}
  assert helpless - succeeded == helpless & claimed


@pytest.fixture(scope="module")
def contained(world):
  """With bubblewrap alone."""
  with _started(_Undressed(PATIENT, (), world)) as box:
    if reason := box.layers()["bubblewrap"]:
      pytest.skip(f"bubblewrap: {reason}")
    assert box.layers()["seccomp"]
    yield box


@pytest.mark.slow
@pytest.mark.parametrize("flags", [0, 0x10020000], ids=["outer", "inner"])
def test_bubblewrap_stays_read_only(contained, flags):
  # As root, and as the root of a user namespace inside.
  path = str(ROOT / "selfdev_jax")
  verdict = contained.admit(f"""
import ctypes, os
libc = ctypes.CDLL(None)

def merge(base, task_vectors):
  libc.unshare({flags})
  libc.mount(None, {path!r}.encode(), None, 32 | 4096, None)
  os.rmdir(os.mkdir({path!r} + "/broken_out") or {path!r} + "/broken_out")
  raise ValueError("{attacks_lib.HARM}")
""")
  assert "Read-only file system" in verdict.message


@pytest.mark.slow
def test_bubblewrap_alone(contained, world):
  for attack in ATTACKS:
    if attack.control:
      message = getattr(_admit(contained, world, attack), "message", "")
      # What is inside is a program's to harm.
      assert not world.changes(), attack.name
      assert CANARY not in message, attack.name
      if "$caller" in attack.source:
        assert attacks_lib.HARM not in message, attack.name


# --- SECURITY.md -------------------------------------------------------------


def test_security_names_what_there_is():
  text = (ROOT / "SECURITY.md").read_text()
  section = re.search(r"^## What is covered$(.*?)^## ", text, re.M | re.S)[1]
  claims = re.split(r"^- ", section, flags=re.M)[1:]
  assert len(claims) >= 15
  names = {f"attack:{x.name}" for x in ATTACKS}
  kinds = {f"attacks:{x.kind}" for x in ATTACKS}
  for claim in claims:
    named = re.findall(r"`(tests/[^`]+|attacks?:[^`]+)`", claim)
    assert named, f"no test: {claim}"
    for name in named:
      path, _, function = name.partition("::")
      if path.startswith("tests/"):
        assert f"def {function}(" in (ROOT / path).read_text(), name
      else:
        assert name in names | kinds, name


def test_the_table():
  assert len(ATTACKS) >= 100
  assert len({x.name for x in ATTACKS}) == len(ATTACKS)
  assert len({x.source for x in ATTACKS}) == len(ATTACKS)
