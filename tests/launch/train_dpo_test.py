"""The script as a user runs it: killed, on two processes, given nonsense."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import store

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "train_dpo.py"
_DECODER = models.DecoderConfig(
    vocab_size=60,
    embed=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    max_positions=64,
)
_STEPS = 60
_CHANGES = (
    "--config.beta=0.5",
    "--config.learning_rate=1e-2",
    f"--config.steps={_STEPS}",
    "--config.save_every=10",
    "--config.batch_size=4",
    "--config.lora_rank=4",
    "--config.lora_alpha=8.0",
)


def _write_tokenizer(directory, size):
  """A token a word: `w7` is 7."""
  words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}
  model = tokenizers.models.WordLevel(words, "<unk>")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
  ).save_pretrained(directory)


def _words(rng, n):
  return " ".join(f"w{i}" for i in rng.integers(2, 60, n))


def _rows(n=12):
  rng = np.random.default_rng(0)
  return [
      {
          "prompt": _words(rng, rng.integers(2, 12)),
          "chosen": _words(rng, rng.integers(1, 12)) + " w3",
          "rejected": _words(rng, rng.integers(1, 12)) + " w4",
      }
      for _ in range(n)
  ]


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture(scope="module")
def root(tmp_path_factory, random_params) -> pathlib.Path:
  """model/, other/, short/ (60 ids for 70 words), pairs.jsonl, cache/."""
  root = tmp_path_factory.mktemp("train_dpo")
  params = random_params(_DECODER)
  negated = jax.tree.map(lambda x: -x, params)
  for name, words, tree in (
      ("model", 60, params),
      ("other", 60, negated),
      ("short", 70, params),
  ):
    _write_tokenizer(root / f"words-{name}", words)
    convert.save(root / name, _DECODER, tree, like=root / f"words-{name}")
  _write(root / "pairs.jsonl", _rows())
  return root


@pytest.fixture
def begin(root, tmp_path):
  """begin(*changes, devices, environment, **flags) -> the process.

  A flag that is None is left out.
  """

  started = []

  def begin(*changes, devices=1, environment=(), **flags):
    flags = {
        "config": "configs/dpo.py",
        "model": root / "model",
        "pairs": root / "pairs.jsonl",
        "workdir": tmp_path / "workdir",
        **flags,
    }
    command = [sys.executable, "-m", "launch.train_dpo"]
    command += [f"--{k}={v}" for k, v in flags.items() if v is not None]
    environment = dict(
        os.environ,
        SELFDEV_CACHE=str(root / "cache"),
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    ) | dict(environment)
    process = subprocess.Popen(
        [*command, *_CHANGES, *changes],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process

  yield begin
  for process in started:
    if process.poll() is None:
      process.kill()
    process.communicate()


@pytest.fixture
def launched(begin):
  """launched(*changes, **flags) -> (what it printed as JSON, its stderr)."""

  def launched(*changes, **flags):
    return _finish(begin(*changes, **flags))

  return launched


def _finish(process):
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "Traceback" not in err
  # Gloo, which joins CPUs of several processes, writes there as well.
  lines = [line for line in out.splitlines() if line.startswith("{")]
  assert len(lines) <= 1
  return (json.loads(lines[0]) if lines else None), err


def _metrics(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _adapter(workdir) -> bytes:
  return (workdir / "adapter" / "adapter_model.safetensors").read_bytes()


def _kill_midway(processes, workdir, step=20):
  """kill -9 after a checkpoint, between two."""
  last = workdir / "checkpoints" / str(step)
  deadline = time.monotonic() + 240
  while not last.is_dir():
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in processes), processes[
        0
    ].communicate()
    time.sleep(0.001)
  for process in processes:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not (workdir / "adapter").exists()
  assert len((workdir / "metrics.jsonl").read_text().splitlines()) < _STEPS


# What it makes.


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full"])
def test_from_files_to_files(launched, root, tmp_path, trains):
  summary, err = launched(
      f"--config.trains={trains}", export=tmp_path / "export"
  )
  assert summary["pairs"] == 12 and summary["steps"] == _STEPS
  assert summary["rewards/accuracies"] > 0.9
  assert f"DPO: {_STEPS}/{_STEPS}" in err
  workdir = tmp_path / "workdir"
  assert _metrics(workdir)[-1] == {
      "step": _STEPS,
      **{k: v for k, v in summary.items() if k not in ("pairs", "steps")},
  }
  assert list((workdir / "tensorboard").iterdir())
  assert (workdir / "adapter").exists() == (trains == "lora")
  _, before = convert.load(root / "model")
  _, after = convert.load(tmp_path / "export")
  moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), before, after)
  assert all(jax.tree.leaves(moved["layers"]["mlp"]))
  assert moved["embed"] == (trains == "full")


@pytest.mark.slow
def test_killed_and_started_again(begin, launched, root, tmp_path):
  """The same command; nothing tells the two trainings apart."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  expected, _ = launched(workdir=whole)
  _kill_midway([begin(workdir=killed)], killed)
  summary, err = launched(workdir=killed)
  assert summary == expected
  assert "DPO: reference" not in err
  assert _adapter(killed) == _adapter(whole)
  assert _metrics(killed) == _metrics(whole)
  assert [line["step"] for line in _metrics(whole)] == [*range(1, _STEPS + 1)]


