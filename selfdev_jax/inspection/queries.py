"""What one asks of an archive, in SQL: fast also where it holds millions.

Nothing here loads jax. Every function takes a `Store.read`, and so everything
that is asked of one store is of one moment.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import json
import statistics
from typing import Any
from typing import NamedTuple

import numpy as np

from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib

BEST = "best"  # The name of the program that the run settled on.
SORTS = ("dev", "test", "found", "hash", "size")
# Models that no program gave, by how their names begin.
FAMILIES = ("seed", "expert", *records.SWEEPS)
ADMITTED = "admitted"
REJECTED = "rejected"
RUN = "run"  # The stage of a program whose merge failed on the weights.
_RUN_MESSAGE = "the merge failed on the weights"
_NEAR = 8

# As in selfdev_jax/sandbox/fingerprint.py: for each shape a norm and three
# projections, which count in relation to their size or to a bit of the norm.
_NUMBERS = 4
_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True)
class Row:
  """A program that the verifier let through, or a completion that gave none.

  Attributes:
    arm: of the completion, of a program the one that gave it first.
    iteration: likewise.
    item: likewise.
    digest: None: rejected.
    written: completions that gave it.
    stage: where it was rejected; "run": its merge failed on the weights.
    code: why.
    message: likewise, in a sentence.
    dev: score on the development set.
    test: likewise on the test set.
  """

  arm: str
  iteration: int
  item: int
  digest: str | None
  written: int
  stage: str
  code: str
  message: str
  dev: records.Score | None
  test: records.Score | None


class Written(NamedTuple):
  """A completion that gave a program, and the iteration of its factory."""

  arm: str
  iteration: int
  item: int
  factory: int


@dataclasses.dataclass(frozen=True)
class PairPart:
  """A pair that a program took part in, and the other one in it."""

  iteration: int
  item: int
  is_chosen: bool
  other_digest: str | None
  other_iteration: int  # Of the completion that the pair has of the other.
  other_item: int


@dataclasses.dataclass(frozen=True)
class Program:
  """All about a program.

  Attributes:
    digest: its name.
    source: as it was first written.
    ir: JSON.
    stats: what the verifier counted.
    row: as in the list.
    writings: all completions that gave it.
    dev: score on the development set.
    test: likewise on the test set.
    pairs: that it took part in.
    same: digests of those that took its score, or whose score it took.
    near: (digest, distance) of the programs that do most nearly the same, by
      their fingerprints; see `_distances`.
  """

  digest: str
  source: str
  ir: str
  stats: dict[str, Any]
  row: Row
  writings: list[Written]
  dev: records.Score | None
  test: records.Score | None
  pairs: list[PairPart]
  same: list[str]
  near: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Writing:
  """A completion, what became of it and what sampled it."""

  completion: records.Completion
  verdict: records.Verdict | None
  activity: records.Activity
  provenance: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampled:
  """A completion in the list of an iteration's.

  Attributes:
    item: its number.
    finished: not cut at the token limit.
    digest: of the program that it gave; None: rejected, or not judged yet.
    stage: where it was rejected; "run": its merge failed on the weights; empty
      where it was not, None where it is not judged yet.
    code: why.
    message: likewise, in a sentence.
    dev: score of its program on the development set.
  """

  item: int
  finished: bool
  digest: str | None
  stage: str | None
  code: str | None
  message: str | None
  dev: records.Score | None


@dataclasses.dataclass(frozen=True)
class Factory:
  """What wrote an iteration's completions."""

  iteration: int  # The first is the seed model.
  digest: str  # Of its adapter's weights; empty: the seed model.
  pairs: int  # Of the iteration before, which it was trained with.


@dataclasses.dataclass(frozen=True)
class Baseline:
  """A family of models that no program gave, by its best one.

  `name` is "seed", "expert:NAME" or a sweep's; `tried` counts its models with
  a development score; `dev` is the highest of those with all answers.
  """

  name: str
  tried: int
  dev: records.Score | None
  test: records.Score | None


class Counts(NamedTuple):
  """Of an iteration of an arm; see `Iteration`."""

  sampled: int
  judged: int
  admitted: int
  distinct: int


@dataclasses.dataclass(frozen=True)
class Iteration:
  """One iteration of one arm, counted as in the report.

  Attributes:
    arm: the control's first iteration is the loop's, and stands once.
    iteration: from 1.
    sampled: completions.
    judged: of these, with a verdict.
    admitted: of these, let through and not failed on the weights.
    distinct: programs among them.
    candidates: new programs, within the arm's budget.
    scored: of these, with a development score.
    mean: of the candidates' development accuracies, on what they were asked.
    median: likewise.
    best: the highest of those with all answers.
  """

  arm: str
  iteration: int
  sampled: int
  judged: int
  admitted: int
  distinct: int
  candidates: int
  scored: int
  mean: float | None
  median: float | None
  best: float | None


