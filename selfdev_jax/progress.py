"""What a user sees meanwhile: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
import contextlib
import sys
import time

import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class _Lines:
  """`update(n)` like tqdm's, printing a line now and then."""

  def __init__(self, what: str, total: int, unit: str, done: int):
    self._what, self._total, self._unit = what, total, unit
    self._before, self._done, self._start = done, done, time.monotonic()
    self._last = self._start

  def update(self, n: int = 1):
    self._done += n
    now = time.monotonic()
    if now - self._last >= _SECONDS_BETWEEN_LINES and self._done < self._total:
      self._last = now
      rate = (self._done - self._before) / (now - self._start)
      left = (self._total - self._done) / rate
      self._print(f"{rate:.2f} {self._unit}/s, {left:.0f} s left")

  def close(self):
    seconds = time.monotonic() - self._start
    rate = (self._done - self._before) / max(seconds, 1e-9)
    self._print(f"{rate:.2f} {self._unit}/s, {seconds:.0f} s")

  def _print(self, tail: str):
    print(
        f"{self._what}: {self._done}/{self._total}, {tail}",
        file=sys.stderr,
        flush=True,
    )


def note(text: str):
  """Says something that the user should know, where progress is shown."""
  print(f"Note: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(what: str, total: int, unit: str = "step", done: int = 0) -> Iterator:
  """Yields something with `update(n)`; shows a rate and the time left.

  Args:
    what: is being done.
    total: how many there are.
    unit: of what.
    done: how many were so before.
  """
  if sys.stderr.isatty():
    with tqdm.tqdm(total=total, desc=what, unit=unit, initial=done) as shown:
      yield shown
    return
  lines = _Lines(what, total, unit, done)
  try:
    yield lines
  finally:
    lines.close()


class Waiting:
  """Says every few seconds that something is still waited for."""

  def __init__(self, what: str):
    self._what = what
    self._start = self._last = time.monotonic()

  @property
  def seconds(self) -> float:
    """Since it began."""
    return time.monotonic() - self._start

  def tell(self, detail: str):
    """A line, if the last one is old enough."""
    if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
      self._last = time.monotonic()
      print(
          f"{self._what}: {self.seconds:.0f} s, {detail}",
          file=sys.stderr,
          flush=True,
      )
