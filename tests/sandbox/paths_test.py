"""Conditions on tensor values: traced programs against plain Python."""

import textwrap

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import config
from selfdev_jax.programs import contract
from selfdev_jax.sandbox import paths
from selfdev_jax.sandbox import rebuild
from selfdev_jax.sandbox import trace
from selfdev_jax.sandbox import verify

SHAPE = (4,)
EXPERTS = 3
LIMITS = config.Sandbox()
# Drawn until the conditions below have come out both ways.
DRAWS = 6


def _merge(body, head=""):
  body = textwrap.indent(textwrap.dedent(body).strip(), "  ")
  return f"{head}\ndef merge(base, task_vectors):\n{body}\n"


def _admit(source, shapes=(SHAPE,)):
  text = trace.trace(source, list(shapes), EXPERTS, LIMITS.max_equations)
  return verify.verify(text, LIMITS, list(shapes), EXPERTS)


def _refuse(source, shapes=(SHAPE,)):
  with pytest.raises(trace.TraceError) as caught:
    _admit(source, shapes)
  assert caught.value.stage == "trace"
  return caught.value


def _arrays(seed, shape=SHAPE):
  rng = np.random.default_rng(seed)
  draws = rng.normal(size=(1 + EXPERTS, *shape)).astype(np.float32)
  base, *task_vectors = map(jnp.asarray, draws)
  return base, task_vectors


def _plain(source):
  """The program as Python runs it, on arrays that have values."""

  def merge(base, task_vectors):
    namespace = contract.namespace()
    exec(source, namespace)  # These programs are ours.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
      return contract.apply(
          namespace["merge"],
          base,
          list(task_vectors),
          contract.is_torch_style(source),
      )

  return merge


def _assert_same(source, draws=DRAWS):
  traced, plain = rebuild.build(_admit(source).program), _plain(source)
  for seed in range(draws):
    arguments = _arrays(seed)
    np.testing.assert_allclose(
        traced(*arguments), plain(*arguments), rtol=1e-6, atol=1e-6
    )


