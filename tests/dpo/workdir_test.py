"""A training's directory: damaged, cut short, of something else."""

import json
import re
import shutil
import struct

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import safetensors.numpy
from tensorboardX.proto import event_pb2

from selfdev_jax import errors
from selfdev_jax.dpo import workdir as workdir_lib

_MADE_FROM = {"weights": "w", "dpo.beta": "0.1"}
_KEY = {"weights": "w", "data": "d"}
_LOGPS = np.array([-1.5, -2.25], np.float32)


def _open(path, made_from=None):
  return workdir_lib.Workdir(path, made_from or _MADE_FROM)


@pytest.fixture
def kept(tmp_path):
  with _open(tmp_path / "new" / "dpo") as kept:
    yield kept


@pytest.fixture
def path(kept, tmp_path):
  return tmp_path / "new" / "dpo"


def _assert_refused(action, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    action()
  assert "\n" not in str(caught.value)


# What it is of.


def test_it_says_what_it_is_of(kept, path):
  assert json.loads((path / "run.json").read_text()) == _MADE_FROM
  before = (path / "run.json").stat().st_mtime_ns
  _open(path).__exit__()
  # Keys that are new in a later version were not the same, one cannot know.
  assert (path / "run.json").stat().st_mtime_ns == before


def test_a_relative_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with _open("here") as kept:
    kept.save(1, {"x": jnp.zeros(3)})
    kept.finish()
  assert (tmp_path / "here" / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize(
    ("made_from", "message"),
    [
        (_MADE_FROM | {"weights": "x"}, "weights was 'w', is 'x'; name anoth"),
        (_MADE_FROM | {"dpo.new": "1"}, "dpo.new was None, is '1'; name anoth"),
    ],
)
def test_of_another_training(kept, path, made_from, message):
  del kept
  _assert_refused(
      lambda: _open(path, made_from),
      f"^{re.escape(str(path))} belongs to another training: {message}",
  )


@pytest.mark.parametrize("text", ["", '{"weights": "w"', "[1]", "3", "\xff"])
def test_a_damaged_run_file(kept, path, text):
  del kept
  (path / "run.json").write_bytes(text.encode("latin-1"))
  _assert_refused(
      lambda: _open(path), r"run.json is damaged \(.*\); name another --workdir"
  )


# The reference.


def test_the_reference_comes_back(kept, path):
  assert kept.read_reference(_KEY) is None
  kept.write_reference(_KEY, _LOGPS)
  found = kept.read_reference(_KEY)
  np.testing.assert_array_equal(found, _LOGPS)
  assert found.dtype == np.float32
  assert not list(path.glob("*.partial"))


@pytest.mark.parametrize("name", sorted(_KEY))
def test_a_stale_reference(kept, name):
  kept.write_reference(_KEY, _LOGPS)
  _assert_refused(
      lambda: kept.read_reference(_KEY | {name: "other"}),
      f"safetensors is stale: it was computed with other {name}; remove it",
  )


def _cut(path):
  path.write_bytes(path.read_bytes()[:-3])


def _empty(path):
  path.write_bytes(b"")


def _without_metadata(path):
  safetensors.numpy.save_file({"logps": _LOGPS}, path)


def _of_another_name(path):
  safetensors.numpy.save_file({"x": _LOGPS}, path, _KEY)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is damaged"),
        (_empty, "is damaged"),
        (_of_another_name, "is damaged"),
        (_without_metadata, "is stale"),
    ],
)
def test_a_damaged_reference(kept, path, damage, message):
  kept.write_reference(_KEY, _LOGPS)
  damage(path / "reference.safetensors")
  _assert_refused(
      lambda: kept.read_reference(_KEY),
      rf"reference.safetensors {message}.* remove it, it is computed again",
  )


# Checkpoints.


def _abstract(tree):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      tree,
  )


def _state(value):
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  wide = jnp.arange(32.0).reshape(4, 8) + value
  return {
      "wide": jax.device_put(wide, NamedSharding(mesh, P("a", "b"))),
      "count": jax.device_put(jnp.int32(value), NamedSharding(mesh, P())),
  }


