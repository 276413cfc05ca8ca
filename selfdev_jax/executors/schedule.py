"""Who does which piece of work: bookkeeping alone, no clock, no network.

A stream of pieces is wanted in an order, of which a bounded beginning is known
here. Each worker has at most `depth` pieces: one that it does, and others that
wait there, so that it need not wait for the head. What it has last worked with,
a merged model say, it is given more of. A piece that it has in vain takes its
place there until it says that it has left it.
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
    # By worker its pieces in their order, and whether it has each in vain.
    self._queues: dict[str, dict[W, bool]] = {}
    self._since: dict[tuple[str, W], float] = {}
    self._last: dict[str, Hashable] = {}
    self._refused: dict[W, set[str]] = {}

  @property
  def workers(self) -> Sequence[str]:
    return list(self._queues)

  def holders(self, piece: W) -> list[str]:
    """Workers that have a piece, and not in vain."""
    return [
        name
        for name, queue in self._queues.items()
        if queue.get(piece) is False
    ]

  def is_open(self, piece: W) -> bool:
    """Whether it is wanted and not done."""
    return piece in self._wanted and piece not in self._done

  def oldest(self, worker: str) -> float | None:
    """Since when a worker has its first piece; None where it has none."""
    return min(
        (self._since[worker, piece] for piece in self._queues.get(worker, ())),
        default=None,
    )

  def join(self, worker: str):
    """A worker is there, and has nothing."""
    self._queues[worker] = {}
    self._last[worker] = None

  def leave(self, worker: str) -> list[W]:
    """A worker is gone; what it had, and not in vain, waits again."""
    queue = self._queues.pop(worker, {})
    self._last.pop(worker, None)
    for piece in queue:
      del self._since[worker, piece]
    return [piece for piece, is_vain in queue.items() if not is_vain]

  def want(self, pieces: Iterable[W]) -> list[tuple[str, W]]:
    """Sets what is wanted, the most urgent first.

    Returns:
      (worker, piece) of those that a worker has in vain from now on.
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
      (worker, piece) of copies that others have in vain from now on).
    """
    self.take_back(worker, piece)
    if piece in self._done or piece not in self._wanted:
      return False, []
    self._done.add(piece)
    return True, self._drop(lambda other: other == piece)

  def refuse(self, worker: str, piece: W):
    """A worker has given a piece back; another may do it."""
    self.take_back(worker, piece)
    self._refused.setdefault(piece, set()).add(worker)

  def forget(self, piece: W):
    """The result of a piece was lost; it waits again."""
    self._done.discard(piece)

  def take_back(self, worker: str, piece: W):
    """A worker has left a piece; if it is wanted, it waits again."""
    if self._queues.get(worker, {}).pop(piece, None) is not None:
      del self._since[worker, piece]

  def deal(self, now: float) -> list[tuple[str, W]]:
    """Gives out what waits; (worker, piece), the idle ones first.

    Args:
      now: any clock's time, in seconds.
    """
    if all(len(queue) >= self._depth for queue in self._queues.values()):
      return []
    held = {
        piece
        for queue in self._queues.values()
        for piece, is_vain in queue.items()
        if not is_vain
    }
    waiting = [
        piece
        for piece in self._wanted
        if piece not in held and piece not in self._done
    ]
    dealt, kinds = [], set(self._last.values())
    for length in range(self._depth):
      for worker, queue in self._queues.items():
        if len(queue) != length or not waiting:
          continue
        piece = self._choose(worker, waiting, kinds)
        if piece is not None:
          waiting.remove(piece)
          self._give(worker, piece, now)
          dealt.append((worker, piece))
          kinds = set(self._last.values())
    return dealt

  def steal(self, now: float) -> list[tuple[str, W, str]]:
    """Moves pieces that wait behind others to workers that have nothing.

    Returns:
      (worker that gets it, piece, worker that has it in vain from now on).
    """
    idle = self._idle()
    if not idle:
      return []
    moved = []
    behind = [
        (piece, other)
        for other, queue in self._queues.items()
        for piece in list(queue)[1:]
        if not queue[piece]
    ]
    for worker in idle:
      for piece, other in behind:
        if self._may(worker, piece):
          self._queues[other][piece] = True
          self._give(worker, piece, now)
          moved.append((worker, piece, other))
          behind.remove((piece, other))
          break
    return moved

  def duplicate(self, now: float, patience_s: float) -> list[tuple[str, W]]:
    """Gives what takes long to workers that have nothing, a second time.

    Args:
      now: as in `deal`.
      patience_s: nothing younger is given twice.
    """
    idle = self._idle()
    if not idle:
      return []
    late = [
        piece
        for (name, piece), since in sorted(
            self._since.items(), key=lambda entry: entry[1]
        )
        if now - since > patience_s and self.holders(piece) == [name]
    ]
    dealt = []
    for worker in idle:
      for piece in late:
        if self._may(worker, piece):
          self._give(worker, piece, now)
          dealt.append((worker, piece))
          late.remove(piece)
          break
    return dealt

  def _idle(self) -> list[str]:
    return [name for name, queue in self._queues.items() if not queue]

  def _choose(self, worker, waiting, kinds) -> W | None:
    """Of what the worker has, else of what nobody has, else if it is idle."""
    first = new = None
    for piece in waiting:
      if not self._may(worker, piece):
        continue
      kind = self._affinity(piece)
      if kind is None or kind == self._last[worker]:
        return piece
      if first is None:
        first = piece
      if new is None and kind not in kinds:
        new = piece
    if new is not None or self._queues[worker]:
      return new
    return first

  def _may(self, worker, piece) -> bool:
    """Whether it may be given it.

    A worker that has refused may try again where all others have it already, or
    have refused, too.
    """
    if piece in self._queues[worker]:
      return False
    refused = self._refused.get(piece)
    if not refused or worker not in refused:
      return True
    return all(
        name in refused or piece in queue
        for name, queue in self._queues.items()
    )

  def _give(self, worker, piece, now):
    self._queues[worker][piece] = False
    self._since[worker, piece] = now
    self._last[worker] = self._affinity(piece)

  def _drop(self, is_vain) -> list[tuple[str, W]]:
    vain = [
        (name, piece)
        for name, queue in self._queues.items()
        for piece, was_vain in queue.items()
        if not was_vain and is_vain(piece)
    ]
    for name, piece in vain:
      self._queues[name][piece] = True
    return vain
