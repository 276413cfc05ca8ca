"""Scores to pairs: who is chosen, who is rejected, and that test stays out."""

import ast
import dataclasses
import inspect
import itertools
import pathlib
import random

from absl.testing import parameterized
import numpy as np
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import preferences
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.evaluation import racing

_CONFIG = config_lib.Preferences(
    top_fraction=0.2, bottom_fraction=0.3, elites=2
)


def _writing(text, item=0, iteration=2):
  return preferences.Writing(iteration, item, text)


def _candidates(*correct, prefix="p", split=records.DEV):
  return [
      preferences.Candidate(
          writing=_writing(f"text {prefix}{i}", i),
          digest=f"{prefix}{i}",
          score=records.Score(f"program:{prefix}{i}", split, 10, n),
      )
      for i, n in enumerate(correct)
  ]


def _build(candidates, *, earlier=(), invalid=(), seed=0, **changes):
  return preferences.build(
      dataclasses.replace(_CONFIG, **changes),
      2,
      candidates,
      earlier,
      [_writing(text, 90 + i) for i, text in enumerate(invalid)],
      "the prompt",
      seed,
  )


def _digests(pairs):
  return [(pair.chosen_digest, pair.rejected_digest) for pair in pairs]


class BuildTest(parameterized.TestCase):

  def test_who_was_stopped_is_at_neither_end_but_counts(self):
    whole = _candidates(5, 9, 1, 7, 2, 3, 6, 8, 4, 0)
    expected = _digests(_build(whole))
    raced = list(whole)
    for i, n in ((0, 4), (5, 1), (6, 4), (3, 2)):  # In between, of 4 answers.
      score = dataclasses.replace(whole[i].score, n=4, correct=n)
      raced[i] = dataclasses.replace(whole[i], score=score)
    self.assertFalse(raced[0].score.complete)
    self.assertEqual(_digests(_build(raced)), expected)
    # Nor is it an elite of a later iteration.
    self.assertEqual(
        _digests(_build(_candidates(3, 4, 5), earlier=[raced])),
        _digests(_build(_candidates(3, 4, 5), earlier=[whole])),
    )

  def test_bands_are_what_build_takes(self):
    self.assertEqual(preferences.bands(_CONFIG, 100), (20, 30))
    self.assertEqual(preferences.bands(_CONFIG, 5), (2, 2))
    self.assertEqual(preferences.bands(_CONFIG, 1), (2, 1))

  def test_top_meets_bottom(self):
    pairs = _build(_candidates(5, 9, 1, 7, 2, 3, 6, 8, 4, 0))
    expected = itertools.product(["p1", "p7"], ["p9", "p2", "p4"])
    self.assertEqual(_digests(pairs), list(expected))
    self.assertEqual(
        pairs[0],
        records.Pair(
            2, 0, "the prompt", "text p1", "text p9", "p1", "p9", 2, 1, 9
        ),
    )
    self.assertEqual([pair.item for pair in pairs], list(range(6)))

  def test_matched_cycles_the_shorter_side(self):
    pairs = _build(_candidates(5, 9, 1, 7, 2, 3, 6, 8, 4, 0), pairing="matched")
    self.assertEqual(
        _digests(pairs), [("p1", "p9"), ("p7", "p2"), ("p1", "p4")]
    )

  def test_ties_at_both_thresholds_go_to_the_earlier_item(self):
    pairs = _build(_candidates(3, 8, 8, 8, 3, 3, 3, 5, 5, 5), top_fraction=0.2)
    self.assertEqual({pair.chosen_digest for pair in pairs}, {"p1", "p2"})
    self.assertEqual(
        {pair.rejected_digest for pair in pairs}, {"p0", "p4", "p5"}
    )

  def test_at_least_one_on_each_side(self):
    pairs = _build(_candidates(4, 5), top_fraction=0.0, bottom_fraction=0.0)
    self.assertEqual(_digests(pairs), [("p1", "p0")])

  @parameterized.parameters(
      ([],), ([3],), ([4, 4, 4],), ([None, None],), ([0, 0],)
  )
  def test_nothing_to_prefer(self, correct):
    self.assertEqual(_build(_candidates(*correct)), [])

  def test_non_finite_merge_is_worse_than_zero(self):
    pairs = _build(_candidates(0, None), top_fraction=1.0)
    self.assertEqual(_digests(pairs), [("p0", "p1")])

  def test_elites_of_every_earlier_iteration_join_the_chosen(self):
    earlier = [
        _candidates(9, 1, 8, 7, prefix="a"),
        _candidates(2, None, 6, prefix="b"),
    ]
    pairs = _build(_candidates(*range(10)), earlier=earlier)
    chosen = list(dict.fromkeys(pair.chosen_digest for pair in pairs))
    self.assertEqual(chosen, ["p9", "p8", "a0", "a2", "b2", "b0"])
    self.assertFalse({pair.rejected_digest for pair in pairs} & {"a1", "b1"})
    # b0 scored 2: it is preferred to p0 and p1, not to its equal p2.
    self.assertEqual(
        [pair for pair in _digests(pairs) if pair[0] == "b0"],
        [("b0", "p0"), ("b0", "p1")],
    )

  def test_an_elite_is_not_rejected_when_it_returns(self):
    pairs = _build(
        _candidates(0, 5, 9), earlier=[_candidates(0, prefix="p")], elites=1
    )
    self.assertNotIn("p0", {pair.rejected_digest for pair in pairs})

  def test_a_share_of_the_rejected_did_not_run(self):
    invalid = ["broken 0", "broken 1", "broken 1", "text p9"]
    pairs = _build(
        _candidates(*range(10)),
        invalid=invalid,
        invalid_fraction=0.5,
        bottom_fraction=0.4,
    )
    rejected = {(p.rejected, p.rejected_digest) for p in pairs}
    # Of equal texts the first stands for them.
    items = {p.rejected: p.rejected_item for p in pairs}
    self.assertEqual((items["broken 0"], items["broken 1"]), (90, 91))
    # "text p9" is a chosen text: it ran once and timed out another time.
    self.assertEqual(
        rejected,
        {
            ("text p0", "p0"),
            ("text p1", "p1"),
            ("broken 0", None),
            ("broken 1", None),
        },
    )

  def test_no_invalid_unless_asked_for(self):
    pairs = _build(_candidates(*range(10)), invalid=["broken"])
    self.assertNotIn(None, {pair.rejected_digest for pair in pairs})

  def test_cap_is_a_deterministic_subset(self):
    candidates = _candidates(*range(10))
    every = set(_digests(_build(candidates)))
    capped = _build(candidates, max_pairs=3)
    self.assertLen(capped, 3)
    self.assertTrue(set(_digests(capped)) < every)
    self.assertEqual(capped, _build(candidates, max_pairs=3))
    self.assertEqual([pair.item for pair in capped], [0, 1, 2])
    others = {
        tuple(_digests(_build(candidates, max_pairs=3, seed=seed)))
        for seed in range(8)
    }
    self.assertGreater(len(others), 1)

  @parameterized.parameters("product", "matched")
  def test_rules_hold_on_random_scores(self, pairing):
    rng = random.Random(pairing)
    for trial in range(200):
      now, before = (
          _candidates(
              *(
                  rng.choice([None, *range(5)])
                  for _ in range(rng.randrange(12))
              ),
              prefix=prefix,
          )
          for prefix in ("p", "p" if trial % 2 else "q")
      )
      value = {c.digest: c.score.accuracy for c in (*before, *now)}
      # A program has one score, whenever it was sampled.
      before = [
          dataclasses.replace(
              c,
              score=next(
                  (n.score for n in now if n.digest == c.digest), c.score
              ),
          )
          for c in before
      ]
      pairs = _build(
          now,
          earlier=[before],
          invalid=["broken"] * rng.randrange(2),
          invalid_fraction=rng.random(),
          top_fraction=rng.random(),
          bottom_fraction=rng.random(),
          pairing=pairing,
          max_pairs=20,
      )
      self.assertLessEqual(len(pairs), 20)
      chosen = {pair.chosen_digest for pair in pairs}
      self.assertFalse(chosen & {pair.rejected_digest for pair in pairs})
      for better, worse in _digests(pairs):
        self.assertIsNotNone(value[better])
        if worse is not None and value[worse] is not None:
          self.assertGreater(value[better], value[worse])


