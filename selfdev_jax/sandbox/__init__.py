"""Takes untrusted Python and gives back data that may run.

    with Sandbox(limits, shapes, num_experts) as sandbox:
      verdict = sandbox.admit(source)
    if isinstance(verdict, Admitted):
      merge = build(verdict.program)  # A function of JAX arrays.

A program is never executed in the calling process, nor parsed there. A child,
forked for it alone from a warm process without secrets, weights or data, traces
it on abstract shapes and sends program IR (see `ir`): JSON that names
primitives. The caller's process verifies that (see `verify`) and rebuilds it.

What this stops, each line attacked in tests/sandbox/hostile_test.py:
  - a program that never ends, recurses, prints without end or eats memory:
    wall clock, RLIMIT_AS, a capped pipe (and RLIMIT_CPU behind them, which no
    test reaches);
  - processes that a program leaves behind: its session and its orphans are
    killed by the zygote (not where the zygote itself had to be killed);
  - writing bytes to files: RLIMIT_FSIZE;
  - inheriting the caller's memory, environment, descriptors or pipes: another
    process, exec'd with a scrubbed environment, all descriptors closed;
  - one program changing what the next one sees: a child serves one program;
  - forged answers: the verifier takes IR alone, with JAX's own types and
    bounded cost, whatever the child sends.

What this does not stop yet: a program that breaks out of the restricted
builtins (which is possible; they and the AST filter are there for a good
reason in the rejection, not for security) runs with the user's rights. It may
read and delete files, create empty ones, open sockets, signal processes of the
same user and look into them through /proc, the caller's included. Kernel layers
(seccomp, Landlock, namespaces, another uid) come around the child, in
`zygote._child`; nothing else has to change for them. Nor is there a watchdog
over compiling and running an admitted program: the verifier's bounds have to
do.
"""

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax.programs import contract
from selfdev_jax.sandbox import verify as verify_lib
from selfdev_jax.sandbox import wire
from selfdev_jax.sandbox.lift import kernels
from selfdev_jax.sandbox.rebuild import build

__all__ = ["Admitted", "Rejection", "Sandbox", "build", "kernels"]

_ZYGOTE = ("-m", "selfdev_jax.sandbox.zygote")
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_START_S = 120.0  # Importing JAX on a busy machine.
_STOP_S = 2.0
_GRACE_S = 10.0  # For the zygote to report a timeout of its child.
_MAX_MESSAGE_CHARS = 300


@dataclasses.dataclass(frozen=True)
class Rejection:
  """Why a program does not run.

  Attributes:
    stage: "extract", "filter", "trace", "verify" or "run".
    code: a word to count by.
    message: one sentence that the program's author could act on.
  """

  stage: str
  code: str
  message: str


@dataclasses.dataclass(frozen=True)
class Admitted:
  """A program that may run.

  Attributes:
    program: program IR for every shape, JSON text; what the archive keeps and
      `build` takes.
    digest: SHA-256 of the canonical form over all shapes, in hex. Equal
      digests: the same function.
    stats: "equations", "flops", "peak_multiple" and "constants", each the
      largest over the shapes.
  """

  program: str
  digest: str
  stats: dict[str, float]


