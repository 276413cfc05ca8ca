"""What a program does to fixed tensors, in a few numbers.

Two programs that are written differently, and hash differently, may compute
the same: `stack().sum(0)` and `sum()`, a coefficient that is distributed, a
product with one. Their results on the same tensors tell, up to rounding. The
tensors are random, of the shapes that the program is for or small stand-ins of
the same rank, their rows of different scales; so two programs that differ only
for other shapes, or only on weights unlike these, share a fingerprint: who
reuses a score by it says so.
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
import math
import sys

import jax.numpy as jnp
import numpy as np

from selfdev_jax.sandbox import ir
from selfdev_jax.sandbox import rebuild

# Programs whose numbers are so close, in relation to their change of the base,
# are one; a constant that differs by 1 % moves them a hundred times further.
TOLERANCE = 1e-4
_MAX_ELEMENTS = 1 << 13  # Of a leaf that is probed as it is.
_STAND_INS = {1: (4096,), 2: (64, 96), 3: (4, 32, 48), 4: (4, 8, 16, 12)}
# Standard deviations of a tensor's rows: those of a language model's weights,
# and what task vectors have of them.
_SCALES = (0.01, 0.1)
_TASK_SCALE = 0.1
_PROJECTIONS = 3
_NUMBERS = 1 + _PROJECTIONS
_MAX_UNROLLED = 1000  # Primitives; a longer loop is compiled.


def probe_shapes(
    shapes: Sequence[tuple[int, ...]],
) -> list[tuple[int, ...]]:
  """The shapes that programs for `shapes` are probed with.

  Returns:
    For each rank, and for matrices with more rows than columns apart, the
    largest shape of at most 8,192 elements, or where there is none a stand-in.
  """
  found = {}
  for shape in sorted(shapes, key=math.prod):
    rank = len(shape)
    is_tall = rank == 2 and shape[0] > shape[1]
    if math.prod(shape) <= _MAX_ELEMENTS:
      found[rank, is_tall] = shape
    else:
      stand_in = _STAND_INS.get(rank, (4,) * rank)
      stand_in = stand_in[::-1] if is_tall else stand_in
      found.setdefault((rank, is_tall), stand_in)
  return list(found.values())


def compute(
    blocks: Mapping[tuple[int, ...], ir.Block],
    shapes: Sequence[tuple[int, ...]],
) -> list[float]:
  """Runs a program op by op, which compiles primitives and not programs.

  Args:
    blocks: verified, one for each of `shapes`.
    shapes: from `probe_shapes`.

  Returns:
    For each shape the norm of merged - base and its projections on fixed
    random directions of norm 1; NaN where the result is not finite.
  """
  numbers = []
  for shape in shapes:
    block = blocks[shape]
    base, *task_vectors = _probe(shape, block.inputs - 1)
    (merged,) = _run(block, [base, *task_vectors])
    merged, base = (np.asarray(x, np.float64) for x in (merged, base))
    delta = (merged - base).ravel()
    # Not finite is one thing, whichever it is.
    if not np.isfinite(delta).all():
      delta = np.full_like(delta, np.nan)
    numbers += [float(np.linalg.norm(delta))]
    numbers += [float(x) for x in _directions(delta.size) @ delta]
  return numbers


def same(one: Sequence[float], other: Sequence[float]) -> bool:
  """Whether two fingerprints are of one function, up to rounding."""
  return first_alike([one, other]) == [0, 0]


def first_alike(fingerprints: Sequence[Sequence[float]]) -> list[int]:
  """For each fingerprint the index of the first that is the same.

  Args:
    fingerprints: from `compute`, for the same shapes; an empty one is like
      none, nor is one with NaN.
  """
  size = max(map(len, fingerprints), default=0)
  rows = np.full((len(fingerprints), size // _NUMBERS, _NUMBERS), np.inf)
  first, kept = [], []
  # Those of `kept` by about how large they are: who is alike stands close.
  shelves = collections.defaultdict(list)
  for i, numbers in enumerate(fingerprints):
    if not numbers or np.isnan(numbers).any():  # Is like none.
      first.append(i)
      continue
    rows[i] = np.reshape(numbers, rows.shape[1:])
    shelf = _shelf(rows[i])
    if shelf == math.inf:  # Within every tolerance.
      others = kept
    else:
      places = (shelf - 1, shelf, shelf + 1, math.inf)
      others = [k for place in places for k in shelves.get(place, ())]
    is_near = _near(rows[others], rows[i]) if others else ()
    first.append(min(itertools.compress(others, is_near), default=i))
    if first[i] == i:
      kept.append(i)
      shelves[shelf].append(i)
  return first


def new_by_round(
    rounds: Sequence[Sequence[str]],
    fingerprints: Mapping[str, Sequence[float]],
) -> list[list[str]]:
  """What each round found first.

  Args:
    rounds: digests of programs, in order.
    fingerprints: of each digest.

  Returns:
    For each round its digests without those that an earlier round or place
    has, or whose fingerprint one there has.
  """
  found = list(dict.fromkeys(digest for names in rounds for digest in names))
  first = first_alike([fingerprints[digest] for digest in found])
  left = {digest for i, digest in enumerate(found) if first[i] == i}
  new = []
  for names in rounds:
    new.append([d for d in dict.fromkeys(names) if d in left])
    left.difference_update(names)
  return new


def _shelf(row):
  """Two rows [probes, numbers] that are alike are at most one shelf apart.

  The norms of each probe are within the tolerance, and so are their sums.
  """
  size = sum(map(abs, row[:, 0].tolist()))
  if size == math.inf:
    return size
  # Below the normal numbers a tolerance is rounded: these share a shelf.
  size = max(size, sys.float_info.min)
  return math.floor(math.log(size) / (2 * TOLERANCE))


def _near(x, y):
  """Which of x [n, probes, numbers] is like y [probes, numbers]."""
  # A direction sees about norm / sqrt(size) of a change: each number counts
  # in relation to its own size, and to that.
  norm = np.maximum(x[..., :1], y[..., :1])
  scale = np.maximum(np.maximum(abs(x), abs(y)), 1e-3 * norm)
  return (abs(x - y) <= TOLERANCE * scale).all(axis=(1, 2))


@functools.lru_cache(maxsize=32)
def _probe(shape, num_experts):
  """Base and task vectors."""
  rng = np.random.default_rng([*shape, num_experts])
  scales = rng.permutation(np.geomspace(*_SCALES, shape[0] if shape else 1))
  scales = scales.reshape(shape[:1] + (1,) * (len(shape) - 1))

  def draw(factor):
    return jnp.asarray(
        factor * scales * rng.standard_normal(shape), jnp.float32
    )

  # No two experts are of one size: exchanging them shows.
  return [draw(1.0), *(draw(_TASK_SCALE * 0.8**i) for i in range(num_experts))]


@functools.lru_cache(maxsize=32)
def _directions(size):
  rows = np.random.default_rng(size).standard_normal((_PROJECTIONS, size))
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _run(block: ir.Block, arguments):
  """`rebuild.evaluate` on arrays: branches are taken, short loops unrolled."""
  values = list(arguments)

  def read(operand):
    is_literal = isinstance(operand, ir.Literal)
    return operand.value if is_literal else values[operand]

  for equation in block.equations:
    operands = [read(operand) for operand in equation.operands]
    params = equation.params
    if equation.name == "cond":
      index = int(np.clip(operands[0], 0, len(params["branches"]) - 1))
      values += _run(params["branches"][index], operands[1:])
    elif equation.name == "scan" and _is_short(params):
      values += _loop(operands, **params)
    else:
      values += rebuild.apply(equation, operands)
  return [read(operand) for operand in block.outputs]


def _is_short(params):
  return 0 < params["length"] * len(params["jaxpr"].equations) <= _MAX_UNROLLED


def _loop(operands, *, jaxpr, length, reverse, num_consts, num_carry):
  consts, rest = operands[:num_consts], operands[num_consts:]
  carry, xs = rest[:num_carry], rest[num_carry:]
  rows = []
  for i in reversed(range(length)) if reverse else range(length):
    outputs = _run(jaxpr, [*consts, *carry, *(x[i] for x in xs)])
    carry = outputs[:num_carry]
    rows.append(outputs[num_carry:])
  columns = zip(*(reversed(rows) if reverse else rows), strict=True)
  return [*carry, *(jnp.stack(column) for column in columns)]
