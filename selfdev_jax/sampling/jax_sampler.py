"""The embedded sampler: generation in this process, in JAX."""

from collections.abc import Iterator
from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from selfdev_jax import models
from selfdev_jax.sampling import sampler

_HOISTING = (
    "while-loop-invariant-code-motion,"
    "while-loop-expensive-invariant-code-motion"
)
# Prompts are padded to a multiple of this, so that few lengths are compiled.
_LENGTH_STEP = 16


def slots(tokens: int) -> int:
  """Positions that prompts of at most so many tokens are padded to."""
  return -(-tokens // _LENGTH_STEP) * _LENGTH_STEP


def token_logprobs(
    decoder: models.DecoderConfig,
    params: models.Params,
    tokens: jax.Array,
    lora: models.Params | None = None,
) -> jax.Array:
  """Log-probabilities of each token given those before it.

  Args:
    decoder: the decoder's shape.
    params: its parameters.
    tokens: [batch, seq] int32, padded on the right.
    lora: None or a LoRA adapter, `b` scaled.

  Returns:
    [batch, seq - 1] float32, in nats; perhaps not computed yet.
  """
  return _compiled_logprobs()(decoder, params, tokens, lora)


@functools.cache
def _compiled_logprobs():
  options = None
  if jax.default_backend() == "cpu":
    # XLA would widen the bfloat16 weights of all layers before the first one:
    # right for a loop that reads them often, three times the time for one pass.
    options = {"xla_disable_hlo_passes": _HOISTING}
  return jax.jit(_logprobs, static_argnames="decoder", compiler_options=options)


def _logprobs(decoder, params, tokens, lora):
  hidden = models.forward(decoder, params, tokens, lora=lora)
  logits = models.logits(decoder, params, hidden[:, :-1]).astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


class JaxSampler:
  """A `Sampler` on the devices of this process."""

  engine = f"jax {jax.__version__}"

  def __init__(
      self,
      decoder: models.DecoderConfig,
      tokenizer: transformers.PreTrainedTokenizerBase,
      eos: tuple[int, ...],
  ):
    """Takes what the weights do not say.

    Args:
      decoder: the model's shape.
      tokenizer: its tokenizer.
      eos: the tokens that end a text.
    """
    self._decoder = decoder
    self._tokenizer = tokenizer
    self._eos = eos
    self._params = self._lora = None

  def swap_weights(
      self,
      params: models.Params,
      version: str,
      lora: models.Params | None = None,
  ):
    """See `Sampler.swap_weights`."""
    del version
    self._params, self._lora = params, lora

  def generate(
      self,
      prompts: Sequence[str | list[int]],
      keys: jax.Array | None = None,
      *,
      max_new_tokens: int,
      batch_size: int,
      n: int = 1,
      temperature: float = 0.0,
      top_p: float = 1.0,
      stop: Sequence[str] = (),
  ) -> Iterator[list[sampler.Generation]]:
    """See `Sampler.generate`; a prompt that all share is read once a batch."""
    positions = self._decoder.max_positions
    asked = sampler.requests(
        self._tokenizer, prompts, keys, n, positions, max_new_tokens
    )
    rows = [request.tokens for request in asked]
    if not rows:
      return
    length = slots(max(map(len, rows)))
    length = min(length, positions - max_new_tokens)
    shared = all(row == rows[0] for row in rows)
    for start in range(0, len(rows), batch_size):
      batch = asked[start : start + batch_size]
      # A last, smaller batch is filled up: another shape would compile anew.
      filled = batch + batch[-1:] * (batch_size - len(batch))
      padded = rows[:1] if shared else [request.tokens for request in filled]
      tokens, mask = models.pad_left(padded, length)
      tokens, _ = models.generate(
          self._decoder,
          self._params,
          tokens,
          mask,
          jnp.stack([request.key for request in filled]),
          np.float32(temperature),
          np.float32(top_p) if top_p < 1 else None,
          max_new_tokens=max_new_tokens,
          eos=self._eos,
          lora=self._lora,
      )
      yield [
          sampler.generation(self._tokenizer, row, request, self._eos, stop)
          for row, request in zip(
              np.asarray(tokens)[: len(batch)], batch, strict=True
          )
      ]

  def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """See `Sampler.logprobs`."""
    found = []
    for row in rows:
      tokens = np.zeros((1, slots(len(row))), np.int32)
      tokens[0, : len(row)] = row
      logprobs = token_logprobs(self._decoder, self._params, tokens, self._lora)
      found.append(np.asarray(logprobs)[0, : len(row) - 1])
    return found

  def health(self):
    """See `Sampler.health`."""
    if self._params is None:
      raise sampler.SamplerError("the sampler has no weights yet")

  def close(self):
    """See `Sampler.close`."""
    self._params = self._lora = None