PROGRAMS = {
    "if": "if base.sum() > 0:\n  base = -base\nreturn base",
    "else": """
        if task_vectors[0].mean() < base.mean():
          return base + task_vectors[0]
        else:
          return base - task_vectors[1]
        """,
    "elif": """
        s = base.sum()
        if s > 1: scale = 0.5
        elif s > 0: scale = 0.25
        elif s > -1: scale = 0.125
        else: scale = 0
        return base + scale * task_vectors[0]
        """,
    "nested": """
        if base.sum() > 0:
          if task_vectors[0].sum() > 0:
            return base + 1
          base = base * 2
        elif base[0] > 0:
          base = base * 3
        return base
        """,
    "early_return_in_a_loop": """
        for i, t in enumerate(task_vectors):
          if t.sum() > 0:
            return base + (i + 1) * t
        return base
        """,
    "continue_and_break": """
        for t in task_vectors:
          if t[0] < 0: continue
          base = base + t
          if base.sum() > 2: break
        else:
          base = -base
        return base
        """,
    "ternary": "return base * (2 if base.sum() > 0 else 3)",
    "and_or_not": """
        a, b, c = [t.sum() > 0 for t in task_vectors]
        if a and not b or c and not (a or b):
          return base + 1
        return base - 1
        """,
    "any_all": """
        up = [t.sum() > 0 for t in task_vectors]
        return base + (1 if all(up) else 2 if any(up) else 3)
        """,
    "max_of_scalars": "a, b = base[0], base[1]\nreturn base * max(a, b)",
    "min_of_a_list": "return base * min([t.sum() for t in task_vectors])",
    "max_with_key": """
        return base + max(task_vectors, key=lambda t: jnp.linalg.norm(t))
        """,
    "max_of_an_index": """
        norms = [jnp.linalg.norm(t) for t in task_vectors]
        best = max(range(len(norms)), key=lambda i: norms[i])
        return base + (best + 1) * task_vectors[best]
        """,
    "sorted_with_key": """
        ordered = sorted(task_vectors, key=lambda t: jnp.linalg.norm(t))
        return base + ordered[0] + 2 * ordered[1] + 3 * ordered[2]
        """,
    "list_sort_reversed": """
        task_vectors.sort(key=lambda t: t.sum(), reverse=True)
        return base + 0.5 * task_vectors[0] + 0.25 * task_vectors[1]
        """,
    "filter": "return sum(filter(lambda t: t.sum() > 0, task_vectors), base)",
    "truth_of_a_float": "return base + (1 if jnp.round(base[0]) else 2)",
    "truth_of_a_matrix_of_one": """
        return base + (1 if base[:1, None] > 0 else 2)
        """,
    "comparison_chain": "return base + (1 if 0 < base.sum() < 2 else 2)",
    "switches": """
        scale = 1.0
        for t in task_vectors:
          if t.sum() > 0: scale = scale * 2
          else: scale = scale + 1
        return base * scale
        """,
    "module_state": """
        if base.sum() > 0: return base + next(counter)
        return base - next(counter)
        """,
    "torch": """
        t = torch.stack(task_vectors).mean(0)
        if torch.norm(t) > 1:
          t.mul_(0.5)
        best = max(task_vectors, key=lambda t: t.abs().sum())
        return base + t + best
        """,
    "inner_functions": """
        def clip(t):
          n = jnp.linalg.norm(t)
          return t / n if n > 2 else t
        return base + sum(clip(t) for t in task_vectors)
        """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_plain_python(name, monkeypatch):
  head = "import itertools\ncounter = itertools.count(1)"
  array, answers = type(jnp.zeros(())), set()
  ask = array.__bool__

  def note(x):
    answers.add(ask(x))
    return ask(x)

  monkeypatch.setattr(array, "__bool__", note)
  _assert_same(_merge(PROGRAMS[name], head))
  assert answers == {True, False}


@pytest.mark.parametrize(
    ("body", "twin"),
    [
        (
            "if base.sum() > 0:\n  return base\nreturn -base",
            "return jnp.where(base.sum() > 0, base, -base)",
        ),
        (
            "n = base[0]\nreturn base * 2 if n else base * 3",
            "return jnp.where(base[0], base * 2, base * 3)",
        ),
        (
            "return base if base[0] > 0 and base[1] > 0 else -base",
            "return jnp.where(base[0] > 0,"
            " jnp.where(base[1] > 0, base, -base), -base)",
        ),
    ],
)
def test_is_the_same_program_as_with_where(body, twin):
  shapes = [SHAPE, (2,)]
  one, two = _admit(_merge(body), shapes), _admit(_merge(twin), shapes)
  assert one.digest == two.digest


def _twice(condition):
  """`factor` exists only where both conditions are answered alike."""
  return _merge(f"""
      n = base.sum()
      if {condition}:
        factor = 2.0
      base = base + 1
      if {condition}:
        base = base * factor
      return base
  """)


@pytest.mark.parametrize(
    "condition",
    ["(n > 0)", "(task_vectors[0].sum() > 0)", "not n <= 0", "jnp.asarray(1)"],
)
def test_a_condition_is_asked_once(condition):
  _assert_same(_twice(condition))


def test_the_same_array_is_asked_once():
  head = "def merge(base, task_vectors):\n  c = base.sum() > 0\n"
  source = head + "  for _ in range(100):\n    if c: base = -base\n"
  assert _admit(source + "  return base\n").stats["equations"] < 200


def test_sorting_takes_one_path_for_each_order():
  explored = paths.Paths([jax.ShapeDtypeStruct((), jnp.float32)] * 4)
  explored.trace(lambda *xs: sorted(xs)[0], LIMITS.max_equations)
  assert explored._forks + 1 == 24


def test_paths_share_what_they_have_in_common():
  long = "for _ in range(100): base = jnp.sin(base)\n"
  conditions = "for t in task_vectors:\n  if t.sum() > 0: base = base + t\n"
  stats = _admit(_merge(long + conditions + "return base")).stats
  assert stats["equations"] < 130


def test_what_a_path_alone_computes_for_nothing_is_left_out():
  body = "if base.sum() > 0: unused = jnp.sin(base)\nreturn -base"
  assert _admit(_merge(body)).stats["equations"] == 1


def test_layers_take_their_own_paths_under_vmap():
  merge = rebuild.build(_admit(_merge(PROGRAMS["sorted_with_key"])).program)
  base, task_vectors = _arrays(0, (DRAWS, *SHAPE))
  got = jax.vmap(merge)(base, task_vectors)
  for i in range(DRAWS):
    want = merge(base[i], [t[i] for t in task_vectors])
    np.testing.assert_allclose(got[i], want, rtol=1e-6)


# --- Refusals ----------------------------------------------------------------


def _independent(count):
  return f"""
      x = base
      for i in range({count}):
        if base.sum() > i: x = jnp.cos(x)
        else: x = jnp.sin(x)
      return x
  """


def test_cap():
  assert paths.MAX_PATHS == 2**6
  _admit(_merge(_independent(6)))
  error = _refuse(_merge(_independent(7)))
  assert error.code == "paths"
  assert error.message.startswith("line 5: ")
  assert "64 paths" in error.message
  assert "jnp.where" in error.message


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("while base.sum() > 1: base = base / 2\nreturn base", "paths", 3),
        (
            "n = 0\nwhile jnp.float32(9) > n: n = n + 1\nreturn base",
            "paths",
            4,
        ),
        (
            """
            try:
              while base.sum() > 1: base = base / 2
            except Exception:
              pass
            return base
            """,
            "paths",
            4,
        ),
        (
            "f = jax.jit(lambda x: x if x.sum() > 0 else -x)\nreturn f(base)",
            "data_dependent_if",
            3,
        ),
        (  # A condition from outside, which a cache might remember.
            """
            c = base.sum() > 0
            @jax.jit
            def f(x):
              return x if c else -x
            return f(base)
            """,
            "data_dependent_if",
            6,
        ),
        (
            "return jax.vmap(lambda x: x if x > 0 else -x)(base)",
            "data_dependent_if",
            3,
        ),
        (
            """
            def step(i, x):
              if x.sum() > 0: x = -x
              return x
            return lax.fori_loop(0, 3, step, base)
            """,
            "data_dependent_if",
            4,
        ),
        (
            """
            def step(carry, x):
              return (carry + x if x > 0 else carry), x
            return base + lax.scan(step, base[0], base)[0]
            """,
            "data_dependent_if",
            4,
        ),
        ("return base if base > 0 else -base", "data_dependent_if", 3),
        ("return base if base[:0] else -base", "data_dependent_if", 3),
        (
            """
            leaked = []
            jax.vmap(lambda x: leaked.append(x))(base)
            return base if leaked[0] > 0 else -base
            """,
            "leak",
            5,
        ),
        ("return base * (1 if float(base[0]) else 2)", "data_dependent", 3),
        (
            "if base.sum() > 0: raise ValueError('no')\nreturn base",
            "value",
            3,
        ),
        (
            "if base.sum() > 0: return base\nraise ValueError('no')",
            "value",
            4,
        ),
        ("assert base.sum() > 0\nreturn base", "assertion", 3),
        (
            "if base.sum() > 0: return base\nreturn base[0]",
            "output_shape",
            None,
        ),
        ("if base.sum() > 0: return base", "output", None),
    ],
)
def test_refused(body, code, line):
  error = _refuse(_merge(body))
  assert error.code == code
  if line:
    assert error.message.startswith(f"line {line}: ")


