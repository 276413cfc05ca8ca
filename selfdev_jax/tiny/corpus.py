"""What the tiny seed model reads: texts, their tokenizer, packed rows."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import random

import numpy as np
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from selfdev_jax import errors
from selfdev_jax.evaluation import arithmetic
from selfdev_jax.tiny import grammar

PAD, EOS = "<pad>", "</s>"
_OPEN_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Document:
  """A text in two parts; a loss may skip the first."""

  prompt: str
  target: str


@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed documents, arrays of [rows, length].

  Attributes:
    tokens: int32.
    segments: int32, a number a document, 0 for padding.
    positions: int32, from 0 in each document.
    is_target: bool, true where the token belongs to a document's target.
  """

  tokens: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  is_target: np.ndarray


def word_problems(
    rng: random.Random, n: int, operations: Sequence[str]
) -> list[Document]:
  """`n` training questions, an operation drawn from `operations` for each."""
  drawn = [
      arithmetic.draw(rng, arithmetic.TRAIN, rng.choice(operations))
      for _ in range(n)
  ]
  return [Document(p.prompt, p.solution) for p in drawn]


def equations(rng: random.Random, n: int) -> list[Document]:
  """`n` bare equations such as `12+7=19`: without them nothing is learned."""
  documents = []
  for _ in range(n):
    operation = rng.choice(arithmetic.OPERATIONS)
    a, b = arithmetic.draw_operands(rng, operation)
    documents.append(Document("", arithmetic.equation(operation, a, b)))
  return documents


def programs(rng: random.Random, n: int, prompt: str) -> list[Document]:
  """`n` programs of the starting grammar behind the factory's prompt."""
  return [Document(prompt, grammar.body(rng)) for _ in range(n)]


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int
) -> tokenizers.Tokenizer:
  """A byte-level BPE whose digits are single tokens."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  pre = tokenizers.pre_tokenizers
  tokenizer.pre_tokenizer = pre.Sequence(
      [
          pre.Digits(individual_digits=True),
          pre.ByteLevel(add_prefix_space=False),
      ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[PAD, EOS],
      initial_alphabet=pre.ByteLevel.alphabet(),
      show_progress=False,
  )
  texts = (document.prompt + document.target for document in documents)
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path):
  """Writes the files that transformers' AutoTokenizer reads."""
  directory.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(directory / "tokenizer.json"))
  settings = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "eos_token": EOS,
      "pad_token": PAD,
      "clean_up_tokenization_spaces": False,
      "model_max_length": 1024,
  }
  (directory / "tokenizer_config.json").write_text(json.dumps(settings))
  special = {
      "bos_token_id": None,
      "eos_token_id": tokenizer.token_to_id(EOS),
      "pad_token_id": tokenizer.token_to_id(PAD),
  }
  (directory / "generation_config.json").write_text(json.dumps(special))


def pack(
    documents: Sequence[Document], tokenizer: tokenizers.Tokenizer, length: int
) -> Rows:
  """Fills rows of `length` tokens with whole documents.

  A document ends in EOS; one that is longer than a row is left out.

  Raises:
    UserError: if every document is.
  """
  eos = tokenizer.token_to_id(EOS)
  prompts = tokenizer.encode_batch([d.prompt for d in documents])
  targets = tokenizer.encode_batch([d.target for d in documents])
  rows, open_rows = [], []
  for prompt, target in zip(prompts, targets, strict=True):
    document = (prompt.ids + target.ids + [eos], len(prompt.ids))
    size = len(document[0])
    if size > length:
      continue
    # First fit among the last few rows leaves little padding.
    for row in open_rows:
      if sum(len(tokens) for tokens, _ in row) + size <= length:
        row.append(document)
        break
    else:
      rows.append([document])
      open_rows = [*open_rows[-(_OPEN_ROWS - 1) :], rows[-1]]
  if not rows:
    raise errors.UserError(
        f"no text of the toy world fits into rows of {length} tokens; raise"
        " the lengths in tiny.pretrain and tiny.house"
    )
  zeros = lambda dtype: np.zeros((len(rows), length), dtype)
  packed = Rows(zeros(np.int32), zeros(np.int32), zeros(np.int32), zeros(bool))
  for i, row in enumerate(rows):
    start = 0
    for number, (tokens, prompt_size) in enumerate(row, start=1):
      at = slice(start, start + len(tokens))
      packed.tokens[i, at] = tokens
      packed.segments[i, at] = number
      packed.positions[i, at] = np.arange(len(tokens))
      packed.is_target[i, start + prompt_size : at.stop] = True
      start = at.stop
  return packed