class Sandbox:
  """Admits or rejects programs, one at a time, from any thread."""

  def __init__(
      self,
      limits: config_lib.Sandbox,
      shapes: Sequence[tuple[int, ...]],
      num_experts: int,
  ):
    """Starts nothing yet: the first `admit` does.

    Args:
      limits: what a program may cost.
      shapes: of the tensors that programs will be applied to, one layer's.
      num_experts: number of task vectors, at least 1.
    """
    self._limits = limits
    self._shapes = list(dict.fromkeys(tuple(map(int, s)) for s in shapes))
    self._num_experts = num_experts
    self._lock = threading.Lock()
    self._zygote: subprocess.Popen[bytes] | None = None
    self._scratch: tempfile.TemporaryDirectory[str] | None = None

  def __enter__(self) -> "Sandbox":
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()

  def admit(self, source: str) -> Admitted | Rejection:
    """Traces, verifies and names one program.

    Args:
      source: any text. Nothing in it makes this raise.

    Returns:
      Admitted, or the reason why not.
    """
    if len(source) > contract.MAX_SOURCE_CHARS:
      return Rejection(
          "filter",
          "too_long",
          f"The program has {len(source)} characters; at"
          f" most {contract.MAX_SOURCE_CHARS} are taken.",
      )
    with self._lock:
      try:
        status, reply = self._ask_again(source)
      except BaseException:  # Ctrl-C between question and answer.
        self._stop()
        raise
    if status != "done":
      return self._failure(status)
    rejection = _rejection(reply)
    if rejection:
      return rejection
    try:
      verified = verify_lib.verify(
          reply, self._limits, self._shapes, self._num_experts
      )
    except verify_lib.VerifyError as error:
      return Rejection("verify", error.code, _one_line(error.message))
    return Admitted(verified.program, verified.digest, verified.stats)

  def close(self) -> None:
    """Ends the zygote and whatever it runs. May be called again."""
    with self._lock:
      self._stop()
      if self._scratch is not None:
        self._scratch.cleanup()
        self._scratch = None

  def _ask_again(self, source):
    """Asks; once more where the zygote died, which need not be its fault."""
    for _ in range(2):
      if self._zygote is None or self._zygote.poll() is not None:
        self._stop()
        self._start()
      try:
        return self._ask(source)
      except (wire.WireError, BrokenPipeError):
        self._stop()
    return "crash", b""

  def _ask(self, source):
    """The zygote's status and the child's bytes."""
    deadline = time.monotonic() + _GRACE_S + self._limits.timeout_s
    limits = self._limits
    self._send(source)
    stdout = self._zygote.stdout.fileno()
    # \ufffd is three bytes, six characters in JSON.
    header = wire.receive(stdout, 8 * limits.output_bytes + 4096, deadline)
    reply = wire.receive(stdout, limits.ir_bytes, deadline)
    return json.loads(header)["status"], reply

  def _start(self):
    """Starts the zygote: exec, so that it inherits nothing of this process.

    Raises:
      UserError: if it does not come up; no program is to blame for that.
    """
    if self._scratch is None:
      self._scratch = tempfile.TemporaryDirectory(prefix="selfdev_sandbox_")
    environment = {
        "HOME": self._scratch.name,
        "JAX_PLATFORMS": "cpu",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": os.defpath,
        "PYTHONPATH": str(_ROOT),
    }
    limits = self._limits
    setup = {
        "shapes": self._shapes,
        "num_experts": self._num_experts,
        "timeout_s": limits.timeout_s,
        "memory_bytes": limits.memory_bytes,
        "output_bytes": limits.output_bytes,
        "ir_bytes": limits.ir_bytes,
        "max_equations": limits.max_equations,
    }
    with tempfile.TemporaryFile() as complaints:
      self._zygote = subprocess.Popen(
          [sys.executable, *_ZYGOTE],
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=complaints,
          bufsize=0,
          cwd=self._scratch.name,
          env=environment,
          close_fds=True,
          start_new_session=True,  # Ctrl-C is for this process alone.
      )
      deadline = time.monotonic() + _START_S
      try:
        self._send(setup)
        wire.receive(self._zygote.stdout.fileno(), len(wire.READY), deadline)
      except (wire.WireError, BrokenPipeError):
        self._stop()
        complaints.seek(0)
        lines = complaints.read().decode(errors="replace").splitlines()
        reason = _one_line(lines[-1]) if lines else "no answer"
        raise errors.UserError(
            f"the sandbox cannot start ({reason}); try python -m"
            " selfdev_jax.sandbox.zygote"
        ) from None

  def _send(self, message):
    wire.send(self._zygote.stdin.fileno(), json.dumps(message).encode())

  def _stop(self):
    if self._zygote is None:
      return
    # At the end of its input it kills what its children have left behind.
    self._zygote.stdin.close()
    try:
      self._zygote.wait(_STOP_S)
    except subprocess.TimeoutExpired:
      self._zygote.kill()  # Its children die with it: PR_SET_PDEATHSIG.
      self._zygote.wait()
    self._zygote.stdout.close()
    self._zygote = None

  def _failure(self, status):
    if status == "timeout":
      return Rejection(
          "trace",
          "timeout",
          "Tracing the program took more than"
          f" {self._limits.timeout_s:g} s; write fewer or shorter loops.",
      )
    if status == "too_big":
      return Rejection(
          "trace",
          "ir_bytes",
          "The traced program has more than"
          f" {self._limits.ir_bytes} bytes; write shorter loops or smaller"
          " constants.",
      )
    return Rejection(
        "trace",
        "crash",
        "The process that traced the program died; it may"
        " have used too much memory.",
    )


def _rejection(reply):
  """The Rejection in a child's reply, None if it holds something else.

  The child is not trusted: it may call itself rejected, but only in words.
  """
  if not reply.startswith(b'{"rejected"'):
    return None
  try:
    stage, code, message = json.loads(reply)["rejected"]
    if stage in ("filter", "trace") and code.isidentifier():
      return Rejection(stage, code[:40], _one_line(message))
  except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
    pass
  return Rejection("verify", "malformed", "The program's trace is malformed.")


def _one_line(text):
  """Untrusted text, fit to be printed and stored."""
  words = " ".join(text.split())[:_MAX_MESSAGE_CHARS]
  return "".join(c if c.isprintable() else "?" for c in words)
