"""The archive of a run: one SQLite file in the workdir, one writer, resumable.

Every method that writes commits before it returns, and the commit is on the
disk: a killed process loses at most the record it was about to write. A reader
sees one state, that of its first look, however long it reads and whatever is
written meanwhile.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import sqlite3
import tempfile
import time
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite as sqlite_dialect

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import schema

ARCHIVE = "archive.sqlite"
_LOCK = "lock"
# What a run writes into its workdir, beside the archive.
_WRITTEN = ("best", "dpo", "factories", "report.html", "tensorboard", "trace")

# The stage that ends the search: no test score before it, no other after it.
SEARCH = "search"

_OLDEST = 4  # Schema that can be brought up to date.
# Scores as they are by now: one that was taken from another model is as that
# one's. To be followed by a WHERE on `s`; `place` is the order of writing.
SCORES = """
SELECT s.rowid AS place, s.model, s.split, coalesce(o.n, s.n) AS n,
  CASE WHEN s.reused IS NULL THEN s.correct ELSE o.correct END AS correct,
  s.merge_s, s.evaluate_s, s.engine,
  coalesce(o.failure, s.failure) AS failure, coalesce(s.reused, '') AS reused,
  s.items, s.weights, s.at
FROM scores s LEFT JOIN scores o ON o.model = s.reused AND o.split = s.split
"""
_SCORE = ", ".join(field.name for field in dataclasses.fields(records.Score))

_BUSY_S = 30.0  # How long a statement waits for another process.
_BEAT_S = 1.0  # An activity says at least so often how far it is.


class StoreError(errors.UserError):
  """A workdir that cannot be used as asked."""


def _open_lock(workdir):
  path = pathlib.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    return open(path / _LOCK, "a+", encoding="utf-8")
  except OSError as error:
    raise StoreError(f"workdir {workdir} cannot be used: {error}") from None


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """Holds the workdir for one run.

  The kernel drops the lock when the process dies, however it dies.

  Raises:
    StoreError: naming the pid that holds it.
  """
  with _open_lock(workdir) as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise StoreError(
          f"{workdir} is in use by process {file.read().strip() or '?'}; wait"
          " for it, stop it, or choose another --workdir"
      ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    yield


def is_running(workdir: str | os.PathLike) -> bool:
  """Whether a process on this machine holds the workdir; takes no lock."""
  try:
    inode = os.stat(pathlib.Path(workdir) / _LOCK).st_ino
    locks = pathlib.Path("/proc/locks").read_text(encoding="utf-8")
  except OSError:
    return False
  return any(
      f":{inode} " in line and "FLOCK" in line for line in locks.splitlines()
  )


class Store:
  """Reads and writes one archive; a context manager.

  Use `Store.create` for a run (creates or resumes) and `Store.read` for
  everything that only looks.

  Attributes:
    workdir: the run's directory.
  """

  def __init__(
      self,
      connection: sqlite3.Connection,
      workdir: pathlib.Path,
      resources: contextlib.ExitStack | None = None,
  ):
    self.workdir = workdir
    self._resources = resources or contextlib.ExitStack()
    engine = sa.create_engine(
        "sqlite://",
        creator=lambda: connection,
        poolclass=sa.StaticPool,
        # Transactions are begun here, in the way that each needs.
        isolation_level="AUTOCOMMIT",
    )

    @sa.event.listens_for(engine, "handle_error")
    def keep(context):
      # A file does not disconnect. After Ctrl-C within a statement there is
      # still a transaction to roll back.
      context.is_disconnect = False

    self._db = engine.connect()
    self._session: int | None = None
    self._seed = 0
    self._activity: records.Activity | None = None
    self._beat = 0.0
    # (split, item) of questions that this session has kept.
    self._asked: set[tuple[str, int]] = set()

  @classmethod
  def create(
      cls,
      workdir: str | os.PathLike,
      config: config_lib.Config,
      identity: Mapping[str, str],
      provenance: Mapping[str, Any],
  ) -> "Store":
    """Opens the workdir's archive for writing, creating it when absent.

    An archive of an earlier version of this package is brought up to date.

    Args:
      workdir: a directory; made when absent.
      config: the run's config; has to equal the one of an existing archive,
        but for where it runs.
      identity: what else has to be equal to resume, such as the digests of
        the models' weights.
      provenance: versions and hardware; kept from every session.

    Raises:
      StoreError: if the workdir belongs to another run, naming what differs,
        or to none but has what a run would overwrite; if the archive is
        damaged or of a later version.
    """
    path = pathlib.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    _check_free(path)
    with _explained(path):
      if (path / ARCHIVE).is_file():
        _check_whole(path)
      connection = sqlite3.connect(
          path / ARCHIVE, isolation_level=None, timeout=_BUSY_S
      )
      store = cls(connection, path)
      try:
        store._begin(config, identity, provenance)
      except BaseException:
        store.close()
        raise
    return store

  def _begin(self, config, identity, provenance):
    found = _revision(self._db, self.workdir)
    if found is not None:
      self._check(config, identity)
    run = self._db.exec_driver_sql
    run("PRAGMA journal_mode=WAL")
    # Each commit reaches the disk before the next begins.
    run("PRAGMA synchronous=FULL")
    if found is None:
      self._make(config, identity)
    elif found != schema.REVISION:
      self._upgrade()
      progress.note(
          f"{self.workdir / ARCHIVE} was brought from schema {found} to"
          f" {schema.REVISION}"
      )
    run("PRAGMA foreign_keys=ON")
    self._seed = config.seed
    with self._transaction():
      self._session = self._insert(
          schema.SESSIONS, [{"provenance": _dumps(provenance)}]
      )

  def _make(self, config, identity):
    """Tables and their first rows in one transaction.

    A run killed here leaves either nothing or a whole archive.
    """
    from selfdev_jax import migrations

    flat = config_lib.flatten(config_lib.to_dict(config))
    meta = {"config": flat, "identity": dict(identity)}
    with self._transaction():
      schema.METADATA.create_all(self._db)
      migrations.stamp(self._db)
      self._insert(
          schema.META,
          [{"key": k, "value": _dumps(v)} for k, v in meta.items()],
      )

  def _upgrade(self):
    # Alembic is only loaded where there is something to do.
    from selfdev_jax import migrations

    with self._transaction():
      migrations.upgrade(self._db)

  @classmethod
  def read(cls, workdir: str | os.PathLike) -> "Store":
    """Opens an existing archive read-only, also while a run writes to it.

    Everything it says is of one moment; open another to see what came after.
    An archive of an earlier version of this package is read from an upgraded
    copy, and stays as it is.

    Raises:
      StoreError: if there is none, or it is damaged or of a later version.
    """
    path = pathlib.Path(workdir)
    if not (path / ARCHIVE).is_file():
      raise StoreError(
          f"{workdir} holds no run ({ARCHIVE} is missing); start one with"
          " python -m launch.self_develop --config=configs/tiny.py"
          f" --workdir={workdir}"
      )
    with _explained(path), contextlib.ExitStack() as stack:
      connection = _open_to_read(path / ARCHIVE, stack)
      store = cls(connection, path)
      stack.callback(store._db.close)
      found = _revision(store._db, path)
      if found is None:
        raise StoreError(f"{path / ARCHIVE} is no archive: it has no tables")
      if found != schema.REVISION:
        store._db.close()
        store = cls(_upgraded(connection, stack), path)
        store._upgrade()
      store._db.exec_driver_sql("BEGIN")
      # A transaction sees what there is when it first reads.
      _revision(store._db, path)
      store._resources = stack.pop_all()
    return store

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    self._db.close()
    self._db.engine.dispose()
    self._resources.close()

  def _check(self, config, identity):
    ours = json.loads(_dumps(config_lib.flatten(config_lib.to_dict(config))))
    ours = config_lib.without_places(ours) | dict(identity)
    theirs = config_lib.without_places(self.meta("config"))
    theirs |= self.meta("identity")
    differing = [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differing:
      raise StoreError(
          f"{self.workdir} holds a run of another config, which differs in"
          f" {'; '.join(differing)}. Choose another --workdir"
      )

  # How everything is read and written.

  def rows(self, statement: sa.Executable | str, **values: Any) -> list[Any]:
    """The rows of a query.

    Args:
      statement: of SQLAlchemy, or SQL with `:name` for each of `values`.
      **values: of its parameters.
    """
    if isinstance(statement, str):
      statement = sa.text(statement)
    with _explained(self.workdir):
      return self._db.execute(statement, values).fetchall()

  @contextlib.contextmanager
  def _transaction(self) -> Iterator[None]:
    start = time.monotonic()
    with _explained(self.workdir):
      try:
        self._db.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        self._record_activity()
        self._db.exec_driver_sql("COMMIT")
      except BaseException:
        # A full disk has rolled back already.
        if self._db.connection.dbapi_connection.in_transaction:
          self._db.exec_driver_sql("ROLLBACK")
        raise
    if self._activity is not None:
      self._beat = time.monotonic()
      self._activity = dataclasses.replace(
          self._activity,
          writing_s=self._activity.writing_s + self._beat - start,
      )

  def _insert(self, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> int:
    """Returns the rowid of a single row."""
    if not rows:
      return 0
    if "activity" in table.c:
      rows = [{**row, "activity": self._current().id} for row in rows]
    done = self._db.execute(sa.insert(table), rows)
    return done.lastrowid if len(rows) == 1 else 0

  # Meta.

  def meta(self, key: str) -> Any:
    """`config` (flat keys) or `identity`."""
    ((text,),) = self.rows(
        sa.select(schema.META.c.value).where(schema.META.c.key == key)
    )
    return json.loads(text)

  def config(self) -> config_lib.Config:
    """The run's config."""
    return config_lib.from_config_dict(
        config_lib.unflatten(self.meta("config"))
    )

  def sessions(self) -> list[dict[str, Any]]:
    """Versions and hardware of each start of the run."""
    rows = self.rows(
        sa.select(schema.SESSIONS.c.provenance).order_by(schema.SESSIONS.c.id)
    )
    return [json.loads(text) for (text,) in rows]

  # Activities.

  def _current(self) -> records.Activity:
    if self._activity is None:
      raise RuntimeError("what is written belongs to an activity; none is open")
    return self._activity

  @contextlib.contextmanager
  def activity(
      self,
      arm: str,
      iteration: int,
      stage: str,
      total: int | None = None,
      unit: str = "",
  ) -> Iterator[None]:
    """What is written in the block was computed by this.

    Records how long it took, also where it is cut short.

    Args:
      arm: whose work it is.
      iteration: likewise; 0 for none.
      stage: what is done.
      total: units that are to do, where that is known; see `advance`.
      unit: of these.
    """
    if self._activity is not None:
      raise RuntimeError(f"{stage} begins within {self._activity.stage}")
    row = {
        "session": self._session,
        "arm": arm,
        "iteration": iteration,
        "stage": stage,
        "seed": self._seed,
        "started": time.time(),
        "seconds": 0.0,
        "writing_s": 0.0,
        "done": 0,
        "total": total,
        "unit": unit,
        "finished": False,
    }
    self._start = time.monotonic()
    with self._transaction():
      number = self._insert(schema.ACTIVITIES, [row])
    self._activity = records.Activity(number, **row)
    try:
      yield
      self._activity = dataclasses.replace(self._activity, finished=True)
    finally:
      try:
        with self._transaction():
          pass
      finally:
        self._activity = None

  def advance(self, n: int):
    """Counts `n` further units of the activity as done."""
    activity = self._current()
    self._activity = dataclasses.replace(activity, done=activity.done + n)
    if time.monotonic() - self._beat > _BEAT_S:
      with self._transaction():
        pass

  def _record_activity(self):
    """How far the activity is, in the transaction of what it wrote."""
    if self._activity is None:
      return
    table = schema.ACTIVITIES
    self._db.execute(
        sa.update(table)
        .where(table.c.id == self._activity.id)
        .values(
            seconds=time.monotonic() - self._start,
            writing_s=self._activity.writing_s,
            done=self._activity.done,
            finished=self._activity.finished,
        )
    )

  def activities(self) -> list[records.Activity]:
    """In the order in which they began."""
    rows = self.rows(sa.select(schema.ACTIVITIES).order_by("id"))
    return [
        records.Activity(*row[:-1], finished=bool(row.finished)) for row in rows
    ]

  def is_done(self, arm: str, iteration: int, stage: str) -> bool:
    c = schema.DONE.c
    return bool(
        self.rows(
            sa.select(c.stage).where(
                c.arm == arm, c.iteration == iteration, c.stage == stage
            )
        )
    )

  @contextlib.contextmanager
  def stage(
      self,
      arm: str,
      iteration: int,
      stage: str,
      total: int | None = None,
      unit: str = "",
  ) -> Iterator[bool]:
    """An activity that runs once a run: yields whether it still has to.

    Marked done unless the block raises. Arguments are those of `activity`.
    """
    if self.is_done(arm, iteration, stage):
      yield False
      return
    with self.activity(arm, iteration, stage, total, unit):
      yield True
      row = {"arm": arm, "iteration": iteration, "stage": stage}
      with self._transaction():
        self._insert(schema.DONE, [row])

  # Factories, completions, verdicts, programs.

  def add_factory(self, iteration: int, digest: str):
    """Names the factory of an iteration by its weights, unless it has a name.

    Args:
      iteration: whose completions it writes.
      digest: of the adapter; empty for the seed model.
    """
    statement = sqlite_dialect.insert(schema.FACTORIES).on_conflict_do_nothing()
    row = {
        "iteration": iteration,
        "digest": digest,
        "activity": self._current().id,
    }
    with self._transaction():
      self._db.execute(statement, [row])

  def add_completions(self, completions: Sequence[records.Completion]):
    with self._transaction():
      self._insert(
          schema.COMPLETIONS, [dataclasses.asdict(c) for c in completions]
      )

  def completions(self, arm: str, iteration: int) -> list[records.Completion]:
    c = schema.COMPLETIONS.c
    return [
        records.Completion(*row[:4], bool(row.finished), *row[5:7])
        for row in self.rows(
            sa.select(schema.COMPLETIONS)
            .where(c.arm == arm, c.iteration == iteration)
            .order_by(c.item)
        )
    ]

  def engines(self) -> list[str]:
    """What has sampled so far, such as "vllm 0.32.0"; "" where unknown."""
    return [
        row[0]
        for row in self.rows(
            "SELECT engine FROM completions UNION SELECT engine FROM scores"
            " EXCEPT SELECT ''"
        )
    ]

  def add_verdict(
      self,
      verdict: records.Verdict,
      program: str = "",
      stats: Mapping[str, Any] | None = None,
      fingerprint: Sequence[float] = (),
  ):
    """Keeps a verdict and, for an admitted program, its IR (JSON)."""
    about = dataclasses.asdict(verdict)
    with self._transaction():
      if verdict.admitted:
        row = {
            "digest": verdict.digest,
            "program": program,
            "stats": _dumps(stats or {}),
            "fingerprint": np.asarray(fingerprint, "<f8").tobytes(),
            "activity": self._current().id,
        } | {key: about[key] for key in ("arm", "iteration", "item")}
        self._db.execute(
            sqlite_dialect.insert(schema.PROGRAMS).on_conflict_do_nothing(),
            [row],
        )
      self._insert(schema.VERDICTS, [about])

  def verdicts(
      self, arm: str | None = None, iteration: int | None = None
  ) -> list[records.Verdict]:
    """In order of arm, iteration and item; None takes all."""
    return [
        records.Verdict(*row)
        for row in self.rows(
            "SELECT arm, iteration, item, source, digest, stage, code, message"
            " FROM verdicts WHERE (:arm IS NULL OR arm = :arm)"
            " AND (:iteration IS NULL OR iteration = :iteration)"
            " ORDER BY arm, iteration, item",
            arm=arm,
            iteration=iteration,
        )
    ]

  def _program(self, digest: str) -> Any:
    (row,) = self.rows(
        sa.select(schema.PROGRAMS).where(schema.PROGRAMS.c.digest == digest)
    )
    return row

  def program(self, digest: str) -> str:
    """The JSON program IR."""
    return self._program(digest).program

  def program_of(self, model: str) -> str:
    """The program behind the name of a score; empty for a baseline's."""
    if not model.startswith(records.PROGRAM):
      return ""
    return self.program(model.removeprefix(records.PROGRAM))

  def stats(self, digest: str) -> dict[str, Any]:
    """What the verifier counted in a program."""
    return json.loads(self._program(digest).stats)

  def fingerprints(self) -> dict[str, list[float]]:
    """Of all admitted programs, by digest."""
    c = schema.PROGRAMS.c
    return {
        digest: np.frombuffer(numbers, "<f8").tolist()
        for digest, numbers in self.rows(sa.select(c.digest, c.fingerprint))
    }

  def add_candidates(self, arm: str, iteration: int, digests: Sequence[str]):
    """Settles what an arm evaluates in an iteration, in this order.

    Once more where a session was killed before it had noted that it is done.
    """
    c = schema.CANDIDATES.c
    with self._transaction():
      self._db.execute(
          sa.delete(schema.CANDIDATES).where(
              c.arm == arm, c.iteration == iteration
          )
      )
      self._insert(
          schema.CANDIDATES,
          [
              {
                  "arm": arm,
                  "iteration": iteration,
                  "position": i,
                  "digest": digest,
              }
              for i, digest in enumerate(digests)
          ],
      )

  def candidates(self, arm: str, iteration: int) -> list[str]:
    """Digests, in order; empty also where they are not settled yet."""
    c = schema.CANDIDATES.c
    return [
        row.digest
        for row in self.rows(
            sa.select(c.digest)
            .where(c.arm == arm, c.iteration == iteration)
            .order_by(c.position)
        )
    ]

  # Scores.

  def add_score(
      self, score: records.Score, responses: Sequence[records.Response] = ()
  ):
    """Keeps a score with the answers behind it, or adds them to what is kept.

    Args:
      score: of these answers alone; its `merge_s` and `evaluate_s` add up too.
      responses: to further items of the split.

    Raises:
      RuntimeError: for a test score while the search goes on, and for a
        development score after it: the test set selects nothing.
    """
    is_over = self.is_done(records.LOOP, 0, SEARCH)
    if is_over != (score.split == records.TEST):
      raise RuntimeError(
          f"a {score.split} score of {score.model}"
          f" {'after' if is_over else 'during'} the search"
      )
    is_program = score.model.startswith(records.PROGRAM)
    digest = score.model.removeprefix(records.PROGRAM)
    row = dataclasses.asdict(score) | {
        "reused": score.reused or None,
        "program": digest if is_program else None,
        "at": time.time(),
        "activity": self._current().id,
    }
    insert = sqlite_dialect.insert(schema.SCORES)
    kept, added = schema.SCORES.c, insert.excluded
    statement = insert.on_conflict_do_update(
        index_elements=["model", "split"],
        set_={
            name: kept[name] + added[name]
            for name in ("n", "correct", "merge_s", "evaluate_s")
        }
        | {
            "engine": sa.case(
                (
                    sa.func.instr(
                        ", " + kept.engine + ",", ", " + added.engine + ","
                    )
                    > 0,
                    kept.engine,
                ),
                else_=kept.engine + ", " + added.engine,
            ),
            "at": added.at,
        },
    )
    questions = sqlite_dialect.insert(schema.QUESTIONS).on_conflict_do_nothing()
    new = [r for r in responses if (score.split, r.item) not in self._asked]
    with self._transaction():
      self._db.execute(statement, [row])
      if new:
        self._db.execute(
            questions,
            [
                {
                    "split": score.split,
                    "item": r.item,
                    "prompt": r.prompt,
                    "gold": r.gold,
                }
                for r in new
            ],
        )
      self._insert(
          schema.RESPONSES,
          [
              {
                  "model": score.model,
                  "split": score.split,
                  "item": r.item,
                  "text": r.text,
                  "extracted": r.extracted,
                  "correct": r.correct,
                  "truncated": r.truncated,
                  "trouble": r.trouble,
              }
              for r in responses
          ],
      )
    self._asked.update((score.split, r.item) for r in new)

  def scores(self, split: str) -> dict[str, records.Score]:
    """All scores of one split by model, in the order they were written.

    One that was taken from another model is as that one's is by now.
    """
    rows = self.rows(
        f"SELECT {_SCORE} FROM ({SCORES} WHERE s.split = :split)"
        " ORDER BY place",
        split=split,
    )
    return {row[0]: records.Score(*row) for row in rows}

  def score(self, model: str, split: str) -> records.Score | None:
    """One of `scores`."""
    rows = self.rows(
        f"SELECT {_SCORE} FROM"
        f" ({SCORES} WHERE s.model = :model AND s.split = :split)",
        model=model,
        split=split,
    )
    return records.Score(*rows[0]) if rows else None

  def answers(self, model: str, split: str) -> list[bool]:
    """Which items a model has right, of those that it has answered."""
    c = schema.RESPONSES.c
    return [
        bool(row.correct)
        for row in self.rows(
            sa.select(c.correct)
            .where(c.model == model, c.split == split)
            .order_by(c.item)
        )
    ]

  def responses(self, model: str, split: str) -> list[records.Response]:
    return [
        records.Response(*row[:5], *map(bool, row[5:7]), row[7])
        for row in self.rows(
            "SELECT item, prompt, text, gold, extracted, correct, truncated,"
            " trouble FROM responses JOIN questions USING (split, item)"
            " WHERE model = :model AND split = :split ORDER BY item",
            model=model,
            split=split,
        )
    ]

  def truncated(self, split: str) -> int:
    """Questions that lost their beginning, as they did not fit the model."""
    ((n,),) = self.rows(
        "SELECT COUNT(DISTINCT item) FROM responses"
        " WHERE truncated AND split = :split",
        split=split,
    )
    return n

  def troubles(self, split: str) -> dict[str, int]:
    """Answers that the scorer could not compare, by what happened."""
    rows = self.rows(
        "SELECT trouble, COUNT(*) FROM responses"
        " WHERE trouble != '' AND split = :split GROUP BY trouble"
        " ORDER BY trouble",
        split=split,
    )
    return dict(map(tuple, rows))

  # Preferences and DPO.

  def replace_pairs(self, iteration: int, pairs: Sequence[records.Pair]):
    table = schema.PAIRS
    with self._transaction():
      self._db.execute(sa.delete(table).where(table.c.iteration == iteration))
      self._insert(
          table,
          [dataclasses.asdict(pair) | {"arm": records.LOOP} for pair in pairs],
      )

  def pairs(self, iteration: int) -> list[records.Pair]:
    c = schema.PAIRS.c
    names = [field.name for field in dataclasses.fields(records.Pair)]
    return [
        records.Pair(*row)
        for row in self.rows(
            sa.select(*(c[name] for name in names))
            .where(c.iteration == iteration)
            .order_by(c.item)
        )
    ]

  def put_steps(self, steps: Sequence[records.Step]):
    """Keeps steps of DPO; one that is computed again replaces itself."""
    rows = [
        dataclasses.asdict(step)
        | {"metrics": _dumps(step.metrics), "activity": self._current().id}
        for step in steps
    ]
    if rows:
      with self._transaction():
        self._db.execute(
            sa.insert(schema.STEPS).prefix_with("OR REPLACE"), rows
        )

  def steps(self, iteration: int | None = None) -> list[records.Step]:
    return [
        records.Step(*row[:2], json.loads(row.metrics))
        for row in self.rows(
            "SELECT iteration, step, metrics FROM steps"
            " WHERE :iteration IS NULL OR iteration = :iteration"
            " ORDER BY iteration, step",
            iteration=iteration,
        )
    ]

  # Workers.

  def add_incident(self, incident: records.Incident):
    """Keeps what just happened to a worker."""
    row = dataclasses.asdict(incident) | {"at": time.time()}
    with self._transaction():
      self._insert(schema.INCIDENTS, [row])

  def incidents(self) -> list[records.Incident]:
    """In the order in which they happened."""
    c = schema.INCIDENTS.c
    names = [field.name for field in dataclasses.fields(records.Incident)]
    return [
        records.Incident(*row)
        for row in self.rows(
            sa.select(*(c[name] for name in names)).order_by(c.id)
        )
    ]


