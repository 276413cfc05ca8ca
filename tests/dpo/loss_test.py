"""The losses against float64 NumPy, formulas by hand, and torch's autograd."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from selfdev_jax.dpo import loss


def _batch(seed=0, n=6):
  rng = np.random.default_rng(seed)
  logps, reference = -rng.uniform(1.0, 30.0, (2, n, 2)).astype(np.float32)
  return logps, reference, rng.integers(1, 40, (n, 2)).astype(np.int32)


def _twin(kind, logps, reference, lengths, beta, e=0.0, normalized=False):
  """The same in float64, the log-sigmoid spelled out."""
  ratios = logps.astype(np.float64) - reference
  if normalized:
    ratios /= lengths
  m = ratios[:, 0] - ratios[:, 1]
  right, wrong = np.logaddexp(0, -beta * m), np.logaddexp(0, beta * m)
  return {
      "sigmoid": lambda: (1 - e) * right + e * wrong,
      "robust": lambda: ((1 - e) * right - e * wrong) / (1 - 2 * e),
      "hinge": lambda: np.maximum(0, 1 - beta * m),
      "ipo": lambda: (m - 0.5 / beta) ** 2,
  }[kind]()


def _torch_losses(kind, ratios, beta, e):
  """As TRL writes them; its sigmoid has no label smoothing, cDPO has."""
  m = ratios[:, 0] - ratios[:, 1]
  right = torch.nn.functional.logsigmoid(beta * m)
  wrong = torch.nn.functional.logsigmoid(-beta * m)
  if kind == "sigmoid":
    return -(1 - e) * right - e * wrong
  if kind == "robust":
    return (-(1 - e) * right + e * wrong) / (1 - 2 * e)
  if kind == "hinge":
    return torch.relu(1 - beta * m)
  return (m - 1 / (2 * beta)) ** 2


# Kind, beta, label smoothing, length-normalised.
_CASES = (
    ("sigmoid", 0.01, 0.0, False),
    ("sigmoid", 0.3, 0.0, True),
    ("sigmoid", 0.3, 0.1, False),
    ("sigmoid", 2.0, 0.5, True),
    ("robust", 0.01, 0.0, False),
    ("robust", 0.3, 0.1, False),
    ("robust", 2.0, 0.4, True),
    ("hinge", 0.05, 0.0, False),
    ("hinge", 1.0, 0.0, True),
    ("ipo", 0.1, 0.0, True),
    ("ipo", 0.5, 0.0, False),
)


def _losses(case, batch):
  kind, beta, e, normalized = case
  return loss.pair_losses(
      kind,
      *map(jnp.array, batch),
      beta=beta,
      label_smoothing=e,
      length_normalized=normalized,
  )


def test_every_loss_is_a_case():
  assert {case[0] for case in _CASES} == set(loss.LOSSES)
  assert set(loss.SMOOTHED) == {case[0] for case in _CASES if case[2]}


@pytest.mark.parametrize("case", _CASES)
def test_matches_float64_twin(case):
  kind, beta, e, normalized = case
  batch = _batch()
  got = _losses(case, batch)
  assert got.shape == (6,) and got.dtype == jnp.float32
  # A margin of numbers of size 30, in float32; ipo squares it.
  np.testing.assert_allclose(
      got, _twin(kind, *batch, beta, e, normalized), rtol=1e-5, atol=2e-6
  )


@pytest.mark.parametrize("case", _CASES)
def test_gradient_matches_torch(case):
  kind, beta, e, normalized = case
  logps, reference, lengths = _batch(1)
  gradient = jax.grad(
      lambda x: jnp.mean(_losses(case, (x, reference, lengths)))
  )(jnp.array(logps))
  x = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
  ratios = x - torch.tensor(reference, dtype=torch.float64)
  if normalized:
    ratios = ratios / torch.tensor(lengths)
  _torch_losses(kind, ratios, beta, e).mean().backward()
  assert np.abs(x.grad.numpy()).max() > 1e-4
  np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=2e-5, atol=1e-7)


def test_by_hand():
  """beta 0.1: beta m = 0.1 ((-1 + 3) - (-5 + 4)) = 0.3."""
  batch = (
      np.array([[-1, -5]], np.float32),
      np.array([[-3, -4]], np.float32),
      np.array([[4, 2]], np.int32),
  )
  s = math.log1p(math.exp(-0.3))  # -log s(-h) = -log s(h) + h.
  t = math.log1p(math.exp(-0.1))  # 0.1 (2 / 4 + 1 / 2) with lengths.
  for case, expected in (
      (("sigmoid", 0.1, 0.0, False), s),
      (("sigmoid", 0.1, 0.25, False), s + 0.25 * 0.3),
      (("sigmoid", 0.1, 0.0, True), t),
      (("robust", 0.1, 0.25, False), 2 * (0.75 * s - 0.25 * (s + 0.3))),
      (("hinge", 0.1, 0.0, False), 0.7),
      (("hinge", 0.4, 0.0, False), 0.0),
      (("ipo", 0.1, 0.0, False), (3 - 5) ** 2),
      (("ipo", 0.1, 0.0, True), (1 - 5) ** 2),
  ):
    np.testing.assert_allclose(_losses(case, batch), [expected], rtol=2e-6)


@pytest.mark.parametrize("case", _CASES)
def test_at_the_reference(case):
  kind, beta, _, _ = case
  logps, _, lengths = _batch()
  expected = {"hinge": 1.0, "ipo": 0.25 / beta**2}.get(kind, math.log(2))
  np.testing.assert_allclose(
      _losses(case, (logps, logps, lengths)), expected, rtol=1e-6
  )


@pytest.mark.parametrize("case", _CASES)
def test_finite_at_extreme_margins(case):
  kind, beta, e, normalized = case
  batch = (
      np.array([[1e4, 0], [-1e4, 0]], np.float32),
      np.zeros((2, 2), np.float32),
      np.ones((2, 2), np.int32),
  )
  np.testing.assert_allclose(
      _losses(case, batch),
      _twin(kind, *batch, beta, e, normalized),
      rtol=1e-5,
      atol=1e-6,
  )
  gradient = jax.grad(lambda x: jnp.sum(_losses(case, (x, *batch[1:]))))(
      jnp.array(batch[0])
  )
  assert np.isfinite(gradient).all()


def test_robust_without_noise_is_sigmoid():
  robust, sigmoid = (
      _losses((kind, 0.3, 0.0, False), _batch())
      for kind in ("robust", "sigmoid")
  )
  np.testing.assert_array_equal(robust, sigmoid)


def test_robust_is_unbiased():
  """A share e of labels flipped, the expectation is the clean loss."""
  logps, reference, lengths = _batch()
  e = 0.2
  right, wrong = (
      _losses(("robust", 0.3, e, False), batch)
      for batch in (
          (logps, reference, lengths),
          (logps[:, ::-1], reference[:, ::-1], lengths),
      )
  )
  clean = _losses(("sigmoid", 0.3, 0.0, False), (logps, reference, lengths))
  np.testing.assert_allclose(
      (1 - e) * right + e * wrong, clean, rtol=1e-5, atol=2e-6
  )


@pytest.mark.parametrize("kind", ["hinge", "ipo"])
def test_the_others_know_no_wrong_labels(kind):
  plain, smoothed = (
      _losses((kind, 0.3, e, False), _batch()) for e in (0.0, 0.1)
  )
  np.testing.assert_array_equal(plain, smoothed)


@pytest.mark.parametrize("beta", [0.01, 2.0])
def test_reward_metrics_match_float64_twin(beta):
  logps, reference, _ = _batch(2)
  rewards = beta * (logps.astype(np.float64) - reference)
  margins = rewards[:, 0] - rewards[:, 1]
  expected = {
      "rewards/chosen": rewards[:, 0].mean(),
      "rewards/rejected": rewards[:, 1].mean(),
      "rewards/margins": margins.mean(),
      "rewards/accuracies": np.mean(margins > 0),
      "logps/chosen": logps[:, 0].astype(np.float64).mean(),
      "logps/rejected": logps[:, 1].astype(np.float64).mean(),
  }
  assert 0 < expected["rewards/accuracies"] < 1
  got = loss.reward_metrics(logps, reference, beta=beta)
  assert set(got) == set(expected)
  for name, number in expected.items():
    assert got[name].dtype == jnp.float32 and got[name].shape == ()
    np.testing.assert_allclose(got[name], number, rtol=2e-6, atol=2e-6)


def test_no_reward_at_the_reference():
  logps, _, _ = _batch()
  metrics = loss.reward_metrics(logps, logps, beta=0.5)
  for name in ("chosen", "rejected", "margins", "accuracies"):
    assert metrics[f"rewards/{name}"] == 0.0
