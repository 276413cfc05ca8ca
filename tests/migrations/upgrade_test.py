"""An archive of schema 4 or 5 becomes what schema.py describes, or stays."""

import dataclasses
import hashlib
import json
import pathlib
import signal
import sqlite3
import subprocess
import sys

import alembic.autogenerate
import alembic.command
import alembic.migration
import numpy as np
import pytest
import sqlalchemy as sa

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import migrations
from selfdev_jax import records
from selfdev_jax import schema
from selfdev_jax import store as store_lib

_ROOT = pathlib.Path(__file__).parents[2]
_VERSIONS = _ROOT / "selfdev_jax" / "migrations" / "versions"
_CONFIG = config_lib.Config(
    name="t",
    seed_model="s",
    experts=("a",),
    seed=7,
    iterations=3,
    propose=config_lib.Propose(samples=3),
)
_SESSIONS = [{"jax": "1", "cpus": 2}, {"jax": "2", "cpus": 2}]
# Which of them did what is not known; what they have in common is.
_EITHER = {"cpus": 2, "note": "one of the 2 sessions before schema 5"}
_NAN = float("nan")

# (arm, iteration, item, text, digest), in the order of writing. The loop
# writes A again in its second iteration; E does what A does.
_WRITTEN = (
    ("loop", 1, 0, "a", "A"),
    ("loop", 1, 1, "b", "B"),
    ("loop", 1, 2, "bad", None),
    ("loop", 2, 0, "a", "A"),
    ("loop", 2, 1, "c", "C"),
    ("loop", 2, 2, "a", "A"),
    ("control", 2, 0, "e", "E"),
    ("control", 2, 1, "d", "D"),
    ("control", 2, 2, "c", "C"),
)
_FINGERPRINTS = {
    "A": [1.0, 0.1, 0.2, 0.3],
    "B": [_NAN] * 4,
    "C": [2.0, 0.1, 0.2, 0.3],
    "E": [1.00001, 0.1, 0.2, 0.3],
    "D": [],
}
# Model, split, answers, right ones, failure, reused.
_SCORES = (
    ("seed", "dev", 2, 1, "", ""),
    ("expert:a", "dev", 2, 0, "", ""),
    ("program:A", "dev", 2, 2, "", ""),
    ("program:B", "dev", 2, None, "non_finite", ""),
    ("program:C", "dev", 1, 1, "", ""),
    ("program:D", "dev", 2, 0, "", ""),
    ("program:E", "dev", 2, 2, "", "program:A"),
    ("ties:density=0.5,scale=1.0", "dev", 2, 1, "", ""),
    ("program:A", "test", 2, 1, "", ""),
)
# The control's verdicts have none: they belong to a session that was killed.
_TIMINGS = (
    ("loop", 0, "single models"),
    ("loop", 1, "propose"),
    ("loop", 1, "propose"),
    ("loop", 1, "admit"),
    ("loop", 1, "evaluate"),
    ("loop", 1, "evaluate"),
    ("loop", 1, "refine"),
    ("loop", 1, "refine"),
    ("loop", 2, "propose"),
    ("loop", 2, "admit"),
    ("loop", 2, "evaluate"),
    ("loop", 2, "refine"),
    ("control", 2, "propose"),
    ("control", 2, "evaluate"),
    ("loop", 0, "ties"),
    ("loop", 0, "search"),
    ("loop", 0, "best"),
)
_DONE = (("loop", 1, "refine"), ("loop", 2, "refine"), ("loop", 0, "search"))
# Iteration, item, chosen, rejected, their programs.
_PAIRS = (
    (1, 0, "a", "bad", "A", None),
    (1, 1, "a", "b", "A", "B"),
    (2, 0, "a", "c", "A", "C"),
)


def _insert(database, table, rows):
  for row in rows:
    marks = ",".join("?" * len(row))
    database.execute(f"INSERT INTO {table} VALUES ({marks})", row)


