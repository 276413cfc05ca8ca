"""Hugging Face directories in and out; nothing is unpickled, shapes asserted.

Reading needs config.json, safetensors (one file, or several and their index)
and tokenizer files.
"""

from collections.abc import Callable
from collections.abc import Iterator
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
from typing import Any

import huggingface_hub
import jax
import numpy as np
import transformers

from selfdev_jax import models
from selfdev_jax.convert import families
from selfdev_jax.convert import files
from selfdev_jax.convert.error import ConvertError

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
TOKENIZER_FILES = (
    *_VOCABULARY,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CARRIED = (*TOKENIZER_FILES, _GENERATION_CONFIG)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Buffers that old versions of transformers saved and that config.json implies.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


def resolve(model: str | os.PathLike) -> pathlib.Path:
  """The directory of a model: its own, or the hub's copy in the local cache.

  Args:
    model: a directory, or `org/name[@revision]` on the Hugging Face hub.

  Raises:
    ConvertError: if it is neither, or the hub cannot be reached.
  """
  path = pathlib.Path(model)
  if path.is_dir():
    return path
  match = _HUB_ID.fullmatch(str(model))
  if match is None:
    raise ConvertError(f"model directory {model} does not exist")
  patterns = ["model*.safetensors", _INDEX, _CONFIG, *_CARRIED]
  try:
    path = pathlib.Path(
        huggingface_hub.snapshot_download(
            match[1], revision=match[2], allow_patterns=patterns
        )
    )
  except Exception as error:  # The hub's, HTTP's and the file system's.
    reason = " ".join(str(error).split("\n\n")[0].split())
    raise ConvertError(
        f"{model} is no directory here, and fetching it from the Hugging Face"
        f" hub failed ({reason}); fetch it where there is a network and give"
        " its directory"
    ) from None
  if not any(path.glob("*.safetensors")):
    name = match[1].split("/")[1]
    revision = f" --revision={match[2]}" if match[2] else ""
    raise ConvertError(
        f"{model}: no safetensors came from the hub. Fetch it all (hf download"
        f" {match[1]}{revision} --local-dir={name}) and convert it where torch"
        f" is installed: {_to_safetensors(name)}"
    )
  return path


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a file of a model directory."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ConvertError(
        f"{path.parent} is no Hugging Face model directory: {path.name} is"
        " missing"
    ) from None
  except (ValueError, OSError) as error:
    raise ConvertError(f"{path} cannot be read: {error}") from None
  if not isinstance(value, dict):
    raise ConvertError(f"{path} cannot be read: it holds no JSON object")
  return value


def write_json(path: pathlib.Path, value: dict[str, Any]):
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_config(directory: str | os.PathLike) -> models.DecoderConfig:
  """The decoder's shape from config.json.

  Raises:
    ConvertError: if the directory or the file is missing, or the architecture
      is not supported.
  """
  path = pathlib.Path(directory)
  if not path.is_dir():
    raise ConvertError(f"model directory {directory} does not exist")
  return families.decoder_config(read_json(path / _CONFIG), str(directory))


def _read_index(directory: pathlib.Path) -> dict[str, str] | None:
  """Tensor name -> file name; None where all are in one file.

  Raises:
    ConvertError: if the directory has no weights or lacks some of them.
  """
  if (directory / _WEIGHTS).is_file():
    return None
  if not (directory / _INDEX).is_file():
    raise ConvertError(_no_weights(directory))
  weight_map = read_json(directory / _INDEX).get("weight_map")
  if not isinstance(weight_map, dict):
    raise ConvertError(f"{directory / _INDEX} has no weight_map")
  for name in sorted(set(map(str, weight_map.values()))):
    if pathlib.PurePath(name).name != name:
      raise ConvertError(f"{directory / _INDEX} names a file outside: {name}")
    if not (directory / name).is_file():
      raise ConvertError(f"{directory} lacks {name}, which its index names")
  return weight_map


