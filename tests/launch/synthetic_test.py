import sqlite3

import pytest

from launch import synthetic
from selfdev_jax import records
from selfdev_jax import store as store_lib

_PLAN = synthetic.Plan(programs=200, answers=20_000)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("synthetic")
  synthetic.make(path, _PLAN)
  return path


def test_it_is_a_whole_archive_of_the_planned_size(workdir):
  with store_lib.Store.read(workdir) as archive:
    assert archive.rows("PRAGMA integrity_check") == [("ok",)]
    assert archive.rows("PRAGMA foreign_key_check") == []
    assert archive.config() == _PLAN.config()
    count = lambda table: archive.rows(f"SELECT COUNT(*) FROM {table}")[0][0]
    assert 200 <= count("programs") <= 200 + 19
    assert count("responses") == pytest.approx(20_000, rel=0.1)
    verdicts = archive.verdicts()
    assert len(verdicts) == 19 * _PLAN.samples == count("completions")
    rejected = sum(not v.admitted for v in verdicts) / len(verdicts)
    assert rejected == pytest.approx(0.6, abs=0.03)
    # Each sweep has as many settings as the loop has candidates.
    scores = archive.scores(records.DEV)
    candidates = sum(len(archive.candidates("loop", t)) for t in range(1, 11))
    for family in records.SWEEPS:
      names = [m for m in scores if m.startswith(f"{family}:")]
      assert len(names) == candidates
    for model, score in scores.items():
      if score.correct is not None and not score.reused:
        assert archive.answers(model, records.DEV).count(True) == score.correct
    assert archive.is_done("loop", 0, "export")
    assert len(archive.scores(records.TEST)) >= 4


def test_the_same_plan_gives_the_same_rows(workdir, tmp_path):
  synthetic.make(tmp_path, _PLAN)
  one, other = (
      sqlite3.connect(path / store_lib.ARCHIVE) for path in (workdir, tmp_path)
  )
  with one, other:
    assert list(one.iterdump()) == list(other.iterdump())
  one.close()
  other.close()
