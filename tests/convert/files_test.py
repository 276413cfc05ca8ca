"""Safetensors files: bit by bit, and without a copy where they are aligned."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from selfdev_jax import convert
from selfdev_jax import models
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
# No leaf is a multiple of 64 bytes, nor any tensor one of four in 16 bits.
_ODD = models.DecoderConfig(
    vocab_size=7,
    embed=5,
    layers=3,
    heads=3,
    kv_heads=1,
    head_dim=2,
    mlp=7,
    max_positions=128,
)
_DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def _cast(params, dtype):
  return jax.tree.map(lambda x: np.asarray(x, dtype), params)


def _shift(directory: pathlib.Path, by: int):
  """Moves the tensors of a model by so many bytes; as valid a file."""
  path = directory / "model.safetensors"
  data = path.read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = data[8 : 8 + size] + b" " * by
  new = directory / "new"
  new.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
  new.rename(path)


def _is_in_file(array: jax.Array, path: pathlib.Path) -> bool:
  """Whether an array on one device lies in a mapping of the file."""
  (shard,) = array.addressable_shards
  pointer = shard.data.unsafe_buffer_pointer()
  for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
    extent, *_, name = line.split()
    start, end = (int(x, 16) for x in extent.split("-"))
    if name == str(path) and start <= pointer < end:
      return True
  return False


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture
def directory(tmp_path, params) -> pathlib.Path:
  convert.save(tmp_path / "model", _DECODER, params)
  return tmp_path / "model"


def _leaves():
  """One that puts those behind it out of line, and an unstacked scalar row."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return [
      (["odd"], draw(3), False),
      (["one", "two"], draw(2, 4, 8), True),
      (["bf16"], draw(4, 8).astype(jnp.bfloat16), False),
      (["f16"], draw(5, 1).astype(np.float16), False),
  ]


def test_the_library_reads_what_is_written(tmp_path, assert_same_bits):
  path = tmp_path / "x.safetensors"
  files.write(path, _leaves())
  (_, odd, _), (_, pair, _), (_, bf16, _), (_, f16, _) = _leaves()
  expected = {"odd": odd, "one": pair[0], "two": pair[1]}
  expected |= {"bf16": bf16, "f16": f16}
  assert_same_bits(safetensors.numpy.load_file(path), expected)
  with safetensors.safe_open(path, framework="numpy") as file:
    assert file.metadata() == {"format": "pt"}  # transformers asks for it.


def test_leaves_are_aligned_where_they_can_be(tmp_path):
  path = tmp_path / "x.safetensors"
  files.write(path, _leaves())
  tensors = files.read(path)
  size = int.from_bytes(path.read_bytes()[:8], "little")
  assert (8 + size) % files.ALIGNMENT == 0
  assert path.stat().st_size == 8 + size + 4 * (3 + 64) + 2 * (32 + 5)
  assert all(tensors[name].begin % 64 == 0 for name in ("one", "bf16"))
  assert tensors["two"].begin == tensors["one"].end


@pytest.mark.parametrize("dtype", _DTYPES)
def test_reads_what_the_library_writes(
    tmp_path, params, dtype, assert_same_bits
):
  narrow = _cast(params, dtype)
  convert.save(tmp_path / "model", _DECODER, narrow)
  path = tmp_path / "model" / "model.safetensors"
  # In the library's order, layers apart, on its 8 bytes.
  tensors = safetensors.numpy.load_file(path)
  path.unlink()
  safetensors.numpy.save_file(tensors, path)
  assert_same_bits(convert.load(tmp_path / "model")[1], narrow)
  _, leaves = convert.open_leaves(tmp_path / "model")
  assert np.asarray(leaves["layers"]["attention"]["q"]).flags.writeable


@pytest.mark.parametrize("by", [1, 8])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_reads_what_is_out_of_line(
    tmp_path, params, dtype, by, assert_same_bits
):
  narrow = _cast(params, dtype)
  convert.save(tmp_path / "model", _DECODER, narrow)
  _shift(tmp_path / "model", by)
  assert_same_bits(convert.load(tmp_path / "model")[1], narrow)


