"""Measures an archive of 100,000 programs and 3,000,000 answers.

  python -m launch.benchmark_archive
  python -m launch.benchmark_archive --workdir=/tmp/synthetic   # kept, reused

Makes up the archive of launch/synthetic.py in --workdir, or in a directory that
is deleted again, and states its size, what the store's own writes cost on it
and on an empty one, and how long it takes to ask: every query of
selfdev_jax/inspection, every form of launch.inspect as a whole command and the
dashboard's first page with all that it loads, over HTTP. Times are medians of
--repeats beside mean CPU seconds, with the files in the page cache; the last
line is JSON.
"""

from collections.abc import Callable
import contextlib
import hashlib
import html
import json
import os
import pathlib
import random
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags
import httpx2
import numpy as np

from launch import app
from launch import synthetic
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import queries
from selfdev_jax.inspection import stages

_PROGRAMS = flags.DEFINE_integer(
    "programs", 100_000, "Distinct ones, rounded up.", 100
)
_ANSWERS = flags.DEFINE_integer("answers", 3_000_000, "Of all models.", 10_000)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Of each timing.", 1)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Of the archive, used as it is where there is one."
)
_WRITES = 300  # Of each kind, timed.


def _sizes(path: pathlib.Path) -> dict[str, Any]:
  """Bytes of the file, and of each table with its indices."""
  sizes = {"bytes": path.stat().st_size}
  uri = f"{path.absolute().as_uri()}?mode=ro"
  with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
    tables = database.execute(
        "SELECT tbl_name, SUM(pgsize) FROM dbstat JOIN sqlite_master"
        " USING (name) GROUP BY tbl_name ORDER BY 2 DESC LIMIT 6"
    )
    sizes["table_bytes"] = dict(tables.fetchall())
    for table, one in (("responses", "answer"), ("programs", "program")):
      ((n,),) = database.execute(f"SELECT COUNT(*) FROM {table}")
      sizes[f"{one}s"] = n
      sizes[f"bytes_per_{one}"] = sizes["table_bytes"][table] / n
  return sizes


def _seconds(work: Callable[[], Any]) -> float:
  """Median of the repeats."""
  return _timed(work)[0]


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
  """Median seconds of the repeats; mean CPU seconds, of processes too.

  On a machine that does other things, the second say more.
  """
  taken, before = [], os.times()
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    work()
    taken.append(time.perf_counter() - start)
  spent = sum(os.times()[:4]) - sum(before[:4])
  return statistics.median(taken), spent / _REPEATS.value


def _queries(workdir: pathlib.Path) -> dict[str, tuple[float, float]]:
  """Seconds and CPU seconds of each query; each opens the archive."""
  with store_lib.Store.read(workdir) as store:
    best = queries.find(store, "best")
    pair = store.pairs(1)[0]
  listed = {
      **{f"sort={sort}": {"sort": sort} for sort in queries.SORTS},
      "ascending": {"ascending": True},
      "search=digest": {"search": best[:8]},
      "search=text": {"search": "jnp.median"},
      "search=nothing": {"search": "no such text"},
      "verdict=admitted": {"verdict": "admitted"},
      "verdict=rejected": {"verdict": "rejected"},
      "verdict=trace:name": {"verdict": "trace:name"},
      "arm, iteration": {"arm": "control", "iteration": 5},
      "min_dev": {"min_dev": 0.9},
      "candidate_of": {"candidate_of": ("loop", 10)},
      "offset=90000": {"offset": 90_000},
  }
  programs = {
      f"programs {name}": lambda s, o=options: queries.programs(s, **o)
      for name, options in listed.items()
  }
  model = records.PROGRAM + best
  asked = programs | {
      "find": lambda s: queries.find(s, "best"),
      "program": lambda s: queries.program(s, best),
      "completions": lambda s: queries.completions(s, "loop", 1, offset=1000),
      "completion": lambda s: queries.completion(s, "loop", 1, 0),
      "pair": lambda s: queries.pair(s, 1, pair.item),
      "factory": lambda s: queries.factory(s, 2),
      "activity": lambda s: queries.activity(s, 1),
      "score_origin": lambda s: queries.score_origin(s, model, "dev"),
      "answers": lambda s: queries.answers(s, model, "dev"),
      "scores": lambda s: queries.scores(s, "ties"),
      "answered_by": lambda s: queries.answered_by(s, model, "dev"),
      "baselines": queries.baselines,
      "iterations": queries.iterations,
      "rejections": queries.rejections,
      "stages": stages.stages,
      "throughput": stages.throughput,
  }

  def ask(query):
    with store_lib.Store.read(workdir) as store:
      query(store)

  with progress.bar("Queries", len(asked), "query") as bar:
    seconds = {}
    for name, query in asked.items():
      seconds[name] = _timed(lambda query=query: ask(query))
      bar.update()
  return seconds


