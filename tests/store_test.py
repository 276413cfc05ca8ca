import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import sqlalchemy as sa

from selfdev_jax import config as config_lib
from selfdev_jax import records
from selfdev_jax import schema
from selfdev_jax import store as store_lib

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = config_lib.Config(
    name="t", seed_model="s", experts=("a", "b"), seed=7
)
_IDENTITY = {"weights of s": "abc"}


def _open(workdir, config=_CONFIG, identity=_IDENTITY, jax="0"):
  return store_lib.Store.create(workdir, config, identity, {"jax": jax})


@pytest.fixture
def archive(tmp_path):
  """Empty, open for writing."""
  with _open(tmp_path) as store:
    yield store


def _answer(item, correct=True, **options):
  return records.Response(item, f"q{item}", "a", "g", "a", correct, **options)


def _rows(archive):
  """Writes one of everything; returns what was written."""
  completions = [
      records.Completion("loop", 1, 0, "text\x00ü", True, "jax 1"),
      records.Completion("loop", 1, 1, "bad", False, "jax 1"),
  ]
  verdicts = [
      records.Verdict("loop", 1, 0, "src", "d1"),
      records.Verdict("loop", 1, 1, "bad", None, "trace", "name", "line 1"),
  ]
  score = records.Score(
      "program:d1", "dev", 2, 1, 0.5, 0.25, "vllm 1", weights="w1"
  )
  responses = [_answer(0), _answer(1, False, truncated=True)]
  pair = records.Pair(1, 0, "p", "text\x00ü", "bad", "d1", None, 1, 0, 1)
  step = records.Step(1, 1, {"loss": 0.69})
  with archive.activity("loop", 1, "propose"):
    archive.add_factory(1, "")
    archive.add_completions(completions)
  with archive.activity("loop", 1, "admit"):
    archive.add_verdict(verdicts[0], '{"ir": 1}', {"equations": 3}, [1.0, 0.1])
    archive.add_verdict(verdicts[1])
  with archive.activity("loop", 1, "select"):
    archive.add_candidates("loop", 1, ["d1"])
  with archive.activity("loop", 1, "evaluate"):
    archive.add_score(score, responses)
  with archive.activity("loop", 1, "refine"):
    archive.replace_pairs(1, [pair])
    archive.put_steps([step])
  return completions, verdicts, score, responses, pair, step


def test_what_is_written_is_read_back_by_a_second_reader(archive):
  completions, verdicts, score, responses, pair, step = _rows(archive)
  with store_lib.Store.read(archive.workdir) as reader:
    assert reader.completions("loop", 1) == completions
    assert reader.verdicts() == reader.verdicts("loop", 1) == verdicts
    assert reader.verdicts("control") == []
    assert reader.program("d1") == '{"ir": 1}'
    assert reader.stats("d1") == {"equations": 3}
    assert reader.fingerprints() == {"d1": [1.0, 0.1]}
    assert reader.candidates("loop", 1) == ["d1"]
    assert reader.candidates("loop", 2) == []
    assert reader.scores("dev") == {score.model: score}
    assert not reader.scores("test")
    assert reader.responses("program:d1", "dev") == responses
    assert reader.answers("program:d1", "dev") == [True, False]
    assert reader.truncated("dev") == 1
    assert reader.pairs(1) == [pair]
    assert reader.steps() == reader.steps(1) == [step]
    assert reader.engines() == ["jax 1", "vllm 1"]
    assert reader.meta("config")["dpo.beta"] == 0.01
    assert reader.config() == _CONFIG
    assert reader.sessions() == [{"jax": "0"}]
    with pytest.raises(store_lib.StoreError, match="readonly"):
      reader.rows("DELETE FROM pairs")


def test_a_reader_sees_one_moment(archive):
  with archive.activity("loop", 1, "propose"):
    archive.add_factory(1, "")
    with store_lib.Store.read(archive.workdir) as reader:
      archive.add_completions([records.Completion("loop", 1, 0, "x", True)])
      assert reader.completions("loop", 1) == []
    with store_lib.Store.read(archive.workdir) as reader:
      assert len(reader.completions("loop", 1)) == 1


def test_replacing_leaves_nothing_of_before(archive):
  *_, pair, step = _rows(archive)
  with archive.activity("loop", 1, "refine"):
    archive.replace_pairs(1, [dataclasses.replace(pair, item=5)])
    archive.add_candidates("loop", 1, ["d1"])
    other = dataclasses.replace(step, metrics={"loss": 0.5})
    archive.put_steps([other, dataclasses.replace(step, step=2)])
    archive.put_steps([])
  assert [p.item for p in archive.pairs(1)] == [5]
  assert archive.steps() == [other, dataclasses.replace(step, step=2)]
  assert archive.candidates("loop", 1) == ["d1"]


