"""The verifier against honest, mutated and hostile IR."""

import copy
import json
import pathlib

import hypothesis
from hypothesis import strategies as st
import jax
import pytest

from selfdev_jax import config
from selfdev_jax.sandbox import ir
from selfdev_jax.sandbox import rebuild
from selfdev_jax.sandbox import trace
from selfdev_jax.sandbox import verify

SHAPE = (4, 3)
LIMITS = config.Sandbox()
GOLDEN = sorted((pathlib.Path(__file__).parent / "golden").glob("*.py"))
_SETTINGS = hypothesis.settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def _traced(source):
  # In this process: these programs are ours.
  return trace.trace(source, [SHAPE], 3, 5000)


def _one(body):
  return f"def merge(base, task_vectors):\n  return {body}\n"


TEXTS = {path.stem: _traced(path.read_text()) for path in GOLDEN}


def _verify(text, limits=LIMITS):
  return verify.verify(text, limits, [SHAPE], 3)


def _code(text, limits=LIMITS):
  with pytest.raises(verify.VerifyError) as caught:
    _verify(text, limits)
  assert "\n" not in caught.value.message
  return caught.value.code


def _program(equations, output, inputs=4):
  block = {"inputs": inputs, "equations": equations, "outputs": [output]}
  leaf = {"shape": list(SHAPE), "block": block}
  return json.dumps({"version": 1, "num_experts": 3, "leaves": [leaf]})


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_kept_is_a_fixed_point(name):
  first = _verify(TEXTS[name])
  second = _verify(first.program)
  assert second.digest == first.digest
  assert ir.dumps(ir.loads(first.program)) == first.program


def test_keeps_what_jax_inferred_not_what_was_sent():
  sent = _program([["add", [0, 1], {}, 1], ["add", [1, 0], {}, 1]], 4)
  spaced = sent.replace(",", " ,\n")
  assert _verify(spaced).program == _verify(sent).program


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("lax.fori_loop(0, 10**9, lambda i, x: x, base)", "loop_trips"),
        ("base + jnp.zeros((20_000, 20_000)).sum()", "memory"),
        (
            "base + (jnp.ones((10**5, 900)) @ jnp.ones((900, 10**5))).sum()",
            "flops",
        ),
        (
            "lax.fori_loop(0, 10**4, lambda i, x: lax.fori_loop(0, 10**4,"
            " lambda i, x: x * i, x), base)",
            "loop_trips",
        ),
    ],
)
def test_cost_bounds(body, code):
  assert _code(_traced(_one(body))) == code


def test_counts_equations_and_constants():
  text = _traced(_one("base + jnp.array([0.1, 0.2, 0.3])"))
  assert _verify(text).stats["constants"] == 3
  assert _code(text, config.Sandbox(max_constants=2)) == "constants"
  text = _traced(_one("sum(task_vectors * 20)"))
  assert _code(text, config.Sandbox(max_equations=50)) == "equations"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_largest_float_is_a_literal(dtype):
  # jnp.nan_to_num has it; its shortest decimal is beyond a float32.
  body = f"jnp.nan_to_num(base.astype(jnp.{dtype})).astype(jnp.float32)"
  _verify(_traced(_one(body)))


def test_peak_bytes():
  # Base, three task vectors and the result.
  stats = _verify(_program([["add", [0, 1], {}, 1]], 4)).stats
  assert stats["peak_bytes"] == 5 * 4 * 3 * 4
  stats = _verify(TEXTS["ties"]).stats
  assert stats["peak_multiple"] == round(stats["peak_bytes"] / (1 << 16), 3)


def _full(shape, value=0.5):
  params = {"shape": shape, "broadcast_dimensions": []}
  return ["broadcast_in_dim", [["float32", value]], params, 1]


def _loop(body, operands, length):
  params = {
      "jaxpr": body,
      "length": length,
      "reverse": False,
      "num_consts": 0,
      "num_carry": len(operands),
  }
  return ["scan", operands, params, len(operands)]


_SWAP = {"inputs": 2, "equations": [], "outputs": [1, 0]}