def test_the_last_two_states_are_kept(kept, path):
  abstract = _abstract(_state(0))
  assert not kept.has_checkpoint()
  for step in (2, 4, 6):
    kept.save(step, _state(step))
  kept.finish()
  assert {p.name for p in (path / "checkpoints").iterdir()} == {"4", "6"}
  with _open(path) as again:
    assert again.has_checkpoint()
    state, step = again.restore(abstract)
    assert step == 6
    jax.tree.map(np.testing.assert_array_equal, state, _state(6))
    # On other devices.
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    moved, _ = again.restore(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
            abstract,
        )
    )
    jax.tree.map(np.testing.assert_array_equal, moved, state)
    assert moved["wide"].sharding == one


def test_a_checkpoint_of_another_shape(kept, path):
  kept.save(3, _state(0))
  kept.finish()
  other = _abstract(_state(0) | {"more": jnp.zeros(2)})
  with _open(path) as again:
    _assert_refused(
        lambda: again.restore(other),
        rf"the checkpoint of step 3 in {re.escape(str(path))} cannot be read"
        r" \(.*\); remove checkpoints/3 to go on from the one before",
    )


def _lost(path):
  (path / "default" / "manifest.ocdbt").unlink()


def _cut_short(path):
  """As on a disk that was full."""
  whole = [p for p in path.rglob("d/*") if p.is_file()]
  assert whole
  for file in whole:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# TensorStore still answers when Orbax has given up and closed its loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [_lost, _cut_short])
def test_a_damaged_checkpoint(kept, path, damage):
  for step in (3, 4):
    kept.save(step, _state(step))
  kept.finish()
  damage(path / "checkpoints" / "4")
  with _open(path) as again:
    _assert_refused(
        lambda: again.restore(_abstract(_state(0))),
        "the checkpoint of step 4 .* remove checkpoints/4 to go on",
    )
  # As it says.
  shutil.rmtree(path / "checkpoints" / "4")
  with _open(path) as again:
    assert again.restore(_abstract(_state(0)))[1] == 3


def test_a_save_that_was_killed_is_no_checkpoint(kept, path):
  """Orbax gives a directory its name when it is whole."""
  kept.save(3, _state(3))
  kept.finish()
  partial = path / "checkpoints" / "6.orbax-checkpoint-tmp-0"
  (partial / "default").mkdir(parents=True)
  with _open(path) as again:
    assert again.restore(_abstract(_state(0)))[1] == 3
    again.save(6, _state(6))
    again.finish()
  with _open(path) as again:
    assert again.restore(_abstract(_state(0)))[1] == 6


def test_a_save_does_not_see_later_steps(kept, path):
  """It is written while the next steps take its buffers over."""
  size = 1 << 24  # 64 MB take longer to write than to raise by one.
  raised = jax.jit(lambda x: x + 1, donate_argnums=0)
  state = raised(jnp.zeros(size))
  kept.save(1, {"x": state})
  for _ in range(3):
    state = raised(state)
  state.block_until_ready()
  kept.finish()
  assert state[0] == 4
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=one)
  restored, _ = kept.restore({"x": shape})
  assert (np.asarray(restored["x"]) == 1).all()


# Metrics.


def _log(kept, first, last):
  for step in range(first, last + 1):
    kept.log(step, {"loss": 0.5 / step, "rewards/margins": float(step)})


def _steps(path):
  text = (path / "metrics.jsonl").read_text()
  return [json.loads(line)["step"] for line in text.splitlines()]


def test_metrics_come_back(kept, path):
  assert kept.begin_metrics(0) == []
  _log(kept, 1, 3)
  assert _steps(path) == [1, 2, 3]
  with _open(path) as again:
    assert again.begin_metrics(3) == [
        {"loss": 0.5 / step, "rewards/margins": float(step)}
        for step in (1, 2, 3)
    ]


