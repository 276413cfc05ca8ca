"""Programs split into skeleton and literals do what they did whole."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import merging
from selfdev_jax import sandbox
from selfdev_jax.merging import engine

_SHAPES = [(6, 4), (5,)]
_GOLDEN = sorted((pathlib.Path(__file__).parent / "golden").glob("*.py"))


@pytest.fixture(scope="module")
def box():
  with sandbox.Sandbox(config_lib.Sandbox(), _SHAPES, 3) as opened:
    yield opened


def _inputs(shape):
  keys = jax.random.split(jax.random.key(0), 4)
  base, *task_vectors = (jax.random.normal(key, shape) for key in keys)
  return base, task_vectors


@pytest.mark.parametrize(
    "path",
    [  # Every third with the fast ones.
        pytest.param(
            path, id=path.stem, marks=[pytest.mark.slow] if i % 3 != 1 else []
        )
        for i, path in enumerate(_GOLDEN)
    ],
)
def test_kernels_equal_the_whole_program(path, box):
  admitted = box.admit(path.read_text())
  if isinstance(admitted, sandbox.Rejection):  # Not for vectors.
    pytest.skip(f"{path.stem} does not take these shapes: {admitted.message}")
  whole = sandbox.build(admitted.program)
  lifted = sandbox.kernels(admitted.program)
  for shape in _SHAPES:
    base, task_vectors = _inputs(shape)
    kernel, literals = lifted(shape)
    assert literals.dtype == np.float32
    found = jax.jit(kernel)(base, task_vectors, literals)
    expected = jax.jit(whole)(base, task_vectors)
    # XLA folds constants that it knows, and rounds them in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def _program(box, scale, power=2):
  return box.admit(
      "def merge(base, task_vectors):\n"
      f"  return base + {scale} * sum(t ** {power} for t in task_vectors)\n"
  ).program


def test_programs_of_one_structure_share_a_kernel(box):
  first, second = (sandbox.kernels(_program(box, s)) for s in (0.25, 0.75))
  for shape in _SHAPES:
    (kernel, literals), (same, others) = first(shape), second(shape)
    assert kernel is same
    assert 0.25 in literals and 0.75 in others
  assert sandbox.kernels(_program(box, 0.25, 3))((5,))[0] is not kernel


def test_the_engine_compiles_one_structure_once(box):
  def run(scale):
    params = {"layers": {"mlp": {"up": jnp.ones((2, 6, 4))}}}
    experts = [jax.tree.map(lambda x: x * 3, params)] * 3
    method = sandbox.kernels(_program(box, scale, 4))
    return merging.Merger(params, experts, scope="mlp").run(method)

  run(0.5)
  merged, finite = run(0.25)
  kernel, _ = sandbox.kernels(_program(box, 0.125, 4))((6, 4))
  compiled = engine.kernel(
      engine.of_program(kernel),
      stacked=True,
      dtype=jnp.dtype(jnp.float32),
      layout=None,
      check=engine.RESULT,
      deals=False,
  )
  assert compiled._cache_size() == 1
  assert finite
  # 1 + scale * 3 * 2 ** 4: every expert is 2 away from the base.
  np.testing.assert_allclose(merged["layers"]["mlp"]["up"], 13.0)
