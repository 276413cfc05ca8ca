"""Mutated program IR is refused, or it runs: the verifier knows no third way.

Alone, with a segfault to be seen and one line of JSON at the end:

    python -X faulthandler tests/sandbox/fuzz_test.py --n=100000 --seed=0
"""

import argparse
import collections
import copy
import functools
import json
import pathlib
import random
import time

import jax
from jax import lax
import jax.extend.core.primitives as jex_primitives
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax.sandbox import ir
from selfdev_jax.sandbox import lift
from selfdev_jax.sandbox import rebuild
from selfdev_jax.sandbox import trace
from selfdev_jax.sandbox import verify

SHAPE = (4, 3)
EXPERTS = 3
# Less than a program may have: what is tried here takes milliseconds.
LIMITS = config_lib.Sandbox(max_flops=1e8, max_peak_multiple=16.0)
_MAX_SECONDS = 5.0  # CPU time of `verify`, whatever the input.
_RUN_EVERY = 50  # Compiling takes most of the time.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
_GOLDEN = pathlib.Path(__file__).parent / "golden"
_DTYPES = sorted(ir.words("""
    bool int8 int16 int32 uint8 uint16 uint32 float16 bfloat16 float32
    complex64
"""))


# --- A corpus in which every primitive occurs --------------------------------


def _bind(name, *operands, **params):
  return getattr(jex_primitives, f"{name}_p").bind(*operands, **params)


def _unary(name):
  accuracy = {"accuracy": None} if ir.PRIMITIVES[name] else {}
  return lambda b, t: _bind(name, b, **accuracy)


def _binary(name):
  out_dtype = {"out_dtype": None} if ir.PRIMITIVES[name] else {}
  return lambda b, t: _bind(name, b, t[0], **out_dtype)


def _bits(name, count):
  return lambda b, t: _bind(
      name, *(lax.bitcast_convert_type(x, jnp.int32) for x in [b, *t][:count])
  )


def _square(b):
  return b[:3] @ b[:3].T + 4 * jnp.eye(3)


def _random(b, t):
  key = jax.random.fold_in(jax.random.wrap_key_data(jnp.uint32([1, 2])), 3)
  first, second = jax.random.split(jax.random.clone(key))
  return jax.random.key_data(first), jax.random.bits(second, (4, 3))


def _scan(b, t):
  def body(carry, x):
    return (carry[0] * 0.5 + x, carry[1] + 1), x * t[0].sum()

  return lax.scan(body, (t[1][0], 0), b, reverse=True)


