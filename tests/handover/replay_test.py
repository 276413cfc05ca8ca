"""A score that is computed again: what is the same, and what is told of."""

import contextlib
import hashlib
import json
import shutil

import numpy as np
import pytest

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.handover import replay
from selfdev_jax.sampling import engine as engine_lib
from selfdev_jax.sandbox import runner


def _program(digests, name):
  return records.PROGRAM + digests[name]


def test_all_is_the_same(finished, digests):
  archive = finished / "run" / store_lib.ARCHIVE
  before = hashlib.sha256(archive.read_bytes()).digest()
  result = replay.run(finished / "run", program=digests["best"][:6])
  assert hashlib.sha256(archive.read_bytes()).digest() == before
  assert result["model"] == _program(digests, "best")
  assert result["same_weights"] is True and result["same_score"] is True
  assert result["answers_differing"] == 0 and result["answers"] == 8 + 6
  assert list(result["splits"]) == [records.DEV, records.TEST]
  assert replay.is_same(result)
  assert len(replay.table(result).splitlines()) == 5
  json.dumps(result)
  with store_lib.Store.read(finished / "run") as store:
    for split, part in result["splits"].items():
      score = store.scores(split)[result["model"]]
      assert part["correct"] == {
          "archived": score.correct,
          "now": score.correct,
      }
      assert part["weights"]["now"] == score.weights != ""


@pytest.mark.parametrize("model", ["seed", "ties:density=0.5,scale=1.0"])
def test_baselines(finished, model):
  result = replay.run(finished / "run", model=model)
  assert replay.is_same(result) and result["answers"] == 14


def test_one_that_a_race_stopped_is_asked_as_much(finished, digests):
  model = _program(digests, "stopped")
  result = replay.run(finished / "run", model=model)
  assert replay.is_same(result) and list(result["splits"]) == [records.DEV]
  assert result["splits"]["dev"]["n"] == result["answers"] == 6


def test_other_blocks_would_be_seen(finished, digests, monkeypatch):
  """The sampler here says something else in another batch."""
  monkeypatch.setattr(replay, "_ends", lambda *unused: [4, 8])
  result = replay.run(finished / "run", program="best", split="dev")
  assert result["answers_differing"] > 0


def test_one_split(finished):
  result = replay.run(finished / "run", program="best", split="test")
  assert list(result["splits"]) == [records.TEST] and replay.is_same(result)


def test_a_score_that_was_taken_from_another(finished, digests):
  result = replay.run(finished / "run", program=digests["alike"])
  assert replay.is_same(result)
  assert result["splits"]["dev"]["model"] == _program(digests, "best")
  assert result["splits"]["test"]["model"] == _program(digests, "alike")
  assert "was taken from program:" in replay.table(result)


def test_other_weights(changed, digests):
  workdir = changed("UPDATE scores SET weights = 'abc' WHERE split = 'test'")
  result = replay.run(workdir, program="best")
  assert result["same_weights"] is False and not replay.is_same(result)
  assert result["same_score"] and not result["answers_differing"]
  assert "weights abc in the archive" in replay.table(result)


def test_another_answer(changed):
  workdir = changed(
      "UPDATE responses SET text = text || '!' WHERE item = 3"
      " AND split = 'dev'"
  )
  result = replay.run(workdir, program="best")
  assert result["answers_differing"] == 1 and not replay.is_same(result)
  assert result["same_weights"] and result["same_score"]


def test_another_score(changed):
  workdir = changed("UPDATE scores SET correct = 8 - correct + 9")
  result = replay.run(workdir, program="best")
  assert result["same_weights"] and not result["same_score"]
  assert not replay.is_same(result)


def test_an_archive_without_checksums(changed):
  workdir = changed("UPDATE scores SET weights = ''")
  result = replay.run(workdir, program="best")
  assert result["same_weights"] is None and replay.is_same(result)
  assert "knows no checksum" in replay.table(result)


def test_the_sampler_is_the_run_s(finished, changed, monkeypatch, capsys):
  asked = []
  real = engine_lib.open_sampler
  monkeypatch.setattr(
      engine_lib,
      "open_sampler",
      lambda kind, *args, **kwargs: asked.append(kind) or real(kind),
  )
  workdir = changed(
      "UPDATE scores SET engine = 'vllm 0.32.0, jax 0' WHERE split = 'test'"
  )
  result = replay.run(workdir, program="best")
  assert asked == ["jax", "vllm"]
  assert "asked through vllm 0.32.0, jax 0; here" in capsys.readouterr().err
  assert "asked through vllm 0.32.0, jax 0 there" in replay.table(result)


def _refused(match, workdir, **asked):
  with pytest.raises(errors.UserError, match=match) as caught:
    replay.run(workdir, **asked)
  assert "\n" not in str(caught.value)


def test_what_is_not_there(finished, digests, tmp_path):
  run = finished / "run"
  _refused("holds no run", tmp_path, program="best")
  _refused("has no program 'xyz'", run, program="xyz")
  _refused("has no dev or test score of ties:x", run, model="ties:x")
  stopped, broken = digests["stopped"], digests["broken"]
  _refused("has no test score of program:", run, program=stopped, split="test")
  _refused("its merge failed .non_finite.", run, program=broken)


def test_other_items(changed):
  workdir = changed(
      "UPDATE meta SET value = json_set(value, '$.items', 'x')"
      " WHERE key = 'identity'"
  )
  _refused("items of arithmetic are others", workdir, program="best")


def test_a_merge_that_fails_now(finished, monkeypatch):
  lost = runner.Merged(None, "memory")
  monkeypatch.setattr(worker_lib, "merge", lambda *unused: lost)
  _refused("now is not .memory.; free memory", finished / "run", model="seed")


@contextlib.contextmanager
def _put_back(directory, kept):
  shutil.copytree(directory, kept)
  try:
    yield
  finally:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(kept, directory)


def test_models_that_changed(finished, tmp_path):
  run = finished / "run"
  with _put_back(finished / "b", tmp_path / "b"):
    config, params = convert.load(tmp_path / "b")
    params["final_norm"] = np.array(params["final_norm"]) * 2
    convert.save(finished / "b", config, params, tmp_path / "b")
    _refused("^model .*/b is not what the run in", run, program="best")
    shutil.rmtree(finished / "b")
    _refused("^model directory .*/b does not exist$", run, program="best")