@pytest.fixture
def workdir(tmp_path):
  """With an archive as schema 4 had it."""
  database = sqlite3.connect(tmp_path / store_lib.ARCHIVE)
  database.execute("PRAGMA journal_mode=WAL")
  database.executescript((_VERSIONS / "schema_4.sql").read_text())
  meta = {
      "schema_version": 4,
      "config": config_lib.flatten(config_lib.to_dict(_CONFIG)),
      "identity": {"prompt": "p"},
      "sessions": _SESSIONS,
  }
  _insert(database, "meta", [(k, json.dumps(v)) for k, v in meta.items()])
  _insert(
      database,
      "completions",
      [(*row[:4], True, "jax 1") for row in _WRITTEN],
  )
  _insert(
      database,
      "programs",
      [
          (digest, f'{{"ir": "{digest}"}}', '{"equations": 3}', json.dumps(x))
          for digest, x in _FINGERPRINTS.items()
      ],
  )
  reason = lambda digest: ("", "", "") if digest else ("trace", "name", "no")
  _insert(
      database,
      "verdicts",
      [
          (*row[:3], f"def {row[3]}", row[4], *reason(row[4]))
          for row in _WRITTEN
      ],
  )
  _insert(
      database,
      "scores",
      [(*row[:4], 0.5, 0.25, "jax 1", *row[4:], 2) for row in _SCORES],
  )
  _insert(
      database,
      "questions",
      [(s, i, f"{s} {i}", "7") for s in ("dev", "test") for i in (0, 1)],
  )
  _insert(
      database,
      "responses",
      [
          (model, split, i, "x", None, i < right, i == 1, "timeout" * i)
          for model, split, n, right, failure, reused in _SCORES
          for i in range(0 if failure or reused else n)
      ],
  )
  _insert(database, "pairs", [(*row[:2], "p", *row[2:]) for row in _PAIRS])
  _insert(database, "steps", [(1, 1, '{"loss": 0.7}'), (2, 1, "{}")])
  _insert(database, "timings", [(*row, 1.5) for row in _TIMINGS])
  _insert(database, "done", _DONE)
  database.commit()
  database.close()
  return tmp_path


def _create(workdir):
  return store_lib.Store.create(workdir, _CONFIG, {"prompt": "p"}, {"jax": "3"})


def _bytes(workdir):
  return hashlib.sha256((workdir / store_lib.ARCHIVE).read_bytes()).digest()


def test_what_it_held_is_read_and_the_file_stays(workdir):
  before = _bytes(workdir)
  with store_lib.Store.read(workdir) as archive:
    assert archive.config() == _CONFIG
    assert archive.meta("identity") == {"prompt": "p"}
    assert archive.sessions() == [*_SESSIONS, _EITHER]
    assert archive.completions("control", 2) == [
        records.Completion("control", 2, i, text, True, "jax 1", 1)
        for i, text in enumerate("edc")
    ]
    assert [c.factory for c in archive.completions("loop", 2)] == [2, 2, 2]
    verdicts = {(v.arm, v.iteration, v.item): v for v in archive.verdicts()}
    assert len(verdicts) == len(_WRITTEN)
    for *place, text, digest in _WRITTEN:
      verdict = verdicts[tuple(place)]
      assert (verdict.source, verdict.digest) == (f"def {text}", digest)
    assert verdicts["loop", 1, 2].message == "no"
    assert archive.program("D") == '{"ir": "D"}'
    assert archive.stats("D") == {"equations": 3}
    for digest, numbers in archive.fingerprints().items():
      np.testing.assert_array_equal(numbers, _FINGERPRINTS[digest])
    assert [
        (s.model, s.split, s.n, s.correct, s.failure, s.reused)
        for split in ("dev", "test")
        for s in archive.scores(split).values()
    ] == list(_SCORES)
    assert archive.scores("dev")["program:C"] == records.Score(
        "program:C", "dev", 1, 1, 0.5, 0.25, "jax 1", items=2
    )
    assert archive.responses("seed", "dev") == [
        records.Response(0, "dev 0", "x", "7", None, True),
        records.Response(1, "dev 1", "x", "7", None, False, True, "timeout"),
    ]
    assert archive.steps(1) == [records.Step(1, 1, {"loss": 0.7})]
    assert [
        (a.arm, a.iteration, a.stage) for a in archive.activities()[:-1]
    ] == list(_TIMINGS)
    assert archive.activities()[0] == records.Activity(
        1, 3, "loop", 0, "single models", 7, None, 1.5
    )
  assert _bytes(workdir) == before


