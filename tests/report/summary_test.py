"""Numbers of the report against values computed by hand."""

import dataclasses
import json

import pytest

from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.report import intervals
from selfdev_jax.report import reading
from selfdev_jax.report import summary
from selfdev_jax.report import terminal
from selfdev_jax.report import words

STAGES = ("empty", "sampled", "admitted", "first", "dev", "test")


def end_search(store):
  """The archive takes test scores from here on."""
  with store.stage(records.LOOP, 0, store_lib.SEARCH):
    pass


@pytest.fixture(name="result")
def result_fixture(archive):
  return summary.summarize(archive)


def test_iterations(result):
  first = {
      "t": 1,
      "sampled": 4,
      "admitted": 3,
      "distinct": 2,
      "evaluated": 2,
      "mean_dev": pytest.approx(0.5),
      "median_dev": pytest.approx(0.5),
      "best_dev": 0.6,
  }
  # d4 was admitted, merged and then not finite; d1 was not new.
  second = {
      "t": 2,
      "sampled": 4,
      "admitted": 2,
      "distinct": 2,
      "evaluated": 2,
      "mean_dev": 0.7,
      "median_dev": 0.7,
      "best_dev": 0.7,
  }
  assert result["config"] == "t"
  assert result["seed_model"] == {"dev": 0.3, "test": 0.4}
  assert result["iterations"] == [first, second]


def test_control_shares_the_first_iteration_and_the_budget(result):
  shared, second = result["control"]
  assert shared == result["iterations"][0]
  assert second["admitted"] == second["distinct"] == 4
  assert second["evaluated"] == 2
  assert second["mean_dev"] == pytest.approx(0.4)


def test_lift(result):
  (lift,) = result["lift"]
  assert (lift["t"], lift["n_loop"], lift["n_control"]) == (2, 1, 2)
  assert lift["difference"] == pytest.approx(0.3)
  # Means of two draws from {0.5, 0.3}.
  assert lift["ci95"] == pytest.approx([0.2, 0.4])


def test_best(result):
  assert result["best"] == {
      "program_id": "d3",
      "evaluated": 4,
      "dev": 0.7,
      "test": 0.75,
      "n_test": 20,
      "ci95": list(records.wilson(15, 20)),
      "n_dev": 10,
      "ci95_dev": list(records.wilson(7, 10)),
  }


@pytest.mark.parametrize(
    ("name", "model", "evaluated", "dev", "test"),
    [
        ("control", "program:d2", 4, 0.6, 0.7),
        # A tie goes to what was evaluated first.
        ("task_arithmetic", "task_arithmetic:scale=0.4", 2, 0.5, 0.75),
        ("ties", "ties:density=0.5,scale=0.7", 1, 0.2, 0.2),
        ("random_weights", "weights:0.31,0.7,-0.1", 2, 0.6, 1.0),
        ("seed", "seed", 1, 0.3, 0.4),
        ("expert:b", "expert:b", 1, 0.2, 0.25),
    ],
)
def test_baselines(result, name, model, evaluated, dev, test):
  entry = result["baselines"][name]
  assert entry["model"] == model
  assert entry["evaluated"] == evaluated
  assert (entry["dev"], entry["test"], entry["n_test"]) == (dev, test, 20)
  assert entry["ci95"] == list(records.wilson(round(20 * test), 20))


def test_paired(result):
  # d3 has items 0..14 right, the seed 10..17.
  seed = result["paired"]["seed"]
  assert (seed["better"], seed["worse"], seed["n"]) == (10, 3, 20)
  assert seed["difference"] == pytest.approx(0.35)
  assert seed["ci95"] == pytest.approx([0.012505, 0.623859], abs=1e-5)
  # The same items right is no proof of equality.
  even = result["paired"]["task_arithmetic"]
  assert even["difference"] == 0.0
  assert even["ci95"][0] < 0 < even["ci95"][1]
  assert not even["same_model"]


def test_model_does_not_differ_from_itself(tmp_path, build, score):
  with build(tmp_path, "first") as store:
    end_search(store)
    score(
        store,
        records.Score("program:d2", records.TEST, 1, 1),
        responses=[records.Response(0, "p", "1", "1", "1", True)],
    )
    result = summary.summarize(store)
  control = result["paired"]["control"]
  assert control["same_model"]
  assert control["ci95"] == [0.0, 0.0]
  assert "is the very program of the control's best" in words.verdict(result)


def test_selection_ignores_the_test_set(archive, result, score):
  # d2 would win on the test set.
  score(archive, records.Score("program:d1", records.TEST, 20, 20))
  assert summary.summarize(archive)["best"] == result["best"]
  run = reading.read(archive)
  top = run.top(records.LOOP, 2)
  assert [s.model for s in top] == ["program:d3", "program:d2"]


def test_rounds_count_every_completion_once(archive):
  first, second = reading.read(archive).arms[records.LOOP]
  counts = lambda r: (r.sampled, r.admitted, r.distinct, r.evaluated)
  assert counts(first) == (4, 3, 2, 2)
  # d4 has no merged model, and hostile text was rejected.
  assert counts(second) == (4, 2, 2, 2)


