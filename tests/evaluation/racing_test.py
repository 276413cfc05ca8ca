import copy
import itertools
import math
import time

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from selfdev_jax.evaluation import racing


def _run(answers, reference, top, bottom, error=0.05, block=10):
  """Items asked of each model, in a race over known answers."""
  models, size = answers.shape
  ends = racing.block_ends(size, block)
  race = racing.Race(models, reference, ends, top, bottom, error)
  asked = np.zeros(models, int)
  while (turn := race.turn()) is not None:
    model, first, last = turn
    assert first == asked[model] and last in ends
    race.add(model, answers[model, first:last])
    asked[model] = last
  return asked, race


def _ends(totals, top, bottom):
  """The best and the worst; ties to the earlier in both."""
  best = sorted(range(len(totals)), key=lambda i: -totals[i])[:top]
  worst = sorted(range(len(totals)), key=lambda i: totals[i])[:bottom]
  return set(best), set(worst)


def test_block_ends_reach_the_last_item():
  assert racing.block_ends(10, 4) == (4, 8, 10)
  assert racing.block_ends(8, 4) == (4, 8)
  assert racing.block_ends(3, 5) == (3,)


@pytest.mark.parametrize(
    "counts",
    [((6, 2, 1), (5, 3, 3)), ((9, 4, 4), (0, 0, 0)), ((4, 4, 2), (3, 3, 0))],
)
def test_the_interval_is_the_definition_over_all_populations(counts):
  """Prior over posterior of every population, by enumeration."""

  def log_ratio(size, seen, right):
    # Prior: the number is uniform, then every order is as likely.
    likelihood = lambda total: (
        math.comb(size - seen, total - right) / math.comb(size, total)
        if 0 <= total - right <= size - seen
        else 0.0
    )
    evidence = sum(likelihood(t) for t in range(size + 1)) / (size + 1)
    return {
        t: math.log(evidence / likelihood(t))
        for t in range(size + 1)
        if likelihood(t)
    }

  first, second = (log_ratio(*part) for part in counts)
  for log_odds in (0.7, 3.0, 9.0):
    inside = [
        a + b
        for a, b in itertools.product(first, second)
        if first[a] + second[b] < log_odds
    ]
    if inside:
      expected = min(inside), max(inside)
      assert racing.interval(*counts, log_odds) == expected


def test_an_interval_holds_as_often_as_it_says():
  rng = np.random.default_rng(0)
  size, error, missed, runs = 60, 0.2, 0, 1500
  reference = rng.uniform(size=size) < 0.6
  ends = racing.block_ends(size, 5)
  for _ in range(runs):
    # The population stays; the order is what is drawn.
    order = rng.permutation(size)
    answers = np.where(
        reference, np.arange(size) % 5 > 0, np.arange(size) % 4 < 1
    )
    race = racing.Race(1, reference[order], ends, 1, 0, error)
    race.add(0, answers[order])
    low, high = race._low[0], race._high[0]
    missed += not low <= answers.sum() <= high
  # A bound: the ratio exceeds 1/error at any block in at most this share.
  assert missed / runs <= error + 3 * math.sqrt(error * (1 - error) / runs)
  assert missed  # Otherwise the intervals would be far too wide.


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_what_cannot_be_told_apart_is_asked_everything(data):
  models = data.draw(st.integers(1, 8))
  size = data.draw(st.integers(1, 30))
  top = data.draw(st.integers(0, 3))
  bottom = data.draw(st.integers(0, 3))
  bits = st.lists(st.booleans(), min_size=size, max_size=size)
  answers = np.array([data.draw(bits) for _ in range(models)])
  asked, _ = _run(answers, data.draw(bits), top, bottom, error=1e-9, block=4)
  done = asked == size
  best, worst = _ends(answers.sum(1), top, bottom)
  # At this error only what is certain counts.
  assert all(done[i] for i in best | worst)


def test_clear_cases_stop_early_and_ties_go_to_the_earlier():
  rng = np.random.default_rng(1)
  skill = np.concatenate([[0.95, 0.95], np.full(30, 0.5), [0.02] * 3])
  answers = rng.uniform(size=(35, 400)) < skill[:, None]
  answers[1] = answers[0]
  reference = rng.uniform(size=400) < 0.5
  asked, race = _run(answers, reference, 1, 3)
  assert asked[0] == 400 and (asked[-3:] == 400).all()
  assert asked[2:32].max() < 200
  # The second has the same answers; the first comes before it.
  assert race.is_out(1)


