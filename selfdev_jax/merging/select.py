"""Selection by magnitude without sorting: thresholds, ties, ranks.

The bits of a float32 that is not negative order as it does, so its magnitude
is an int32 key, and the k-th largest key follows from counts of how many keys
reach a pivot. All counts of a pass are one variadic reduction: what the keys
are made of is read once and no key is ever written.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from selfdev_jax import errors

# Elementwise, from a pytree of arrays of one shape to int32 keys of that shape.
Keys = Callable[[Any], Sequence[jax.Array]]

# Above the key of every number, and not the last int32: masks add 1 to it.
_NONE = np.int32(0x7FFFFFFE)
_SAMPLE = 1024
_SORTS = 16
# Pivots of the first pass around the wanted order statistic of a sample, in
# standard deviations of its rank, and of later ones around an interpolation.
_SPREADS = np.float32([2.2, 0.6, -0.6, -2.2])


def magnitude_keys(x: jax.Array) -> jax.Array:
  """int32 keys that order as |x| does; of a float32 array, any shape."""
  return lax.bitcast_convert_type(jnp.abs(x), jnp.int32)


def magnitudes(keys: jax.Array) -> jax.Array:
  """The float32 magnitudes with these keys."""
  return lax.bitcast_convert_type(keys, jnp.float32)


def row_sums(terms: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
  """Sums of each term over the last axis, in one pass over their inputs."""
  zeros = tuple(np.zeros((), term.dtype) for term in terms)
  add = lambda left, right: tuple(map(jnp.add, left, right))
  return tuple(lax.reduce(tuple(terms), zeros, add, (terms[0].ndim - 1,)))


def sums(terms: Sequence[jax.Array]) -> jax.Array:
  """[terms]: the sum of each, in one pass over their inputs."""
  return jnp.stack([jnp.sum(rows) for rows in row_sums(terms)])


class _Bracket(NamedTuple):
  """What is known of each threshold: low <= it < high, and how many reach."""

  low: jax.Array
  at_low: jax.Array
  high: jax.Array
  at_high: jax.Array
  passes: jax.Array


def count(mask: jax.Array) -> jax.Array:
  """How many entries are true, int32; in all threads.

  XLA reduces one operand to one number in one thread, but two of them by rows.
  """
  yes, no = sums([mask.astype(jnp.int32), (~mask).astype(jnp.int32)])
  return jnp.maximum(yes, mask.size - no)  # They are equal; both are used.


def thresholds(
    keys: Keys, inputs: Any, ranks: jax.Array, exact: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Keys that as many reach as `ranks` asks for, or more where keys tie.

  Args:
    keys: makes [arrays] of keys.
    inputs: what it makes them of.
    ranks: [arrays, thresholds] int32; the first is the largest key's.
    exact: gives the key of that rank itself, not only one that separates it
      from the next.

  Returns:
    (keys, how many reach them), both [arrays, thresholds] int32; where the rank
    is below 1, more than any key, and 0.

  Raises:
    UserError: for arrays of more than 2**31 - 1 elements.
  """
  sample = _sample(keys, inputs)

  def is_open(bracket):
    settled = bracket.high - bracket.low == 1
    if not exact:
      settled |= bracket.at_low == ranks
    return jnp.any((ranks >= 1) & ~settled)

  def step(bracket):
    low = bracket.low[..., None]
    width = bracket.high[..., None] - low
    # An even grid now and then: it ends, whatever the keys are.
    grid = low + width // 5 * np.arange(1, 5, dtype=np.int32)
    guess = _guess(bracket, sample, ranks)
    pivots = jnp.where(bracket.passes % 6 == 5, grid, guess)
    return narrow(bracket, _increasing(pivots, bracket.low))

  def narrow(bracket, pivots):
    low, at_low, high, at_high, passes = bracket
    counts, above = _count(keys(_again(inputs, passes)), pivots, low)
    enough = counts >= ranks[..., None]
    # Of the pivots that enough keys reach the highest, of the others the
    # lowest; the end of the bracket where there is none.
    rise, fall = enough & (pivots < high[..., None]), ~enough
    new = jnp.max(jnp.where(rise, pivots, low[..., None]), -1)
    return _Bracket(
        # From just above the low end it is as far to the next key there is.
        low=jnp.where(new > low, jnp.maximum(new, above), low),
        at_low=jnp.min(jnp.where(rise, counts, at_low[..., None]), -1),
        high=jnp.min(jnp.where(fall, pivots, high[..., None]), -1),
        at_high=jnp.max(jnp.where(fall, counts, at_high[..., None]), -1),
        passes=passes + 1,
    )

  size = jax.tree.leaves(inputs)[0].size
  if size > np.iinfo(np.int32).max:
    raise errors.UserError(
        f"a tensor of {size:,} entries: magnitudes are ranked of at most"
        f" {np.iinfo(np.int32).max:,}"
    )
  zeros = jnp.zeros_like(ranks)
  whole = _Bracket(zeros, zeros + size, zeros + _NONE, zeros, jnp.int32(0))
  bracket = narrow(whole, _increasing(_first_guess(sample, ranks, size), zeros))
  bracket = lax.while_loop(is_open, step, bracket)
  is_any = ranks >= 1
  return (
      jnp.where(is_any, bracket.low, _NONE),
      jnp.where(is_any, bracket.at_low, 0),
  )