@pytest.mark.parametrize("dtype", _DTYPES)
def test_reads_odd_sizes(tmp_path, random_params, dtype, assert_same_bits):
  params = _cast(random_params(_ODD), dtype)
  convert.save(tmp_path / "model", _ODD, params)
  assert_same_bits(convert.load(tmp_path / "model")[1], params)
  _, leaves = convert.open_leaves(tmp_path / "model")
  assert_same_bits(jax.tree.map(np.asarray, leaves), params)


def test_aligned_leaves_are_not_copied(directory):
  path = directory / "model.safetensors"
  _, params = convert.load(directory)
  for leaf in jax.tree.leaves(params):
    assert _is_in_file(leaf, path)
  _shift(directory, 8)
  _, moved = convert.load(directory)
  for leaf in jax.tree.leaves(moved):
    assert not _is_in_file(leaf, path)


def test_a_file_replaced_before_it_is_read_is_told(directory, params):
  _shift(directory, 8)  # What is not aligned is read, not mapped.
  _, leaves = convert.open_leaves(directory)
  convert.save(directory, _DECODER, jax.tree.map(np.zeros_like, params))
  with pytest.raises(convert.ConvertError, match="was replaced while"):
    np.asarray(leaves["embed"])


@pytest.mark.parametrize("how", ["replaced", "deleted", "saved again"])
def test_arrays_outlive_their_file(directory, params, how, assert_same_bits):
  _, loaded = convert.load(directory)
  other = jax.tree.map(np.zeros_like, params)
  if how == "replaced":
    convert.save(directory, _DECODER, other)
  elif how == "deleted":
    shutil.rmtree(directory)
  else:  # Its own leaves are its source.
    convert.save(directory, _DECODER, loaded)
    assert_same_bits(convert.load(directory)[1], params)
  assert_same_bits(loaded, params)


@pytest.mark.parametrize("by", [0, 1])
def test_each_device_reads_its_shard(directory, params, by, assert_same_bits):
  _shift(directory, by)
  mesh = jax.sharding.Mesh(
      np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor")
  )
  shardings = models.shardings(_DECODER, mesh)
  _, loaded = convert.load(directory, shardings)
  assert_same_bits(loaded, params)
  shapes = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, loaded)
  layers = shapes["layers"]
  assert layers["attention"]["q"] == (2, 8, 4)
  assert layers["attention"]["o"] == (2, 4, 8)
  assert layers["mlp"]["down"] == (2, 4, 12)
  assert layers["mlp_norm"] == (2, 16)
  assert shapes["head"] == (37, 4)  # 37 rows are not cut in two.
  for leaf, sharding in zip(
      jax.tree.leaves(loaded), jax.tree.leaves(shardings), strict=True
  ):
    assert leaf.sharding == sharding
    whole = np.asarray(leaf)
    for shard in leaf.addressable_shards:
      np.testing.assert_array_equal(shard.data, whole[shard.index])


def test_shards_read_no_more_than_their_layers(directory, params):
  """A leaf indexed by layers, rows and columns at once, gathered or not."""
  path = ("layers", "mlp", "down")
  index = (slice(1, 2), slice(4, 12), slice(3, 24))
  for by in (0, 8):
    _shift(directory, by)
    leaf = convert.open_leaves(directory)[1]
    expected = params
    for key in path:
      leaf, expected = leaf[key], expected[key]
    assert np.asarray(leaf).flags.writeable == (by != 0)
    np.testing.assert_array_equal(leaf[index], expected[index])


_TENSOR = np.arange(6, dtype=np.float32)


def _cut(path):
  path.write_bytes(path.read_bytes()[:-1])


def _gap(path):
  data = path.read_bytes()
  header = json.dumps(
      {"x": {"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}}
  ).encode()
  path.write_bytes(
      len(header).to_bytes(8, "little") + header + data[-_TENSOR.nbytes :]
  )


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _gap,
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"123"),
        lambda path: path.write_bytes(b"\xff" * 64),
        lambda path: path.write_bytes(path.read_bytes() + b"0"),
        lambda path: path.write_text("version https://git-lfs.github.com/"),
    ],
    ids=["cut", "gap", "gone", "empty", "3 bytes", "noise", "more", "lfs"],
)
def test_damage_is_named_in_one_line(tmp_path, damage):
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file({"x": _TENSOR}, path)
  damage(path)
  with pytest.raises(convert.ConvertError) as caught:
    files.read(path)
  text = str(caught.value)
  assert text.startswith(f"{path} cannot be read: ") and "\n" not in text