def _dumps(value: Any) -> str:
  return json.dumps(value, sort_keys=True)


def _check_free(path: pathlib.Path):
  """Refuses a directory without an archive that has what a run would replace.

  Raises:
    StoreError: naming it.
  """
  if (path / ARCHIVE).exists():
    return
  for name in _WRITTEN:
    if (path / name).exists():
      raise StoreError(
          f"{path} holds no run ({ARCHIVE} is missing), but {name}, which a run"
          " would overwrite; choose another --workdir, or move it away"
      )


def _open_to_read(
    path: pathlib.Path, stack: contextlib.ExitStack
) -> sqlite3.Connection:
  """Opens an archive without writing beside it where that is not allowed."""
  uri = path.absolute().as_uri()
  connect = lambda uri: sqlite3.connect(
      uri,
      uri=True,
      isolation_level=None,
      timeout=_BUSY_S,
      check_same_thread=False,
  )
  connection = connect(f"{uri}?mode=ro")
  try:
    connection.execute("SELECT 1 FROM sqlite_master")
    return connection
  except sqlite3.OperationalError as error:
    connection.close()
    if "locked" in str(error):
      raise
  # SQLite wants to write an index beside the file, and the disk refuses.
  log = path.with_name(f"{path.name}-wal")
  if not log.exists() or not log.stat().st_size:
    return connect(f"{uri}?mode=ro&immutable=1")
  scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
  for file in (path, log):
    shutil.copyfile(file, scratch / file.name)
  return connect((scratch / path.name).as_uri())


