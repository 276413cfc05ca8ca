"""How every launch script ends: in a result, or in one line that helps."""

from collections.abc import Callable
from collections.abc import Sequence
import difflib
import errno
import os
import re
import runpy
import sys
from typing import Any
from typing import NoReturn

from absl import app as absl_app
from absl import flags
from absl import logging

# transformers says that it found no PyTorch; none is needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from selfdev_jax import cache
from selfdev_jax import config as config_lib
from selfdev_jax import errors

_INTERRUPTED = "interrupted; nothing is lost, run the same command again"


def run(
    main: Callable[[Sequence[str]], Any], takes_files: bool = False
) -> NoReturn:
  """Like absl's `app.run`, with one line for what a user can mend.

  Args:
    main: gets the command line, flags left out.
    takes_files: whether arguments without dashes are among it.

  Exit status: 0; 1 for a bug, with its traceback; 2 for a UserError or a full
  disk; 130 for Ctrl-C.
  """

  def guarded(argv):
    if len(argv) > 1 and not takes_files:
      _fail(f"unexpected argument {argv[1]!r}; flags start with --")
    try:
      return main(argv)
    except errors.UserError as error:
      _fail(str(error))
    except KeyboardInterrupt:
      print(f"\n{_INTERRUPTED}", file=sys.stderr)
      # XLA's threads may still compute: Python's own end has crashed on them.
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(130)
    except OSError as error:
      if error.errno == errno.ENOSPC:
        _fail(
            f"the disk is full ({error}); make room, the same command resumes"
        )
      raise

  logging.set_verbosity(logging.WARNING)
  absl_app.run(guarded, flags_parser=_parse)


def keep_compiled():
  """Keeps what XLA compiles for the next process, up to 256 MB of it."""
  import jax  # Here, as it takes seconds, and not every script needs it.

  jax.config.update("jax_compilation_cache_dir", str(cache.directory() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_compilation_cache_max_size", 1 << 28)


def load_config(holder: flags.FlagHolder, cls: type = config_lib.Config) -> Any:
  """The config behind a `DEFINE_config_file` flag, checked; a `cls`.

  Raises:
    UserError: if the file cannot be loaded, or for what the config holds.
  """
  try:
    return config_lib.from_config_dict(holder.value, cls)
  except OSError as error:  # What ml_collections raises at the first look.
    reason = " ".join(str(error.__cause__ or error).split())
    raise errors.UserError(f"--{holder.name}: {reason}") from None


def _parse(argv: Sequence[str]) -> list[str]:
  """Absl's parser, with one line for an override of a key that is not there.

  ml_collections raises an AttributeError or KeyError for it.
  """
  try:
    return absl_app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError):
    # `--config FILE` as well as `--config=FILE`.
    spelled = re.sub(r"(--?\w+) (?!-)", r"\1=", " ".join(argv[1:])).split(" ")
    given = [a.lstrip("-").partition("=")[::2] for a in spelled]
    files = {name: value for name, value in given if name in flags.FLAGS}
    for flag, _ in given:
      name, _, key = flag.partition(".")
      if key and name in files:
        tree = runpy.run_path(files[name])["get_config"]()
        known = config_lib.flatten(tree.to_dict())
        if key not in known:
          (near,) = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
          _fail(f"unknown config key '{key}'; did you mean '{near}'?")
    raise
  except OSError as error:  # A config file that is not there, with overrides.
    _fail(" ".join(str(error.__cause__ or error).split()))


def _fail(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)
