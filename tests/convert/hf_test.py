"""Model directories: bitwise round trips, and one line for what is wrong."""

import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.tiny import corpus

_DECODER = models.DecoderConfig(
    vocab_size=37,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    rope=models.Rope(5e5),
    norm_eps=1e-6,
    max_positions=128,
)
_UP = "model.layers.1.mlp.up_proj.weight"
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture
def directory(tmp_path, params) -> pathlib.Path:
  convert.save(tmp_path / "model", _DECODER, params)
  return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path, params) -> pathlib.Path:
  """Three files and their index."""
  path = tmp_path / "sharded"
  convert.save(path, _DECODER, params, max_shard_bytes=10000)
  return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> pathlib.Path:
  """A directory with all that a chat model has beside its weights."""
  path = tmp_path_factory.mktemp("tokenizer")
  corpus.save_tokenizer(
      corpus.train_tokenizer([corpus.Document("a b", "c")], 300), path
  )
  (path / "chat_template.jinja").write_text("{{ messages }}\n")
  (path / "special_tokens_map.json").write_text('{"eos_token":   "</s>"}')
  (path / "generation_config.json").write_text('{"eos_token_id": [5, 1, 7]}')
  (path / "other.bin").write_text("not carried")
  return path


def _cast(params, dtype):
  return jax.tree.map(lambda x: np.asarray(x, dtype), params)


def _transformers(directory):
  """(the model in its files' dtype, its tensors by name)."""
  hf = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype="auto"
  )
  return hf, {name: x.numpy() for name, x in hf.state_dict().items()}


def _edit_json(path, **changes):
  value = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def _edit_tensors(directory, edit):
  path = directory / _ONE_FILE
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


# Round trips.


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bitwise(tmp_path, params, dtype, tied, assert_same_bits):
  config = dataclasses.replace(_DECODER, tied_head=tied)
  narrow = _cast(params, dtype)
  if tied:
    del narrow["head"]
  one, two = tmp_path / "one", tmp_path / "two"
  convert.save(one, config, narrow)
  loaded_config, loaded = convert.load(one)
  assert loaded_config == config == convert.read_config(one)
  assert_same_bits(loaded, narrow)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))
  convert.save(two, config, loaded)
  assert (one / _ONE_FILE).read_bytes() == (two / _ONE_FILE).read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_from_transformers(tmp_path, tied, assert_same_bits):
  """What transformers wrote, in several files, is what it reads again."""
  config = transformers.MistralConfig(
      vocab_size=37,
      hidden_size=16,
      intermediate_size=24,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      max_position_embeddings=128,
      rms_norm_eps=1e-6,
      rope_parameters={"rope_type": "default", "rope_theta": 5e5},
      sliding_window=None,
      tie_word_embeddings=tied,
  )
  hf = transformers.MistralForCausalLM(config).to(torch.float16)
  hf.save_pretrained(tmp_path / "theirs", max_shard_size=3000)
  assert (tmp_path / "theirs" / _INDEX).is_file()
  read, leaves = convert.open_leaves(tmp_path / "theirs")
  assert read == dataclasses.replace(_DECODER, tied_head=tied)
  convert.save(tmp_path / "ours", read, leaves, like=tmp_path / "theirs")
  back, tensors = _transformers(tmp_path / "ours")
  assert back.dtype == torch.float16
  expected = {name: x.numpy() for name, x in hf.state_dict().items()}
  assert_same_bits(tensors, expected)
  for name in ("config.json", "generation_config.json"):
    assert (tmp_path / "ours" / name).read_bytes() == (
        tmp_path / "theirs" / name
    ).read_bytes()


def test_several_files_and_their_index(sharded, params, assert_same_bits):
  shards = sorted(p.name for p in sharded.glob("*.safetensors"))
  assert len(shards) == 3 and shards[0] == "model-00001-of-00003.safetensors"
  assert not (sharded / _ONE_FILE).exists()
  index = json.loads((sharded / _INDEX).read_text())
  sizes = sum(x.nbytes for x in jax.tree.leaves(params))
  assert index["metadata"]["total_size"] == sizes
  assert set(index["weight_map"].values()) == set(shards)
  assert_same_bits(convert.load(sharded)[1], params)
  _, tensors = _transformers(sharded)
  np.testing.assert_array_equal(tensors[_UP], params["layers"]["mlp"]["up"][1])
  np.testing.assert_array_equal(tensors[_HEAD], params["head"])


