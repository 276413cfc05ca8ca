"""What a worker's process does with what it is told."""

import functools
import pathlib
import shutil
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import records
from selfdev_jax.executors import remote
from selfdev_jax.executors import versions as versions_lib
from selfdev_jax.executors import work as work_lib
from selfdev_jax.executors import worker as worker_lib

_CONFIG = config_lib.Config(
    name="t",
    seed_model="seed",
    experts=("a",),
    evaluate=config_lib.Evaluate(dev_size=6, test_size=6),
)


def _setup(directory, **changes):
  about = {
      "config": _CONFIG,
      "models": {},
      "digests": {},
      "items": "",
      "kind": "jax",
      "longest": 16,
      "vllm_python": None,
      "allow_weak_sandbox": False,
      "workdir": str(directory),
      "decoder": None,
      "token": "t",
  }
  return work_lib.Setup(**{**about, **changes})


def test_responses_come_back_as_they_were():
  items = evaluation.load_items(_CONFIG.evaluate)[records.DEV]
  responses = tuple(
      records.Response(
          first, item.prompt, text, item.gold, extracted, correct, *rest
      )
      for first, item, (text, extracted, correct, *rest) in [
          (2, items[2], ("It is 4.", "4", False, True, "")),
          (3, items[3], ("", None, False, False, "timeout")),
          (4, items[4], ("five", items[4].gold, True, False, "")),
      ]
  )
  packed = remote.pack(responses)
  assert remote.unpack(packed, items[2:5], 2) == responses
  with pytest.raises(ValueError):
    remote.unpack(packed, items[2:4], 2)
  # The head has the questions.
  assert not any(items[2].prompt in str(value) for value in packed[0])


def test_versions_name_what_results_depend_on():
  found = versions_lib.here(None, "jax")
  assert {"python", "jax", "jaxlib", "selfdev-jax"} <= set(found)
  assert "vllm" not in found
  assert found == versions_lib.here(None, "jax")
  assert versions_lib.here(sys.executable, "vllm")["vllm"]


def test_versions_change_with_any_source_file(tmp_path, monkeypatch):
  package = pathlib.Path(versions_lib.__file__).parents[1]
  copy = tmp_path / "selfdev_jax"
  shutil.copytree(
      package, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so")
  )
  source = lambda: versions_lib.here(None, "jax")["selfdev-jax"]
  ours = source()
  monkeypatch.setattr(
      versions_lib, "__file__", str(copy / "executors" / "versions.py")
  )
  assert source() == ours  # Wherever it is installed.
  path = copy / "dpo" / "loss.py"
  path.write_text(path.read_text() + "\n")
  changed = source()
  assert changed != ours
  path.rename(path.with_name("renamed.py"))
  assert source() not in (ours, changed)


@remote._told
def _raising(error):
  raise error


def test_only_a_user_s_error_crosses_as_a_line():
  reply = _raising(errors.UserError("key 'x' is wrong"))
  assert reply == work_lib.Reply(error="key 'x' is wrong")
  assert _raising(worker_lib.StoppedError()) == work_lib.Reply(is_stopped=True)
  with pytest.raises(ZeroDivisionError):
    _raising(ZeroDivisionError())


def test_a_reply_says_how_long_it_took():
  @remote._told
  def slow():
    time.sleep(0.05)
    return work_lib.Reply("done")

  reply = slow()
  assert reply.value == "done" and 0.05 <= reply.seconds < 5.0


class _Box:
  """Verdicts, each after what is to happen meanwhile."""

  def __init__(self, meanwhile=lambda: None):
    self._meanwhile = meanwhile

  def admit_all(self, sources):
    for source in sources:
      self._meanwhile()
      yield f"verdict of {source}"


@pytest.fixture
def doer(tmp_path):
  made = remote.Doer(_setup(tmp_path))
  made._box = _Box()
  made._shown = time.monotonic()
  return made


