"""Schema 5: what each row was made by and made from, as foreign keys.

What schema 4 did not record stays open: when an activity started is NULL, a
factory's digest and a merged model's checksum are empty. Rows whose stage left
no timing, as it was killed, belong to an activity "before schema 5".
"""

import json
import pathlib

from alembic import op
import numpy as np

revision = "5"
down_revision = "4"

# Of schema 4, without meta and timings.
_MOVED = (
    "completions",
    "programs",
    "verdicts",
    "scores",
    "questions",
    "responses",
    "pairs",
    "steps",
    "done",
)


def _by(arm, iteration, stage, which="min"):
  """SQL for the first ("min") or last ("max") activity of a stage."""
  return (
      f"coalesce((SELECT {which}(a.id) FROM activities a WHERE a.arm = {arm}"
      f" AND a.iteration = {iteration} AND a.stage = {stage}),"
      # The one for what has no timing.
      " (SELECT max(id) FROM activities))"
  )


_REFINED = _by("'loop'", "x.iteration", "'refine'", "max")
_EVALUATED = _by("?1", "?2", "'evaluate'")
_FAMILY = "substr(x.model, 1, instr(x.model, ':') - 1)"

_COPIES = (
    f"""
    INSERT INTO factories (iteration, digest, activity)
    SELECT 1, '', {_by("'loop'", "1", "'propose'")}
    WHERE EXISTS (SELECT 1 FROM old_completions)
    UNION ALL
    SELECT x.iteration + 1, '', {_REFINED}
    FROM old_done x WHERE x.stage = 'refine'
    """,
    f"""
    INSERT INTO completions (arm, iteration, item, text, finished, engine,
        factory, activity)
    SELECT x.*, CASE x.arm WHEN 'loop' THEN x.iteration ELSE 1 END,
        {_by("x.arm", "x.iteration", "'propose'")}
    FROM old_completions x ORDER BY x.rowid
    """,
    f"""
    INSERT INTO verdicts (arm, iteration, item, source, digest, stage, code,
        message, activity)
    SELECT x.*, {_by("x.arm", "x.iteration", "'admit'")}
    FROM old_verdicts x ORDER BY x.rowid
    """,
    f"""
    INSERT INTO programs (digest, program, stats, fingerprint,
        arm, iteration, item, activity)
    SELECT x.digest, x.program, x.stats, as_float64(x.fingerprint),
        f.arm, f.iteration, f.item, {_by("f.arm", "f.iteration", "'admit'")}
    FROM old_programs x JOIN (
        SELECT digest, arm, iteration, item, row_number() OVER (
            PARTITION BY digest ORDER BY iteration, arm != 'loop', item
        ) AS place FROM verdicts
    ) f ON f.digest = x.digest AND f.place = 1
    ORDER BY x.rowid
    """,
    f"""
    INSERT INTO scores (model, split, n, correct, merge_s, evaluate_s, engine,
        failure, reused, items, program, weights, at, activity)
    SELECT x.model, x.split, x.n, x.correct, x.merge_s, x.evaluate_s, x.engine,
        x.failure, nullif(x.reused, ''), x.items, p.digest, '', NULL,
        CASE
        WHEN x.split = 'test' THEN {_by("'loop'", "0", "'best'")}
        WHEN p.digest IS NOT NULL
        THEN {_by("p.arm", "p.iteration", "'evaluate'")}
        WHEN x.model = 'seed' OR x.model LIKE 'expert:%'
        THEN {_by("'loop'", "0", "'single models'")}
        ELSE {_by("'loop'", "0", _FAMILY)}
        END
    FROM old_scores x LEFT JOIN programs p
    ON x.model LIKE 'program:%' AND p.digest = substr(x.model, 9)
    ORDER BY x.rowid
    """,
    "INSERT INTO questions SELECT * FROM old_questions ORDER BY rowid",
    """
    INSERT INTO responses (model, split, item, text, extracted, correct,
        truncated, trouble, activity)
    SELECT x.*, s.activity
    FROM old_responses x JOIN scores s USING (model, split)
    ORDER BY x.model, x.split, x.item
    """,
    f"INSERT INTO steps SELECT x.*, {_REFINED} FROM old_steps x",
    f"""
    INSERT INTO done
    SELECT x.*, {_by("x.arm", "x.iteration", "x.stage", "max")}
    FROM old_done x ORDER BY x.rowid
    """,
)