def test_what_fails_leaves_the_old_and_nothing_else(directory, params):
  class Full:
    shape, dtype = params["embed"].shape, params["embed"].dtype

    def __array__(self, dtype=None, copy=None):
      raise OSError(28, "No space left on device")

  before = (directory / _ONE_FILE).read_bytes()
  with pytest.raises(convert.ConvertError, match=r"No space left.* make room"):
    convert.save(directory, _DECODER, params | {"embed": Full()})
  assert (directory / _ONE_FILE).read_bytes() == before
  assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_disk_without_room_is_told_before_it_is_full(
    directory, params, monkeypatch, assert_same_bits
):
  usage = shutil.disk_usage(directory)._replace(free=5_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(convert.ConvertError, match="its disk has 0 MB left"):
    convert.save(directory, _DECODER, params)
  assert [path.name for path in directory.parent.iterdir()] == [directory.name]
  assert_same_bits(convert.load(directory)[1], params)


def test_a_place_that_is_no_directory(directory, params):
  with pytest.raises(convert.ConvertError, match="cannot be written"):
    convert.save(directory / _ONE_FILE / "model", _DECODER, params)


def test_save_replaces_the_whole_directory(directory, params):
  (directory / "stale").write_text("x")
  convert.save(directory, _DECODER, params)
  assert sorted(p.name for p in directory.iterdir()) == [
      "config.json",
      _ONE_FILE,
  ]


def test_what_is_no_weights_is_carried_byte_for_byte(
    directory, params, tokenizer, tmp_path
):
  shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
  # A setting that this package does not know, and a layout that it has not.
  _edit_json(directory / "config.json", their_own=[1])
  convert.save(tmp_path / "out", _DECODER, params, like=directory)
  carried = [
      "chat_template.jinja",
      "config.json",
      "generation_config.json",
      "special_tokens_map.json",
      "tokenizer.json",
      "tokenizer_config.json",
  ]
  names = sorted(p.name for p in (tmp_path / "out").iterdir())
  assert names == sorted([*carried, _ONE_FILE])
  for name in carried:
    ours, theirs = tmp_path / "out" / name, directory / name
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_dtype_is_written_down(directory, params, tmp_path, key):
  _edit_json(directory / "config.json", dtype=..., their_own=[1])
  _edit_json(directory / "config.json", **{key: "float32"})
  narrow = _cast(params, jnp.bfloat16)
  convert.save(tmp_path / "out", _DECODER, narrow, like=directory)
  settings = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (settings["dtype"], settings["their_own"]) == ("bfloat16", [1])
  assert "torch_dtype" not in settings
  assert _transformers_dtype(tmp_path / "out") == torch.bfloat16


def _transformers_dtype(directory):
  return transformers.AutoConfig.from_pretrained(directory).dtype


@pytest.mark.parametrize("has_generation_config", [False, True])
def test_of_another_shape_only_the_special_tokens_are_kept(
    directory, random_params, tmp_path, has_generation_config
):
  """Else transformers would not stop where the tokenizer ends a text."""
  _edit_json(
      directory / "config.json", bos_token_id=7, eos_token_id=9, their_own=[1]
  )
  if has_generation_config:  # It decides over config.json.
    (directory / "generation_config.json").write_text('{"eos_token_id": 5}')
  config = dataclasses.replace(_DECODER, layers=1)
  convert.save(tmp_path / "out", config, random_params(config), like=directory)
  assert convert.load(tmp_path / "out")[0] == config
  assert "their_own" not in (tmp_path / "out" / "config.json").read_text()
  loaded, _ = _transformers(tmp_path / "out")
  eos = 5 if has_generation_config else 9
  assert loaded.config.bos_token_id == 7
  assert loaded.generation_config.eos_token_id == eos


def test_digest(directory, params, sharded, tokenizer, tmp_path):
  seen = {convert.digest(directory)}
  convert.save(tmp_path / "same", _DECODER, params)
  assert convert.digest(tmp_path / "same") in seen

  def is_new(path):
    digest = convert.digest(path)
    known = digest in seen
    seen.add(digest)
    return not known and re.fullmatch("[0-9a-f]{64}", digest) is not None

  shutil.copy(tokenizer / "tokenizer.json", directory)
  assert is_new(directory)
  _edit_json(directory / "config.json", their_own=1)
  assert is_new(directory)
  _edit_tensors(directory, lambda x: x[_UP].__setitem__((0, 0), 7.0))
  assert is_new(directory)
  assert is_new(sharded)
  for shard in sharded.glob("*.safetensors"):
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert is_new(sharded)


def test_what_a_model_needs(directory, sharded, tokenizer, tmp_path):
  shutil.copy(tokenizer / "tokenizer.json", directory)
  (directory / "pytorch_model.bin").touch()
  for path in (directory, sharded):
    copy = tmp_path / f"copy of {path.name}"
    copy.mkdir()
    for name in convert.file_names(path):
      shutil.copy(path / name, copy)
    assert convert.digest(copy) == convert.digest(path)
    assert convert.load(copy)[0] == _DECODER
    assert not (copy / "pytorch_model.bin").exists()


# What is wrong with real directories.


def _assert_refused(directory, pattern):
  with pytest.raises(convert.ConvertError, match=pattern) as caught:
    convert.open_leaves(directory)
  text = str(caught.value)
  assert "\n" not in text and str(directory) in text
  assert isinstance(caught.value, errors.UserError)


def _replace(name, value):
  return lambda directory: _edit_tensors(
      directory, lambda tensors: tensors.update({name: value})
  )


def _float8(directory):
  path = directory / _ONE_FILE
  tensors = safetensors.torch.load_file(path)
  tensors[_UP] = tensors[_UP].to(torch.float8_e4m3fn)
  safetensors.torch.save_file(tensors, path)


def _cut(directory):
  path = directory / _ONE_FILE
  path.write_bytes(path.read_bytes()[:-100])


_DAMAGE = {
    "missing tensor": (
        lambda d: _edit_tensors(d, lambda tensors: tensors.pop(_UP)),
        f"lacks tensor {_UP}",
    ),
    "unknown tensor": (
        _replace("model.extra.weight", np.zeros(3, np.float32)),
        "unknown tensor model.extra.weight",
    ),
    "a layer too many": (
        _replace(_UP.replace("1", "2"), np.zeros((24, 16), np.float32)),
        "unknown tensor model.layers.2.mlp.up_proj.weight",
    ),
    "other shape": (
        _replace(_UP, np.zeros((24, 17), np.float32)),
        rf"{_UP} has shape \(24, 17\), but .* asks for \(24, 16\)",
    ),
    "transposed": (
        _replace(_UP, np.zeros((16, 24), np.float32)),
        rf"{_UP} has shape \(16, 24\), but .* asks for \(24, 16\)",
    ),
    "other number of dimensions": (
        _replace(_UP, np.zeros(24, np.float32)),
        f"{_UP} has shape",
    ),
    "a layer of another dtype": (
        _replace(_UP, np.zeros((24, 16), np.float16)),
        f"{_UP} has dtype F16, but model.layers.0.mlp.up_proj.weight has F32",
    ),
    "integers": (
        _replace(_UP, np.zeros((24, 16), np.int32)),
        f"{_UP} has dtype I32; supported: F32, BF16, F16",
    ),
    "float64": (
        _replace(_UP, np.zeros((24, 16), np.float64)),
        f"{_UP} has dtype F64; supported",
    ),
    "float8": (_float8, f"{_UP} has dtype F8_E4M3; supported"),
    "no weights": (
        lambda d: (d / _ONE_FILE).unlink(),
        f"lacks {_ONE_FILE} or {_INDEX}",
    ),
    "cut weights": (_cut, "model.safetensors cannot be read: .*cut short"),
    "no config": (
        lambda d: (d / "config.json").unlink(),
        "is no Hugging Face model directory: config.json is missing",
    ),
    "config is no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        "config.json cannot be read",
    ),
    "config is no text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe"),
        "config.json cannot be read",
    ),
    "config is no object": (
        lambda d: (d / "config.json").write_text("[]"),
        "config.json cannot be read: it holds no JSON object",
    ),
}


