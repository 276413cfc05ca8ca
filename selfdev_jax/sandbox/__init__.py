"""Takes untrusted Python and gives back data that may run.

    with Sandbox(limits, shapes, num_experts) as sandbox:
      verdict = sandbox.admit(source)
    if isinstance(verdict, Admitted):
      merge = build(verdict.program)  # A function of JAX arrays.

A program is never executed in the calling process, nor parsed there, and what
comes of it is read there only after it was verified, but for a reason in words
why there is nothing:

  zygote    warm, without secrets, weights or data; forks a child for each
            program, which enters the layers of `layers`, traces the program on
            abstract shapes, and sends program IR (see `ir`): JSON that names
            primitives;
  screener  verifies that (see `verify`), which trusts nothing in it, and runs
            it on small probes (see `fingerprint`);
  caller    gets the program as JAX itself wrote it down, and rebuilds it.

All but the caller can be lost: they are killed when they take too long, and
started again. SECURITY.md says what is covered, by which test, and what is not.
"""

import collections
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import queue
import sys
import tempfile
import threading

from selfdev_jax import cache
from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax.programs import contract
from selfdev_jax.sandbox import fingerprint
from selfdev_jax.sandbox import layers as layers_lib
from selfdev_jax.sandbox.fingerprint import first_alike
from selfdev_jax.sandbox.fingerprint import new_by_round
from selfdev_jax.sandbox.lift import kernels
from selfdev_jax.sandbox.process import environment
from selfdev_jax.sandbox.process import LostError
from selfdev_jax.sandbox.process import Process
from selfdev_jax.sandbox.process import ROOT
from selfdev_jax.sandbox.rebuild import build

__all__ = [
    "Admitted",
    "Rejection",
    "Sandbox",
    "build",
    "first_alike",
    "kernels",
    "new_by_round",
]