def upgrade():
  run = op.get_bind().exec_driver_sql
  meta = {
      key: json.loads(value)
      for key, value in run("SELECT key, value FROM meta").all()
  }
  run("DELETE FROM meta WHERE key IN ('schema_version', 'sessions')")
  for table in ("meta", *_MOVED):
    run(f"ALTER TABLE {table} RENAME TO old_{table}")
  ddl = pathlib.Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
  for statement in ddl.split(";\n"):
    run(statement)
  run("INSERT INTO meta SELECT * FROM old_meta")
  _add_activities(run, meta)
  op.get_bind().connection.dbapi_connection.create_function(
      "as_float64",
      1,
      lambda text: np.asarray(json.loads(text), "<f8").tobytes(),
  )
  for statement in _COPIES:
    run(statement)
  _move_pairs(run)
  for table in ("meta", *_MOVED):
    run(f"DROP TABLE old_{table}")
  run("DROP TABLE timings")
  _add_candidates(run, meta["config"]["propose.samples"])
  _drop_unused_activity(run)


def _add_activities(run, meta):
  """One for each timing, and one for what has none."""
  sessions = meta["sessions"] or [{}]
  if len(sessions) > 1:  # Which of them did what was not recorded.
    common = {
        key: value
        for key, value in sessions[0].items()
        if all(key in s and s[key] == value for s in sessions)
    }
    note = f"one of the {len(sessions)} sessions before schema 5"
    sessions = [*sessions, common | {"note": note}]
  for session in sessions:
    run(
        "INSERT INTO sessions (provenance) VALUES (?)",
        (json.dumps(session, sort_keys=True),),
    )
  timings = run("SELECT * FROM timings ORDER BY rowid").all()
  for row in (*timings, ("loop", 0, "before schema 5", 0.0)):
    run(
        "INSERT INTO activities SELECT NULL, max(id),"
        " ?, ?, ?, ?, NULL, ?, 0, 0, NULL, '', 1 FROM sessions",
        (*row[:3], meta["config"]["seed"], row[3]),
    )


def _drop_unused_activity(run):
  """The one for what has no timing, where everything has one."""
  tables = {"factories", "candidates", *_MOVED} - {"questions", "responses"}
  used = " UNION ".join(f"SELECT activity FROM {t}" for t in sorted(tables))
  run(
      "DELETE FROM activities WHERE stage = 'before schema 5'"
      f" AND id NOT IN ({used})"
  )


def _move_pairs(run):
  """Finds the completions that the texts of pairs were taken from.

  A program is a candidate of the iteration that wrote it first, by its first
  completion that was not cut.
  """
  find = (
      "SELECT v.iteration, v.item"
      " FROM verdicts v JOIN completions c USING (arm, iteration, item)"
      " WHERE v.arm = 'loop' AND v.iteration BETWEEN ? AND ?"
      " AND v.digest IS ? AND c.text = ?"
      " ORDER BY NOT c.finished, v.iteration, v.item LIMIT 1"
  )
  for x in run("SELECT * FROM old_pairs ORDER BY rowid").all():
    t = x.iteration
    chosen = run(find, (1, t, x.chosen_digest, x.chosen)).one()
    rejected = run(find, (t, t, x.rejected_digest, x.rejected)).one()
    run(
        "INSERT INTO pairs (iteration, item, prompt, chosen, rejected,"
        " chosen_digest, rejected_digest, arm, chosen_iteration, chosen_item,"
        f" rejected_item, activity) SELECT x.*, 'loop', ?, ?, ?, {_REFINED}"
        " FROM old_pairs x WHERE x.iteration = ? AND x.item = ?",
        (*chosen, rejected.item, t, x.item),
    )


