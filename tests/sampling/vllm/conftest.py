"""A tiny model, and a server in vLLM's place that fails as it is told."""

import contextlib
import json
import os
import pathlib
import random
import shlex
import sys
import time

import numpy as np
import pytest
import transformers

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax.evaluation import arithmetic
from selfdev_jax.sampling import vllm
from selfdev_jax.tiny import corpus

_FAKE = pathlib.Path(__file__).with_name("fake_vllm.py")


@pytest.fixture(scope="session")
def decoder():
  return models.DecoderConfig(
      vocab_size=300,
      embed=16,
      layers=2,
      heads=2,
      kv_heads=1,
      head_dim=8,
      mlp=24,
      max_positions=64,
  )


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  documents = corpus.word_problems(random.Random(0), 60, arithmetic.OPERATIONS)
  corpus.save_tokenizer(corpus.train_tokenizer(documents, 300), directory)
  return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="session")
def params(decoder, random_params):
  return random_params(decoder)


@pytest.fixture(scope="session")
def other_params(params):
  """Of the same shapes, and nothing else in common."""

  def turn(tree):
    if isinstance(tree, dict):
      return {key: turn(value) for key, value in tree.items()}
    return np.ascontiguousarray(np.flip(tree, -1))

  return turn(params)


@pytest.fixture(scope="session")
def model(tmp_path_factory, decoder, params, tokenizer):
  """The directory that engines begin with."""
  directory = tmp_path_factory.mktemp("model") / "model"
  convert.save(directory, decoder, params, like=tokenizer.name_or_path)
  return directory


class Fake:
  """How engines will fail, and what they did."""

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self.logs = directory / "logs"
    self.python = directory / "python"
    arguments = shlex.join([sys.executable, str(_FAKE)])
    self.python.write_text(f'#!/bin/sh\nexec {arguments} "$@"\n')
    self.python.chmod(0o755)
    self._faults = directory / "faults.json"
    self._record = directory / "record"
    self.environment = {
        "FAKE_VLLM_FAULTS": str(self._faults),
        "FAKE_VLLM_RECORD": str(self._record),
    }
    self.fail({})

  def fail(self, faults: dict[str, list]):
    """{"die at start": [True, True]}: the next two engines do."""
    self._faults.write_text(json.dumps(faults))

  def events(self, kind: str | None = None) -> list[dict]:
    if not self._record.exists():
      return []
    lines = self._record.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [e for e in events if kind in (None, e["event"])]

  @property
  def starts(self) -> int:
    return len(self.events("start"))

  def forget(self):
    """What was recorded so far."""
    self._record.unlink(missing_ok=True)

  def pids(self) -> set[int]:
    """All processes that engines ever had."""
    keys = ("pid", "guard", "child")
    return {e[key] for e in self.events() for key in keys if key in e}


@pytest.fixture(scope="session")
def make_fake(tmp_path_factory):
  return lambda: Fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def fake(make_fake, monkeypatch):
  fake = make_fake()
  for key, value in fake.environment.items():
    monkeypatch.setenv(key, value)
  monkeypatch.setattr(vllm.vllm_sampler, "_BACK_OFF_S", 0.01)
  return fake


@pytest.fixture(scope="session")
def open_sampler(decoder, tokenizer, model):
  """A context with a sampler on a fake."""

  @contextlib.contextmanager
  def open_sampler(fake, **settings):
    settings = {
        "directory": model,
        "dtype": np.float32,
        "max_length": 64,
        "log_dir": fake.logs,
        "python": fake.python,
        "start_timeout_s": 30.0,
        "stall_timeout_s": 100.0,
    } | settings
    eos = (tokenizer.eos_token_id,)
    sampler = vllm.VllmSampler(
        settings.pop("decoder", decoder), tokenizer, eos, **settings
    )
    try:
      yield sampler
    finally:
      sampler.close()

  return open_sampler


def _lives(pid: int) -> bool:
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except (FileNotFoundError, ProcessLookupError):
    return False
  return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture(scope="session")
def await_end():
  """await_end(pids): asserts that these processes end within seconds."""

  def await_end(pids, seconds=15.0):
    deadline = time.monotonic() + seconds
    while any(map(_lives, pids)) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert not [pid for pid in pids if _lives(pid)]

  return await_end


@pytest.fixture(scope="session")
def shared_memory():
  """Names of the files that weights go through."""
  return lambda: {n for n in os.listdir("/dev/shm") if "selfdev-weights" in n}
