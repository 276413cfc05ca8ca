"""Log-probabilities and adapters against transformers, PEFT and float64."""

import dataclasses
import pathlib

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax.dpo import batches
from selfdev_jax.dpo import data as data_lib
from selfdev_jax.dpo import logps as logps_lib
from selfdev_jax.dpo import lora

_DECODER = models.DecoderConfig(
    vocab_size=61,
    embed=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    max_positions=64,
)
_RANK, _ALPHA = 4, 6.0
_EOS = 0
_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

_slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
_statistics = jax.jit(logps_lib.completion_statistics, static_argnums=0)
_forward = jax.jit(models.forward, static_argnums=0)


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, params) -> pathlib.Path:
  path = tmp_path_factory.mktemp("logps") / "model"
  convert.save(path, _DECODER, params)
  return path


def _moved(targets):
  """Both factors non-zero."""
  fresh = jax.eval_shape(
      lambda: lora.init(jax.random.key(0), _DECODER, _RANK, targets)
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda x: rng.normal(0.0, 0.1, x.shape).astype(np.float32), fresh
  )


@pytest.fixture(scope="module")
def adapter():
  return _moved(_TARGETS)


def _make_data() -> data_lib.Data:
  """3 prompts of 5, 1 and 9 tokens with 3, 2 and 1 completions; EOS is 0."""
  rng = np.random.default_rng(6)  # With which the model is right twice.
  draw = lambda n: rng.integers(1, 61, n).astype(np.int32)
  sizes = ((0, 15), (0, 4), (0, 7), (1, 8), (1, 1), (2, 6))
  return data_lib.Data(
      prompts=tuple(map(draw, (5, 1, 9))),
      completions=tuple(
          np.append(draw(size - 1), np.int32(_EOS)) for _, size in sizes
      ),
      prompt_of=np.array([prompt for prompt, _ in sizes], np.int32),
      pairs=np.array([[0, 1], [2, 1], [3, 4]], np.int32),
      source=np.arange(3, dtype=np.int32),
      counts=data_lib.Counts(),
  )


_DATA = _make_data()
_NUMBERS = range(len(_DATA.completions))


def _pack(per_row, shape=(36, 30), rows=6, data=_DATA):
  """The rows, and where among their completions each is."""
  filled = batches.fill(data, _NUMBERS, per_row)
  place = np.zeros(len(_NUMBERS), np.int32)
  for i, row in enumerate(filled):
    place[row] = i * per_row + np.arange(len(row))
  return batches.pack(data, filled, per_row, rows, shape), place


def _of_completions(params, adapter, per_row, **options):
  """The statistics of each of `_NUMBERS`."""
  rows, place = _pack(per_row, **options)
  found = _statistics(_DECODER, params, adapter, rows)
  for leaf in found:
    assert leaf.shape == (len(rows.tokens), per_row)
    assert leaf.dtype == jnp.float32
  return jax.tree.map(lambda x: np.asarray(x).reshape(-1)[place], found)


def _load(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32
  )


def _expected(model):
  """What transformers' logits come to, each completion in a row of its own."""
  found = []
  for number in _NUMBERS:
    prompt = _DATA.prompts[_DATA.prompt_of[number]]
    ids = _DATA.completions[number]
    row = torch.tensor(np.append(prompt, ids)[None], dtype=torch.long)
    with torch.no_grad():
      out = model(row).logits[0, len(prompt) - 1 : -1].double().numpy()
    found.append(_twin(out, ids))
  return logps_lib.Statistics(*(np.array(x) for x in zip(*found, strict=True)))


def _twin(logits, targets):
  """Sums over tokens, float64."""
  logps = _log_softmax(logits)
  return logps_lib.Statistics(
      np.take_along_axis(logps, targets[..., None], axis=-1).sum(),
      -(np.exp(logps) * logps).sum(),
      logits.mean(axis=-1).sum(),
      (logits.argmax(axis=-1) == targets).sum(),
  )


def _log_softmax(logits):
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# --- Of completions ---------------------------------------------------------