def test_hours_are_of_each_arms_own_work(tmp_path, build):
  with build(tmp_path, "dev") as store:
    # An hour each: the loop's two iterations, then the control's second.
    started = {("loop", 1): 0, ("loop", 2): 3600, ("control", 2): 7200}
    stages = [a.id for a in store.activities() if a.stage == "evaluate"]
    run = store._db.exec_driver_sql
    run("UPDATE activities SET started = 0, seconds = 0")
    for id, ((arm, t), at) in zip(stages, started.items(), strict=False):
      run(
          "UPDATE activities SET arm = ?, iteration = ?, started = ?,"
          " seconds = 3600 WHERE id = ?",
          (arm, t, at, id),
      )
    at = {"d1": 1800, "d2": 3600, "d3": 5400, "d4": 7200, "d5": 9000}
    for digest, seconds in at.items():
      model = f"program:{digest}"
      run("UPDATE scores SET at = ? WHERE model = ?", (seconds, model))
    run("UPDATE scores SET at = 10800 WHERE model = 'program:d6'")
    curves = reading.read(store).curves
    # Of 4, 6, 7 right and one without a model; of 4, 6, 5 and 3.
    loop, control = (curves[arm] for arm in records.ARMS)
    assert loop.evaluations.tolist() == [1, 2, 3] and loop.evaluated == 4
    assert loop.best.tolist() == [0.4, 0.6, 0.7]
    assert loop.hours == pytest.approx([0.5, 1.0, 1.5])
    assert loop.total_hours == 2.0
    assert control.best.tolist() == [0.4, 0.6]
    assert control.hours == pytest.approx([0.5, 1.0])
    # The loop's second iteration is none of its work.
    assert control.total_hours == 2.0
    run("UPDATE scores SET at = NULL WHERE model = 'program:d6'")
    curves = reading.read(store).curves
    assert curves["control"].hours is None
    assert curves["loop"].hours is not None


def test_seconds_add_up_over_sessions(archive):
  with archive.activity(records.LOOP, 2, "propose"):
    pass
  mine = [a.seconds for a in archive.activities() if a.stage == "propose"]
  assert len(mine) == 4
  assert summary.summarize(archive)["seconds"]["propose"] == sum(mine)


@pytest.mark.parametrize("until", STAGES)
def test_unfinished(tmp_path, build, until):
  with build(tmp_path, until) as store:
    result = summary.summarize(store)
  json.dumps(result, allow_nan=False)
  assert terminal.table(result)
  done = STAGES.index(until)
  assert len(result["iterations"]) == (0 if done < 1 else 1 if done < 4 else 2)
  assert (result["best"]["program_id"] is None) == (done < 3)
  assert (result["best"]["test"] is None) == (done < 5)


def test_same_result_from_two_runs(tmp_path, build):
  results = []
  for name in ("one", "two"):
    with build(tmp_path / name) as store:
      result = summary.summarize(store)
    del result["seconds"]
    results.append(json.dumps(result))
  assert results[0] == results[1]


def test_reads_one_moment_beside_a_writer(tmp_path, build, score):
  with build(tmp_path, "dev") as writer:
    with store_lib.Store.read(tmp_path) as reader:
      before = summary.summarize(reader)
      end_search(writer)
      score(writer, records.Score("program:d3", records.TEST, 20, 15))
      assert summary.summarize(reader) == before
    with store_lib.Store.read(tmp_path) as reader:
      after = summary.summarize(reader)
  assert before["best"]["test"] is None
  assert after["best"]["test"] == 0.75


def test_table(result):
  text = terminal.table(result)
  assert max(map(len, text.splitlines())) <= 100
  assert "\x1b" not in text
  assert "75.0 [53.1, 88.8]" in text
  assert "+30.0 [+20.0, +40.0]" in text
  assert "n = 20" in text


def test_verdict_names_what_is_not_beaten(result):
  text = words.verdict(result)
  assert "is above that of the control without DPO: +30.0 points" in text
  assert "cannot be told from the control's best" in text
  assert "is below the best random weights" in text
  assert "is above the best TIES" in text
  assert "every expert" in text


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ([0.01, 0.2], "is above"),
        ([-0.1, 0.2], "cannot be told from"),
        ([-0.2, -0.01], "is below"),
    ],
)
def test_lift_sentence(result, interval, expected):
  result["lift"][-1]["ci95"] = interval
  assert f"programs {expected} that of" in words.lift_sentence(result)


def test_paired_interval():
  low, high = intervals.paired(0, 0, 20)
  assert low == -high and 0 < high < 0.15
  low, high = intervals.paired(30, 10, 100)
  assert (-high, -low) == pytest.approx(intervals.paired(10, 30, 100))
  assert low < 0.2 < high
  assert intervals.paired(5, 0, 5)[1] <= 1.0


