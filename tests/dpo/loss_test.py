"""The loss against float64 NumPy, formulas by hand, and torch's autograd."""

import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import torch

from selfdev_jax.dpo import loss

_LOG2 = math.log(2.0)


def _batch(seed=0, n=6, spread=30.0):
  rng = np.random.default_rng(seed)
  logps = -rng.uniform(1.0, spread, (n, 2)).astype(np.float32)
  reference = -rng.uniform(1.0, spread, (n, 2)).astype(np.float32)
  return logps, reference, rng.integers(1, 40, n).astype(np.int32)


def _twin(logps, reference, tokens, beta, label_smoothing, sft_weight):
  """The same in float64, the log-sigmoid spelled out."""
  logps, reference = logps.astype(np.float64), reference.astype(np.float64)
  rewards = beta * (logps - reference)
  h = rewards[:, 0] - rewards[:, 1]
  value = np.mean(
      (1 - label_smoothing) * np.logaddexp(0, -h)
      + label_smoothing * np.logaddexp(0, h)
  )
  nll = -np.sum(logps[:, 0]) / np.sum(tokens)
  metrics = {
      "loss": value + sft_weight * nll,
      "rewards/chosen": rewards[:, 0].mean(),
      "rewards/rejected": rewards[:, 1].mean(),
      "rewards/margins": h.mean(),
      "rewards/accuracies": np.mean(h > 0),
      "logps/chosen": logps[:, 0].mean(),
      "logps/rejected": logps[:, 1].mean(),
  }
  return metrics | ({"nll_loss": nll} if sft_weight else {})


_CASES = (
    {"beta": 0.01, "label_smoothing": 0.0, "sft_weight": 0.0},
    {"beta": 0.3, "label_smoothing": 0.0, "sft_weight": 0.0},
    {"beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.0},
    {"beta": 0.3, "label_smoothing": 0.0, "sft_weight": 0.5},
    {"beta": 2.0, "label_smoothing": 0.5, "sft_weight": 1.0},
)


class SigmoidTest(parameterized.TestCase):

  @parameterized.parameters(*_CASES)
  def test_matches_float64_twin(self, **options):
    batch = _batch()
    value, metrics = loss.sigmoid(*batch, **options)
    expected = _twin(*batch, **options)
    self.assertEqual(set(metrics), set(expected))
    self.assertEqual(value, metrics["loss"])
    for name, number in expected.items():
      self.assertEqual(metrics[name].dtype, jnp.float32)
      # Sums of a few numbers of size 30 in float32.
      np.testing.assert_allclose(metrics[name], number, rtol=2e-6, atol=2e-6)

  @parameterized.parameters(*_CASES)
  def test_gradient_matches_torch(self, **options):
    logps, reference, tokens = _batch(1)
    gradient = jax.grad(
        lambda x: loss.sigmoid(x, reference, tokens, **options)[0]
    )(jnp.array(logps))
    x = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    rewards = options["beta"] * (x - torch.tensor(reference).double())
    h = rewards[:, 0] - rewards[:, 1]
    smoothing = options["label_smoothing"]
    value = (
        -(1 - smoothing) * torch.nn.functional.logsigmoid(h)
        - smoothing * torch.nn.functional.logsigmoid(-h)
    ).mean() - options["sft_weight"] * x[:, 0].sum() / int(tokens.sum())
    value.backward()
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=2e-5, atol=1e-7)

  def test_by_hand(self):
    """beta 0.1: h = 0.1 ((-1 + 3) - (-5 + 4)) = 0.3."""
    logps, reference = np.array([[[-1, -5]], [[-3, -4]]], np.float32)
    tokens = np.array([2], np.int32)
    value, metrics = loss.sigmoid(logps, reference, tokens, beta=0.1)
    np.testing.assert_allclose(value, math.log1p(math.exp(-0.3)), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.3, rtol=1e-6)
    smoothed, _ = loss.sigmoid(
        logps, reference, tokens, beta=0.1, label_smoothing=0.25
    )
    # -log s(-h) = -log s(h) + h.
    np.testing.assert_allclose(smoothed, value + 0.25 * 0.3, rtol=1e-6)
    with_sft, _ = loss.sigmoid(
        logps, reference, tokens, beta=0.1, sft_weight=2.0
    )
    np.testing.assert_allclose(with_sft, value + 2.0 * 0.5, rtol=1e-6)

  def test_log_2_at_the_reference(self):
    logps, _, tokens = _batch()
    value, metrics = loss.sigmoid(logps, logps, tokens, beta=0.5)
    np.testing.assert_allclose(value, _LOG2, rtol=1e-6)
    self.assertEqual(metrics["rewards/margins"], 0.0)
    self.assertEqual(metrics["rewards/accuracies"], 0.0)

  @parameterized.parameters(1e4, -1e4)
  def test_finite_at_extreme_margins(self, margin):
    logps = np.array([[margin, 0.0]], np.float32)
    zero, one = np.zeros((1, 2), np.float32), np.ones(1, np.int32)

    def fn(x):
      return loss.sigmoid(x, zero, one, beta=1.0)[0]

    value, gradient = jax.value_and_grad(fn)(logps)
    np.testing.assert_allclose(value, max(0.0, -margin), rtol=1e-6)
    self.assertTrue(np.isfinite(gradient).all())