@pytest.mark.parametrize("per_row", [1, 2, _slow(3)])
def test_matches_transformers(params, directory, per_row):
  expected = _expected(_load(directory))
  assert expected.correct.any()
  # Logits agree to 5e-5 (float32 on both sides); these are sums of 15.
  for got, wanted in zip(
      _of_completions(params, None, per_row), expected, strict=True
  ):
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def _value_and_gradients(params, adapter, per_row):
  rows, place = _pack(per_row)
  weights = np.random.default_rng(2).normal(size=len(_NUMBERS))
  weights = weights.astype(np.float32)

  def fn(trained):
    adapter, embed, head = trained
    full = params | {"embed": embed, "head": head}
    found = logps_lib.completion_statistics(_DECODER, full, adapter, rows)
    logps = found.logps.reshape(-1)[place]
    return jnp.dot(logps, weights), logps

  trained = (adapter, params["embed"], params["head"])
  return jax.jit(jax.value_and_grad(fn, has_aux=True))(trained)


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full"])
def test_layouts_agree(params, adapter, trains):
  """A prompt that is shared is the prompt that stands there twice."""
  adapter = adapter if trains == "lora" else None
  ((_, padded), padded_gradients), *others = (
      _value_and_gradients(params, adapter, per_row) for per_row in (1, 2, 3)
  )
  size = lambda x: np.linalg.norm(np.asarray(x, np.float64))
  for (_, shared), gradients in others:
    np.testing.assert_allclose(shared, padded, rtol=1e-5)

    def check(path, one, other):
      # The adapter's training gives the head no gradient.
      none = trains == "lora" and path[0].idx == 2
      assert (size(one) == 0) == none, path
      assert size(one - other) <= 1e-5 * size(one), path

    jax.tree_util.tree_map_with_path(check, padded_gradients, gradients)


def test_the_eos_counts_where_it_is_the_padding_too(params):
  """Nothing but its place says that a token is a completion's last."""
  with_eos = _of_completions(params, None, 1)
  # Completion 4 is an EOS alone, and stays.
  cut = tuple(ids[:-1] if len(ids) > 1 else ids for ids in _DATA.completions)
  without = dataclasses.replace(_DATA, completions=cut)
  fewer = _of_completions(params, None, 1, data=without)
  others = np.arange(len(_NUMBERS)) != 4
  assert (with_eos.logps[others] < fewer.logps[others] - 1e-2).all()
  np.testing.assert_array_equal(with_eos.logps[4], fewer.logps[4])


@pytest.mark.parametrize("per_row", [_slow(1), 2])
def test_padding_changes_nothing(params, per_row):
  found = _of_completions(params, None, per_row)
  rows, place = _pack(per_row)
  slots = np.arange(rows.tokens.shape[1])
  tokens = np.where(slots < rows.ends[:, -1:], rows.tokens, 17)
  assert np.any(tokens != rows.tokens)
  other = _statistics(_DECODER, params, None, rows._replace(tokens=tokens))
  for x, y in zip(found, other, strict=True):
    np.testing.assert_array_equal(x, np.asarray(y).reshape(-1)[place])


@pytest.mark.slow
@pytest.mark.parametrize("per_row", [1, 2])
def test_longer_rows_change_nothing(params, per_row):
  for x, y in zip(
      _of_completions(params, None, per_row),
      _of_completions(params, None, per_row, shape=(48, 32), rows=8),
      strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6)


def test_a_completion_does_not_see_the_one_before(params):
  rows, _ = _pack(2)
  prompt, first, second = rows.ends[1]
  assert first < second
  tokens = np.array(rows.tokens)
  tokens[1, prompt:first] = 33
  one, other = (
      np.asarray(_statistics(_DECODER, params, None, rows).logps)
      for rows in (rows, rows._replace(tokens=tokens))
  )
  changed = np.zeros(one.shape, bool)
  changed[1, 0] = True
  np.testing.assert_array_equal(one != other, changed)


def test_fresh_adapter_is_the_identity(params):
  fresh = lora.init(jax.random.key(0), _DECODER, _RANK)
  fresh = models.scale_adapter(fresh, _ALPHA / _RANK)
  np.testing.assert_array_equal(
      *(_of_completions(params, x, 2).logps for x in (None, fresh))
  )


@pytest.mark.parametrize("rslora", [_slow(False), True])
def test_adapter_equals_merged_weights(params, adapter, rslora):
  scale = lora.scale(_RANK, _ALPHA, rslora)
  layers = dict(params["layers"])
  for group, matrices in adapter["layers"].items():
    layers[group] = {
        name: params["layers"][group][name] + scale * ab["b"] @ ab["a"]
        for name, ab in matrices.items()
    }
  merged = _of_completions(params | {"layers": layers}, None, 2)
  found = _of_completions(params, models.scale_adapter(adapter, scale), 2)
  # Float32, other orders of summation; sums of 15.
  np.testing.assert_allclose(found.logps, merged.logps, atol=1e-4)
  np.testing.assert_allclose(found.entropies, merged.entropies, atol=1e-4)