class TestSplitStaysOutTest(parameterized.TestCase):

  @parameterized.parameters("now", "earlier")
  def test_a_test_score_is_refused(self, where):
    good, bad = _candidates(1, 2), _candidates(3, split=records.TEST)
    with self.assertRaisesRegex(ValueError, "p0 comes with a 'test' score"):
      if where == "now":
        _build([*bad, *good])
      else:
        _build(good, earlier=[good, bad])

  def test_the_module_can_read_no_archive(self):
    tree = ast.parse(inspect.getsource(preferences))
    imported = set()
    for node in ast.walk(tree):
      if isinstance(node, ast.Import):
        imported |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    self.assertEqual(
        imported,
        {
            "collections.abc.Sequence",
            "dataclasses",
            "itertools",
            "random",
            "selfdev_jax.config",
            "selfdev_jax.records",
        },
    )
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    self.assertFalse(calls & {"open", "__import__", "eval", "exec", "getattr"})
    # The two modules that it imports read no archive either.
    for module in (config_lib, records):
      self.assertNotIn("sqlite", inspect.getsource(module))


@pytest.mark.parametrize("seed", range(3))
def test_other_test_scores_same_pairs(tmp_path: pathlib.Path, seed):
  """The same run twice, only its test scores differ: not a pair changes."""
  pairs = []
  for name in ("one", "other"):
    rng = random.Random(f"{seed} {name}")
    config = config_lib.Config("x", "seed", ("expert",))
    with store_lib.Store.create(tmp_path / name, config, {}, {}) as store:
      with store.activity(records.LOOP, 1, "evaluate"):
        for correct in range(10):
          model = f"expert:{correct}"
          store.add_score(records.Score(model, records.DEV, 10, correct))
      with store.stage(records.LOOP, 0, store_lib.SEARCH):
        pass  # From here on the archive takes test scores.
      with store.activity(records.LOOP, 0, "best"):
        for i in range(10):
          correct = rng.randrange(11)
          model = f"expert:{i}"
          store.add_score(records.Score(model, records.TEST, 10, correct))
      scores = store.scores(records.DEV)
      assert len(store.scores(records.TEST)) == 10
    candidates = [
        preferences.Candidate(_writing(f"text {model}"), model, score)
        for model, score in scores.items()
    ]
    pairs.append(_build(candidates, max_pairs=4, seed=seed))
  assert pairs[0] == pairs[1] != []