@dataclasses.dataclass(frozen=True)
class Rejections:
  """Completions of one iteration that were rejected for one reason."""

  arm: str
  iteration: int
  stage: str
  code: str
  count: int
  example: str  # The first one's message.


# A score that was taken from another model is as that one's is by now: `s` is
# the score and `o` the other's.
@dataclasses.dataclass(frozen=True)
class Incident:
  """What happened to a worker, and during which stage.

  Attributes:
    kind: see `records.Incident`, also of the next four.
    worker: its name.
    host: where it ran.
    detail: in a sentence.
    at: Unix time.
    arm: of the activity that was under way.
    iteration: likewise; 0: none.
    stage: likewise.
  """

  kind: str
  worker: str
  host: str
  detail: str
  at: float
  arm: str
  iteration: int
  stage: str


def _now(s: str, o: str, name: str) -> str:
  return f"CASE WHEN {s}.reused IS NULL THEN {s}.{name} ELSE {o}.{name} END"


def _accuracy(s: str, o: str) -> str:
  return f"(({_now(s, o, 'correct')}) * 1.0 / ({_now(s, o, 'n')}))"


def _score_columns(s: str, o: str) -> str:
  """The fields of a records.Score."""
  return (
      f"{s}.model, {s}.split, {_now(s, o, 'n')}, {_now(s, o, 'correct')},"
      f" {s}.merge_s, {s}.evaluate_s, {s}.engine, {_now(s, o, 'failure')},"
      f" coalesce({s}.reused, ''), {s}.items, {s}.weights"
  )


_SCORE_WIDTH = len(dataclasses.fields(records.Score))


def _score(values: Sequence[Any]) -> records.Score | None:
  return None if values[0] is None else records.Score(*values)


# By the scores' key, which is unique: SQLite then leaves out a join whose
# columns a query does not use.
def _join_score(digest: str, split: str) -> str:
  s, o = split, f"{split}_of"
  return (
      f" LEFT JOIN scores {s} ON {s}.model = '{records.PROGRAM}' || {digest}"
      f" AND {s}.split = '{split}'"
      f" LEFT JOIN scores {o} ON {o}.model = {s}.reused"
      f" AND {o}.split = '{split}'"
  )


_DEV = _accuracy("dev", "dev_of")
_TEST = _accuracy("test", "test_of")
_JOIN_DEV = _join_score("x.digest", records.DEV)
_JOIN_TEST = _join_score("x.digest", records.TEST)
_DEV_N = _now("dev", "dev_of", "n")
_DEV_CORRECT = _now("dev", "dev_of", "correct")
_FAILURE = (
    f"coalesce(nullif({_now('dev', 'dev_of', 'failure')}, ''), 'non_finite')"
)


def _unless_failed(failed: str, otherwise: str) -> str:
  """`failed` where there is a score and no merged model behind it."""
  return (
      f"CASE WHEN dev.model IS NOT NULL AND {_DEV_CORRECT} IS NULL"
      f" THEN {failed} ELSE {otherwise} END"
  )


def _ended(verdict: str) -> str:
  """Stage, code and message, by a verdict; its merge may have failed since."""
  return ", ".join(
      [
          _unless_failed(f"'{RUN}'", f"{verdict}.stage"),
          _unless_failed(_FAILURE, f"{verdict}.code"),
          _unless_failed(f"'{_RUN_MESSAGE}'", f"{verdict}.message"),
      ]
  )


# The list's columns of a program and of a rejected completion, `x` in either.
_OF_PROGRAM = {
    "stage": _unless_failed(f"'{RUN}'", "''"),
    "code": _unless_failed(_FAILURE, "''"),
    "dev": _DEV,
    "test": _TEST,
    "hash": "x.digest",
    "size": "json_extract(x.stats, '$.equations')",
    "match": (
        "(instr(v.source, :search)"
        " OR v.digest >= :search AND v.digest < :search || char(1114111))"
    ),
}
_OF_REJECTED = dict.fromkeys(_OF_PROGRAM, "NULL") | {
    "stage": "x.stage",
    "code": "x.code",
    "match": "instr(x.source, :search)",
}
# In this order: one pass over the sources, and few programs looked up.
_WITH_SOURCE = (
    "verdicts v CROSS JOIN programs x ON x.digest = v.digest AND x.arm = v.arm"
    " AND x.iteration = v.iteration AND x.item = v.item"
)