_SNIPPETS = (
    {name: _unary(name) for name in ir.words("""
        abs acos acosh asin asinh atan atanh cbrt ceil cos cosh digamma erf
        erf_inv erfc exp exp2 expm1 floor is_finite lgamma log log1p logistic
        neg rsqrt sign sin sinh sqrt square tan tanh
    """)}
    | {name: _binary(name) for name in ir.words("""
        add atan2 div eq eq_to ge gt le le_to lt lt_to max min mul ne nextafter
        pow rem sub
    """)}
    | {name: _bits(name, 1) for name in ir.words("clz not population_count")}
    | {name: _bits(name, 2) for name in ir.words("""
        and or shift_left shift_right_arithmetic shift_right_logical xor
    """)}
    | {
        f"reduce_{name}": lambda b, t, name=name, kwargs=kwargs: _bind(
            f"reduce_{name}", b, axes=(1,), **kwargs
        )
        for name, kwargs in {
            "max": {},
            "min": {},
            "prod": {},
            "sum": {"out_sharding": None},
        }.items()
    }
    | {
        name: lambda b, t, name=name: getattr(lax, name)(b, axis=1)
        for name in ir.words("cumlogsumexp cummax cummin cumprod cumsum")
    }
    | {
        f"scatter_{name}": lambda b, t, name=name: getattr(
            b.at[jnp.array([2, 0]), 1:], name
        )(t[0][1:3, :2])
        for name in ir.words("set add subtract mul min max")
    }
    | {
        "threefry": lambda b, t: _bind(
            "threefry2x32",
            *(lax.bitcast_convert_type(x, jnp.uint32) for x in [b, *t]),
        ),
        "bitwise_reductions": lambda b, t: [
            _bind(
                f"reduce_{name}",
                lax.bitcast_convert_type(b, jnp.int32),
                axes=(0,),
            )
            for name in ("and", "or", "xor")
        ],
        "bitcast": lambda b, t: lax.bitcast_convert_type(b, jnp.uint8),
        "complex": lambda b, t: (
            lax.real(lax.complex(b, t[0])),
            lax.imag(lax.complex(b, t[0])),
        ),
        "conj": lambda b, t: lax.real(lax.conj(lax.complex(b, t[0]))),
        "clamp": lambda b, t: lax.clamp(-0.5, b, t[0]),
        "select": lambda b, t: lax.select_n(b > 0, t[0], t[1]),
        "round": lambda b, t: lax.round(b),
        "integer_pow": lambda b, t: lax.integer_pow(b, 3),
        "reduce_precision": lambda b, t: lax.reduce_precision(b, 5, 10),
        "argmax": lambda b, t: lax.argmax(b, 1, jnp.int32),
        "argmin": lambda b, t: lax.argmin(b, 0, jnp.uint8),
        "sort": lambda b, t: lax.sort((b, t[0]), dimension=1, num_keys=2),
        "top_k": lambda b, t: lax.top_k(b, 2),
        "broadcast": lambda b, t: lax.broadcast_in_dim(b, (2, 4, 3), (1, 2)),
        "reshape": lambda b, t: lax.reshape(b, (2, 6)),
        "squeeze": lambda b, t: lax.squeeze(b[:, 1:2], (1,)),
        "transpose": lambda b, t: lax.transpose(b, (1, 0)),
        "rev": lambda b, t: lax.rev(b, (0, 1)),
        "iota": lambda b, t: lax.broadcasted_iota(jnp.int32, (2, 3), 1),
        "concatenate": lambda b, t: lax.concatenate([b, *t], 1),
        "stack": lambda b, t: jnp.stack([b, *t], 1),
        "unstack": lambda b, t: jnp.unstack(b, axis=1),
        "tile": lambda b, t: jnp.tile(b, (2, 3)),
        "split": lambda b, t: lax.split(b, (1, 3), 0),
        "pad": lambda b, t: lax.pad(b, 0.5, ((1, -1, 0), (0, 2, 1))),
        "slice": lambda b, t: lax.slice(b, (1, 0), (4, 3), (2, 1)),
        "dynamic_slice": lambda b, t: lax.dynamic_slice(
            b, (lax.argmax(b[0], 0, jnp.int32), 0), (2, 3)
        ),
        "dynamic_update_slice": lambda b, t: lax.dynamic_update_slice(
            b, t[0][:2], (lax.argmax(b[0], 0, jnp.int32), 0)
        ),
        "gather": lambda b, t: b[lax.argmax(t[0], 1, jnp.int32), 1:],
        "gather_fill": lambda b, t: jnp.take_along_axis(
            b, jnp.argsort(t[0], 1), axis=1, mode="fill"
        ),
        "gather_batched": lambda b, t: jax.vmap(lambda x, i: x[i])(
            b, jnp.argsort(t[0], 1)
        ),
        "dot": lambda b, t: b @ t[0].T,
        "dot_batched": lambda b, t: lax.dot_general(
            b,
            t[0],
            (((1,), (1,)), ((0,), (0,))),
            precision=(lax.Precision.HIGHEST, lax.Precision.DEFAULT),
            preferred_element_type=jnp.float32,
        ),
        "svd": lambda b, t: lax.linalg.svd(b, full_matrices=False),
        "eigh": lambda b, t: lax.linalg.eigh(_square(b)),
        "qr": lambda b, t: lax.linalg.qr(b, full_matrices=False),
        "householder": lambda b, t: lax.linalg.householder_product(b, t[0][0]),
        "cholesky": lambda b, t: lax.linalg.cholesky(_square(b)),
        "lu": lambda b, t: lax.linalg.lu(b),
        "triangular_solve": lambda b, t: lax.linalg.triangular_solve(
            _square(b), b, lower=True
        ),
        "fft": lambda b, t: jnp.abs(lax.fft(b, lax.FftType.RFFT, (3,))),
        "random": _random,
        "random_seed": lambda b, t: jax.random.uniform(
            jax.random.key(0), (4, 3)
        ),
        "scan": _scan,
        "cond": lambda b, t: lax.cond(
            b.sum() > 0, lambda x: x * 2, lambda x: x + t[0], b
        ),
        "switch": lambda b, t: lax.switch(
            lax.argmax(b[0], 0, jnp.int32), [jnp.sin, jnp.cos, jnp.exp], b
        ),
        "const": lambda b, t: jnp.array([0.5, 1.5, 2.5]) * 2,
    }
)