_PIECE = work_lib.Piece("admit", 3, None, ["a", "b"])


def test_a_piece_is_done(doer):
  reply = doer.do(_PIECE)
  assert reply.value == ["verdict of a", "verdict of b"]
  assert reply.canary is None and not reply.is_stopped


def test_a_piece_that_is_stopped_before_is_not_begun(doer):
  begun = []
  doer._box = _Box(lambda: begun.append(1))
  doer.stop("admit", 3)
  assert doer.do(_PIECE) == work_lib.Reply(is_stopped=True)
  assert not begun
  # Asked again, it is done: it is wanted again.
  assert doer.do(_PIECE).value
  doer.stop("admit", 4)
  doer.stop("sample", 3)
  assert doer.do(_PIECE).value


def test_a_piece_is_left_between_two_of_its_parts(doer):
  begun = []

  def meanwhile():
    begun.append(1)
    doer.stop("admit", 3)

  doer._box = _Box(meanwhile)
  assert doer.do(_PIECE).is_stopped
  assert len(begun) == 1


def test_a_failed_piece_is_not_stopped_for_ever(doer):
  def meanwhile():
    doer.stop("admit", 3)
    raise errors.UserError("no space left")

  doer._box = _Box(meanwhile)
  assert doer.do(_PIECE).error == "no space left"
  doer._box = _Box()
  assert doer.do(_PIECE).value


def test_the_canary_is_shown_now_and_then(doer, monkeypatch):
  shown = np.array([-1.0, -2.0], np.float32)
  monkeypatch.setattr(doer, "show", lambda: shown)
  assert doer.do(_PIECE).canary is None
  doer._shown -= remote.CANARY_S
  assert doer.do(_PIECE).canary is shown
  assert doer.do(_PIECE).canary is None


def test_a_factory_s_weights_are_fetched_once(doer, monkeypatch):
  fetched, held = [], []

  class _Worker:
    engine = "e"

    def hold_factory(self, name, adapter):
      held.append((name, adapter))

    def sample(self, prompt, keys, config, **draw):
      yield []

    def answer(self, work, is_stopped):
      return work_lib.Answered((), "", "", 0.0, 0.0, "e")

  monkeypatch.setattr(
      remote.ray, "get", lambda ref: fetched.append(ref) or f"weights of {ref}"
  )
  doer._worker = _Worker()
  keys = np.zeros((2, 2), np.uint32)
  sample = functools.partial(work_lib.Sample, prompt="", keys=keys)
  piece = lambda factory, ref: work_lib.Piece(
      "sample", 0, factory, (sample(factory, temperature=1.0), ref)
  )
  for _ in range(3):
    doer.do(piece("f2", "ref"))
  doer.do(piece("f1", None))
  assert fetched == ["ref"]
  assert held == [("f2", "weights of ref"), ("f1", None)]
  # What answers is another model.
  doer.do(work_lib.Piece("answer", 0, "m", None))
  doer.do(piece("f1", None))
  assert held[2:] == [("f1", None)]


def test_a_host_that_does_not_see_the_workdir(tmp_path, monkeypatch):
  monkeypatch.setattr(remote, "_SEEN_S", 0.3)
  reply = remote.Doer(_setup(tmp_path)).open()
  assert "does not see the workdir" in reply.error
  assert str(tmp_path) in reply.error and "\n" not in reply.error


@pytest.fixture
def put(tmp_path, monkeypatch):
  """(a model's files in the object store, its digest, what was taken)."""
  store, taken = [], []

  def put(part):
    store.append(part)
    return len(store) - 1

  monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(remote, "_PART", 10)
  monkeypatch.setattr(remote.ray, "put", put)
  monkeypatch.setattr(
      remote.ray, "get", lambda ref: taken.append(ref) or store[ref]
  )
  model = tmp_path / "seed"
  model.mkdir()
  (model / "config.json").write_text("{}")
  (model / "chat_template.jinja").touch()
  (model / "notes.txt").write_text("not the model's")
  safetensors.numpy.save_file({"x": np.ones(2)}, model / "model.safetensors")
  return remote.put_files(model), convert.digest(model), taken