# PEFT 0.21 asks for a property that transformers 5.23 renamed.
@pytest.mark.parametrize(
    "targets, rslora",
    [
        (_TARGETS, False),
        (("q", "v"), True),
        _slow(_TARGETS, True),
        _slow(("down", "k"), False),
    ],
)
def test_peft_loads_the_adapter(params, directory, tmp_path, targets, rslora):
  adapter = _moved(targets)
  convert.save_adapter(
      tmp_path / "adapter",
      adapter,
      config=_DECODER,
      rank=_RANK,
      alpha=_ALPHA,
      rslora=rslora,
      base=str(directory),
  )
  model = peft.PeftModel.from_pretrained(
      _load(directory), str(tmp_path / "adapter")
  )
  expected = _expected(model)
  scale = lora.scale(_RANK, _ALPHA, rslora)
  found = _of_completions(params, models.scale_adapter(adapter, scale), 2)
  np.testing.assert_allclose(found.logps, expected.logps, atol=2e-4)
  # The adapter does something, and its scale is seen.
  other = lora.scale(_RANK, _ALPHA, not rslora)
  for wrong in (None, models.scale_adapter(adapter, other)):
    plain = _of_completions(params, wrong, 2)
    assert np.abs(plain.logps - expected.logps).max() > 0.1
  loaded = convert.load_adapter(tmp_path / "adapter", _DECODER)
  assert loaded.scale == scale
  jax.tree.map(np.testing.assert_array_equal, loaded.params, adapter)


# --- Of tokens --------------------------------------------------------------

# Vocabulary -> (chunk, parts of it). 64 and 60 are divided, 61 and 101 are
# primes and get a filler.
_PARTS = {64: (16, 4), 60: (16, 4), 61: (16, 4), 101: (10, 11), 9: (16, 1)}
# Vocabulary, softcap.
_CASES = (
    (64, None),
    (61, 3.0),
    _slow(101, None),
    _slow(60, 3.0),
    _slow(64, 3.0),
    _slow(61, None),
    _slow(101, 3.0),
    _slow(9, None),
)


def _inputs(vocab, batch=2, seq=7, embed=12, seed=0):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(batch, seq, embed)).astype(np.float32)
  head = rng.normal(size=(vocab, embed)).astype(np.float32)
  targets = rng.integers(0, vocab, (batch, seq)).astype(np.int32)
  # Some are the likeliest.
  targets[:, ::3] = (hidden @ head.T).argmax(axis=-1)[:, ::3]
  return tuple(map(jnp.array, (hidden, head, targets)))


