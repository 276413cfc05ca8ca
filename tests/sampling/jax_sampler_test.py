import random

import jax
import jax.numpy as jnp
import numpy as np
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


@pytest.fixture
def sampler(tokenizer):
  sampler = sampling.JaxSampler(_CONFIG, tokenizer, (tokenizer.eos_token_id,))
  sampler.swap_weights(models.init_params(_CONFIG, 0), "0")
  return sampler


def _keys(n):
  return jax.vmap(jax.random.key)(jnp.arange(n))


@pytest.mark.parametrize(
    "temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0]
)
def test_a_text_does_not_depend_on_its_batch(sampler, temperature):
  said = []
  for batch_size in (1, 2, 8):
    batches = list(
        sampler.generate(
            _PROMPTS,
            _keys(5),
            max_new_tokens=12,
            batch_size=batch_size,
            temperature=temperature,
        )
    )
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (
        len(batches) - 1
    )
    said.append([g.text for batch in batches for g in batch])
  assert said[0] == said[1] == said[2]


def _one(sampler, prompts, keys=None, max_new_tokens=12, **settings):
  settings = {"batch_size": 8, "temperature": 1.0} | settings
  batches = sampler.generate(
      prompts, keys, max_new_tokens=max_new_tokens, **settings
  )
  return [g for batch in batches for g in batch]


def test_a_shared_prompt_gives_what_separate_rows_give(sampler):
  shared = _one(sampler, _PROMPTS[:1] * 4, _keys(4))
  mixed = _one(sampler, [*_PROMPTS[:1] * 3, "A"], _keys(4))
  assert shared[:3] == mixed[:3]
  assert len({g.text for g in shared}) > 1


def test_other_weights_other_texts(sampler):
  first = _one(sampler, _PROMPTS, temperature=0.0)
  sampler.swap_weights(models.init_params(_CONFIG, 7), "7")
  second = _one(sampler, _PROMPTS, temperature=0.0)
  sampler.swap_weights(models.init_params(_CONFIG, 0), "0")
  assert first != second
  assert _one(sampler, _PROMPTS, temperature=0.0) == first


def test_n_texts_a_prompt_follow_each_other(sampler):
  several = _one(sampler, _PROMPTS[:2], _keys(2), n=3)
  assert len(several) == 6 and len({g.tokens for g in several}) == 6
  (alone,) = _one(
      sampler, _PROMPTS[1:2], jax.random.fold_in(_keys(2)[1], 2)[None]
  )
  assert several[5] == alone


def test_a_stop_text_ends_a_generation(sampler):
  (whole,) = _one(sampler, _PROMPTS[:1], temperature=0.0)
  stop = whole.text[5:8]
  (cut,) = _one(sampler, _PROMPTS[:1], temperature=0.0, stop=["never", stop])
  assert cut.text == whole.text[: whole.text.index(stop)]
  assert cut.finished


@pytest.mark.slow
def test_top_p_draws_among_the_likeliest(sampler, tokenizer):
  prompt = tokenizer.encode(_PROMPTS[0])
  keys = _keys(200)
  texts = lambda top_p: {
      g.tokens
      for g in _one(
          sampler, [prompt] * 200, keys, 1, batch_size=200, top_p=top_p
      )
  }
  greedy = {g.tokens for g in _one(sampler, [prompt], None, 1, temperature=0.0)}
  assert texts(1e-6) == greedy
  weights = models.init_params(_CONFIG, 0)
  hidden = models.forward(_CONFIG, weights, jnp.array([prompt]))
  logits = models.logits(_CONFIG, weights, hidden[0, -1])
  order = np.argsort(-np.asarray(logits))
  before = np.cumsum(np.asarray(jax.nn.softmax(logits))[order])
  nucleus = set(order[: 1 + np.searchsorted(before, 0.1)].tolist())
  drawn = {token for (token,) in texts(0.1) if token is not None}
  assert drawn <= nucleus and len(drawn) > 5
  assert len(texts(1.0)) > len(nucleus)


@pytest.mark.slow
def test_logprobs_are_those_of_the_forward_pass(sampler, tokenizer):
  rows = [tokenizer.encode(prompt) for prompt in (_PROMPTS[0], _PROMPTS[2])]
  weights = models.init_params(_CONFIG, 0)
  for row, got in zip(rows, sampler.logprobs(rows), strict=True):
    hidden = models.forward(_CONFIG, weights, jnp.array([row]))
    logits = models.logits(_CONFIG, weights, hidden[0]).astype(jnp.float32)
    expected = jax.nn.log_softmax(logits)[jnp.arange(len(row) - 1), row[1:]]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_loses_its_beginning(sampler, tokenizer):
  prompt = tokenizer.encode(" ".join(_PROMPTS) * 4)
  assert len(prompt) > 64
  long, short = _one(sampler, [prompt, _PROMPTS[1]], temperature=0.0)
  assert long.truncated and not short.truncated
  (end,) = _one(sampler, [prompt[-52:]], temperature=0.0)
  assert end.tokens == long.tokens and not end.truncated


def test_no_room_for_any_prompt_is_told(sampler):
  with pytest.raises(errors.UserError, match="leave no room for a prompt"):
    _one(sampler, ["A"], None, 64)


def test_health_asks_for_weights(sampler):
  sampler.health()
  sampler.close()
  with pytest.raises(sampling.SamplerError, match="no weights"):
    sampler.health()
