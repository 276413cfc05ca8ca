"""Token rows of pairs: the EOS, the masks, the order."""

from absl.testing import parameterized
import jax
import numpy as np

from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax.dpo import data as data_lib

_EOS = 0


def encode(text, add_special_tokens=True):
  """One token a character, after a beginning-of-sequence token 1."""
  return [1] * add_special_tokens + [ord(c) - ord("a") + 2 for c in text]


def _pair(chosen, rejected, prompt="ab"):
  return records.Pair(1, 0, prompt, chosen, rejected, "x", "y")


class TokenizeTest(parameterized.TestCase):

  def test_rows(self):
    data = data_lib.tokenize([_pair("c", "de")], encode, _EOS, 64)
    self.assertEqual(data.tokens.shape, (2, 32))
    self.assertEqual(data.tokens.dtype, np.int32)
    np.testing.assert_array_equal(data.tokens[0, :6], [1, 2, 3, 4, _EOS, _EOS])
    np.testing.assert_array_equal(data.tokens[1, :6], [1, 2, 3, 5, 6, _EOS])
    # The EOS counts, its twins of the padding do not.
    np.testing.assert_array_equal(np.flatnonzero(data.is_completion[0]), [3, 4])
    np.testing.assert_array_equal(
        np.flatnonzero(data.is_completion[1]), [3, 4, 5]
    )
    np.testing.assert_array_equal(data.pairs, [[0, 1]])

  def test_each_distinct_row_once(self):
    pairs = [_pair("c", "d"), _pair("c", "e"), _pair("d", "e")]
    data = data_lib.tokenize(pairs, encode, _EOS, 64)
    self.assertLen(data.tokens, 3)
    np.testing.assert_array_equal(data.pairs, [[0, 1], [0, 2], [1, 2]])

  def test_prompts_are_kept_apart(self):
    pairs = [_pair("c", "d"), _pair("c", "d", prompt="b")]
    data = data_lib.tokenize(pairs, encode, _EOS, 64)
    np.testing.assert_array_equal(data.pairs, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(
        np.argmax(data.is_completion, axis=1), [3, 3, 2, 2]
    )

  @parameterized.parameters((28, 32), (29, 64))
  def test_length_is_a_multiple_of_32(self, characters, length):
    data = data_lib.tokenize([_pair("c" * characters, "d")], encode, _EOS, 64)
    self.assertEqual(data.tokens.shape[1], length)

  def test_empty_completion_is_an_eos(self):
    data = data_lib.tokenize([_pair("c", "")], encode, _EOS, 64)
    np.testing.assert_array_equal(np.flatnonzero(data.is_completion[1]), [3])

  def test_too_long(self):
    # Three tokens of prompt, 60 letters and the EOS are 64.
    data_lib.tokenize([_pair("c" * 60, "d")], encode, _EOS, 64)
    with self.assertRaisesRegex(errors.UserError, "65 tokens.* 64 positions"):
      data_lib.tokenize([_pair("c" * 61, "d")], encode, _EOS, 64)

  def test_no_pairs(self):
    with self.assertRaisesRegex(errors.UserError, "at least one preference"):
      data_lib.tokenize([], encode, _EOS, 64)

  def test_empty_prompt(self):
    with self.assertRaisesRegex(errors.UserError, "without a token"):
      data_lib.tokenize(
          [_pair("c", "d", prompt="")],
          lambda text, add_special_tokens=True: encode(text, False),
          _EOS,
          64,
      )


class DistinctRowsTest(parameterized.TestCase):

  @parameterized.parameters((1, 4), (3, 6), (8, 8))
  def test_pairs_find_their_rows(self, multiple, expected):
    batches = np.array(
        [[[0, 5], [0, 7], [0, 5]], [[2, 9], [3, 9], [2, 4]]], np.int32
    )
    found, size = data_lib.distinct_rows(batches, multiple)
    self.assertEqual(size, expected)
    for batch, (rows, pairs) in zip(batches, found, strict=True):
      self.assertEqual((rows.shape, rows.dtype), ((size,), np.int32))
      np.testing.assert_array_equal(rows[pairs], batch)
    self.assertLen(set(found[0][0]), 3)


class OrderTest(parameterized.TestCase):

  @parameterized.parameters((10, 4, 5), (3, 4, 8), (7, 1, 3), (1, 2, 2))
  def test_whole_passes(self, n, steps, batch_size):
    order = data_lib.order(jax.random.key(0), n, steps, batch_size)
    self.assertEqual(order.shape, (steps, batch_size))
    flat = order.reshape(-1)
    for start in range(0, len(flat) - n + 1, n):
      self.assertEqual(sorted(flat[start : start + n]), list(range(n)))

  def test_key_decides(self):
    one, same, other = (
        data_lib.order(jax.random.key(seed), 20, 4, 5) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    self.assertTrue((one != other).any())
    # The passes differ among themselves.
    long = data_lib.order(jax.random.key(0), 20, 8, 5).reshape(2, 20)
    self.assertTrue((long[0] != long[1]).any())