def _block_of(snippet):
  """A snippet's JSON block, which ends in adding all its results to base.

  Every result is converted to float32 first, whether it has to be or not: a
  mutation of its dtype is to go through.
  """
  with jax.numpy_dtype_promotion("standard"):
    closed = jax.make_jaxpr(lambda b, *t: jax.tree.leaves(snippet(b, list(t))))(
        *ir.specs(SHAPE, EXPERTS)
    )
  block = ir.encode_block(ir.from_jaxpr(closed))
  total, known = 0, _known(block)
  for output, aval in zip(block["outputs"], closed.out_avals, strict=True):
    spread = {"shape": list(SHAPE), "broadcast_dimensions": []}
    block["equations"] += [
        ["convert_element_type", [output], {"new_dtype": "float32"}, 1],
        ["reduce_sum", [known], {"axes": list(range(aval.ndim))}, 1],
        ["broadcast_in_dim", [known + 1], spread, 1],
        ["add", [total, known + 2], {}, 1],
    ]
    total, known = known + 3, known + 4
  return {**block, "outputs": [total]}


def _program(block):
  leaf = {"shape": list(SHAPE), "block": block}
  return {"version": 1, "num_experts": EXPERTS, "leaves": [leaf]}


@functools.cache
def corpus():
  """Programs as JSON trees by name: the golden ones, and each snippet."""
  golden = {
      path.stem: json.loads(
          trace.trace(path.read_text(), [SHAPE], EXPERTS, 5000)
      )
      for path in sorted(_GOLDEN.glob("*.py"))
  }
  return golden | {
      f"snippet_{name}": _program(_block_of(snippet))
      for name, snippet in _SNIPPETS.items()
  }


def _names(block):
  """The primitives of a JSON block, nested ones included."""
  for name, _, params, _ in block["equations"]:
    yield name
    for inner in _inner(params):
      yield from _names(inner)


def _inner(params):
  return [params["jaxpr"]] if "jaxpr" in params else params.get("branches", [])


# --- Mutations ---------------------------------------------------------------

_BOUNDARIES = [
    *(0, 1, -1, 2, 3, 7, 64, 65, 1000, 4097, 2**16, 2**30, 2**31 - 1, 2**31),
    *(-(2**31), 2**32, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.5, 1e999),
    *(float("nan"), -0.0, True, False, None, "", "nan", "\ud800", [], {}),
    *([0, 0], [1, 1], [0] * 1025, [[0]], {"a": 0}),
]
_FOREIGN = [*_DTYPES, "float64", "int64", "CLIP", "FILL_OR_DROP", "HIGHEST",
            "PROMISE_IN_BOUNDS", "IRFFT", "RFFT", "FFT", "IFFT", "while",
            "infeed", "scan", "key<fry>"]  # fmt: skip


def _places(node, path=()):
  """Every path into a JSON tree, its root left out."""
  children = ()
  if isinstance(node, dict):
    children = node.items()
  elif isinstance(node, list):
    children = enumerate(node)
  for key, child in children:
    yield (*path, key)
    yield from _places(child, (*path, key))


def _parent(tree, path):
  for key in path[:-1]:
    tree = tree[key]
  return tree


def _known(block):
  return block["inputs"] + sum(e[3] for e in block["equations"])


def _blocks(block):
  """A block and those within."""
  yield block
  for _, _, params, _ in block["equations"]:
    for inner in _inner(params):
      yield from _blocks(inner)


def _any_block(tree, rng):
  return rng.choice(list(_blocks(tree["leaves"][0]["block"])))


def _shifted(operand, first, by):
  return operand + by if type(operand) is int and operand >= first else operand


def _insert(block, index, equation):
  """Inserts an equation and renumbers; returns the number of its output."""
  first = block["inputs"] + sum(e[3] for e in block["equations"][:index])
  by = equation[3]
  for later in block["equations"][index:]:
    later[1] = [_shifted(x, first, by) for x in later[1]]
  block["outputs"] = [_shifted(x, first, by) for x in block["outputs"]]
  block["equations"].insert(index, equation)
  return first


