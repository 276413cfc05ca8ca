"""The AST filter: one refused program for each of its reasons."""

import pytest

from selfdev_jax.programs import contract
from selfdev_jax.sandbox import filter as filter_lib

_BODY = "def merge(base, task_vectors):\n  return base\n"


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        (" \n", "empty", "empty"),
        ("#" * (contract.MAX_SOURCE_CHARS + 1), "too_long", "characters"),
        ("def merge(base:\n", "syntax", "line 1"),
        ("if True:\n  x = 1\n y = 2\n", "syntax", "line 3"),
        ("\0" + _BODY, "syntax", "null bytes"),
        ("\ud800" + _BODY, "encoding", "character"),
        ("(" * 5000, "syntax", "too many nested"),
        ("x = " + "-" * 15_000 + "1\n" + _BODY, "nesting", "deeply"),
        ("x = 1\n", "no_merge", "merge(base, task_vectors)"),
        ("if True:\n  def merge(a, b): return a\n", "no_merge", "top level"),
        ("def merge(base):\n  return base\n", "arity", "line 1"),
        ("def merge(a, b, c):\n  return a\n", "arity", "two arguments"),
        ("def merge(a, b, *, c):\n  return a\n", "arity", "two arguments"),
        ("import os\n" + _BODY, "import", "line 1: cannot import os"),
        ("import numpy as np\n" + _BODY, "import", "jax.numpy"),
        ("import jax.experimental\n" + _BODY, "import", "jax.experimental"),
        ("from jax import ffi\n" + _BODY, "import", "jax.ffi"),
        ("from jax.numpy import save\n" + _BODY, "import", "jax.numpy.save"),
        ("from jax.numpy import *\n" + _BODY, "import", "jax.numpy.*"),
        ("from . import x\n" + _BODY, "import", "cannot import ."),
        (_BODY + "open('x')\n", "name", "line 3: the name open"),
        (_BODY + "eval('1')\n", "name", "eval"),
        (_BODY + "getattr(jnp, 'sa' + 've')\n", "name", "getattr"),
        (_BODY + "__import__('os')\n", "name", "__import__"),
        (_BODY + "__builtins__['open']\n", "name", "__builtins__"),
        (_BODY + "().__class__\n", "attribute", "__class__"),
        (_BODY + "jnp._src\n", "attribute", "_src"),
        (_BODY + "int.mro()\n", "attribute", "mro"),
        (
            _BODY + "match 1:\n  case int(__class__=c): pass\n",
            "attribute",
            "line 4: the attribute __class__",
        ),
        (_BODY + "(x for x in ()).gi_frame\n", "attribute", "gi_frame"),
        (_BODY + "jnp.save('x', 1)\n", "attribute", "save"),
        (_BODY + "jnp.load('x')\n", "attribute", "load"),
        (_BODY + "jnp.fromfile('x')\n", "attribute", "fromfile"),
        (_BODY + "jax.pure_callback(f, 1)\n", "attribute", "pure_callback"),
        (_BODY + "jax.ffi.ffi_call('x')\n", "attribute", "ffi"),
        (_BODY + "jax.config.update('x', 1)\n", "attribute", "config"),
        (_BODY + "jnp.sum = max\n", "assignment", "line 3"),
        (_BODY + "del jnp.sum\n", "assignment", "line 3"),
        ("while True:\n  pass\n" + _BODY, "endless_loop", "line 1"),
        ("class A: pass\n" + _BODY, "statement", "class"),
        ("def merge(a, b):\n  yield a\n", "statement", "yield"),
    ],
)
def test_refuses(source, code, words):
  with pytest.raises(filter_lib.FilterError) as caught:
    filter_lib.check(source)
  assert caught.value.code == code
  assert words in caught.value.message
  assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        _BODY,
        "def merge(b, tvs, scale=0.3):\n  return b\n",
        "def merge(*args):\n  return args[0]\n",
        "import jax\nimport jax.numpy as jnp\nimport math\n" + _BODY,
        "from jax import lax, nn, numpy as jnp, random\n" + _BODY,
        "from functools import partial, reduce\n" + _BODY,
        "from typing import List, Optional\nimport itertools\n" + _BODY,
        "from jax.numpy import linalg\nimport jax.numpy.linalg as la\n" + _BODY,
        "def helper(x):\n  while True:\n    return x\n" + _BODY,
        "def merge(base, tvs):\n  assert tvs\n  return base\n",
    ],
)
def test_accepts(source):
  filter_lib.check(source)