def test_a_program_that_does_not_repeat_itself_is_refused():
  def traced(function):
    spec = jax.ShapeDtypeStruct((), jnp.float32)
    return paths.Paths([spec]).trace(function, LIMITS.max_equations)

  runs = []

  def asks_less(x):
    runs.append(x)
    return x if len(runs) == 1 and x > 0 else -x

  def asks_otherwise(x):
    runs.append(x)
    return x if x > len(runs) else -x

  for function in (asks_less, asks_otherwise):
    runs.clear()
    with pytest.raises(paths.PathError) as caught:
      traced(function)
    assert caught.value.code == "unrepeatable"


def test_nothing_stays_patched():
  ask = jax.core.Tracer.__bool__
  _admit(_merge(PROGRAMS["nested"]))
  _refuse(_merge(_independent(7)))
  _refuse(_merge("assert base.sum() > 0\nraise KeyboardInterrupt"))
  assert jax.core.Tracer.__bool__ is ask
  with pytest.raises(jax.errors.TracerBoolConversionError):
    jax.make_jaxpr(lambda x: x if x > 0 else -x)(1.0)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("return base + jnp.ones((7,))", "shape", "base has shape (4,)"),
        ("return base.reshape(5, 5)", "shape", "cannot reshape"),
        ("return jnp.foo(base)", "attribute", "jax.numpy has no attribute"),
        ("return base.add_(1)", "attribute", "import torch"),
        ("return task_vectors.mean()", "attribute", "jnp.stack"),
        ("return jnp.mean(task_vectors)", "type", "jnp.stack"),
        ("return 0.5 * task_vectors", "type", "jnp.stack"),
        ("return base.sum(dim=0)", "type", "axis"),
        ("return base + None", "type", "'array' and 'NoneType'"),
        ("base[0] = 1\nreturn base", "immutable", "x.at[i].set(v)"),
        ("return np.sum(base)", "name", "'np' is not defined"),
        ("return task_vectors[7]", "index", "out of range"),
        ("return {}['a']", "index", "KeyError"),
        ("return base / (1 // 0)", "arithmetic", "ZeroDivisionError"),
        ("a, b = task_vectors\nreturn a", "value", "unpack"),
        ("raise NotImplementedError('x')", "unsupported", "x"),
        ("raise RuntimeError('x')", "runtime", "RuntimeError: x"),
        ("raise StopIteration('x')", "exception", "StopIteration: x"),
        ("torch.foo(base)", "attribute", "torch.foo is not part"),
        ("y = base[0]; torch.add(base.mul_(2), y)", "aliasing", "clone()"),
    ],
)
def test_a_mistake_is_named(body, code, words):
  error = _refuse(_merge(body))
  assert error.code == code
  assert words in error.message
  assert error.message.startswith("line 3: ")


