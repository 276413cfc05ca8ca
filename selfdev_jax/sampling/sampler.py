"""What every sampler does, and what comes out of one."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from selfdev_jax import errors
from selfdev_jax import models


class SamplerError(errors.UserError):
  """A sampler that cannot be had, or cannot go on."""


@dataclasses.dataclass(frozen=True)
class Generation:
  """One sampled text, without the prompt and without EOS."""

  text: str
  finished: bool  # False when cut at the token limit.
  tokens: tuple[int, ...] = ()  # Before a stop text was cut off.
  truncated: bool = False  # The prompt lost its beginning: it did not fit.


class Sampler(Protocol):
  """Generates with whatever weights were swapped in last.

  Attributes:
    engine: name and version of what computes, as records keep it.
  """

  engine: str

  def swap_weights(
      self,
      params: models.Params,
      version: str,
      lora: models.Params | None = None,
  ):
    """Takes other weights.

    Args:
      params: leaves as in models/decoder.py.
      version: names them.
      lora: an adapter as in models/decoder.py, `b` scaled.

    Raises:
      SamplerError: if the weights do not fit the model.
    """

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
  ) -> Iterator[list[Generation]]:
    """Yields one list a batch: `n` texts a prompt, in the order of `prompts`.

    A text depends on the weights, its prompt and its key, not on its batch.

    Args:
      prompts: texts, or the tokens of texts. One that does not fit the model's
        context loses its beginning; its generations say so.
      keys: [len(prompts)] PRNG keys, the seeds; None only when greedy.
      max_new_tokens: tokens to write at most.
      batch_size: texts that are generated at once.
      n: texts a prompt.
      temperature: 0 is greedy.
      top_p: draws are among the likeliest tokens that have this probability
        together (Holtzman et al., arXiv 1904.09751).
      stop: texts before which a generation ends.

    Raises:
      SamplerError: if no prompt of any length would fit, or the engine is lost.
    """

  def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probabilities, in nats, of tokens given those before them.

    Args:
      rows: tokens; each row leaves room for one more in the context.

    Returns:
      [len(row) - 1] float32 a row: of its second token, third, ...
    """

  def health(self):
    """Returns if generation can begin.

    Raises:
      SamplerError: saying what is wrong.
    """

  def close(self):
    """Gives back what the engine holds; may be called twice."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt's tokens as they are read, and the key of its text."""

  tokens: list[int]
  key: jax.Array
  truncated: bool


def requests(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    keys: jax.Array | None,
    n: int,
    positions: int,
    max_new_tokens: int,
) -> list[Request]:
  """`n` requests a prompt, cut on the left where it does not fit.

  Raises:
    SamplerError: if `max_new_tokens` alone fill the context.
  """
  room = positions - max_new_tokens
  if room < 1:
    raise SamplerError(
        f"{max_new_tokens} new tokens leave no room for a prompt in the model's"
        f" {positions} positions; lower max_new_tokens"
    )
  if keys is None:
    keys = jnp.broadcast_to(jax.random.key(0), len(prompts) * n)
  elif n > 1:
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys = fold(keys, jnp.arange(n)).reshape(-1)
  rows = []
  for prompt in prompts:
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    rows += [tokens] * n
  return [
      Request(tokens[-room:], key, len(tokens) > room)
      for tokens, key in zip(rows, keys, strict=True)
  ]


def generation(
    tokenizer: transformers.PreTrainedTokenizerBase,
    tokens: Sequence[int],
    request: Request,
    eos: Sequence[int],
    stop: Sequence[str],
) -> Generation:
  """What the tokens that follow a prompt say, up to EOS or a stop text."""
  ends = np.flatnonzero(np.isin(tokens, eos))
  finished = bool(len(ends))
  kept = tuple(map(int, tokens[: ends[0]] if finished else tokens))
  text = tokenizer.decode(kept)
  found = [i for i in map(text.find, stop) if i >= 0]
  if found:
    text, finished = text[: min(found)], True
  return Generation(text, finished, kept, request.truncated)