# Two processes.


def _free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def _pair(begin, *changes, **flags):
  """Two processes of two devices each."""
  flags |= dict(coordinator=f"127.0.0.1:{_free_port()}", processes=2)
  return [begin(*changes, devices=2, process=i, **flags) for i in (0, 1)]


def _assert_close(one, other):
  for got, wanted in zip(_metrics(one), _metrics(other), strict=True):
    assert set(got) == set(wanted)
    for name in got:
      np.testing.assert_allclose(
          got[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name
      )
  found, expected = (
      safetensors.numpy.load(_adapter(workdir)) for workdir in (one, other)
  )
  assert set(found) == set(expected)
  for name, wanted in expected.items():
    np.testing.assert_allclose(found[name], wanted, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full"])
def test_two_processes_equal_one(begin, launched, tmp_path, trains):
  one, two = tmp_path / "one", tmp_path / "two"
  # A larger rate would raise rounding to more than it is.
  changes = (
      "--config.fsdp=2",
      "--config.steps=12",
      f"--config.trains={trains}",
  )
  changes += ("--config.learning_rate=1e-4", "--config.warmup_fraction=0.5")
  exports = [tmp_path / name for name in ("export-1", "export-2")]
  expected, _ = launched(*changes, devices=4, workdir=one, export=exports[0])
  both = _pair(begin, *changes, workdir=two, export=exports[1])
  (summary, _), (nothing, _) = map(_finish, both)
  assert nothing is None  # Only the first prints.
  assert set(summary) == set(expected)
  if trains == "lora":
    _assert_close(two, one)
  found, wanted = (convert.load(path)[1] for path in reversed(exports))
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, wanted
  )


@pytest.mark.slow
def test_two_processes_of_slurm_equal_one(begin, launched, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  changes = ("--config.fsdp=2", "--config.steps=12")
  changes += ("--config.learning_rate=1e-4", "--config.warmup_fraction=0.5")
  expected, _ = launched(*changes, devices=2, workdir=one)
  port = str(_free_port())
  both = [
      begin(
          *changes,
          workdir=two,
          coordinator="auto",
          # As `srun -n 2` sets them, and a port that is free.
          environment={
              "SLURM_JOB_ID": "7",
              "SLURM_STEP_NODELIST": "127.0.0.1",
              "SLURM_NTASKS": "2",
              "SLURM_PROCID": str(process),
              "SLURM_LOCALID": str(process),
              "JAX_COORDINATOR_PORT": port,
              "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
          },
      )
      for process in (0, 1)
  ]
  (summary, _), (nothing, _) = map(_finish, both)
  assert nothing is None
  assert set(summary) == set(expected)
  _assert_close(two, one)


# A workdir at a URL.


@pytest.mark.slow
def test_interrupted_and_taken_up_by_another_machine(begin, launched, tmp_path):
  """Ctrl-C after a checkpoint; the checkpoint comes from the URL."""
  whole, url = tmp_path / "whole", (tmp_path / "bucket" / "run").as_uri()
  expected, _ = launched(workdir=whole)
  environments = [
      {"SELFDEV_CACHE": str(tmp_path / f"machine-{i}")} for i in range(2)
  ]
  process = begin(workdir=url, environment=environments[0])
  deadline = time.monotonic() + 240
  while not list(tmp_path.glob("machine-0/workdirs/*/run/checkpoints/20")):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.001)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 130, err
  summary, err = launched(workdir=url, environment=environments[1])
  assert summary == expected
  assert "DPO: reference" not in err
  (copy,) = tmp_path.glob("machine-1/workdirs/*/run")
  assert _adapter(copy) == _adapter(whole)
  assert _metrics(copy) == _metrics(whole)


@pytest.mark.slow
def test_two_processes_killed_and_started_again(begin, launched, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  options = ("--config.fsdp=2",)
  _kill_midway(_pair(begin, *options, workdir=two), two)
  (again, _), _ = map(_finish, _pair(begin, *options, workdir=two))
  (whole, _), _ = map(_finish, _pair(begin, *options, workdir=one))
  assert again == whole
  assert _adapter(two) == _adapter(one)
  assert _metrics(two) == _metrics(one)


# Nonsense.


@pytest.mark.slow
def test_two_processes_that_differ(begin, tmp_path):
  port = _free_port()
  both = [
      begin(
          f"--config.beta={0.1 + process}",
          workdir=tmp_path / "w",
          coordinator=f"127.0.0.1:{port}",
          processes=2,
          process=process,
      )
      for process in range(2)
  ]
  for process in both:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "the processes were not started alike" in err


@pytest.mark.slow
def test_a_workdir_in_use(begin, tmp_path):
  workdir = tmp_path / "w"
  with store.lock(workdir):
    process = begin(workdir=workdir)
    _assert_one_line(process, f"is in use by process {os.getpid()}")


def _assert_one_line(process, message):
  out, err = process.communicate(timeout=120)
  assert process.returncode == 2, err
  assert out == ""
  assert "Traceback" not in err
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
  assert message in lines[0]
  return err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(pairs="/nowhere/x.jsonl"), "/nowhere/x.jsonl does not exist"),
        (dict(model="/nowhere/x"), "model directory /nowhere/x does not exist"),
        (dict(export="{root}"), "exists; name a new directory"),
        (dict(adapter="/nowhere/x"), "/nowhere/x"),
        (dict(coordinator="127.0.0.1:1"), "--process go together"),
        (
            dict(coordinator="127.0.0.1:1", processes=2, process=2),
            "--process=2 has to be below --processes=2; they are counted from",
        ),
        ({"config.fsdp": 3}, "1 devices cannot be shared out by dpo.fsdp=3"),
        ({"config.parts": 3}, "'dpo.parts' is 3; it has to divide"),
        ({"config.bta": 3}, "unknown config key 'bta'; did you mean 'beta'?"),
        (dict(config="/nowhere.py"), "/nowhere.py"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_bad_flags(begin, root, tmp_path, flags, message):
  flags = {k: str(v).format(root=root) for k, v in flags.items()}
  changes = [f"--{k}={v}" for k, v in flags.items() if "." in k]
  rest = {k: v for k, v in flags.items() if "." not in k}
  _assert_one_line(begin(*changes, **rest), message)
  assert not (tmp_path / "workdir").exists()


_GOOD = json.dumps({"prompt": "w5", "chosen": "w6", "rejected": "w7"})
_EQUAL = json.dumps({"prompt": "w5", "chosen": "w6", "rejected": "w6"})
_LONG = json.dumps(
    {"prompt": "w5", "chosen": "w6 " * 64, "rejected": "w7 " * 64}
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no preference pair"),
        ([_GOOD, "", '{"prompt":'], "pairs.jsonl:3 is no JSON"),
        ([_GOOD, '{"prompt": "w5", "chosen": "w6"}'], ":2 lacks rejected"),
        (
            [_EQUAL, _EQUAL, _LONG],
            "left to train on: 3 pairs skipped (2 equal, 1 too long); raise",
        ),
    ],
    ids=["none", "no JSON", "a column", "none left"],
)
def test_bad_pairs(begin, tmp_path, lines, message):
  pairs = tmp_path / "pairs.jsonl"
  pairs.write_text("".join(line + "\n" for line in lines))
  _assert_one_line(begin(pairs=pairs), message)
  assert not (tmp_path / "workdir").exists()


@pytest.mark.slow
def test_a_tokenizer_of_another_model(begin, root, tmp_path):
  rows = [{"prompt": "w5", "chosen": "w65", "rejected": "w6"}]
  pairs = _write(tmp_path / "pairs.jsonl", rows)
  _assert_one_line(
      begin(model=root / "short", pairs=pairs),
      "row 1 of 1: the tokenizer of 70 tokens gives token 65, but the model has"
      " 60; the tokenizer is not this model's",
  )


@pytest.mark.slow
def test_an_adapter_of_another_rank(begin, launched, tmp_path):
  launched("--config.steps=1")
  adapter = tmp_path / "workdir" / "adapter"
  _assert_one_line(
      begin("--config.lora_rank=3", adapter=adapter, workdir=tmp_path / "new"),
      "but dpo.lora_rank=3 and dpo.lora_targets=q,k,v,o,gate,up,down ask for",
  )
  _assert_one_line(
      begin("--config.lora_alpha=2", adapter=adapter, workdir=tmp_path / "new"),
      "is scaled by 2, but dpo.lora_alpha=2 and dpo.rslora=False ask for 0.5",
  )


@pytest.mark.slow
def test_a_workdir_of_another_model(begin, launched, root, tmp_path):
  launched("--config.steps=1")
  before = _adapter(tmp_path / "workdir")
  _assert_one_line(
      begin("--config.steps=1", model=root / "other"),
      f"{tmp_path}/workdir belongs to another training: weights was",
  )
  _assert_one_line(
      begin("--config.steps=2"),
      "belongs to another training: dpo.steps was '1', is '2'",
  )
  assert _adapter(tmp_path / "workdir") == before


@pytest.mark.slow
def test_what_could_not_be_taken_is_counted(launched, tmp_path):
  cut = {"prompt": "w8 " * 80, "chosen": "w6", "rejected": "w7"}
  pairs = tmp_path / "pairs.jsonl"
  lines = (_GOOD, _EQUAL, json.dumps(cut), _LONG)
  pairs.write_text("".join(line + "\n" for line in lines))
  summary, err = launched("--config.steps=1", pairs=pairs)
  assert summary["pairs"] == 2
  assert (
      "Note: 2 pairs skipped (1 equal, 1 too long), 1 prompt cut on the left\n"
  ) in err


# In the process of the tests, to be fast.


# What ml_collections loads the file with.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(process=0), "--coordinator, --processes and --process go togeth"),
        (
            dict(coordinator="h:1", processes=1, process=1),
            "below --processes=1",
        ),
        (
            dict(coordinator="here", processes=2, process=1),
            "--coordinator=here is not like HOST:PORT",
        ),
        (dict(export="."), "--export=. exists; name a new directory"),
        (dict(coordinator="auto", process=1), "auto takes no --processes and"),
        (
            dict(workdir="memory://run", coordinator="auto"),
            "--workdir=memory://run is for one process, without --coordinator",
        ),
    ],
)
def test_flags_that_do_not_fit(launch, root, tmp_path, flags, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    launch(
        **{
            "config": _ROOT / "configs" / "dpo.py",
            "model": root / "model",
            "pairs": root / "pairs.jsonl",
            "workdir": tmp_path / "workdir",
        }
        | flags
    )
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "workdir").exists()
