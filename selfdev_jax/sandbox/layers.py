"""What the kernel holds a program to, in layers that do without each other.

A child of the zygote enters them one after the other and never leaves them.
`probe` enters each alone, in a process of its own, and tries what it should
stop: what a kernel, a container or a missing library does not give is known,
with the reason, before a program runs.

Run as a script, this file gives a command namespaces of its own:

    python layers.py COMMAND...

(A user namespace needs a process with one thread, which one that has imported
JAX is not.)
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import ctypes
import errno
import functools
import mmap
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
from typing import NamedTuple

NOBODY = 65534
NAMESPACES = ("net", "ipc", "uts", "mnt")
_CLONE = {
    "mnt": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "net": 0x40000000,
}
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_SETGID, _CAP_SETUID = 1 << 6, 1 << 7
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
# Numbers that all architectures share.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE = 444, 445
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_READ = 0b1100  # Files and directories.
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # ABI: rights over files.
_PROBE_S = 10
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache")
_libc = ctypes.CDLL(None, use_errno=True)


def _words(text):
  return text.split()


# All that tracing needs once JAX is imported; arguments are checked below.
_SYSCALLS = _words("""
    read write close exit exit_group brk munmap mremap madvise futex
    clock_gettime clock_nanosleep nanosleep gettimeofday getpid gettid
    getrandom getrusage sched_yield sched_getaffinity rt_sigaction
    rt_sigprocmask rt_sigreturn sigaltstack restart_syscall lseek fstat
    set_robust_list rseq membarrier
