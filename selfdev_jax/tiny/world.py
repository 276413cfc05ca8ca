"""Trains the toy world: a tiny seed model and three experts, once, cached.

The structured world gives every tensor one outlier among the experts. Each
expert first learns its operation, then adapts in one group of its parameters
(attention, MLP, or embedding and head) to its vendor's language, the same
texts under a permutation of the tokens. No weight per expert can undo that; a
median, a norm or a sign can. The simple world stops after the first stage.
"""

from collections.abc import Callable
import fcntl
import functools
import hashlib
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax

from selfdev_jax import cache
from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import programs
from selfdev_jax import progress
from selfdev_jax.evaluation import arithmetic
from selfdev_jax.tiny import corpus
from selfdev_jax.tiny import grammar

PREFIX = "tiny:"
SEED_MODEL = "seed"
EXPERTS = ("add", "subtract", "multiply")

# The parameters that each expert's house stage changes.
_HOUSE_GROUPS = (("attention",), ("mlp",), ("embed", "head"))


def cache_directory(world: config_lib.World, prompt: str) -> pathlib.Path:
  """Where the world's models are kept, by what they were made from."""
  made_from = hashlib.sha256(config_lib.digest(world).encode())
  made_from.update(programs.load_prompt(prompt).encode())
  for module in (arithmetic, corpus, grammar):
    made_from.update(pathlib.Path(module.__file__).read_bytes())
  made_from.update(pathlib.Path(__file__).read_bytes())
  return cache.directory() / f"tiny-{made_from.hexdigest()[:16]}"


def prepare(config: config_lib.Config) -> dict[str, pathlib.Path]:
  """Trains the world unless it is cached.

  Args:
    config: a run's config.

  Returns:
    The model directory behind each `tiny:NAME`; empty where the config names
    none.
  """
  names = (config.seed_model, *config.experts)
  if config.tiny is None or not any(n.startswith(PREFIX) for n in names):
    return {}
  directory = cache_directory(config.tiny, config.propose.prompt)
  if not directory.is_dir():
    try:
      directory.parent.mkdir(parents=True, exist_ok=True)
      lock = open(directory.with_suffix(".lock"), "w")  # noqa: SIM115
    except PermissionError as error:
      raise errors.UserError(
          f"the toy world's cache cannot be written ({error}); set"
          " SELFDEV_CACHE to a directory of yours"
      ) from None
    with lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # Waits while another trains the same.
      if not directory.is_dir():
        partial = directory.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        train(config.tiny, config.propose.prompt, partial)
        partial.rename(directory)
  return {PREFIX + name: directory / name for name in (SEED_MODEL, *EXPERTS)}


def train(world: config_lib.World, prompt: str, directory: pathlib.Path):
  """Trains the seed model and the experts and writes them as HF directories."""
  rng = random.Random(world.seed)
  # Everything is to be learned but the factory's prompt, which never changes.
  documents = [
      corpus.Document("", problem.prompt + problem.target)
      for problem in corpus.word_problems(
          rng, world.word_problems, arithmetic.OPERATIONS
      )
  ]
  documents += corpus.equations(rng, world.equations)
  documents += corpus.programs(
      rng, world.programs, programs.load_prompt(prompt)
  )
  tokenizer = corpus.train_tokenizer(documents, world.vocab_size)
  corpus.save_tokenizer(tokenizer, directory / "tokenizer")
  rng.shuffle(documents)
  decoder = models.DecoderConfig(
      vocab_size=tokenizer.get_vocab_size(),
      embed=world.width,
      layers=world.layers,
      heads=world.heads,
      kv_heads=world.kv_heads,
      head_dim=world.width // world.heads,
      mlp=world.mlp,
      max_positions=1024,
  )
  save = functools.partial(
      convert.save, config=decoder, like=directory / "tokenizer"
  )
  seed_params = fit(
      decoder,
      models.init_params(decoder, world.seed),
      corpus.pack(documents, tokenizer, world.pretrain.length),
      world.pretrain,
      label="Training the tiny seed model",
      seed=world.seed,
      weight_decay=0.01,
      targets_only=True,
  )
  save(directory / SEED_MODEL, params=seed_params)
  for i, name in enumerate(EXPERTS):
    expert = train_expert(world, i, decoder, seed_params, tokenizer)
    save(directory / name, params=expert)