@pytest.mark.parametrize(
    ("equations", "code"),
    [
        # Half a minute of exchanging two values.
        ([_loop(_SWAP, [0, 1], 2**31 - 1)], "loop_trips"),
        # Nothing at all, and still more than XLA's indices can say.
        ([_full([2**31, 2**31, 2**31, 0])], "flops"),
        # No axis to contract, but a result that has to be filled.
        (
            [
                _full([2**20, 0]),
                [
                    "dot_general",
                    [4, 4],
                    {
                        "dimension_numbers": [[[1], [1]], [[], []]],
                        "precision": None,
                        "preferred_element_type": None,
                    },
                    1,
                ],
            ],
            "flops",
        ),
        # JAX multiplies sizes until they wrap around.
        (
            [
                ["tile", [0], {"reps": [2**31, 1]}, 1],
                ["tile", [4], {"reps": [2**31, 1]}, 1],
            ],
            "memory",
        ),
        # The time to type a stack grows with its rank.
        (
            [["stack", [i and 3 + i], {"axis": 0}, 1] for i in range(4990)],
            "memory",
        ),
        # 20 million results, in 160 kB of text.
        (
            [_full([4096])] + 4990 * [["unstack", [4], {"axis": 0}, 4096]],
            "equations",
        ),
        # 80,000 blocks, each of which is traced.
        (
            4900
            * [
                [
                    "cond",
                    [["int32", 1], 0],
                    {
                        "branches": 16
                        * [{"inputs": 1, "equations": [], "outputs": [0]}]
                    },
                    1,
                ]
            ],
            "equations",
        ),
        # vmap would trace the body once for each carry.
        (
            [
                _loop(
                    {
                        "inputs": 100,
                        "equations": [],
                        "outputs": [99, *range(99)],
                    },
                    100 * [0],
                    2,
                )
            ],
            "malformed",
        ),
    ],
    ids=[
        *("empty", "zero", "dot", "tile", "rank", "unstack", "branches"),
        "carries",
    ],
)
def test_what_costs_more_than_it_looks(equations, code):
  assert _code(_program(equations, 0)) == code


def test_all_branches_are_counted():
  # Under vmap, over layers, each is run.
  branch = {"inputs": 1, "equations": [["exp", [0], {}, 1]], "outputs": [1]}
  flops = [
      _verify(
          _program(
              [["cond", [["int32", 0], 0], {"branches": n * [branch]}, 1]], 4
          )
      ).stats["flops"]
      for n in (2, 4)
  ]
  assert flops[1] - flops[0] == 2 * 12


def _as(dtype):
  return ["convert_element_type", [0], {"new_dtype": dtype}, 1]


_SQUARE = {"start_indices": [0, 0], "limit_indices": [3, 3], "strides": None}


@pytest.mark.parametrize(
    "equations",
    [
        *(
            [["cond", [index, 0], {"branches": 2 * [branch]}, 1]]
            for branch in [{"inputs": 1, "equations": [], "outputs": [0]}]
            for index in (
                ["bool", True],
                ["uint32", 1],
                ["int8", 1],
                ["float32", 1.0],
            )
        ),
        [["sort", [0], {"dimension": 0, "is_stable": True, "num_keys": 2}, 1]],
        [["random_bits", [0], {"bit_width": 32, "shape": []}, 1]],
        [["random_fold_in", [0, ["uint32", 1]], {}, 1]],
        [["random_split", [0], {"shape": [2]}, 1]],
        [["random_seed", [["float32", 1.0]], {}, 1]],
        [
            ["bitcast_convert_type", [0], {"new_dtype": "uint32"}, 1],
            ["threefry2x32", [["uint32", 1], 4, 4, 4], {}, 2],
        ],
        [
            ["bitcast_convert_type", [0], {"new_dtype": "uint32"}, 1],
            ["threefry2x32", [4, 4, 4], {}, 2],
        ],
        [
            ["random_seed", [["int32", 1]], {}, 1],
            ["convert_element_type", [4], {"new_dtype": "float32"}, 1],
        ],
        [
            _as("complex64"),
            ["argmax", [4], {"axes": [0], "index_dtype": "int32"}, 1],
        ],
        [_as("int32"), ["cumlogsumexp", [4], {"axis": 0, "reverse": False}, 1]],
        [
            _as("complex64"),
            ["fft", [4], {"fft_type": "IRFFT", "fft_lengths": [9]}, 1],
        ],
        [
            _full([2, 2, 2, 2]),
            ["convert_element_type", [4], {"new_dtype": "complex64"}, 1],
            ["fft", [5], {"fft_type": "FFT", "fft_lengths": [2, 2, 2, 2]}, 1],
        ],
        *(
            [
                ["slice", [0], _SQUARE, 1],
                ["convert_element_type", [4], {"new_dtype": dtype}, 1],
                ["cholesky", [5], {}, 1],
            ]
            for dtype in ("bfloat16", "float16", "int32")
        ),
        [
            _full([2, 4, 3]),
            _full([3, 3]),
            ["householder_product", [4, 5], {}, 1],
        ],
    ],
)
def test_what_jax_types_but_cannot_lower(equations):
  assert _code(_program(equations, 0)) == "ill_typed"


