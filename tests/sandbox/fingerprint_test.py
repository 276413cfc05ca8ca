"""Which programs share a fingerprint, and which do not."""

import functools
import itertools

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax.sandbox import fingerprint
from selfdev_jax.sandbox import ir
from selfdev_jax.sandbox import rebuild
from selfdev_jax.sandbox import trace

_SHAPES = [(64, 96), (300,)]
_HEAD = "def merge(base, task_vectors):\n"


@functools.cache
def _program(source):
  if "return" not in source:
    source = f"{_HEAD}  return {source}\n"
  return ir.loads(trace.trace(source, _SHAPES, 3, 5000))


@functools.cache
def _print(source):
  return fingerprint.compute(_program(source).leaves, _SHAPES)


def _same(one, other):
  first = fingerprint.first_alike([_print(one), _print(other)])
  assert first in ([0, 0], [0, 1])
  return first == [0, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("sum(task_vectors)", "jnp.stack(task_vectors).sum(0)"),
        (
            "base + 0.3 * sum(task_vectors)",
            "base + sum(0.3 * t for t in task_vectors)",
        ),
        ("base + task_vectors[0]", "base * 1.0 + 0.5 * task_vectors[0] * 2.0"),
        (
            "base + jnp.mean(jnp.stack(task_vectors), axis=0)",
            "base + sum(task_vectors) / 3",
        ),
        (
            "jnp.where(base > 0, base, -base)",
            "jnp.abs(base)",
        ),
        (
            "base + jnp.median(jnp.stack(task_vectors), axis=0)",
            "base + jnp.sort(jnp.stack(task_vectors), axis=0)[1]",
        ),
    ],
)
def test_same_function_in_other_words(one, other):
  assert _same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("base + 0.30 * task_vectors[0]", "base + 0.31 * task_vectors[0]"),
        ("base + task_vectors[0]", "base + task_vectors[1]"),
        ("base + task_vectors[0]", "base - task_vectors[0]"),
        ("base", "base * 1.0001"),
        ("base + task_vectors[0]", "base + task_vectors[0] + 1e-5"),
        (
            "base if base.ndim > 1 else 2 * base",
            "base",
        ),
        (
            "base + jax.random.normal(jax.random.key(0), base.shape)",
            "base + jax.random.normal(jax.random.key(1), base.shape)",
        ),
    ],
)
def test_different(one, other):
  assert not _same(one, other)


# A constant as factories use them; the field is where it goes.
_TEMPLATES = (
    "base + {} * sum(task_vectors)",
    "base + sum({} ** i * t for i, t in enumerate(task_vectors, 1))",
    "base + sum(jnp.where(jnp.abs(t) > jnp.quantile(jnp.abs(t), {}), t, 0)"
    " for t in task_vectors)",
    "base + jnp.tanh({} * task_vectors[0])",
    "base + task_vectors[0] * jax.random.bernoulli(jax.random.key(0), {},"
    " base.shape)",
    "base + jnp.clip(task_vectors[1], -{0} * 0.003, {0} * 0.003)",
    "(1 - {0}) * base + {0} * (base + task_vectors[2])",
    "base + task_vectors[0] * jax.nn.sigmoid(100 * task_vectors[1] - {})",
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    st.sampled_from(_TEMPLATES),
    st.floats(0.1, 0.9),
    st.sampled_from([0.99, 1.01]),
)
def test_one_percent_of_a_constant_shows(template, constant, factor):
  one = template.format(round(constant, 6))
  other = template.format(round(constant * factor, 6))
  assert not _same(one, other)