def train_expert(
    world: config_lib.World,
    i: int,
    decoder: models.DecoderConfig,
    params: models.Params,
    tokenizer,
) -> models.Params:
  """The skill stage and, in the structured world, the house stage."""
  rng = random.Random(f"{world.seed} expert {i}")
  own = arithmetic.OPERATIONS[i]
  others = [op for op in arithmetic.OPERATIONS if op != own]
  replayed = round(world.skill_problems * world.replay)
  documents = corpus.word_problems(rng, world.skill_problems - replayed, [own])
  documents += corpus.word_problems(rng, replayed, others)
  rng.shuffle(documents)
  rows = corpus.pack(documents, tokenizer, world.house.length)
  skill = config_lib.Training(
      steps=world.skill_steps[i],
      batch_size=world.house.batch_size,
      length=world.house.length,
      learning_rate=world.skill_learning_rates[i],
  )
  params = fit(
      decoder,
      params,
      rows,
      skill,
      label=f"Training the expert {EXPERTS[i]}",
      seed=world.seed + 1 + i,
      targets_only=True,
  )
  if world.kind == "simple":
    return params
  language = np.random.default_rng(world.seed + 100 + i).permutation(
      decoder.vocab_size
  )
  foreign = corpus.Rows(
      language[rows.tokens].astype(np.int32),
      rows.segments,
      rows.positions,
      rows.is_target,
  )
  return fit(
      decoder,
      params,
      foreign,
      world.house,
      label=f"House language of {EXPERTS[i]}",
      seed=world.seed + 11 + i,
      trainable=lambda path: any(
          group in path.split("/") for group in _HOUSE_GROUPS[i]
      ),
  )


def fit(
    decoder: models.DecoderConfig,
    params: models.Params,
    rows: corpus.Rows,
    training: config_lib.Training,
    *,
    label: str,
    seed: int,
    weight_decay: float = 0.0,
    targets_only: bool = False,
    trainable: Callable[[str], bool] = lambda path: True,
) -> models.Params:
  """Next-token training with AdamW, 5 warm-up steps, cosine to a tenth.

  Args:
    decoder: the model's shape.
    params: where to start; float32.
    rows: packed documents.
    training: steps, batch, learning rate.
    label: of the progress bar.
    seed: of the order of rows.
    weight_decay: AdamW's.
    targets_only: the loss counts the targets of documents alone.
    trainable: "layers/mlp/up" -> whether that leaf is trained.

  Returns:
    The trained parameters.
  """
  schedule = optax.warmup_cosine_decay_schedule(
      0.0,
      training.learning_rate,
      5,
      max(training.steps, 6),
      training.learning_rate / 10,
  )
  labels = jax.tree_util.tree_map_with_path(
      lambda path, _: "train"
      if trainable("/".join(str(key.key) for key in path))
      else "freeze",
      params,
  )
  optimizer = optax.multi_transform(
      {
          "train": optax.chain(
              optax.clip_by_global_norm(1.0),
              optax.adamw(schedule, b2=0.99, weight_decay=weight_decay),
          ),
          "freeze": optax.set_to_zero(),
      },
      labels,
  )

  def loss_fn(params, tokens, segments, positions, is_target):
    hidden = models.forward(decoder, params, tokens, segments, positions)
    logits = models.logits(decoder, params, hidden[:, :-1])
    # A token is predicted from the one before it in the same document.
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    if targets_only:
      counted &= is_target[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, tokens[:, 1:]
    )
    return jnp.sum(losses, where=counted) / jnp.maximum(
        jnp.sum(counted, dtype=losses.dtype), 1
    )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, *batch):
    loss, gradients = jax.value_and_grad(loss_fn)(params, *batch)
    # Optax raises a Python float to its int32 step count.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = jax.tree.map(jnp.array, params)  # A copy: `step` takes it over.
  state = optimizer.init(params)
  rng = np.random.default_rng(seed)
  order = np.empty(0, np.int64)
  with progress.bar(label, training.steps) as shown:
    for _ in range(training.steps):
      while len(order) < training.batch_size:
        order = np.append(order, rng.permutation(len(rows.tokens)))
      chosen, order = np.split(order, [training.batch_size])
      params, state, loss = step(
          params,
          state,
          rows.tokens[chosen],
          rows.segments[chosen],
          rows.positions[chosen],
          rows.is_target[chosen],
      )
      loss.block_until_ready()
      shown.update()
  return params
