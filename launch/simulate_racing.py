r"""Simulates races: do they find what full evaluation finds, at what cost?

  python -m launch.simulate_racing                        # drawn answers
  python -m launch.simulate_racing --workdir=runs/whole   # a run's own answers

A run's own answers come from an archive in which every program answered every
item (--config.evaluate.racing=False): each simulated run takes programs of all
its iterations and arms and puts the items into another order. Drawn answers
come from skill against difficulty, half of what remains of chance shared by all
models, with the seed model at 70 %:

  wide       a quarter of the models broken, the others 55 +- 15 %
  clustered  a third anywhere below 50 %, the others 68 +- 4 %, near the seed
  tight      all 70 +- 2 %: as good as indistinguishable

The preference sets are the top 3 % and the bottom 10 %, as in the paper. Ends
in one line of JSON: how many runs had equal sets, the share of the answers that
was asked, and how far the mean accuracy of all models, on what each was asked,
lies from that on all items, in points.
"""

import json
import statistics

from absl import flags
import numpy as np

from launch import app
from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import preferences
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.evaluation import racing

_WORKDIR = flags.DEFINE_string("workdir", None, "A run without racing.")
_RUNS = flags.DEFINE_integer("runs", 1000, "To simulate, in each world.", 1)
_MODELS = flags.DEFINE_integer("models", 200, "That race.", 1)
_ITEMS = flags.DEFINE_integer("items", 1000, "Of the development set.", 1)
_BLOCK = flags.DEFINE_integer("block", 50, "Items between decisions.", 1)
_ERROR = flags.DEFINE_float(
    "error", config_lib.Evaluate().racing_error, "Of a race.", 1e-9, 0.5
)
_SEED_ACCURACY = 0.7
_SHARED = 0.5


def _wide(rng, models):
  broken = rng.beta(1, 20, models // 4) * 0.3
  return np.append(broken, rng.normal(0.55, 0.15, models - len(broken)))


def _clustered(rng, models):
  weak = rng.uniform(0, 0.5, models // 3)
  return np.append(weak, rng.normal(0.68, 0.04, models - len(weak)))


def _tight(rng, models):
  return rng.normal(0.7, 0.02, models)


_WORLDS = {"wide": _wide, "clustered": _clustered, "tight": _tight}


def _draw(world, rng):
  """[models, items] answers and the seed model's, right or wrong."""
  accuracy = rng.permutation(np.clip(world(rng, _MODELS.value), 0, 0.9))
  accuracy = np.append(accuracy, _SEED_ACCURACY)
  difficulty = rng.normal(0, 1.5, _ITEMS.value)
  chance = lambda skill: 1 / (1 + np.exp(difficulty - skill[:, None]))
  low, high = np.full(len(accuracy), -12.0), np.full(len(accuracy), 12.0)
  for _ in range(30):  # The skill that has this accuracy.
    middle = (low + high) / 2
    below = chance(middle).mean(1) < accuracy
    low, high = np.where(below, middle, low), np.where(below, high, middle)
  shape = (len(accuracy), _ITEMS.value)
  shared = rng.uniform(size=shape) < _SHARED
  luck = np.where(shared, rng.uniform(size=shape[1]), rng.uniform(size=shape))
  answers = luck < chance((low + high) / 2)
  return answers[:-1], answers[-1]


def _archived():
  """[programs, items] answers of a run and its seed model's."""
  with store_lib.Store.read(_WORKDIR.value) as archive:
    scores = archive.scores(records.DEV)
    own = [
        model
        for model, score in scores.items()
        if model.startswith(records.PROGRAM)
        and score.correct is not None
        and not score.reused
    ]
    if not own or not all(scores[model].complete for model in own):
      raise errors.UserError(
          f"{_WORKDIR.value} has no programs, or some that were stopped early;"
          " give a run with --config.evaluate.racing=False"
      )
    answers = np.array([archive.answers(m, records.DEV) for m in own])
    return answers, np.array(archive.answers("seed", records.DEV))


def _simulate(answers, reference):
  """Equal sets?, share of answers asked, shift of the mean accuracy."""
  models, items = answers.shape
  top, bottom = preferences.bands(config_lib.Preferences(), models)
  race = racing.Race(
      models,
      reference,
      racing.block_ends(items, _BLOCK.value),
      top,
      bottom,
      _ERROR.value,
  )
  asked = np.zeros(models, int)
  while (turn := race.turn()) is not None:
    model, first, last = turn
    race.add(model, answers[model, first:last])
    asked[model] = last
  totals = answers.sum(1)

  def ends(kept):
    best = sorted(kept, key=lambda i: -totals[i])[:top]
    return set(best), set(sorted(kept, key=lambda i: totals[i])[:bottom])

  said = [row[:n].mean() for row, n in zip(answers, asked, strict=True)]
  return (
      ends(np.flatnonzero(asked == items).tolist()) == ends(range(models)),
      asked.sum() / answers.size,
      100 * float(np.mean(said) - answers.mean()),
  )


def _world(name):
  """From a seed to the answers of a simulated run."""
  if name in _WORLDS:
    return lambda seed: _draw(_WORLDS[name], np.random.default_rng(seed))
  pool, reference = _archived()

  def draw(seed):
    rng = np.random.default_rng(seed)
    count = min(_MODELS.value, len(pool))
    chosen = rng.choice(len(pool), count, replace=False)
    order = rng.permutation(pool.shape[1])
    return pool[chosen][:, order], reference[order]

  return draw


def main(_):
  result = {"runs": _RUNS.value, "block": _BLOCK.value, "error": _ERROR.value}
  for name in ("archive",) if _WORKDIR.value else _WORLDS:
    draw = _world(name)
    rows = []
    with progress.bar(f"Simulating, {name}", _RUNS.value, "run") as bar:
      for seed in range(_RUNS.value):
        answers, reference = draw(seed)
        rows.append(_simulate(answers, reference))
        bar.update()
    equal, spent, shift = zip(*rows, strict=True)
    result[name] = {
        "models": answers.shape[0],
        "items": answers.shape[1],
        "equal": sum(equal),
        "asked": statistics.fmean(spent),
        "mean_shift": statistics.fmean(shift),
        "mean_shift_sd": statistics.pstdev(shift),
    }
    row = result[name]
    print(
        f"{name}: {row['models']} models, {row['items']} items:"
        f" equal sets in {row['equal']} of {_RUNS.value},"
        f" {100 * row['asked']:.1f} % of the answers asked,"
        f" mean {row['mean_shift']:+.2f} +- {row['mean_shift_sd']:.2f} points"
    )
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
