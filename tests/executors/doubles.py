"""Stand-ins for `remote.Doer` and `remote.Trainer` that need no models.

What they give is a pure function of what they are asked. Faults are written in
the pieces themselves (JSON in place of a program), and in `plan.json` of the
workdir, by host; an event each is appended to the workdir's `log`.
"""

from collections.abc import Hashable
import hashlib
import json
import os
import pathlib
import signal
import threading
import time

import numpy as np
import ray

from selfdev_jax.executors import versions as versions_lib
from selfdev_jax.executors import work as work_lib

CANARY = np.array([-1.0, -2.0, -3.0], np.float32)


def text(model: str, split: str, item: int) -> str:
  """What a model says to an item."""
  digest = hashlib.sha256(f"{model} {split} {item}".encode()).hexdigest()
  return f"{model} {split} {item} {digest[:4]}"


def drawn(factory: str, key: np.ndarray, weight: float) -> str:
  """What a factory writes."""
  return f"{factory} {'-'.join(map(str, key))} {weight:g}"


def verdict(source: str) -> str:
  """What comes of a source."""
  return hashlib.sha256(source.encode()).hexdigest()[:8]


class _Scripted:
  """What both have: a host, a plan, a log and faults that happen so often."""

  def __init__(self, setup: work_lib.Setup):
    self._directory = pathlib.Path(setup.workdir)
    self._host = ray.util.get_node_ip_address()

  def _planned(self, key: str, otherwise):
    """The plan's entry for this host, or for all."""
    path = self._directory / "plan.json"
    plan = json.loads(path.read_text()) if path.exists() else {}
    entry = plan.get(key, {})
    return entry.get(self._host, entry.get("all", otherwise))

  def _claim(self, name: str, times: int) -> bool:
    """Whether this is one of the first `times` that ask for a name."""
    for n in range(times):
      path = self._directory / f"claim-{name}-{n}"
      try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return True
      except FileExistsError:
        continue
    return False

  def _note(self, event: str, what: str):
    line = f"{event} {self._host} {os.getpid()} {what}\n"
    with (self._directory / "log").open("a") as log:
      log.write(line)


class Doer(_Scripted):
  """See `remote.Doer`."""

  def __init__(self, setup: work_lib.Setup):
    super().__init__(setup)
    self._stopped: set[tuple[str, Hashable]] = set()
    self._lock = threading.Lock()

  def versions(self) -> dict[str, str]:
    return versions_lib.here(None, "jax") | self._planned("versions", {})

  def open(self) -> work_lib.Reply:
    time.sleep(self._planned("open_s", 0.0))
    error = self._planned("error", "")
    if error:
      return work_lib.Reply(error=error)
    canary = CANARY + np.float32(self._planned("canary", 0.0))
    engine = self._planned("engine", "stand-in 1")
    return work_lib.Reply(work_lib.Hello(engine, {}, "none", canary))

  def do(self, piece: work_lib.Piece) -> work_lib.Reply:
    name, start = (piece.kind, piece.key), time.monotonic()
    self._note("begin", f"{piece.kind} {piece.key}")
    if self._is_stopped(name):
      reply = work_lib.Reply(is_stopped=True)
    else:
      reply = getattr(self, f"_{piece.kind}")(piece.payload, name)
    with self._lock:
      self._stopped.discard(name)
    self._note("stopped" if reply.is_stopped else "end", f"{name[0]} {name[1]}")
    later = self._planned("canary later", None)
    return work_lib.Reply(
        reply.value,
        reply.error,
        reply.is_stopped,
        time.monotonic() - start,
        None if later is None else CANARY + np.float32(later),
    )

  @ray.method(concurrency_group="control")
  def stop(self, kind: str, key: Hashable):
    with self._lock:
      self._stopped.add((kind, key))

  def close(self):
    self._note("close", "")

  def _is_stopped(self, name) -> bool:
    with self._lock:
      return name in self._stopped

  def _fault(self, script: str, name) -> work_lib.Reply | None:
    """Does what a script says; None: go on."""
    for fault in json.loads(script) if script else []:
      claimed = hashlib.sha256(f"{fault} {name}".encode()).hexdigest()[:8]
      if fault.get("host", self._host) != self._host:
        continue
      if not self._claim(claimed, fault.get("times", 1)):
        continue
      if "sleep" in fault:
        end = time.monotonic() + fault["sleep"]
        while time.monotonic() < end:
          if self._is_stopped(name) and not fault.get("is_deaf"):
            return work_lib.Reply(is_stopped=True)
          time.sleep(0.02)
      if fault.get("dies"):
        os._exit(1)
      if "error" in fault:
        return work_lib.Reply(error=fault["error"])
      if "failure" in fault:
        failed = work_lib.Answered((), fault["failure"], "", 0.0, 0.0, "x")
        return work_lib.Reply(failed)
    return None

  def _answer(self, work, name):
    fault = self._fault(work.program, name)
    if fault is not None:
      return fault
    texts = (
        text(work.model, work.split, i) for i in range(work.first, work.before)
    )
    packed = [(t, t[-4:], int(t[-1], 16) % 2 == 0, False, "") for t in texts]
    return work_lib.Reply(
        work_lib.Answered(packed, "", work.model, 0.1, 0.2, "stand-in 1")
    )

  def _sample(self, payload, name):
    work, adapter = payload
    fault = self._fault(work.prompt, name)
    if fault is not None:
      return fault
    weight = 0.0 if adapter is None else float(ray.get(adapter)["w"].sum())
    texts = [(drawn(work.factory, k, weight), True, False) for k in work.keys]
    return work_lib.Reply(("stand-in 1", texts))

  def _admit(self, sources, name):
    for source in sources:
      if source.startswith("["):
        fault = self._fault(source, name)
        if fault is not None:
          return fault
    return work_lib.Reply([verdict(source) for source in sources])


