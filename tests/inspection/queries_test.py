"""Queries against an archive that is computed by hand."""

import math

import numpy as np
import pytest

from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import queries

LOOP, CONTROL = records.ARMS


def _names(rows):
  """A digest, or where a rejected one was written."""
  return [row.digest or f"{row.arm}/{row.iteration}/{row.item}" for row in rows]


def _listed(store, **filters):
  rows, total = queries.programs(store, **filters)
  assert total == len(rows)
  return _names(rows)


def test_a_row_has_its_verdict_its_scores_and_how_often_it_was_written(store):
  rows, _ = queries.programs(store, sort="hash", ascending=True)
  a1, a9, b2, c3, d4, syntax, shape = rows
  assert (a1.arm, a1.iteration, a1.item) == (LOOP, 1, 0)
  assert [row.written for row in rows] == [2, 2, 1, 1, 1, 1, 1]
  assert (a1.dev.accuracy, a1.test.accuracy) == (0.75, 0.5)
  assert (a9.dev.n, a9.dev.items, a9.dev.complete) == (2, 4, False)
  assert (c3.dev.accuracy, c3.dev.reused) == (0.75, "program:a1")
  assert d4.test is None
  assert (a1.stage, a1.code, a1.message) == ("", "", "")
  assert (b2.stage, b2.code) == ("run", "memory") and b2.dev.correct is None
  assert (syntax.stage, syntax.code) == ("filter", "syntax")
  assert shape.message == "rank 2, not 1" and shape.dev is None


_REJECTED = ["loop/1/1", "loop/2/2"]


@pytest.mark.parametrize(
    ("sort", "ascending", "expected"),
    [
        # Of equals the earlier first; what has no score last, either way.
        ("dev", False, ["a9", "a1", "c3", "d4"]),
        ("dev", True, ["d4", "a1", "c3", "a9"]),
        ("test", False, ["a1"]),
        ("hash", False, ["d4", "c3", "b2", "a9", "a1", *_REJECTED]),
        ("hash", True, ["a1", "a9", "b2", "c3", "d4", *_REJECTED]),
        ("size", False, ["d4", "c3", "b2", "a1", "a9", *_REJECTED]),
        (
            "found",
            True,
            ["a1", "loop/1/1", "b2", "a9", "c3", "loop/2/2", "d4"],
        ),
        (
            "found",
            False,
            ["d4", "loop/2/2", "c3", "a9", "b2", "loop/1/1", "a1"],
        ),
    ],
)
def test_sorts(store, sort, ascending, expected):
  listed = _listed(store, sort=sort, ascending=ascending)
  assert listed[: len(expected)] == expected
  assert len(listed) == 7


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"verdict": "admitted"}, {"a1", "a9", "c3", "d4"}),
        ({"verdict": "rejected"}, {"b2", *_REJECTED}),
        ({"verdict": "run"}, {"b2"}),
        ({"verdict": "run:memory"}, {"b2"}),
        ({"verdict": "filter:syntax"}, {"loop/1/1"}),
        ({"verdict": "filter:shape"}, set()),
        ({"arm": "control"}, {"d4"}),
        ({"arm": "loop", "iteration": 2}, {"a9", "c3", "loop/2/2"}),
        ({"search": "a"}, {"a1", "a9", "b2", "c3", "d4"}),  # "base", "task".
        ({"search": "# c3"}, {"c3"}),
        ({"search": "d4"}, {"d4"}),
        ({"search": "def f("}, set(_REJECTED)),
        ({"search": "%"}, set()),  # Nothing is a pattern.
        ({"search": "def f(", "verdict": "trace"}, {"loop/2/2"}),
        ({"min_dev": 0.75}, {"a1", "a9", "c3"}),
        ({"max_dev": 0.75}, {"a1", "c3", "d4"}),
        ({"min_dev": 0.3, "max_dev": 0.8, "search": "c"}, {"a1", "c3"}),
        ({"candidate_of": ("control", 2)}, {"d4", "a9"}),
        ({"candidate_of": ("loop", 1)}, {"a1", "b2"}),
    ],
)
def test_filters(store, filters, expected):
  assert set(_listed(store, **filters)) == expected


def test_a_page_of_the_list_knows_how_long_the_list_is(store):
  rows, total = queries.programs(store, limit=2, offset=1)
  assert (_names(rows), total) == (["a1", "c3"], 7)
  assert queries.programs(store, offset=9) == ([], 7)
  assert len(queries.programs(store, limit=None)[0]) == 7


def test_a_sort_that_is_none_is_named(store):
  with pytest.raises(errors.UserError, match="'date'; choose one of dev, test"):
    queries.programs(store, sort="date")