def _raced(answers, failed, cut, bands, reference):
  """Items asked of each model, the cut ones' as the loop lets them race."""
  models, size = answers.shape
  top, bottom = (wanted + int(cut.sum()) for wanted in bands)
  ends = racing.block_ends(size, 20)
  race = racing.Race(models, reference, ends, top, bottom, 0.05)
  asked = np.zeros(models, int)
  while (turn := race.turn()) is not None:
    model, first, last = turn
    if failed[model]:
      race.fail(model)
      asked[model] = size
    else:
      race.add(model, answers[model, first:last])
      asked[model] = last
  return asked


@pytest.mark.parametrize("seed", range(30))
def test_a_race_leads_to_the_pairs_of_full_evaluation(seed):
  rng = np.random.default_rng(seed)
  size, models = 400, int(rng.integers(15, 60))
  config = config_lib.Preferences(
      top_fraction=float(rng.choice([0.0, 0.03, 0.1])),
      bottom_fraction=float(rng.choice([0.0, 0.1, 0.2])),
      elites=int(rng.integers(0, 5)),
      invalid_fraction=float(rng.choice([0.0, 0.3])),
      pairing=str(rng.choice(["product", "matched"])),
      max_pairs=int(rng.choice([5, 1000])),
  )
  reference = rng.uniform(size=size) < 0.5
  whole, raced = [], []
  for t in range(2):
    # Spread out, bunched, and with many that answer alike.
    skill = (
        rng.uniform(size=models),
        np.full(models, 0.5),
        rng.choice([0.0, 0.5, 0.97], models),
    )[int(rng.integers(0, 3))]
    answers = rng.uniform(size=(models, size)) < skill[:, None]
    failed = rng.uniform(size=models) < rng.choice([0.0, 0.2])
    cut = rng.uniform(size=models) < rng.choice([0.0, 0.3])
    bands = preferences.bands(config, models)
    asked = _raced(answers, failed, cut, bands, reference)
    for found, counts in ((whole, np.full(models, size)), (raced, asked)):
      found.append(
          [
              preferences.Candidate(
                  _writing(f"text {t} {i}", i, t),
                  f"{t} {i}",
                  records.Score(
                      f"program:{t} {i}",
                      records.DEV,
                      size if failed[i] else int(n),
                      None if failed[i] else int(answers[i, :n].sum()),
                      items=size,
                  ),
              )
              for i, n in enumerate(counts)
              if not cut[i]
          ]
      )
  build = lambda found: preferences.build(
      config, 2, found[1], found[:1], [_writing("no program")], "the prompt", 0
  )
  assert build(raced) == build(whole)
