"""The whole loop on the smoke config, run as a user runs it."""

import os
import random
import signal
import subprocess
import time

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import records
from selfdev_jax import store as store_lib

pytestmark = pytest.mark.slow

_FAMILIES = ("task_arithmetic", "ties", "random_weights")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, smoke_cache, start_smoke, finish_smoke):
  """(workdir, result, seconds) of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("smoke") / "run"
  start = time.monotonic()
  process = start_smoke(workdir, smoke_cache, "--trace")
  status, result, err = finish_smoke(process)
  assert status == 0, err
  return workdir, result, time.monotonic() - start


def test_the_result_has_every_part(finished):
  _, result, _ = finished
  assert result["config"] == "smoke"
  assert set(result["seed_model"]) == {"dev", "test"}
  assert [row["t"] for row in result["iterations"]] == [1, 2]
  assert result["iterations"][0] == result["control"][0]
  for row in result["iterations"] + result["control"]:
    assert 0 < row["distinct"] <= row["admitted"] <= row["sampled"]
    assert 0 <= row["mean_dev"] <= row["best_dev"] <= 1
  evaluated = result["best"]["evaluated"]
  assert evaluated == sum(row["evaluated"] for row in result["iterations"])
  for name in _FAMILIES:
    assert result["baselines"][name]["evaluated"] == evaluated
  assert result["baselines"]["control"]["evaluated"] <= evaluated
  for entry in (result["best"], *result["baselines"].values()):
    low, high = entry["ci95"]
    assert low <= entry["test"] <= high and entry["n_test"] == 120


def test_the_models_learned_and_dpo_moved_the_factory(finished):
  workdir, _, _ = finished
  with store_lib.Store.read(workdir) as archive:
    steps = archive.steps(1)
    assert len(steps) == 6
    assert steps[0].metrics["loss"] != steps[-1].metrics["loss"]
    assert steps[0].metrics["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert steps[-1].metrics["rewards/margins"] > 0
    (made_by,) = archive.rows(
        "SELECT arm, a.iteration, stage, digest != '' FROM factories f"
        " JOIN activities a ON a.id = f.activity WHERE f.iteration = 2"
    )
    assert made_by == (records.LOOP, 1, "refine", 1)
    verdicts = archive.verdicts()
    assert any(v.admitted for v in verdicts)
    loop, control = (
        [c.text for c in archive.completions(arm, 2)] for arm in records.ARMS
    )
    assert loop != control[: len(loop)]  # Same keys, another factory.


def test_every_score_can_be_recounted_from_its_generations(finished):
  workdir, _, _ = finished
  with store_lib.Store.read(workdir) as archive:
    for split, n in ((records.DEV, 60), (records.TEST, 120)):
      scores = archive.scores(split)
      assert scores
      for name, score in scores.items():
        responses = archive.responses(name, split)
        assert score.n == len(responses) == n
        assert score.correct == sum(r.extracted == r.gold for r in responses)


def test_the_best_model_is_a_hugging_face_directory(finished, smoke_cache):
  workdir, result, _ = finished
  best = transformers.AutoModelForCausalLM.from_pretrained(
      workdir / "best", dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "best")
  digest = result["best"]["program_id"]
  with store_lib.Store.read(workdir) as archive:
    responses = archive.responses(f"program:{digest}", records.DEV)[:8]
  for response in responses:
    prompt = tokenizer(response.prompt, return_tensors="pt")
    tokens = best.generate(**prompt, max_new_tokens=16, do_sample=False)
    written = tokenizer.decode(
        tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert written == response.text


def test_the_factory_is_a_lora_adapter(finished, smoke_cache):
  workdir, _, _ = finished
  (seed,) = smoke_cache.glob("tiny-*/seed")
  base = transformers.AutoModelForCausalLM.from_pretrained(
      seed, dtype=torch.float32
  )
  tokens = torch.arange(5, 25)[None]
  with torch.no_grad():
    before = base(tokens).logits
    factory = peft.PeftModel.from_pretrained(
        base, workdir / "factories" / "iteration_2"
    )
    after = factory(tokens).logits
  assert not torch.allclose(before, after, atol=1e-4)


def test_the_tiny_seed_model_equals_transformers(finished, smoke_cache):
  del finished  # Trained it.
  from selfdev_jax import models

  (seed,) = smoke_cache.glob("tiny-*/seed")
  reference = transformers.AutoModelForCausalLM.from_pretrained(
      seed, dtype=torch.float32
  )
  tokens = np.random.default_rng(0).integers(0, 375, (4, 64)).astype(np.int32)
  with torch.no_grad():
    expected = reference(torch.tensor(tokens)).logits.numpy()
  config, params = convert.load(seed)
  found = models.logits(
      config, params, models.forward(config, params, jax.numpy.array(tokens))
  )
  np.testing.assert_allclose(found, expected, atol=5e-5)


def test_a_finished_run_returns_at_once_with_the_same_result(
    finished, smoke_cache, start_smoke, finish_smoke
):
  workdir, result, _ = finished
  with store_lib.Store.read(workdir) as archive:
    before = archive.activities()
  status, again, err = finish_smoke(start_smoke(workdir, smoke_cache))
  assert status == 0, err
  assert again == result
  with store_lib.Store.read(workdir) as archive:
    assert archive.activities() == before


def test_the_report_is_one_file(finished):
  workdir, result, _ = finished
  page = (workdir / "report.html").read_text()
  assert result["best"]["program_id"][:12] in page
  assert "http://" not in page.replace("http://www.w3.org/", "")


def test_a_profile_of_one_iteration_and_tensorboards_curves(finished):
  workdir, _, _ = finished
  (profile,) = workdir.glob("trace/plugins/profile/*/*.xplane.pb")
  found = profile.read_bytes()
  assert b"Iteration 1, loop: propose" in found
  assert b"Iteration 2, loop: propose" not in found
  (events,) = workdir.glob("tensorboard/*")
  assert b"dev/loop/accuracy" in events.read_bytes()
  (events,) = workdir.glob("dpo/1/tensorboard/*")
  assert b"train/rewards/margins" in events.read_bytes()


def test_a_workdir_of_another_config_is_refused(
    finished, smoke_cache, start_smoke, finish_smoke
):
  workdir, _, _ = finished
  process = start_smoke(workdir, smoke_cache, "--config.dpo.beta=0.7")
  status, _, err = finish_smoke(process)
  assert status == 2
  assert "dpo.beta (0.1 there, 0.7 here)" in err and "Traceback" not in err


def test_ctrl_c_is_one_line_and_resumable(
    smoke_cache, finished, tmp_path, start_smoke, finish_smoke
):
  del finished  # Only so that the world is trained.
  process = start_smoke(tmp_path / "run", smoke_cache)
  archive = tmp_path / "run" / "archive.sqlite"
  while not archive.exists():
    assert process.poll() is None
    time.sleep(0.1)
  time.sleep(3)
  process.send_signal(signal.SIGINT)
  status, _, err = finish_smoke(process)
  assert status == 130
  assert err.splitlines()[-1] == (
      "interrupted; nothing is lost, run the same command again"
  )
  assert "Traceback" not in err


def _kept(workdir):
  """What an archive has, after every page and key of it was checked."""
  try:
    archive = store_lib.Store.read(workdir)
  except store_lib.StoreError as error:
    assert "it has no tables" in str(error)
    return set()
  with archive as store:
    assert store.rows("PRAGMA integrity_check") == [("ok",)]
    assert store.rows("PRAGMA foreign_key_check") == []
    for model, score in store.scores(records.DEV).items():
      if score.correct is not None and not score.reused:
        answers = store.answers(model, records.DEV)
        assert (len(answers), sum(answers)) == (score.n, score.correct)
    return {
        *store.rows("SELECT 'text', arm, iteration, item FROM completions"),
        *store.rows("SELECT 'verdict', arm, iteration, item FROM verdicts"),
        *store.rows("SELECT 'answer', model, split, item FROM responses"),
    }


def _cut_power(workdir, rng):
  """Cuts the log of what is not in the archive's file yet, anywhere."""
  log = workdir / "archive.sqlite-wal"
  if log.exists():
    size = log.stat().st_size
    # Most of what was not on the disk yet is at the end.
    os.truncate(log, rng.choice([rng.randint(0, size), max(size - 99, 0)]))
  (workdir / "archive.sqlite-shm").unlink(missing_ok=True)


