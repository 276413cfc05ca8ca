"""A finished run of random models, scored by a sampler that only hashes."""

import contextlib
import hashlib
import pathlib
import shutil
import sqlite3

import jax
import numpy as np
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import evaluation
from selfdev_jax import loop
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import store as store_lib
from selfdev_jax.evaluation import racing
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.sampling import engine as engine_lib
from selfdev_jax.sandbox import trace
from selfdev_jax.sandbox import verify
from selfdev_jax.tiny import corpus

_DECODER = models.DecoderConfig(
    vocab_size=280,
    embed=8,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    mlp=8,
    max_positions=80,
)
_EVALUATE = config_lib.Evaluate(
    dev_size=8, test_size=6, batch_size=2, max_new_tokens=8, racing_block=3
)
_BODIES = {
    "best": "base + 0.9 * task_vectors[0] - 0.5 * task_vectors[1]",
    "stopped": "base + 0.3 * task_vectors[0] / jnp.std(task_vectors[1])",
    "broken": "base / (base - base)",
    "alike": "base - 0.5 * task_vectors[1] + 0.9 * task_vectors[0]",
    "waiting": "base + 0.1 * task_vectors[0]",
}
_BASELINES = ("seed", "ties:density=0.5,scale=1.0", "weights:0.3,0.2")


def _source(name):
  return f"def merge(base, task_vectors):\n  return {_BODIES[name]}\n"


class _Hashing:
  """Says what its weights, the prompt and the prompts beside it decide."""

  engine = "jax 0"

  def swap_weights(self, params, version, lora=None):
    self._weights = models.checksum(params)

  def generate(self, prompts, keys=None, *, batch_size, **unused):
    golds = {
        item.prompt: item.gold
        for items in evaluation.load_items(_EVALUATE).values()
        for item in items
    }
    for start in range(0, len(prompts), batch_size):
      texts = []
      for prompt in prompts[start : start + batch_size]:
        asked = repr((self._weights, prompt, prompts, batch_size))
        drawn = hashlib.sha256(asked.encode()).digest()[0]
        texts.append(golds[prompt] if drawn % 2 else f"{drawn}")
      yield [sampling.Generation(text, True) for text in texts]

  def close(self):
    pass


@pytest.fixture(scope="session")
def alone(merging_here):
  """A context in which merges and answers are made here, and are cheap."""

  @contextlib.contextmanager
  def context():
    with merging_here() as patch:
      patch.setattr(
          engine_lib, "open_sampler", lambda *args, **kwargs: _Hashing()
      )
      yield

  return context


@pytest.fixture(autouse=True, scope="module")
def here(alone):
  with alone():
    yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory, random_params, alone) -> pathlib.Path:
  """A directory with seed, a, b and run; not to be changed."""
  root = tmp_path_factory.mktemp("handover")
  documents = [corpus.Document("two and two is", "four")]
  tokenizer = corpus.train_tokenizer(documents, _DECODER.vocab_size)
  corpus.save_tokenizer(tokenizer, root / "tokenizer")
  seed = random_params(_DECODER)
  rng = np.random.default_rng(1)
  tune = lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32)
  for name in ("seed", "a", "b"):
    params = seed if name == "seed" else jax.tree.map(tune, seed)
    convert.save(root / name, _DECODER, params, root / "tokenizer")
  config = config_lib.Config(
      name="t",
      seed_model=str(root / "seed"),
      experts=(str(root / "a"), str(root / "b")),
      iterations=1,
      sampler="jax",
      evaluate=_EVALUATE,
  )
  paths = {
      name: pathlib.Path(name) for name in (config.seed_model, *config.experts)
  }
  items = evaluation.load_items(_EVALUATE)
  identity = {f"model {name}": convert.digest(name) for name in paths}
  identity["items"] = evaluation.digest(
      [item for part in items.values() for item in part]
  )
  session = {"jax": "0", "device": "cpu", "command": "self_develop --x=1"}
  with (
      store_lib.Store.create(root / "run", config, identity, session) as store,
      alone(),
      contextlib.ExitStack() as stack,
  ):
    _fill(store, worker_lib.load(config, paths, stack), items)
  return root