@pytest.mark.parametrize("name", _DAMAGE)
def test_damage_is_named_in_one_line(name, directory):
  damage, pattern = _DAMAGE[name]
  damage(directory)
  _assert_refused(directory, pattern)


def test_a_shard_is_missing(sharded):
  name = "model-00002-of-00003.safetensors"
  (sharded / name).unlink()
  _assert_refused(sharded, f"lacks {name}, which its index names")


def test_a_shard_is_cut(sharded):
  path = sharded / "model-00002-of-00003.safetensors"
  path.write_bytes(path.read_bytes()[:-1])
  _assert_refused(sharded, f"{path} cannot be read")


def _edit_map(sharded, **changes):
  path = sharded / _INDEX
  weight_map = json.loads(path.read_text())["weight_map"]
  _edit_json(path, weight_map=weight_map | changes)


def test_a_shard_holds_what_the_index_does_not_name(sharded):
  path = sharded / "model-00001-of-00003.safetensors"
  tensors = safetensors.numpy.load_file(path)
  tensors["model.stranger.weight"] = np.zeros(3, np.float32)
  safetensors.numpy.save_file(tensors, path)
  _assert_refused(sharded, "unknown tensor model.stranger.weight")


def test_the_index_is_wrong_about_a_shard(sharded):
  last = "model-00003-of-00003.safetensors"
  _edit_map(sharded, **{_EMBED: last})
  _assert_refused(sharded, f"{last} lacks tensor {_EMBED}, which the index")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b"])
