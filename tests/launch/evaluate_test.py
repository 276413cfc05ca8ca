"""The command: its result, its errors, and a kill -9 in the middle."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.tiny import corpus

_ROOT = pathlib.Path(__file__).parents[2]
_DATA = _ROOT.parent / "shared" / "data"
SCRIPT = _ROOT / "launch" / "evaluate.py"
# vLLM on a CPU takes heads of 32 and more.
_DECODER = models.DecoderConfig(
    vocab_size=300,
    embed=64,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    mlp=96,
    max_positions=128,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory, random_params) -> pathlib.Path:
  root = tmp_path_factory.mktemp("evaluate")
  documents = [corpus.Document("two and two is", "four")]
  tokenizer = corpus.train_tokenizer(documents, _DECODER.vocab_size)
  corpus.save_tokenizer(tokenizer, root / "tokenizer")
  params = random_params(_DECODER)
  convert.save(root / "model", _DECODER, params, root / "tokenizer")
  return root / "model"


def _flags(directory, out, **values):
  return {
      "model": directory,
      "task": "arithmetic",
      "limit": 6,
      "max_new_tokens": 8,
      "batch_size": 4,
      "out": out,
  } | values


def test_it_ends_in_a_table_and_a_line_of_json(launch, model, tmp_path):
  out = tmp_path / "answers.jsonl"
  said = launch(**_flags(model, out)).splitlines()
  result = json.loads(said[-1])
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert result["n"] == len(rows) == 6
  assert result["task"] == "arithmetic" and result["shots"] == 0
  correct = sum(row["marks"]["exact_match"]["correct"] for row in rows)
  assert result["correct"] == correct
  assert said[0] == f"{model} on arithmetic, test, n = 6"
  assert said[2].split()[0] == "exact_match"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "gms8k"}, "known tasks: .*arithmetic"),
        ({"model": "nowhere"}, "nowhere does not exist"),
        ({"limit": 9001}, "has 9000 items"),
        ({"max_new_tokens": 128}, "128 positions; lower it"),
        ({"task": "gsm8k", "data": "none.jsonl"}, "none.jsonl"),
        ({"sampler": "vllm", "vllm_python": "nowhere"}, "no such file"),
    ],
)
def test_errors_are_a_line(launch, model, tmp_path, values, message):
  with pytest.raises(errors.UserError, match=message) as error:
    launch(**_flags(model, tmp_path / "answers.jsonl", **values))
  assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(not _DATA.is_dir(), reason="no benchmark files here")
@pytest.mark.parametrize(
    ("task", "file", "shots", "begins", "headline"),
    [
        ("gsm8k", "gsm8k_test.jsonl", 5, "Question: ", "strict-match"),
        ("math", "math_test.jsonl", 4, "Problem:", "math_verify"),
        ("math500", "math500_test.jsonl", 4, "Problem:", "math_verify"),
    ],
)
def test_published_files(
    launch, model, tmp_path, task, file, shots, begins, headline
):
  out = tmp_path / "answers.jsonl"
  flags = _flags(model, out, task=task, data=_DATA / file)
  result = json.loads(launch(**flags).splitlines()[-1])
  assert result["shots"] == shots and result["headline"] == headline
  assert result["n"] == result["prompts_truncated"] == 6  # 128 positions.
  row = json.loads(out.read_text().splitlines()[0])
  assert row["prompt"].startswith(begins) and headline in row["marks"]
  # Without shots it is another test, and the file says of what it is.
  with pytest.raises(errors.UserError, match=r"shots \(\d there, 0 here\)"):
    launch(**flags, shots=0)


def _command(flags):
  named = [f"--{name}={value}" for name, value in flags.items()]
  return [sys.executable, "-m", "launch.evaluate", *named]


def _environment():
  environment = dict(os.environ)
  environment.pop("XLA_FLAGS", None)
  return environment


def _start(flags):
  return subprocess.Popen(
      _command(flags),
      cwd=_ROOT,
      env=_environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def _finish(flags):
  process = _start(flags)
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_killed_and_resumed_it_writes_the_same_file(model, tmp_path):
  values = {"limit": 3000, "batch_size": 3, "max_new_tokens": 40}
  expected = _flags(model, tmp_path / "a.jsonl", **values)
  whole = _finish(expected)
  flags = _flags(model, tmp_path / "b.jsonl", **values)
  for n in (300, 1200):
    process = _start(flags)
    while process.poll() is None:
      path = flags["out"]
      if path.exists() and path.read_bytes().count(b"\n") >= n:
        break
      time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = flags["out"].read_bytes()
    assert n <= left.count(b"\n") < 3000
  result = _finish(flags)
  assert flags["out"].read_bytes() == expected["out"].read_bytes()
  assert result["correct"] == whole["correct"]


@pytest.mark.slow
@pytest.mark.needs_vllm
@pytest.mark.timeout(900)
def test_vllm_answers_as_jax_does(model, tmp_path):
  assert jax.default_backend() == "cpu"
  flags = _flags(model, tmp_path / "jax.jsonl", limit=24)
  by_jax = _finish(flags)
  flags |= {"sampler": "vllm", "out": tmp_path / "vllm.jsonl"}
  by_vllm = _finish(flags)
  assert by_vllm["engine"].startswith("vllm 0.")
  assert (tmp_path / "vllm.jsonl.vllm").is_dir()
  assert by_vllm["correct"] == by_jax["correct"]
  assert by_vllm["weights_sha256"] == by_jax["weights_sha256"]
  assert (tmp_path / "vllm.jsonl").read_bytes() == (
      tmp_path / "jax.jsonl"
  ).read_bytes()
  # Whole, it needs no server.
  again = _finish(flags | {"vllm_python": "nowhere"})
  assert again["correct"] == by_vllm["correct"]
