"""The smoke loop through vLLM itself, run as a user runs it."""

import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.sampling.vllm import guard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs_vllm,
    pytest.mark.timeout(1200),
]


def _command(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_text()
  except OSError:
    return ""


def _guard(pid):
  """Of the server that a run has started."""
  (found,) = (p for p in guard.below(pid) if "guard.py" in _command(p))
  return found


def _await_scores(process, workdir, n):
  """Waits until the run has scored so many models."""
  while process.poll() is None:
    try:
      with store_lib.Store.read(workdir) as archive:
        if len(archive.scores(records.DEV)) >= n:
          return
    except (store_lib.StoreError, sqlite3.OperationalError):
      pass  # Not there yet.
    time.sleep(0.1)
  raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, smoke_cache, start_smoke, finish_smoke):
  """(workdir, result, recording) of an uninterrupted run."""
  root = tmp_path_factory.mktemp("vllm")
  overrides = ["--config.sampler=vllm", f"--recording={root / 'said.jsonl'}"]
  process = start_smoke(root / "run", smoke_cache, *overrides)
  status, result, err = finish_smoke(process)
  assert status == 0, err
  return root / "run", result, root / "said.jsonl"


def test_every_record_names_the_engine(finished):
  workdir, result, _ = finished
  assert result["best"]["evaluated"] > 0
  assert result["sampled_by"] == ["vllm 0.32.0"]
  with store_lib.Store.read(workdir) as archive:
    assert archive.engines() == ["vllm 0.32.0"]


def test_what_was_recorded_is_replayed_to_the_same_result(
    finished, smoke_cache, start_smoke, finish_smoke, tmp_path
):
  _, expected, recording = finished
  overrides = ["--config.sampler=replay", f"--recording={recording}"]
  process = start_smoke(tmp_path, smoke_cache, *overrides)
  status, result, err = finish_smoke(process)
  assert status == 0, err
  assert result.pop("sampled_by") == ["replay"]
  assert result == {k: v for k, v in expected.items() if k != "sampled_by"}


def test_its_best_program_is_replayed_to_the_same_answers(
    finished, smoke_cache
):
  workdir, _, _ = finished
  environment = os.environ | {"SELFDEV_CACHE": str(smoke_cache)}
  environment.pop("XLA_FLAGS", None)  # One device, as the run had.
  done = subprocess.run(
      [
          *(sys.executable, "-m", "launch.replay"),
          *(f"--workdir={workdir}", "--program=best"),
      ],
      cwd=pathlib.Path(__file__).parents[1],
      env=environment,
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_an_engine_and_then_the_run_are_killed_and_the_result_is_the_same(
    finished, smoke_cache, start_smoke, finish_smoke, tmp_path
):
  _, expected, _ = finished
  process = start_smoke(tmp_path, smoke_cache, "--config.sampler=vllm")
  _await_scores(process, tmp_path, 2)
  for pid in guard.below(_guard(process.pid)):
    os.kill(pid, signal.SIGKILL)
  _await_scores(process, tmp_path, 6)
  pids = [p for p in guard.below(process.pid) if "vllm" in _command(p)]
  assert len(pids) >= 2
  process.kill()
  _, err = process.communicate()
  assert "a new engine is started" in err
  deadline = time.monotonic() + 20
  while any("vllm" in _command(p) for p in pids):
    assert time.monotonic() < deadline, pids
    time.sleep(0.1)
  status, result, err = finish_smoke(
      start_smoke(tmp_path, smoke_cache, "--config.sampler=vllm")
  )
  assert status == 0, err
  assert result == expected