@pytest.mark.parametrize(
    ("equations", "output", "code"),
    [
        ([["infeed", [], {}, 1]], 4, "primitive"),
        ([["while", [0], {}, 1]], 4, "primitive"),
        ([["pure_callback", [0], {}, 1]], 4, "primitive"),
        ([["ffi_call", [0], {"target_name": "x"}, 1]], 4, "primitive"),
        ([["add", [0, 5], {}, 1]], 4, "malformed"),  # Not computed yet.
        ([["add", [0, 4], {}, 1]], 4, "malformed"),  # Itself.
        ([["add", [0, -1], {}, 1]], 4, "malformed"),
        ([["add", [0, True], {}, 1]], 4, "malformed"),
        ([["add", [0, 1], {"x": 1}, 1]], 4, "malformed"),
        ([["add", [0, 1], {}, 2]], 4, "malformed"),
        ([["add", [0], {}, 1]], 4, "ill_typed"),
        ([["add", [0, ["int32", 1]], {}, 1]], 4, "ill_typed"),
        ([["add", [0, ["float64", 1.0]], {}, 1]], 4, "malformed"),
        ([["add", [0, ["float32", 1e300]], {}, 1]], 4, "malformed"),
        ([["add", [0, ["int8", 300]], {}, 1]], 4, "malformed"),
        ([["reduce_sum", [0], {"axes": [0, 7]}, 1]], 4, "ill_typed"),
        ([["reduce_sum", [0], {"axes": [0, 0]}, 1]], 4, "ill_typed"),
        ([["cumsum", [0], {"axis": 9, "reverse": False}, 1]], 4, "ill_typed"),
        ([["reshape", [0], {"new_sizes": [2**31, 2**31]}, 1]], 4, "ill_typed"),
        ([["reshape", [0], {"new_sizes": [-1]}, 1]], 4, "malformed"),
        ([["reduce_max", [0], {"axes": [0]}, 1]], 4, "output"),
        ([["eq", [0, 1], {}, 1]], 4, "output"),
        ([], ["float32", 1.0], "output"),
        (
            [
                [
                    "const",
                    [],
                    {
                        "value": {
                            "dtype": "float32",
                            "shape": [10**9],
                            "data": [],
                        }
                    },
                    1,
                ]
            ],
            0,
            "malformed",
        ),
        (  # 2 ** 31 values, were they made.
            [
                [
                    "broadcast_in_dim",
                    [["float32", 1.0]],
                    {"shape": [2**31 - 1], "broadcast_dimensions": []},
                    1,
                ],
                ["unstack", [4], {"axis": 0}, 1],
            ],
            5,
            "malformed",
        ),
    ],
)
def test_hostile_ir(equations, output, code):
  found = _code(_program(equations, output))
  assert found == code


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nul",
        "[]",
        "{}",
        "1" * 5000,
        "[" * 100_000,
        "\0",
        "NaN",
        '{"version":1,"num_experts":3,"leaves":[]}',
        '{"version":2,"num_experts":3,"leaves":[]}',
        '{"version":1,"num_experts":3,"leaves":[[]]}',
        b"\xff\xfe\x00",
        b"\x80",
    ],
)
def test_no_program_at_all(text):
  assert _code(text) == "malformed"


def test_other_shapes():
  with pytest.raises(verify.VerifyError, match="other shapes"):
    verify.verify(TEXTS["ties"], LIMITS, [(3, 4)], 3)
  with pytest.raises(verify.VerifyError, match="other shapes"):
    verify.verify(TEXTS["ties"], LIMITS, [SHAPE], 2)


def test_loops_nested_too_deeply():
  block = {"inputs": 1, "equations": [], "outputs": [0]}
  for _ in range(50):
    params = {
        "jaxpr": block,
        "length": 1,
        "reverse": False,
        "num_consts": 0,
        "num_carry": 1,
    }
    block = {
        "inputs": 1,
        "equations": [["scan", [0], params, 1]],
        "outputs": [1],
    }
  assert _code(_program(block["equations"], 0, inputs=4)) == "malformed"


