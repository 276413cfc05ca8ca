"""vLLM itself, with weights from JAX swapped into it; see `make vllm-env`."""

import concurrent.futures
import os
import pathlib
import random
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax import sampling
from selfdev_jax.evaluation import arithmetic
from selfdev_jax.sampling import vllm
from selfdev_jax.sampling.vllm import guard
from selfdev_jax.tiny import corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs_vllm,
    pytest.mark.timeout(900),
]

_MODELS = {
    "untied, float32": (False, jnp.float32),
    "tied, bfloat16": (True, jnp.bfloat16),
}
_NEW = 16


def _params(decoder, seed, dtype):
  params = models.init_params(decoder, seed)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


class _Pair:
  """Two engines, of weights 0 and 1, and the JAX sampler beside them."""

  def __init__(self, root: pathlib.Path, tied: bool, dtype):
    self.decoder = models.DecoderConfig(
        vocab_size=300,
        embed=64,
        layers=3,
        heads=2,
        kv_heads=1,
        head_dim=32,
        mlp=96,
        max_positions=128,
        tied_head=tied,
    )
    self.dtype = dtype
    documents = corpus.word_problems(
        random.Random(0), 64, arithmetic.OPERATIONS
    )
    corpus.save_tokenizer(corpus.train_tokenizer(documents, 300), root / "tok")
    self.params = [_params(self.decoder, i, dtype) for i in range(2)]
    directories = [root / f"model-{i}" for i in range(2)]
    for directory, params in zip(directories, self.params, strict=True):
      convert.save(directory, self.decoder, params, like=root / "tok")
    self.tokenizer = convert.load_tokenizer(directories[0])
    eos = convert.end_tokens(directories[0], self.tokenizer)
    self.prompts = [
        (d.prompt + d.target)[: 8 + i % 40] for i, d in enumerate(documents)
    ]
    self.rows = [self.tokenizer.encode(text) for text in self.prompts]

    def start(directory):
      return sampling.VllmSampler(
          self.decoder,
          self.tokenizer,
          eos,
          directory=directory,
          dtype=dtype,
          max_length=128,
          log_dir=directory / "logs",
      )

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      self.swapped, self.fresh = pool.map(start, directories)
    self.jax = sampling.JaxSampler(self.decoder, self.tokenizer, eos)

  def close(self):
    self.swapped.close()
    self.fresh.close()


@pytest.fixture(scope="module", params=_MODELS)
def pair(request, tmp_path_factory):
  pair = _Pair(tmp_path_factory.mktemp("vllm"), *_MODELS[request.param])
  yield pair
  pair.close()


def _greedy(sampler, prompts):
  batches = sampler.generate(prompts, max_new_tokens=_NEW, batch_size=64)
  return [g for batch in batches for g in batch]


def _farthest(found, expected):
  return max(
      float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)
  )


def test_after_a_swap_it_is_a_fresh_engine(pair):
  before = _greedy(pair.swapped, pair.prompts)
  pair.swapped.swap_weights(pair.params[1], "one")
  assert _greedy(pair.swapped, pair.prompts) == _greedy(
      pair.fresh, pair.prompts
  )
  assert _greedy(pair.swapped, pair.prompts) != before
  rows = pair.rows[:16]
  expected = pair.fresh.logprobs(rows)
  assert _farthest(pair.swapped.logprobs(rows), expected) < 1e-4


def test_twenty_swaps_in_a_row(pair):
  a, b = pair.params
  mixed = {**a, "layers": {**a["layers"], "mlp": b["layers"]["mlp"]}}
  tolerance = 1e-4 if pair.dtype == jnp.float32 else 0.3
  rows, prompts = pair.rows[:8], pair.prompts[:8]
  pair.swapped.swap_weights(b, "one")
  assert pair.swapped.engine == "vllm 0.32.0"
  of_one, logprobs_of_one = _greedy(pair.fresh, prompts), pair.fresh.logprobs(
      rows
  )
  for i in range(20):
    # Whole models, and the MLP alone on top of another model's attention.
    params = (a, mixed, b)[i % 3]
    pair.swapped.swap_weights(params, f"swap {i}")
    pair.jax.swap_weights(params, f"swap {i}")
    logprobs = pair.swapped.logprobs(rows)
    assert _farthest(logprobs, pair.jax.logprobs(rows)) < tolerance, i
    said = _greedy(pair.swapped, prompts)  # The same prompts: no stale cache.
    assert (said == of_one) == (params is b)
    if params is b:
      assert _farthest(logprobs, logprobs_of_one) < 1e-4


