"""Calls that may hang, where waiting for them must not."""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import concurrent.futures
import threading
from typing import Any


def submit(
    calls: Sequence[Callable[[], Any]], threads: int = 1
) -> list[concurrent.futures.Future]:
  """Makes the calls in daemon threads, in order; a future each.

  The threads of an executor would keep the process from ending while a server
  does not answer.
  """
  futures = [concurrent.futures.Future() for _ in calls]
  todo = collections.deque(zip(futures, calls, strict=True))

  def work():
    while todo:
      try:
        future, call = todo.popleft()
      except IndexError:  # Another thread was faster.
        return
      if not future.set_running_or_notify_cancel():
        continue
      try:
        future.set_result(call())
      except BaseException as error:
        future.set_exception(error)

  for _ in range(min(threads, len(calls))):
    threading.Thread(target=work, daemon=True).start()
  return futures
