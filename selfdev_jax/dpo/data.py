"""Preference data: read in TRL's formats, tokenised, every text once."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import transformers

from selfdev_jax import errors
from selfdev_jax import tables

_PAIR = ("chosen", "rejected")
# What chat templates are given besides the messages.
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
_COLUMNS = ("prompt", *_PAIR, *_TEMPLATE_COLUMNS)
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?::(.+))?")


@dataclasses.dataclass(frozen=True)
class Counts:
  """What became of pairs that could not be taken as they are.

  Attributes:
    cut_prompts: pairs whose over-long prompt was cut on the left.
    equal: skipped, chosen and rejected give the same tokens.
    empty: skipped, chosen or rejected has no text.
    too_long: skipped, a completion leaves no room for one token of the prompt.
  """

  cut_prompts: int = 0
  equal: int = 0
  empty: int = 0
  too_long: int = 0

  @property
  def skipped(self) -> int:
    return self.equal + self.empty + self.too_long

  def note(self) -> str:
    """One line for the user; empty where nothing happened."""
    parts = []
    if self.skipped:
      reasons = (
          (self.equal, "equal"),
          (self.empty, "empty"),
          (self.too_long, "too long"),
      )
      why = ", ".join(f"{n} {reason}" for n, reason in reasons if n)
      parts.append(f"{_plural(self.skipped, 'pair')} skipped ({why})")
    if self.cut_prompts:
      parts.append(f"{_plural(self.cut_prompts, 'prompt')} cut on the left")
    return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Data:
  """Every distinct prompt once, and each distinct completion of it once.

  Where a completion begins and ends is known by the structure alone, never by
  a token: EOS may be the padding token as well.

  Attributes:
    prompts: [tokens] int32 each, at least one token.
    completions: [tokens] int32 each, with the EOS.
    prompt_of: [completions] int32, the number of its prompt.
    pairs: [pairs, 2] int32, the numbers of chosen and rejected completion;
      both are of one prompt.
    source: [pairs] int32, the input row, from 0, that a pair came from.
    counts: what was skipped or cut.
  """

  prompts: tuple[np.ndarray, ...]
  completions: tuple[np.ndarray, ...]
  prompt_of: np.ndarray
  pairs: np.ndarray
  source: np.ndarray
  counts: Counts

  def digest(self) -> str:
    """64 hex digits that name the token ids and the pairs, in their order."""
    digest = hashlib.sha256()
    for arrays in (
        self.prompts,
        self.completions,
        [self.prompt_of],
        [self.pairs],
    ):
      # With the sizes no two data give the same bytes.
      digest.update(len(arrays).to_bytes(8, "little"))
      for array in arrays:
        digest.update(array.size.to_bytes(8, "little"))
        digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of preference data, the prompt of each made explicit.

  Prompt, chosen and rejected are texts, or lists of {"role", "content"}
  messages. Where the first row has no prompt, chosen and rejected of all rows
  begin with it; see `extract_prompt`. Other columns are left out, but for
  `tools` and `chat_template_kwargs`.

  Args:
    path: a JSONL file; a directory that `datasets` saved by `save_to_disk`, its
      split `train` where it has several; or `org/name[:split]` on the Hugging
      Face hub, by default its split `train`.

  Returns:
    At least one row with "prompt", "chosen" and "rejected".

  Raises:
    UserError: naming the file with the line or the row.
  """
  place = pathlib.Path(path)
  match = _HUB_ID.fullmatch(str(path))
  if place.is_dir():
    numbered = _read_saved(place)
  elif place.is_file() and place.suffix == ".jsonl":
    numbered = tables.read_lines(place)
  elif place.is_file():
    raise errors.UserError(
        f"{path} is no preference file: give a .jsonl with one object a line,"
        " or a directory that datasets saved by save_to_disk"
    )
  elif match is None or place.suffix == ".jsonl":
    raise errors.UserError(f"preference file {path} does not exist")
  else:
    numbered = _read_hub(str(path), match[1], match[2] or "train")
  rows: list[dict[str, Any]] = []
  implicit = None
  for where, row in numbered:
    if implicit is None:
      implicit = "prompt" not in row
    rows.append(_checked(row, where, implicit))
  if not rows:
    raise errors.UserError(f"{path} holds no preference pair")
  return rows