def test_pairing_with_the_seed_model_narrows():
  rng = np.random.default_rng(2)
  reference = rng.uniform(size=1000) < 0.7
  answers = np.where(rng.uniform(size=1000) < 0.05, ~reference, reference)
  seen = slice(0, 400)
  right = int(answers[seen].sum())
  size = lambda mask: (
      int(mask.sum()),
      int(mask[seen].sum()),
      int(answers[seen][mask[seen]].sum()),
  )
  low, high = racing.interval(size(reference), size(~reference), 8.0)
  alone = racing.interval((1000, 400, right), (0, 0, 0), 8.0)
  assert low <= answers.sum() <= high
  assert high - low < 0.75 * (alone[1] - alone[0])


def test_who_has_failed_is_the_worst_and_is_not_asked():
  answers = np.tile([True, False], (4, 20))
  race = racing.Race(4, answers[0], racing.block_ends(40, 10), 0, 1, 0.05)
  race.fail(2)
  asked = []
  while (turn := race.turn()) is not None:
    model, first, last = turn
    asked.append(model)
    race.add(model, answers[model, first:last])
  assert asked == [0, 1, 3]  # One block each: none is worse than the failed.


def test_a_race_goes_on_where_it_was():
  rng = np.random.default_rng(3)
  answers = rng.uniform(size=(20, 200)) < rng.uniform(size=(20, 1))
  reference = rng.uniform(size=200) < 0.5
  whole, _ = _run(answers, reference, 2, 3)
  ends = racing.block_ends(200, 10)
  for stop in (5, 30, 61):
    race = racing.Race(20, reference, ends, 2, 3, 0.05)
    asked = np.zeros(20, int)
    for _ in range(stop):
      model, first, last = race.turn()
      race.add(model, answers[model, first:last])
      asked[model] = last
    race = racing.Race(20, reference, ends, 2, 3, 0.05)
    for model, n in enumerate(asked):
      race.add(model, answers[model, :n])
    while (turn := race.turn()) is not None:
      model, first, last = turn
      race.add(model, answers[model, first:last])
      asked[model] = last
    assert (asked == whole).all()


@st.composite
def _started(draw, models=8):
  """Answers of all, and a race with some of them, perhaps some failed."""
  models = draw(st.integers(0, models))
  size = draw(st.integers(1, 24))
  rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
  # Often equal, often clear: ties, and intervals that meet.
  skill = rng.choice([0.0, 0.5, 1.0], (models, 1))
  answers = rng.uniform(size=(models, size)) < skill
  race = racing.Race(
      models,
      rng.uniform(size=size) < 0.5,
      racing.block_ends(size, draw(st.integers(1, size))),
      *(draw(st.integers(0, models + 2)) for _ in range(2)),
      draw(st.sampled_from([0.05, 0.9])),
  )
  for model in rng.permutation(models)[: draw(st.integers(0, models))]:
    if rng.uniform() < 0.2:
      race.fail(int(model))
    else:
      done = (0, *race._ends)[rng.integers(len(race._ends) + 1)]
      race.add(int(model), answers[model, :done])
  return answers, race


def _is_out_by_pairs(race, model):
  """Counts who is surely better and who is surely worse."""
  low, high = race._low, race._high
  others = range(len(low))
  better = sum((low[j], -j) > (high[model], -model) for j in others)
  worse = sum((high[j], j) < (low[model], model) for j in others)
  return better >= race._top and worse >= race._bottom


def _turn_by_order(race):
  """Whose turn it is, from all models; the order of the rest is given."""
  done = lambda model: int(race._done[model])
  for model in range(len(race._done)):
    if not done(model):
      return model, 0, race._ends[0]
  for model in map(int, race._order()):
    if done(model) < race._ends[-1] and not _is_out_by_pairs(race, model):
      end = next(end for end in race._ends if end > done(model))
      return model, done(model), end
  return None


