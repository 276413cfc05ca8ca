"""The command on the smoke run: two of its experts, the other way round."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from selfdev_jax import errors

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "transfer.py"


def test_no_run(launch, tmp_path):
  with pytest.raises(errors.UserError, match="holds no run") as error:
    launch(workdir=tmp_path, experts="a,b", tasks="arithmetic")
  assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, smoke_cache, start_smoke, finish_smoke):
  """The workdir of a finished run."""
  workdir = tmp_path_factory.mktemp("smoke") / "run"
  status, _, err = finish_smoke(start_smoke(workdir, smoke_cache))
  assert status == 0, err
  return workdir


@pytest.fixture
def start(smoke, smoke_cache):
  """start(out, *flags) -> the process of a transfer."""

  def run(out, *flags):
    environment = dict(os.environ, SELFDEV_CACHE=str(smoke_cache))
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "launch.transfer", f"--workdir={smoke}"]
    command += ["--experts=tiny:multiply,tiny:add", "--tasks=arithmetic"]
    return subprocess.Popen(
        [*command, "--top=4", f"--out={out}", *flags],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

  return run


def _finish(process):
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  return json.loads(out.splitlines()[-1])


def _answers(out):
  return {
      str(path.relative_to(out)): path.read_bytes()
      for path in out.rglob("*.jsonl")
  }


def _lines(out):
  return sum(text.count(b"\n") for text in _answers(out).values())


@pytest.mark.slow
def test_killed_and_resumed_it_ends_the_same(smoke, start, tmp_path):
  archive = smoke / "archive.sqlite"
  before = hashlib.sha256(archive.read_bytes()).digest()
  whole = _finish(start(tmp_path / "a"))
  for n in (200, 700):
    process = start(tmp_path / "b")
    while process.poll() is None and _lines(tmp_path / "b") < n:
      time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert _lines(tmp_path / "b") < _lines(tmp_path / "a")
  result = _finish(start(tmp_path / "b"))
  assert _answers(tmp_path / "b") == _answers(tmp_path / "a")
  assert result.pop("out") != whole.pop("out")
  assert result == whole
  assert hashlib.sha256(archive.read_bytes()).digest() == before
  assert len(whole["candidates"]) == 4
  applied = [c for c in whole["candidates"] if c["applies"]]
  n = len(applied)
  assert whole["budget"] == {"programs": n, "task_arithmetic": n}
  assert whole["tasks"]["arithmetic"]["n_test"] == 120


@pytest.mark.slow
@pytest.mark.needs_vllm
@pytest.mark.timeout(900)
def test_through_vllm(start, tmp_path):
  result = _finish(start(tmp_path / "out", "--sampler=vllm", "--top=2"))
  assert result["engine"].startswith("vllm 0.")
  roles = result["tasks"]["arithmetic"]["models"]
  assert {"unchanged", "best_of_top", "task_arithmetic", "seed"} < set(roles)
  assert all(entry["n"] == 120 for entry in roles.values())
  assert (tmp_path / "out" / "vllm").is_dir()