def _count(keys, pivots, low) -> tuple[jax.Array, jax.Array]:
  """How many keys reach each pivot, and the lowest key above `low`.

  Args:
    keys: [arrays] of one shape.
    pivots: [arrays, thresholds, 4].
    low: [arrays, thresholds].
  """
  terms, above = [], []
  for i, key in enumerate(keys):
    for j in range(low.shape[1]):
      terms += [(key >= p).astype(jnp.int32) for p in pivots[i, j]]
      above.append(jnp.where(key > low[i, j], key, _NONE))
  zeros = (np.int32(0),) * len(terms) + (_NONE,) * len(above)

  def combine(left, right):
    both = list(zip(left, right, strict=True))
    counted = [a + b for a, b in both[: len(terms)]]
    return (*counted, *(jnp.minimum(a, b) for a, b in both[len(terms) :]))

  rows = lax.reduce((*terms, *above), zeros, combine, (keys[0].ndim - 1,))
  counts = jnp.stack([jnp.sum(row) for row in rows[: len(terms)]])
  lowest = jnp.stack([jnp.min(row) for row in rows[len(terms) :]])
  return counts.reshape(pivots.shape), lowest.reshape(low.shape)


def _sample(keys: Keys, inputs: Any) -> jax.Array:
  """[arrays, at most 1024] keys, ascending."""
  shape = jax.tree.leaves(inputs)[0].shape
  size = math.prod(shape)
  count = min(size, _SAMPLE)
  stride = size // count
  # A step that may be a matrix's width, but every time a column further.
  flat = np.arange(count, dtype=np.int64)
  places = np.unravel_index(flat * stride + flat % stride, shape)
  found = keys(jax.tree.map(lambda x: x[places], inputs))
  return jnp.stack([jnp.sort(key) for key in found])


def _first_guess(sample, ranks, size: int) -> jax.Array:
  """[arrays, thresholds, 4]: what has about these ranks in the sample."""
  count = sample.shape[1]
  share = ranks.astype(jnp.float32) / size
  spread = jnp.maximum(jnp.sqrt(count * share * (1 - share)), 1)
  wanted = (share * count)[..., None] + spread[..., None] * _SPREADS
  index = count - jnp.ceil(wanted).astype(jnp.int32)
  return _pick(sample, jnp.clip(index, 0, count - 1))


def _guess(bracket: _Bracket, sample, ranks) -> jax.Array:
  """[arrays, thresholds, 4] pivots, where the bracket's counts put the rank."""
  low, at_low, high, at_high, _ = bracket
  inside = jnp.maximum(at_low - at_high, 1).astype(jnp.float32)
  share = (at_low - ranks).astype(jnp.float32) / inside
  width = (high - low).astype(jnp.float32)
  spread = 1.5 * width * jnp.sqrt(share * (1 - share) / inside)
  spread = jnp.maximum(spread, 1)
  expected = share * width
  steps = [expected - spread, expected, expected + spread]
  steps = [jnp.clip(step, 1, width).astype(jnp.int32) for step in steps]
  # Keys of bfloat16 weights are few and many times there: neighbours around
  # one of the sample settle such a rank, neighbours of the low end as well.
  first = jnp.sum((sample[:, None] <= low[..., None]).astype(jnp.int32), -1)
  last = jnp.sum((sample[:, None] < high[..., None]).astype(jnp.int32), -1)
  known = last - first
  offset = (share * known.astype(jnp.float32)).astype(jnp.int32)
  index = first + jnp.clip(offset, 0, jnp.maximum(known - 1, 0))
  index = jnp.clip(index, 0, sample.shape[1] - 1)
  level = _pick(sample, index[..., None])[..., 0]
  sampled = [low + 1, level, level + 1, low + steps[1]]
  spaced = [low + 1, *(low + step for step in steps)]
  return jnp.where(
      (known > 0)[..., None], jnp.stack(sampled, -1), jnp.stack(spaced, -1)
  )


def _pick(sample: jax.Array, index: jax.Array) -> jax.Array:
  """[arrays, ...]: of each array's sample what `index` says."""
  return jax.vmap(lambda keys, i: keys[i])(sample, index)


