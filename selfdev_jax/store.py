"""The archive of a run: one SQLite file in the workdir, one writer, resumable.

Every method that writes commits before it returns, so a killed process loses
at most the record it was about to write.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import fcntl
import importlib.resources
import json
import os
import pathlib
import sqlite3
import time
from typing import Any

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import records

_ARCHIVE = "archive.sqlite"
_LOCK = "lock"

# The stage that ends the search: no test score before it, no other after it.
SEARCH = "search"


class StoreError(errors.UserError):
  """A workdir that cannot be used as asked."""


def _open_lock(workdir):
  path = pathlib.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    return open(path / _LOCK, "a+", encoding="utf-8")
  except (PermissionError, FileExistsError, NotADirectoryError) as error:
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


class Store:
  """Reads and writes one archive; a context manager.

  Use `Store.create` for a run (creates or resumes) and `Store.read` for
  everything that only looks.
  """

  def __init__(self, connection: sqlite3.Connection, workdir: pathlib.Path):
    self._db = connection
    self.workdir = workdir

  @classmethod
  def create(
      cls,
      workdir: str | os.PathLike,
      config: config_lib.Config,
      identity: Mapping[str, str],
      provenance: Mapping[str, Any],
  ) -> "Store":
    """Opens the workdir's archive for writing, creating it when absent.

    Args:
      workdir: a directory; made when absent.
      config: the run's config; has to equal the one of an existing archive.
      identity: what else has to be equal to resume, such as the digests of
        the models' weights.
      provenance: versions and hardware; kept from every session.

    Raises:
      StoreError: if the workdir belongs to another run, naming what differs.
    """
    path = pathlib.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path / _ARCHIVE, isolation_level=None)
    store = cls(db, path)
    try:
      db.execute("PRAGMA journal_mode=WAL")
      db.execute("PRAGMA foreign_keys=ON")
      has_tables = db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    except sqlite3.OperationalError:
      raise  # A full or a read-only disk.
    except sqlite3.DatabaseError as error:
      raise StoreError(f"{path / _ARCHIVE} is no archive: {error}") from None
    if not has_tables:
      schema = importlib.resources.files("selfdev_jax") / "schema.sql"
      flat = config_lib.flatten(config_lib.to_dict(config))
      meta = {
          "schema_version": records.SCHEMA_VERSION,
          "config": flat,
          "identity": dict(identity),
          "sessions": [],
      }
      # Tables and their first rows in one transaction: a run killed here
      # leaves either nothing or a whole archive.
      with store._transaction():
        for statement in schema.read_text(encoding="utf-8").split(";\n"):
          db.execute(statement)
        for key, value in meta.items():
          db.execute("INSERT INTO meta VALUES (?, ?)", (key, _dumps(value)))
    store._check(config, identity)
    store._set_meta("sessions", [*store.meta("sessions"), dict(provenance)])
    return store

  @classmethod
  def read(cls, workdir: str | os.PathLike) -> "Store":
    """Opens an existing archive read-only, also while a run writes to it."""
    path = pathlib.Path(workdir)
    if not (path / _ARCHIVE).is_file():
      raise StoreError(
          f"{workdir} holds no run ({_ARCHIVE} is missing); start one with"
          " python -m launch.self_develop --config=configs/tiny.py"
          f" --workdir={workdir}"
      )
    uri = (path / _ARCHIVE).absolute().as_uri() + "?mode=ro"
    store = cls(sqlite3.connect(uri, uri=True), path)
    try:
      version = store.meta("schema_version")
    except (sqlite3.DatabaseError, TypeError) as error:
      raise StoreError(f"{path / _ARCHIVE} is no archive: {error}") from None
    if version != records.SCHEMA_VERSION:
      raise StoreError(
          f"{path / _ARCHIVE} has schema {version}, this version reads"
          f" {records.SCHEMA_VERSION}"
      )
    return store

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    self._db.close()

  def _check(self, config, identity):
    version = self.meta("schema_version")
    if version != records.SCHEMA_VERSION:
      raise StoreError(
          f"{self.workdir} was written with schema {version}, this version"
          f" writes {records.SCHEMA_VERSION}; choose another --workdir"
      )
    ours = {
        **json.loads(_dumps(config_lib.flatten(config_lib.to_dict(config)))),
        **identity,
    }
    theirs = {**self.meta("config"), **self.meta("identity")}
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

  @contextlib.contextmanager
  def _transaction(self):
    self._db.execute("BEGIN IMMEDIATE")
    try:
      yield
    except BaseException:
      if self._db.in_transaction:  # A full disk has rolled back already.
        self._db.execute("ROLLBACK")
      raise
    self._db.execute("COMMIT")

  def _insert(self, table: str, rows: Iterable[Sequence[Any]]):
    rows = list(rows)
    if rows:
      marks = ",".join("?" * len(rows[0]))
      self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)

  # Meta.

  def meta(self, key: str) -> Any:
    """`schema_version`, `config` (flat keys), `identity` or `sessions`."""
    (text,) = self._db.execute(
        "SELECT value FROM meta WHERE key = ?", (key,)
    ).fetchone()
    return json.loads(text)

  def _set_meta(self, key: str, value: Any):
    self._db.execute(
        "UPDATE meta SET value = ? WHERE key = ?", (_dumps(value), key)
    )

  def is_done(self, arm: str, iteration: int, stage: str) -> bool:
    row = self._db.execute(
        "SELECT 1 FROM done WHERE arm = ? AND iteration = ? AND stage = ?",
        (arm, iteration, stage),
    ).fetchone()
    return row is not None

  @contextlib.contextmanager
  def timed(self, arm: str, iteration: int, stage: str) -> Iterator[None]:
    """Records how long the block took, also where it is cut short."""
    start = time.monotonic()
    try:
      yield
    finally:
      seconds = time.monotonic() - start
      self._insert("timings", [(arm, iteration, stage, seconds)])

  @contextlib.contextmanager
  def stage(self, arm: str, iteration: int, stage: str) -> Iterator[bool]:
    """A block that runs once a run: yields whether it still has to.

    Marked done unless the block raises; timed where it has to run.
    """
    if self.is_done(arm, iteration, stage):
      yield False
      return
    with self.timed(arm, iteration, stage):
      yield True
    self._insert("done", [(arm, iteration, stage)])

  def timings(self) -> list[records.Timing]:
    return [
        records.Timing(*row)
        for row in self._db.execute("SELECT * FROM timings ORDER BY rowid")
    ]

  # Completions, verdicts, programs.

  def add_completions(self, completions: Sequence[records.Completion]):
    with self._transaction():
      self._insert("completions", map(dataclasses.astuple, completions))

  def completions(self, arm: str, iteration: int) -> list[records.Completion]:
    return [
        records.Completion(*row[:4], bool(row[4]), row[5])
        for row in self._db.execute(
            "SELECT * FROM completions WHERE arm = ? AND iteration = ?"
            " ORDER BY item",
            (arm, iteration),
        )
    ]

  def engines(self) -> list[str]:
    """What has sampled so far, such as "vllm 0.32.0"; "" where unknown."""
    return [
        row[0]
        for row in self._db.execute(
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
    with self._transaction():
      if verdict.admitted:
        self._db.execute(
            "INSERT OR IGNORE INTO programs VALUES (?, ?, ?, ?)",
            (
                verdict.digest,
                program,
                _dumps(stats or {}),
                _dumps(list(fingerprint)),
            ),
        )
      self._insert("verdicts", [dataclasses.astuple(verdict)])

  def verdicts(
      self, arm: str | None = None, iteration: int | None = None
  ) -> list[records.Verdict]:
    """In order of arm, iteration and item; None takes all."""
    return [
        records.Verdict(*row)
        for row in self._db.execute(
            "SELECT * FROM verdicts WHERE (?1 IS NULL OR arm = ?1)"
            " AND (?2 IS NULL OR iteration = ?2)"
            " ORDER BY arm, iteration, item",
            (arm, iteration),
        )
    ]

  def program(self, digest: str) -> str:
    """The JSON program IR."""
    (text,) = self._db.execute(
        "SELECT program FROM programs WHERE digest = ?", (digest,)
    ).fetchone()
    return text

  def stats(self, digest: str) -> dict[str, Any]:
    """What the verifier counted in a program."""
    (text,) = self._db.execute(
        "SELECT stats FROM programs WHERE digest = ?", (digest,)
    ).fetchone()
    return json.loads(text)

  def fingerprints(self) -> dict[str, list[float]]:
    """Of all admitted programs, by digest."""
    return {
        digest: json.loads(text)
        for digest, text in self._db.execute(
            "SELECT digest, fingerprint FROM programs"
        )
    }

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
    with self._transaction():
      self._db.execute(
          "INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
          " ON CONFLICT (model, split) DO UPDATE SET n = n + excluded.n,"
          " correct = correct + excluded.correct,"
          " merge_s = merge_s + excluded.merge_s,"
          " engine = CASE WHEN instr(engine, excluded.engine) THEN engine"
          " ELSE engine || ', ' || excluded.engine END,"
          " evaluate_s = evaluate_s + excluded.evaluate_s",
          dataclasses.astuple(score),
      )
      self._db.executemany(
          "INSERT OR IGNORE INTO questions VALUES (?, ?, ?, ?)",
          [(score.split, r.item, r.prompt, r.gold) for r in responses],
      )
      self._insert(
          "responses",
          [
              (
                  score.model,
                  score.split,
                  r.item,
                  r.text,
                  r.extracted,
                  r.correct,
                  r.truncated,
                  r.trouble,
              )
              for r in responses
          ],
      )

  def scores(self, split: str) -> dict[str, records.Score]:
    """All scores of one split by model, in the order they were written.

    One that was taken from another model is as that one's is by now.
    """
    rows = self._db.execute(
        "SELECT * FROM scores WHERE split = ? ORDER BY rowid", (split,)
    )
    scores = {row[0]: records.Score(*row) for row in rows}
    for model, score in scores.items():
      if score.reused:
        now = scores[score.reused]
        scores[model] = dataclasses.replace(
            score, n=now.n, correct=now.correct, failure=now.failure
        )
    return scores

  def answers(self, model: str, split: str) -> list[bool]:
    """Which items a model has right, of those that it has answered."""
    return [
        bool(correct)
        for (correct,) in self._db.execute(
            "SELECT correct FROM responses WHERE model = ? AND split = ?"
            " ORDER BY item",
            (model, split),
        )
    ]

  def responses(self, model: str, split: str) -> list[records.Response]:
    return [
        records.Response(*row[:5], *map(bool, row[5:7]), row[7])
        for row in self._db.execute(
            "SELECT item, prompt, text, gold, extracted, correct, truncated,"
            " trouble FROM responses JOIN questions USING (split, item)"
            " WHERE model = ? AND split = ? ORDER BY item",
            (model, split),
        )
    ]

  def truncated(self, split: str) -> int:
    """Questions that lost their beginning, as they did not fit the model."""
    (n,) = self._db.execute(
        "SELECT COUNT(DISTINCT item) FROM responses"
        " WHERE truncated AND split = ?",
        (split,),
    ).fetchone()
    return n

  def troubles(self, split: str) -> dict[str, int]:
    """Answers that the scorer could not compare, by what happened."""
    return dict(
        self._db.execute(
            "SELECT trouble, COUNT(*) FROM responses"
            " WHERE trouble != '' AND split = ? GROUP BY trouble"
            " ORDER BY trouble",
            (split,),
        )
    )

  # Preferences and DPO.

  def replace_pairs(self, iteration: int, pairs: Sequence[records.Pair]):
    with self._transaction():
      self._db.execute("DELETE FROM pairs WHERE iteration = ?", (iteration,))
      self._insert("pairs", map(dataclasses.astuple, pairs))

  def pairs(self, iteration: int) -> list[records.Pair]:
    return [
        records.Pair(*row)
        for row in self._db.execute(
            "SELECT * FROM pairs WHERE iteration = ? ORDER BY item",
            (iteration,),
        )
    ]

  def replace_steps(self, iteration: int, steps: Sequence[records.Step]):
    with self._transaction():
      self._db.execute("DELETE FROM steps WHERE iteration = ?", (iteration,))
      self._insert(
          "steps", [(s.iteration, s.step, _dumps(s.metrics)) for s in steps]
      )

  def steps(self, iteration: int | None = None) -> list[records.Step]:
    return [
        records.Step(*row[:2], json.loads(row[2]))
        for row in self._db.execute(
            "SELECT * FROM steps WHERE ?1 IS NULL OR iteration = ?1"
            " ORDER BY iteration, step",
            (iteration,),
        )
    ]


def _dumps(value: Any) -> str:
  return json.dumps(value, sort_keys=True)