def _read_tensors(directory: pathlib.Path) -> dict[str, files.Tensor]:
  """All tensors of a directory by name, of one file or of an index's."""
  weight_map = _read_index(directory)
  if weight_map is None:
    return files.read(directory / _WEIGHTS)
  shards = {
      name: files.read(directory / name) for name in set(weight_map.values())
  }
  for name, shard in weight_map.items():
    if name not in shards[shard]:
      raise ConvertError(
          f"{directory / shard} lacks tensor {name}, which the index puts there"
      )
  return {k: v for shard in shards.values() for k, v in shard.items()}


def _no_weights(directory: pathlib.Path) -> str:
  if not any(directory.glob("*.bin*")):
    return f"{directory} lacks {_WEIGHTS} or {_INDEX}"
  return (
      f"{directory} has its weights in pickles (.bin), which are not read."
      " Convert them where torch is installed:"
      f" {_to_safetensors(str(directory))}"
  )


def _to_safetensors(directory: str) -> str:
  """A command; transformers unpickles nothing but weights."""
  script = (
      "import sys, transformers as t; d = sys.argv[1];"
      " t.AutoModelForCausalLM.from_pretrained(d, dtype='auto')"
      ".save_pretrained(d)"
  )
  return f'python -c "{script}" {shlex.quote(directory)}'


def open_leaves(
    directory: str | os.PathLike,
) -> tuple[models.DecoderConfig, models.Params]:
  """The parameters as `files.Leaf`s: checked, but not read yet.

  Raises:
    ConvertError: naming the directory, and the tensor that is missing, unknown
      or of another shape than config.json says or not of a float dtype.
  """
  directory = pathlib.Path(directory)
  config = read_config(directory)
  tensors = _read_tensors(directory)
  unknown = {name for name in tensors if not _IGNORED.fullmatch(name)}
  leaves: models.Params = {}
  for path, abstract, names in named_leaves(
      config, models.abstract_params(config)
  ):
    stacked = is_stacked(path)
    shape = abstract.shape[1:] if stacked else abstract.shape
    leaf = files.find(
        directory, tensors, names, shape, "config.json asks", stacked
    )
    unknown.difference_update(names)
    set_path(leaves, path, leaf)
  table = families.FAMILIES[config.family].table
  if config.tied_head and table["head"] in unknown:
    unknown.remove(table["head"])
    _check_tied(tensors[table["embed"]], tensors[table["head"]])
  if unknown:
    raise ConvertError(f"{directory} holds unknown tensor {min(unknown)}")
  return config, leaves


def _check_tied(embed: files.Tensor, head: files.Tensor):
  """A tied head that is in the file all the same has to be the embedding."""
  # As memoryviews they are compared without a copy.
  if head.dtype != embed.dtype or head.data.data != embed.data.data:
    raise ConvertError(
        f"{head.path}: config.json ties the head to the embedding, but"
        f" {head.name} is not {embed.name}; set tie_word_embeddings to false"
        " to use both"
    )


def load(
    directory: str | os.PathLike, shardings: models.Params | None = None
) -> tuple[models.DecoderConfig, models.Params]:
  """Reads a model directory, in the dtypes of its files, tensor by tensor.

  On a CPU, what `save` wrote is not copied but mapped: see `files.put`.

  Args:
    directory: of the model.
    shardings: a `jax.sharding.Sharding` for each leaf, see `models.shardings`;
      None: the default device.

  Returns:
    (config, params); the params are laid out as in models/decoder.py.

  Raises:
    ConvertError: see `open_leaves`.
  """
  config, leaves = open_leaves(directory)
  if shardings is None:
    shardings = jax.tree.map(lambda leaf: None, leaves)
  # Most of the time goes into pages of memory that were never touched.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    arrays = jax.tree.map(
        functools.partial(pool.submit, files.put), leaves, shardings
    )
    return config, jax.tree.map(lambda array: array.result(), arrays)