@hypothesis.given(_started(), st.integers(1, 40), st.randoms())
@hypothesis.settings(deadline=None, max_examples=200)
def test_looking_ahead_changes_nothing(started, most, rng):
  answers, race = started
  while True:
    expected = _turn_by_order(race)
    out = [_is_out_by_pairs(race, i) for i in range(len(answers))]
    left = race._ends[-1] - race._done
    assert race.missing == sum(left[~np.array(out, bool)])
    assert [race.is_out(i) for i in range(len(answers))] == out
    ahead = list(itertools.islice(race.ahead(), rng.randint(0, most)))
    assert race.turn() == expected
    assert ahead[:1] in ([], [expected])
    if expected is None:
      break
    model, first, last = expected
    race.add(model, answers[model, first:last])


@hypothesis.given(_started())
@hypothesis.settings(deadline=None, max_examples=100)
def test_ahead_is_what_comes_if_nobody_drops_out(started):
  answers, race = started
  ahead = list(race.ahead())
  # Nobody is out once it is not asked who is.
  low, high = race._low.copy(), race._high.copy()
  turns = []
  race._bound = lambda *_: None
  while (turn := race.turn()) is not None and len(turns) < len(ahead):
    model, first, last = turn
    turns.append(turn)
    race.add(model, answers[model, first:last])
  assert turns == ahead
  assert (race._low == low).all() and (race._high == high).all()
  if turn is not None:  # Now the first blocks are in.
    assert all(first == 0 for _, first, _ in ahead)


@hypothesis.given(_started(), st.integers(1, 12), st.randoms())
@hypothesis.settings(deadline=None, max_examples=200)
def test_answers_given_ahead_lead_to_the_same_race(started, window, rng):
  """Of what is asked ahead any part comes first; turns are taken in order."""
  answers, race = started
  alone = copy.deepcopy(race)
  turns = []
  while (turn := alone.turn()) is not None:
    turns.append(turn)
    model, first, last = turn
    alone.add(model, answers[model, first:last])
  given, taken = {}, []
  while race.turn() is not None:
    asked = list(itertools.islice(race.ahead(), window))
    for turn in rng.sample(asked, rng.randint(1, len(asked))):
      model, first, last = turn
      given[turn] = answers[model, first:last]
    while (turn := race.turn()) in given:
      race.add(turn[0], given[turn])
      taken.append(turn)
  assert taken == turns


def test_looking_ahead_does_not_look_at_all_models():
  models, size = 20_000, 200
  rng = np.random.default_rng(0)
  reference = rng.uniform(size=size) < 0.5
  ends = racing.block_ends(size, 50)
  race = racing.Race(models, reference, ends, 3, 10, 0.05)
  skill = rng.beta(4, 4, models)
  for model in range(500, models):  # What an earlier session has kept.
    race.add(model, rng.uniform(size=50) < skill[model])
  spent, turns = 0.0, 0
  while turns < 4000:
    start = time.perf_counter()
    ahead = list(itertools.islice(race.ahead(), 128))
    spent += time.perf_counter() - start
    if not ahead:
      break
    model, first, last = ahead[0]
    race.add(model, rng.uniform(size=last - first) < skill[model])
    turns += 1
  assert turns > 1000
  # About 0.05 ms a turn; a look at all models takes 10.
  assert spent / turns < 1e-3


def _worlds(rng, models, items):
  """Answers of models and of the seed model: skill against difficulty."""
  skill = np.where(
      rng.uniform(size=models) < 0.25,
      -4.0,
      rng.normal(0.5, 1.0, models),
  )
  skill = np.append(skill, 0.8)
  chance = 1 / (1 + np.exp(rng.normal(0, 1.5, items) - skill[:, None]))
  shared = rng.uniform(size=(models + 1, items)) < 0.8
  luck = np.where(
      shared, rng.uniform(size=items), rng.uniform(size=(models + 1, items))
  )
  answers = luck < chance
  return answers[:-1], answers[-1]


@pytest.mark.parametrize(
    "runs",
    [40, pytest.param(1000, marks=pytest.mark.slow)],
)
def test_simulated_runs_find_the_sets_of_full_evaluation(runs):
  equal, spent = 0, 0.0
  for seed in range(runs):
    answers, reference = _worlds(np.random.default_rng(seed), 100, 1000)
    asked, _ = _run(answers, reference, 3, 10, block=50)
    done = np.flatnonzero(asked == 1000)
    totals = answers.sum(1)
    found = [{int(done[i]) for i in end} for end in _ends(totals[done], 3, 10)]
    equal += tuple(found) == _ends(totals, 3, 10)
    spent += asked.sum() / answers.size
  assert equal >= 0.95 * runs
  assert spent / runs <= 0.5
