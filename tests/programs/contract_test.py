"""What a program's names lead to, and what they do not."""

import types

import pytest

from selfdev_jax.programs import contract


def _run(source):
  namespace = contract.namespace()
  exec(source, namespace)  # These lines are ours.
  return namespace


@pytest.mark.parametrize(
    "source",
    [
        "import jax",
        "import jax.numpy as jnp; jnp.abs; jnp.linalg.norm; jnp.fft.fft",
        "import jax.numpy; jax.numpy.linalg.svd",
        "from jax import lax, nn, random, numpy as jnp; nn.relu; lax.top_k",
        "from jax.numpy import linalg, where",
        "import jax.scipy.special as special; special.logsumexp",
        "import math; math.sqrt(2)",
        "from functools import reduce, partial",
        "import itertools; itertools.combinations",
        "from typing import List, Sequence, Callable, Any",
        "jnp.float32; jnp.pi; jax.vmap; jax.Array; lax.scan; print; sorted",
    ],
)
def test_usual_names(source):
  _run(source)


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import numpy",
        "import sys",
        "import jax._src",
        "from jax import config",
        "from jax import experimental",
        "import functools; functools.sys",
        "from . import x",
        "__import__('os')",
        "open('x')",
        "eval('1')",
        "jnp.save",
        "jnp.load",
        "jnp.fromfile",
        "jnp.np",
        "jax.pure_callback",
        "jax.ffi",
        "jax.config",
        "jax.lax.infeed",
        "math.sys",
    ],
)
def test_absent_names(source):
  with pytest.raises((ImportError, AttributeError, NameError)):
    _run(source)


def test_no_facade_holds_a_module():
  for facade in contract.modules().values():
    for value in vars(facade).values():
      assert not isinstance(value, types.ModuleType)


def test_c_code_that_imports_in_a_programs_frame_works():
  # numpy's C API looks its module up by the calling frame's import function.
  assert _run("x = __import__('numpy', {}, {}, [])")["x"] is None
