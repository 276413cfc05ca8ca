"""The smoke run through three hosts of this machine, one of them killed."""

from collections.abc import Iterable
import contextlib
import os
import pathlib
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from selfdev_jax import records
from selfdev_jax import store as store_lib

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

# Other tests have clusters on 127.0.0; in the order of hosts it is the first.
_HEAD = "127.0.1.100"
_START_S = 120.0
_TRAINING = ("--config.dpo.steps=60", "--config.dpo.save_every=5")


def _free_port() -> int:
  with socket.socket() as free:
    free.bind((_HEAD, 0))
    return free.getsockname()[1]


class _Hosts:
  """Ray's nodes, each with an address and one CPU of its own."""

  def __init__(self, environment, temporary):
    self._environment = environment
    self._temporary = temporary
    self._nodes: dict[str, subprocess.Popen] = {}
    self._last = 100
    port = _free_port()
    self.address = f"{_HEAD}:{port}"
    # Short: paths of Unix sockets have at most 107 characters.
    self._directory = tempfile.mkdtemp(prefix="ray_")
    self._start(
        _HEAD, "--head", f"--port={port}", f"--temp-dir={self._directory}"
    )

  def _start(self, host, *arguments):
    command = [pathlib.Path(sys.executable).with_name("ray"), "start"]
    command += ["--block", f"--node-ip-address={host}", "--num-cpus=1"]
    command += ["--object-store-memory=200000000", "--disable-usage-stats"]
    command += ["--include-dashboard=false"] if "--head" in arguments else []
    with open(self._temporary / f"{host}.log", "wb") as log:
      self._nodes[host] = subprocess.Popen(
          [*command, *arguments],
          env=self._environment,
          stdout=log,
          stderr=log,
          start_new_session=True,
      )

  @property
  def there(self) -> list[str]:
    return list(self._nodes)

  def join(self) -> str:
    self._last += 1
    host = f"127.0.1.{self._last}"
    self._start(host, f"--address={self.address}")
    return host

  def kill(self, host: str):
    """All processes of a host at once, as if it lost its power."""
    doomed = self._nodes.pop(host)
    for pid in _family(doomed.pid):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    doomed.wait()

  def wait(self, n: int):
    """Until `n` hosts are there."""
    script = (
        "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False);"
        " print(sum(node['Alive'] for node in ray.nodes()))"
    )
    end = time.monotonic() + _START_S
    while True:
      done = subprocess.run(
          [sys.executable, "-c", script, self.address],
          env=self._environment,
          capture_output=True,
          text=True,
          check=False,
      )
      if done.stdout.strip() == str(n):
        return
      assert time.monotonic() < end, done.stderr[-2000:]

  def close(self):
    for host in list(self._nodes):
      self.kill(host)
    shutil.rmtree(self._directory, ignore_errors=True)


def _family(pid: int) -> list[int]:
  """A process and all that descend from it."""
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  try:
    children = path.read_text(encoding="ascii").split()
  except OSError:
    children = []  # It has ended.
  return [pid, *(p for child in children for p in _family(int(child)))]


@pytest.fixture(scope="module")
def hosts(smoke_cache, tmp_path_factory):
  environment = dict(os.environ, SELFDEV_CACHE=str(smoke_cache))
  environment.pop("XLA_FLAGS", None)
  environment |= {
      "RAY_AUTH_MODE": "token",
      "RAY_AUTH_TOKEN": secrets.token_hex(32),
      "RAY_USAGE_STATS_ENABLED": "0",
  }
  with (
      pytest.MonkeyPatch.context() as patch,
      contextlib.closing(
          _Hosts(environment, tmp_path_factory.mktemp("hosts"))
      ) as started,
  ):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
      patch.setenv(name, environment[name])
    for n in (1, 2, 3):  # Two that start at once may take one port.
      if n > 1:
        started.join()
      started.wait(n)
    yield started


@pytest.fixture(scope="module")
def alone(smoke_cache, start_smoke, finish_smoke, tmp_path_factory):
  """(result, workdir, seconds) of the run in one process."""
  start = time.monotonic()
  workdir = tmp_path_factory.mktemp("alone") / "run"
  code, result, err = finish_smoke(start_smoke(workdir, smoke_cache))
  assert code == 0, err
  return result, workdir, time.monotonic() - start


def _pairs(workdir: pathlib.Path) -> list[records.Pair]:
  with store_lib.Store.read(workdir) as archive:
    return archive.pairs(1)


def _begun(workdir: pathlib.Path, process):
  """Waits until the workers are there and the first of them work."""
  while True:
    assert process.poll() is None, process.communicate()[1]
    with (
        contextlib.suppress(store_lib.StoreError),
        store_lib.Store.read(workdir) as archive,
    ):
      if archive.activities():
        return
    time.sleep(0.2)