def save(
    directory: str | os.PathLike,
    config: models.DecoderConfig,
    params: models.Params,
    like: str | os.PathLike | None = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
    finish: Callable[[pathlib.Path], None] = lambda directory: None,
):
  """Writes a directory that `transformers` loads; whole or not at all.

  Args:
    directory: made anew; an existing one is replaced.
    config: the decoder's shape.
    params: leaves as in models/decoder.py; arrays, or what becomes one by
      `np.asarray`, which is called on one leaf at a time.
    like: a directory whose tokenizer and generation config are copied along,
      and its config.json where that describes `config`.
    max_shard_bytes: where more, several files and their index are written; a
      leaf with its layers is never cut.
    finish: writes into the directory what else belongs there, before it takes
      its name.
  """
  like = None if like is None else pathlib.Path(like)
  nbytes = sum(map(files.nbytes, jax.tree.leaves(params)))
  with new_directory(directory, nbytes) as new:
    _write_weights(new, config, params, max_shard_bytes)
    dtype = str(np.dtype(params["embed"].dtype))
    write_settings(new, config, dtype, like)
    finish(new)


def _write_weights(new, config, params, max_shard_bytes):
  shards, room = [], 0
  for path, leaf, names in named_leaves(config, params):
    size = files.nbytes(leaf)
    if size > room:
      shards.append([])
      room = max_shard_bytes
    room -= size
    shards[-1].append((names, leaf, is_stacked(path)))
  if len(shards) == 1:
    files.write(new / _WEIGHTS, shards[0])
    return
  weight_map, total = {}, 0
  for i, shard in enumerate(shards):
    name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    files.write(new / name, shard)
    for names, leaf, _ in shard:
      weight_map |= dict.fromkeys(names, name)
      total += files.nbytes(leaf)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_json(new / _INDEX, index)


def write_settings(
    new: pathlib.Path,
    config: models.DecoderConfig,
    dtype: str,
    like: pathlib.Path | None,
):
  """Writes config.json and copies what else is not weights."""
  settings = families.hf_config(config) | {"dtype": dtype}
  if like is not None:
    for name in _CARRIED:
      if (like / name).is_file():
        shutil.copy(like / name, new / name)
    settings |= _special_tokens(like)
    if (like / _CONFIG).is_file() and read_config(like) == config:
      theirs = read_json(like / _CONFIG)
      if theirs.get("dtype", theirs.get("torch_dtype")) == dtype:
        shutil.copy(like / _CONFIG, new / _CONFIG)
        return
      theirs.pop("torch_dtype", None)
      settings = theirs | {"dtype": dtype}
  write_json(new / _CONFIG, settings)


def _special_tokens(directory: pathlib.Path) -> dict[str, Any]:
  """The ids that end, begin and fill a text, as a model directory has them.

  Without them `generate` in transformers takes the family's: Mistral's EOS is
  2, whatever the tokenizer says, and a text would run on.
  """
  found = {}
  for name in (_CONFIG, _GENERATION_CONFIG):
    if (directory / name).is_file():
      settings = read_json(directory / name)
      found |= {k: settings[k] for k in _SPECIAL_TOKENS if k in settings}
  return found


def named_leaves(
    config: models.DecoderConfig, tree: models.Params
) -> Iterator[tuple[str, Any, list[str]]]:
  """(path, leaf of `tree`, tensor names, one a layer) in the table's order."""
  for path, pattern in families.FAMILIES[config.family].table.items():
    if path == "head" and config.tied_head:
      continue
    layers = range(config.layers) if is_stacked(path) else [None]
    yield path, get_path(tree, path), [pattern.format(i) for i in layers]


def is_stacked(path: str) -> bool:
  return path.startswith("layers/")


def get_path(tree: models.Params, path: str) -> Any:
  """`tree["a"]["b"]` for "a/b"; KeyError where there is none."""
  for key in path.split("/"):
    tree = tree[key]
  return tree


def set_path(tree: models.Params, path: str, value: Any):
  *parents, last = path.split("/")
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = value