def test_a_factory_keeps_its_first_name(archive):
  with archive.activity("loop", 1, "propose"):
    archive.add_factory(2, "abc")
  with archive.activity("loop", 2, "propose"):
    archive.add_factory(2, "def")
  ((digest, activity),) = archive.rows("SELECT digest, activity FROM factories")
  assert (digest, activity) == ("abc", 1)


def test_incidents_are_kept_in_order_with_their_time_and_activity(archive):
  lost = records.Incident("lost", "w1", "host 1", "killed\x00ü")
  joined = records.Incident("joined", "w2", "host 2", "", at=5.0)
  before = time.time()
  with archive.activity("loop", 1, "propose"):
    archive.add_incident(lost)
  with archive.activity("loop", 1, "evaluate"):
    archive.add_incident(joined)
    with store_lib.Store.read(archive.workdir) as reader:
      found = reader.incidents()
  assert [dataclasses.replace(i, at=None) for i in found] == [
      lost,
      dataclasses.replace(joined, at=None),
  ]
  # When it is written is when it happened, whatever the record says.
  assert before <= found[0].at <= found[1].at <= time.time()
  assert archive.rows("SELECT activity FROM incidents") == [(1,), (2,)]
  with pytest.raises(RuntimeError, match="none is open"):
    archive.add_incident(lost)


# Activities.


def test_stage_runs_once_and_not_when_it_failed(archive):
  with pytest.raises(KeyError), archive.stage("loop", 1, "refine") as needed:
    assert needed
    raise KeyError
  for expected in (True, False):
    with archive.stage("loop", 1, "refine", 6, "step") as needed:
      assert needed is expected
  broken, whole = archive.activities()
  assert (broken.stage, broken.finished) == ("refine", False)
  assert (whole.finished, whole.total, whole.unit) == (True, 6, "step")


def test_an_activity_says_who_did_what_when_and_how_far_it_is(
    archive, monkeypatch
):
  before = time.time()
  monkeypatch.setattr(store_lib, "_BEAT_S", 0.0)
  with archive.activity("control", 2, "propose", 8, "program"):
    archive.advance(3)
    with store_lib.Store.read(archive.workdir) as reader:
      (now,) = reader.activities()
    assert (now.done, now.finished) == (3, False)
    archive.add_factory(1, "")
    archive.advance(2)
  (done,) = archive.activities()
  assert done == records.Activity(
      id=1,
      session=1,
      arm="control",
      iteration=2,
      stage="propose",
      seed=7,
      started=done.started,
      seconds=done.seconds,
      writing_s=done.writing_s,
      done=5,
      total=8,
      unit="program",
      finished=True,
  )
  assert before <= done.started <= time.time()
  assert now.seconds < done.seconds < 60
  assert 0 < done.writing_s < done.seconds


def test_advancing_writes_only_now_and_then(archive):
  with archive.activity("loop", 1, "admit", 3, "program"):
    for _ in range(3):
      archive.advance(1)
    with store_lib.Store.read(archive.workdir) as reader:
      assert reader.activities()[0].done < 3
  assert archive.activities()[0].done == 3


def test_what_is_written_belongs_to_one_activity(archive):
  with pytest.raises(RuntimeError, match="none is open"):
    archive.add_completions([records.Completion("loop", 1, 0, "x", True)])
  with archive.activity("loop", 1, "propose"):
    with (
        pytest.raises(RuntimeError, match="admit begins within propose"),
        archive.activity("loop", 1, "admit"),
    ):
      pass
    archive.add_factory(1, "")
  assert [a.stage for a in archive.activities()] == ["propose"]


