"""Which pairs a step sees, and what its rows hold."""

import collections
import dataclasses
import itertools

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from selfdev_jax.dpo import batches
from selfdev_jax.dpo import data as data_lib

_SETTINGS = hypothesis.settings(
    deadline=None, derandomize=True, max_examples=50
)


def _data(prompts, completions, pairs, seed=0):
  """Random ids for prompts and for (prompt, tokens) of each completion."""
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.integers(0, 100, n).astype(np.int32)
  return data_lib.Data(
      prompts=tuple(map(draw, prompts)),
      completions=tuple(draw(size) for _, size in completions),
      prompt_of=np.array([prompt for prompt, _ in completions], np.int32),
      pairs=np.array(pairs, np.int32).reshape(-1, 2),
      source=np.arange(len(pairs), dtype=np.int32) * 3,
      counts=data_lib.Counts(),
  )


@st.composite
def _drawn(draw):
  """Some prompts, each with two completions or more; pairs of neighbours."""
  sizes = st.integers(1, 12)
  prompts = draw(st.lists(sizes, min_size=1, max_size=5))
  completions, pairs = [], []
  for number in range(len(prompts)):
    first = len(completions)
    completions += [
        (number, size) for size in draw(st.lists(sizes, min_size=2, max_size=6))
    ]
    pairs += [(i, i + 1) for i in range(first, len(completions) - 1)]
  return _data(prompts, completions, pairs, draw(st.integers(0, 99)))


# --- order ------------------------------------------------------------------


def _order(lengths, steps, batch_size, seed=0):
  return batches.order(
      jax.random.key(seed), np.array(lengths), steps, batch_size
  )


@pytest.mark.parametrize(
    "pairs, steps, batch_size", [(12, 9, 4), (7, 10, 3), (3, 4, 8)]
)
def test_every_pair_is_seen_equally_often(pairs, steps, batch_size):
  found = _order([40] * pairs, steps, batch_size)
  assert found.shape == (steps, batch_size)
  seen = np.bincount(found.ravel(), minlength=pairs)
  assert seen.sum() == steps * batch_size
  assert seen.max() - seen.min() <= 1


def test_passes_are_whole():
  """All in one bucket: of the window only whole batches change places."""
  found = _order([40] * 8, 12, 4)
  # With one bucket nothing is sorted; each batch is half a pass.
  halves = collections.Counter(frozenset(batch) for batch in found.tolist())
  for half, count in halves.items():
    assert len(half) == 4
    assert halves[frozenset(range(8)) - half] == count
  assert len(halves) > 2  # Passes are shuffled anew.