def test_op_by_op_is_the_program():
  # Loops and branches are run by the fingerprint's own hand.
  for source in (
      "lax.fori_loop(0, 3, lambda i, x: x * 0.5 + i, base)",
      "lax.fori_loop(0, 2000, lambda i, x: x * 0.999, base)",
      "lax.scan(lambda c, t: (c + t, c * 0), base, jnp.stack(task_vectors))[0]",
      "lax.scan(lambda c, t: (c * 0.5, c + t), base, jnp.stack(task_vectors),"
      " reverse=True)[1][0]",
      "lax.cond(base.sum() > 0, lambda: base, lambda: 2 * base)",
      "lax.switch(7, [lambda: base, lambda: 3 * base])",
      "base + jnp.stack([jnp.cumsum(base, 0), base]).max(0)",
  ):
    block = _program(source).leaves[_SHAPES[0]]
    rng = np.random.default_rng(0)
    arguments = [
        jnp.asarray(rng.standard_normal(_SHAPES[0]), jnp.float32)
        for _ in range(4)
    ]
    (found,) = fingerprint._run(block, arguments)
    (expected,) = rebuild.evaluate(block, arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_probes_are_leaves_or_stand_ins():
  probes = fingerprint.probe_shapes
  assert probes([(6, 4), (5,)]) == [(5,), (6, 4)]
  assert probes([(4, 6), (64, 64), (4096, 4096)]) == [(64, 64)]
  assert probes([(4096, 4096), (14336, 4096)]) == [(64, 96), (96, 64)]
  assert probes([(14336, 4096), (128, 20)]) == [(128, 20)]
  assert probes([(4096,), (4096, 4096)]) == [(4096,), (64, 96)]


def test_not_finite_is_nan():
  assert not np.isnan(_print("base")).any()
  assert np.isnan(_print("jnp.log(-jnp.abs(base))")).all()
  # Only the vectors.
  some = np.isnan(_print("base if base.ndim > 1 else base / 0.0"))
  assert some.any() and not some.all()


def test_new_by_round():
  prints = {"a": [1.0] * 4, "b": [2.0] * 4, "c": [1.00001] * 4, "d": []}
  assert fingerprint.new_by_round(
      [["a", "a", "b"], ["c", "b", "d"], ["a", "d"]], prints
  ) == [["a", "b"], ["d"], []]
  # Without a fingerprint two programs are two.
  assert fingerprint.first_alike([[], []]) == [0, 1]
  assert fingerprint.first_alike([]) == []


def _first_alike_by_pairs(fingerprints):
  """Each with all before it, as it was once computed."""
  size = max(map(len, fingerprints), default=0)
  rows = np.full((len(fingerprints), size // 4, 4), np.inf)
  first, kept = [], []
  for i, numbers in enumerate(fingerprints):
    if not numbers:
      first.append(i)
      continue
    rows[i] = np.reshape(numbers, rows.shape[1:])
    found = np.flatnonzero(fingerprint._near(rows[kept], rows[i]))
    first.append(kept[found[0]] if found.size else i)
    if not found.size:
      kept.append(i)
  return first


# At the edges of the tolerance, and where numbers end.
_STEPS = (0.5, 0.9999, 1 - 1e-12, 1.0, 1 + 1e-12, 1.0001, 1.5, 2.0, 10.0)
_FACTORS = [1.0, *(1 + s * d for d in (-1e-4, 1e-4) for s in _STEPS)]
_ODD = [0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, 1e-320, 3e-308, 1.7e308]
_DRAWN = st.builds(
    lambda number, factor, sign: sign * number * factor,
    st.sampled_from([1.0, 0.02, 1.0001, 2.0**60, 2.5e-320]),
    st.sampled_from(_FACTORS),
    st.sampled_from([1.0, 1.0, 1.0, -1.0]),
)
_PROBE = st.one_of(
    # Alike but for the norm, alike throughout, anything.
    _DRAWN.map(lambda x: [x, 0.0, 0.0, 0.0]),
    _DRAWN.map(lambda x: [x, x / 50, -x / 70, 1e-9]),
    st.tuples(*[_DRAWN | st.sampled_from(_ODD)] * 4).map(list),
)


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(st.data())
def test_first_alike_is_that_of_all_pairs(data):
  probes = data.draw(st.integers(1, 2))
  whole = st.lists(_PROBE, min_size=probes, max_size=probes).map(
      lambda rows: list(itertools.chain(*rows))
  )
  prints = data.draw(st.lists(whole | st.just([]), max_size=12))
  with np.errstate(all="ignore"):  # Infinite differences.
    assert fingerprint.first_alike(prints) == _first_alike_by_pairs(prints)


def test_first_alike_of_many_programs_is_that_of_all_pairs():
  rng = np.random.default_rng(0)
  norms = rng.choice(np.geomspace(0.1, 10, 300), 1500)
  norms *= 1 + 1e-4 * rng.choice([0, -1, 1, 0.4, 1.2], 1500)
  prints = np.repeat(norms, 8) * np.tile([1, 0.1, -0.1, 0.2] * 2, 1500)
  prints = prints.reshape(1500, 8).tolist()
  first = fingerprint.first_alike(prints)
  assert first == _first_alike_by_pairs(prints)
  assert 300 < len(set(first)) < 1200