def test_every_row_names_what_it_was_made_by_and_from(workdir):
  first = {stage: 1 + i for i, stage in reversed([*enumerate(_TIMINGS)])}
  last = {stage: 1 + i for i, stage in enumerate(_TIMINGS)}
  killed = len(_TIMINGS) + 1
  with store_lib.Store.read(workdir) as archive:
    assert archive.activities()[-1].stage == "before schema 5"
    by = lambda table, *key: {
        tuple(row[:-1]) if key[1:] else row[0]: row[-1]
        for row in archive.rows(
            f"SELECT {', '.join(key)}, activity FROM {table}"
        )
    }
    assert by("factories", "iteration") == {
        1: first["loop", 1, "propose"],
        2: last["loop", 1, "refine"],
        3: last["loop", 2, "refine"],
    }
    completions = by("completions", "arm", "iteration", "item")
    assert completions["loop", 1, 2] == first["loop", 1, "propose"]
    assert completions["control", 2, 0] == first["control", 2, "propose"]
    verdicts = by("verdicts", "arm", "iteration", "item")
    assert verdicts["loop", 2, 0] == first["loop", 2, "admit"]
    assert verdicts["control", 2, 0] == killed
    assert by("programs", "digest", "arm", "iteration", "item") == {
        ("A", "loop", 1, 0): first["loop", 1, "admit"],
        ("B", "loop", 1, 1): first["loop", 1, "admit"],
        ("C", "loop", 2, 1): first["loop", 2, "admit"],
        ("D", "control", 2, 1): killed,
        ("E", "control", 2, 0): killed,
    }
    scores = {
        ("seed", "dev", None): first["loop", 0, "single models"],
        ("expert:a", "dev", None): first["loop", 0, "single models"],
        ("program:A", "dev", "A"): first["loop", 1, "evaluate"],
        ("program:B", "dev", "B"): first["loop", 1, "evaluate"],
        ("program:C", "dev", "C"): first["loop", 2, "evaluate"],
        ("program:D", "dev", "D"): first["control", 2, "evaluate"],
        ("program:E", "dev", "E"): first["control", 2, "evaluate"],
        (_SCORES[7][0], "dev", None): first["loop", 0, "ties"],
        ("program:A", "test", "A"): first["loop", 0, "best"],
    }
    assert by("scores", "model", "split", "program") == scores
    found = {key[:2]: number for key, number in scores.items()}
    responses = by("responses", "model", "split")
    assert responses == {key: found[key] for key in responses}
    assert by("steps", "iteration", "step") == {
        (1, 1): last["loop", 1, "refine"],
        (2, 1): last["loop", 2, "refine"],
    }
    assert by("done", "arm", "iteration", "stage") == {
        **{stage: last[stage] for stage in _DONE},
        **{
            (arm, t, "select"): first[arm, t, "evaluate"]
            for arm, t in (("loop", 1), ("loop", 2), ("control", 2))
        },
    }
    # A counts for the iteration that wrote it first, also as an elite.
    assert [
        (p.chosen_iteration, p.chosen_item, p.rejected_item)
        for t in (1, 2)
        for p in archive.pairs(t)
    ] == [(1, 0, 2), (1, 0, 1), (1, 0, 1)]


def test_candidates_are_what_was_new_and_within_the_budget(workdir):
  with store_lib.Store.read(workdir) as archive:
    assert archive.candidates("loop", 1) == ["A", "B"]
    assert archive.candidates("loop", 2) == ["C"]
    assert archive.candidates("control", 1) == []
    assert archive.candidates("control", 2) == ["D"]  # And not C too.


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM scores WHERE model LIKE 'program:%'",
        "DELETE FROM verdicts WHERE arm = 'loop' AND item = 1",
        "UPDATE meta SET value = replace(value, 'samples\": 3', 'samples\": 9')"
        " WHERE key = 'config'",
    ],
    ids=["no score", "not all judged", "not all sampled"],
)
def test_candidates_are_not_settled_too_early(workdir, change):
  with sqlite3.connect(workdir / store_lib.ARCHIVE) as database:
    for table in ("responses", "pairs"):
      database.execute(f"DELETE FROM {table}")
    assert database.execute(change).rowcount
  database.close()
  with store_lib.Store.read(workdir) as archive:
    assert archive.candidates("loop", 1) == []
    assert not archive.is_done("loop", 1, "select")