# The loop's rounds and the control's as they ran.
_FOUND = ("iteration", "arm = 'control'", "item")


def programs(
    store: store_lib.Store,
    *,
    search: str = "",
    verdict: str = "",
    arm: str = "",
    iteration: int | None = None,
    min_dev: float | None = None,
    max_dev: float | None = None,
    candidate_of: tuple[str, int] | None = None,
    sort: str = "dev",
    ascending: bool = False,
    limit: int | None = 50,
    offset: int = 0,
) -> tuple[list[Row], int]:
  """Programs, and completions that were rejected.

  Args:
    store: an archive.
    search: how a digest begins, or text within a source that gave it.
    verdict: "admitted", "rejected", a stage, or "stage:code".
    arm: that wrote it first.
    iteration: likewise.
    min_dev: development accuracy at least; a fraction.
    max_dev: at most.
    candidate_of: arm and iteration that evaluated it as one of its own, which
      another may have written first.
    sort: one of SORTS. What has none of it is last, either way, and of equals
      the earlier is first.
    ascending: smallest first.
    limit: of rows; None: all.
    offset: rows to leave out before.

  Returns:
    The rows, and how many there are without limit and offset.

  Raises:
    UserError: for a `sort` that is none.
  """
  if sort not in SORTS:
    raise errors.UserError(
        f"cannot sort by {sort!r}; choose one of {', '.join(SORTS)}"
    )
  stage, _, code = verdict.partition(":")
  conditions = {
      "{match}": search,
      "{stage} = ''": verdict == ADMITTED,
      "{stage} != ''": verdict == REJECTED,
      "{stage} = :stage": verdict not in ("", ADMITTED, REJECTED),
      "{code} = :code": code,
      "x.arm = :arm": arm,
      "x.iteration = :iteration": iteration is not None,
      "{dev} >= :min_dev": min_dev is not None,
      "{dev} <= :max_dev": max_dev is not None,
      "{hash} IN (SELECT digest FROM candidates WHERE arm = :by_arm"
      " AND iteration = :by_iteration)": candidate_of is not None,
  }
  where = " AND ".join(text for text, given in conditions.items() if given)
  columns = "x.arm, x.iteration, x.item, {hash} AS digest"
  columns += f", {'NULL' if sort == 'found' else f'{{{sort}}}'} AS key"
  way = "ASC" if ascending else "DESC"
  order = [f"{name} {way}" for name in _FOUND]
  if sort != "found":
    order = [f"key {way} NULLS LAST", *_FOUND]
  values = {
      "search": search,
      "stage": stage,
      "code": code,
      "arm": arm,
      "iteration": iteration,
      "min_dev": min_dev,
      "max_dev": max_dev,
      "by_arm": candidate_of and candidate_of[0],
      "by_iteration": candidate_of and candidate_of[1],
  }
  listed = (
      _select(
          columns, _WITH_SOURCE if search else "programs x", where, _OF_PROGRAM
      )
      + " UNION ALL "
      + _select(
          columns,
          "verdicts x",
          f"x.digest IS NULL AND {where or 'TRUE'}",
          _OF_REJECTED,
      )
  )
  rows = store.rows(
      f"""WITH listed AS MATERIALIZED ({listed})
      SELECT COUNT(*), NULL, NULL, NULL FROM listed UNION ALL
      SELECT * FROM (SELECT arm, iteration, item, digest FROM listed
        ORDER BY {", ".join(order)} LIMIT :limit OFFSET :offset)""",
      **{k: v for k, v in values.items() if f":{k}" in listed},
      limit=-1 if limit is None else limit,
      offset=offset,
  )
  (total, *_), *keys = rows
  return _rows(store, keys), total


def _select(columns, source, where, names):
  """One part of the list; joins the scores that it names."""
  said = f"{columns} {where}".format_map(names)
  for split, join in ((records.DEV, _JOIN_DEV), (records.TEST, _JOIN_TEST)):
    if f"{split}." in said:
      source += join
  columns, where = columns.format_map(names), where.format_map(names)
  return f"SELECT {columns} FROM {source} WHERE {where or 'TRUE'}"


