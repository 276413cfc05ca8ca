"""The sections of the first page, drawn once for each state of the archive.

Figures of a long run take seconds. They are drawn in the background, all of
one moment, and shown until newer ones are there; the page says of when they
are.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import threading
import time

import markupsafe

from selfdev_jax import store as store_lib

_STATE_FILES = (store_lib.ARCHIVE, f"{store_lib.ARCHIVE}-wal")
# A run that goes on changes all the time. Drawing leaves it this many times
# what it took for itself.
_REST = 5.0


@dataclasses.dataclass(frozen=True)
class Overview:
  """What the first page shows.

  Attributes:
    name: of the run's config.
    parts: name to HTML; empty where there is nothing to show yet.
    versions: name to what tells one state of a part from another.
    at: Unix time of the snapshot.
  """

  name: str
  parts: Mapping[str, markupsafe.Markup]
  at: float

  @property
  def versions(self) -> dict[str, str]:
    return {name: version(html) for name, html in self.parts.items()}


def version(html: str) -> str:
  return hashlib.sha256(html.encode()).hexdigest()[:16]


class Archive:
  """Snapshots of a run's archive.

  Args:
    workdir: the run's directory.
  """

  def __init__(self, workdir: str | os.PathLike):
    self.workdir = pathlib.Path(workdir)
    self._lock = threading.Lock()
    self._copy = None
    self._copy_state = ()

  def state(self) -> tuple[object, ...]:
    """Something that changes when the archive does, or who works on it."""
    found = []
    for name in _STATE_FILES:
      try:
        stat = (self.workdir / name).stat()
      except OSError:
        continue
      if stat.st_size:
        found += [name, stat.st_ino, stat.st_size, stat.st_mtime_ns]
    return (*found, store_lib.is_running(self.workdir))

  @contextlib.contextmanager
  def read(self) -> Iterator[store_lib.Store]:
    """One moment of the archive.

    Raises:
      store_lib.StoreError: see `Store.read`.
    """
    state = self.state()
    with self._lock:
      if self._copy is not None and self._copy_state == state:
        yield self._copy
        return
    store = store_lib.Store.read(self.workdir)
    if not self._is_copy(store):
      with store:
        yield store
      return
    # What `Store.read` had to copy, such as an archive of an earlier version,
    # is not copied for every answer.
    with self._lock:
      self._close_copy()
      self._copy, self._copy_state = store, state
      yield store

  def _is_copy(self, store):
    opened = store.rows("PRAGMA database_list")[0][2]
    return not os.path.samefile(opened, self.workdir / store_lib.ARCHIVE)

  def _close_copy(self):
    if self._copy is not None:
      self._copy.close()
      self._copy = None

  def close(self):
    with self._lock:
      self._close_copy()


class Kept:
  """The newest overview, and who draws the next one.

  Args:
    archive: that is shown.
    draw: makes an overview of a snapshot.
  """

  def __init__(
      self,
      archive: Archive,
      draw: Callable[[store_lib.Store], Overview],
  ):
    self._archive, self._draw = archive, draw
    self._lock = threading.Lock()
    self._drawn: Overview | None = None
    self._state: tuple[object, ...] = ()
    self._drawing: concurrent.futures.Future | None = None
    self._due = 0.0

  def latest(self, wait_s: float) -> Overview:
    """The newest overview; the first time, as long as that takes.

    Args:
      wait_s: how long to wait for one of the present state.

    Raises:
      store_lib.StoreError: if the archive cannot be read any more.
    """
    state = self._archive.state()
    with self._lock:
      drawn = self._drawn
      is_new = drawn is not None and state == self._state
      if self._drawing is None and not is_new:
        if drawn is not None and time.monotonic() < self._due:
          return drawn
        self._drawing = concurrent.futures.Future()
        # The end of the server does not wait for a daemon.
        threading.Thread(
            target=self._update, args=(state, self._drawing), daemon=True
        ).start()
      drawing = self._drawing
    if is_new:
      return drawn
    try:
      return drawing.result(None if drawn is None else wait_s)
    except concurrent.futures.TimeoutError:
      return drawn

  def _update(self, state, drawing):
    start = time.monotonic()
    try:
      with self._archive.read() as store:
        drawn = self._draw(store)
    except Exception as error:
      # Whoever asks next waits, and is told.
      self._end(None, (), start)
      drawing.set_exception(error)
    else:
      self._end(drawn, state, start)
      drawing.set_result(drawn)

  def _end(self, drawn, state, start):
    end = time.monotonic()
    with self._lock:
      self._drawn, self._state = drawn, state
      self._due = end + _REST * (end - start)
      self._drawing = None