def test_steps_after_the_checkpoint_are_dropped(kept, path):
  kept.begin_metrics(0)
  _log(kept, 1, 5)
  with _open(path) as again:
    assert len(again.begin_metrics(3)) == 3
    assert _steps(path) == [1, 2, 3]
    _log(again, 4, 6)
  assert _steps(path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("cut", range(1, 12, 5))
def test_a_last_line_that_was_cut_off(kept, path, cut):
  """It is of a step that no checkpoint has seen."""
  kept.begin_metrics(0)
  _log(kept, 1, 4)
  file = path / "metrics.jsonl"
  file.write_bytes(file.read_bytes()[:-cut])
  with _open(path) as again:
    assert len(again.begin_metrics(3)) == 3
    _log(again, 4, 4)
  assert _steps(path) == [1, 2, 3, 4]


def test_fewer_lines_than_the_checkpoint_has_steps(kept, path):
  kept.begin_metrics(0)
  _log(kept, 1, 2)
  _assert_refused(
      lambda: kept.begin_metrics(3),
      r"metrics.jsonl has 2 steps, the checkpoint 3; name another --workdir",
  )
  (path / "metrics.jsonl").unlink()
  _assert_refused(lambda: kept.begin_metrics(3), "has 0 steps, the checkpoint")


def test_lines_of_two_trainings(kept, path):
  kept.begin_metrics(0)
  for step in (1, 1, 2, 2):
    _log(kept, step, step)
  _assert_refused(lambda: kept.begin_metrics(3), "line 2 is of another step")


def test_checkpoints_are_discarded_whole(kept, path):
  kept.save(1, _state(1))
  kept.finish()
  # What a kill in the middle of it left.
  (path / "discarded" / "0").mkdir(parents=True)
  workdir_lib.discard_checkpoints(path)
  workdir_lib.discard_checkpoints(path)
  assert not (path / "discarded").exists()
  assert not (path / "checkpoints").exists()


def test_a_damaged_line(kept, path):
  kept.begin_metrics(0)
  _log(kept, 1, 3)
  file = path / "metrics.jsonl"
  lines = file.read_text().splitlines(keepends=True)
  file.write_text(lines[0] + lines[1][:7] + "\n" + lines[2])
  _assert_refused(lambda: kept.begin_metrics(3), "metrics.jsonl")


def _events(path):
  """(step, {tag: value}) of TensorBoard's files, in the order written."""
  found = []
  for file in sorted((path / "tensorboard").iterdir()):
    data, at = file.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      event = event_pb2.Event()
      # The length has a checksum of four bytes, and so has the event.
      event.ParseFromString(data[at + 12 : at + 12 + length])
      at += 12 + length + 4
      values = {v.tag: v.simple_value for v in event.summary.value}
      restarts = (
          event.session_log.status == event_pb2.SessionLog.START
          if event.HasField("session_log")
          else False
      )
      if values or restarts:
        found.append((event.step, values))
  return found


def test_tensorboard_reads_it(path, kept):
  kept.begin_metrics(0)
  _log(kept, 1, 3)
  kept.__exit__()
  # Within a second the next file would have the same name.
  (first,) = (path / "tensorboard").iterdir()
  first.rename(first.with_name("events.out.tfevents.1.first"))
  with _open(path) as again:
    again.begin_metrics(2)
    _log(again, 3, 4)
  seen = {}
  for step, values in _events(path):
    if not values:  # What TensorBoard drops when a run restarts.
      seen = {k: v for k, v in seen.items() if k[0] < step}
    for tag, value in values.items():
      assert (step, tag) not in seen
      seen[step, tag] = value
  assert seen == {
      (step, tag): np.float32(value)
      for step in (1, 2, 3, 4)
      for tag, value in (
          ("train/loss", 0.5 / step),
          ("train/rewards/margins", step),
      )
  }


def test_tensorboard_has_what_a_killed_process_logged(path, kept):
  """Its last two minutes were in memory, and are not computed again."""
  kept.begin_metrics(0)
  _log(kept, 1, 3)
  for file in (path / "tensorboard").iterdir():
    file.unlink()
  with _open(path) as again:
    again.begin_metrics(3)
    _log(again, 4, 4)
  assert {step for step, values in _events(path) if values} == {1, 2, 3, 4}


def test_lines_of_a_step(kept, path):
  written = kept.write_lines("rows.jsonl", [{"a": 1}, {"b": [2]}])
  assert written == path / "rows.jsonl"
  assert written.read_text() == '{"a": 1}\n{"b": [2]}\n'