class Reader(Doer):
  """A `Doer` that reads its models as `remote.Doer` does."""

  def __init__(self, setup: work_lib.Setup):
    super().__init__(setup)
    plan = json.loads((self._directory / "plan.json").read_text())
    os.environ["SELFDEV_CACHE"] = plan["cache"]
    self._setup = setup

  def open(self) -> work_lib.Reply:
    from selfdev_jax.executors import remote  # It loads JAX.

    for path in remote._resolve(self._setup).values():
      self._note("read", str(path))
    return super().open()


class Trainer(_Scripted):
  """See `remote.Trainer`; `label` is its script, every second step is kept."""

  def __init__(self, setup: work_lib.Setup):
    super().__init__(setup)
    self._steps: list[tuple[int, dict[str, float]]] = []

  def address(self) -> str:
    """Names the process in place of a port, for the others to look at."""
    return f"{self._host}:{os.getpid()}"

  def train(self, training, coordinator, count, index) -> work_lib.Reply:
    first_process = int(coordinator.rpartition(":")[2])
    script = json.loads(training.label)
    kept = pathlib.Path(training.workdir) / "kept"
    if "error" in script:
      return work_lib.Reply(error=script["error"])
    first = int(kept.read_text()) + 1 if kept.exists() else 1
    if "raises" in script:
      raise RuntimeError(script["raises"])
    frozen = pathlib.Path(training.workdir) / "frozen"
    self._note("train", f"{index}/{count} from {first}")
    for step in range(first, script["steps"] + 1):
      time.sleep(0.1)
      if step == script.get("freezes at") and self._claim(f"freeze{index}", 1):
        if index:
          frozen.write_text(str(os.getpid()))
          os.kill(os.getpid(), signal.SIGSTOP)
        while not frozen.exists():
          time.sleep(0.02)
        raise RuntimeError("the other process does not answer")
      if index and _is_gone(first_process):
        raise RuntimeError("the other process does not answer")
      self._steps.append((step, {"loss": 1 / step}))
      is_last = step == script.get("dies at") and not index
      if is_last and self._claim("training", 1):
        # Told, and not kept.
        time.sleep(script["waits"])
        os._exit(1)
      if step % 2 == 0 and not index:
        kept.write_text(str(step))
    history = [{"loss": 1 / s} for s in range(1, script["steps"] + 1)]
    return work_lib.Reply(({"w": np.ones(2)}, history) if index == 0 else None)

  @ray.method(concurrency_group="control")
  def steps(self, done: int) -> list[tuple[int, dict[str, float]]]:
    return self._steps[done:]


def _is_gone(pid: int) -> bool:
  """Whether a process has died, whoever waits for it."""
  try:
    status = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return True
  return status.rpartition(")")[2].split()[0] in "ZX"