_KILLED = """
import os, signal, sys, time
from selfdev_jax import config, records, store
c = config.Config(name="t", seed_model="s", experts=("a", "b"), seed=7)
with store.Store.create(sys.argv[1], c, {"weights of s": "abc"}, {}) as archive:
  with archive.activity("loop", 1, "propose", 8, "program"):
    time.sleep(0.1)
    archive.add_factory(1, "")
    archive.advance(2)
    archive.add_completions([records.Completion("loop", 1, 0, "x", True)])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_activity_keeps_what_it_did_until_its_last_write(tmp_path):
  command = [sys.executable, "-c", _KILLED, str(tmp_path)]
  subprocess.run(command, cwd=_ROOT, check=False)
  with _open(tmp_path) as archive:
    with archive.activity("loop", 1, "propose"):
      pass
    killed, resumed = archive.activities()
  assert (killed.done, killed.total, killed.finished) == (2, 8, False)
  assert 0.1 <= killed.seconds < 60 and 0 < killed.writing_s < killed.seconds
  assert (killed.session, resumed.session) == (1, 2)


def test_from_a_score_one_walks_to_the_sessions_that_made_it(tmp_path):
  """The foreign keys lead through, to the factory and to every session."""
  for jax, work in (("1", _rows), ("2", lambda _: None)):
    with _open(tmp_path, jax=jax) as archive:
      work(archive)
  with store_lib.Store.read(tmp_path) as archive:
    foreign = _foreign_keys()
    score = archive.rows("SELECT * FROM scores")[0]
    reached = set()
    _walk(archive, foreign, "scores", score._mapping, reached)
  assert reached == {
      ("programs", "d1"),
      ("completions", "loop", 1, 0),
      ("factories", 1),
      ("sessions", 1),
      *(("activities", i) for i in (1, 2, 4)),  # Propose, admit, evaluate.
  }


def _foreign_keys():
  """{table: [(its columns, other table, that one's columns)]}."""
  return {
      table.name: [
          (
              [column.name for column in key.columns],
              key.referred_table.name,
              [element.column.name for element in key.elements],
          )
          for key in table.foreign_key_constraints
      ]
      for table in schema.METADATA.tables.values()
  }


def _walk(archive, foreign, table, row, reached):
  for columns, other, keys in foreign[table]:
    values = [row[column] for column in columns]
    if None in values or (other, *values) in reached:
      continue
    reached.add((other, *values))
    where = " AND ".join(f"{key} = :{key}" for key in keys)
    (found,) = archive.rows(
        f"SELECT * FROM {other} WHERE {where}",
        **dict(zip(keys, values, strict=True)),
    )
    _walk(archive, foreign, other, found._mapping, reached)


def test_nothing_refers_to_what_is_not_there(archive):
  _rows(archive)
  pair = records.Pair(1, 0, "p", "c", "r", "d1", None, 1, 0, 9)
  unknown = records.Completion("loop", 3, 0, "x", True, factory=3)
  orphans = (
      lambda: archive.add_completions([unknown]),
      lambda: archive.add_verdict(records.Verdict("loop", 1, 7, "x", "d1")),
      lambda: archive.add_candidates("loop", 1, ["unknown"]),
      lambda: archive.add_score(records.Score("program:unknown", "dev", 1, 1)),
      lambda: archive.add_score(
          records.Score("seed", "dev", 1, 1, reused="unknown")
      ),
      lambda: archive.replace_pairs(1, [pair]),
  )
  with archive.activity("loop", 2, "propose"):
    for write in orphans:
      with pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"):
        write()


# Scores.


def test_test_scores_wait_for_the_end_of_the_search(archive):
  dev = records.Score("seed", records.DEV, 2, 1)
  test = records.Score("seed", records.TEST, 2, 1)
  with (
      archive.activity("loop", 0, "best"),
      pytest.raises(RuntimeError, match="test score of seed during"),
  ):
    archive.add_score(test)
  with archive.stage(records.LOOP, 0, store_lib.SEARCH):
    pass
  with archive.activity("loop", 0, "best"):
    archive.add_score(test)
    with pytest.raises(RuntimeError, match="dev score of seed after"):
      archive.add_score(dev)


def test_a_broken_transaction_leaves_nothing(archive):
  *_, responses, _, _ = _rows(archive)
  bad = [*responses, responses[0]]  # The same item twice.
  with archive.activity("loop", 0, "single models"):
    with pytest.raises(sa.exc.IntegrityError):
      archive.add_score(records.Score("seed", "dev", 2, 1), bad)
    assert "seed" not in archive.scores("dev")
    archive.add_score(records.Score("seed", "dev", 2, 1), responses)
  assert archive.activities()[-1].finished


def test_a_score_grows_by_what_further_items_say(archive):
  first = records.Score("seed", "dev", 2, 1, 0.5, 1.0, "jax", items=5)
  rest = records.Score("seed", "dev", 3, 2, 0.25, 1.0, "vllm", items=5)
  with archive.activity("loop", 0, "single models"):
    archive.add_score(first, [_answer(0), _answer(1, False)])
    assert not archive.scores("dev")["seed"].complete
    archive.add_score(dataclasses.replace(first, model="ties:x", reused="seed"))
    rows = [_answer(2), _answer(3, False), _answer(4)]
    archive.add_score(rest, rows)
    scores = archive.scores("dev")
    assert scores["seed"] == records.Score(
        "seed", "dev", 5, 3, 0.75, 2.0, "jax, vllm", items=5
    )
    # What was taken from it is as it is by now.
    assert scores["ties:x"].correct == 3 and scores["ties:x"].complete
    for model, score in scores.items():
      assert archive.score(model, "dev") == score
    assert archive.score("seed", "test") is None
    assert archive.answers("seed", "dev") == [True, False, True, False, True]
    with pytest.raises(sa.exc.IntegrityError):  # More than there are.
      archive.add_score(rest)


def test_engines_are_told_apart_by_their_whole_name(archive):
  for n, engine in enumerate(("vllm 0.32.0", "vllm 0.3", "vllm 0.3")):
    with archive.activity("loop", 0, "single models"):
      score = records.Score("seed", "dev", 1, 1, engine=engine, items=3)
      archive.add_score(
          score, [records.Response(n, f"q{n}", "a", "g", "a", True)]
      )
  assert archive.score("seed", "dev").engine == "vllm 0.32.0, vllm 0.3"


def test_troubles_of_the_scorer_are_counted(archive):
  said = [
      _answer(i, False, trouble=trouble)
      for i, trouble in enumerate(("timeout", "", "timeout", "error"))
  ]
  with archive.activity("loop", 0, "single models"):
    archive.add_score(records.Score("seed", "dev", 4, 0), said)
  assert archive.troubles("dev") == {"error": 1, "timeout": 2}
  assert archive.responses("seed", "dev") == said
  assert archive.troubles("test") == {}


# Workdirs.


def test_another_config_is_refused_by_what_differs(tmp_path):
  _open(tmp_path).close()
  other = dataclasses.replace(_CONFIG, dpo=config_lib.Dpo(beta=0.2))
  with pytest.raises(store_lib.StoreError) as error:
    _open(tmp_path, other)
  assert "dpo.beta (0.01 there, 0.2 here)" in str(error.value)
  assert "\n" not in str(error.value) and "learning_rate" not in str(
      error.value
  )
  with pytest.raises(store_lib.StoreError, match="'abc' there, 'new' here"):
    _open(tmp_path, identity={"weights of s": "new"})
  with _open(tmp_path) as archive:
    assert len(archive.sessions()) == 2  # Those refused left nothing.


def test_a_run_may_go_on_elsewhere(tmp_path):
  _open(tmp_path).close()
  there = dataclasses.replace(
      _CONFIG, executor="ray", ray=config_lib.Ray("auto", workers=4)
  )
  with _open(tmp_path, there) as archive:
    # What it began with, whoever asks.
    assert archive.config() == _CONFIG
  other = dataclasses.replace(there, seed=1)
  with pytest.raises(store_lib.StoreError) as error:
    _open(tmp_path, other)
  assert "seed (7 there, 1 here)" in str(error.value)
  assert "ray" not in str(error.value) and "executor" not in str(error.value)


def test_a_run_from_before_there_were_other_places_goes_on(tmp_path):
  with _open(tmp_path) as archive:
    kept = json.dumps(config_lib.without_places(archive.meta("config")))
    archive._db.exec_driver_sql(
        "UPDATE meta SET value = ? WHERE key = 'config'", (kept,)
    )
    archive._db.commit()
  with _open(tmp_path) as archive:
    assert "executor" not in archive.meta("config")
    assert archive.config() == _CONFIG


def test_the_program_behind_the_name_of_a_score(archive):
  _rows(archive)
  assert archive.program_of("program:d1") == '{"ir": 1}'
  for baseline in ("seed", "expert:d1", "ties:density=0.5,scale=1.0"):
    assert archive.program_of(baseline) == ""


_HOLD = """
import sys, time
from selfdev_jax import store
with store.lock(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def test_second_run_is_refused_with_the_firsts_pid(tmp_path):
  assert not store_lib.is_running(tmp_path)
  holder = subprocess.Popen(
      [sys.executable, "-c", _HOLD, str(tmp_path)],
      stdout=subprocess.PIPE,
      cwd=_ROOT,
  )
  with holder:
    assert holder.stdout.readline() == b"held\n"
    assert store_lib.is_running(tmp_path)
    message = f"in use by process {holder.pid}"
    with (
        pytest.raises(store_lib.StoreError, match=message),
        store_lib.lock(tmp_path),
    ):
      pass
    os.kill(holder.pid, signal.SIGKILL)
  assert not store_lib.is_running(tmp_path)
  with store_lib.lock(tmp_path):  # A killed run leaves no lock behind.
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    assert store_lib.is_running(tmp_path)
