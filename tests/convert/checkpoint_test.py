"""Orbax checkpoints: bit by bit, onto any mesh, whole or not at all."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax.convert import checkpoint as checkpoint_lib
from selfdev_jax.convert import files

_DECODER = models.DecoderConfig(
    vocab_size=37,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    max_positions=128,
)


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture(scope="module")
def _saved(tmp_path_factory, params) -> pathlib.Path:
  path = tmp_path_factory.mktemp("saved") / "checkpoint"
  convert.save_checkpoint(path, _DECODER, params)
  return path


@pytest.fixture
def checkpoint(_saved, tmp_path) -> pathlib.Path:
  """One to break; writing each anew would take a second."""
  shutil.copytree(_saved, tmp_path / "checkpoint")
  return tmp_path / "checkpoint"


def _mesh(rows, columns):
  devices = np.array(jax.devices()).reshape(rows, columns)
  return models.shardings(
      _DECODER, jax.sharding.Mesh(devices, ("fsdp", "tensor"))
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_is_bitwise(tmp_path, params, dtype, assert_same_bits):
  narrow = jax.tree.map(lambda x: np.asarray(x, dtype), params)
  path = tmp_path / "checkpoint"
  convert.save_checkpoint(path, _DECODER, narrow)
  config, restored = convert.restore(path)
  assert config == _DECODER
  assert_same_bits(restored, narrow)
  config, leaves, _ = convert.open_checkpoint(path)
  assert config == _DECODER
  assert all(isinstance(x, files.Lazy) for x in jax.tree.leaves(leaves))
  assert_same_bits(jax.tree.map(np.asarray, leaves), narrow)
  assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.slow
def test_another_mesh(tmp_path, params, assert_same_bits):
  placed = jax.tree.map(jax.device_put, params, _mesh(4, 2))
  path = tmp_path / "checkpoint"
  convert.save_checkpoint(path, _DECODER, placed)
  shardings = _mesh(2, 4)
  _, restored = convert.restore(path, shardings)
  assert_same_bits(restored, params)
  jax.tree.map(lambda x, s: _assert_equal(x.sharding, s), restored, shardings)
  q = restored["layers"]["attention"]["q"]
  assert q.addressable_shards[0].data.shape == (2, 4, 8)


def _assert_equal(x, y):
  assert x == y


def test_what_orbax_cannot_write_is_one_line(tmp_path, params, monkeypatch):
  def fail(*args):
    raise ValueError("No space left\non device [tensorstore_spec='{...}']")

  monkeypatch.setattr(checkpoint_lib.ocp.partial, "save", fail)
  with pytest.raises(convert.ConvertError) as caught:
    convert.save_checkpoint(tmp_path / "new", _DECODER, params)
  assert str(caught.value).endswith(
      "new cannot be written: No space left on device"
  )
  assert not list(tmp_path.iterdir())


def test_one_that_is_not_in_files_yet(
    tmp_path, params, checkpoint, assert_same_bits
):
  """Leaves of a directory whose layers lie apart; an adapter is such, too."""
  model = tmp_path / "model"
  convert.save(model, _DECODER, params)
  path = model / "model.safetensors"
  tensors = list(files.read(path).values())
  apart = [([t.name], files.Leaf([t], stacked=False), False) for t in tensors]
  apart.sort(key=lambda leaf: leaf[0], reverse=True)
  files.write(model / "new", apart)
  (model / "new").rename(path)
  config, leaves = convert.open_leaves(model)
  assert np.asarray(leaves["layers"]["mlp"]["up"]).flags.writeable
  convert.save_checkpoint(tmp_path / "again", config, leaves, like=model)
  assert_same_bits(convert.restore(tmp_path / "again")[1], params)
  names = [p.name for p in (tmp_path / "again").iterdir()]
  assert sorted(names) == ["hf", "params"]


@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_read_one_by_one(tmp_path, params, checkpoint, tied):
  if tied:
    config = dataclasses.replace(_DECODER, tied_head=True)
    params = {k: v for k, v in params.items() if k != "head"}
    checkpoint = tmp_path / "tied"
    convert.save_checkpoint(checkpoint, config, params)
  _, leaves, _ = convert.open_checkpoint(checkpoint)

  def check(leaf, expected):
    parts = list(leaf.tensors())
    assert len(parts) == (1 if leaf.shape == parts[0].shape else 2)
    np.testing.assert_array_equal(np.stack(parts).reshape(leaf.shape), expected)

  jax.tree.map(check, leaves, params)


def test_what_is_no_weights_is_kept_beside(tmp_path, params):
  like = tmp_path / "like"
  convert.save(like, _DECODER, params)
  settings = json.loads((like / "config.json").read_text()) | {"own": 1}
  (like / "config.json").write_text(json.dumps(settings))
  (like / "tokenizer.json").write_text("{ }")
  convert.save_checkpoint(tmp_path / "out", _DECODER, params, like)
  _, _, kept = convert.open_checkpoint(tmp_path / "out")
  for name in ("config.json", "tokenizer.json"):
    assert (kept / name).read_bytes() == (like / name).read_bytes()


def _smaller(path):
  config = path / "hf" / "config.json"
  settings = json.loads(config.read_text()) | {"intermediate_size": 23}
  config.write_text(json.dumps(settings))


def _untied(path):
  """A config.json that asks for more than was saved."""
  config = path / "hf" / "config.json"
  settings = json.loads(config.read_text()) | {"tie_word_embeddings": False}
  config.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (shutil.rmtree, "is no checkpoint of launch.convert"),
        (lambda p: shutil.rmtree(p / "params"), "it has no params/ or hf/"),
        (lambda p: shutil.rmtree(p / "hf"), "it has no params/ or hf/"),
        (
            lambda p: (p / "hf" / "config.json").unlink(),
            "config.json is missing",
        ),
        (_smaller, r"layers/mlp/gate has shape \(2, 24, 16\), but"),
        (
            lambda p: [shutil.rmtree(p / "params"), (p / "params").mkdir()],
            "cannot be read",
        ),
    ],
    ids=["gone", "params", "hf", "config", "shape", "empty"],
)
def test_what_is_no_checkpoint(checkpoint, damage, pattern):
  damage(checkpoint)
  with pytest.raises(convert.ConvertError, match=pattern) as caught:
    convert.open_checkpoint(checkpoint)
  assert "\n" not in str(caught.value) and str(checkpoint) in str(caught.value)


def test_a_directory_of_hugging_face_is_no_checkpoint(tmp_path, params):
  convert.save(tmp_path / "model", _DECODER, params)
  with pytest.raises(convert.ConvertError, match="is no checkpoint"):
    convert.restore(tmp_path / "model")


def test_a_leaf_is_lacking(tmp_path, params):
  tied = {k: v for k, v in params.items() if k != "head"}
  config = dataclasses.replace(_DECODER, tied_head=True)
  convert.save_checkpoint(tmp_path / "checkpoint", config, tied)
  _untied(tmp_path / "checkpoint")
  with pytest.raises(convert.ConvertError, match="lacks the leaf head"):
    convert.restore(tmp_path / "checkpoint")


@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize("how", ["restored", "layer by layer"])
def test_a_file_is_damaged(checkpoint, how, damage):
  """Named in one line, and never read as something else."""
  numbers = [p for p in checkpoint.rglob("ocdbt.process_*/d/*") if p.is_file()]
  assert numbers
  for path in numbers:
    if damage == "gone":
      path.unlink()
    else:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  _, leaves, _ = convert.open_checkpoint(checkpoint)
  with pytest.raises(convert.ConvertError, match="cannot be read") as caught:
    if how == "restored":
      convert.restore(checkpoint)
    else:
      np.asarray(leaves["layers"]["mlp"]["down"])
  text = str(caught.value)
  assert "\n" not in text and text.startswith(str(checkpoint))
  assert len(text) < 1000


@pytest.mark.parametrize("how", ["restored", "layer by layer"])
def test_missing_numbers_are_not_taken_for_zeros(checkpoint, how):
  store = tensorstore.KvStore.open(
      {"driver": "ocdbt", "base": f"file://{checkpoint}/params/state/"}
  ).result()
  chunks = [
      key
      for key in store.list().result()
      if key.startswith(b"layers.mlp.down/") and not key.endswith(b".json")
  ]
  assert chunks
  for key in chunks:
    store.write(key, None).result()
  _, leaves, _ = convert.open_checkpoint(checkpoint)
  with pytest.raises(convert.ConvertError, match="cannot be read"):
    if how == "restored":
      convert.restore(checkpoint)
    else:
      np.asarray(leaves["layers"]["mlp"]["down"])


def test_the_metadata_is_cut(checkpoint, monkeypatch):
  # Orbax then logs the reason and returns this. A file that is really cut
  # leaves callbacks behind, which warn in whatever test runs next.
  monkeypatch.setattr(
      checkpoint_lib.ocp,
      "metadata",
      lambda _: types.SimpleNamespace(metadata=None),
  )
  with pytest.raises(convert.ConvertError, match="metadata is damaged"):
    convert.open_checkpoint(checkpoint)


def test_zeros_are_kept(tmp_path, params, assert_same_bits):
  """A store may leave them out and then take them for missing."""
  zeros = jax.tree.map(np.zeros_like, params)
  convert.save_checkpoint(tmp_path / "checkpoint", _DECODER, zeros)
  _, leaves, _ = convert.open_checkpoint(tmp_path / "checkpoint")
  assert_same_bits(jax.tree.map(np.asarray, leaves), zeros)


class _Stops(files.Lazy):
  """A leaf whose reading fails; then the process may be killed as well."""

  shape, dtype = (2, 16, 24), np.dtype(np.float32)

  def tensors(self):
    yield np.zeros((16, 24), np.float32)
    raise KeyboardInterrupt


def test_stopped_half_way_there_is_no_such_directory(
    tmp_path, params, checkpoint, assert_same_bits
):
  layers = params["layers"]
  broken = params | {
      "layers": layers | {"mlp": layers["mlp"] | {"down": _Stops()}}
  }
  for path, save in (
      (tmp_path / "new", convert.save_checkpoint),
      (tmp_path / "model", convert.save),
      (checkpoint, convert.save_checkpoint),
  ):
    with pytest.raises(KeyboardInterrupt):
      save(path, _DECODER, broken)
  assert not (tmp_path / "new").exists() and not (tmp_path / "model").exists()
  # What was there before is there still.
  assert_same_bits(convert.restore(checkpoint)[1], params)
  # And what was left lying about is in nobody's way.
  convert.save_checkpoint(tmp_path / "new", _DECODER, params)
  assert_same_bits(convert.restore(tmp_path / "new")[1], params)
