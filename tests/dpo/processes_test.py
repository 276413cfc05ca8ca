"""How processes meet; tests/launch/train_dpo_test.py trains in two that did."""

import os
import socket
import subprocess
import sys

import pytest

from selfdev_jax import errors
from selfdev_jax.dpo import processes

_SCHEDULERS = ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JAX_COORDINATOR")


@pytest.fixture
def alone(monkeypatch):
  """Without the variables of a scheduler."""
  for name in list(os.environ):
    if name.startswith(_SCHEDULERS):
      monkeypatch.delenv(name)
  return monkeypatch


def test_nobody_to_meet():
  processes.join(None, None, None)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("h:1", None, None), "--process go together"),
        (("h:1", 2, None), "--process go together"),
        ((None, 2, 0), "--process go together"),
        (("h:1", 2, 2), "--process=2 has to be below --processes=2"),
        (("here", 2, 1), "--coordinator=here is not like HOST:PORT, nor auto"),
        ((":1", 2, 1), "--coordinator=:1 is not like HOST:PORT"),
        (("auto", 2, None), "auto takes no --processes and no --process"),
        (("auto", None, 0), "auto takes no --processes and no --process"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, line):
  with pytest.raises(errors.UserError, match=line) as error:
    processes.join(*arguments)
  assert "\n" not in str(error.value)


# In a process of its own: JAX has devices here.
_JOIN = """
import sys
import jax
from selfdev_jax import errors
from selfdev_jax.dpo import processes
number = lambda text: None if text == "None" else int(text)
try:
  processes.join(sys.argv[1], *map(number, sys.argv[2:4]), timeout_s=3)
  print(jax.process_count(), "process")
except errors.UserError as error:
  print(f"error: {error}")
"""


def _joined(*arguments, **environment):
  found = subprocess.run(
      [sys.executable, "-c", _JOIN, *map(str, arguments)],
      env=dict(os.environ, **environment),
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
  )
  assert found.returncode == 0, found.stderr
  (line,) = found.stdout.splitlines()
  return line


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {},
        # Of sbatch without srun.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"},
        {"KUBERNETES_SERVICE_HOST": "127.0.0.1"},
        {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"},
    ],
    ids=lambda environment: next(iter(environment), "none"),
)
def test_no_scheduler(alone, environment):
  line = _joined("auto", None, None, **environment)
  assert line.startswith("error: --coordinator=auto found no scheduler that")
  for name in ("SLURM_PROCID", "TPU_WORKER_HOSTNAMES", "--processes"):
    assert name in line


def _slurm(process, processes_=2, **changes):
  return {
      "SLURM_JOB_ID": "7",
      "SLURM_STEP_NODELIST": "127.0.0.1",
      "SLURM_NTASKS": str(processes_),
      "SLURM_PROCID": str(process),
      "SLURM_LOCALID": str(process),
  } | changes


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"SLURM_PROCID": "two"}, {"SLURM_PROCID": "2"}]
)
def test_a_scheduler_that_makes_no_sense(alone, changes):
  line = _joined("auto", None, None, **_slurm(0, **changes))
  assert line.startswith("error: --coordinator=auto found no scheduler that")
  assert "'two'" in line or "process_id=2" in line


def _free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


@pytest.mark.slow
def test_nobody_answers(alone):
  address = f"127.0.0.1:{_free_port()}"
  line = _joined(address, 2, 1)
  assert line.startswith(f"error: --coordinator={address}: nobody answered for")


@pytest.mark.slow
def test_no_such_host(alone):
  line = _joined("nowhere.invalid:1", 2, 1)
  assert "--coordinator=nowhere.invalid:1: nobody answered for 3 s" in line


@pytest.mark.slow
def test_process_0_does_not_wait_for_itself(alone):
  assert _joined(f"127.0.0.1:{_free_port()}", 1, 0) == "1 process"


@pytest.mark.slow
def test_slurm(alone):
  """A step of one process."""
  environment = _slurm(0, 1, JAX_COORDINATOR_PORT=str(_free_port()))
  assert _joined("auto", None, None, **environment) == "1 process"