def _fill(store, loaded, items):
  digests = {}
  with store.activity(records.LOOP, 1, "propose"):
    store.add_factory(1, "")
    store.add_completions(
        [
            records.Completion(records.LOOP, 1, i, _source(name), True, "jax 0")
            for i, name in enumerate(_BODIES)
        ]
    )
  with store.activity(records.LOOP, 1, "admit"):
    for i, name in enumerate(_BODIES):
      traced = trace.trace(_source(name), loaded.merges.shapes, 2, 5000)
      found = verify.verify(
          traced, config_lib.Sandbox(), loaded.merges.shapes, 2
      )
      digests[name] = found.digest
      verdict = records.Verdict(records.LOOP, 1, i, _source(name), found.digest)
      store.add_verdict(verdict, found.program, found.stats)
    store.add_candidates(records.LOOP, 1, list(digests.values()))
  program = lambda name: records.PROGRAM + digests[name]

  def score(model, split, ends):
    merged = worker_lib.merge(loaded, model, store.program_of(model))
    if merged.failure:
      empty = records.Score(
          model, split, len(items[split]), None, failure=merged.failure
      )
      store.add_score(empty)
      return
    sampler, first = _Hashing(), 0
    sampler.swap_weights(merged.params, model)
    for end in ends:
      task, asked = evaluation.load(_EVALUATE), items[split][first:end]
      responses = worker_lib.respond(sampler, task, _EVALUATE, asked, first)
      correct = sum(r.correct for r in responses)
      store.add_score(
          records.Score(
              model,
              split,
              end - first,
              correct,
              engine=sampler.engine,
              items=len(items[split]),
              weights=models.checksum(merged.params),
          ),
          responses,
      )
      first = end

  blocks = racing.block_ends(8, 3)
  with store.activity(records.LOOP, 0, "single models"):
    score("seed", records.DEV, [8])
  with store.activity(records.LOOP, 1, "evaluate"):
    score(program("best"), records.DEV, blocks)
    score(program("stopped"), records.DEV, blocks[:2])
    score(program("broken"), records.DEV, [8])
    own = store.scores(records.DEV)[program("best")]
    store.add_score(
        records.Score(
            program("alike"),
            records.DEV,
            own.n,
            own.correct,
            engine=own.engine,
            reused=own.model,
        )
    )
  with store.activity(records.LOOP, 0, "ties"):
    for model in _BASELINES[1:]:
      score(model, records.DEV, blocks)
  with store.stage(records.LOOP, 0, store_lib.SEARCH):
    pass
  with store.activity(records.LOOP, 0, "best"):
    for model in (*_BASELINES, program("best"), program("alike")):
      score(model, records.TEST, [6])
  with store.stage(records.LOOP, 0, loop.LAST_STAGE):
    pass


@pytest.fixture(scope="session")
def digests(finished) -> dict[str, str]:
  """Of the programs, by name."""
  with store_lib.Store.read(finished / "run") as store:
    found = store.verdicts()
  return {name: found[i].digest for i, name in enumerate(_BODIES)}


@pytest.fixture(scope="session")
def sources() -> dict[str, str]:
  """Of the programs, by name."""
  return {name: _source(name) for name in _BODIES}


@pytest.fixture
def changed(finished, tmp_path):
  """changed(sql, ...) -> the workdir of a copy in which that was run."""

  def change(*statements):
    shutil.copytree(finished / "run", tmp_path / "run")
    with contextlib.closing(
        sqlite3.connect(tmp_path / "run" / store_lib.ARCHIVE)
    ) as db:
      for statement in statements:
        assert db.execute(statement).rowcount > 0
      db.commit()
    return tmp_path / "run"

  return change