def test_the_control_waits_for_the_loops_budget(workdir):
  with sqlite3.connect(workdir / store_lib.ARCHIVE) as database:
    database.execute("DELETE FROM pairs WHERE iteration = 2")
    database.execute(
        "DELETE FROM verdicts WHERE arm = 'loop' AND iteration = 2"
    )
  database.close()
  with store_lib.Store.read(workdir) as archive:
    assert archive.candidates("loop", 1) == ["A", "B"]
    assert archive.candidates("control", 2) == []


def _layout(connection):
  """{name of a table or index: its SQL without spaces and quotes}."""
  rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master").all()
  plain = str.maketrans("", "", ' \t\n"')
  return {name: sql and sql.translate(plain) for name, sql in rows}


def test_it_has_the_tables_of_a_new_archive(workdir):
  _check_tables(workdir)


def _check_tables(workdir):
  _create(workdir).close()
  path = workdir / store_lib.ARCHIVE
  upgraded = sa.create_engine(f"sqlite:///{path}")
  new = sa.create_engine("sqlite://")
  with upgraded.connect() as old, new.connect() as fresh:
    schema.METADATA.create_all(fresh)
    migrations.stamp(fresh)
    assert _layout(old) == _layout(fresh)
    context = alembic.migration.MigrationContext.configure(old)
    assert not alembic.autogenerate.compare_metadata(context, schema.METADATA)
    assert context.get_current_heads() == (schema.REVISION,)
  upgraded.dispose()


def test_a_run_that_goes_on_upgrades_once_and_in_place(workdir, capsys):
  with _create(workdir) as archive:
    assert archive.sessions() == [*_SESSIONS, _EITHER, {"jax": "3"}]
    with archive.activity("loop", 3, "propose"):
      archive.add_completions(
          [records.Completion("loop", 3, 0, "x", True, "", 3)]
      )
  assert "from schema 4 to 6" in capsys.readouterr().err
  with _create(workdir) as archive:
    assert len(archive.sessions()) == 5
    assert len(archive.completions("loop", 3)) == 1
    assert archive.rows("PRAGMA integrity_check") == [("ok",)]
  assert not capsys.readouterr().err


@pytest.fixture
def workdir_5(workdir):
  """With an archive as schema 5 had it."""
  engine = sa.create_engine(f"sqlite:///{workdir / store_lib.ARCHIVE}")
  with engine.begin() as connection:
    alembic_config = migrations._config(connection)
    alembic.command.stamp(alembic_config, "4")
    alembic.command.upgrade(alembic_config, "5")
    names = connection.exec_driver_sql("SELECT name FROM sqlite_master")
    assert "incidents" not in names.scalars().all()
  engine.dispose()
  return workdir


def _dump(workdir):
  """{table: its rows}, without what says which schema it is."""
  with sqlite3.connect(workdir / store_lib.ARCHIVE) as database:
    rows = {
        name: database.execute(f"SELECT * FROM {name}").fetchall()
        for (name,) in database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
            " AND name != 'alembic_version'"
        )
    }
  database.close()
  return rows


def test_schema_5_is_read_and_the_file_stays(workdir_5):
  before = _bytes(workdir_5)
  with store_lib.Store.read(workdir_5) as archive:
    assert archive.incidents() == []
    assert len(archive.verdicts()) == len(_WRITTEN)
    assert archive.candidates("loop", 1) == ["A", "B"]
  assert _bytes(workdir_5) == before


def test_a_run_brings_schema_5_up_to_date_in_place(workdir_5, capsys):
  before = _dump(workdir_5)
  with _create(workdir_5) as archive:
    found = _dump(workdir_5)
    assert found.pop("incidents") == []
    assert found.pop("sessions")[:-1] == before.pop("sessions")
    assert found == before
    incident = records.Incident("lost", "w1", "host", "killed")
    with archive.activity("loop", 3, "propose"):
      archive.add_incident(incident)
    (kept,) = archive.incidents()
    assert dataclasses.replace(kept, at=None) == incident
  assert "from schema 5 to 6" in capsys.readouterr().err