def _increasing(pivots: jax.Array, low: jax.Array) -> jax.Array:
  """Pivots above `low`, each above the one before: neighbours settle ties."""
  increasing = []
  for pivot in jnp.moveaxis(jnp.sort(pivots, -1), -1, 0):
    low = jnp.maximum(pivot, low + 1)
    increasing.append(low)
  return jnp.stack(increasing, -1)


class Cut(NamedTuple):
  """Where the selection of each array's largest keys ends; all [arrays].

  Attributes:
    key: none below it is selected.
    reached: how many are not below it.
    place: of the keys that equal it the last one's that is, in row-major
      order; None: all of them are.
  """

  key: jax.Array
  reached: jax.Array
  place: jax.Array | None

  def mask(self, keys: Sequence[jax.Array]) -> list[jax.Array]:
    """[arrays] bool: which keys are selected."""
    if self.place is None:
      return [key >= limit for key, limit in zip(keys, self.key, strict=True)]
    place = _places(keys[0].shape)
    return [
        key >= jnp.where(place <= end, limit, limit + 1)
        for key, limit, end in zip(keys, self.key, self.place, strict=True)
    ]


def largest(
    keys: Keys, inputs: Any, counts: Sequence[jax.Array], exact_k: bool
) -> list[Cut]:
  """The cuts below the largest keys of each array, one for each of `counts`.

  Args:
    keys: makes [arrays] of keys.
    inputs: what it makes them of.
    counts: how many keys; each [arrays] int32.
    exact_k: of the keys that tie at the threshold only the first ones are
      selected, so that they are that many; otherwise all of them.
  """
  ranks = jnp.stack(counts, -1)
  limits, reached = thresholds(keys, inputs, ranks)
  if not exact_k:
    return [Cut(*pair, None) for pair in zip(limits.T, reached.T, strict=True)]

  def find(inputs):
    rows = [key.reshape(-1, key.shape[-1]) for key in keys(inputs)]
    return jnp.stack(
        [
            jnp.stack(
                [_last_tied(key, *pair) for pair in zip(*cuts, strict=True)]
            )
            for key, *cuts in zip(rows, limits, ranks, strict=True)
        ]
    )

  ends = apart(find, inputs)
  return [Cut(*row) for row in zip(limits.T, reached.T, ends.T, strict=True)]


def row_order(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys that order each row by magnitude, no two alike, and those sorted.

  Args:
    rows: [rows, columns] float32.

  Returns:
    (keys, keys in ascending order), [rows, columns] uint32. The low bits hold
    the column; the magnitude is cut to the 32 bits that this leaves.
  """
  count, columns = rows.shape
  bits = max(columns - 1, 1).bit_length()
  magnitude = lax.bitcast_convert_type(jnp.abs(rows), jnp.uint32) << 1
  column = lax.broadcasted_iota(jnp.uint32, rows.shape, 1)
  keys = (magnitude >> bits << bits) | column
  # XLA sorts an array in one thread, but several of them at once.
  parts = [
      keys[start : start + -(-count // _SORTS)]
      for start in range(0, count, -(-count // _SORTS))
  ]
  return keys, jnp.concatenate([lax.sort(part, dimension=1) for part in parts])


def apart(fn: Callable[[Any], Any], inputs: Any) -> Any:
  """`fn(inputs)`, in a pass of its own over them.

  XLA computes once what two passes have in common, and writes it: several
  times the traffic of computing it again from narrow inputs. A loop of one
  turn it keeps apart.
  """
  empty = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, inputs)
  )
  _, result = lax.while_loop(
      lambda state: ~state[0],
      lambda state: (jnp.bool_(True), fn(_again(inputs, state[0]))),
      (jnp.bool_(False), empty),
  )
  return result


def _again(inputs: Any, turn: jax.Array) -> Any:
  """`inputs` in a turn of a loop: what is made of them is not moved out."""
  return lax.optimization_barrier((inputs, turn))[0]


def _last_tied(keys: jax.Array, limit: jax.Array, count: jax.Array):
  """Place of the last key equal to `limit` that is among `count`; or -1."""
  above, tied = keys > limit, keys == limit
  n_above, n_tied = row_sums([mask.astype(jnp.int32) for mask in (above, tied)])
  room = count - jnp.sum(n_above)
  before = jnp.cumsum(n_tied) - n_tied
  row = jnp.maximum(jnp.sum((before < room).astype(jnp.int32)) - 1, 0)
  is_tied = keys[row] == limit
  nth = before[row] + jnp.cumsum(is_tied.astype(jnp.int32))
  width = keys.shape[1]
  places = row * width + jnp.arange(width, dtype=jnp.int32)
  return jnp.max(jnp.where(is_tied & (nth <= room), places, -1))


def _places(shape: tuple[int, ...]) -> jax.Array:
  """int32 array of that shape: each element's number in row-major order."""
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  return sum(
      lax.broadcasted_iota(jnp.int32, shape, axis) * stride
      for axis, stride in enumerate(strides)
  )