def test_a_program_has_all_that_belongs_to_it(store):
  a1 = queries.program(store, "a1")
  assert a1.source.startswith("def merge") and a1.ir == '{"of": "a1"}'
  assert a1.stats == {"equations": 97}
  assert a1.writings == [(LOOP, 1, 0, 1), (LOOP, 1, 3, 1)]
  assert (a1.dev.correct, a1.test.correct) == (3, 1)
  assert a1.row.written == 2
  assert a1.pairs == [
      queries.PairPart(1, 0, True, None, 1, 1),
      queries.PairPart(1, 1, True, "b2", 1, 2),
  ]
  assert a1.same == ["c3"]


def test_relatives_go_both_ways(store):
  assert queries.program(store, "c3").same == ["a1"]
  (part,) = queries.program(store, "b2").pairs
  assert part == queries.PairPart(1, 1, False, "a1", 1, 3)


def test_near_programs_by_hand(store):
  # One of four numbers, a norm of 2 and of 1; or a projection's sign.
  assert queries.program(store, "a1").near == [
      ("c3", 0.0),
      ("a9", 0.125),
      ("d4", 0.5),
  ]
  assert queries.program(store, "b2").near == []  # Not finite anywhere.


def test_distances_of_fingerprints_that_are_partly_not_finite():
  nan = math.nan
  own = np.array([1.0, 1, 0, 0, nan, nan, nan, nan])
  others = np.array(
      [
          [1.0, 0.5, 0, 0, nan, nan, nan, nan],
          [1.0, 1, 0, 0, 1, 1, 0, 0],
          [nan, nan, nan, nan, nan, nan, nan, nan],
      ]
  )
  np.testing.assert_allclose(
      queries._distances(others, own), [0.125, np.inf, np.inf]
  )


@pytest.mark.parametrize("prefix", ["best", "a1", "program:a1", "program:best"])
def test_best_is_complete_and_the_loops(store, prefix):
  # a9 has 2 of 2, and was stopped.
  assert queries.find(store, prefix) == "a1"


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("zz", "has no program 'zz'; give the beginning of a digest"),
        ("", "has no program ''"),
        ("a", r"several programs begin with 'a' \(a1, a9\); give more"),
    ],
)
def test_a_name_that_is_none_or_several(store, prefix, words):
  with pytest.raises(errors.UserError, match=words):
    queries.find(store, prefix)


def test_a_completion_leads_to_its_factory_and_its_session(store):
  found = queries.completion(store, LOOP, 2, 1)
  assert (found.completion.factory, found.completion.finished) == (2, False)
  assert found.verdict.digest == "c3"
  assert (found.activity.stage, found.activity.done) == ("propose", 3)
  assert found.provenance["git"] == "abc"
  assert queries.factory(store, 2) == queries.Factory(2, "f00d", 2)
  assert queries.factory(store, 1) == queries.Factory(1, "", 0)


def test_completions_are_what_an_iteration_counts(store):
  for iteration in queries.iterations(store):
    where = (iteration.arm, iteration.iteration)
    every, total = queries.completions(store, *where)
    assert len(every) == total == iteration.sampled
    admitted, total = queries.completions(store, *where, is_admitted=True)
    assert len(admitted) == total == iteration.admitted
    assert len({c.digest for c in admitted}) == iteration.distinct


def test_completions_by_hand(store):
  found, total = queries.completions(store, LOOP, 1, limit=3, offset=1)
  assert total == 4
  assert [(c.item, c.digest, c.stage, c.code) for c in found] == [
      (1, None, "filter", "syntax"),
      (2, "b2", "run", "memory"),
      (3, "a1", "", ""),
  ]
  assert found[2].dev.accuracy == 0.75
  cut = queries.completions(store, LOOP, 2)[0][1]
  assert (cut.item, cut.finished) == (1, False)


def test_completions_without_verdicts(build, tmp_path, config):
  build(tmp_path, "begun")
  with (
      store_lib.Store.create(tmp_path, config, {}, {}) as unfinished,
      unfinished.activity(LOOP, 1, "propose"),
  ):
    with pytest.raises(errors.UserError, match="it has none yet"):
      queries.completions(unfinished, LOOP, 1)
    unfinished.add_factory(1, "")
    said = records.Completion(LOOP, 1, 0, "text", True, "jax 1")
    unfinished.add_completions([said])
    (found,), total = queries.completions(unfinished, LOOP, 1)
    assert (found.item, found.stage, found.dev, total) == (0, None, None, 1)


def test_what_is_not_there_is_named_with_what_is(store):
  with pytest.raises(errors.UserError, match="loop/9; it has loop/1, loop/2"):
    queries.completions(store, LOOP, 9)
  with pytest.raises(errors.UserError, match="first iteration is loop/1"):
    queries.completions(store, CONTROL, 1)
  with pytest.raises(errors.UserError, match="loop/1/9; it has loop/1/0 to 3"):
    queries.completion(store, LOOP, 1, 9)
  with pytest.raises(errors.UserError, match="pair 2/0; it has 1/0 to 1"):
    queries.pair(store, 2, 0)
  for ask in (queries.answers, queries.score_origin):
    with pytest.raises(errors.UserError, match="no test score of 'nobody'"):
      ask(store, "nobody", records.TEST)


