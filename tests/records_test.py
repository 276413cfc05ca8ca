import hypothesis
from hypothesis import strategies as st
import pytest

from selfdev_jax import records


def test_wilson_matches_published_values():
  # Newcombe (1998), table I: 81 of 263 and 15 of 148.
  assert records.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
  assert records.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


@hypothesis.given(
    st.integers(1, 5000).flatmap(
        lambda n: st.tuples(st.integers(0, n), st.just(n))
    )
)
def test_wilson_holds_the_proportion_and_mirrors(case):
  correct, n = case
  low, high = records.wilson(correct, n)
  assert 0 <= low <= correct / n + 1e-12 and correct / n - 1e-12 <= high <= 1
  mirrored = records.wilson(n - correct, n)
  assert mirrored == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("case", [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_proportion(case):
  with pytest.raises(ValueError, match="no proportion"):
    records.wilson(*case)


def test_a_merge_that_was_not_finite_has_no_accuracy():
  score = records.Score("program:x", records.DEV, 10, None)
  assert score.accuracy is None and score.interval is None