_ZYGOTE = ("-m", "selfdev_jax.sandbox.zygote")
_SCREENER = ("-m", "selfdev_jax.sandbox.screen")
_GRACE_S = 10.0  # For the zygote to report a timeout of its child.
_MAX_MESSAGE_CHARS = 300
_MAX_REJECTION_BYTES = 1 << 14
_MAX_LANES = 8
# A screener is replaced after so many programs: what JAX caches is bounded.
_SCREENED = 1000


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
    stats: "equations", "flops", "peak_multiple", "peak_bytes" and "constants",
      each the largest over the shapes.
    fingerprint: of what it does to fixed tensors, compared by `first_alike`;
      empty where it cannot do for a shape that stands in for a large one.
  """

  program: str
  digest: str
  stats: dict[str, float]
  fingerprint: tuple[float, ...]


class _Lane:
  """A zygote and a screener: what admits one program at a time."""

  def __init__(self, start_zygote, start_screener):
    self._start = {"zygote": start_zygote, "screener": start_screener}
    self._running: dict[str, Process] = {}
    self._screened = 0

  def trace(self, source: str, limits: config_lib.Sandbox) -> tuple[str, bytes]:
    """The zygote's status and the child's bytes."""

    def ask(zygote):
      zygote.send(json.dumps(source).encode())
      # \ufffd is three bytes, six characters in JSON.
      size = 8 * limits.output_bytes + 4096
      header = zygote.receive(size, _GRACE_S + limits.timeout_s)
      return json.loads(header)["status"], zygote.receive(
          limits.ir_bytes, _GRACE_S
      )

    try:
      return self._twice("zygote", ask)
    except LostError:
      return "crash", b""

  def screen(
      self, text: bytes, limits: config_lib.Sandbox
  ) -> Admitted | Rejection:
    """Verifies what a child sent and runs it on probes."""
    stage = "verify"

    def ask(screener):
      nonlocal stage
      stage = "verify"
      screener.send(text)
      verified = json.loads(
          screener.receive(4 * limits.ir_bytes, limits.timeout_s)
      )
      if "rejected" in verified:
        return verified
      stage = "run"
      return verified | json.loads(screener.receive(1 << 20, limits.timeout_s))

    self._screened += 1
    if self._screened > _SCREENED:
      self._stop("screener")
    try:
      answer = self._twice("screener", ask)
      if answer.get("rejected", [""] * 3)[1] in ("memory", "exception"):
        # What it did before need not be this program's fault.
        self._stop("screener")
        answer = self._twice("screener", ask)
    except LostError as error:
      return _lost(stage, error.code, limits)
    if "rejected" in answer:
      stage, code, message = answer["rejected"]
      return Rejection(stage, code, _one_line(message))
    answer["fingerprint"] = tuple(answer["fingerprint"])
    return Admitted(**answer)

  def stop(self):
    for name in list(self._running):
      self._stop(name)

  def start(self, name: str) -> Process:
    """The running process of that name."""
    if name in self._running and not self._running[name].is_alive():
      self._stop(name)
    if name not in self._running:
      self._running[name] = self._start[name]()
      if name == "screener":
        self._screened = 1
    return self._running[name]

  def _twice(self, name, ask):
    """Asks; once more where the process was lost.

    It need not be the program's fault: the machine may be busy, and the first
    to use a primitive waits until it is compiled.
    """
    try:
      return ask(self.start(name))
    except LostError:
      self._stop(name)
    try:
      return ask(self.start(name))
    except LostError:
      self._stop(name)
      raise

  def _stop(self, name):
    if name in self._running:
      self._running.pop(name).stop()


class Sandbox:
  """Admits or rejects programs, from any thread, several at a time."""

  def __init__(
      self,
      limits: config_lib.Sandbox,
      shapes: Sequence[tuple[int, ...]],
      num_experts: int,
      allow_weak: bool = False,
      lanes: int = _MAX_LANES,
  ):
    """Starts nothing yet: the first `admit` does.

    Args:
      limits: what a program may cost.
      shapes: of the tensors that programs will be applied to, one layer's.
      num_experts: number of task vectors, at least 1.
      allow_weak: go on where neither seccomp nor bubblewrap is to be had.
      lanes: programs that are looked at at once, at most; never more than there
        are cores, as each has a clock.
    """
    self._limits = limits
    shapes = list(dict.fromkeys(tuple(map(int, s)) for s in shapes))
    self._probes = fingerprint.probe_shapes(shapes)
    self._shapes = shapes
    self._stand_ins = [s for s in self._probes if s not in shapes]
    self._num_experts = num_experts
    self._allow_weak = allow_weak
    self._lock = threading.Lock()  # Around the next two.
    self._scratch: tempfile.TemporaryDirectory[str] | None = None
    self._bubblewrap: str | None = None  # Why not; empty: used.
    self._lanes = [
        _Lane(self._start_zygote, self._start_screener)
        for _ in range(min(lanes, _MAX_LANES, len(os.sched_getaffinity(0))))
    ]
    self._free: queue.LifoQueue[_Lane] = queue.LifoQueue()
    for lane in reversed(self._lanes):
      self._free.put(lane)

  def __enter__(self) -> "Sandbox":
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()

  def layers(self) -> dict[str, str]:
    """What surrounds a program: name to "", or why that layer is not there.

    Raises:
      UserError: as `admit`.
    """
    with self._lane() as lane:
      return lane.start("zygote").hello | {"bubblewrap": self._bubblewrap}

  def admit(self, source: str) -> Admitted | Rejection:
    """Traces, verifies, names and tries one program.

    Args:
      source: any text. Nothing in it makes this raise.

    Returns:
      Admitted, or the reason why not.

    Raises:
      UserError: the sandbox cannot start, or is too weak here.
    """
    if len(source) > contract.MAX_SOURCE_CHARS:
      return Rejection(
          "filter",
          "too_long",
          f"The program has {len(source)} characters; at"
          f" most {contract.MAX_SOURCE_CHARS} are taken.",
      )
    with self._lane() as lane:
      status, reply = lane.trace(source, self._limits)
      if status != "done":
        return _lost("trace", status, self._limits)
      return _rejection(reply) or lane.screen(reply, self._limits)

  def admit_all(self, sources: Iterable[str]) -> Iterator[Admitted | Rejection]:
    """`admit` for many, as many at a time as this machine has cores.

    Yields:
      The verdicts in the order of the sources.
    """
    sources = iter(sources)
    with concurrent.futures.ThreadPoolExecutor(len(self._lanes)) as pool:
      ahead = 4 * len(self._lanes)
      futures = collections.deque(
          pool.submit(self.admit, s) for s in itertools.islice(sources, ahead)
      )
      try:
        while futures:
          yield futures.popleft().result()
          futures.extend(
              pool.submit(self.admit, s) for s in itertools.islice(sources, 1)
          )
      finally:
        for future in futures:
          future.cancel()

  def close(self) -> None:
    """Ends all processes. May be called again."""
    for lane in self._lanes:
      lane.stop()
    if self._scratch is not None:
      self._scratch.cleanup()
      self._scratch = None

  @contextlib.contextmanager
  def _lane(self):
    lane = self._free.get()
    try:
      yield lane
    except BaseException:  # Ctrl-C between question and answer.
      lane.stop()
      raise
    finally:
      self._free.put(lane)

  def _start_zygote(self) -> Process:
    scratch = self._directory("zygote")
    readable = [sys.prefix, sys.base_prefix, str(ROOT / "selfdev_jax")]
    with self._lock:
      if self._bubblewrap is None:
        self._bubblewrap = layers_lib.probe_bubblewrap(scratch, readable)
    python = [sys.executable, *_ZYGOTE]
    limits = self._limits
    zygote = Process(
        [*layers_lib.bubblewrap(scratch, readable), *python]
        if not self._bubblewrap
        else [sys.executable, layers_lib.__file__, *python],
        {
            "shapes": self._shapes,
            "stand_ins": self._stand_ins,
            "num_experts": self._num_experts,
            "timeout_s": limits.timeout_s,
            "memory_bytes": limits.memory_bytes,
            "output_bytes": limits.output_bytes,
            "ir_bytes": limits.ir_bytes,
            "max_equations": limits.max_equations,
            "scratch": scratch,
            "namespaces": layers_lib.namespaces_of(),
        },
        environment(scratch),
        scratch,
    )
    if zygote.hello["seccomp"] and self._bubblewrap and not self._allow_weak:
      zygote.stop()
      raise errors.UserError(
          "generated programs would run without a kernel layer that holds"
          f" alone: seccomp ({zygote.hello['seccomp']}), bubblewrap"
          f" ({self._bubblewrap}); install libseccomp2 or bubblewrap, or give"
          " --allow_weak_sandbox: a program that breaks out of the restricted"
          " Python may then do what the other layers leave, see"
          " launch.check_program --layers"
      )
    return zygote

  def _start_screener(self) -> Process:
    compiled = cache.directory() / "screen"
    compiled.mkdir(parents=True, exist_ok=True)
    # Not the zygote's, where a program may have left something.
    scratch = self._directory("screener")
    return Process(
        [sys.executable, *_SCREENER],
        {
            "limits": dataclasses.asdict(self._limits),
            "shapes": self._shapes,
            "probes": self._probes,
            "num_experts": self._num_experts,
            "cache": str(compiled),
        },
        environment(scratch),
        scratch,
    )

  def _directory(self, name: str) -> str:
    with self._lock:
      if self._scratch is None:
        self._scratch = tempfile.TemporaryDirectory(prefix="selfdev_sandbox_")
      directory = os.path.join(self._scratch.name, name)
      os.makedirs(directory, mode=0o700, exist_ok=True)
      return directory


def _lost(stage: str, status: str, limits: config_lib.Sandbox) -> Rejection:
  """The verdict on a program whose process did not live to answer."""
  what = {"trace": "Tracing", "verify": "Checking", "run": "Running"}[stage]
  if status == "timeout":
    return Rejection(
        stage,
        "timeout",
        f"{what} the program took more than {limits.timeout_s:g} s; write"
        " fewer or shorter loops.",
    )
  if status == "too_big":
    return Rejection(
        stage,
        "ir_bytes",
        f"The traced program has more than {limits.ir_bytes} bytes; write"
        " shorter loops or smaller constants.",
    )
  return Rejection(
      stage,
      "crash",
      f"{what} the program ended its process; it may have used too much"
      " memory.",
  )


def _rejection(reply):
  """The Rejection in a child's reply, None if it holds something else.

  The child is not trusted: it may call itself rejected, but only in words.
  """
  if not reply.startswith(b'{"rejected"') or len(reply) > _MAX_REJECTION_BYTES:
    return None  # The screener will say what else it is.
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