def test_a_host_is_killed_at_a_random_moment(
    hosts, alone, smoke_cache, start_smoke, finish_smoke, tmp_path, request
):
  expected, reference, seconds = alone
  seed = random.SystemRandom().randrange(10**6)
  draw, killed, runs = random.Random(seed), 0, 0
  while killed < request.config.getoption("--nodes"):
    runs += 1
    workdir = tmp_path / str(runs)
    process = start_smoke(
        workdir,
        smoke_cache,
        "--config.executor=ray",
        f"--config.ray.address={hosts.address}",
    )
    _begun(workdir, process)
    moment, doomed = draw.uniform(0.0, seconds), draw.choice(hosts.there[1:])
    end, is_killed = time.monotonic() + moment, False
    while process.poll() is None and time.monotonic() < end:
      time.sleep(0.1)
    if process.poll() is None:
      hosts.kill(doomed)
      hosts.join()
      is_killed = True
    code, result, err = finish_smoke(process)
    assert code == 0, (seed, err)
    assert result == expected, (seed, err)
    assert _pairs(workdir) == _pairs(reference), seed
    with store_lib.Store.read(workdir) as archive:
      kinds = [incident.kind for incident in archive.incidents()]
      last = archive.activities()[-1].stage
    # One that was about to be over need not have noticed.
    killed += is_killed and "lost" in kinds
    print(
        f"seed {seed}, run {runs}: {doomed} killed after {moment:.0f} s;"
        f" {sorted(kinds)}, {last}; {killed} kills"
    )


def test_the_head_is_killed_and_resumes(
    hosts, alone, smoke_cache, start_smoke, finish_smoke, tmp_path
):
  expected, reference, seconds = alone
  overrides = [
      "--config.executor=ray",
      f"--config.ray.address={hosts.address}",
  ]
  process = start_smoke(tmp_path / "run", smoke_cache, *overrides)
  _begun(tmp_path / "run", process)
  time.sleep(random.uniform(5.0, 0.5 * seconds))
  process.kill()
  process.communicate()
  code, result, err = finish_smoke(
      start_smoke(tmp_path / "run", smoke_cache, *overrides)
  )
  assert code == 0, err
  assert result == expected
  assert _pairs(tmp_path / "run") == _pairs(reference)


def _losses(workdir: pathlib.Path) -> list[float]:
  """Of the steps that are archived; none where there is no archive yet."""
  try:
    with store_lib.Store.read(workdir) as archive:
      return [step.metrics["loss"] for step in archive.steps(1)]
  except store_lib.StoreError:
    return []


@pytest.fixture(scope="module")
def trained(smoke_cache, start_smoke, finish_smoke, tmp_path_factory):
  """Losses of a longer training in one process."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  code, _, err = finish_smoke(start_smoke(workdir, smoke_cache, *_TRAINING))
  assert code == 0, err
  return _losses(workdir)


def test_two_hosts_train_as_one(
    hosts, trained, smoke_cache, start_smoke, finish_smoke, tmp_path
):
  """And one goes on from the last checkpoint when the other is gone."""
  process = start_smoke(
      tmp_path / "run",
      smoke_cache,
      "--config.executor=ray",
      f"--config.ray.address={hosts.address}",
      "--config.ray.train_hosts=2",
      *_TRAINING,
  )
  while len(_losses(tmp_path / "run")) < 15:
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.1)
  # The first two by address train; the head's host is not the one to die.
  (doomed,) = {*sorted(hosts.there)[:2]} - {_HEAD}
  hosts.kill(doomed)
  hosts.join()
  code, _, err = finish_smoke(process)
  assert code == 0, err
  assert len(trained) == 60
  np.testing.assert_allclose(
      _losses(tmp_path / "run"), trained, rtol=0, atol=1e-5
  )
  with store_lib.Store.read(tmp_path / "run") as archive:
    assert "trainer" in {i.worker for i in archive.incidents()}


def _listening(pids: Iterable[int]) -> set[str]:
  """Addresses, in hexadecimal, at which processes take connections."""
  inodes = set()
  for pid in pids:
    for link in pathlib.Path(f"/proc/{pid}/fd").glob("*"):
      with contextlib.suppress(OSError):
        inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
  found = set()
  for name in ("tcp", "tcp6"):
    lines = pathlib.Path(f"/proc/net/{name}").read_text(encoding="ascii")
    for line in lines.splitlines()[1:]:
      fields = line.split()
      if fields[3] == "0A" and fields[9] in inodes:
        found.add(fields[1].split(":")[0])
  return found


def test_a_cluster_of_the_run_s_own_is_on_loopback(
    smoke_cache, start_smoke, tmp_path
):
  process = start_smoke(tmp_path / "run", smoke_cache, "--config.executor=ray")
  try:
    _begun(tmp_path / "run", process)
    found = _listening(_family(process.pid))
  finally:
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
  assert process.returncode == 130
  # 127.0.0.1, and the same as IPv6 writes it.
  assert found <= {"0100007F", "0000000000000000FFFF00000100007F"}
  assert found


@pytest.mark.parametrize(
    "workers,models", [(1, "path"), (2, "store"), (4, "path")]
)
def test_results_do_not_depend_on_the_workers(
    workers, models, alone, smoke_cache, start_smoke, finish_smoke, tmp_path
):
  """Through a cluster of the run's own."""
  code, result, err = finish_smoke(
      start_smoke(
          tmp_path / "run",
          smoke_cache,
          "--config.executor=ray",
          f"--config.ray.workers={workers}",
          "--config.ray.worker_cpus=0.25",
          f"--config.ray.models={models}",
      )
  )
  assert code == 0, err
  assert "os.fork" not in err
  assert result == alone[0]
  assert _pairs(tmp_path / "run") == _pairs(alone[1])
  if models == "store":
    copies = (smoke_cache / "models").glob("*/model.safetensors")
    assert len(list(copies)) > 1