# --- Random programs ---------------------------------------------------------

_ARRAYS = ("base", "task_vectors[0]", "x")
_CONDITIONS = st.recursive(
    st.builds(
        "{}.sum() {} {}".format,
        st.sampled_from(_ARRAYS),
        st.sampled_from(["<", ">"]),
        st.integers(-1, 1),
    ),
    lambda inner: st.one_of(
        st.builds("(not {})".format, inner),
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {})".format, inner, inner),
    ),
    max_leaves=3,
)
_VALUES = st.one_of(
    st.builds("x + {}".format, st.sampled_from(_ARRAYS)),
    st.builds(
        "(x + 1 if {} else x * {})".format, _CONDITIONS, st.integers(2, 3)
    ),
    st.builds(
        "x + max({}.sum(), {}[0])".format,
        st.sampled_from(_ARRAYS),
        st.sampled_from(_ARRAYS),
    ),
)


def _indent(lines):
  return ["  " + line for line in lines]


def _if(condition, yes, no):
  return [f"if {condition}:", *_indent(yes), "else:", *_indent(no)]


_BLOCKS = st.recursive(
    st.one_of(
        st.builds(lambda value: [f"x = {value}"], _VALUES),
        st.builds(lambda value: [f"return {value}"], _VALUES),
    ),
    lambda inner: st.one_of(
        st.builds(_if, _CONDITIONS, inner, inner),
        st.builds(lambda one, two: one + two, inner, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(_BLOCKS)
def test_random_programs_equal_plain_python(lines):
  source = _merge("\n".join(["x = base", *lines, "return x"]))
  try:
    _assert_same(source, draws=3)
  except trace.TraceError as error:
    assert error.code == "paths"