def _any_place(tree, rng):
  """Anything anywhere: replaced, deleted, copied or swapped."""
  path = rng.choice(list(_places(tree)))
  parent, key = _parent(tree, path), path[-1]
  change = rng.randrange(5)
  if change == 0:
    del parent[key]
  elif change == 1 and isinstance(parent, list):
    parent.insert(key, copy.deepcopy(parent[key]))
  elif change == 2 and isinstance(parent, list):
    rng.shuffle(parent)
  else:
    parent[key] = copy.deepcopy(rng.choice(_BOUNDARIES))


def _parameter(tree, rng, kind, change):
  """Changes one value of a type among the parameters of one equation."""
  block = _any_block(tree, rng)
  wanted = []
  for _, _, params, _ in block["equations"]:
    if not _inner(params):
      wanted += [
          (params, p)
          for p in _places(params)
          if type(_parent(params, p)[p[-1]]) is kind
      ]
    else:
      wanted += [
          (params, (key,)) for key, x in params.items() if type(x) is kind
      ]
  if wanted:
    params, path = rng.choice(wanted)
    parent = _parent(params, path)
    parent[path[-1]] = change(parent[path[-1]])


def _small_number(tree, rng):
  """A size, an axis, a count that may well be right."""
  _parameter(
      tree, rng, int, lambda x: rng.choice([x - 1, x + 1, 0, 1, 2, 3, 4, 2 * x])
  )


def _boundary_number(tree, rng):
  _parameter(tree, rng, int, lambda x: rng.choice(_BOUNDARIES[:19]))


def _word(tree, rng):
  _parameter(tree, rng, str, lambda x: rng.choice(_FOREIGN))


def _flag(tree, rng):
  _parameter(tree, rng, bool, lambda x: not x)


def _list(tree, rng):
  def change(x):
    x = list(x)
    if rng.random() < 0.5:
      rng.shuffle(x)
    elif x and rng.random() < 0.5:
      x.pop(rng.randrange(len(x)))
    else:
      x.insert(rng.randint(0, len(x)), rng.choice([0, 1, 2, *x]))
    return x

  _parameter(tree, rng, list, change)


def _literal(rng):
  dtype = rng.choice([*_DTYPES, "float32", "int32"])
  if dtype == "bool":
    return [dtype, rng.random() < 0.5]
  value = rng.choice(
      [0, 1, 2, 3, 127, -1, -128, 2**31 - 1, -(2**31), 2**32 - 1]
  )
  if "int" in dtype:
    return [dtype, value]
  value = rng.choice([value, 0.5, -0.0, 1e-45, 3.4e38, "nan", "inf", "-inf"])
  return [dtype, [value, 0.5] if dtype == "complex64" else value]


def _operand(tree, rng):
  """Another operand: a value that is known, a literal, one more, one less."""
  block = _any_block(tree, rng)
  if not block["equations"]:
    return
  index = rng.randrange(len(block["equations"]))
  operands = block["equations"][index][1]
  known = block["inputs"] + sum(e[3] for e in block["equations"][:index])
  new = _literal(rng) if rng.random() < 0.4 else rng.randrange(max(known, 1))
  change = rng.randrange(6)
  if change == 0:
    operands.append(new)
  elif change == 1:
    rng.shuffle(operands)
  elif operands and change == 2:
    operands.pop(rng.randrange(len(operands)))
  elif operands:
    operands[rng.randrange(len(operands))] = new


def _rename(tree, rng):
  """Another primitive, of the same parameters if that can be."""
  block = _any_block(tree, rng)
  if not block["equations"]:
    return
  equation = rng.choice(block["equations"])
  same = [
      name
      for name, codecs in ir.PRIMITIVES.items()
      if {k for k, c in codecs.items() if not c.omit} == equation[2].keys()
  ]
  equation[0] = rng.choice(sorted(same or ir.PRIMITIVES))


def _between(tree, rng):
  """Operands of one equation in another dtype or shape, all or one."""
  block = _any_block(tree, rng)
  if not block["equations"]:
    return
  index = rng.randrange(len(block["equations"]))
  operands = block["equations"][index][1]
  numbers = sorted({x for x in operands if type(x) is int})
  if not numbers:
    return
  if rng.random() < 0.4:
    numbers = [rng.choice(numbers)]
  dtype = rng.choice(_DTYPES)
  between = rng.choice(
      [["convert_element_type", {"new_dtype": dtype}]] * 5
      + [
          ["bitcast_convert_type", {"new_dtype": dtype}],
          ["reduce_sum", {"axes": [0]}],
          ["transpose", {"permutation": [1, 0]}],
          ["squeeze", {"dimensions": [0]}],
          ["slice", {"start_indices": [0, 0],
                     "limit_indices": [rng.randint(0, 4), rng.randint(0, 3)],
                     "strides": None}],
          ["broadcast_in_dim", {"shape": [rng.randint(0, 3), 4, 3],
                                "broadcast_dimensions": [1, 2]}],
          ["random_wrap", {}],
          ["random_unwrap", {}],
      ]
  )  # fmt: skip
  for number in numbers:
    name, params = copy.deepcopy(between)
    made = _insert(block, index, [name, [number], params, 1])
    index += 1
    user = block["equations"][index]
    user[1] = [made if x == number else x for x in user[1]]