def test_order_is_a_function_of_its_arguments():
  lengths = np.random.default_rng(0).integers(20, 300, 30)
  one, same, other = (_order(lengths, 20, 4, seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert np.any(one != other)


def test_similar_lengths_meet():
  """In a window at most one batch between two buckets mixes them."""
  rng = np.random.default_rng(0)
  lengths = rng.permutation(np.repeat([30, 90, 250], [100, 61, 39]))
  steps, batch_size = 100, 4  # Two windows, each a pass.
  found = _order(lengths, steps, batch_size)
  for window in np.split(found, 2):
    assert sorted(window.ravel()) == list(range(200))
    kinds = [set(lengths[batch]) for batch in window]
    assert sum(len(kind) > 1 for kind in kinds) <= 2
    # But not one after the other: neither short ones first nor long ones.
    means = lengths[window].mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.4
  # What a pass in its drawn order would need is far more.
  drawn = rng.permutation(200).reshape(-1, batch_size)
  longest = lambda order: lengths[order].max(axis=1).sum()
  assert longest(found[:50]) < 0.7 * longest(drawn)


# --- shapes -----------------------------------------------------------------


def test_buckets():
  table = {
      1: 32,
      32: 32,
      33: 48,
      48: 48,
      49: 64,
      64: 64,
      65: 80,
      97: 112,
      128: 128,
      129: 160,
      256: 256,
      257: 320,
      1000: 1024,
      1025: 1280,
      4097: 5120,
  }
  assert {n: batches.bucket(n) for n in table} == table
  # As they come out of arrays.
  assert [batches.bucket(n) for n in np.array([33, 70])] == [48, 80]


@hypothesis.given(st.integers(1, 100_000))
@_SETTINGS
def test_a_bucket_fits_and_wastes_little(length):
  size = batches.bucket(length)
  assert length <= size
  assert size == 32 or size < 1.5 * length
  assert length <= 64 or size < 1.25 * length
  assert batches.bucket(size) == size


@hypothesis.given(
    st.lists(
        st.integers(2, 500).flatmap(
            lambda n: st.tuples(st.just(n), st.integers(1, n - 1))
        ),
        min_size=1,
        max_size=120,
    )
)
@_SETTINGS
def test_shapes_fit_and_are_few(needs):
  found = batches.shapes(needs)
  assert len(found) == len(needs)
  for (length, predicted), (slots, targets) in zip(needs, found, strict=True):
    assert length <= slots and predicted <= targets
    assert batches.bucket(slots) == slots
    assert batches.bucket(targets) == targets
  counts = collections.Counter(found)
  # One number of targets goes with a number of slots.
  assert len({slots for slots, _ in counts}) == len(counts)
  largest = max(counts)
  assert largest[0] == max(batches.bucket(length) for length, _ in needs)
  for shape, count in counts.items():
    assert count >= 25 or shape == largest


def test_shapes_by_hand():
  """10 of 32 are too few and go to 48's; of 64 there are enough."""
  needs = [(30, 9)] * 10 + [(40, 33)] * 20 + [(60, 20)] * 30 + [(200, 8)]
  found = batches.shapes(needs)
  assert found == [(48, 48)] * 30 + [(64, 32)] * 30 + [(224, 32)]


def test_the_largest_shape_may_serve_one_batch():
  assert batches.shapes([(70, 3)]) == [(80, 32)]


# --- rows -------------------------------------------------------------------


def _sizes(data, row):
  return sum(len(data.completions[number]) for number in row)


@hypothesis.given(_drawn(), st.integers(1, 4), st.randoms())
@_SETTINGS
def test_fill_puts_each_completion_in_one_row(data, per_row, random):
  numbers = list(range(len(data.completions))) * 2
  random.shuffle(numbers)
  numbers = numbers[: len(numbers) // 2 + 1]
  rows = batches.fill(data, np.array(numbers), per_row)
  assert sorted(itertools.chain.from_iterable(rows)) == sorted(set(numbers))
  needed = collections.Counter()
  for row in rows:
    assert 1 <= len(row) <= per_row
    (prompt,) = {int(data.prompt_of[number]) for number in row}
    needed[prompt] += 1
  # Not a row more than it takes.
  distinct = collections.Counter(
      int(data.prompt_of[number]) for number in set(numbers)
  )
  assert needed == {
      prompt: -(-count // per_row) for prompt, count in distinct.items()
  }
  # The same whatever kind of numbers they are.
  assert rows == batches.fill(data, numbers, per_row)


def test_fill_is_balanced():
  """Long ones beside short ones: 9 + 1, 8 + 2, 7 + 3."""
  sizes = (1, 9, 2, 8, 3, 7)
  data = _data([5], [(0, size) for size in sizes], [(0, 1)])
  rows = batches.fill(data, range(6), 2)
  found = sorted(
      sorted(len(data.completions[number]) for number in row) for row in rows
  )
  assert found == [[1, 9], [2, 8], [3, 7]]


def _pack(data, per_row, extra_rows=0, extra=(0, 0)):
  filled = batches.fill(data, range(len(data.completions)), per_row)
  length, targets = batches.most_tokens(data, filled)
  return filled, batches.pack(
      data,
      filled,
      per_row,
      len(filled) + extra_rows,
      (length + extra[0], targets + extra[1]),
  )


@hypothesis.given(
    _drawn(),
    st.integers(1, 3),
    st.integers(0, 3),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
@_SETTINGS
def test_pack_can_be_undone(data, per_row, extra_rows, extra):
  filled, packed = _pack(data, per_row, extra_rows, extra)
  rows = len(filled) + extra_rows
  for leaf in packed:
    assert leaf.dtype == np.int32 and leaf.shape[0] == rows
  assert packed.ends.shape == (rows, 1 + per_row)
  for i in range(rows):
    # The first row makes up what is missing.
    numbers = filled[i] if i < len(filled) else filled[0]
    tokens, ends, sources, targets, owner = (leaf[i] for leaf in packed)
    prompt = data.prompts[data.prompt_of[numbers[0]]]
    np.testing.assert_array_equal(tokens[: ends[0]], prompt)
    for j in range(per_row):
      ids = tokens[ends[j] : ends[j + 1]]
      mine = owner == j
      np.testing.assert_array_equal(targets[mine], ids)
      if j >= len(numbers):
        assert not ids.size
        continue
      np.testing.assert_array_equal(ids, data.completions[numbers[j]])
      # The slot before, but for the first: its source is the prompt's last.
      slots = np.arange(ends[j], ends[j + 1])
      expected = np.where(slots == ends[j], ends[0] - 1, slots - 1)
      np.testing.assert_array_equal(sources[mine], expected)
    # The rest is padding.
    assert not tokens[ends[-1] :].any()
    padding = owner == per_row
    assert padding.sum() == len(owner) - _sizes(data, numbers)
    assert not sources[padding].any() and not targets[padding].any()


def test_pack_by_hand():
  data = dataclasses.replace(
      _data([2], [(0, 3), (0, 2), (0, 1)], [(0, 1)]),
      prompts=(np.array([10, 11], np.int32),),
      completions=(
          np.array([20, 21, 1], np.int32),
          np.array([30, 1], np.int32),
          np.array([1], np.int32),
      ),
  )
  rows = batches.pack(data, [[0, 1], [2]], 2, 3, (9, 6))
  np.testing.assert_array_equal(
      rows.tokens,
      [
          [10, 11, 20, 21, 1, 30, 1, 0, 0],
          [10, 11, 1, 0, 0, 0, 0, 0, 0],
          [10, 11, 20, 21, 1, 30, 1, 0, 0],
      ],
  )
  np.testing.assert_array_equal(rows.ends, [[2, 5, 7], [2, 3, 3], [2, 5, 7]])
  np.testing.assert_array_equal(rows.targets[0], [20, 21, 1, 30, 1, 0])
  np.testing.assert_array_equal(rows.sources[0], [1, 2, 3, 1, 5, 0])
  np.testing.assert_array_equal(rows.owner[0], [0, 0, 0, 1, 1, 2])
  np.testing.assert_array_equal(rows.owner[1], [0, 2, 2, 2, 2, 2])


def test_token_counts():
  data = _data([5, 2], [(0, 3), (0, 4), (1, 9)], [(0, 1)])
  assert batches.tokens(data, [0, 1]) == (12, 7)
  assert batches.tokens(data, [2]) == (11, 9)
  assert batches.most_tokens(data, [[0, 1], [2]]) == (12, 9)
  np.testing.assert_array_equal(batches.row_lengths(data), [12])


# --- the plan ---------------------------------------------------------------

# 3 prompts; the pairs of a prompt share completions.
_DATA = _data(
    [4, 9, 30],
    [(0, 5), (0, 3), (0, 8), (1, 6), (1, 2), (2, 20), (2, 7)],
    [(0, 1), (0, 2), (2, 1), (3, 4), (4, 3), (5, 6)],
)


def _plan(per_row=2, parts=1, seed=0, **options):
  defaults = {"steps": 9, "batch_size": 4, "multiple": 1}
  return batches.plan(
      _DATA,
      jax.random.key(seed),
      per_row=per_row,
      parts=parts,
      **(defaults | options),
  )


def _completion(batch, part, place):
  """(prompt, completion) that a batch's pair points to."""
  per_row = batch.rows.ends.shape[-1] - 1
  i, j = divmod(int(place), per_row)
  tokens, ends = batch.rows.tokens[part, i], batch.rows.ends[part, i]
  return tokens[: ends[0]], tokens[ends[j] : ends[j + 1]]


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("per_row", [1, 2, 3])
def test_batches_point_to_their_completions(per_row, parts, multiple):
  plan = _plan(per_row, parts, multiple=multiple)
  reference = -np.arange(7, dtype=np.float64)
  assert plan.order.shape == (9, parts, 4 // parts)
  assert len(plan.shapes) == 9 and plan.rows % multiple == 0
  for step in range(9):
    batch = plan.batch(step, reference)
    slots, targets = plan.shapes[step]
    lead = (parts, plan.rows)
    assert batch.rows.tokens.shape == (*lead, slots)
    assert batch.rows.ends.shape == (*lead, 1 + per_row)
    for leaf in (batch.rows.sources, batch.rows.targets, batch.rows.owner):
      assert leaf.shape == (*lead, targets)
    assert batch.pairs.shape == batch.reference.shape == (parts, 4 // parts, 2)
    assert batch.pairs.dtype == np.int32
    assert batch.reference.dtype == np.float32
    for part in range(parts):
      for k, pair in enumerate(plan.order[step, part]):
        for side, number in enumerate(_DATA.pairs[pair]):
          prompt, ids = _completion(batch, part, batch.pairs[part, k, side])
          np.testing.assert_array_equal(
              prompt, _DATA.prompts[_DATA.prompt_of[number]]
          )
          np.testing.assert_array_equal(ids, _DATA.completions[number])
          assert batch.reference[part, k, side] == reference[number]


def test_rows_are_as_many_as_the_fullest_part_needs():
  rows = lambda **options: _plan(batch_size=6, steps=1, **options).rows
  assert rows(per_row=1) == 7  # Every pair, 7 distinct completions.
  assert rows(per_row=1, multiple=4) == 8
  # Of the three of prompt 0 two rows, of the others one each.
  assert rows(per_row=2) == 4
  # Most in one part: all three of prompt 0, or of two prompts three or four.
  assert 2 <= rows(per_row=2, parts=3) <= 3


def test_few_shapes():
  assert len(set(_plan(steps=40).shapes)) <= 2
  # Prompt 2 with both completions has 57 tokens.
  assert max(_plan(batch_size=6, steps=3).shapes) == (64, 32)
  assert max(_plan(batch_size=6, steps=3, per_row=1).shapes) == (64, 32)


def test_equal_arguments_equal_batches():
  reference = np.zeros(7, np.float32)
  one, same, other = (_plan(seed=seed) for seed in (0, 0, 1))
  for step in range(9):
    jax.tree.map(
        np.testing.assert_array_equal,
        one.batch(step, reference),
        same.batch(step, reference),
    )
  assert np.any(one.order != other.order)


@pytest.mark.parametrize("parts", [1, 2])
def test_tokens_are_counted_as_trl_does(parts):
  """Its batch holds prompt and completion of each of a pair, none shared."""
  plan = _plan(parts=parts)
  for step in range(9):
    expected = sum(
        len(_DATA.prompts[_DATA.prompt_of[number]])
        + len(_DATA.completions[number])
        for pair in plan.order[step].flat
        for number in _DATA.pairs[pair]
    )
    assert plan.tokens(step) == expected


def test_describe_names_the_input_rows():
  plan = _plan(parts=2)
  described = plan.describe(3)
  assert len(described) == 4
  for pair, found in zip(plan.order[3].flat, described, strict=True):
    chosen, rejected = _DATA.pairs[pair]
    assert found == {
        "row": 3 * pair + 1,
        "prompt_ids": list(_DATA.prompts[_DATA.prompt_of[chosen]]),
        "chosen_ids": list(_DATA.completions[chosen]),
        "rejected_ids": list(_DATA.completions[rejected]),
    }
    assert isinstance(found["row"], int)
    assert all(type(i) is int for i in found["prompt_ids"])
