"""Scores and rates of a run for TensorBoard, read off its archive.

DPO's own curves are written by dpo/workdir.py; `tensorboard --logdir=WORKDIR`
shows both.
"""

import shutil
import time

import tensorboardX

from selfdev_jax import records
from selfdev_jax import store as store_lib

_FLUSH_S = 10
_OVERLAP_S = 60.0  # Clocks are set back.

# Neither what another model was scored for, nor one that is not done or was
# stopped: its accuracy is not of all items.
_SCORES = """
SELECT scores.rowid, scores.model, scores.split, scores.correct, scores.n,
  scores.merge_s, scores.evaluate_s, activities.arm, scores.at
FROM scores JOIN activities ON activities.id = scores.activity
WHERE scores.reused IS NULL AND (scores.n = scores.items
  OR scores.correct IS NULL) AND coalesce(scores.at, 0) >= :since
ORDER BY scores.at
"""
_ADMITTED = """
SELECT count(digest) * 1.0 / count(*) AS share FROM verdicts
WHERE arm = :arm AND iteration = :iteration
"""


class Board:
  """Keeps `tensorboard/` in step with the archive; a context manager.

  What an earlier session wrote is written anew: the archive knows all of it.
  """

  def __init__(self, archive: store_lib.Store):
    self._archive = archive
    directory = archive.workdir / "tensorboard"
    shutil.rmtree(directory, ignore_errors=True)
    self._writer = tensorboardX.SummaryWriter(
        str(directory), flush_secs=_FLUSH_S
    )
    self._scores: set[int] = set()
    self._since = 0.0  # Unix time; what was scored before is shown.
    self._activities = 0
    self._best: dict[str, float] = {}
    self._seen: dict[str, int] = {}
    self._last = 0.0

  def __enter__(self) -> "Board":
    self.update()
    return self

  def __exit__(self, *_):
    self._writer.close()

  def update(self, every_s: float = 0.0):
    """Adds what is new in the archive, unless that was done just now."""
    if time.monotonic() - self._last < every_s:
      return
    self._add_scores()
    self._add_rates()
    self._last = time.monotonic()

  def _add_scores(self):
    """Each score against the number of models of its kind until then."""
    since, self._since = self._since, time.time() - _OVERLAP_S
    for row in self._archive.rows(_SCORES, since=since):
      if row.rowid in self._scores:
        continue
      self._scores.add(row.rowid)
      kind = row.model.partition(":")[0]
      if kind == "program" and row.split == records.DEV:
        kind = row.arm
      name = f"{row.split}/{kind}"
      count = self._seen[name] = self._seen.get(name, 0) + 1
      add = lambda tag, value, step=count, at=row.at: self._writer.add_scalar(
          tag, value, step, walltime=at
      )
      add(f"{name}/merge_s", row.merge_s)
      if row.correct is None:
        continue
      accuracy = row.correct / row.n
      add(f"{name}/accuracy", accuracy)
      if accuracy > self._best.get(name, -1.0):
        self._best[name] = accuracy
        add(f"{name}/best", accuracy)
      if row.evaluate_s:
        add(f"{name}/answers_per_s", row.n / row.evaluate_s)

  def _add_rates(self):
    """How fast each activity went, and what share of programs was admitted.

    Against the number of the activity: a stage that was cut short has several.
    """
    for a in self._archive.activities():
      if a.id <= self._activities or not a.finished:
        continue
      self._activities = a.id
      tag = f"{a.arm}/{a.stage}"
      self._writer.add_scalar(f"seconds/{tag}", a.seconds, a.id)
      if a.done and a.seconds:
        rate = a.done / a.seconds
        self._writer.add_scalar(f"{a.unit}s_per_s/{tag}", rate, a.id)
      if a.stage == "admit":
        ((share,),) = self._archive.rows(
            _ADMITTED, arm=a.arm, iteration=a.iteration
        )
        self._writer.add_scalar(f"admitted/{a.arm}", share, a.id)