def _shuffle(tree, rng):
  rng.shuffle(_any_block(tree, rng)["equations"])


def _splice(tree, rng):
  """Equations of another program, on operands from here."""
  block = _any_block(tree, rng)
  donor = _any_block(_copy_of_any(rng), rng)["equations"]
  if not donor:
    return
  start = rng.randrange(len(donor))
  index = rng.randint(0, len(block["equations"]))
  for equation in copy.deepcopy(donor[start : start + rng.randint(1, 4)]):
    known = block["inputs"] + sum(e[3] for e in block["equations"][:index])
    equation[1] = [
        x % max(known, 1) if type(x) is int else x for x in equation[1]
    ]
    _insert(block, index, equation)
    index += 1


def _foreign_body(tree, rng):
  """The body of a loop or a branch from elsewhere."""
  bodies = [
      (params, key)
      for block in _blocks(tree["leaves"][0]["block"])
      for _, _, params, _ in block["equations"]
      for key in params.keys() & {"jaxpr", "branches"}
  ]
  if not bodies:
    return
  params, key = rng.choice(bodies)
  foreign = copy.deepcopy(_any_block(_copy_of_any(rng), rng))
  if key == "jaxpr":
    params[key] = foreign
  else:
    params[key][rng.randrange(len(params[key]))] = foreign
    if rng.random() < 0.3:
      params[key] *= rng.choice([2, 33])


def _nest(tree, rng):
  """The whole block within a loop, or one branch of two."""
  leaf = tree["leaves"][0]
  block = leaf["block"]
  inputs = list(range(block["inputs"]))
  length = rng.choice([0, 1, 2, 3, 1000, 2**31])
  if rng.random() < 0.5:
    last = rng.choice([0, rng.randrange(max(_known(block), 1))])
    block["outputs"] += [last] * rng.randint(0, 1)
    carry = rng.choice([1, 1, 1, 0, 2, len(inputs)])
    params = {"jaxpr": block, "length": length, "reverse": rng.random() < 0.5,
              "num_consts": len(inputs) - 1, "num_carry": carry}  # fmt: skip
    operands = [*inputs[1:], 0]
    equation = ["scan", operands, params, len(block["outputs"])]
    # The carry is the last of its inputs: base goes there.
    for inner in block["equations"]:
      inner[1] = [_rotated(x, len(inputs)) for x in inner[1]]
    block["outputs"] = [_rotated(x, len(inputs)) for x in block["outputs"]]
  else:
    branches = [block, copy.deepcopy(block)] * rng.choice([1, 1, 1, 16, 33])
    index = rng.choice([["bool", True], ["int32", rng.choice([0, 1, -5, 99])]])
    operands = [index, *inputs]
    equation = ["cond", operands, {"branches": branches}, 1]
  leaf["block"] = {
      "inputs": len(inputs), "equations": [equation], "outputs": [len(inputs)],
  }  # fmt: skip


def _rotated(operand, inputs):
  if type(operand) is int and operand < inputs:
    return (operand - 1) % inputs
  return operand


_MUTATIONS = (
    [_any_place, _boundary_number, _shuffle, _nest, _foreign_body, _list]
    + [_splice, _rename, _flag, _word] * 2
    + [_small_number, _operand, _between] * 4
)


def _copy_of_any(rng):
  name = rng.choice(sorted(corpus()))
  return copy.deepcopy(corpus()[name])


def _damaged(text, rng):
  """The text itself with some bytes flipped, lost or added."""
  data = bytearray(text.encode("utf-8", "replace"))
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(data) + 1)
    change = rng.randrange(3)
    if change == 0 and at < len(data):
      data[at] ^= 1 << rng.randrange(8)
    elif change == 1:
      data[at:at] = rng.choice([b"9" * 5000, b"[" * 50_000, b"\xff", b"1e999",
                                b'"version":1,', b"0", b"-"])  # fmt: skip
    else:
      del data[at : at + rng.choice([1, 2, 1000])]
  return bytes(data)