def test_schema_5_becomes_the_tables_of_a_new_archive(workdir_5):
  _check_tables(workdir_5)


def test_a_run_of_another_config_upgrades_nothing(workdir):
  before = _bytes(workdir)
  other = dataclasses.replace(_CONFIG, seed=_CONFIG.seed + 1)
  with pytest.raises(store_lib.StoreError, match="another config"):
    store_lib.Store.create(workdir, other, {"prompt": "p"}, {"jax": "3"})
  assert _bytes(workdir) == before


def _statements(workdir, monkeypatch, stop=None):
  """How many an upgrade runs; breaks one off before statement `stop`."""
  count, whole = 0, migrations.upgrade

  def tick(*_):
    nonlocal count
    count += 1
    if count == stop:
      raise RuntimeError("broken off")

  def upgrade(connection):
    sa.event.listen(connection, "before_cursor_execute", tick)
    whole(connection)
    # What comes now is not the upgrade's, nor in its transaction.
    sa.event.remove(connection, "before_cursor_execute", tick)

  with monkeypatch.context() as patch:
    patch.setattr(migrations, "upgrade", upgrade)
    store_lib.Store.read(workdir).close() if stop is None else _create(workdir)
  return count


def test_broken_off_it_leaves_the_old_archive(workdir, monkeypatch):
  before = _bytes(workdir)
  statements = _statements(workdir, monkeypatch)
  for stop in range(1, statements, statements // 8):
    with pytest.raises(RuntimeError, match="broken off"):
      _statements(workdir, monkeypatch, stop)
    assert _bytes(workdir) == before
  with store_lib.Store.read(workdir) as archive:
    assert len(archive.verdicts()) == len(_WRITTEN)


_KILLED = """
import os, signal, sys
import sqlalchemy as sa
from selfdev_jax import migrations, store

with store.Store.read(sys.argv[1]) as archive:
  config = archive.config()
whole, left = migrations.upgrade, int(sys.argv[2])

def tick(*_):
  global left
  left -= 1
  if not left:
    os.kill(os.getpid(), signal.SIGKILL)

def upgrade(connection):
  sa.event.listen(connection, "before_cursor_execute", tick)
  whole(connection)

migrations.upgrade = upgrade
store.Store.create(sys.argv[1], config, {"prompt": "p"}, {})
"""


def test_killed_it_leaves_the_old_archive(workdir, monkeypatch, capsys):
  before = _bytes(workdir)
  statements = _statements(workdir, monkeypatch)
  command = [sys.executable, "-c", _KILLED, str(workdir), str(statements)]
  killed = subprocess.run(command, cwd=_ROOT, check=False)
  assert killed.returncode == -signal.SIGKILL
  assert _bytes(workdir) == before
  with _create(workdir) as archive:
    assert len(archive.verdicts()) == len(_WRITTEN)
  assert "from schema 4 to 6" in capsys.readouterr().err


def test_what_refers_to_nothing_is_told(workdir):
  with sqlite3.connect(workdir / store_lib.ARCHIVE) as database:
    database.execute("DELETE FROM questions WHERE item = 1 AND split = 'test'")
  database.close()
  before = _bytes(workdir)
  for opened in (store_lib.Store.read, _create):
    with pytest.raises(errors.UserError, match="names what questions does not"):
      opened(workdir)
    assert _bytes(workdir) == before


def test_an_empty_run_is_upgraded(workdir):
  with sqlite3.connect(workdir / store_lib.ARCHIVE) as database:
    for table in ("responses", "pairs", "steps", "done", "scores", "verdicts"):
      database.execute(f"DELETE FROM {table}")
    for table in ("programs", "completions", "questions", "timings"):
      database.execute(f"DELETE FROM {table}")
    database.execute("UPDATE meta SET value = '[]' WHERE key = 'sessions'")
  database.close()
  with _create(workdir) as archive:
    assert archive.sessions() == [{}, {"jax": "3"}]
    assert archive.activities() == []
    with archive.activity("loop", 1, "propose"):
      archive.add_factory(1, "")
