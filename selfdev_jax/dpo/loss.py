"""The DPO loss on log-probabilities."""

import jax
import jax.numpy as jnp


def sigmoid(
    logps: jax.Array,
    reference: jax.Array,
    chosen_tokens: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sigmoid DPO, with label smoothing and an SFT term.

  With reward = beta (logp - reference) and h = reward of chosen minus reward
  of rejected, the loss is the batch mean of

    -(1 - label_smoothing) log sigmoid(h) - label_smoothing log sigmoid(-h)

  plus sft_weight times the mean negative log-likelihood of a chosen token.

  Args:
    logps: [batch, 2] float32, log-probabilities of chosen and rejected.
    reference: like `logps`, under the reference model.
    chosen_tokens: [batch] int32, length of the chosen completions.
    beta: strength of the tie to the reference.
    label_smoothing: how often a label is taken to be the wrong way round.
    sft_weight: weight of the SFT term.

  Returns:
    (loss, metrics), scalars in float32; the metrics bear TRL's names.

  References:
    R. Rafailov et al., Direct Preference Optimization, arXiv 2305.18290.
    E. Mitchell, A note on DPO with noisy preferences and relationship to IPO
      (cDPO, the label smoothing), 2023.
  """
  rewards = beta * (logps - reference)
  margins = rewards[:, 0] - rewards[:, 1]
  # log_sigmoid: the log of a sigmoid underflows where the margin is large.
  loss = jnp.mean(
      -(1 - label_smoothing) * jax.nn.log_sigmoid(margins)
      - label_smoothing * jax.nn.log_sigmoid(-margins)
  )
  metrics = {
      "rewards/chosen": jnp.mean(rewards[:, 0]),
      "rewards/rejected": jnp.mean(rewards[:, 1]),
      "rewards/margins": jnp.mean(margins),
      "rewards/accuracies": jnp.mean(margins > 0, dtype=jnp.float32),
      "logps/chosen": jnp.mean(logps[:, 0]),
      "logps/rejected": jnp.mean(logps[:, 1]),
  }
  if sft_weight:
    tokens = jnp.sum(chosen_tokens).astype(jnp.float32)
    nll = -jnp.sum(logps[:, 0]) / tokens
    loss += sft_weight * nll
    metrics["nll_loss"] = nll
  return loss, {"loss": loss, **metrics}
