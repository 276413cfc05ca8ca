"""Programs, rebuilt from IR, against the same Python run as it stands."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import config
from selfdev_jax import sandbox
from selfdev_jax.programs import contract

SHAPES = [(6, 4), (5,)]
LAYERS = 3
EXPERTS = 3
# Compiling is all that these tests spend time on.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
GOLDEN = sorted((pathlib.Path(__file__).parent / "golden").glob("*.py"))


@pytest.fixture(scope="module")
def box():
  with sandbox.Sandbox(config.Sandbox(), SHAPES, EXPERTS) as box:
    yield box


def _direct(source):
  namespace = contract.namespace()
  exec(source, namespace)  # These files are ours.
  return namespace["merge"]


def _arrays(shape, layers=()):
  rng = np.random.default_rng(0)

  def draw():
    return jnp.asarray(rng.normal(size=(*layers, *shape)), jnp.float32)

  return draw(), [0.3 * draw() for _ in range(EXPERTS)]


def _jit_all(merge):
  """One compilation for every shape, each program's share of the time."""
  return jax.jit(
      lambda arguments: [merge(*x) for x in arguments],
      compiler_options=_QUICK,
  )


@pytest.mark.parametrize(
    "path",
    [  # Every second with the fast ones.
        pytest.param(
            path, id=path.stem, marks=[] if i % 2 else [pytest.mark.slow]
        )
        for i, path in enumerate(GOLDEN)
    ],
)
def test_equals_direct_execution(box, path):
  source = path.read_text()
  verdict = box.admit(source)
  assert isinstance(verdict, sandbox.Admitted), verdict
  arguments = [_arrays(shape) for shape in SHAPES]
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    want = _jit_all(_direct(source))(arguments)
  with jax.numpy_dtype_promotion("strict"):
    got = _jit_all(sandbox.build(verdict.program))(arguments)
  for x, y in zip(got, want, strict=True):
    assert x.dtype == jnp.float32
    # The same primitives in the same order: nearly the same bits.
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["ties", "dare", "svd_low_rank", "cond", "scan", "linear_algebra"]
)
def test_vmap_over_layers_under_jit(box, name):
  source = next(path for path in GOLDEN if path.stem == name).read_text()
  merge = sandbox.build(box.admit(source).program)
  base, task_vectors = _arrays((6, 4), (LAYERS,))
  with jax.numpy_dtype_promotion("strict"):
    got = jax.jit(jax.vmap(merge), compiler_options=_QUICK)(base, task_vectors)
    single = jax.jit(merge, compiler_options=_QUICK)
    want = [
        single(base[i], [t[i] for t in task_vectors]) for i in range(LAYERS)
    ]
  # XLA fuses: some sums are taken in another order.
  np.testing.assert_allclose(got, np.stack(want), rtol=1e-4, atol=1e-4)


def test_build_names_what_does_not_fit(box):
  merge = sandbox.build(
      box.admit("def merge(base, task_vectors):\n  return base").program
  )
  base, task_vectors = _arrays((6, 4))
  with pytest.raises(ValueError, match=r"not admitted for shape \(4, 6\)"):
    merge(base.T, task_vectors)
  with pytest.raises(ValueError, match="takes 3 task vectors, not 2"):
    merge(base, task_vectors[:2])
  with pytest.raises(ValueError, match="float32"):
    merge(base.astype(jnp.bfloat16), task_vectors)