def _commands(workdir: pathlib.Path) -> dict[str, tuple[float, float]]:
  """Seconds and CPU seconds of each form of launch.inspect, as a command."""
  forms = (
      "",
      "--format=json",
      "--format=csv",
      "--programs",
      "--programs --sort=test --limit=10",
      "--programs --sort=size --ascending --offset=90000",
      "--programs --verdict=trace:name",
      "--programs --verdict=rejected --format=json --limit=50",
      "--scores=ties",
      "--programs --search=jnp.median",
      "--programs --min_dev=0.9 --format=csv --limit=50",
      "--programs --candidates=loop/10",
      "--program=best",
      "--program=best --format=json",
      "--program=best --ir",
      "--answers=seed --split=test",
      "--completions=loop/1 --offset=1000",
      "--completion=loop/1/0",
      "--pair=1/0",
      f"--other={workdir}",
  )
  command = [sys.executable, "-m", "launch.inspect", f"--workdir={workdir}"]
  with progress.bar("launch.inspect", len(forms), "form") as bar:
    seconds = {}
    for form in forms:
      seconds[form.replace(str(workdir), "DIR")] = _timed(
          lambda form=form: subprocess.run(
              [*command, *form.split()], check=True, stdout=subprocess.DEVNULL
          )
      )
      bar.update()
  return seconds


def _dashboard(workdir: pathlib.Path) -> dict[str, float]:
  """Seconds of the dashboard's start, first page and every later one.

  An open page asks every few seconds what has changed: `page_and_updates_s`
  has one of each of these questions too.
  """
  command = [sys.executable, "-m", "launch.dashboard", f"--workdir={workdir}"]
  start = time.perf_counter()
  with subprocess.Popen(
      [*command, "--port=0"], stdout=subprocess.PIPE, text=True
  ) as server:
    try:
      address = re.search(r"http://\S+", server.stdout.readline())[0]
      started = time.perf_counter() - start
      start = time.perf_counter()
      size, requests = _load(address, "load")
      first = time.perf_counter() - start
      later = _seconds(lambda: _load(address, "load"))
      polled = _seconds(lambda: _load(address, "load|every"))
    finally:
      server.terminate()
  return {
      "start_s": started,
      "first_page_s": first,
      "page_s": later,
      "page_and_updates_s": polled,
      "page_bytes": size,
      "requests": requests,
  }


def _load(address: str, triggers: str) -> tuple[int, int]:
  """Loads the page as a browser does.

  Args:
    address: of the dashboard.
    triggers: of the parts that are loaded too, a regular expression.

  Returns:
    Bytes and requests.
  """
  with httpx2.Client(base_url=address, timeout=60) as client:
    load = lambda path: client.get(path).raise_for_status()
    page = load("/").text
    paths = set(re.findall(r'<(?:script|img)[^>]* src="(/[^"]*)"', page))
    paths |= set(re.findall(r'<link[^>]* href="(/[^"]*)"', page))
    for tag in re.findall(r"<[^>]* hx-trigger=[^>]*>", page):
      if re.search(rf'hx-trigger="[^"]*({triggers})', tag):
        paths.add(html.unescape(re.search(r'hx-get="([^"]*)"', tag)[1]))
    size = len(page) + sum(len(load(path).content) for path in paths)
  return size, 1 + len(paths)


