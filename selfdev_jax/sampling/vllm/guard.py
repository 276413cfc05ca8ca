"""Runs a command whose processes end with the one that started this.

  python guard.py COMMAND...   with a pipe as standard input

When the pipe is closed, as the kernel does however its other end dies, every
process below this one gets SIGTERM, and SIGKILL where that is not enough; the
sockets that vLLM's processes would leave behind go too. It runs by itself:
standard library only, and nothing of this package.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_GRACE_S = 5.0
# A command that a signal ended gives this and the signal's number, as in a
# shell.
KILLED = 128


def below(pid: int) -> list[int]:
  """All processes that descend from `pid`."""
  found = []
  with contextlib.suppress(OSError):
    for thread in os.listdir(f"/proc/{pid}/task"):
      with open(f"/proc/{pid}/task/{thread}/children") as file:
        for child in map(int, file.read().split()):
          found += [child, *below(child)]
  return found


def _reap():
  """Takes the exit status of orphans; they are this process's children."""
  with contextlib.suppress(ChildProcessError):
    while os.waitpid(-1, os.WNOHANG)[0]:
      pass


def _end_all():
  for sent, patience in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 1e9)):
    deadline = time.monotonic() + patience
    while (pids := below(os.getpid())) and time.monotonic() < deadline:
      for pid in pids:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, sent)
      time.sleep(0.05)
      _reap()


def main():
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  prctl = ctypes.CDLL(None).prctl
  prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

  def follow():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      signal.signal(number, signal.SIG_DFL)
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

  with tempfile.TemporaryDirectory(prefix="selfdev_vllm_") as sockets:
    child = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"VLLM_RPC_BASE_PATH": sockets},
        preexec_fn=follow,
    )
    ended = os.pidfd_open(child.pid)
    select.select([sys.stdin.fileno(), ended], [], [])
    status = child.poll()
    _end_all()
  if status is None:
    sys.exit(0)
  sys.exit(status if status >= 0 else KILLED - status)


if __name__ == "__main__":
  main()