def test_bootstrap_interval():
  assert intervals.mean_difference([0.5] * 3, [0.25] * 4) == (0.25, 0.25)
  first, second = [0.1, 0.5, 0.6, 0.9] * 30, [0.2, 0.4, 0.5] * 30
  low, high = intervals.mean_difference(first, second)
  assert (low, high) == intervals.mean_difference(first, second)
  # Against the normal approximation, within the bootstrap's own noise.
  half = 1.96 * (0.081875 / 120 + 0.0155556 / 90) ** 0.5
  assert low == pytest.approx(0.525 - 0.366667 - half, abs=0.01)
  assert high == pytest.approx(0.525 - 0.366667 + half, abs=0.01)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("expert:tiny:addition", "expert addition"),
        ("expert:/models/WizardMath-7B/", "expert WizardMath-7B"),
        ("ties", "TIES"),
    ],
)
def test_label(name, expected):
  assert words.label(name) == expected


def test_ties_go_by_the_order_of_the_arm(tmp_path, build, score):
  with build(tmp_path, "admitted") as store:
    for digest in ("d2", "d1"):
      score(store, records.Score(f"program:{digest}", records.DEV, 10, 5))
    assert summary.summarize(store)["best"]["program_id"] == "d1"


def test_what_sampled_and_what_it_could_not_read_are_told(
    tmp_path, build, score
):
  with build(tmp_path, "first") as store:
    result = summary.summarize(store)
    assert result["sampled_by"] == []
    assert result["truncated"] == {"dev": 0, "test": 0}
    assert words.sampling(result) == ""
    for model in ("expert:x", "expert:y"):
      score(
          store,
          records.Score(model, records.DEV, 3, 3, engine="vllm 0.32.0"),
          responses=[
              records.Response(i, "p", "1", "1", "1", True, i < 2)
              for i in range(3)
          ],
      )
    result = summary.summarize(store)
  assert result["truncated"] == {"dev": 2, "test": 0}
  assert words.sampling(result) == (
      "Sampled by vllm 0.32.0. 2 dev questions did not fit the model and lost"
      " the beginning."
  )


def test_what_a_race_and_known_programs_saved(result):
  assert words.racing(result) == ""
  answers = {
      "asked": 4_700,
      "without_race": 10_000,
      "reused": 0,
      "search_over": True,
  }
  said = words.racing({"answers": answers})
  assert "4,700 of 10,000 development answers (47.0 %)" in said
  assert "same" not in said
  said = words.racing({"answers": answers | {"reused": 300}})
  assert said.endswith("spared at most 300 answers.")
  # What is missing may only be not done yet.
  said = words.racing({"answers": answers | {"search_over": False}})
  assert said.startswith("Some programs have not answered everything yet")


def test_who_was_stopped_is_not_the_best(tmp_path, build, score):
  with build(tmp_path, "admitted") as store:
    score(
        store,
        records.Score("program:d1", records.DEV, 5, 5, items=10),
        records.Score("program:d2", records.DEV, 10, 3),
        records.Score("ties:x", records.DEV, 5, 5, items=10),
        records.Score("ties:y", records.DEV, 10, 2),
    )
    run = reading.read(store)
    result = summary.of(run)
  assert result["answers"] == {
      "asked": 30,
      "without_race": 40,
      "reused": 0,
      "search_over": False,
  }
  assert result["best"]["program_id"] == "d2"
  assert result["baselines"]["ties"]["model"] == "ties:y"
  (first,) = result["iterations"]
  # It counts in the mean by what it was asked.
  assert first["best_dev"] == 0.3 and first["mean_dev"] == 0.65
  assert run.curves["ties"].evaluations.tolist() == [2]


def test_what_was_taken_from_another_is_as_that_one_is(tmp_path, build, score):
  with build(tmp_path, "admitted") as store:
    first = records.Score("program:d1", records.DEV, 5, 5, items=10)
    score(store, first)
    copy = dataclasses.replace(first, model="program:d2", reused=first.model)
    score(store, copy)
    score(store, records.Score("program:d1", records.DEV, 5, 1, items=5))
    assert store.score("program:d2", records.DEV) == dataclasses.replace(
        copy, n=10, correct=6
    )
    assert store.score("program:d2", records.TEST) is None
    result = summary.summarize(store)
  (iteration,) = result["iterations"]
  assert iteration["mean_dev"] == iteration["best_dev"] == 0.6
  assert result["answers"]["reused"] == 10


def test_troubles_of_the_scorer_are_told(result):
  assert words.sampling(result).count("compared") == 0
  troubles = {"dev": {"timeout": 1}, "test": {"error": 3}}
  said = words.sampling(result | {"troubles": troubles})
  assert "1 dev answer could not be compared (timeout) and counts" in said
  assert "3 test answers could not be compared (error)" in said


def test_what_happened_to_workers_changes_nothing(archive, result):
  with archive.activity(records.LOOP, 0, "best"):
    archive.add_incident(records.Incident("lost", "w1", "host", "killed"))
  found = summary.summarize(archive)
  differing = {key for key in found if found[key] != result[key]}
  assert found.keys() == result.keys()
  assert differing <= {"seconds"}  # The activity's own.
