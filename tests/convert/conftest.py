"""What the tests of the converter share."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def assert_same_bits():
  """assert_same_bits(got, expected): structure, dtypes, shapes and bytes."""

  def compare(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)

    def check(x, y):
      assert (x.dtype, x.shape) == (y.dtype, y.shape)
      assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(check, got, expected)

  return compare
