"""The commands on the smoke run: exported, applied again, replayed."""

import hashlib
import json
import os
import pathlib
import shutil
import sqlite3
import subprocess
import sys

import pytest

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import queries

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, smoke_cache, start_smoke, finish_smoke):
  """The workdir of a finished run."""
  workdir = tmp_path_factory.mktemp("smoke") / "run"
  status, _, err = finish_smoke(start_smoke(workdir, smoke_cache))
  assert status == 0, err
  return workdir


@pytest.fixture(scope="module")
def command(smoke_cache):
  """command(script, flag=value, ...) -> the finished process."""

  def run(script, **flags):
    environment = dict(os.environ, SELFDEV_CACHE=str(smoke_cache))
    environment.pop("XLA_FLAGS", None)
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return subprocess.run(
        [sys.executable, "-m", f"launch.{script}", *arguments],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

  return run


@pytest.fixture(scope="module")
def package(smoke, command, tmp_path_factory):
  out = tmp_path_factory.mktemp("package") / "merged"
  done = command("export", workdir=smoke, program="best", out=out)
  assert done.returncode == 0, done.stderr
  return out


def _sha256(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_package_has_the_weights_that_were_scored(smoke, package):
  with store_lib.Store.read(smoke) as store:
    found = queries.program(store, "best")
  _, params = convert.load(package)
  assert models.checksum(params) == found.dev.weights == found.test.weights
  assert (package / "program.json").read_text() == found.ir
  # What the run itself wrote at its end.
  name = "model.safetensors"
  assert _sha256(package / name) == _sha256(smoke / "best" / name)
  assert "model of a toy world" in (package / "README.md").read_text()


@pytest.mark.slow
def test_applied_again_it_has_the_same_bits(
    package, command, smoke_cache, tmp_path
):
  provenance = json.loads((package / "provenance.json").read_text())
  seed, *experts = (
      str(smoke_cache / model["path"]) for model in provenance["models"]
  )
  done = command(
      "merge",
      program=package / "program.json",
      base=seed,
      experts=",".join(experts),
      scope=provenance["scope"],
      out=tmp_path / "out",
  )
  assert done.returncode == 0, done.stderr
  assert f"weights {provenance['weights']}\n" in done.stdout
  name = "model.safetensors"
  assert _sha256(tmp_path / "out" / name) == _sha256(package / name)


@pytest.mark.slow
def test_scores_are_the_same_again(smoke, command):
  before = _sha256(smoke / store_lib.ARCHIVE)
  with store_lib.Store.read(smoke) as store:
    tested = list(store.scores(records.TEST))
    dev = store.scores(records.DEV).values()
  chosen = [
      next(m for m in tested if m.startswith("ties:")),
      [m for m in tested if m.startswith(records.PROGRAM)][-1],
      # One that a race stopped.
      *[s.model for s in dev if s.correct is not None and not s.complete][:1],
  ]
  for model in chosen:
    done = command("replay", workdir=smoke, model=model)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["model"] == model
    assert result["same_weights"] is True and result["same_score"] is True
    assert result["answers_differing"] == 0 and result["answers"] > 0
  assert _sha256(smoke / store_lib.ARCHIVE) == before


@pytest.mark.slow
def test_a_changed_answer_is_found(smoke, command, tmp_path):
  shutil.copytree(smoke, tmp_path / "run")
  with sqlite3.connect(tmp_path / "run" / store_lib.ARCHIVE) as db:
    db.execute(
        "UPDATE responses SET text = 'no' WHERE model = 'seed'"
        " AND split = 'dev' AND item = 5"
    )
  db.close()
  done = command("replay", workdir=tmp_path / "run", model="seed", split="dev")
  assert done.returncode == 1, done.stderr
  assert json.loads(done.stdout.splitlines()[-1])["answers_differing"] == 1
