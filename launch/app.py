"""How every launch script ends: in a result, or in one line that helps."""

import errno
import os
import sqlite3
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app as absl_app
from absl import logging

# The models come from directories; nothing is looked up on a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# transformers says that it found no PyTorch; none is needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from selfdev_jax import errors  # noqa: E402

_DISK_FULL = "database or disk is full"


def run(main: Callable[[Sequence[str]], Any]) -> NoReturn:
  """Like absl's `app.run`, with one line for what a user can mend.

  Exit status: 0; 1 for a bug, with its traceback; 2 for a UserError or a full
  disk; 130 for Ctrl-C.
  """

  def guarded(argv):
    if len(argv) > 1:
      _fail(f"unexpected argument {argv[1]!r}; flags start with --")
    try:
      return main(argv)
    except errors.UserError as error:
      _fail(str(error))
    except KeyboardInterrupt:
      print("\ninterrupted; the same command resumes", file=sys.stderr)
      sys.exit(130)
    except (OSError, sqlite3.OperationalError) as error:
      is_full = getattr(error, "errno", None) == errno.ENOSPC
      if is_full or _DISK_FULL in str(error):
        _fail(f"the disk is full ({error}); make room, the same command resumes")
      raise

  logging.set_verbosity(logging.WARNING)
  absl_app.run(guarded)


def _fail(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)
