"""A round of DPO on toy pairs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax.dpo import logps as logps_lib
from selfdev_jax.dpo import lora
from selfdev_jax.dpo import loss as loss_lib
from selfdev_jax.dpo import train as train_lib

_DECODER = models.DecoderConfig(
    vocab_size=32,
    embed=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp=24,
    max_positions=64,
)
_CONFIG = config_lib.Dpo(
    beta=0.5,
    sft_weight=0.1,
    learning_rate=3e-2,
    steps=10,
    batch_size=8,
    lora_rank=4,
    lora_alpha=8.0,
)
_EOS = 0
_PAIRS = [
    records.Pair(1, i, "abc", "d" * (i + 1), "e" * (i + 1), f"d{i}", f"e{i}")
    for i in range(6)
]


def _encode(text, add_special_tokens=True):
  return [1] * add_special_tokens + [ord(c) - ord("a") + 2 for c in text]


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture(scope="module")
def start():
  return lora.init(jax.random.key(1), _DECODER, _CONFIG.lora_rank)


def _train(params, adapter, pairs=_PAIRS, seed=0, **changes):
  return train_lib.train(
      dataclasses.replace(_CONFIG, **changes),
      _DECODER,
      params,
      adapter,
      pairs,
      _encode,
      _EOS,
      jax.random.key(seed),
      label="toy",
  )


def _bits_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_chosen_rises_over_rejected_with_one_compilation(params, start):
  before = jax.tree.map(np.array, (params, start))
  train_lib._step.clear_cache()
  adapter, history = _train(params, start)
  assert len(history) == _CONFIG.steps
  assert set(history[0]) == {
      "loss",
      "rewards/chosen",
      "rewards/rejected",
      "rewards/margins",
      "rewards/accuracies",
      "logps/chosen",
      "logps/rejected",
      "nll_loss",
      "grad_norm",
  }
  assert all(isinstance(v, float) for v in history[0].values())
  dpo = [step["loss"] - 0.1 * step["nll_loss"] for step in history]
  assert math.isclose(dpo[0], math.log(2), rel_tol=1e-4)
  assert dpo[-1] < 0.5 * dpo[0]
  assert history[-1]["rewards/margins"] > 1.0
  assert history[-1]["rewards/accuracies"] == 1.0
  # The arguments were neither changed nor given away.
  _bits_equal(before, (params, start))
  assert jax.tree.structure(adapter) == jax.tree.structure(start)
  for leaf in jax.tree.leaves(adapter):
    assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32
  # The next iteration's round starts from the adapter of this one.
  _train(params, adapter, _PAIRS[::-1], seed=1)
  assert train_lib._step._cache_size() == 1


@pytest.mark.slow
def test_equal_keys_equal_bits(params, start):
  one, same, other = (_train(params, start, seed=seed) for seed in (0, 0, 1))
  _bits_equal(one[0], same[0])
  assert one[1] == same[1]
  assert one[1] != other[1]


@pytest.mark.slow
def test_sharded_equals_unsharded(params, start, monkeypatch):
  assert jax.device_count() == 8
  sharded, history = _train(params, start)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  single, expected = _train(params, start)
  # Float32, the batch summed in another order.
  for got, wanted in zip(history, expected, strict=True):
    assert set(got) == set(wanted)
    for name in got:
      np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-5)
  # Adam's first steps hardly depend on a gradient's size, so one near zero
  # may turn its rounding into a step: the bound is a share of all steps.
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3), sharded, single
  )


@pytest.mark.slow
def test_reference_is_the_starting_adapter_once_a_row(
    params, start, monkeypatch
):
  """A second round starts at margin 0, however far the first one went."""
  moved, history = _train(params, start)
  assert history[-1]["rewards/margins"] > 0.1
  rows = []
  original = train_lib._logps

  def counted(config, decoder, params, adapter, tokens, is_completion):
    if not isinstance(tokens, jax.core.Tracer):
      rows.append(len(tokens))
    return original(config, decoder, params, adapter, tokens, is_completion)

  monkeypatch.setattr(train_lib, "_logps", counted)
  every = [
      dataclasses.replace(pair, rejected=other.rejected)
      for pair in _PAIRS
      for other in _PAIRS
  ]
  _, again = _train(params, moved, every)
  np.testing.assert_allclose(again[0]["rewards/margins"], 0.0, atol=1e-4)
  # 12 distinct rows, filled up for 8 devices, not 72.
  assert sum(rows) == 16


def test_first_step_by_hand(params, start):
  """One step without warm-up is AdamW on the gradient of the loss."""
  pairs = _PAIRS[:1]
  options = dict(
      steps=1, batch_size=1, sft_weight=0.3, weight_decay=0.1, max_grad_norm=0.0
  )
  adapter, (metrics,) = _train(params, start, pairs, **options)
  tokens = np.array([[1, 2, 3, 4, 5, _EOS], [1, 2, 3, 4, 6, _EOS]], np.int32)
  is_completion = np.zeros((2, 6), bool)
  is_completion[:, 4:] = True

  def loss_fn(adapter):
    scaled = models.scale_adapter(
        adapter, _CONFIG.lora_alpha / _CONFIG.lora_rank
    )
    sums, counts = logps_lib.completion_logps(
        _DECODER, params, scaled, tokens, is_completion
    )
    reference = jax.lax.stop_gradient(sums)[None]
    return loss_lib.sigmoid(
        sums[None], reference, counts[:1], beta=_CONFIG.beta, sft_weight=0.3
    )[0]

  value, gradient = jax.jit(jax.value_and_grad(loss_fn))(start)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  assert "nll_loss" in metrics

  def check(before, after, gradient):
    # Adam's first step is lr g / (|g| + eps); b2's root cancels.
    step = gradient / (np.abs(gradient) + 1e-8) + 0.1 * np.asarray(before)
    expected = np.asarray(before) - _CONFIG.learning_rate * step
    sure = np.abs(gradient) > 1e-5  # Elsewhere rounding decides the sign.
    np.testing.assert_allclose(
        np.where(sure, after, 0), np.where(sure, expected, 0), atol=1e-4
    )

  jax.tree.map(check, start, adapter, jax.tree.map(np.asarray, gradient))


@pytest.mark.slow
def test_bfloat16_base_float32_adapter(params, start):
  narrow = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
  # JAX cannot lower its own attention's bfloat16 gradient under "strict".
  with jax.numpy_dtype_promotion("standard"):
    adapter, history = _train(narrow, start)
  assert history[-1]["rewards/margins"] > 0.1
  assert {str(x.dtype) for x in jax.tree.leaves(adapter)} == {"float32"}


def test_non_finite_loss_names_the_step(params, start):
  broken = params | {"embed": np.array(params["embed"])}
  broken["embed"][5] = np.nan  # The letter d.
  with pytest.raises(
      errors.UserError, match=r"toy: loss is nan at step 0 of 10"
  ):
    _train(broken, start)
