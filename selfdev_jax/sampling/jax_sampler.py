"""The embedded sampler: generation in this process, in JAX."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from selfdev_jax import errors
from selfdev_jax import models

# Prompts are padded to a multiple of this, so that few lengths are compiled.
_LENGTH_STEP = 16


@dataclasses.dataclass(frozen=True)
class Generation:
  """One sampled text, without the prompt and without EOS."""

  text: str
  finished: bool  # False when cut at the token limit.


def slots(tokens: int) -> int:
  """Positions that prompts of at most so many tokens are padded to."""
  return -(-tokens // _LENGTH_STEP) * _LENGTH_STEP


class JaxSampler:
  """Generates with whatever weights were swapped in last.

  A text depends on the weights, its prompt and its key, not on the batch.
  """

  def __init__(
      self,
      decoder: models.DecoderConfig,
      tokenizer: transformers.PreTrainedTokenizerBase,
      batch_size: int,
      eos: tuple[int, ...],
  ):
    """Takes what the weights do not say.

    Args:
      decoder: the model's shape.
      tokenizer: its tokenizer.
      batch_size: rows generated at once.
      eos: the tokens that end a text.
    """
    self._decoder = decoder
    self._tokenizer = tokenizer
    self._batch_size = batch_size
    self._eos = eos
    self._params = self._lora = None

  def swap_weights(
      self, params: models.Params, lora: models.Params | None = None
  ):
    """Takes other weights; `lora` as in models/decoder.py, `b` scaled."""
    self._params, self._lora = params, lora

  def generate(
      self,
      prompts: Sequence[str | list[int]],
      keys: jax.Array | None = None,
      *,
      max_new_tokens: int,
      temperature: float = 0.0,
  ) -> Iterator[list[Generation]]:
    """Yields one list a batch, in the order of `prompts`.

    Args:
      prompts: texts, or the tokens of texts; where all are equal the prompt is
        read once a batch.
      keys: [len(prompts)] PRNG keys; None only when greedy.
      max_new_tokens: tokens to write at most.
      temperature: 0 is greedy.

    Raises:
      UserError: if prompt and completion do not fit the model's context.
    """
    rows = [
        self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    longest = max(map(len, rows))
    length = slots(longest)
    if length + max_new_tokens > self._decoder.max_positions:
      raise errors.UserError(
          f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed"
          f" the model's {self._decoder.max_positions} positions; lower"
          " max_new_tokens"
      )
    if keys is None:
      keys = jnp.broadcast_to(jax.random.key(0), len(rows))
    shared = all(row == rows[0] for row in rows)
    for start in range(0, len(rows), self._batch_size):
      batch = rows[start : start + self._batch_size]
      # A last, smaller batch is filled up: another shape would compile anew.
      index = start + np.arange(self._batch_size)
      index = np.minimum(index, len(rows) - 1)
      padded = rows[:1] if shared else [rows[i] for i in index]
      tokens, mask = models.pad_left(padded, length)
      tokens, finished = models.generate(
          self._decoder,
          self._params,
          tokens,
          mask,
          keys[index],
          np.float32(temperature),
          max_new_tokens=max_new_tokens,
          eos=self._eos,
          lora=self._lora,
      )
      yield self._decode(np.asarray(tokens), np.asarray(finished), len(batch))

  def _decode(self, tokens, finished, n) -> list[Generation]:
    generations = []
    for row, done in zip(tokens[:n], finished[:n], strict=True):
      ends = np.flatnonzero(np.isin(row, self._eos))
      text = self._tokenizer.decode(row[: ends[0]] if len(ends) else row)
      generations.append(Generation(text, bool(done)))
    return generations
