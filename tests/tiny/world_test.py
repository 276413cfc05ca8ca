import dataclasses
import pathlib
import random

import jax
import numpy as np
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax import programs
from selfdev_jax.evaluation import arithmetic
from selfdev_jax.tiny import corpus
from selfdev_jax.tiny import world

_WORLD = config_lib.World(
    vocab_size=300,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp=24,
    word_problems=40,
    equations=40,
    programs=4,
    pretrain=config_lib.Training(steps=3, batch_size=2, length=256),
    skill_steps=(2, 2, 2),
    skill_problems=20,
    house=config_lib.Training(steps=2, batch_size=2, length=64),
)
_CONFIG = config_lib.Config(
    name="t",
    seed_model="tiny:seed",
    experts=("tiny:add", "tiny:subtract", "tiny:multiply"),
    propose=config_lib.Propose(prompt="tiny"),
    tiny=_WORLD,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The directories of a world, trained for a few steps into a cache."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("SELFDEV_CACHE", str(tmp_path_factory.mktemp("cache")))
    directories = world.prepare(_CONFIG)
    patch.setattr(world, "train", None)  # From here on all is cached.
    assert world.prepare(_CONFIG) == directories
  return directories


@pytest.mark.slow
def test_each_expert_adapted_one_group(trained):
  leaves = {}
  for name, directory in trained.items():
    _, params = convert.load(directory)
    leaves[name] = {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
  seed = leaves.pop("tiny:seed")
  assert set(leaves) == set(_CONFIG.experts)
  for expert in leaves.values():  # The skill stage moved every leaf.
    assert all(not np.array_equal(expert[k], seed[k]) for k in seed)


@pytest.mark.slow
@pytest.mark.parametrize("i", range(3))
def test_the_house_stage_leaves_the_other_groups(i, monkeypatch):
  calls = []
  fit = world.fit

  def spy(decoder, params, rows, training, **options):
    result = fit(decoder, params, rows, training, **options)
    calls.append((params, rows, options, result))
    return result

  monkeypatch.setattr(world, "fit", spy)
  documents = corpus.word_problems(random.Random(0), 40, arithmetic.OPERATIONS)
  tokenizer = corpus.train_tokenizer(documents, 300)
  decoder = models.DecoderConfig(300, 16, 2, 2, 1, 8, 24)
  params = models.init_params(decoder, 0)
  world.train_expert(_WORLD, i, decoder, params, tokenizer)
  (_, native, skill, _), (before, foreign, house, after) = calls
  assert skill["targets_only"] and not house.get("targets_only", False)
  groups = [("attention",), ("mlp",), ("embed", "head")][i]
  for path, leaf in jax.tree_util.tree_leaves_with_path(after):
    keys = [key.key for key in path]
    old = before
    for key in keys:
      old = old[key]
    changed = not np.array_equal(old, leaf)
    assert changed == any(group in keys for group in groups), keys
  # The same texts in another language: a one-to-one renaming of tokens.
  pairs = set(zip(native.tokens.flat, foreign.tokens.flat, strict=True))
  assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
  assert any(a != b for a, b in pairs)


@pytest.mark.slow
def test_training_lowers_the_loss_of_what_it_counts():
  documents = corpus.equations(random.Random(0), 200)
  tokenizer = corpus.train_tokenizer(documents, 290)
  rows = corpus.pack(documents, tokenizer, 32)
  decoder = models.DecoderConfig(290, 16, 1, 2, 1, 8, 24)
  start = models.init_params(decoder, 0)
  training = config_lib.Training(
      steps=40, batch_size=8, length=32, learning_rate=1e-2
  )
  end = world.fit(decoder, start, rows, training, label="Training", seed=0)

  def loss(params):
    hidden = models.forward(
        decoder, params, rows.tokens, rows.segments, rows.positions
    )
    logps = jax.nn.log_softmax(models.logits(decoder, params, hidden))
    same = rows.segments[:, 1:] == rows.segments[:, :-1]
    picked = np.take_along_axis(
        np.asarray(logps[:, :-1]), rows.tokens[:, 1:, None], axis=-1
    )[..., 0]
    return -picked[same & (rows.segments[:, 1:] > 0)].mean()

  assert loss(end) < 0.6 * loss(start)


def test_the_cache_is_named_by_all_that_made_it(monkeypatch, tmp_path):
  monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path))
  name = world.cache_directory(_WORLD, "tiny")
  assert name == world.cache_directory(_WORLD, "tiny")
  assert name.parent == tmp_path
  other = dataclasses.replace(_WORLD, seed=1)
  assert world.cache_directory(other, "tiny") != name
  assert world.cache_directory(_WORLD, "default") != name
  grammar = tmp_path / "grammar.py"
  source = pathlib.Path(world.grammar.__file__).read_text()
  grammar.write_text(source + "# Changed.\n")
  monkeypatch.setattr(world.grammar, "__file__", str(grammar))
  assert world.cache_directory(_WORLD, "tiny") != name


def test_no_world_is_trained_for_other_models(monkeypatch):
  monkeypatch.setattr(world, "train", None)
  config = dataclasses.replace(_CONFIG, seed_model="/a", experts=("/b",))
  assert world.prepare(config) == {}


def test_the_prompt_ends_where_a_program_body_begins():
  assert programs.load_prompt("tiny").endswith("task_vectors):\n")
