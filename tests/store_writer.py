"""A writer whose every commit is known, for tests/store_faults_test.py.

  python tests/store_writer.py write DIR         # says how many are committed
  python tests/store_writer.py read DIR SECONDS  # looks meanwhile
  python tests/store_writer.py kill DIR TIMES    # kills writers at any moment

It loads no jax, and so can fork.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time

from selfdev_jax import config as config_lib
from selfdev_jax import records
from selfdev_jax import store as store_lib

_CONFIG = config_lib.Config(name="t", seed_model="s", experts=("a",))
_BATCH, _ANSWERS, _PARTS = 3, 4, 2
# Of a step: a batch of completions, their verdicts, two parts of a score.
_COMMITS = 1 + _BATCH + _PARTS
_LONGEST_S = 0.2  # That a writer lives; it needs half of it to open.


def create(workdir) -> store_lib.Store:
  return store_lib.Store.create(workdir, _CONFIG, {}, {})


def position(archive: store_lib.Store) -> int:
  """How many commits an archive has; all of its rows agree on it.

  Raises:
    AssertionError: if they do not, or something of an earlier commit is gone.
  """
  ((completions, verdicts, programs, answers, done),) = archive.rows(
      "SELECT (SELECT COUNT(*) FROM completions),"
      " (SELECT COUNT(*) FROM verdicts), (SELECT COUNT(*) FROM programs),"
      " (SELECT COUNT(*) FROM responses),"
      " (SELECT coalesce(SUM(done), 0) FROM activities)"
  )
  k = completions // _BATCH + verdicts + answers // _ANSWERS
  step, rest = divmod(k, _COMMITS)
  judged = min(max(rest - 1, 0), _BATCH)
  parts = min(max(rest - 1 - _BATCH, 0), _PARTS)
  assert completions == _BATCH * (step + (rest > 0)), (k, completions)
  assert verdicts == programs == _BATCH * step + judged, (k, verdicts)
  assert answers == _ANSWERS * (_PARTS * step + parts), (k, answers)
  assert done == k, (k, done)
  wrong = archive.rows(
      "SELECT s.model FROM scores s LEFT JOIN responses r USING (model, split)"
      " GROUP BY s.model HAVING COUNT(r.item) != s.n"
      " OR SUM(r.correct) != s.correct"
  )
  assert not wrong, wrong
  return k


def check(archive: store_lib.Store) -> int:
  """Also of the file itself."""
  assert archive.rows("PRAGMA integrity_check") == [("ok",)]
  assert archive.rows("PRAGMA foreign_key_check") == []
  return position(archive)


def commit(archive: store_lib.Store, k: int):
  """Writes what comes after `k` commits, in one."""
  step, rest = divmod(k, _COMMITS)
  first = step * _BATCH
  archive.advance(1)
  if rest == 0:
    archive.add_completions(
        [
            records.Completion("loop", 1, first + i, "x" * 300, True)
            for i in range(_BATCH)
        ]
    )
  elif rest <= _BATCH:
    item = first + rest - 1
    archive.add_verdict(
        records.Verdict("loop", 1, item, "y" * 300, f"d{item}"),
        "z" * 900,
        {},
        [1.0, 0.5],
    )
  else:
    start = (rest - 1 - _BATCH) * _ANSWERS
    answers = [
        records.Response(i, f"q{i}", "a" * 40, "g", "a", i % 2 == 0)
        for i in range(start, start + _ANSWERS)
    ]
    score = records.Score(
        model=f"program:d{first}",
        split=records.DEV,
        n=_ANSWERS,
        correct=sum(a.correct for a in answers),
        items=_PARTS * _ANSWERS,
    )
    archive.add_score(score, answers)


def write(workdir, out: int, commits: int = sys.maxsize, pause_s: float = 0.0):
  """Goes on where the archive is; says each commit once it is done.

  Args:
    workdir: of the archive.
    out: file descriptor.
    commits: at most.
    pause_s: after each.
  """
  # `done` is then written with the rows that it counts, and not before.
  store_lib._BEAT_S = float("inf")
  with create(workdir) as archive:
    have = position(archive)
    with archive.activity("loop", 1, "propose"):
      archive.add_factory(1, "")
      for k in range(have, have + commits):
        commit(archive, k)
        os.write(out, f"{k + 1}\n".encode())
        time.sleep(pause_s)


def read(workdir, seconds: float) -> dict[str, int]:
  """Looks again and again; what it sees agrees, stays and never goes back."""
  end, looks, seen = time.monotonic() + seconds, 0, []
  while time.monotonic() < end:
    with store_lib.Store.read(workdir) as archive:
      k = position(archive)
      time.sleep(0.005)
      assert position(archive) == k, "a reader's moment passed"
    assert not seen or k >= seen[-1], (seen[-1], k)
    seen.append(k)
    looks += 1
  return {"looks": looks, "first": seen[0], "last": seen[-1]}


def kill(directory, times: int) -> dict[str, int]:
  """Kills writers at random moments; every tenth begins a new archive."""
  rng = random.Random(0)
  lost = made = unmade = commits = 0
  for i in range(times):
    workdir = pathlib.Path(directory) / str(i // 10)
    before = _acknowledged(workdir, rng.uniform(0.0, _LONGEST_S))
    said = before[-1] if before else None
    try:
      # A reader finds it as well as the writer that goes on.
      with (create if i % 2 else store_lib.Store.read)(workdir) as archive:
        k = check(archive)
    except store_lib.StoreError as error:
      # It was killed before there was an archive, and that leaves none.
      assert "holds no run" in str(error) or "has no tables" in str(error)
      assert said is None and i % 10 == 0, (i, said)
      unmade += 1
      continue
    made += 1
    commits += len(before)
    if said is not None:
      lost += k < said
      assert k <= said + 1, (k, said)
  return {"made": made, "unmade": unmade, "commits": commits, "lost": lost}


def _acknowledged(workdir, seconds) -> list[int]:
  """What a writer said until it was killed."""
  out, into = os.pipe()
  child = os.fork()
  if not child:
    os.close(out)
    write(workdir, into)
  os.close(into)
  time.sleep(seconds)
  os.kill(child, signal.SIGKILL)
  _, status = os.waitpid(child, 0)
  assert os.WTERMSIG(status) == signal.SIGKILL, status
  with open(out, encoding="utf-8") as said:
    return [int(line) for line in said]


if __name__ == "__main__":
  _, what, where, *more = sys.argv
  if what == "write":
    write(where, sys.stdout.fileno(), pause_s=0.001)
  elif what == "read":
    print(json.dumps(read(where, float(more[0]))))
  else:
    print(json.dumps(kill(where, int(more[0]))))
