"""TensorBoard gets what the archive holds, each once, also after a kill."""

import struct

import pytest
from tensorboardX.proto import event_pb2

from selfdev_jax import board
from selfdev_jax import config as config_lib
from selfdev_jax import records
from selfdev_jax import store as store_lib

_CONFIG = config_lib.Config(name="t", seed_model="s", experts=("a", "b"))


def _events(workdir):
  """{tag: {step: value}} of all files; a step that is there twice fails."""
  found = {}
  for file in (workdir / "tensorboard").iterdir():
    data, at = file.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      event = event_pb2.Event()
      # The length has a checksum of four bytes, and so has the event.
      event.ParseFromString(data[at + 12 : at + 12 + length])
      at += length + 16
      for value in event.summary.value:
        steps = found.setdefault(value.tag, {})
        assert event.step not in steps, value.tag
        steps[event.step] = pytest.approx(value.simple_value)
  return found


def _propose(archive):
  with archive.activity(records.LOOP, 1, "propose", 2, "program"):
    archive.add_factory(1, "")
    archive.add_completions(
        [records.Completion(records.LOOP, 1, i, "t", True) for i in range(2)]
    )
    archive.advance(2)
  with archive.activity(records.LOOP, 1, "admit", 2, "program"):
    archive.add_verdict(records.Verdict(records.LOOP, 1, 0, "s", "d1"))
    archive.add_verdict(records.Verdict(records.LOOP, 1, 1, "s"))


def _score(archive, *scores):
  with archive.activity(records.LOOP, 1, "evaluate"):
    for score in scores:
      archive.add_score(score)


def test_scores_and_rates_once_each_over_sessions(tmp_path):
  dev = records.DEV
  with store_lib.Store.create(tmp_path, _CONFIG, {}, {}) as archive:
    with board.Board(archive) as shown:
      _propose(archive)
      _score(
          archive,
          records.Score("seed", dev, 10, 4, 0.5, 2.0),
          records.Score("program:d1", dev, 5, 4, items=10),
      )
      shown.update()  # Half of its answers are no score yet.
      _score(archive, records.Score("program:d1", dev, 5, 1, items=5))
    _score(archive, records.Score("ties:x", dev, 10, None, failure="memory"))
    for i, correct in enumerate((3, 6, 5)):
      _score(archive, records.Score(f"weights:{i}", dev, 10, correct))
  # A session that was killed left half a file, which the next one replaces.
  (file,) = (tmp_path / "tensorboard").iterdir()
  file.write_bytes(file.read_bytes()[:-7])
  with (
      store_lib.Store.create(tmp_path, _CONFIG, {}, {}) as archive,
      board.Board(archive),
  ):
    activities = archive.activities()
  events = _events(tmp_path)
  assert events["dev/seed/accuracy"] == {1: 0.4}
  assert events["dev/seed/answers_per_s"] == {1: 5.0}
  assert events["dev/loop/accuracy"] == {1: 0.5}
  assert events["dev/weights/accuracy"] == {1: 0.3, 2: 0.6, 3: 0.5}
  assert events["dev/weights/best"] == {1: 0.3, 2: 0.6}
  assert "dev/ties/accuracy" not in events
  assert events["admitted/loop"] == {2: 0.5}
  assert events["programs_per_s/loop/propose"] == {
      1: pytest.approx(2 / activities[0].seconds, rel=1e-5)
  }


def test_later_updates_ask_for_what_is_new(tmp_path, monkeypatch):
  monkeypatch.setattr(board, "_OVERLAP_S", 0.0)
  with (
      store_lib.Store.create(tmp_path, _CONFIG, {}, {}) as archive,
      board.Board(archive) as shown,
  ):
    read, rows = [], archive.rows

    def spy(*args, **values):
      found = rows(*args, **values)
      if "since" in values:
        read.append([row.model for row in found])
      return found

    monkeypatch.setattr(archive, "rows", spy)
    for model in ("seed", "ties:x"):
      _score(archive, records.Score(model, records.DEV, 10, 4))
      shown.update()
    assert read == [["seed"], ["ties:x"]]
  events = _events(tmp_path)
  assert events["dev/seed/accuracy"] == events["dev/ties/accuracy"] == {1: 0.4}


def test_an_update_just_done_is_not_repeated(tmp_path, monkeypatch):
  with (
      store_lib.Store.create(tmp_path, _CONFIG, {}, {}) as archive,
      board.Board(archive) as shown,
  ):
    read = []
    monkeypatch.setattr(archive, "rows", lambda *_, **__: read.append(1) or [])
    shown.update(every_s=60.0)
    assert not read
    shown.update()
    assert read
