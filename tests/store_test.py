import dataclasses
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys

import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import records
from selfdev_jax import store as store_lib

_CONFIG = config_lib.Config(name="t", seed_model="s", experts=("a", "b"))
_IDENTITY = {"weights of s": "abc"}


def _open(workdir, config=_CONFIG, identity=_IDENTITY):
  return store_lib.Store.create(workdir, config, identity, {"jax": "0"})


def _rows(archive):
  """Writes one of everything; returns what was written."""
  completion = records.Completion("loop", 1, 0, "text\x00ü", True, "jax 1")
  admitted = records.Verdict("loop", 1, 0, "src", "d1")
  archive.add_completions([completion])
  archive.add_verdict(admitted, '{"ir": 1}', {"equations": 3})
  score = records.Score("program:d1", "dev", 2, 1, 0.5, 0.25, "vllm 1")
  responses = [
      records.Response(0, "q0", "a", "1", "1", True),
      records.Response(1, "q1", "b", "2", None, False, True),
  ]
  archive.add_score(score, responses)
  pair = records.Pair(1, 0, "p", "c", "r", "d1", None)
  archive.replace_pairs(1, [pair])
  step = records.Step(1, 1, {"loss": 0.69})
  archive.replace_steps(1, [step])
  return completion, admitted, score, responses, pair, step


def test_what_is_written_is_read_back_by_a_second_reader(tmp_path):
  with _open(tmp_path) as writer:
    completion, verdict, score, responses, pair, step = _rows(writer)
    with store_lib.Store.read(tmp_path) as reader:
      assert reader.completions("loop", 1) == [completion]
      assert reader.verdicts() == reader.verdicts("loop", 1) == [verdict]
      assert reader.verdicts("control") == []
      assert reader.program("d1") == '{"ir": 1}'
      assert reader.stats("d1") == {"equations": 3}
      assert reader.scores("dev") == {score.model: score}
      assert not reader.scores("test")
      assert reader.responses("program:d1", "dev") == responses
      assert reader.pairs(1) == [pair]
      assert reader.steps() == reader.steps(1) == [step]
      assert reader.meta("config")["dpo.beta"] == 0.01
      with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.replace_pairs(1, [])


def test_replacing_leaves_nothing_of_before(tmp_path):
  with _open(tmp_path) as archive:
    *_, pair, _ = _rows(archive)
    archive.replace_pairs(1, [dataclasses.replace(pair, item=5)])
    archive.replace_steps(1, [])
    assert [p.item for p in archive.pairs(1)] == [5]
    assert archive.steps() == []


def test_stage_runs_once_and_not_when_it_failed(tmp_path):
  with _open(tmp_path) as archive:
    with pytest.raises(KeyError), archive.stage("loop", 1, "refine") as needed:
      assert needed
      raise KeyError
    for expected in (True, False):
      with archive.stage("loop", 1, "refine") as needed:
        assert needed is expected
    assert [t.stage for t in archive.timings()] == ["refine", "refine"]


def test_test_scores_wait_for_the_end_of_the_search(tmp_path):
  dev = records.Score("seed", records.DEV, 2, 1)
  test = records.Score("seed", records.TEST, 2, 1)
  with _open(tmp_path) as archive:
    with pytest.raises(RuntimeError, match="test score of seed during"):
      archive.add_score(test)
    with archive.stage(records.LOOP, 0, store_lib.SEARCH):
      pass
    archive.add_score(test)
    with pytest.raises(RuntimeError, match="dev score of seed after"):
      archive.add_score(dev)


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
  _open(tmp_path).close()


def test_a_broken_transaction_leaves_nothing(tmp_path):
  with _open(tmp_path) as archive:
    *_, responses, _, _ = _rows(archive)
    bad = [*responses, responses[0]]  # The same item twice.
    with pytest.raises(sqlite3.IntegrityError):
      archive.add_score(records.Score("seed", "dev", 2, 1), bad)
    assert "seed" not in archive.scores("dev")
    archive.add_score(records.Score("seed", "dev", 2, 1), responses)


def test_reading_what_is_no_run(tmp_path):
  with pytest.raises(store_lib.StoreError, match="holds no run"):
    store_lib.Store.read(tmp_path)
  (tmp_path / "archive.sqlite").write_bytes(b"not a database" * 100)
  with pytest.raises(store_lib.StoreError, match="is no archive"):
    store_lib.Store.read(tmp_path)
  with pytest.raises(store_lib.StoreError, match="is no archive"):
    _open(tmp_path)


_HOLD = """
import sys, time
from selfdev_jax import store
with store.lock(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def test_second_run_is_refused_with_the_firsts_pid(tmp_path):
  holder = subprocess.Popen(
      [sys.executable, "-c", _HOLD, str(tmp_path)],
      stdout=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parents[1],
  )
  with holder:
    assert holder.stdout.readline() == b"held\n"
    message = f"in use by process {holder.pid}"
    with (
        pytest.raises(store_lib.StoreError, match=message),
        store_lib.lock(tmp_path),
    ):
      pass
    os.kill(holder.pid, signal.SIGKILL)
  with store_lib.lock(tmp_path):  # A killed run leaves no lock behind.
    assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_full_disk_leaves_the_archive_intact(tmp_path):
  with _open(tmp_path) as archive:
    _rows(archive)
    # SQLite's own limit raises what a full disk raises.
    (pages,) = archive._db.execute("PRAGMA page_count").fetchone()
    archive._db.execute(f"PRAGMA max_page_count={pages}")
    long = [
        records.Completion("loop", 2, i, "x" * 9000, True) for i in range(9)
    ]
    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
      archive.add_completions(long)
    assert archive.completions("loop", 2) == []
    archive._db.execute("PRAGMA max_page_count=100000")
    archive.add_completions(long)
  with store_lib.Store.read(tmp_path) as reader:
    assert reader.completions("loop", 2) == long
    assert reader._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_score_grows_by_what_further_items_say(tmp_path):
  answer = lambda item, correct: records.Response(
      item, f"q{item}", "a", "g", "a", correct
  )
  with _open(tmp_path) as archive:
    first = records.Score("seed", "dev", 2, 1, 0.5, 1.0, "jax", items=5)
    archive.add_score(first, [answer(0, True), answer(1, False)])
    assert not archive.scores("dev")["seed"].complete
    copy = dataclasses.replace(first, model="ties:x", reused="seed")
    archive.add_score(copy)
    rest = records.Score("seed", "dev", 3, 2, 0.25, 1.0, "jax", items=5)
    rows = [answer(2, True), answer(3, False), answer(4, True)]
    archive.add_score(rest, rows)
    scores = archive.scores("dev")
    assert scores["seed"] == records.Score(
        "seed", "dev", 5, 3, 0.75, 2.0, "jax", items=5
    )
    # What was taken from it is as it is by now.
    assert scores["ties:x"].correct == 3 and scores["ties:x"].complete
    assert archive.answers("seed", "dev") == [True, False, True, False, True]
    with pytest.raises(sqlite3.IntegrityError):  # More than there are.
      archive.add_score(rest)


def test_troubles_of_the_scorer_are_counted(tmp_path):
  with _open(tmp_path) as archive:
    said = [
        records.Response(i, f"q{i}", "a", "g", None, False, trouble=trouble)
        for i, trouble in enumerate(("timeout", "", "timeout", "error"))
    ]
    archive.add_score(records.Score("seed", "dev", 4, 0), said)
    assert archive.troubles("dev") == {"error": 1, "timeout": 2}
    assert archive.responses("seed", "dev") == said
    assert archive.troubles("test") == {}
