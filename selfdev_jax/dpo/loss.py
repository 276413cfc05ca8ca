"""DPO's losses on log-probabilities, and the metrics that TRL has."""

import jax
import jax.numpy as jnp


def sigmoid(
    margins: jax.Array, *, beta: float, label_smoothing: float = 0.0
) -> jax.Array:
  """-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), [pairs] float32.

  Args:
    margins: [pairs] float32, m: by how much the chosen completion's
      log-probability rose against the reference, less the rejected one's.
    beta: strength of the tie to the reference.
    label_smoothing: e, how often a label is taken to be the wrong way round.

  References:
    R. Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, eq. 7.
    E. Mitchell, A note on DPO with noisy preferences and relationship to IPO
      (cDPO, the label smoothing), 2023.
  """
  # log_sigmoid: the log of a sigmoid underflows where the margin is large.
  h = beta * margins
  right, wrong = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
  return -(1 - label_smoothing) * right - label_smoothing * wrong


def robust(
    margins: jax.Array, *, beta: float, label_smoothing: float = 0.0
) -> jax.Array:
  """Unbiased where a share `label_smoothing` < 1/2 of labels is flipped.

  S. R. Chowdhury et al., Provably Robust DPO, arXiv 2403.00409, eq. 12.
  """
  h, e = beta * margins, label_smoothing
  right, wrong = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
  return (e * wrong - (1 - e) * right) / (1 - 2 * e)


def hinge(margins: jax.Array, *, beta: float) -> jax.Array:
  """max(0, 1 - beta m) (Y. Zhao et al., SLiC-HF, arXiv 2305.10425)."""
  return jax.nn.relu(1 - beta * margins)


def ipo(margins: jax.Array, *, beta: float) -> jax.Array:
  """(m - 1 / (2 beta))^2 (M. G. Azar et al., arXiv 2310.12036, eq. 17).

  Its authors and TRL take margins of means over tokens: `length_normalized`.
  """
  return (margins - 1 / (2 * beta)) ** 2


LOSSES = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge, "robust": robust}
# The others do not know a label that is the wrong way round.
SMOOTHED = ("sigmoid", "robust")


def pair_losses(
    kind: str,
    logps: jax.Array,
    reference: jax.Array,
    lengths: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> jax.Array:
  """One of `LOSSES` of each pair.

  Args:
    kind: its name.
    logps: [pairs, 2] float32, log-probabilities of chosen and rejected.
    reference: like `logps`, under the reference model.
    lengths: [pairs, 2] int32, tokens of the completions.
    beta: see `sigmoid`.
    label_smoothing: likewise.
    length_normalized: divides each log-probability by its tokens (TRL's
      `sigmoid_norm`; Y. Meng et al., SimPO, arXiv 2405.14734).

  Returns:
    [pairs] float32.
  """
  ratios = logps - reference
  if length_normalized:
    ratios /= lengths.astype(jnp.float32)
  options = {"label_smoothing": label_smoothing} if kind in SMOOTHED else {}
  return LOSSES[kind](ratios[:, 0] - ratios[:, 1], beta=beta, **options)


def reward_metrics(
    logps: jax.Array, reference: jax.Array, *, beta: float
) -> dict[str, jax.Array]:
  """Means over pairs, under TRL's names; float32 scalars.

  Args:
    logps: [pairs, 2] float32, log-probabilities of chosen and rejected.
    reference: like `logps`, under the reference model.
    beta: see `sigmoid`.
  """
  rewards = beta * (logps - reference)
  margins = rewards[:, 0] - rewards[:, 1]
  return {
      "rewards/chosen": jnp.mean(rewards[:, 0]),
      "rewards/rejected": jnp.mean(rewards[:, 1]),
      "rewards/margins": jnp.mean(margins),
      "rewards/accuracies": jnp.mean(margins > 0, dtype=jnp.float32),
      "logps/chosen": jnp.mean(logps[:, 0]),
      "logps/rejected": jnp.mean(logps[:, 1]),
  }
