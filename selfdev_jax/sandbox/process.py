"""A process that answers messages, and can be lost."""

from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import select
import subprocess
import tempfile
import threading
import time
from typing import Any

from selfdev_jax import errors
from selfdev_jax.sandbox import wire

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Nothing is imported from where a process happens to be, or from a home.
PYTHON = {
    "PYTHONNOUSERSITE": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONSAFEPATH": "1",
}
_START_S = 120.0  # Importing JAX on a busy machine.
_MAX_HELLO_BYTES = 1 << 16
_MAX_WORDS = 1 << 12


class LostError(Exception):
  """The process took too long, and was killed, or it died.

  Attributes:
    code: "timeout" or "crash".
    words: the last line that it wrote to stderr, perhaps empty.
  """

  def __init__(self, code: str, words: str):
    super().__init__(code)
    self.code = code
    self.words = words


def exit_with_caller() -> None:
  """Ends this process when its stdin ends, in whatever it is then."""

  def watch():
    poll = select.poll()
    poll.register(0, 0)  # Of itself it tells of the other side's end.
    poll.poll()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def environment(home: str, **more: str) -> dict[str, str]:
  """What a process needs of an environment, and nothing of this one's."""
  return {
      "HOME": home,
      "JAX_PLATFORMS": "cpu",
      "LANG": "C.UTF-8",
      "OMP_NUM_THREADS": "1",
      "OPENBLAS_NUM_THREADS": "1",
      "PATH": os.defpath,
      **PYTHON,
      **more,
  }


def is_out_of_memory(error: Exception) -> bool:
  """Whether that is what XLA or Python says."""
  signs = ("RESOURCE_EXHAUSTED", "Out of memory")
  return isinstance(error, MemoryError) or any(s in str(error) for s in signs)


class Process:
  """One helper process; not for several threads at once.

  Attributes:
    hello: what it answered to its setup.
    pid: its process number.
  """

  def __init__(
      self,
      command: Sequence[str],
      setup: dict[str, Any],
      variables: dict[str, str],
      directory: str,
      inherited: Sequence[int] = (),
      start_s: float = _START_S,
  ):
    """Starts it: exec, so that it inherits nothing of this process.

    Args:
      command: to run.
      setup: its first message, as JSON; it answers with JSON.
      variables: its environment, all of it.
      directory: where it starts.
      inherited: descriptors that stay open in it.
      start_s: how long it may take to answer its setup.

    Raises:
      UserError: if it does not come up; no program is to blame for that.
    """
    self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
    try:
      self._process = subprocess.Popen(
          list(command),
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=self._complaints,
          bufsize=0,
          cwd=directory,
          env=variables,
          close_fds=True,
          pass_fds=inherited,
          start_new_session=True,  # Ctrl-C is for this process alone.
      )
    except OSError as error:
      self._complaints.close()
      raise errors.UserError(
          f"a process of the sandbox cannot start: {error}"
      ) from None
    self.pid = self._process.pid
    try:
      self.send(json.dumps(setup).encode())
      self.hello = json.loads(self.receive(_MAX_HELLO_BYTES, start_s))
    except LostError as error:
      raise errors.UserError(
          "a process of the sandbox cannot start"
          f" ({error.words or 'no answer'}); try {' '.join(command)}"
      ) from None
    except BaseException:
      self.stop()
      raise

  def is_alive(self) -> bool:
    return self._process.poll() is None

  def send(self, message: bytes) -> None:
    """Sends a message.

    Raises:
      LostError: the process is gone.
    """
    try:
      wire.send(self._process.stdin.fileno(), message)
    except OSError:
      raise self._lost("crash") from None

  def receive(self, max_bytes: int, timeout_s: float) -> bytes:
    """Waits for a message, of at most `max_bytes`.

    Raises:
      LostError: it did not come in time, or the process died, or sent more;
        the process is gone.
    """
    try:
      return wire.receive(
          self._process.stdout.fileno(), max_bytes, time.monotonic() + timeout_s
      )
    except wire.WireTimeoutError:
      raise self._lost("timeout", patience_s=0.0) from None
    except wire.WireError:
      raise self._lost("crash") from None

  def stop(self, patience_s: float = 2.0) -> None:
    """Ends it, and with it what it runs. May be called again.

    Args:
      patience_s: at the end of its input a process ends by itself, taking its
        children along; it is killed where it has not after so long.
    """
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    try:
      self._process.wait(patience_s)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._complaints.close()

  def _lost(self, code, patience_s=2.0):
    size = os.fstat(self._complaints.fileno()).st_size
    tail = os.pread(
        self._complaints.fileno(), _MAX_WORDS, max(0, size - _MAX_WORDS)
    )
    self.stop(patience_s)
    lines = tail.decode(errors="replace").split("\n")
    words = next((x for x in reversed(lines) if x.strip()), "")
    return LostError(code, words[:300])
