"""Which programs share a digest, and which do not."""

import functools

import pytest

from selfdev_jax import config
from selfdev_jax.sandbox import trace
from selfdev_jax.sandbox import verify

_HEAD = "def merge(base, task_vectors):\n"
_SUM = _HEAD + "  return base + 0.3 * sum(task_vectors)\n"


# `trace` runs these in this process: they are ours.
@functools.cache
def digest(source, shapes=((3, 4), (4,))):
  if "return" not in source:
    source = f"{_HEAD}  return {source}\n"
  text = trace.trace(source, list(shapes), 2, 1000)
  return verify.verify(text, config.Sandbox(), shapes, 2).digest


@pytest.mark.parametrize(
    "source",
    [
        "def merge(w, tvs):  # Renamed.\n  return w + 0.3 * sum(tvs)\n",
        _HEAD + "  return sum(task_vectors) * 0.3 + base\n",
        _HEAD + "  unused = jnp.exp(base)\n" + _SUM.partition("\n")[2],
        _HEAD + "  acc = 0\n  for t in task_vectors:\n    acc = acc + t\n"
        "  return base + 0.3 * acc\n",
        _HEAD + "  acc = 0.0\n  for t in task_vectors:\n    acc += t\n"
        "  return base + 0.3 * acc\n",
        _HEAD + "  acc = jnp.zeros_like(base)\n  for t in task_vectors:\n"
        "    acc = t + acc\n  return acc * 0.3 + base\n",
        "import jax\n" + _HEAD + "  return jax.jit(lambda b, t: b + 0.3 * t)"
        "(base, sum(task_vectors))\n",
        "base + 0.3 * (task_vectors[1] + task_vectors[0])",
        "base + 0.3 * sum(task_vectors) * 1.0",
        "base + jnp.float32(0.3) * sum(task_vectors)",
        "(base + 0.3 * sum(task_vectors)).astype(jnp.float32)",
    ],
)
def test_same_as_weighted_sum(source):
  assert digest(source) == digest(_SUM)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("base ** 2", "base * base"),
        ("jnp.square(base)", "base * base"),
        ("2 * base", "base * 2.0"),
        ("jnp.where(base > 0, base, 0)", "jnp.where(0 < base, base, 0.0)"),
        ("jnp.maximum(base, 0)", "jnp.maximum(0.0, base)"),
        (
            "jnp.exp(base) + jnp.exp(base)",
            _HEAD + "  x = jnp.exp(base)\n  return x + x\n",
        ),
    ],
)
def test_same(one, other):
  assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("base + 0.3 * task_vectors[0]", "base + 0.31 * task_vectors[0]"),
        ("base + task_vectors[0]", "base + task_vectors[1]"),
        ("base - task_vectors[0]", "task_vectors[0] - base"),
        ("base / 2", "2 / base"),
        ("jnp.where(base > 0, base, 0)", "jnp.where(base >= 0, base, 0)"),
        ("jnp.sort(base, axis=0)", "jnp.flip(jnp.sort(base, axis=0), 0)"),
        (
            "base + jax.random.normal(jax.random.key(0), base.shape)",
            "base + jax.random.normal(jax.random.key(1), base.shape)",
        ),
        (
            "lax.fori_loop(0, 2, lambda i, x: x / 2, base)",
            "lax.fori_loop(0, 3, lambda i, x: x / 2, base)",
        ),
        (
            "lax.fori_loop(0, 2, lambda i, x: x / 2, base)",
            "lax.fori_loop(0, 2, lambda i, x: x / 3, base)",
        ),
        (
            "jnp.linalg.norm(base) + jnp.zeros_like(base)",
            "jnp.linalg.norm(base) * jnp.ones_like(base) + base",
        ),
        (
            "lax.cond(base.sum() > 0, lambda: base, lambda: 2 * base)",
            "lax.cond(base.sum() > 0, lambda: 2 * base, lambda: base)",
        ),
    ],
)
def test_different(one, other):
  assert digest(one) != digest(other)


def test_shapes_are_part_of_the_name():
  assert digest(_SUM, ((3, 4),)) != digest(_SUM, ((4, 3),))
  assert digest(_SUM, ((3, 4), (4,))) == digest(_SUM, ((4,), (3, 4)))


def test_a_branch_on_the_shape_is_seen():
  both = digest("base if base.ndim > 1 else 2 * base")
  assert both != digest("base")
  assert both != digest("2 * base")