@pytest.mark.timeout(0)
def test_killed_at_random_moments_the_result_is_the_same(
    finished, smoke_cache, tmp_path, start_smoke, finish_smoke, pytestconfig
):
  _, expected, seconds = finished
  seed = random.SystemRandom().randrange(10**6)
  rng = random.Random(seed)
  wanted, kills, cuts, runs = pytestconfig.getoption("--kills"), 0, 0, 0
  while kills < wanted:
    workdir, runs = tmp_path / f"run{runs}", runs + 1
    while kills < wanted:
      process = start_smoke(workdir, smoke_cache)
      while not (workdir / "archive.sqlite").exists():
        assert process.poll() is None
        time.sleep(0.1)
      try:
        process.wait(rng.uniform(0, seconds / 3))
      except subprocess.TimeoutExpired:
        seen = _kept(workdir) if kills % 2 else set()
        process.kill()
      process.communicate()
      if process.returncode != -signal.SIGKILL:
        break  # The loop was over before its time.
      kills += 1
      if kills % 2:
        before = _kept(workdir) if rng.random() < 0.5 else None
        _cut_power(workdir, rng)
        cuts += 1
        if before is not None:
          assert _kept(workdir) <= before
      else:  # Nothing that was written is lost.
        assert seen <= _kept(workdir), f"seed {seed}"
    status, result, err = finish_smoke(start_smoke(workdir, smoke_cache))
    assert status == 0, f"seed {seed}: {err}"
    assert result == expected, f"seed {seed}, {kills} kills, {cuts} cuts"
    _kept(workdir)
  print(
      f"{kills} kills, {cuts} of them power cuts, in {runs} runs, seed {seed}"
  )
