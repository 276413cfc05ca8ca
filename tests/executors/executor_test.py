"""A host's own work: what is merged when, and what comes of it."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax.executors import executor as executor_lib
from selfdev_jax.executors import work as work_lib
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.sandbox import runner
from selfdev_jax.sandbox import trace
from selfdev_jax.sandbox import verify

_DECODER = models.DecoderConfig(
    vocab_size=300, embed=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp=12
)
_CONFIG = config_lib.Config(
    name="t",
    seed_model="seed",
    experts=("a", "b"),
    propose=config_lib.Propose(max_new_tokens=3, batch_size=2),
    evaluate=config_lib.Evaluate(
        dev_size=6, test_size=4, batch_size=2, max_new_tokens=6
    ),
)
_TIES = "ties:density=0.5,scale=1.0"
_WEIGHTS = "weights:0.5,-0.9"


class _Words:
  """A stand-in for a tokenizer: a byte a token."""

  eos_token_id = 1

  def encode(self, text):
    return [byte + 2 for byte in text.encode()]

  def decode(self, tokens):
    return bytes(int(t) - 2 for t in tokens if 2 <= t < 258).decode("latin1")


@pytest.fixture(scope="module")
def params(random_params):
  """Of the seed model and its experts, by name."""
  seed, rng = random_params(_DECODER), np.random.default_rng(1)
  tune = lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32)
  trees = {name: jax.tree.map(tune, seed) for name in _CONFIG.experts}
  return jax.tree.map(jax.numpy.asarray, {"seed": seed, **trees})


@pytest.fixture
def loaded(params, tmp_path):
  experts = {name: params[name] for name in _CONFIG.experts}
  merges = runner.Merges(params["seed"], experts, "mlp")
  convert.save(tmp_path / "seed", _DECODER, params["seed"])
  return worker_lib.Models(
      _DECODER, params["seed"], merges, _Words(), tmp_path / "seed"
  )


def _local(loaded):
  sampler = sampling.JaxSampler(_DECODER, _Words(), (1,))
  return executor_lib.Local(_CONFIG, loaded, None, sampler)


def _worker(loaded):
  sampler = sampling.JaxSampler(_DECODER, _Words(), (1,))
  return worker_lib.Worker(loaded, sampler, _CONFIG.evaluate)


@pytest.fixture
def merged(monkeypatch):
  """Names of what was merged."""
  merge, names = worker_lib.merge, []

  def counted(loaded, name, program=""):
    names.append(name)
    return merge(loaded, name, program)

  monkeypatch.setattr(worker_lib, "merge", counted)
  return names


def _failing(monkeypatch, times):
  """Merges fail so often, then no more."""
  merge, left = worker_lib.merge, ["memory"] * times
  again = lambda *about: (
      runner.Merged(None, left.pop()) if left else merge(*about)
  )
  monkeypatch.setattr(worker_lib, "merge", again)


def _work(model, first=0, before=6, split=records.DEV, is_known=False):
  return work_lib.Answer(model, split, first, before, is_known)


def _none(model):
  """The IR behind a baseline's name."""
  del model
  return ""


def _all(executor, works):
  """What comes of works, in their order."""
  works, found = list(works), []
  for answered in executor.answer(lambda: iter(works), _none):
    works.pop(0)
    found.append(answered)
  return found


def test_both_splits_are_loaded_once():
  items = evaluation.load_items(_CONFIG.evaluate)
  assert {split: len(part) for split, part in items.items()} == {
      records.DEV: 6,
      records.TEST: 4,
  }
  dev, test = ({item.prompt for item in part} for part in items.values())
  assert not dev & test
  again = config_lib.Evaluate(**vars(_CONFIG.evaluate))
  assert evaluation.load_items(again) is items
  more = dataclasses.replace(_CONFIG.evaluate, dev_size=7)
  assert len(evaluation.load_items(more)[records.DEV]) == 7


@pytest.mark.parametrize(
    ("split", "first", "before"), [(records.DEV, 2, 5), (records.TEST, 0, 4)]
)
def test_the_items_that_are_named_are_answered(loaded, split, first, before):
  answered = _worker(loaded).answer(_work(_TIES, first, before, split))
  assert [r.item for r in answered.responses] == list(range(first, before))
  items = evaluation.load_items(_CONFIG.evaluate)[split][first:before]
  assert [(r.prompt, r.gold) for r in answered.responses] == [
      (item.prompt, item.gold) for item in items
  ]


def test_a_model_stays_over_its_blocks(loaded, merged):
  works = [
      _work(_TIES, 0, 2),
      _work(_TIES, 2, 6),
      _work(_WEIGHTS),
      _work(_TIES, 0, 4, records.TEST),
      _work(_TIES, 0, 2),
  ]
  found = _all(_local(loaded), works)
  assert merged == [_TIES, _WEIGHTS, _TIES]
  assert [answered.merge_s > 0 for answered in found] == [1, 0, 1, 1, 0]
  weights = [answered.weights for answered in found]
  assert len(set(weights)) == 2 and weights[0] == weights[1] == weights[4]
  params, _ = worker_lib.merge(loaded, _TIES)
  assert weights[0] == models.checksum(params)
  # The same as in one block, by a worker that has seen nothing else.
  whole = _worker(loaded).answer(_work(_TIES))
  assert whole.responses == found[0].responses + found[1].responses
  assert [r.text for r in whole.responses] != [
      r.text for r in found[2].responses
  ]
  assert {answered.engine for answered in found} == {sampling.JaxSampler.engine}


