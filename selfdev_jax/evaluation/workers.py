"""Worker processes that mark MATH, and may be lost over it.

    pool = Pool()
    marks = pool.marks([("math_verify", generation, gold), ...])

sympy may take for ever over what a model writes, or all memory: a comparison
that takes too long costs its worker, which is replaced, and is marked as a
time-out. The libraries' own limits are alarms, which want the main thread of a
process; that they have in a worker (see `worker.py`).
"""

import collections
from collections.abc import Sequence
from concurrent import futures
import json
from multiprocessing import connection
import os
import pathlib
import sys
import threading
import time
import weakref

from selfdev_jax.evaluation.task import ERROR
from selfdev_jax.evaluation.task import Mark
from selfdev_jax.evaluation.task import TIMEOUT
from selfdev_jax.sandbox import process

_SCRIPT = pathlib.Path(__file__).with_name("worker.py")
_MAX_WORKERS = 8
_LIMIT_S = 30.0  # The libraries' own come to 15 s for one comparison.
_MEMORY_BYTES = 2 << 30  # A worker's, beyond what it starts with.
_MAX_REQUEST_BYTES = 1 << 28
_MAX_ANSWER_BYTES = 1 << 16


class _Worker(process.Process):
  """A process, and the request that it is at.

  Attributes:
    request: its number.
    deadline: when its answer has to be there, on `time.monotonic`'s clock.
  """

  def __init__(self, script: pathlib.Path, limit_s: float):
    super().__init__(
        [sys.executable, str(script)],
        {
            "memory_bytes": _MEMORY_BYTES,
            "message_bytes": _MAX_REQUEST_BYTES,
            "cpu_s": int(limit_s) + 5,
        },
        # Sets of strings come in the same order in every worker.
        process.environment("/", PYTHONHASHSEED="0"),
        "/",
    )
    self._limit_s = limit_s
    self.request = -1
    self.deadline = 0.0

  def fileno(self) -> int:
    """Readable when an answer is there, or the process is gone."""
    return self._process.stdout.fileno()

  def ask(self, number: int, message: bytes) -> None:
    """Raises LostError where the process is gone."""
    self.request, self.deadline = number, time.monotonic() + self._limit_s
    self.send(message)

  def answer(self) -> Mark:
    """Waits until the deadline; raises LostError if there is none by then."""
    left_s = max(0.0, self.deadline - time.monotonic())
    return Mark(*json.loads(self.receive(_MAX_ANSWER_BYTES, left_s)))


class Pool:
  """Workers, as many as this machine has cores; they live as long as the pool.

  They are started when there is something to mark, and end with `close`, when
  nobody holds the pool any more, or with this process, however that ends.
  """

  def __init__(
      self,
      size: int | None = None,
      limit_s: float = _LIMIT_S,
      script: pathlib.Path = _SCRIPT,
  ):
    """Starts nothing yet.

    Args:
      size: number of workers; None: of cores, at most 8.
      limit_s: wall-clock seconds for one mark.
      script: what a worker runs.
    """
    cores = len(os.sched_getaffinity(0))
    self._size = size or min(_MAX_WORKERS, cores)
    self._limit_s = limit_s
    self._script = script
    self._lock = threading.Lock()  # One caller at a time.
    self._workers: list[_Worker] = []
    self._finalizer = weakref.finalize(self, _stop, self._workers)

  def marks(self, requests: Sequence[tuple[str, str, str]]) -> list[Mark]:
    """What the metrics say.

    Args:
      requests: (metric, generation, gold) each.

    Returns:
      A mark for each, in their order. One that took too long, or cost its
      worker's life, has `trouble` and is marked wrong.

    Raises:
      UserError: the workers cannot start.
    """
    with self._lock:
      try:
        return self._marks(requests)
      except BaseException:  # Ctrl-C: the answers to come are nobody's.
        _stop(self._workers)
        raise

  def close(self) -> None:
    """Ends the workers. The next `marks` starts new ones."""
    with self._lock:
      _stop(self._workers)

  def _marks(self, requests):
    marks: list[Mark | None] = [None] * len(requests)
    waiting = collections.deque(range(len(requests)))
    idle, busy = self._living(len(requests)), []
    while waiting or busy:
      while waiting and idle:
        worker, number = idle.pop(), waiting.popleft()
        message = json.dumps(requests[number]).encode()
        if len(message) > _MAX_REQUEST_BYTES:
          marks[number] = Mark(None, False, ERROR)
          idle.append(worker)
          continue
        try:
          worker.ask(number, message)
          busy.append(worker)
        except process.LostError:
          marks[number] = Mark(None, False, ERROR)
          idle.append(self._instead_of(worker))
      for worker in self._done(busy):
        busy.remove(worker)
        try:
          marks[worker.request] = worker.answer()
          idle.append(worker)
        except (process.LostError, ValueError, TypeError) as lost:
          # Or what it sent is no answer.
          is_late = getattr(lost, "code", "") == "timeout"
          trouble = TIMEOUT if is_late else ERROR
          marks[worker.request] = Mark(None, False, trouble)
          idle.append(self._instead_of(worker))
    return marks

  def _done(self, busy):
    """Those with an answer, or dead, or late; waits for the first of them."""
    if not busy:
      return []
    first = min(worker.deadline for worker in busy)
    done = connection.wait(busy, max(0.0, first - time.monotonic()))
    # Late is who has not answered, not whose answer lay here meanwhile.
    late = [w for w in busy if w.deadline <= time.monotonic() and w not in done]
    return done + late

  def _living(self, wanted):
    """The workers, with new ones started where there are less than wanted."""
    for worker in [w for w in self._workers if not w.is_alive()]:
      self._drop(worker)
    missing = min(self._size, wanted) - len(self._workers)
    if missing > 0:
      with futures.ThreadPoolExecutor(missing) as side_by_side:
        started = [side_by_side.submit(self._start) for _ in range(missing)]
      for start in started:
        start.result()
    return list(self._workers)

  def _start(self):
    worker = _Worker(self._script, self._limit_s)
    # At once, so that it is ended if another one does not start.
    self._workers.append(worker)
    return worker

  def _drop(self, worker):
    worker.stop(0.0)
    self._workers.remove(worker)

  def _instead_of(self, worker):
    self._drop(worker)
    return self._start()


def _stop(workers: list[_Worker]) -> None:
  while workers:
    # They hold nothing that they would have to put away.
    workers.pop().stop(0.0)