# --- Properties --------------------------------------------------------------

_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([0, 1, -1, 2**31, "", "float32", "scan", "nan", "add"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["dtype", "shape", "axes"]), inner, max_size=2
    ),
    max_leaves=5,
)


def _places(node, path=()):
  """Every path into a JSON tree."""
  yield path
  children = ()
  if isinstance(node, dict):
    children = node.items()
  elif isinstance(node, list):
    children = enumerate(node)
  for key, child in children:
    yield from _places(child, (*path, key))


@st.composite
def _mutated(draw):
  """A golden program with one to three places changed."""
  tree = json.loads(TEXTS[draw(st.sampled_from(sorted(TEXTS)))])
  for _ in range(draw(st.integers(1, 3))):
    path = draw(st.sampled_from(list(_places(tree))[1:]))
    parent = tree
    for key in path[:-1]:
      parent = parent[key]
    change = draw(st.sampled_from(["replace", "delete", "copy", "rename"]))
    if change == "delete":
      del parent[path[-1]]
    elif change == "copy" and isinstance(parent, list):
      parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
    elif change == "rename" and isinstance(parent[path[-1]], str):
      parent[path[-1]] = draw(st.sampled_from(sorted(ir.PRIMITIVES)))
    else:
      parent[path[-1]] = draw(_ANYTHING)
    if not isinstance(tree, dict) or not tree:
      break
  return json.dumps(tree)


@_SETTINGS
@hypothesis.given(_mutated())
def test_mutated_ir_is_verified_or_refused(text):
  try:
    verified = _verify(text)
  except verify.VerifyError:
    return
  # What passes has the type of a merge and gets by StableHLO's own verifier.
  merge = rebuild.build(verified.program)
  base, *task_vectors = ir.specs(SHAPE, 3)
  merged = jax.eval_shape(merge, base, task_vectors)
  assert (merged.shape, merged.dtype) == (SHAPE, base.dtype)
  jax.jit(merge).lower(base, task_vectors)


_UNARY = st.sampled_from(
    [
        "jnp.abs({})",
        "jnp.tanh({})",
        "jnp.sign({})",
        "-{}",
        "{} ** 3",
        "jnp.sort({}, axis=0)",
        "jnp.cumsum({}, axis=1)",
        "{}.T.T",
        "{}.mean(0)",
        "jnp.clip({}, -1, 0.5)",
        "jnp.where({0} > 0, {0}, 0)",
        "lax.fori_loop(0, 2, lambda i, x: x * 0.5, {})",
        "jnp.roll({}, 1)",
        "jax.jit(jnp.exp)({})",
        "jnp.stack([{0}, {0}]).max(0)",
    ]
)
_BINARY = st.sampled_from(
    [
        "({} + {})",
        "({} * {})",
        "({} - {})",
        "jnp.maximum({}, {})",
        "jnp.where({0} > {1}, {0}, {1})",
    ]
)
_EXPRESSIONS = st.recursive(
    st.sampled_from(["base", "task_vectors[0]", "task_vectors[1]", "0.3", "2"]),
    lambda inner: st.builds(
        lambda form, x, y: form.format(x, y), _BINARY, inner, inner
    )
    | st.builds(lambda form, x: form.format(f"(base * {x})"), _UNARY, inner),
    max_leaves=6,
)


@hypothesis.settings(_SETTINGS, max_examples=100)
@hypothesis.given(_EXPRESSIONS)
def test_round_trip(expression):
  text = _traced(_one(f"base + {expression}"))
  assert ir.dumps(ir.loads(text)) == text
  first = _verify(text)
  assert _verify(first.program).digest == first.digest


def test_a_gather_that_jax_cannot_lower_is_refused():
  source = (
      "def merge(base, task_vectors):\n"
      "  winner = jnp.argmax(jnp.abs(jnp.stack(task_vectors)), axis=0)\n"
      "  picked = jnp.take_along_axis(\n"
      "      jnp.stack(task_vectors), winner[None], axis=0)\n"
      "  return base + picked[0]\n"
  )
  tree = json.loads(_traced(source))
  (gather,) = (
      equation
      for equation in tree["leaves"][0]["block"]["equations"]
      if equation[0] == "gather"
  )
  gather[2] |= {"mode": "FILL_OR_DROP", "fill_value": None}
  assert _code(json.dumps(tree)) == "malformed"