def test_the_index_leaves_the_directory(sharded, directory, name):
  assert (sharded.parent / "model" / _ONE_FILE).is_file()
  _edit_map(sharded, **{_UP: name})
  _assert_refused(sharded, f"names a file outside: {name}")


@pytest.mark.parametrize("weight_map", [..., [], {_UP: 3}, {_UP: ".."}])
def test_the_index_is_malformed(sharded, weight_map):
  _edit_json(sharded / _INDEX, weight_map=weight_map)
  _assert_refused(sharded, "weight_map|outside|lacks")


def test_old_buffers_are_ignored(directory, params, assert_same_bits):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  _replace(name, np.zeros(2, np.int32))(directory)
  assert_same_bits(convert.load(directory)[1], params)


def test_a_tied_head_may_be_in_the_file(tmp_path, params, assert_same_bits):
  config = dataclasses.replace(_DECODER, tied_head=True)
  tied = {k: v for k, v in params.items() if k != "head"}
  convert.save(tmp_path / "model", config, tied)
  _replace(_HEAD, params["embed"])(tmp_path / "model")
  loaded_config, loaded = convert.load(tmp_path / "model")
  assert loaded_config == config
  assert_same_bits(loaded, tied)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tied_head_that_differs_is_refused(tmp_path, params, dtype):
  config = dataclasses.replace(_DECODER, tied_head=True)
  tied = {k: v for k, v in params.items() if k != "head"}
  convert.save(tmp_path / "model", config, tied)
  head = params["embed"].astype(dtype)
  if dtype == np.float32:
    head[-1, -1] += 1
  _replace(_HEAD, head)(tmp_path / "model")
  _assert_refused(tmp_path / "model", f"{_HEAD} is not {_EMBED}")


@pytest.mark.parametrize("place", ["plain", "a place's"])
def test_pickles_are_refused_with_what_converts_them(
    tmp_path, params, place, monkeypatch, assert_same_bits
):
  directory = tmp_path / place
  convert.save(directory, _DECODER, params)
  _, before = convert.load(directory)
  tensors = safetensors.torch.load_file(directory / _ONE_FILE)
  torch.save(tensors, directory / "pytorch_model.bin")
  (directory / _ONE_FILE).unlink()
  with pytest.raises(convert.ConvertError, match="pickles") as caught:
    convert.load(directory)
  text = str(caught.value)
  assert "\n" not in text and str(directory) in text
  python, *arguments = shlex.split(text[text.index("python -c") :])
  assert (python, arguments[0]) == ("python", "-c")
  monkeypatch.setattr(sys, "argv", ["-c", *arguments[2:]])
  exec(arguments[1], {})
  config, after = convert.load(directory)
  assert config == _DECODER
  assert_same_bits(after, before)