def _rows(store, keys):
  """Rows of the list, by their (arm, iteration, item, digest)."""
  rows = store.rows(
      f"""WITH x AS (SELECT key AS place,
        json_extract(value, '$[0]') AS arm,
        json_extract(value, '$[1]') AS iteration,
        json_extract(value, '$[2]') AS item,
        json_extract(value, '$[3]') AS digest FROM json_each(:keys))
      SELECT x.arm, x.iteration, x.item, x.digest,
        CASE WHEN x.digest IS NULL THEN 1 ELSE
          (SELECT COUNT(*) FROM verdicts w WHERE w.digest = x.digest) END,
        {_ended("v")},
        {_score_columns("dev", "dev_of")}, {_score_columns("test", "test_of")}
      FROM x JOIN verdicts v USING (arm, iteration, item)
        {_JOIN_DEV} {_JOIN_TEST} ORDER BY x.place""",
      keys=json.dumps([list(key) for key in keys]),
  )
  first = len(dataclasses.fields(Row)) - 2
  middle = first + _SCORE_WIDTH
  return [
      Row(*row[:first], _score(row[first:middle]), _score(row[middle:]))
      for row in rows
  ]


def find(store: store_lib.Store, prefix: str) -> str:
  """The digest that begins with `prefix`; "best": of the best program.

  That is the loop's with the highest development accuracy, of those with all
  answers; of equals the earlier.

  Raises:
    UserError: if there is none, or several.
  """
  start = prefix.removeprefix(records.PROGRAM)
  if start == BEST:
    found = top(store, records.LOOP, 1)
    if not found:
      raise errors.UserError(
          f"{store.workdir} has no best program yet: none has a whole"
          " development score"
      )
    return found[0]
  found = store.rows(
      "SELECT digest FROM programs WHERE digest >= :start"
      " AND digest < :start || char(1114111) ORDER BY digest LIMIT 4",
      start=start,
  )
  digests = [digest for (digest,) in found]
  if start and start in digests:
    return start
  if not start or not digests:
    raise errors.UserError(
        f"{store.workdir} has no program {prefix!r}; give the beginning of a"
        " digest from --programs, or 'best'"
    )
  if len(digests) > 1:
    names = ", ".join(digest[: len(start) + 6] for digest in digests[:3])
    more = ", ..." if len(digests) > 3 else ""
    raise errors.UserError(
        f"several programs begin with {prefix!r} ({names}{more}); give more"
        " digits"
    )
  return digests[0]


def top(store: store_lib.Store, arm: str, count: int) -> list[str]:
  """Digests of an arm's best programs by development score alone.

  Of those with all answers; ties to the earlier in the arm's own order: what
  the other arm wrote too may have been scored there first.
  """
  rows = store.rows(
      f"SELECT x.digest FROM candidates x {_JOIN_DEV}"
      " WHERE x.arm = CASE x.iteration WHEN 1 THEN 'loop' ELSE :arm END"
      f" AND {_DEV_N} = dev.items AND {_DEV} IS NOT NULL"
      f" ORDER BY {_DEV} DESC, x.iteration, x.position LIMIT :count",
      arm=arm,
      count=count,
  )
  return [digest for (digest,) in rows]


def program(store: store_lib.Store, prefix: str) -> Program:
  """All about the program whose digest begins with `prefix`, or "best".

  Raises:
    UserError: if there is none, or several.
  """
  digest = find(store, prefix)
  ((*where, source, ir, stats, fingerprint),) = store.rows(
      "SELECT arm, iteration, item, v.source, p.program, p.stats,"
      " p.fingerprint FROM programs p"
      " JOIN verdicts v USING (arm, iteration, item) WHERE p.digest = :digest",
      digest=digest,
  )
  (row,) = _rows(store, [(*where, digest)])
  return Program(
      digest=digest,
      source=source,
      ir=ir,
      stats=json.loads(stats),
      row=row,
      writings=_writings(store, digest),
      dev=row.dev,
      test=row.test,
      pairs=_pairs(store, digest),
      same=_same(store, digest),
      near=_near(store, digest, fingerprint),
  )


def _writings(store, digest):
  rows = store.rows(
      "SELECT v.arm, v.iteration, v.item, c.factory FROM verdicts v"
      " JOIN completions c USING (arm, iteration, item)"
      " WHERE v.digest = :digest"
      " ORDER BY v.iteration, v.arm = 'control', v.item",
      digest=digest,
  )
  return [Written(*row) for row in rows]


def _pairs(store, digest):
  rows = store.rows(
      "SELECT iteration, item, 1 AS is_chosen, rejected_digest, iteration,"
      " rejected_item FROM pairs WHERE chosen_digest = :digest"
      " UNION ALL SELECT iteration, item, 0, chosen_digest, chosen_iteration,"
      " chosen_item FROM pairs WHERE rejected_digest = :digest"
      " ORDER BY 1, 2, is_chosen DESC",
      digest=digest,
  )
  return [PairPart(*row[:2], bool(row[2]), *row[3:]) for row in rows]