@contextlib.contextmanager
def new_directory(
    directory: str | os.PathLike, nbytes: int
) -> Iterator[pathlib.Path]:
  """A directory to fill; only when it is whole does it take its name.

  Args:
    directory: made anew; an existing one is replaced.
    nbytes: what will be written, about.

  Raises:
    ConvertError: if the disk has no room, or the place is not one to write to.
  """
  target = pathlib.Path(directory)
  # Hidden, so that they are nobody else's.
  partial, old = (
      target.with_name(f".{target.name}.{suffix}")
      for suffix in ("partial", "replaced")
  )
  try:
    for path in (partial, old):  # Of a run that was killed.
      shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < nbytes:
      raise ConvertError(
          f"{target} needs {nbytes / 1e6:,.0f} MB, and its disk has"
          f" {free / 1e6:,.0f} MB left; make room for it and run the same"
          " command again"
      )
    yield partial
    if target.exists():
      target.rename(old)
    partial.rename(target)
  except OSError as error:
    raise ConvertError(
        f"{target} cannot be written ({error}); make room for it and run the"
        " same command again"
    ) from None
  finally:
    for path in (partial, old):
      shutil.rmtree(path, ignore_errors=True)


def load_tokenizer(
    directory: str | os.PathLike,
) -> transformers.PreTrainedTokenizerBase:
  """The directory's tokenizer, through transformers, offline.

  Raises:
    ConvertError: if it is missing, unreadable or has no EOS token.
  """
  # Of some families transformers makes an empty one where there is none.
  if not any(
      (pathlib.Path(directory) / name).is_file() for name in _VOCABULARY
  ):
    raise ConvertError(
        f"no tokenizer in {directory}: it has none of {', '.join(_VOCABULARY)}"
    )
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True
    )
  except Exception as error:  # tokenizers raises bare ones.
    reason = (str(error) or repr(error)).splitlines()[0]
    raise ConvertError(f"no tokenizer in {directory}: {reason}") from None
  if tokenizer.eos_token_id is None:
    raise ConvertError(f"the tokenizer in {directory} has no EOS token")
  return tokenizer


def end_tokens(
    directory: str | os.PathLike,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> tuple[int, ...]:
  """The tokens that end a text; chat models have others than the tokenizer's.

  Args:
    directory: of the model, with or without a generation config.
    tokenizer: its tokenizer.
  """
  named = _special_tokens(pathlib.Path(directory)).get("eos_token_id")
  named = [] if named is None else named if isinstance(named, list) else [named]
  return tuple(dict.fromkeys([tokenizer.eos_token_id, *named]))


def _shards(directory: pathlib.Path) -> list[str]:
  """The names of the files that have a directory's weights."""
  weight_map = _read_index(directory) or {"": _WEIGHTS}
  return sorted(set(weight_map.values()))


def file_names(directory: str | os.PathLike) -> list[str]:
  """The files of a directory that its model needs, without what else is there.

  Raises:
    ConvertError: if it has no weights or lacks some of them.
  """
  directory = pathlib.Path(directory)
  shards = _shards(directory)
  others = [_CONFIG, *_CARRIED]
  if shards != [_WEIGHTS]:
    others.append(_INDEX)
  return shards + [name for name in others if (directory / name).is_file()]


def digest(directory: str | os.PathLike) -> str:
  """SHA-256 over the weights, the configs and the tokenizer, in hex."""
  directory = pathlib.Path(directory)
  whole = hashlib.sha256()
  names = (*_shards(directory), _CONFIG, _GENERATION_CONFIG, "tokenizer.json")
  for name in names:
    try:
      with open(directory / name, "rb") as file:
        whole.update(hashlib.file_digest(file, "sha256").digest())
    except FileNotFoundError:
      whole.update(b"absent")  # Not every model has all of them.
    except OSError as error:
      raise ConvertError(f"{directory}: {error}") from None
  return whole.hexdigest()
