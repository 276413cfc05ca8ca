"""No test item gets into anything that selects or trains: GSM8K's way."""

import json
import pathlib
import zlib

import pytest

from selfdev_jax import board as board_lib
from selfdev_jax import config as config_lib
from selfdev_jax import evaluation
from selfdev_jax import loop
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import sandbox
from selfdev_jax import store as store_lib
from selfdev_jax.evaluation import data
from selfdev_jax.executors import executor as executor_lib
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.sandbox import runner

_DATA = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"
_TRAIN, _TEST = _DATA / "gsm8k_train.jsonl", _DATA / "gsm8k_test.jsonl"
needs_data = pytest.mark.skipif(not _TRAIN.exists(), reason="no shared/data")


def _settings(train=_TRAIN, **more):
  return config_lib.Evaluate(
      task="gsm8k", train_file=str(train), test_file=str(_TEST), **more
  )


def _questions(file):
  lines = file.read_text(encoding="utf-8").splitlines()
  return [json.loads(line)["question"] for line in lines]


def _parts(prompt):
  """The questions in a prompt, normalised: of its shots, and its own."""
  *shots, own = [
      data.normal(part.rpartition("\nAnswer:")[0])
      for part in ("\n\n" + prompt).split("\n\nQuestion: ")[1:]
  ]
  return shots, own


def _check(settings, test):
  """That shots, development and test items are apart; how many there are."""
  items = evaluation.load(settings).items("dev", None)
  shots, own = zip(*map(_parts, [item.prompt for item in items]), strict=True)
  assert all(s == shots[0] for s in shots)
  shots, dev = set(shots[0]), set(own)
  assert len(dev) == len(items)
  assert not dev & shots
  assert not dev & test and not shots & test
  return len(shots), len(dev)


@needs_data
@pytest.mark.parametrize("shots", [0, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_shots_development_and_test_items_are_apart(shots, seed):
  test = set(map(data.normal, _questions(_TEST)))
  found = _check(_settings(shots=shots, split_seed=seed), test)
  # The package's five stay out whether they are shown or not.
  assert found == (shots, 7473 - max(shots, 5))


@needs_data
@pytest.mark.parametrize("seed", range(4))
def test_a_training_file_with_test_items_among_them(tmp_path, seed):
  leaked = _questions(_TEST)[:900]
  spelt = (str.upper, lambda q: f"  {q} ", lambda q: q.replace(" ", "\n"))
  rows = [
      {"question": spelt[i % 3](question), "answer": "#### 1"}
      for i, question in enumerate(leaked)
  ]
  train = tmp_path / "train.jsonl"
  sound = _TRAIN.read_text(encoding="utf-8").splitlines()[:100]
  train.write_text("\n".join([*map(json.dumps, rows), *sound]))
  test = set(map(data.normal, _questions(_TEST)))
  settings = _settings(train, shots=40, split_seed=seed)
  shots, dev = _check(settings, test)
  assert shots == 40 and 50 <= dev <= 65


# A whole run, with a stand-in for the sampler.

_DECODER = models.DecoderConfig(
    vocab_size=300, embed=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp=12
)


class _Words:
  """A stand-in for a tokenizer: a byte a token."""

  eos_token_id = 1

  def encode(self, text):
    return [byte + 2 for byte in text.encode()]


class _Sampler:
  """Writes programs, and answers by the weights' name; keeps what it saw."""

  engine = "stand-in 1.0"

  def __init__(self, archive, golds):
    self._archive, self._golds = archive, golds
    self.written, self.asked = [], {False: set(), True: set()}

  def swap_weights(self, params, version, lora=None):
    self._version = version

  def _is_right(self, prompt):
    return zlib.crc32(f"{self._version} {prompt}".encode()) % 2 == 1

  def generate(self, prompts, keys=None, **given):
    if keys is not None:
      for _ in range(len(prompts)):
        scale = len(self.written) % 7 / 10
        self.written.append(f"  return base + {scale} * task_vectors[0]\n")
        yield [sampling.Generation(self.written[-1], True)]
      return
    over = self._archive.is_done(records.LOOP, 0, store_lib.SEARCH)
    self.asked[over].update(prompts)
    yield [
        sampling.Generation(self._golds[p] if self._is_right(p) else "", True)
        for p in prompts
    ]


@pytest.mark.slow
@needs_data
def test_a_run_asks_test_questions_once_the_search_is_over(
    tmp_path, monkeypatch
):
  settings = _settings(dev_size=16, test_size=12, batch_size=16, racing=False)
  config = config_lib.Config(
      name="t",
      seed_model="seed",
      experts=("a", "b"),
      iterations=2,
      top_k=2,
      propose=config_lib.Propose(prompt="tiny", samples=6),
      evaluate=settings,
  )
  task = evaluation.load(settings)
  dev, test = task.items("dev", 16), task.items("test", 12)
  seed, a, b = (models.init_params(_DECODER, i) for i in range(3))
  merges = runner.Merges(seed, {"a": a, "b": b}, "mlp")
  loaded = worker_lib.Models(
      _DECODER, seed, merges, _Words(), pathlib.Path("seed")
  )
  trained = []

  def train(config, decoder, seed, adapter, data, *args, **kwargs):
    trained.append(data)
    return adapter, []

  prepare = lambda config, decoder, tokenizer, rows: rows
  monkeypatch.setattr(worker_lib.train_lib, "prepare", prepare)
  monkeypatch.setattr(worker_lib.train_lib, "train", train)
  monkeypatch.setattr(loop._Run, "_export", lambda run: None)
  with (
      store_lib.Store.create(
          tmp_path, config, {"model seed": "weights"}, {}
      ) as archive,
      sandbox.Sandbox(config.sandbox, merges.shapes, 2) as box,
  ):
    golds = {item.prompt: item.gold for item in (*dev, *test)}
    sampler = _Sampler(archive, golds)
    board = board_lib.Board(archive)
    executor = executor_lib.Local(config, loaded, box, sampler)
    loop._Run(config, archive, executor, board).run()
    responses = archive.responses("seed", records.DEV)

  assert sampler.asked[False] == {item.prompt for item in dev}
  assert sampler.asked[True] == {item.prompt for item in test}
  assert {r.prompt for r in responses} == {item.prompt for item in dev}
  # What DPO is given: the fixed prompt and what the factory wrote.
  (pairs,) = trained
  assert pairs
  assert len({pair["prompt"] for pair in pairs}) == 1
  assert {p[k] for p in pairs for k in ("chosen", "rejected")} <= set(
      sampler.written
  )
  seen = "".join([*sampler.written, pairs[0]["prompt"], *sampler.asked[False]])
  assert not any(question in seen for question in _questions(_TEST))
