import random

import numpy as np
import transformers

from selfdev_jax import programs
from selfdev_jax.evaluation import arithmetic
from selfdev_jax.tiny import corpus


def _documents():
  rng = random.Random(0)
  documents = corpus.word_problems(rng, 60, arithmetic.OPERATIONS)
  documents += corpus.equations(rng, 40)
  documents += corpus.programs(rng, 30, programs.load_prompt("tiny"))
  rng.shuffle(documents)
  return documents


def test_tokenizer_is_lossless_and_digits_are_single(tmp_path):
  documents = _documents()
  tokenizer = corpus.train_tokenizer(documents, 375)
  assert tokenizer.get_vocab_size() == 375
  corpus.save_tokenizer(tokenizer, tmp_path)
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert loaded.eos_token_id == tokenizer.token_to_id(corpus.EOS)
  for document in documents:
    text = document.prompt + document.target
    assert loaded.decode(loaded.encode(text)) == text
  multi = [t for t in tokenizer.get_vocab() if sum(c.isdigit() for c in t) > 1]
  assert not multi


def test_packing_keeps_every_document_whole_and_apart():
  documents = _documents()
  tokenizer = corpus.train_tokenizer(documents, 375)
  rows = corpus.pack(documents, tokenizer, 256)
  eos = tokenizer.token_to_id(corpus.EOS)
  found = []
  for tokens, segments, positions, is_target in zip(
      rows.tokens, rows.segments, rows.positions, rows.is_target, strict=True
  ):
    assert not tokens[segments == 0].any()
    for number in range(1, segments.max() + 1):
      here = segments == number
      ids = tokens[here]
      np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
      assert ids[-1] == eos and eos not in ids[:-1]
      split = int((~is_target[here]).sum())
      found.append(
          (
              tokenizer.decode(ids[:split].tolist()),
              tokenizer.decode(ids[split:-1].tolist()),
          )
      )
  expected = [(d.prompt, d.target) for d in documents]
  assert sorted(found) == sorted(expected)
  assert (rows.segments > 0).mean() > 0.8


def test_a_document_longer_than_a_row_is_left_out():
  documents = _documents()
  tokenizer = corpus.train_tokenizer(documents, 375)
  rows = corpus.pack(documents, tokenizer, 64)
  longest = max(
      len(tokenizer.encode(d.prompt + d.target).ids) + 1 for d in documents
  )
  assert longest > 64
  # Programs, which are longer, are gone; the others are all there.
  others = [d for d in documents if "def merge" not in d.prompt]
  assert sum(row.max() for row in rows.segments) == len(others)