def _same(store, digest):
  rows = store.rows(
      "SELECT DISTINCT substr(model, :start) FROM scores"
      " WHERE reused = :model AND program IS NOT NULL"
      " UNION SELECT DISTINCT substr(reused, :start) FROM scores"
      " WHERE model = :model AND reused IS NOT NULL",
      model=records.PROGRAM + digest,
      start=len(records.PROGRAM) + 1,
  )
  return [name for (name,) in rows]


def _near(store, digest, fingerprint):
  rows = store.rows(
      "SELECT digest, fingerprint FROM programs"
      " WHERE length(fingerprint) = :size AND digest != :digest",
      size=len(fingerprint),
      digest=digest,
  )
  if not rows or not fingerprint:
    return []
  names, blobs = zip(*rows, strict=True)
  numbers = np.frombuffer(b"".join(blobs), "<f8").reshape(len(names), -1)
  distances = _distances(numbers, np.frombuffer(fingerprint, "<f8"))
  nearest = np.argsort(distances, kind="stable")[:_NEAR]
  return [
      (names[i], float(distances[i]))
      for i in nearest
      if np.isfinite(distances[i])
  ]


def _distances(others: np.ndarray, own: np.ndarray) -> np.ndarray:
  """How far fingerprints are from one: 0 does the same, 2 the opposite.

  Args:
    others: [n, numbers] float64; NaN where a result was not finite.
    own: [numbers] float64.

  Returns:
    [n] float64: the mean difference of the numbers, each in relation to its
    own size, or where it is small to the norm. Infinite for one that is not
    finite elsewhere than `own`, and where nothing is.
  """
  x = others.reshape(len(others), -1, _NUMBERS)
  y = own.reshape(-1, _NUMBERS)
  norm = np.maximum(x[..., :1], y[..., :1])
  scale = np.maximum(np.maximum(abs(x), abs(y)), _FLOOR * norm)
  finite = np.isfinite(y)
  comparable = (np.isfinite(x) == finite).all(axis=(1, 2)) & finite.any()
  # Both zero: equal.
  parts = abs(x - y) / np.where(scale > 0, scale, 1.0)
  total = np.where(finite, parts, 0.0).sum(axis=(1, 2))
  return np.where(comparable, total / max(finite.sum(), 1), np.inf)


def completions(
    store: store_lib.Store,
    arm: str,
    iteration: int,
    *,
    is_admitted: bool = False,
    limit: int | None = 50,
    offset: int = 0,
) -> tuple[list[Sampled], int]:
  """What an arm sampled in an iteration, and how many there are.

  Args:
    store: an archive.
    arm: whose; the control's first iteration is the loop's.
    iteration: from 1.
    is_admitted: only those that `Iteration.admitted` counts.
    limit: of completions; None: all.
    offset: completions to leave out before.

  Raises:
    UserError: if the arm has sampled nothing in that iteration.
  """
  source = (
      "FROM completions c LEFT JOIN verdicts x USING (arm, iteration, item)"
      f" {_JOIN_DEV} WHERE c.arm = :arm AND c.iteration = :iteration"
  )
  if is_admitted:
    source += f" AND {_OF_PROGRAM['stage']} = '' AND x.digest IS NOT NULL"
  key = {"arm": arm, "iteration": iteration}
  ((total,),) = store.rows(f"SELECT COUNT(*) {source}", **key)
  if not total:
    _check_sampled(store, arm, iteration)
  rows = store.rows(
      f"SELECT c.item, c.finished, x.digest, {_ended('x')},"
      f" {_score_columns('dev', 'dev_of')} {source}"
      " ORDER BY c.item LIMIT :limit OFFSET :offset",
      **key,
      limit=-1 if limit is None else limit,
      offset=offset,
  )
  return [
      Sampled(row[0], bool(row[1]), *row[2:6], _score(row[6:])) for row in rows
  ], total


def _check_sampled(store, arm, iteration):
  rounds = store.rows(
      "SELECT DISTINCT arm, iteration FROM completions"
      " ORDER BY iteration, arm = 'control'"
  )
  if (arm, iteration) not in map(tuple, rounds):
    raise nothing_of(store, "completions", arm, iteration, rounds)


def nothing_of(
    store: store_lib.Store,
    what: str,
    arm: str,
    iteration: int,
    places: Iterable[tuple[str, int]],
) -> errors.UserError:
  """Says what an arm's iteration has not, and which (arm, iteration) have."""
  there = ", ".join(f"{a}/{t}" for a, t in places)
  why = f"it has {there or 'none yet'}"
  if (arm, iteration) == (records.CONTROL, 1):
    why = f"the control's first iteration is {records.LOOP}/1"
  return errors.UserError(
      f"{store.workdir} has no {what} of {arm}/{iteration}; {why}"
  )


