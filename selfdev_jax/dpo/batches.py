"""Which pairs a step sees, and the rows that they are packed into."""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import functools
import itertools
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from selfdev_jax import progress
from selfdev_jax.dpo import data as data_lib

# Completions in a row, after the prompt that they share.
COMPLETIONS = {"shared": 2, "padded": 1}
# A shape takes seconds to compile: it has to serve this many batches.
_BATCHES_A_SHAPE = 25
# Pairs of similar length meet within this many batches (as transformers' do).
_WINDOW = 50
_SHORTEST = 32


class Rows(NamedTuple):
  """Rows [prompt | completion | completion | padding]; leaves of NumPy or JAX.

  Attributes:
    tokens: [..., rows, length] int32.
    ends: [..., rows, 1 + completions] int32: where the prompt and each
      completion end; where a row has fewer, the last end again.
    sources: [..., rows, targets] int32, the slot that predicts a target.
    targets: [..., rows, targets] int32, the completions' tokens.
    owner: [..., rows, targets] int32, which of the row's completions a target
      is of; `completions` on padding.
  """

  tokens: np.ndarray
  ends: np.ndarray
  sources: np.ndarray
  targets: np.ndarray
  owner: np.ndarray


class Batch(NamedTuple):
  """One step's pairs, in parts that are computed one after the other.

  Attributes:
    rows: leaves [parts, rows, ...].
    pairs: [parts, pairs, 2] int32, chosen and rejected among the part's
      completions, counted through its rows.
    reference: [parts, pairs, 2] float32, their log-probabilities under the
      reference model.
  """

  rows: Rows
  pairs: np.ndarray
  reference: np.ndarray


