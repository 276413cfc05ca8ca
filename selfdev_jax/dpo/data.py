"""Preference pairs as token rows, and the order in which they are seen."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from selfdev_jax import errors
from selfdev_jax import records

# Rows are padded to a multiple of this, so that few lengths are compiled.
_LENGTH_STEP = 32


@dataclasses.dataclass(frozen=True)
class Data:
  """Every distinct prompt with its completion once; pairs refer to rows.

  Attributes:
    tokens: [rows, length] int32, padded on the right.
    is_completion: [rows, length] bool, true on the completion and its EOS.
    pairs: [pairs, 2] int32, the rows of chosen and rejected.
  """

  tokens: np.ndarray
  is_completion: np.ndarray
  pairs: np.ndarray


def tokenize(
    pairs: Sequence[records.Pair],
    encode: Callable[..., list[int]],
    eos: int,
    max_length: int,
) -> Data:
  """Encodes prompts and completions apart, as generation saw them.

  Args:
    pairs: at least one.
    encode: a Hugging Face tokenizer's `encode`; the prompt gets its special
      tokens as in sampling, a completion gets none.
    eos: appended to every completion. Padding is known by its position alone,
      so `eos` may be the padding token as well.
    max_length: the model's positions.

  Raises:
    UserError: if there are no pairs, a prompt gives no token, or a row is
      longer than `max_length`.
  """
  if not pairs:
    raise errors.UserError("DPO needs at least one preference pair, got none")
  prompts = {pair.prompt: None for pair in pairs}
  prompts = {prompt: list(encode(prompt)) for prompt in prompts}
  if not all(prompts.values()):
    raise errors.UserError("a prompt without a token cannot be trained on")
  index = {}
  for pair in pairs:
    for completion in (pair.chosen, pair.rejected):
      index.setdefault((pair.prompt, completion), len(index))
  completions = [
      [*encode(completion, add_special_tokens=False), eos]
      for _, completion in index
  ]
  rows = [
      (prompts[prompt], completion)
      for (prompt, _), completion in zip(index, completions, strict=True)
  ]
  longest = max(len(prompt) + len(completion) for prompt, completion in rows)
  if longest > max_length:
    raise errors.UserError(
        f"a prompt with its completion has {longest} tokens, but the model has"
        f" {max_length} positions; lower propose.max_new_tokens"
    )
  shape = len(rows), -(-longest // _LENGTH_STEP) * _LENGTH_STEP
  tokens = np.full(shape, eos, np.int32)
  is_completion = np.zeros(shape, bool)
  for i, (prompt, completion) in enumerate(rows):
    end = len(prompt) + len(completion)
    tokens[i, :end] = prompt + completion
    is_completion[i, len(prompt) : end] = True
  return Data(
      tokens,
      is_completion,
      np.array(
          [
              (
                  index[pair.prompt, pair.chosen],
                  index[pair.prompt, pair.rejected],
              )
              for pair in pairs
          ],
          np.int32,
      ),
  )


def order(key: jax.Array, n: int, steps: int, batch_size: int) -> np.ndarray:
  """Which items each step sees: whole shuffled passes, one after the other.

  Args:
    key: PRNG key.
    n: number of items.
    steps: number of batches.
    batch_size: items a batch; where it exceeds `n` items recur in a batch.

  Returns:
    [steps, batch_size] int.
  """
  passes = -(-steps * batch_size // n)
  shuffled = jax.vmap(lambda key: jax.random.permutation(key, n))(
      jax.random.split(key, passes)
  )
  flat = np.asarray(shuffled).reshape(-1)
  return flat[: steps * batch_size].reshape(steps, batch_size)


def distinct_rows(
    batches: np.ndarray, multiple: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
  """Each batch with every row in it once.

  A few programs make many pairs, so a program is met several times in a batch;
  its log-probability has to be computed but once.

  Args:
    batches: [steps, batch, 2] int32, the rows of chosen and rejected.
    multiple: what the number of rows has to be divisible by.

  Returns:
    (for each step (rows [size] int32, pairs [batch, 2] int32 into those rows),
     size). The size is the largest step's; the others are filled up.
  """
  found = [np.unique(batch, return_inverse=True) for batch in batches]
  size = max(len(rows) for rows, _ in found)
  size = -(-size // multiple) * multiple
  return [
      (np.resize(rows, size), pairs.reshape(-1, 2).astype(np.int32))
      for rows, pairs in found
  ], size