def _upgraded(
    connection: sqlite3.Connection, stack: contextlib.ExitStack
) -> sqlite3.Connection:
  """A copy that can be brought up to date."""
  scratch = stack.enter_context(tempfile.TemporaryDirectory())
  copy = sqlite3.connect(
      pathlib.Path(scratch) / ARCHIVE,
      isolation_level=None,
      check_same_thread=False,
  )
  connection.backup(copy)
  connection.close()
  return copy


def _revision(db: sa.Connection, workdir: pathlib.Path) -> str | None:
  """The archive's schema; None where there are no tables yet.

  Raises:
    StoreError: if it is no archive, or of a later version.
  """
  path = workdir / ARCHIVE
  names = set(db.exec_driver_sql("SELECT name FROM sqlite_master").scalars())
  if not names:
    return None
  if "alembic_version" in names:
    query = "SELECT version_num FROM alembic_version"
  elif {"meta", "completions", "scores"} <= names:
    query = "SELECT value FROM meta WHERE key = 'schema_version'"
  else:
    raise StoreError(f"{path} is no archive: it has other tables")
  found = db.exec_driver_sql(query).scalar()
  known = int(schema.REVISION)
  if str(found).isdigit() and int(found) < _OLDEST:
    raise StoreError(
        f"{path} has schema {found}; {_OLDEST} is the oldest that can be"
        " brought up to date. Read it with the version that wrote it"
    )
  if not str(found).isdigit() or int(found) > known:
    raise StoreError(
        f"{path} has schema {found}, of a later version of selfdev_jax; this"
        f" one knows {known}. Upgrade the package"
    )
  return str(found)