def test_a_pair(store):
  found = queries.pair(store, 1, 1)
  assert (found.chosen_digest, found.rejected_digest) == ("a1", "b2")
  assert (found.chosen_item, found.rejected_item) == (3, 2)


def test_answers_and_what_gave_them(store):
  found, total = queries.answers(store, "program:a1", records.DEV, 2, 1)
  assert total == 4
  assert [(r.item, r.correct, r.prompt) for r in found] == [
      (1, True, "dev 1?"),
      (2, True, "dev 2?"),
  ]
  # A score that was taken over has the other's answers.
  assert queries.answers(store, "program:c3", records.DEV)[1] == 4
  activity, provenance = queries.score_origin(store, "program:c3", records.DEV)
  assert (activity.stage, provenance["jax"]) == ("reuse", "1")
  ((activity, _),) = queries.answered_by(store, "program:c3", records.DEV)
  assert (activity.stage, activity.iteration) == ("evaluate", 1)


def test_iterations_by_hand(store):
  assert queries.iterations(store) == [
      queries.Iteration(LOOP, 1, 4, 4, 2, 1, 2, 2, 0.75, 0.75, 0.75),
      # What was stopped counts in the mean, and is not the best.
      queries.Iteration(LOOP, 2, 3, 3, 2, 2, 1, 1, 1.0, 1.0, None),
      queries.Iteration(CONTROL, 2, 2, 2, 2, 2, 2, 2, 0.625, 0.625, 0.25),
  ]


def test_rejections_by_hand(store):
  found = queries.rejections(store)
  assert [(r.arm, r.iteration, r.stage, r.code, r.count) for r in found] == [
      (LOOP, 1, "filter", "syntax", 1),
      (LOOP, 1, "run", "memory", 1),
      (LOOP, 2, "trace", "shape", 1),
  ]
  assert found[2].example == "rank 2, not 1"


def test_baselines_by_hand(store):
  seed, expert, weights = queries.baselines(store)
  assert (seed.name, seed.dev.correct, seed.test.correct) == ("seed", 2, 2)
  assert (expert.name, expert.dev.correct, expert.test) == ("expert:x", 1, None)
  # weights:0.2 has three of three, and not of four.
  assert (weights.name, weights.tried) == ("weights", 2)
  assert weights.dev.model == "weights:0.1"


def test_the_models_of_a_family_by_hand(store):
  found, total = queries.scores(store, "weights")
  assert [dev.model for dev, _ in found] == ["weights:0.2", "weights:0.1"]
  assert total == 2
  assert queries.scores(store, "weights", 1, 1) == (found[1:], 2)
  ((seed, test),), _ = queries.scores(store, "seed")
  assert (seed.accuracy, test.accuracy) == (0.5, 1.0)
  ((expert, test),), _ = queries.scores(store, "expert")
  assert (expert.model, test) == ("expert:x", None)
  with pytest.raises(errors.UserError, match="no score of ties"):
    queries.scores(store, "ties")


@pytest.mark.parametrize("until", ["", "begun"])
def test_an_archive_without_programs(build, tmp_path, until):
  with store_lib.Store.read(build(tmp_path, until)) as store:
    assert queries.programs(store) == ([], 0)
    assert queries.iterations(store) == queries.rejections(store) == []
    assert len(queries.baselines(store)) == 2 * bool(until)
    with pytest.raises(errors.UserError, match="has no best program yet"):
      queries.find(store, "best")
    with pytest.raises(errors.UserError, match="it has none yet"):
      queries.completion(store, LOOP, 1, 0)


def test_incidents_say_during_which_stage_they_happened(store, incidents):
  found, total = queries.incidents(store)
  assert total == 3
  assert [(i.kind, i.worker, i.host, i.detail) for i in found] == [
      (i.kind, i.worker, i.host, i.detail) for i in incidents
  ]
  assert {(i.arm, i.iteration, i.stage) for i in found} == {
      (LOOP, 1, "evaluate")
  }
  assert [i.at for i in found] == [i.at for i in store.incidents()]
  assert queries.incidents(store, 1, 1) == (found[1:2], 3)
  assert queries.incidents(store, None, 1) == (found[1:], 3)
  assert list(queries.incident_counts(store).items()) == [
      ("lost", 2),
      ("joined", 1),
  ]


def test_a_run_on_one_host_has_no_incidents(build, tmp_path):
  with store_lib.Store.read(build(tmp_path, "begun")) as store:
    assert queries.incidents(store) == ([], 0)
    assert queries.incident_counts(store) == {}