def test_only_the_mlp_is_sent_where_only_it_differs(pair, monkeypatch):
  a, b = pair.params
  pair.swapped.swap_weights(a, "zero")
  names = []
  send = pair.swapped._transport.send

  def record(client, tensors):
    tensors = list(tensors)
    names.extend(name for group in tensors for name, _ in group)
    send(client, tensors)

  monkeypatch.setattr(pair.swapped._transport, "send", record)
  mixed = {**a, "layers": {**a["layers"], "mlp": b["layers"]["mlp"]}}
  pair.swapped.swap_weights(mixed, "mlp")
  kinds = {name.split(".")[-2] for name in names}
  assert kinds == {"gate_proj", "up_proj", "down_proj"}
  assert len(names) == 3 * pair.decoder.layers


def test_greedy_text_is_that_of_jax(pair):
  if pair.dtype != jnp.float32:
    pytest.skip("rounded to bfloat16, near ties fall either way")
  for sampler in (pair.swapped, pair.jax):
    sampler.swap_weights(pair.params[1], "one")
  assert len(pair.prompts) == 64
  assert _greedy(pair.swapped, pair.prompts) == _greedy(pair.jax, pair.prompts)


def test_seeded_texts_are_reproduced_whatever_the_batch(pair):
  pair.swapped.swap_weights(pair.params[1], "one")
  keys = jax.vmap(jax.random.key)(jnp.arange(40))
  draw = lambda size: [
      g.text
      for batch in pair.swapped.generate(
          pair.prompts[:40],
          keys,
          max_new_tokens=_NEW,
          batch_size=size,
          temperature=1.0,
      )
      for g in batch
  ]
  texts = draw(40)
  assert draw(7) == texts and len(set(texts)) == 40


def test_draws_have_the_distribution_of_jax(pair):
  if pair.dtype != jnp.float32:
    pytest.skip("once is enough")
  n = 1500
  prompt = pair.rows[0]
  params = pair.params[1]
  hidden = models.forward(pair.decoder, params, jnp.array([prompt]))
  logits = models.logits(pair.decoder, params, hidden[0, -1])
  expected = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
  expected = expected.astype(np.float64)
  likeliest = np.argsort(-expected)[:60]
  expected = np.append(expected[likeliest], 1 - expected[likeliest].sum())
  for first, sampler in ((0, pair.swapped), (n, pair.jax)):
    sampler.swap_weights(params, "one")
    keys = jax.vmap(jax.random.key)(jnp.arange(first, first + n))
    tokens = [
        (g.tokens or (pair.tokenizer.eos_token_id,))[0]
        for batch in sampler.generate(
            [prompt] * n,
            keys,
            max_new_tokens=1,
            batch_size=500,
            temperature=1.0,
        )
        for g in batch
    ]
    seen = np.array([tokens.count(token) for token in likeliest])
    seen = np.append(seen, n - seen.sum())
    assert scipy.stats.chisquare(seen, n * expected).pvalue > 1e-3


def test_an_engine_killed_while_it_writes_is_replaced(pair, capsys):
  if pair.dtype != jnp.float32:
    pytest.skip("once is enough")
  pair.swapped.swap_weights(pair.params[1], "one")
  expected = _greedy(pair.swapped, pair.prompts[:32])
  batches = pair.swapped.generate(
      pair.prompts[:32], max_new_tokens=_NEW, batch_size=16
  )
  said = next(batches)
  for pid in guard.below(pair.swapped._server._process.pid):
    os.kill(pid, signal.SIGKILL)
  said += next(batches)
  assert said == expected
  assert "a new engine is started" in capsys.readouterr().err
  assert pair.swapped._client.weight_version() == "one"
  pair.swapped.health()


# The last one: the engine is lost by it.
def test_a_part_of_a_fused_group_is_refused(pair):
  pair.swapped.swap_weights(pair.params[0], "zero")
  client, transport = pair.swapped._client, pair.swapped._transport
  layer = pair.params[1]["layers"]["attention"]
  name = "model.layers.0.self_attn.q_proj.weight"
  client.start_weight_update()
  with pytest.raises(vllm.EngineError, match="came without") as error:
    transport.send(client, [[(name, np.asarray(layer["q"])[0])]])
  assert "k_proj" in str(error.value) and "v_proj" in str(error.value)
