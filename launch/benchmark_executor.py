r"""Measures what a run over many workers costs beside its work.

  python -m launch.benchmark_executor

starts a Ray cluster on this machine, with workers that take a fraction of a
CPU and only wait, a second a candidate, where others would merge and answer.
All else is a run's: candidates go out in a race's order, each with a program of
a usual size, answers to the questions of configs/smoke.py come back, and the
head checks and archives them. It prints how busy the workers were, the head's
CPU and memory, and the bytes that pass through the network a candidate. The
last line is the result as JSON.

  ... --seconds=0 --workers=8 --candidates=5000     what the head gets through

A worker that waits needs about 100 MB.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import pickle
import random
import tempfile
import time

from absl import flags
import numpy as np

from configs import smoke
from launch import app
from selfdev_jax import config as config_lib
from selfdev_jax import evaluation
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.evaluation import racing
from selfdev_jax.executors import access
from selfdev_jax.executors import versions
from selfdev_jax.executors import work as work_lib

_WORKERS = flags.DEFINE_integer("workers", 64, "How many.", lower_bound=1)
_CANDIDATES = flags.DEFINE_integer(
    "candidates", 10_000, "Models that are evaluated.", lower_bound=1
)
_SECONDS = flags.DEFINE_float(
    "seconds", 1.0, "That a worker waits for a candidate.", lower_bound=0.0
)

_CPUS = 0.01  # Of a worker: it waits.
_PROGRAM_BYTES = 8000  # The smoke run's have 8,000 on average.
_ANSWER_CHARS = 16  # Likewise.


class Waiting:
  """A worker that waits instead of merging and answering."""

  def __init__(self, setup: work_lib.Setup):
    self._items = setup.config.evaluate.dev_size
    self._seconds = setup.longest

  def versions(self) -> dict[str, str]:
    """The head's: nothing is computed here that versions would change."""
    return versions.here(None, "jax")

  def open(self) -> work_lib.Reply:
    """Is ready at once."""
    canary = np.zeros(1, np.float32)
    return work_lib.Reply(work_lib.Hello("waiting", {}, "none", canary))

  def do(self, piece: work_lib.Piece) -> work_lib.Reply:
    """Waits, and answers at random."""
    time.sleep(self._seconds)
    draw = random.Random(piece.payload.model)
    text = lambda: draw.randbytes(_ANSWER_CHARS // 2).hex()
    packed = [
        (text(), "1", draw.random() < 0.5, False, "")
        for _ in range(piece.payload.first, piece.payload.before)
    ]
    answered = work_lib.Answered(
        packed, "", "0" * 32, 0.0, self._seconds, "waiting"
    )
    return work_lib.Reply(answered, seconds=self._seconds)

  def stop(self, kind, key):
    """It takes no time to wait for."""

  def close(self):
    """There is nothing to end."""


def _network_bytes() -> int:
  """Received through the loopback interface."""
  text = pathlib.Path("/proc/net/dev").read_text(encoding="ascii")
  (line,) = [x for x in text.splitlines() if x.strip().startswith("lo:")]
  return int(line.split(":")[1].split()[0])


def _memory_bytes() -> int:
  """Resident, of this process."""
  pages = pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()
  return int(pages[1]) * 4096


def _setup(config: config_lib.Config, seconds: float, workdir: str):
  return work_lib.Setup(
      config=config,
      models={},
      digests={},
      items="",
      kind="jax",
      longest=seconds,
      vllm_python=None,
      allow_weak_sandbox=False,
      workdir=workdir,
      decoder=None,
  )


def _evaluate(cluster, archive, config, names) -> dict[str, float]:
  """Has all answered, as the loop does, and says what that took."""
  items = len(evaluation.load_items(config.evaluate)[records.DEV])
  race = racing.Race(len(names), [True] * items, (items,), len(names), 0, 0.05)
  program = random.Random(0).randbytes(_PROGRAM_BYTES // 2).hex()
  work = lambda i, first, before: work_lib.Answer(
      names[i], records.DEV, first, before, False
  )
  upcoming = lambda: itertools.starmap(work, race.ahead())
  answer_bytes = 0
  start, cpu = time.monotonic(), time.process_time()
  sent, before = _network_bytes(), _memory_bytes()
  with progress.bar("Evaluating", len(names), "candidate") as bar:
    for answered in cluster.answer(upcoming, lambda _: program):
      i, _, _ = race.turn()
      race.add(i, [r.correct for r in answered.responses])
      answer_bytes += len(
          pickle.dumps([(r.text, r.extracted) for r in answered.responses])
      )
      archive.add_score(
          records.Score(
              model=names[i],
              split=records.DEV,
              n=items,
              correct=sum(r.correct for r in answered.responses),
              engine=answered.engine,
              weights=answered.weights,
          ),
          answered.responses,
      )
      archive.advance(1)
      bar.update(1)
  seconds = time.monotonic() - start
  return {
      "seconds": seconds,
      "candidates_per_s": len(names) / seconds,
      "head_cpu": (time.process_time() - cpu) / seconds,
      "head_mb_before": before / 1e6,
      "head_mb_after": _memory_bytes() / 1e6,
      "bytes_per_candidate": (_network_bytes() - sent) / len(names),
      "answer_bytes_per_candidate": answer_bytes / len(names),
  }


def main(_):
  access.guard_local()
  from selfdev_jax.executors import cluster as cluster_lib

  workers, candidates = _WORKERS.value, _CANDIDATES.value
  config = config_lib.from_config_dict(smoke.get_config())
  config = dataclasses.replace(
      config,
      executor="ray",
      ray=config_lib.Ray(
          workers=workers, worker_cpus=_CPUS, start_timeout_s=3600.0
      ),
  )
  names = [f"ties:{i}" for i in range(candidates)]
  with contextlib.ExitStack() as stack:
    workdir = stack.enter_context(tempfile.TemporaryDirectory())
    start = time.monotonic()
    cluster = stack.enter_context(
        cluster_lib.Cluster(_setup(config, _SECONDS.value, workdir), Waiting)
    )
    started = time.monotonic() - start
    archive = stack.enter_context(
        store_lib.Store.create(workdir, config, {}, {})
    )
    stack.enter_context(
        archive.activity(records.LOOP, 0, "ties", candidates, "answer")
    )
    result = {
        "workers": workers,
        "candidates": candidates,
        "wait_s": _SECONDS.value,
        "start_s": started,
        **_evaluate(cluster, archive, config, names),
    }
  busy = candidates * _SECONDS.value / (workers * result["seconds"])
  result = {k: round(v, 4) for k, v in (result | {"busy": busy}).items()}
  network = result["bytes_per_candidate"]
  answers = result["answer_bytes_per_candidate"]
  print(
      f"{candidates} candidates of {_SECONDS.value:g} s on {workers} workers:"
      f" {result['seconds']:.1f} s, workers {100 * busy:.1f} % busy,"
      f" {result['candidates_per_s']:.1f} candidates/s\n"
      f"Head: {100 * result['head_cpu']:.0f} % of a core,"
      f" {result['head_mb_before']:.0f} MB, at the end"
      f" {result['head_mb_after']:.0f} MB\n"
      f"Network: {network:.0f} bytes a candidate, {network - answers:.0f}"
      " beyond its answers"
  )
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