def test_a_model_is_copied_from_the_object_store(put, tmp_path):
  files, digest, taken = put
  partial = tmp_path / "cache" / "models" / f"{files.digest}.tmp"
  partial.mkdir(parents=True)
  (partial / "left.txt").touch()  # By one that was killed.
  copy = remote._fetch("seed", files)
  there = {path.name: path.read_bytes() for path in copy.iterdir()}
  names = {"config.json", "chat_template.jinja", "model.safetensors"}
  assert set(there) == names and not partial.exists()
  for name, content in there.items():
    assert content == (tmp_path / "seed" / name).read_bytes()
  assert len(taken) == len(set(taken)) > 3
  assert remote._fetch("seed", files) == copy
  assert len(taken) == len(set(taken))  # Nothing a second time.
  assert convert.digest(copy) == digest
  # What the digest of a model does not cover is its own copy's all the same.
  (tmp_path / "seed" / "chat_template.jinja").write_text("x")
  assert convert.digest(tmp_path / "seed") == digest
  other = remote._fetch("seed", remote.put_files(tmp_path / "seed"))
  assert (other / "chat_template.jinja").read_text() == "x"
  assert not (copy / "chat_template.jinja").read_text()


def test_a_copy_that_is_not_the_head_s(put, tmp_path):
  files, digest, _ = put
  copy = remote._fetch("seed", files)
  (copy / "config.json").write_text("[]")
  setup = _setup(
      tmp_path,
      models={"seed": "elsewhere"},
      digests={"seed": digest},
      files={"seed": files},
  )
  setup.seen.touch()
  reply = remote.Doer(setup).open()
  assert str(copy) in reply.error and "delete it" in reply.error
  (copy / "model.safetensors").unlink()
  reply = remote.Doer(setup).open()
  assert str(copy) in reply.error and "delete it" in reply.error
  shutil.rmtree(copy)
  assert "does not see" not in remote.Doer(setup).open().error


def test_a_copy_that_ray_does_not_give(put, monkeypatch):
  def get(ref):
    raise remote.ray.exceptions.OutOfDiskError("no\nspace")

  monkeypatch.setattr(remote.ray, "get", get)
  with pytest.raises(errors.UserError, match="no space") as error:
    remote._fetch("seed", put[0])
  assert "\n" not in str(error.value)


def test_a_host_without_room_for_a_copy(put, tmp_path):
  files, _, _ = put
  (tmp_path / "cache").write_text("a file, and no directory")
  with pytest.raises(errors.UserError, match="cannot keep model seed") as error:
    remote._fetch("seed", files)
  assert "SELFDEV_CACHE" in str(error.value) and "\n" not in str(error.value)


def test_a_host_that_has_another_model(tmp_path):
  setup = _setup(tmp_path)
  setup.seen.touch()
  (tmp_path / "seed").mkdir()
  (tmp_path / "seed" / "config.json").write_text("{}")
  safetensors.numpy.save_file(
      {"x": np.ones(2)}, tmp_path / "seed" / "model.safetensors"
  )
  models = {"seed": str(tmp_path / "seed")}
  absent = {"seed": str(tmp_path / "absent")}
  reply = remote.Doer(
      _setup(tmp_path, models=absent, digests={"seed": "0" * 64})
  ).open()
  assert "does not see model seed at" in reply.error
  assert "absent" in reply.error and "\n" not in reply.error
  reply = remote.Doer(
      _setup(tmp_path, models=models, digests={"seed": "0" * 64})
  ).open()
  assert "is another than the head's" in reply.error
  ours = convert.digest(tmp_path / "seed")[:12]
  assert ours in reply.error and "\n" not in reply.error
