import random

import jax
import jax.numpy as jnp
import pytest
import transformers

from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import sampling
from selfdev_jax.evaluation import arithmetic
from selfdev_jax.tiny import corpus


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  documents = corpus.word_problems(random.Random(0), 60, arithmetic.OPERATIONS)
  corpus.save_tokenizer(corpus.train_tokenizer(documents, 300), directory)
  return transformers.AutoTokenizer.from_pretrained(directory)


_CONFIG = models.DecoderConfig(
    vocab_size=300,
    embed=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp=24,
    max_positions=64,
)
_PROMPTS = ["Q: Ann has 12 apples", "A", "Ben has 3 toys. How", "There", "x y"]


def _sampler(tokenizer, batch_size, seed=0):
  sampler = sampling.JaxSampler(
      _CONFIG, tokenizer, batch_size, (tokenizer.eos_token_id,)
  )
  sampler.swap_weights(models.init_params(_CONFIG, seed))
  return sampler


def _keys(n):
  return jax.vmap(jax.random.key)(jnp.arange(n))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_does_not_depend_on_its_batch(tokenizer, temperature):
  texts = []
  for batch_size in (1, 2, 8):
    batches = list(
        _sampler(tokenizer, batch_size).generate(
            _PROMPTS, _keys(5), max_new_tokens=12, temperature=temperature
        )
    )
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (
        len(batches) - 1
    )
    texts.append([g.text for batch in batches for g in batch])
  assert texts[0] == texts[1] == texts[2]


def test_a_shared_prompt_gives_what_separate_rows_give(tokenizer):
  sampler = _sampler(tokenizer, 4)
  shared = next(
      sampler.generate(
          _PROMPTS[:1] * 4, _keys(4), max_new_tokens=12, temperature=1.0
      )
  )
  mixed = next(
      sampler.generate(
          [*_PROMPTS[:1] * 3, "A"], _keys(4), max_new_tokens=12, temperature=1.0
      )
  )
  assert shared[:3] == mixed[:3]
  assert len({g.text for g in shared}) > 1


def test_other_weights_other_texts(tokenizer):
  sampler = _sampler(tokenizer, 5)
  first = next(sampler.generate(_PROMPTS, max_new_tokens=8))
  sampler.swap_weights(models.init_params(_CONFIG, 7))
  second = next(sampler.generate(_PROMPTS, max_new_tokens=8))
  sampler.swap_weights(models.init_params(_CONFIG, 0))
  assert first != second
  assert next(sampler.generate(_PROMPTS, max_new_tokens=8)) == first


def test_a_prompt_that_does_not_fit_is_told(tokenizer):
  with pytest.raises(errors.UserError, match="exceed the model's 64 positions"):
    next(_sampler(tokenizer, 1).generate(["A"], max_new_tokens=60))