def test_no_directory(tmp_path):
  for read in (convert.load, convert.read_config, convert.resolve):
    with pytest.raises(convert.ConvertError, match="nowhere does not exist"):
      read(tmp_path / "nowhere")


# The hub.

_SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
  """A hub's cache, empty; nothing is fetched."""
  path = tmp_path / "hub"
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(path))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  return path


@pytest.fixture
def snapshot(cache) -> pathlib.Path:
  """Where the cache has the revisions `main` and `v1/x` of org/na.me-1."""
  repository = cache / "models--org--na.me-1"
  for ref in ("main", "v1/x"):
    path = repository / "refs" / ref
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_SHA)
  return repository / "snapshots" / _SHA


def test_a_hub_repository_without_safetensors(snapshot):
  snapshot.mkdir(parents=True)
  (snapshot / "config.json").write_text("{}")
  with pytest.raises(convert.ConvertError) as caught:
    convert.resolve("org/na.me-1")
  text = str(caught.value)
  assert "hf download org/na.me-1 --local-dir=na.me-1" in text
  assert text.endswith("na.me-1") and 'python -c "' in text


@pytest.mark.parametrize(
    "name",
    [
        "org/na.me-1",
        "org/na.me-1@main",
        "org/na.me-1@v1/x",
        f"org/na.me-1@{_SHA}",
    ],
)
def test_a_hub_id_is_its_snapshot(snapshot, params, name, assert_same_bits):
  convert.save(snapshot, _DECODER, params)
  assert convert.resolve(name) == snapshot.resolve()
  assert_same_bits(convert.load(convert.resolve(name))[1], params)


@pytest.mark.parametrize("name", ["org/name", "org/name@v2"])
def test_a_hub_id_that_is_not_there(cache, name):
  with pytest.raises(convert.ConvertError) as caught:
    convert.resolve(name)
  text = str(caught.value)
  assert text.startswith(f"{name} is no directory here, and fetching it")
  assert "\n" not in text and text.endswith("give its directory")


@pytest.mark.parametrize(
    "name", ["name", "/org/name", "a/b/c", "org/", "org/name@", "https://x/y"]
)
def test_what_is_neither_directory_nor_hub_id(cache, name):
  with pytest.raises(convert.ConvertError, match="does not exist"):
    convert.resolve(name)


def test_a_directory_comes_before_the_hub(cache, directory, monkeypatch):
  monkeypatch.chdir(directory.parent)
  (directory.parent / "org").mkdir()
  directory.rename(directory.parent / "org" / "name")
  assert convert.resolve("org/name") == pathlib.Path("org/name")


# Tokenizers.


def test_tokenizer_is_missing(directory):
  # For Gemma, transformers makes one out of nothing.
  _edit_json(directory / "config.json", model_type="gemma2")
  with pytest.raises(convert.ConvertError, match="no tokenizer in") as caught:
    convert.load_tokenizer(directory)
  assert "\n" not in str(caught.value)
  with pytest.raises(convert.ConvertError, match="nowhere"):
    convert.load_tokenizer(directory / "nowhere")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, (1,)),
        ({}, (1,)),
        ({"eos_token_id": None}, (1,)),
        ({"eos_token_id": 5}, (1, 5)),
        ({"eos_token_id": [5, 1, 7]}, (1, 5, 7)),
    ],
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens(tokenizer, tmp_path, name, written, expected):
  loaded = convert.load_tokenizer(tokenizer)
  assert loaded.eos_token_id == 1
  if written is not None:
    (tmp_path / name).write_text(json.dumps(written))
  assert convert.end_tokens(tmp_path, loaded) == expected