def _add_candidates(run, asked):
  """What each arm evaluated, as the loop of schema 4 computed it.

  Args:
    run: a statement.
    asked: completions of an iteration. The control draws up to three times as
      many, to evaluate as many new programs as the loop.
  """
  prints = {
      digest: np.frombuffer(numbers, "<f8")
      for digest, numbers in run("SELECT digest, fingerprint FROM programs")
  }
  loop, control = (_new_programs(run, a, prints) for a in ("loop", "control"))
  for arm, rounds in (("loop", loop), ("control", control)):
    for t, digests in rounds.items():
      if arm == "control" and t == 1:  # The loop's: one factory, one key.
        continue
      budget = len(loop.get(t, ()))
      needed = asked if len(digests) >= budget else 3 * asked
      digests = digests[:budget]
      if _is_settled(run, arm, t, needed, digests):
        for position, digest in enumerate(digests):
          run(
              f"INSERT INTO candidates SELECT ?1, ?2, ?3, ?4, {_EVALUATED}",
              (arm, t, position, digest),
          )
        run(
            f"INSERT INTO done SELECT ?1, ?2, 'select', {_EVALUATED}",
            (arm, t),
        )


def _new_programs(run, arm, fingerprints):
  """{iteration: digests of functions that an arm admitted first in it}."""
  rounds = {}
  for t, digest in run(
      "SELECT iteration, digest FROM verdicts WHERE digest IS NOT NULL"
      " AND arm = CASE iteration WHEN 1 THEN 'loop' ELSE ? END"
      " ORDER BY iteration, item",
      (arm,),
  ):
    rounds.setdefault(t, []).append(digest)
  found = list(dict.fromkeys(d for names in rounds.values() for d in names))
  first = _first_alike([fingerprints[digest] for digest in found])
  left = {digest for i, digest in enumerate(found) if first[i] == i}
  new = {}
  for t, names in rounds.items():
    new[t] = [digest for digest in dict.fromkeys(names) if digest in left]
    left.difference_update(names)
  return new


def _first_alike(fingerprints):
  """For each fingerprint the index of the first that is the same.

  As sandbox/fingerprint.py had it: four numbers a probe, the first a norm.
  """
  size = max(map(len, fingerprints), default=0)
  rows = np.full((len(fingerprints), size // 4, 4), np.inf)
  first, kept = [], []
  for i, numbers in enumerate(fingerprints):
    if not numbers.size:
      first.append(i)
      continue
    rows[i] = numbers.reshape(rows.shape[1:])
    x, y = rows[kept], rows[i]
    norm = np.maximum(x[..., :1], y[..., :1])
    scale = np.maximum(np.maximum(abs(x), abs(y)), 1e-3 * norm)
    near = (abs(x - y) <= 1e-4 * scale).all(axis=(1, 2))
    found = np.flatnonzero(near)
    first.append(kept[found[0]] if found.size else i)
    if not found.size:
      kept.append(i)
  return first


def _is_settled(run, arm, t, needed, digests):
  """Whether an iteration's candidates are final: some of them have a score."""
  sampled, judged = run(
      "SELECT count(*), count(v.item) FROM completions c"
      " LEFT JOIN verdicts v USING (arm, iteration, item)"
      " WHERE c.arm = ? AND c.iteration = ?",
      (arm, t),
  ).one()
  scored = {
      row.program
      for row in run(
          "SELECT program FROM scores WHERE split = 'dev' AND program NOTNULL"
      )
  }
  return judged == sampled >= needed and not scored.isdisjoint(digests)