@pytest.fixture
def cut(monkeypatch):
  """cut(vocab): from now on a vocabulary is computed in `_PARTS`."""

  def cut(vocab):
    chunk, parts = _PARTS[vocab]
    monkeypatch.setattr(logps_lib, "_CHUNK", chunk)
    found = logps_lib._parts(jnp.zeros((vocab, 3)))
    assert found.shape == (-(-vocab // parts), parts, 3)

  return cut


@pytest.mark.parametrize("vocab, softcap", _CASES)
def test_tokens_match_float64(cut, vocab, softcap):
  cut(vocab)
  hidden, head, targets = _inputs(vocab)
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
  targets = np.asarray(targets)
  if softcap is not None:
    logits = softcap * np.tanh(logits / softcap)
  logps = _log_softmax(logits)
  expected = {
      "logps": np.take_along_axis(logps, targets[..., None], axis=-1)[..., 0],
      "entropies": -(np.exp(logps) * logps).sum(axis=-1),
      "mean_logits": logits.mean(axis=-1),
      "correct": logits.argmax(axis=-1) == targets,
  }
  assert 0 < expected["correct"].mean() < 1
  got = logps_lib.token_statistics(hidden, head, targets, softcap)
  for name, numbers in expected.items():
    found = getattr(got, name)
    assert found.dtype == jnp.float32 and found.shape == targets.shape
    np.testing.assert_allclose(found, numbers, rtol=1e-5, atol=1e-5)


def _plain(hidden, head, targets, softcap):
  logits = jnp.einsum("bsd,vd->bsv", hidden, head)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  logps = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("vocab, softcap", _CASES)
def test_gradients_match_autodiff(cut, vocab, softcap):
  cut(vocab)
  hidden, head, targets = _inputs(vocab)
  weights = np.random.default_rng(1).normal(size=targets.shape)
  weights = weights.astype(np.float32)

  def gradients(fn):
    weigh = lambda *inputs: jnp.sum(weights * fn(*inputs, targets, softcap))
    return jax.jit(jax.grad(weigh, argnums=(0, 1)))(hidden, head)

  def ours(*inputs, trains_head=True):
    return logps_lib.token_statistics(*inputs, trains_head=trains_head).logps

  expected = gradients(_plain)
  found = gradients(ours)
  for got, wanted in zip(found, expected, strict=True):
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=5e-6)
  frozen = gradients(lambda *inputs: ours(*inputs, trains_head=False))
  np.testing.assert_allclose(frozen[0], found[0], rtol=1e-5, atol=2e-6)
  np.testing.assert_array_equal(frozen[1], np.zeros_like(head))


def test_only_logps_have_a_gradient():
  inputs = _inputs(9)

  def fn(hidden, head):
    found = logps_lib.token_statistics(hidden, head, inputs[2])
    return jnp.sum(found.entropies + found.mean_logits + found.correct)

  for gradient in jax.grad(fn, argnums=(0, 1))(*inputs[:2]):
    assert not np.any(gradient)


@pytest.mark.parametrize("shift", [300.0, _slow(-300.0)])
def test_large_logits_are_finite(shift, monkeypatch):
  """All far from 0, and the whole vocabulary but one token unreachable."""
  monkeypatch.setattr(logps_lib, "_CHUNK", 4)
  hidden = jnp.ones((1, 2, 1), jnp.float32)
  head = jnp.full((11, 1), shift, jnp.float32).at[7].add(200.0)
  targets = np.array([[7, 3]], np.int32)

  def fn(hidden, head):
    found = logps_lib.token_statistics(hidden, head, targets)
    return jnp.sum(found.logps), found

  (_, found), gradients = jax.value_and_grad(fn, (0, 1), has_aux=True)(
      hidden, head
  )
  np.testing.assert_allclose(found.logps, [[0.0, -200.0]], atol=1e-4)
  np.testing.assert_allclose(found.entropies, 0.0, atol=1e-4)
  np.testing.assert_array_equal(found.correct, [[1.0, 0.0]])
  for gradient in gradients:
    assert np.isfinite(gradient).all()


def test_bfloat16_logits_lose_little():
  """512 tokens of the same bfloat16 inputs, against float64."""
  vocab, tokens, embed = 8192, 512, 64
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(1, tokens, embed)), jnp.bfloat16)
  head = jnp.asarray(
      rng.normal(0.0, 3 * embed**-0.5, (vocab, embed)), jnp.bfloat16
  )
  targets = rng.integers(0, vocab, (1, tokens)).astype(np.int32)
  wide = np.asarray(hidden, np.float64)[0] @ np.asarray(head, np.float64).T
  expected = _log_softmax(wide)[np.arange(tokens), targets[0]]
  assert vocab > logps_lib._CHUNK
  got = logps_lib.token_statistics(hidden, head, targets).logps[0]
  assert got.dtype == jnp.float32
  got = np.asarray(got, np.float64)
  assert np.abs(got - expected).sum() < 0.01
  # What it would be with logits in bfloat16; of 7000 nats in all.
  narrow = jax.nn.log_softmax(hidden[0] @ head.T)
  narrow = np.asarray(narrow, np.float64)[np.arange(tokens), targets[0]]
  assert np.abs(narrow - expected).sum() > 1.0


@pytest.mark.slow
def test_bfloat16_model_loses_little(params):
  """The same bfloat16 hidden states, the logsumexp in float64."""
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  got = _of_completions(narrow, None, 1).logps
  head = np.asarray(narrow["head"], np.float64)
  for number in _NUMBERS:
    prompt = _DATA.prompts[_DATA.prompt_of[number]]
    ids = _DATA.completions[number]
    hidden = _forward(_DECODER, narrow, np.append(prompt, ids)[None])
    logits = np.asarray(hidden, np.float64)[0, len(prompt) - 1 : -1] @ head.T
    np.testing.assert_allclose(got[number], _twin(logits, ids)[0], atol=1e-2)


# --- Memory -----------------------------------------------------------------


def _sizes(jaxpr):
  """The size of every array that a program makes, those within included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield variable.aval.size
    for inner in core.jaxprs_in_params(equation.params):
      yield from _sizes(inner)


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_logits_of_a_batch_never_exist(params, adapter, trains, monkeypatch):
  rows, _ = _pack(2)
  predicted = rows.targets.size
  vocab = 61 * 64
  big = dataclasses.replace(_DECODER, vocab_size=vocab)
  head = jax.ShapeDtypeStruct((vocab, _DECODER.embed), np.float32)
  params = params | {"embed": head, "head": head}
  adapter = adapter if trains == "lora" else None

  def largest(chunk):
    monkeypatch.setattr(logps_lib, "_CHUNK", chunk)

    def fn(params, adapter):
      found = logps_lib.completion_statistics(big, params, adapter, rows)
      return jnp.sum(found.logps)

    argnum = 1 if trains == "lora" else 0
    program = jax.make_jaxpr(jax.value_and_grad(fn, argnum))(params, adapter)
    return max(_sizes(program.jaxpr))

  assert largest(vocab) >= predicted * vocab
  # A part's logits, or the head (its gradient, too).
  least = max(predicted * vocab // 16, vocab * _DECODER.embed)
  assert largest(vocab // 16) <= least < predicted * vocab
