"""The processes of one training meet, told how or as their scheduler says."""

import socket
import time
import warnings

import jax

from selfdev_jax import errors
from selfdev_jax import progress

AUTO = "auto"
_TIMEOUT_S = 300
_AGAIN_S = 0.2


def join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    timeout_s: int = _TIMEOUT_S,
):
  """Meets the other processes, where there are any; before JAX has a device.

  With `auto` JAX asks the scheduler that started the process: SLURM (all of
  SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_PROCID and
  SLURM_LOCALID, as srun sets them), Open MPI, a Cloud TPU slice, GKE
  (TPU_WORKER_HOSTNAMES and TPU_WORKER_ID) or Kubernetes (an indexed Job, and
  the package kubernetes). Process 0 then listens on every address of its host,
  and nothing asks who connects: a network that others reach needs a firewall,
  or JAX_COORDINATOR_BIND_ADDRESS=HOST:PORT on process 0. Under SLURM and Open
  MPI a process takes the GPU of its local number alone: start one process a
  GPU, or name the GPUs in JAX_LOCAL_DEVICE_IDS.

  Args:
    coordinator: `HOST:PORT`, where process 0 listens, and nowhere else; `auto`;
      None, as the other two: this process is the only one.
    processes: how many there are; None with `auto`.
    process: which of them this is, from 0; None with `auto`.
    timeout_s: how long to wait for the others. JAX aborts the process after it
      where it waits itself: in process 0, and with `auto`.

  Raises:
    UserError: in one line, for arguments that do not go together, a scheduler
      that is not found, or a process 0 that nobody reaches.
  """
  numbers = (processes, process)
  if coordinator is None and numbers == (None, None):
    return
  if coordinator == AUTO:
    if numbers != (None, None):
      raise errors.UserError(
          "--coordinator=auto takes no --processes and no --process: the"
          " scheduler knows both"
      )
    _join_as_scheduled(timeout_s)
    return
  if coordinator is None or None in numbers:
    raise errors.UserError(
        "--coordinator, --processes and --process go together"
    )
  if process >= processes:
    raise errors.UserError(
        f"--process={process} has to be below --processes={processes}; they are"
        " counted from 0"
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise errors.UserError(
        f"--coordinator={coordinator} is not like HOST:PORT, nor auto"
    )
  _note(f"process {process} of {processes} meets the others", timeout_s)
  if process:
    _wait_for(coordinator, host.strip("[]"), int(port), timeout_s)
  try:
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=timeout_s,
        # By default it would listen on every address of the host.
        coordinator_bind_address=coordinator,
    )
  except RuntimeError as error:
    raise _apart(coordinator, error) from None


def _note(what: str, timeout_s: int):
  # JAX does not return from this wait: it aborts the process.
  progress.note(f"{what}; where one is missing, it ends after {timeout_s} s")


def _wait_for(coordinator: str, host: str, port: int, timeout_s: int):
  """Returns once something listens there.

  Raises:
    UserError: if nothing does in time.
  """
  end = time.monotonic() + timeout_s
  while True:
    try:
      socket.create_connection((host, port), timeout=timeout_s).close()
      return
    except (OSError, OverflowError, UnicodeError) as error:
      if time.monotonic() + _AGAIN_S > end:
        raise errors.UserError(
            f"--coordinator={coordinator}: nobody answered for {timeout_s} s"
            f" ({error}); start process 0 there, and see that this host"
            " reaches it"
        ) from None
    time.sleep(_AGAIN_S)


def _join_as_scheduled(timeout_s: int):
  _note("the processes meet as the scheduler says", timeout_s)
  try:
    with warnings.catch_warnings():
      # That Kubernetes is there and its package is not; said below.
      warnings.simplefilter("ignore", UserWarning)
      jax.distributed.initialize(initialization_timeout=timeout_s)
  except (ValueError, TypeError) as error:
    # JAX asks for the coordinator's address, or what a variable has is no
    # number.
    reason = " ".join(str(error).split())
    raise errors.UserError(
        f"--coordinator={AUTO} found no scheduler that says all ({reason});"
        " SLURM sets SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_NTASKS,"
        " SLURM_PROCID and SLURM_LOCALID (start it with srun), GKE"
        " TPU_WORKER_HOSTNAMES and TPU_WORKER_ID; elsewhere give"
        " --coordinator=HOST:PORT, --processes and --process"
    ) from None
  except RuntimeError as error:
    raise _apart(AUTO, error) from None


def _apart(coordinator: str, error: RuntimeError) -> errors.UserError:
  reason = " ".join(str(error).split())
  return errors.UserError(
      f"--coordinator={coordinator}: the processes did not meet ({reason})"
  )