def mutant(seed: int, number: int) -> str | bytes:
  """One mutated program; the same arguments always give the same."""
  rng = random.Random(f"{seed}/{number}")
  tree = _copy_of_any(rng)
  for _ in range(rng.choice([1, 1, 1, 2, 3])):
    try:
      rng.choice(_MUTATIONS)(tree, rng)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
      break  # An earlier one has left no program to speak of.
  text = json.dumps(tree)
  return _damaged(text, rng) if rng.random() < 0.03 else text


# --- What has to hold --------------------------------------------------------


def _arrays():
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(4)]


def check(text: str | bytes, run: bool) -> tuple[str, float]:
  """Verifies one program, and lowers and runs what passes.

  Args:
    text: anything.
    run: compile and run it too, as it is and for a stack of layers.

  Returns:
    "verified" or the code of the refusal, and the CPU seconds of `verify`.
  """
  start = time.process_time()
  try:
    verified = verify.verify(text, LIMITS, [SHAPE], EXPERTS)
  except verify.VerifyError as error:
    seconds = time.process_time() - start
    assert "\n" not in error.message
    assert error.message.encode()
    return error.code, seconds
  seconds = time.process_time() - start
  merge = rebuild.build(verified.program)
  base, *task_vectors = ir.specs(SHAPE, EXPERTS)
  merged = jax.eval_shape(merge, base, task_vectors)
  assert (merged.shape, merged.dtype) == (SHAPE, np.float32)
  # StableHLO's own verifier reads what is lowered.
  jax.jit(merge).lower(base, task_vectors)
  if run:
    base, *task_vectors = _arrays()
    arguments = base, task_vectors
    result = jax.jit(merge, compiler_options=_QUICK)(*arguments)
    assert result.shape == SHAPE
    kernel, literals = lift.kernels(verified.program)(SHAPE)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), arguments)
    result = jax.jit(jax.vmap(kernel, (0, 0, None)), compiler_options=_QUICK)(
        *stacked, literals
    )
    assert result.shape == (2, *SHAPE)
  return "verified", seconds


def fuzz(n: int, seed: int) -> dict:
  """Checks mutants 0 to n - 1.

  Returns:
    "n", "verified", "refused" by code, "seconds", and "slowest": the most CPU
    seconds that `verify` took, and for which mutant.
  """
  start = time.perf_counter()
  codes, slowest = collections.Counter(), (0.0, 0)
  for number in range(n):
    text = mutant(seed, number)
    # The next one that passes, where this one is refused.
    run = codes["verified"] % _RUN_EVERY == 0
    try:
      code, seconds = check(text, run)
      assert seconds < _MAX_SECONDS
    except Exception as error:
      error.add_note(f"mutant({seed}, {number}): {text[:20_000]!r}")
      raise
    codes[code] += 1
    slowest = max(slowest, (round(seconds, 3), number))
  verified = codes.pop("verified", 0)
  return {
      "n": n,
      "verified": verified,
      "refused": dict(codes.most_common()),
      "seconds": round(time.perf_counter() - start, 1),
      "slowest": slowest,
  }


# --- Tests -------------------------------------------------------------------

# What NumPy says of a literal NaN that becomes an integer.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


_SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_the_corpus_uses_every_primitive():
  used = set()
  for tree in corpus().values():
    for leaf in tree["leaves"]:
      used.update(_names(leaf["block"]))
  assert used == set(ir.PRIMITIVES)


def test_the_corpus_passes():
  for name, tree in corpus().items():
    assert check(json.dumps(tree), run=False)[0] == "verified", name


@pytest.mark.parametrize(
    ("n", "seed"), [(1500, 1), pytest.param(20_000, 2, marks=_SLOW)]
)
def test_mutants(n, seed):
  result = fuzz(n, seed)
  print(result)
  # The mutations neither all miss nor all hit.
  assert 0.1 * n < result["verified"] < 0.5 * n
  assert result["refused"].keys() >= {"malformed", "ill_typed", "output"}


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--n", type=int, default=1000)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  print(json.dumps(fuzz(arguments.n, arguments.seed)))


if __name__ == "__main__":
  main()