""")
_SYSCALLS_WITHOUT_EXEC = ("mmap", "mprotect")


class Limits(NamedTuple):
  """What rlimits hold a child to."""

  memory_bytes: int
  seconds: float


NO_LIMITS = Limits(0, 0.0)


class Layer(NamedTuple):
  """One thing that the kernel refuses.

  Attributes:
    name: as reports have it.
    stops: what it stops, with no other layer and no filter before it.
    enter: confines this process for good; OSError where that is impossible.
    attack: what an entered layer answers with OSError.
  """

  name: str
  stops: str
  enter: Callable[[], None]
  attack: Callable[[], object]


def child_layers(limits: Limits, root: str) -> tuple[Layer, ...]:
  """The layers that a child enters, in this order.

  Args:
    limits: for the child.
    root: an empty directory: all of the file system that `chroot` leaves.
  """
  return (
      Layer(
          "rlimits",
          "memory bombs, endless computation, filled files, and as nobody"
          " also new processes and threads",
          lambda: _limit(limits),
          lambda: mmap.mmap(-1, 2 * limits.memory_bytes),
      ),
      Layer(
          "chroot",
          "every path outside of an empty directory",
          lambda: _chroot(root),
          lambda: os.stat("/usr"),
      ),
      Layer(
          "uid",
          "deleting or writing others' files, reading private ones, signals"
          " and ptrace to other processes",
          _become_nobody,
          lambda: os.kill(os.getppid(), 0),
      ),
      Layer(
          "landlock",
          "opening, making and deleting files, TCP, signals to other"
          " processes, as far as the kernel's version goes",
          restrict_files,
          lambda: os.close(os.open("/", os.O_RDONLY)),
      ),
      Layer(
          "seccomp",
          "all system calls but those that tracing needs: no open, socket,"
          " fork, exec, kill, ptrace, mount or executable memory",
          _filter_syscalls,
          lambda: socket.socket().close(),
      ),
  )


# What surrounds the zygote, and its children with it.
NAMESPACES_STOP = (
    "connections, abstract sockets and shared memory of this machine: there is"
    " a network without interfaces"
)
BUBBLEWRAP_STOPS = (
    "all files but Python's and JAX's own, which are read-only, all other"
    " processes, and connections: an outer container"
)
NOTHING_STOPS = (
    "bugs of the kernel behind the few system calls left, and of the processor"
    " (Spectre and its like)",
    "using its share of a core and of memory until the limits end it",
    "reading what the zygote's memory holds: Python, JAX and the shapes, and"
    " nothing else by design",
    "merges that are valid, fast and bad: scores, not sandboxes, tell those",
)


def probe(layers: Sequence[Layer]) -> dict[str, str]:
  """Tries each layer by itself.

  What they need of the file system is read first: `chroot` may follow.

  Returns:
    Name to "" where the layer holds, else to the reason why not.
  """
  _in_user_namespace()
  with contextlib.suppress(OSError):
    _syscall_filter()
  return {layer.name: _probe(layer) for layer in layers}


def _probe(layer):
  read, write = os.pipe()
  pid = os.fork()
  if pid == 0:
    try:
      os.write(write, _try(layer).encode()[:500])
    finally:
      os._exit(0)
  os.close(write)
  with open(read, "rb") as pipe:
    answer = pipe.read().decode()
  os.waitpid(pid, 0)
  if answer == "held":
    return ""
  return answer or "the process that tried it died"


def _try(layer):
  # The prober's own end is no business of a broken layer.
  signal.alarm(_PROBE_S)
  try:
    layer.enter()
  except Exception as error:  # pylint: disable=broad-exception-caught
    return getattr(error, "strerror", None) or repr(error)
  try:
    layer.attack()
  except OSError:
    return "held"
  return "it was entered, and did not stop what it should"


def mapped_bytes() -> int:
  """The address space of this process, which RLIMIT_AS counts."""
  with open("/proc/self/statm", encoding="ascii") as file:
    return int(file.read().split()[0]) * resource.getpagesize()


def die_with_parent() -> None:
  """SIGKILL when the parent is gone; forgotten whenever the uid changes."""
  _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _check(status):
  if status < 0:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
  return status


# --- The layers --------------------------------------------------------------


def _limit(limits):
  # Behind the wall clock, should the zygote be killed.
  seconds = int(limits.seconds) + 1
  for limit, value in (
      (resource.RLIMIT_AS, mapped_bytes() + limits.memory_bytes),
      (resource.RLIMIT_CPU, seconds),
      (resource.RLIMIT_FSIZE, 0),
      (resource.RLIMIT_NOFILE, 16),
      (resource.RLIMIT_CORE, 0),
      (resource.RLIMIT_NPROC, 0),
  ):
    lower_limit(limit, value)


def lower_limit(which: int, value: int) -> None:
  """Sets an rlimit for good, to no more than it is."""
  # Only root may raise one, and whoever set it meant it.
  hard = resource.getrlimit(which)[1]
  if hard != resource.RLIM_INFINITY:
    value = min(value, hard)
  resource.setrlimit(which, (value, value))


def _chroot(root):
  # Root could leave again. What it keeps serves to become nobody, which the
  # root of a user namespace cannot.
  kept = 0 if _in_user_namespace() else _CAP_SETGID | _CAP_SETUID
  os.chroot(root)
  os.chdir("/")
  _keep_capabilities(kept)


def _become_nobody():
  if os.getuid() or _in_user_namespace():
    raise OSError(errno.EPERM, "only root can become nobody")
  os.setgroups([])
  os.setresgid(NOBODY, NOBODY, NOBODY)
  os.setresuid(NOBODY, NOBODY, NOBODY)
  die_with_parent()


@functools.cache
def _in_user_namespace():
  with open("/proc/self/uid_map", encoding="ascii") as file:
    return file.read().split() != ["0", "0", "4294967295"]


def _keep_capabilities(mask):
  header, data = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0), bytearray(24)
  _check(_libc.capget(header, (ctypes.c_char * 24).from_buffer(data)))
  mask &= struct.unpack("<6I", data)[1]  # Those that are permitted.
  _no_new_privileges()
  _check(_libc.capset(header, struct.pack("<6I", mask, mask, 0, 0, 0, 0)))


def _no_new_privileges():
  # Else exec would give root all of them again.
  _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def restrict_files(readable: Sequence[str] = ()) -> None:
  """Landlock: no file is opened, and what else its version stops.

  Args:
    readable: directories with files that may be read.

  Raises:
    OSError: the kernel has none.
  """
  abi = _check(_libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1))
  files = (1 << max(n for a, n in _LANDLOCK_RIGHTS.items() if a <= abi)) - 1
  # Rights over files; TCP bind and connect; abstract sockets and signals.
  rules = struct.pack("<Q", files)
  rules += struct.pack("<Q", 0b11) if abi >= 4 else b""
  rules += struct.pack("<Q", 0b11) if abi >= 6 else b""
  ruleset = _check(
      _libc.syscall(_LANDLOCK_CREATE_RULESET, rules, len(rules), 0)
  )
  for path in readable:
    directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("<Qi", _LANDLOCK_READ, directory)
    _check(_libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0))
    os.close(directory)
  _no_new_privileges()
  _check(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0))
  os.close(ruleset)


def _filter_syscalls():
  _syscall_filter().load()


@functools.cache
def _syscall_filter():
  """Made before other layers are entered: the library is a file."""
  try:
    import pyseccomp  # pylint: disable=g-import-not-at-top
  except (ImportError, RuntimeError) as error:
    raise OSError(errno.ENOSYS, f"libseccomp2 is missing: {error}") from None
  rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
  for name in _SYSCALLS:
    # Not every architecture has every call.
    with contextlib.suppress(OSError, ValueError):
      rules.add_rule(pyseccomp.ALLOW, name)
  for name in _SYSCALLS_WITHOUT_EXEC:
    rules.add_rule(
        pyseccomp.ALLOW,
        name,
        pyseccomp.Arg(2, pyseccomp.MASKED_EQ, mmap.PROT_EXEC, 0),
    )
  return rules


# --- Around the zygote -------------------------------------------------------


def namespaces_of(pid: str = "self") -> dict[str, str]:
  """The namespaces that a process is in, by kind."""
  return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in NAMESPACES}


def enter_namespaces() -> None:
  """Gives this process namespaces of its own; it may have one thread only.

  Raises:
    OSError: the kernel, or a container around, does not allow it.
  """
  flags = sum(_CLONE[kind] for kind in NAMESPACES)
  uid, gid = os.getuid(), os.getgid()
  if uid:
    _check(_libc.unshare(flags | _CLONE["user"]))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
      with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
        file.write(text)
  else:
    _check(_libc.unshare(flags))
  _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))


def bubblewrap(scratch: str, readable: Sequence[str]) -> list[str]:
  """The command that puts a zygote into an outer container.

  Args:
    scratch: the only directory that it may write to.
    readable: what it may read besides the system's libraries.
  """
  # By its path: who starts it may have another search path.
  command = [shutil.which("bwrap") or "bwrap"]
  command += ["--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
  for path in _SYSTEM:
    command += ["--ro-bind-try", path, path]
  command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
  for path in readable:
    command += ["--ro-bind", path, path]
  return [*command, "--bind", scratch, scratch, "--chdir", scratch, "--"]


def probe_bubblewrap(scratch: str, readable: Sequence[str]) -> str:
  """Empty where bubblewrap works here, else the reason why not."""
  if shutil.which("bwrap") is None:
    return "bwrap is not installed"
  command = [*bubblewrap(scratch, readable), sys.executable, "-c", ""]
  done = subprocess.run(command, capture_output=True, check=False)
  lines = done.stderr.decode(errors="replace").strip().splitlines()
  return (lines or ["it failed"])[-1] if done.returncode else ""


if __name__ == "__main__":
  # Where they cannot be had, the zygote finds out by itself.
  with contextlib.suppress(OSError):
    enter_namespaces()
  os.execv(sys.argv[1], sys.argv[1:])