def order(
    key: jax.Array, lengths: np.ndarray, steps: int, batch_size: int
) -> np.ndarray:
  """Which pairs a step sees: whole shuffled passes, similar lengths together.

  A function of its arguments alone: the step is all that a resumed run needs
  to know of its place.

  Args:
    key: PRNG key.
    lengths: [pairs] int, of the rows that the pairs need.
    steps: number of batches.
    batch_size: pairs a batch; where it exceeds the pairs they recur in it.

  Returns:
    [steps, batch_size] int.
  """
  n = len(lengths)
  passes = -(-steps * batch_size // n)
  shuffle, mix = jax.random.split(key)
  flat = jax.vmap(lambda key: jax.random.permutation(key, n))(
      jax.random.split(shuffle, passes)
  )
  flat = np.asarray(flat).reshape(-1)[: steps * batch_size]
  buckets = np.array([bucket(length) for length in lengths])
  # Not of several passes: a rare length's batches would be one pair's.
  size = max(1, min(_WINDOW, n // batch_size)) * batch_size
  batches = []
  for start in range(0, len(flat), size):
    window = flat[start : start + size]
    by_length = window[np.argsort(buckets[window], kind="stable")]
    found = by_length.reshape(-1, batch_size)
    key = jax.random.fold_in(mix, start)
    batches.append(found[np.asarray(jax.random.permutation(key, len(found)))])
  return np.concatenate(batches)


def bucket(length: int) -> int:
  """The next of 32, 48, 64, 80, 96, 112, 128, 160, 192, ...: quarters."""
  length = max(int(length), _SHORTEST)
  step = max(_SHORTEST // 2, 1 << (length - 1).bit_length() - 3)
  return -(-length // step) * step


def row_lengths(data: data_lib.Data) -> np.ndarray:
  """[pairs] int: tokens of a prompt with both of its completions."""
  sizes = np.array([len(completion) for completion in data.completions])
  prompts = np.array([len(prompt) for prompt in data.prompts])
  return (
      sizes[data.pairs].sum(axis=1) + prompts[data.prompt_of[data.pairs[:, 0]]]
  )


def fill(
    data: data_lib.Data, completions: Iterable[int], per_row: int
) -> list[list[int]]:
  """Distributes completions over rows, each of one prompt.

  A few programs make many pairs, so a completion is met several times in a
  batch; its log-probability has to be computed but once.

  Args:
    data: where the completions are.
    completions: their numbers; repeats are dropped.
    per_row: completions a row at most.

  Returns:
    For each row the numbers of its completions, long ones beside short ones.
  """
  of_prompt: dict[int, list[int]] = {}
  for number in dict.fromkeys(map(int, completions)):
    of_prompt.setdefault(int(data.prompt_of[number]), []).append(number)
  size = lambda number: len(data.completions[number])
  rows = []
  for numbers in of_prompt.values():
    of_this = [[] for _ in range(-(-len(numbers) // per_row))]
    for number in sorted(numbers, key=size, reverse=True):
      room = [row for row in of_this if len(row) < per_row]
      min(room, key=lambda row: sum(map(size, row))).append(number)
    rows += of_this
  return rows


def pack(
    data: data_lib.Data,
    filled: Sequence[Sequence[int]],
    per_row: int,
    rows: int,
    shape: tuple[int, int],
) -> Rows:
  """Rows as arrays.

  Args:
    data: where the completions are.
    filled: at least one row, see `fill`.
    per_row: completions a row at most.
    rows: how many to make; the first is repeated to make them up.
    shape: (slots a row, tokens to predict a row), see `shapes`.
  """
  length, targets = shape
  out = Rows(
      np.zeros((rows, length), np.int32),
      np.zeros((rows, 1 + per_row), np.int32),
      np.zeros((rows, targets), np.int32),
      np.zeros((rows, targets), np.int32),
      np.full((rows, targets), per_row, np.int32),
  )
  for i in range(rows):
    numbers = filled[i] if i < len(filled) else filled[0]
    prompt = data.prompts[data.prompt_of[numbers[0]]]
    out.tokens[i, : len(prompt)] = prompt
    out.ends[i] = end = len(prompt)
    at = 0
    for j, number in enumerate(numbers):
      ids = data.completions[number]
      start, end = end, end + len(ids)
      out.tokens[i, start:end] = ids
      out.ends[i, j + 1 :] = end
      here = slice(at, at + len(ids))
      out.sources[i, here] = np.arange(start - 1, end - 1)
      out.sources[i, at] = len(prompt) - 1
      out.targets[i, here] = ids
      out.owner[i, here] = j
      at += len(ids)
  return out


def tokens(data: data_lib.Data, row: Sequence[int]) -> tuple[int, int]:
  """(tokens of a row, those among them that are to be predicted)."""
  predicted = sum(len(data.completions[number]) for number in row)
  return len(data.prompts[data.prompt_of[row[0]]]) + predicted, predicted


def most_tokens(
    data: data_lib.Data, filled: Iterable[Sequence[int]]
) -> tuple[int, int]:
  """The larger of each of `tokens` over rows."""
  lengths, predicted = zip(*(tokens(data, row) for row in filled), strict=True)
  return max(lengths), max(predicted)


def shapes(needs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
  """The shape that each batch is padded to; few different ones.

  Args:
    needs: of each batch, the most tokens of a row and the most to predict.

  Returns:
    (slots a row, tokens to predict a row) of each batch.
  """
  lengths = [bucket(length) for length, _ in needs]
  served_by, waiting = {}, []
  for length in sorted(set(lengths)):
    waiting.append(length)
    batches = sum(map(lengths.count, waiting))
    if batches >= _BATCHES_A_SHAPE or length == max(lengths):
      served_by |= dict.fromkeys(waiting, length)
      waiting = []
  padded = [served_by[length] for length in lengths]
  targets: dict[int, int] = {}
  for length, (_, predicted) in zip(padded, needs, strict=True):
    targets[length] = max(targets.get(length, 0), bucket(predicted))
  return [(length, targets[length]) for length in padded]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Every step's batch, made when it is asked for.

  Attributes:
    data: the pairs.
    order: [steps, parts, pairs] int, which of them each step sees.
    per_row: completions a row at most.
    rows: rows of each part.
    shapes: of each step, see `shapes`.
  """

  data: data_lib.Data
  order: np.ndarray
  per_row: int
  rows: int
  shapes: list[tuple[int, int]]

  def batch(self, step: int, reference: np.ndarray) -> Batch:
    """One step's arrays.

    Args:
      step: counted from 0.
      reference: [completions] float32, log-probabilities.
    """
    numbers = self.data.pairs[self.order[step]]
    filled = [fill(self.data, part.flat, self.per_row) for part in numbers]
    rows = [
        pack(self.data, part, self.per_row, self.rows, self.shapes[step])
        for part in filled
    ]
    place = [
        {
            number: i * self.per_row + j
            for i, row in enumerate(part)
            for j, number in enumerate(row)
        }
        for part in filled
    ]
    pairs = [
        [[at[int(number)] for number in pair] for pair in part]
        for part, at in zip(numbers, place, strict=True)
    ]
    return Batch(
        Rows(*map(np.stack, zip(*rows, strict=True))),
        np.array(pairs, np.int32),
        reference[numbers].astype(np.float32),
    )

  @functools.cached_property
  def span(self) -> int:
    """Slots that a prompt with one completion fills at most."""
    numbers = range(len(self.data.completions))
    return bucket(max(tokens(self.data, [number])[0] for number in numbers))

  def tokens(self, step: int) -> int:
    """Tokens of a step's pairs as TRL counts them: a prompt for each of two."""
    numbers = self.data.pairs[self.order[step]].reshape(-1)
    return sum(tokens(self.data, [number])[0] for number in numbers)

  def describe(self, step: int) -> list[dict[str, Any]]:
    """A step's pairs: rows of the input, counted from 1, and their tokens."""
    described = []
    for pair in self.order[step].flat:
      chosen, rejected = self.data.pairs[pair]
      described.append(
          {
              "row": int(self.data.source[pair]) + 1,
              "prompt_ids": self.data.prompts[
                  self.data.prompt_of[chosen]
              ].tolist(),
              "chosen_ids": self.data.completions[chosen].tolist(),
              "rejected_ids": self.data.completions[rejected].tolist(),
          }
      )
    return described


def plan(
    data: data_lib.Data,
    key: jax.Array,
    *,
    steps: int,
    batch_size: int,
    parts: int,
    per_row: int,
    multiple: int,
) -> Plan:
  """What `steps` steps see; equal arguments, equal batches.

  Args:
    data: the pairs.
    key: PRNG key of their order.
    steps: number of batches.
    batch_size: pairs a batch.
    parts: how many parts a batch is computed in; divides `batch_size`.
    per_row: completions a row at most.
    multiple: what the number of rows has to be divisible by.
  """
  found = order(key, row_lengths(data), steps, batch_size)
  found = found.reshape(steps, parts, -1)
  least, needs = 0, []
  for step in found:
    filled = [fill(data, data.pairs[part].flat, per_row) for part in step]
    least = max(least, max(map(len, filled)))
    needs.append(most_tokens(data, itertools.chain.from_iterable(filled)))
  rows = -(-least // multiple) * multiple
  if rows >= 2 * least:
    progress.note(
        f"{rows} rows are computed where a batch's part has {least}, as"
        f" {multiple} devices share it out; lower dpo.parts or raise"
        " dpo.batch_size"
    )
  return Plan(data, found, per_row, rows, shapes(needs))