def _read_saved(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """(where, row) of a directory of `save_to_disk`."""
  import datasets  # Here, as it takes seconds.

  try:
    with tables.without_progress_bars(datasets):
      dataset = datasets.load_from_disk(str(path))
  except Exception as error:  # Arrow's, JSON's and the file system's.
    raise errors.UserError(
        f"directory {path} is not one that datasets saved by save_to_disk, or"
        f" holds no row: {tables.one_line(error)}"
    ) from None
  if isinstance(dataset, datasets.DatasetDict):
    if "train" not in dataset:
      raise errors.UserError(
          f"{path} has no split train; give the directory of one of its splits"
          f" ({', '.join(sorted(dataset))})"
      )
    dataset = dataset["train"]
  return _rows(dataset, str(path))


def _read_hub(
    path: str, name: str, split: str
) -> Iterator[tuple[str, dict[str, Any]]]:
  """(where, row) of a data set on the hub, or of its copy in the cache."""
  try:
    dataset = tables.from_hub(name, None, split)
  except Exception as error:  # The hub's, HTTP's and the file system's.
    raise errors.UserError(
        f"{path} is no file or directory here, and fetching it from the Hugging"
        f" Face hub failed ({tables.one_line(error)}); fetch it where there is"
        " a network and give the directory of save_to_disk or a JSONL file"
    ) from None
  return _rows(dataset, path)


def _rows(dataset: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """(where, row) of a `datasets.Dataset`, only the columns that are used."""
  for name in _PAIR:
    if name not in dataset.column_names:
      raise errors.UserError(
          f"{path} has no column {name}, but {', '.join(dataset.column_names)};"
          " it needs prompt, chosen and rejected"
      )
  # Pictures and the like in other columns would be decoded.
  columns = [name for name in _COLUMNS if name in dataset.column_names]
  dataset = dataset.with_format(None).select_columns(columns)
  for i, row in enumerate(dataset):
    yield f"{path}, row {i + 1} of {len(dataset)}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
  """Leaves out keys without a value.

  Arrow gives every message the keys of all others, but chat templates ask
  whether a key is there.
  """
  if isinstance(value, dict):
    return {k: _without_nulls(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [_without_nulls(item) for item in value]
  return value


def _checked(row: dict[str, Any], where: str, implicit: bool) -> dict[str, Any]:
  """The columns of a row that are used, the prompt among them."""
  if implicit and "prompt" in row:
    raise errors.UserError(
        f"{where} has a prompt, but the first row has none; give it in all rows"
        " or in none"
    )
  fields = _PAIR if implicit else ("prompt", *_PAIR)
  for name in fields:
    if name not in row:
      raise errors.UserError(
          f"{where} lacks {name}; a row needs prompt, chosen and rejected"
      )
    if not isinstance(row[name], str) and not _is_conversation(row[name]):
      raise errors.UserError(
          f'{where}: {name} is neither text nor a list of {{"role": text,'
          ' "content": text} messages'
      )
  kinds = {name: isinstance(row[name], str) for name in fields}
  if len(set(kinds.values())) > 1:
    texts = " and ".join(name for name in fields if kinds[name])
    raise errors.UserError(
        f"{where}: {texts} as text, but the rest as messages; make it all texts"
        " or all messages, or leave prompt out of every row where chosen and"
        " rejected begin with it"
    )
  kept = {
      name: row[name] for name in _TEMPLATE_COLUMNS if row.get(name) is not None
  }
  if implicit:
    return {**extract_prompt(row["chosen"], row["rejected"]), **kept}
  return {**{name: row[name] for name in fields}, **kept}


def _is_conversation(value: Any) -> bool:
  return isinstance(value, list) and all(
      isinstance(message, dict) and isinstance(message.get("role"), str)
      # A message that calls tools may have no content.
      and (
          isinstance(message.get("content"), str)
          or (message.get("content") is None and message.get("tool_calls"))
      )
      for message in value
  )


def extract_prompt(chosen: Any, rejected: Any) -> dict[str, Any]:
  """Splits off what both begin with, by the rule of TRL's `extract_prompt`.

  That is their common beginning without a space at its end, or without the
  last character or message where one is the beginning of the other. Unlike
  TRL we have a rule where that beginning is empty: so is the prompt.

  Args:
    chosen: text or messages, the prompt included.
    rejected: of the same kind.

  Returns:
    "prompt", "chosen" and "rejected".
  """
  shortest = min(len(chosen), len(rejected))
  split = max(shortest - 1, 0)
  for i in range(shortest):
    if chosen[i] != rejected[i]:
      split = i - 1 if i and chosen[i - 1] == " " else i
      break
  return {
      "prompt": chosen[:split],
      "chosen": chosen[split:],
      "rejected": rejected[split:],
  }


def tokenize(
    rows: Sequence[dict[str, Any]],
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    max_length: int,
) -> Data:
  """Token ids of every pair; what cannot be trained on is counted.

  Texts: prompt and completion are encoded apart, the prompt with the
  tokenizer's special tokens, as a sampler sees them. TRL encodes both together
  and splits where they differ from the prompt alone; a token that merges across
  the boundary would then be trained on, though no sampling ever meets it.

  Messages: the chat template is applied to the prompt with the beginning of an
  answer, and to the prompt with each completion; as in TRL the completion
  starts where they diverge.

  A completion that does not end (of messages: that nowhere ends) gets an EOS.
  Where prompt and completion are longer than `max_length`, the prompt loses its
  beginning; it stays the same for both of a pair, so the longer one decides.

  Args:
    rows: with "prompt", "chosen" and "rejected", all texts or all messages; and
      perhaps "tools" (a list, or JSON of one) and "chat_template_kwargs".
    tokenizer: with an EOS token, and a chat template if there are messages.
    vocab_size: the model's; every id is below it.
    max_length: tokens of prompt and completion together.

  Raises:
    UserError: if no pair is left, a prompt has no token, an id is not the
      model's, or the chat template does not take a row.
  """
  if not rows:
    raise errors.UserError("DPO needs at least one preference pair, got none")
  if tokenizer.eos_token_id is None:
    raise errors.UserError(
        "the tokenizer names no EOS token, so no completion could end; set"
        " eos_token in tokenizer_config.json"
    )
  encoder = _Encoder(tokenizer, vocab_size)
  counts = dict.fromkeys(("cut_prompts", "equal", "empty", "too_long"), 0)
  prompts = _Distinct()
  completions = _Distinct()
  prompt_of, pairs, source = [], [], []
  for i, row in enumerate(rows):
    # Counted from 1, as the lines of a file are.
    ids = encoder.encode(row, f"row {i + 1} of {len(rows)}")
    if isinstance(ids, str):
      counts[ids] += 1
      continue
    prompt, *pair = ids
    room = max_length - max(map(len, pair))
    if room < 1:
      counts["too_long"] += 1
      continue
    if len(prompt) > room:
      counts["cut_prompts"] += 1
      prompt = prompt[-room:]
    number = prompts.number(prompt)
    pairs.append([completions.number(ids, number) for ids in pair])
    prompt_of += [number] * (len(completions.items) - len(prompt_of))
    source.append(i)
  counts = Counts(**counts)
  if not pairs:
    way_out = "; raise max_length" if counts.too_long else ""
    raise errors.UserError(
        f"no preference pair is left to train on: {counts.note()}{way_out}"
    )
  return Data(
      prompts=tuple(prompts.items),
      completions=tuple(completions.items),
      prompt_of=np.array(prompt_of, np.int32),
      pairs=np.array(pairs, np.int32),
      source=np.array(source, np.int32),
      counts=counts,
  )


class _Distinct:
  """Numbers arrays in the order in which they are first met."""

  def __init__(self):
    self.items: list[np.ndarray] = []
    self._numbers: dict[tuple[int, bytes], int] = {}

  def number(self, ids: np.ndarray, owner: int = 0) -> int:
    number = self._numbers.setdefault((owner, ids.tobytes()), len(self.items))
    if number == len(self.items):
      self.items.append(ids)
    return number


class _Encoder:
  """Puts every distinct text through the tokenizer once."""

  def __init__(self, tokenizer, vocab_size: int):
    self._tokenizer = tokenizer
    self._vocab_size = vocab_size
    self._eos = tokenizer.eos_token_id
    self._known: dict[Any, np.ndarray] = {}

  def encode(
      self, row: dict[str, Any], where: str
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | str:
    """Prompt, chosen and rejected, [tokens] int32 each; or why it is skipped.

    The reason is the name of one of `Counts`.
    """
    if not (_has_text(row["chosen"]) and _has_text(row["rejected"])):
      return "empty"
    if row["chosen"] == row["rejected"]:
      return "equal"
    encode = self._texts if isinstance(row["prompt"], str) else self._messages
    prompt, *pair = encode(row, where)
    for ids in (prompt, *pair):
      self._check(ids, where)
    # Of nothing but EOS, or of nothing at all.
    if any((ids == self._eos).all() for ids in pair):
      return "empty"
    if np.array_equal(*pair):
      return "equal"
    if not prompt.size:
      raise errors.UserError(f"{where}: a prompt without a token")
    return prompt, *pair

  def _texts(self, row, where) -> list[np.ndarray]:
    del where  # Any text can be encoded.
    return [
        self._text(row["prompt"]),
        *(self._text(row[name], completion=True) for name in _PAIR),
    ]

  def _text(self, text: str, completion: bool = False) -> np.ndarray:
    key = (text, completion)
    if key not in self._known:
      # Not verbose: how long it may be is not the tokenizer's to say.
      ids = self._tokenizer.encode(
          text, add_special_tokens=not completion, verbose=False
      )
      if completion and ids[-1:] != [self._eos]:
        ids = [*ids, self._eos]
      self._known[key] = np.array(ids, np.int32)
    return self._known[key]

  def _messages(self, row, where) -> list[np.ndarray]:
    if not row["prompt"]:
      raise errors.UserError(
          f"{where}: a prompt without a message; chosen and rejected have to"
          " answer the same one"
      )
    arguments = _template_arguments(row, where)
    if not (self._tokenizer.chat_template or "chat_template" in arguments):
      raise errors.UserError(
          f"{where} holds messages, but the tokenizer has no chat template;"
          " give texts, or a model directory with chat_template.jinja"
      )
    prompt = self._chat(
        row["prompt"], {**arguments, "add_generation_prompt": True}, where
    )
    pair = [
        self._chat(row["prompt"] + row[name], arguments, where)
        for name in _PAIR
    ]
    start = min(_common_prefix_length(prompt, ids) for ids in pair)
    return [
        prompt[:start],
        *(
            # A template may well end a turn with an EOS and a newline.
            ids[start:]
            if self._eos in ids[start:]
            else np.append(ids[start:], np.int32(self._eos))
            for ids in pair
        ),
    ]

  def _chat(self, messages, arguments, where) -> np.ndarray:
    key = repr((messages, arguments))
    if key not in self._known:
      try:
        ids = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **arguments
        )["input_ids"]
      except Exception as error:  # The template's own, and of all it calls.
        raise errors.UserError(
            f"{where}: the tokenizer's chat template does not take it:"
            f" {tables.one_line(error)}"
        ) from None
      self._known[key] = np.array(ids, np.int32)
    return self._known[key]

  def _check(self, ids: np.ndarray, where: str):
    foreign = ids[(ids < 0) | (ids >= self._vocab_size)]
    if foreign.size:
      raise errors.UserError(
          f"{where}: the tokenizer of {len(self._tokenizer)} tokens gives token"
          f" {foreign[0]}, but the model has {self._vocab_size}; the tokenizer"
          " is not this model's"
      )


def _has_text(completion: str | list[dict[str, Any]]) -> bool:
  if isinstance(completion, str):
    return bool(completion)
  return any(m.get("content") or m.get("tool_calls") for m in completion)


def _template_arguments(row: dict[str, Any], where: str) -> dict[str, Any]:
  """What TRL hands to the chat template besides the messages."""
  tools = row.get("tools")
  if isinstance(tools, str):
    try:
      tools = json.loads(tools)
    except (ValueError, RecursionError) as error:
      raise errors.UserError(
          f"{where}: tools is no JSON: {tables.one_line(error)}"
      ) from None
  arguments = row.get("chat_template_kwargs") or {}
  if not isinstance(arguments, dict):
    raise errors.UserError(f"{where}: chat_template_kwargs is no object")
  return {"tools": tools, **arguments}


def _common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
  n = min(len(a), len(b))
  differ = np.flatnonzero(a[:n] != b[:n])
  return int(differ[0]) if differ.size else n


def _plural(n: int, noun: str) -> str:
  return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