def test_what_is_next_is_asked_after_each(loaded, merged):
  seed = _work("seed", 0, 2)
  plans = iter([[seed, _work(_TIES)], [_work(_WEIGHTS)], []])
  found = list(_local(loaded).answer(lambda: iter(next(plans)), _none))
  assert merged == ["seed", _WEIGHTS]
  assert [len(answered.responses) for answered in found] == [2, 6]


def test_a_failed_merge_is_a_result_and_leaves_nothing_in_the_sampler(
    loaded, merged
):
  source = "def merge(base, task_vectors):\n  return base / (base - base)\n"
  traced = trace.trace(source, loaded.merges.shapes, 2, 5000)
  program = verify.verify(
      traced, config_lib.Sandbox(), loaded.merges.shapes, 2
  ).program
  broken = work_lib.Answer("program:x", records.DEV, 0, 6, False, program)
  # It is merged into the buffers of the one before.
  found = _all(_local(loaded), [_work(_TIES), broken, _work(_TIES)])
  assert merged == [_TIES, "program:x", _TIES]
  failed = found.pop(1)
  assert (failed.failure, failed.responses) == ("non_finite", ())
  assert failed.weights == "" and failed.evaluate_s == 0 < failed.merge_s
  assert found[0].responses == found[1].responses
  assert found[0].weights == found[1].weights


def test_who_was_merged_before_is_tried_twice(loaded, monkeypatch):
  _failing(monkeypatch, 1)
  (found,) = _all(_local(loaded), [_work(_TIES, is_known=True)])
  assert not found.failure and len(found.responses) == 6
  _failing(monkeypatch, 1)
  (found,) = _all(_local(loaded), [_work(_TIES)])
  assert found.failure == "memory"


def test_who_was_merged_before_and_is_not_now_ends_the_run(loaded, monkeypatch):
  _failing(monkeypatch, 2)
  with pytest.raises(errors.UserError) as error:
    _all(_local(loaded), [_work(_TIES, is_known=True)])
  said = str(error.value)
  assert said.startswith(f"{_TIES} was merged before and now is not (memory);")
  assert "\n" not in said


def test_work_that_is_not_wanted_is_left_between_batches(loaded, merged):
  worker, asked = _worker(loaded), []

  def is_stopped():
    asked.append(None)
    return len(asked) == 3

  with pytest.raises(worker_lib.StoppedError):
    worker.answer(_work(_TIES), is_stopped)
  assert len(asked) == 3  # Once it was merged, then after two of 3 batches.
  # The model is still there, and nothing of what was left.
  again = worker.answer(_work(_TIES))
  assert merged == [_TIES] and again.merge_s == 0
  assert again.responses == _worker(loaded).answer(_work(_TIES)).responses
  with pytest.raises(worker_lib.StoppedError):
    worker.answer(_work(_WEIGHTS), lambda: True)
  assert worker.answer(_work(_WEIGHTS)).merge_s == 0


def test_a_factory_takes_the_place_of_a_merged_model(loaded, merged):
  keys = jax.random.split(jax.random.key(3), 5)
  executor = _local(loaded)
  before = _all(executor, [_work(_TIES)])
  work = work_lib.Sample("seed", "1+", np.asarray(jax.random.key_data(keys)), 1)
  batches = list(executor.sample(work, None))
  assert [len(batch) for batch in batches] == [2, 2, 1]
  sampler = sampling.JaxSampler(_DECODER, _Words(), (1,))
  sampler.swap_weights(loaded.seed, "seed")
  for i, generation in enumerate(itertools.chain(*batches)):
    ((alone,),) = sampler.generate(
        ["1+"], keys[i : i + 1], max_new_tokens=3, batch_size=2, temperature=1
    )
    assert generation == alone
  after = _all(executor, [_work(_TIES)])
  assert merged == [_TIES, _TIES]
  assert after[0].responses == before[0].responses


def test_a_model_is_exported_or_it_is_told(loaded, monkeypatch, tmp_path):
  executor = _local(loaded)
  executor.export(_TIES, "", tmp_path / "best")
  config, found = convert.load(tmp_path / "best")
  assert config == convert.read_config(tmp_path / "seed")
  params, _ = worker_lib.merge(loaded, _TIES)
  assert models.checksum(found) == models.checksum(params)
  _failing(monkeypatch, 1)
  with pytest.raises(errors.UserError, match=r"merged before .*\(memory\)"):
    executor.export(_TIES, "", tmp_path / "lost")
  assert not (tmp_path / "lost").exists()
