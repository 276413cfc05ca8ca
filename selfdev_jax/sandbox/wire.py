"""Length-prefixed messages over a pipe, with a deadline."""

import os
import select
import struct
import time

_HEADER = struct.Struct(">I")


class WireError(OSError):
  """The other side is gone, too slow, or sends more than it may."""


class WireTimeoutError(WireError):
  """The other side is too slow."""


def send(fd: int, message: bytes) -> None:
  """Writes one message; blocks until the other side has taken it."""
  data = memoryview(_HEADER.pack(len(message)) + message)
  while data:
    data = data[os.write(fd, data) :]


def receive(fd: int, max_bytes: int, deadline: float | None = None) -> bytes:
  """Reads one message.

  Args:
    fd: the reading end.
    max_bytes: a longer message is refused unread.
    deadline: on `time.monotonic`'s clock; None waits for ever.

  Returns:
    The message.

  Raises:
    WireError: end of file, past the deadline, or too long.
  """
  (length,) = _HEADER.unpack(_read(fd, _HEADER.size, deadline))
  if length > max_bytes:
    raise WireError("message too long")
  return _read(fd, length, deadline)


def _read(fd, length, deadline):
  poll = select.poll()  # Not select(): a descriptor may be above 1023.
  poll.register(fd, select.POLLIN)
  parts = []
  while length:
    wait_ms = None
    if deadline is not None:
      wait_ms = max(0, 1000 * (deadline - time.monotonic()))
    if not poll.poll(wait_ms):
      raise WireTimeoutError("timed out")
    part = os.read(fd, min(length, 1 << 20))
    if not part:
      raise WireError("closed")
    parts.append(part)
    length -= len(part)
  return b"".join(parts)