def completion(
    store: store_lib.Store, arm: str, iteration: int, item: int
) -> Writing:
  """A completion with its verdict and what sampled it.

  Raises:
    UserError: if there is none.
  """
  where = "WHERE arm = :arm AND iteration = :iteration AND item = :item"
  key = {"arm": arm, "iteration": iteration, "item": item}
  rows = store.rows(
      "SELECT arm, iteration, item, text, finished, engine, factory, activity"
      f" FROM completions {where}",
      **key,
  )
  if not rows:
    ends = store.rows(
        "SELECT arm, iteration, max(item) FROM completions"
        " GROUP BY arm, iteration ORDER BY iteration, arm = 'control'"
    )
    there = ", ".join(f"{a}/{t}/0 to {last}" for a, t, last in ends)
    raise errors.UserError(
        f"{store.workdir} has no completion {arm}/{iteration}/{item}; it has"
        f" {there or 'none yet'}"
    )
  (row,) = rows
  verdicts = store.rows(
      "SELECT arm, iteration, item, source, digest, stage, code, message"
      f" FROM verdicts {where}",
      **key,
  )
  return Writing(
      records.Completion(*row[:4], bool(row[4]), *row[5:7]),
      records.Verdict(*verdicts[0]) if verdicts else None,
      *activity(store, row[7]),
  )


def pair(store: store_lib.Store, iteration: int, item: int) -> records.Pair:
  """A preference pair.

  Raises:
    UserError: if there is none.
  """
  names = [field.name for field in dataclasses.fields(records.Pair)]
  rows = store.rows(
      f"SELECT {', '.join(names)} FROM pairs"
      " WHERE iteration = :iteration AND item = :item",
      iteration=iteration,
      item=item,
  )
  if not rows:
    ends = store.rows(
        "SELECT iteration, max(item) FROM pairs GROUP BY iteration ORDER BY 1"
    )
    there = ", ".join(f"{t}/0 to {last}" for t, last in ends)
    raise errors.UserError(
        f"{store.workdir} has no pair {iteration}/{item}; it has"
        f" {there or 'none yet'}"
    )
  return records.Pair(*rows[0])


def factory(store: store_lib.Store, iteration: int) -> Factory:
  """What wrote the completions whose `factory` is this."""
  ((digest, pairs),) = store.rows(
      "SELECT digest, (SELECT COUNT(*) FROM pairs WHERE iteration = :before)"
      " FROM factories WHERE iteration = :iteration",
      iteration=iteration,
      before=iteration - 1,
  )
  return Factory(iteration, digest, pairs)


def activity(
    store: store_lib.Store, number: int
) -> tuple[records.Activity, dict[str, Any]]:
  """What a row was computed by, with its session's versions and hardware."""
  names = [field.name for field in dataclasses.fields(records.Activity)]
  ((*values, provenance),) = store.rows(
      f"SELECT {', '.join(f'a.{name}' for name in names)}, s.provenance"
      " FROM activities a JOIN sessions s ON s.id = a.session"
      " WHERE a.id = :number",
      number=number,
  )
  done = records.Activity(*values[:-1], finished=bool(values[-1]))
  return done, json.loads(provenance)


def score_origin(
    store: store_lib.Store, model: str, split: str
) -> tuple[records.Activity, dict[str, Any]]:
  """What began to score a model, with its session.

  Raises:
    UserError: if it has no score.
  """
  rows = store.rows(
      "SELECT activity FROM scores WHERE model = :model AND split = :split",
      model=model,
      split=split,
  )
  if not rows:
    raise errors.UserError(f"{store.workdir} has no {split} score of {model!r}")
  return activity(store, rows[0][0])


def answers(
    store: store_lib.Store,
    model: str,
    split: str,
    limit: int | None = 50,
    offset: int = 0,
) -> tuple[list[records.Response], int]:
  """The answers behind a score, and how many there are.

  Of a score that was taken from another model, that one's.

  Raises:
    UserError: if the model has no score.
  """
  found = store.rows(
      "SELECT coalesce(reused, model) FROM scores"
      " WHERE model = :model AND split = :split",
      model=model,
      split=split,
  )
  if not found:
    raise errors.UserError(f"{store.workdir} has no {split} score of {model!r}")
  key = {"model": found[0][0], "split": split}
  ((total,),) = store.rows(
      "SELECT COUNT(*) FROM responses WHERE model = :model AND split = :split",
      **key,
  )
  rows = store.rows(
      "SELECT item, prompt, text, gold, extracted, correct, truncated, trouble"
      " FROM responses JOIN questions USING (split, item)"
      " WHERE model = :model AND split = :split"
      " ORDER BY item LIMIT :limit OFFSET :offset",
      **key,
      limit=-1 if limit is None else limit,
      offset=offset,
  )
  return [
      records.Response(*row[:5], *map(bool, row[5:7]), row[7]) for row in rows
  ], total


