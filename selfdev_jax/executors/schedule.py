"""Who does which piece of work: bookkeeping alone, no clock, no network.

A stream of pieces is wanted in an order, of which a bounded beginning is known
here. Each worker has at most `depth` pieces: one that it does, and others that
wait there, so that it need not wait for the head. What it has last worked with,
a merged model say, it is given more of.
"""

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Generic
from typing import TypeVar

W = TypeVar("W", bound=Hashable)


class Schedule(Generic[W]):
  """What is wanted, what is done, and who has what."""

  def __init__(self, affinity: Callable[[W], Hashable], depth: int):
    """Nobody is there yet.

    Args:
      affinity: of a piece; equal ones go to one worker, as far as others have
        something else to do. None: any worker is as good.
      depth: pieces that a worker has at most.
    """
    self._affinity = affinity
    self._depth = depth
    self._wanted: dict[W, None] = {}
    self._done: set[W] = set()
    self._queues: dict[str, list[W]] = {}
    self._since: dict[tuple[str, W], float] = {}
    self._last: dict[str, Hashable] = {}
    self._refused: dict[W, set[str]] = {}

  @property
  def workers(self) -> Sequence[str]:
    return list(self._queues)

  def holders(self, piece: W) -> list[str]:
    """Workers that have a piece."""
    return [name for name, queue in self._queues.items() if piece in queue]

  def join(self, worker: str):
    """A worker is there, and has nothing."""
    self._queues[worker] = []
    self._last[worker] = None

  def leave(self, worker: str) -> list[W]:
    """A worker is gone; its pieces wait again, and are returned."""
    lost = self._queues.pop(worker, [])
    self._last.pop(worker, None)
    for piece in lost:
      del self._since[worker, piece]
    return lost

  def want(self, pieces: Iterable[W]) -> list[tuple[str, W]]:
    """Sets what is wanted, the most urgent first.

    Returns:
      (worker, piece) of those that a worker has in vain.
    """
    self._wanted = dict.fromkeys(pieces)
    self._done &= self._wanted.keys()
    self._refused = {
        piece: names
        for piece, names in self._refused.items()
        if piece in self._wanted
    }
    return self._drop(lambda piece: piece not in self._wanted)

  def finish(self, worker: str, piece: W) -> tuple[bool, list[tuple[str, W]]]:
    """A worker has done a piece.

    Returns:
      (whether its result counts: it is wanted, and the first,
      (worker, piece) of copies that others have in vain now).
    """
    self._take(worker, piece)
    if piece in self._done or piece not in self._wanted:
      return False, []
    self._done.add(piece)
    return True, self._drop(lambda other: other == piece)

  def refuse(self, worker: str, piece: W):
    """A worker has given a piece back; another may do it."""
    self._take(worker, piece)
    self._refused.setdefault(piece, set()).add(worker)

  def forget(self, piece: W):
    """The result of a piece was lost; it waits again."""
    self._done.discard(piece)

  def take_back(self, worker: str, piece: W):
    """A worker has left a piece undone; it waits again."""
    self._take(worker, piece)

  def deal(self, now: float) -> list[tuple[str, W]]:
    """Gives out what waits; (worker, piece), the idle ones first.

    Args:
      now: any clock's time, in seconds.
    """
    dealt, held = [], {p for queue in self._queues.values() for p in queue}
    waiting = [p for p in self._wanted if p not in held | self._done]
    for length in range(self._depth):
      for worker, queue in self._queues.items():
        if len(queue) != length or not waiting:
          continue
        piece = self._choose(worker, waiting)
        if piece is not None:
          waiting.remove(piece)
          self._give(worker, piece, now)
          dealt.append((worker, piece))
    return dealt

  def steal(self, now: float) -> list[tuple[str, W, str]]:
    """Moves pieces that wait behind others to workers that have nothing.

    Returns:
      (worker that gets it, piece, worker that had it).
    """
    moved = []
    for worker, queue in self._queues.items():
      if queue:
        continue
      for other, others in self._queues.items():
        piece = others[-1] if len(others) > 1 else None
        if piece is None or not self._may(worker, piece):
          continue
        self._take(other, piece)
        self._give(worker, piece, now)
        moved.append((worker, piece, other))
        break
    return moved

  def duplicate(self, now: float, patience_s: float) -> list[tuple[str, W]]:
    """Gives what takes long to workers that have nothing, a second time.

    Args:
      now: as in `deal`.
      patience_s: nothing younger is given twice.
    """
    dealt = []
    idle = [name for name, queue in self._queues.items() if not queue]
    if not idle:
      return []
    late = [
        piece
        for (_, piece), since in sorted(
            self._since.items(), key=lambda entry: entry[1]
        )
        if now - since > patience_s and len(self.holders(piece)) == 1
    ]
    for worker in idle:
      for piece in late:
        if self._may(worker, piece):
          self._give(worker, piece, now)
          dealt.append((worker, piece))
          late.remove(piece)
          break
    return dealt

  def _choose(self, worker, waiting) -> W | None:
    """Of what the worker has, else of what nobody has, else if it is idle."""
    free = [p for p in waiting if self._may(worker, p)]
    mine = self._last[worker]
    others = {x for name, x in self._last.items() if name != worker}
    first = None
    for piece in free:
      kind = self._affinity(piece)
      if kind is None or kind == mine:
        return piece
      if first is None and kind not in others:
        first = piece
    if first is not None or self._queues[worker]:
      return first
    return free[0] if free else None

  def _may(self, worker, piece) -> bool:
    """Whether it has not refused; where all have, any may try again."""
    refused = self._refused.get(piece, set())
    return worker not in refused or refused >= self._queues.keys()

  def _give(self, worker, piece, now):
    self._queues[worker].append(piece)
    self._since[worker, piece] = now
    self._last[worker] = self._affinity(piece)

  def _take(self, worker, piece):
    if piece in self._queues.get(worker, ()):
      self._queues[worker].remove(piece)
      del self._since[worker, piece]

  def _drop(self, is_vain) -> list[tuple[str, W]]:
    vain = [
        (name, piece)
        for name, queue in self._queues.items()
        for piece in queue
        if is_vain(piece)
    ]
    for name, piece in vain:
      self._take(name, piece)
    return vain