def _check_whole(workdir: pathlib.Path):
  """Looks at every page before anything is written.

  By a connection that writes nothing, not even what a killed run left in the
  log.

  Raises:
    StoreError: if the archive is damaged, or of a later version.
  """
  with contextlib.ExitStack() as stack:
    connection = _open_to_read(workdir / ARCHIVE, stack)
    store = stack.enter_context(Store(connection, workdir))
    if _revision(store._db, workdir) is None:
      return
    found = store._db.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
      raise _damaged(workdir, found)


def _damaged(workdir, reason) -> StoreError:
  path, reason = workdir / ARCHIVE, " ".join(str(reason).split())
  return StoreError(
      f"{path} is damaged ({reason}); nothing was changed. `sqlite3 {path}"
      " .recover` writes what can be read as SQL"
  )


@contextlib.contextmanager
def _explained(workdir: pathlib.Path) -> Iterator[None]:
  """Says in one line what SQLite says of a file."""
  try:
    yield
  except (sa.exc.DBAPIError, sqlite3.Error) as error:
    cause = getattr(error, "orig", error)
    path, text = workdir / ARCHIVE, str(cause)
    if "disk is full" in text:
      raise StoreError(
          f"the disk is full, {path} cannot grow; make room, the same command"
          " resumes"
      ) from None
    if "not a database" in text:
      raise StoreError(f"{path} is no archive: {text}") from None
    if "malformed" in text or "disk I/O" in text:
      raise _damaged(workdir, text) from None
    if "locked" in text:
      raise StoreError(
          f"another program holds {path} for more than {_BUSY_S:.0f} s; close"
          " it, then run the same command again"
      ) from None
    if "readonly" in text or "unable to open" in text:
      raise StoreError(
          f"{path} cannot be written ({text}); make the disk and the directory"
          " writable, or choose another --workdir"
      ) from None
    raise