def answered_by(
    store: store_lib.Store, model: str, split: str
) -> list[tuple[records.Activity, dict[str, Any]]]:
  """What gave the answers behind a score; a resumed run's several."""
  rows = store.rows(
      "SELECT DISTINCT r.activity FROM scores s JOIN responses r"
      " ON r.model = coalesce(s.reused, s.model) AND r.split = s.split"
      " WHERE s.model = :model AND s.split = :split ORDER BY 1",
      model=model,
      split=split,
  )
  return [activity(store, number) for (number,) in rows]


def baselines(store: store_lib.Store) -> list[Baseline]:
  """What programs are compared with, in the order they were scored."""
  rows = store.rows(f"""WITH models AS MATERIALIZED (
        SELECT rowid AS place,
          CASE WHEN n = items THEN correct * 1.0 / n END AS accuracy,
          CASE WHEN model LIKE 'expert:%' OR NOT instr(model, ':') THEN model
            ELSE substr(model, 1, instr(model, ':') - 1) END AS name
        FROM scores WHERE split = 'dev' AND program IS NULL),
      families AS (
        SELECT name, COUNT(*) AS tried, max(accuracy) AS best,
          min(place) AS first
        FROM models GROUP BY name)
      SELECT f.name, f.tried, {_score_columns("dev", "dev")},
        {_score_columns("test", "test")}
      FROM families f LEFT JOIN scores dev ON dev.rowid = (
        SELECT min(place) FROM models m
        WHERE m.name = f.name AND m.accuracy = f.best)
      LEFT JOIN scores test ON test.model = dev.model AND test.split = 'test'
      ORDER BY f.first""")
  middle = 2 + _SCORE_WIDTH
  return [
      Baseline(*row[:2], _score(row[2:middle]), _score(row[middle:]))
      for row in rows
  ]


def scores(
    store: store_lib.Store,
    family: str,
    limit: int | None = 50,
    offset: int = 0,
) -> tuple[list[tuple[records.Score, records.Score | None]], int]:
  """Scores of a family's models, and how many models there are.

  Args:
    store: an archive.
    family: one of FAMILIES.
    limit: of models; None: all.
    offset: models to leave out before.

  Returns:
    (development, test) score of each, the highest on development first.

  Raises:
    UserError: if none has a score.
  """
  source = (
      "FROM scores dev LEFT JOIN scores test"
      " ON test.model = dev.model AND test.split = 'test'"
      " WHERE dev.split = 'dev' AND dev.program IS NULL"
      " AND substr(dev.model, 1, instr(dev.model || ':', ':') - 1) = :family"
  )
  ((total,),) = store.rows(f"SELECT COUNT(*) {source}", family=family)
  if not total:
    raise errors.UserError(f"{store.workdir} has no score of {family}")
  rows = store.rows(
      f"SELECT {_score_columns('dev', 'dev')}, {_score_columns('test', 'test')}"
      f" {source} ORDER BY {_accuracy('dev', 'dev')} DESC NULLS LAST, dev.rowid"
      " LIMIT :limit OFFSET :offset",
      family=family,
      limit=-1 if limit is None else limit,
      offset=offset,
  )
  return [
      (_score(row[:_SCORE_WIDTH]), _score(row[_SCORE_WIDTH:])) for row in rows
  ], total


_BY_ITERATION = "GROUP BY arm, iteration"
# Programs that have a score and no merged model.
_BROKEN = (
    "broken AS (SELECT dev.program AS digest,"
    f" {_FAILURE} AS failure FROM scores dev LEFT JOIN scores dev_of"
    " ON dev_of.model = dev.reused AND dev_of.split = dev.split"
    " WHERE dev.split = 'dev' AND dev.program IS NOT NULL"
    f" AND {_DEV_CORRECT} IS NULL)"
)