def _writes(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
  """Milliseconds of the store's own writes, each on the disk when it ends."""
  with store_lib.Store.read(workdir) as store:
    config, identity = store.config(), store.meta("identity")
    is_over = store.is_done(records.LOOP, 0, store_lib.SEARCH)
  split = records.TEST if is_over else records.DEV
  texts, n = synthetic.Texts(random.Random(1)), config.propose.batch_size
  # Of an iteration that the archive does not have.
  about = (records.LOOP, config.iterations + 1)
  bodies = [texts.body() for _ in range(_WRITES)]
  answers = [
      records.Response(i, f"q{i}", *texts.answer(), "7", False)
      for i in range(100)
  ]
  taken = {"add_completions": [], "add_verdict": [], "add_score": []}

  def timed(name, write, *args):
    start = time.perf_counter()
    write(*args)
    taken[name].append(1e3 * (time.perf_counter() - start))

  with (
      store_lib.Store.create(workdir, config, identity, {}) as store,
      store.activity(*about, "writing"),
  ):
    store.add_factory(about[1], "")
    for i, body in enumerate(bodies):
      batch = [
          records.Completion(*about, n * i + k, body, True, "", about[1])
          for k in range(n)
      ]
      timed("add_completions", store.add_completions, batch)
    for i, body in enumerate(bodies):
      digest = hashlib.sha256(f"written {i}".encode()).hexdigest()
      verdict = records.Verdict(*about, i, body, digest)
      program = (texts.program(), {"equations": 16}, [0.0] * 12)
      timed("add_verdict", store.add_verdict, verdict, *program)
      name = records.PROGRAM + digest
      score = records.Score(name, split, len(answers), 0, items=1200)
      timed("add_score", store.add_score, score, answers)
  return {
      name: {
          "median_ms": statistics.median(values),
          "p99_ms": float(np.percentile(values, 99)),
      }
      for name, values in taken.items()
  }


def _writes_of(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Of the store's writes to a copy, and to an archive of the same run."""
  with tempfile.TemporaryDirectory(dir=workdir) as scratch:
    empty, full = (pathlib.Path(scratch) / name for name in ("empty", "full"))
    with store_lib.Store.read(workdir) as store:
      config, identity = store.config(), store.meta("identity")
    store_lib.Store.create(empty, config, identity, {}).close()
    full.mkdir()
    shutil.copyfile(workdir / store_lib.ARCHIVE, full / store_lib.ARCHIVE)
    return {"empty": _writes(empty), "full": _writes(full)}


def main(_):
  with contextlib.ExitStack() as stack:
    if _WORKDIR.value:
      workdir = pathlib.Path(_WORKDIR.value)
      workdir.mkdir(parents=True, exist_ok=True)
    else:
      workdir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if not (workdir / store_lib.ARCHIVE).exists():
      synthetic.make(workdir, synthetic.Plan(_PROGRAMS.value, _ANSWERS.value))
    result = (
        {"load_1m": os.getloadavg()[0]}
        | _sizes(workdir / store_lib.ARCHIVE)
        | {
            "repeats": _REPEATS.value,
            "query": _queries(workdir),
            "inspect": _commands(workdir),
            "dashboard": _dashboard(workdir),
            "writes": _writes_of(workdir),
        }
    )
  for kind in ("query", "inspect"):
    timed = result.pop(kind)
    for name, (wall, cpu) in sorted(timed.items(), key=lambda x: -x[1][0]):
      print(f"{kind:>8} {name:<55} {wall:7.3f} s, CPU {cpu:7.3f} s")
    for i, unit in enumerate(("s", "cpu_s")):
      result[f"{kind}_{unit}"] = {name: x[i] for name, x in timed.items()}
      result[f"slowest_{kind}_{unit}"] = max(x[i] for x in timed.values())
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
