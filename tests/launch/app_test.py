"""Launch scripts end in one helpful line, whatever the user gave them."""

import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]

_RAISES = """
import errno
from launch import app
from selfdev_jax import errors

def main(_):
  raise {error}

app.run(main)
"""


def _run(*command):
  return subprocess.run(
      [sys.executable, *command],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
  )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("errors.UserError('no such thing')", 2, "error: no such thing"),
        (
            "KeyboardInterrupt()",
            130,
            "interrupted; nothing is lost, run the same command again",
        ),
        (
            "OSError(errno.ENOSPC, 'No space left on device')",
            2,
            "error: the disk is full ([Errno 28] No space left on device); make"
            " room, the same command resumes",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, line):
  done = _run("-c", _RAISES.format(error=error))
  assert done.returncode == status
  assert done.stderr.strip() == line
  assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback():
  done = _run("-c", _RAISES.format(error="ValueError('a bug')"))
  assert done.returncode == 1
  assert "Traceback" in done.stderr and "a bug" in done.stderr


@pytest.mark.slow  # Each starts a process that imports everything.
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--config", "must have a value"]),
        (
            ["--config=configs/smoke.py", "--config.dpo.bta=1"],
            ["error: unknown config key 'dpo.bta'; did you mean 'dpo.beta'?"],
        ),
        (
            ["--config", "configs/smoke.py", "--config.dop.beta=1"],
            ["error: unknown config key 'dop.beta'; did you mean 'dpo.beta'?"],
        ),
        (
            ["--config=configs/smoke.py", "--config.dpo.beta=x"],
            ["config.dpo.beta", "float"],
        ),
        (
            ["--config=configs/smoke.py", "--config.dpo.beta=-1"],
            ["'dpo.beta' is -1.0", "at least 0.0"],
        ),
        (["--config=configs/none.py"], ["configs/none.py"]),
        (
            [
                "--config=configs/smoke.py",
                "--config.seed_model=/nowhere",
                "--config.experts=('/a', '/b')",
            ],
            ["model directory /nowhere does not exist"],
        ),
    ],
)
def test_self_develop_names_what_is_wrong(flags, words, tmp_path):
  done = _run("-m", "launch.self_develop", f"--workdir={tmp_path}", *flags)
  assert done.returncode not in (0, None)
  for word in words:
    assert word in done.stderr, done.stderr