def counts(store: store_lib.Store) -> dict[tuple[str, int], Counts]:
  """By arm and iteration, of those that have sampled."""
  by_round = lambda query: {
      tuple(row[:2]): row[2:] for row in store.rows(query)
  }
  sampled = by_round(
      f"SELECT arm, iteration, COUNT(*) FROM completions {_BY_ITERATION}"
  )
  judged = by_round(
      f"SELECT arm, iteration, COUNT(*) FROM verdicts {_BY_ITERATION}"
  )
  admitted = by_round(
      "SELECT arm, iteration, sum(n), COUNT(*) FROM"
      " (SELECT arm, iteration, COUNT(*) AS n FROM verdicts"
      " WHERE digest IS NOT NULL GROUP BY digest, arm, iteration)"
      f" {_BY_ITERATION}"
  )
  broken = by_round(
      f"WITH {_BROKEN} SELECT arm, iteration, COUNT(*), COUNT(DISTINCT digest)"
      f" FROM broken JOIN verdicts USING (digest) {_BY_ITERATION}"
  )
  return {
      key: Counts(
          n,
          *judged.get(key, (0,)),
          *np.subtract(
              admitted.get(key, (0, 0)), broken.get(key, (0, 0))
          ).tolist(),
      )
      for key, (n,) in sampled.items()
  }


def iterations(store: store_lib.Store) -> list[Iteration]:
  """Both arms' iterations, as they ran."""
  # Arrays of integers: one row an iteration, and nothing is rounded.
  rows = store.rows(
      "SELECT x.arm, x.iteration, COUNT(*), COUNT(dev.model),"
      f" json_group_array({_DEV_CORRECT}), json_group_array({_DEV_N}),"
      f" max({_DEV}) FILTER (WHERE {_DEV_N} = dev.items)"
      f" FROM candidates x {_JOIN_DEV} GROUP BY x.arm, x.iteration"
  )
  candidates = {tuple(row[:2]): row[2:] for row in rows}
  counted, found = counts(store), []
  for key in sorted(counted, key=lambda key: (key[1], _rank(key[0]))):
    known = candidates.get(key, (0, 0, "[]", "[]", None))
    correct, n = map(json.loads, known[2:4])
    accuracies = [
        c / of for c, of in zip(correct, n, strict=True) if c is not None
    ]
    found.append(
        Iteration(
            *key,
            *counted[key],
            *known[:2],
            mean=statistics.fmean(accuracies) if accuracies else None,
            median=statistics.median(accuracies) if accuracies else None,
            best=known[-1],
        )
    )
  return found


def _rank(arm):
  return records.ARMS.index(arm)


def rejections(store: store_lib.Store) -> list[Rejections]:
  """Why completions gave no model, most frequent first in each iteration."""
  rows = store.rows(
      "SELECT g.arm, g.iteration, g.stage, g.code, g.count, v.message FROM"
      " (SELECT arm, iteration, stage, code, COUNT(*) AS count,"
      " min(rowid) AS first FROM verdicts WHERE stage != ''"
      " GROUP BY arm, iteration, stage, code) g"
      " JOIN verdicts v ON v.rowid = g.first"
  )
  rows += store.rows(
      f"WITH {_BROKEN} SELECT arm, iteration, '{RUN}', failure, COUNT(*),"
      f" '{_RUN_MESSAGE}'"
      " FROM broken JOIN verdicts USING (digest)"
      " GROUP BY arm, iteration, failure"
  )
  merged = {}
  for *key, count, example in rows:
    before = merged.get(tuple(key), Rejections(*key, 0, example))
    merged[tuple(key)] = dataclasses.replace(before, count=before.count + count)
  order = lambda r: (r.iteration, _rank(r.arm), -r.count, r.stage, r.code)
  return sorted(merged.values(), key=order)


def incident_counts(store: store_lib.Store) -> dict[str, int]:
  """How often what happened to workers, by kind; the most frequent first."""
  rows = store.rows(
      "SELECT kind, COUNT(*) FROM incidents GROUP BY kind ORDER BY 2 DESC, 1"
  )
  return dict(map(tuple, rows))


def incidents(
    store: store_lib.Store, limit: int | None = 50, offset: int = 0
) -> tuple[list[Incident], int]:
  """What happened to workers, in order, and how many such there are.

  Args:
    store: an archive.
    limit: of incidents; None: all.
    offset: incidents to leave out before.
  """
  rows = store.rows(
      "SELECT i.kind, i.worker, i.host, i.detail, i.at, a.arm, a.iteration,"
      " a.stage FROM incidents i JOIN activities a ON a.id = i.activity"
      " ORDER BY i.id LIMIT :limit OFFSET :offset",
      limit=-1 if limit is None else limit,
      offset=offset,
  )
  total = sum(incident_counts(store).values())
  return [Incident(*row) for row in rows], total
