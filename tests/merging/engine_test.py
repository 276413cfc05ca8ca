"""The engine: layers, scopes, dtypes, compile counts, shards, bad input."""

import gc

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from selfdev_jax import errors
from selfdev_jax import merging
from selfdev_jax.merging import engine

_ROWS, _COLUMNS, _LAYERS = 16, 24, 3


def _tree(seed, dtype=np.float32):
  """Parameters of three leaf kinds; layers of differing sizes of numbers."""
  rng = np.random.default_rng(seed)
  base = np.random.default_rng(99)

  def leaf(*shape):
    near = base.normal(0, 0.1, shape) + rng.normal(0, 0.01, shape)
    return jnp.asarray(near, dtype)

  return {
      "embed": leaf(10, _COLUMNS),
      "final_norm": leaf(_COLUMNS),
      "layers": {
          "mlp": {"up": leaf(_LAYERS, _ROWS, _COLUMNS)},
          "attention": {"q": leaf(_LAYERS, _ROWS, _COLUMNS)},
          "mlp_norm": leaf(_LAYERS, _COLUMNS),
      },
  }


# A value for each parameter that has no default.
_GIVEN = {"weight": 0.4, "t": 0.3}


def _parameters(name):
  given = {
      p.name: _GIVEN[p.name]
      for p in merging.METHODS[name].parameters
      if p.default is None
  }
  if any(p.name == "density" for p in merging.METHODS[name].parameters):
    given["density"] = 0.5
  return given | ({"select_topk": 0.5} if name == "sce" else {})


def _experts(name, dtype=np.float32):
  most = merging.METHODS[name].max_experts or 3
  return [_tree(seed, dtype) for seed in range(1, most + 1)]


def _statistics(name, experts):
  kind = merging.METHODS[name].statistics
  if kind == "fisher":
    return [jax.tree.map(jnp.square, expert) for expert in experts]
  if kind == "gram":
    rng = np.random.default_rng(5)
    x = rng.normal(size=(_LAYERS, 40, _COLUMNS)).astype(np.float32)
    gram = jnp.asarray(np.einsum("lni,lnj->lij", x, x))
    return [{"layers": {"mlp": {"up": gram}}}] * len(experts)
  return None


def _assert_close(found, expected, tolerance):
  for path, leaf in jax.tree_util.tree_leaves_with_path(found):
    other = expected
    for key in path:
      other = other[key.key]
    np.testing.assert_allclose(
        np.asarray(leaf, np.float32),
        np.asarray(other, np.float32),
        atol=tolerance,
        err_msg=str(path),
    )


def _norm_scaled(base, task_vectors, literals):
  """Depends on the whole tensor: a layer must not see its neighbours."""
  return base + sum(t / jnp.linalg.norm(t) for t in task_vectors)


def _program(kernel, literals=()):
  return lambda shape: (kernel, np.asarray(literals, np.float32))


def test_layers_are_merged_one_by_one():
  base, expert = _tree(0), _tree(1)
  merged, finite = merging.Merger(base, [expert]).run(_program(_norm_scaled))
  assert finite
  for layer in range(_LAYERS):
    b, e = (np.asarray(t["layers"]["mlp"]["up"][layer]) for t in (base, expert))
    expected = b + (e - b) / np.linalg.norm(e - b)
    found = merged["layers"]["mlp"]["up"][layer]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_scope_mlp_leaves_the_rest_the_bases():
  base, expert = _tree(0), _tree(1)
  merger = merging.Merger(base, [expert], scope="mlp")
  merged = merger.merge("task_arithmetic", weight=0.5)
  assert merged["layers"]["attention"]["q"] is base["layers"]["attention"]["q"]
  assert merged["embed"] is base["embed"]
  up = lambda tree: np.asarray(tree["layers"]["mlp"]["up"])
  np.testing.assert_allclose(up(merged), (up(base) + up(expert)) / 2, atol=1e-6)
  assert merger.shapes == [(_ROWS, _COLUMNS)]
  assert merging.Merger(base, [expert]).shapes == [
      (10, _COLUMNS),
      (_ROWS, _COLUMNS),
      (_COLUMNS,),
  ]


def test_a_hundred_merges_compile_each_leaf_kind_once():
  engine.kernel.cache_clear()  # Of other tests' merges.
  compiled = []
  event = "/jax/core/compile/backend_compile_duration"
  jax.monitoring.register_event_duration_secs_listener(
      lambda name, *_, **__: compiled.append(name) if name == event else None
  )
  merger = merging.Merger(_tree(0), [_tree(1), _tree(2)])
  merged = merger.merge("ties", weight=0.1, density=0.9)
  # Matrices, norms in layers, the embedding, the last norm.
  kinds = 4
  assert len(compiled) >= kinds
  compiled.clear()
  for i in range(100):
    merged = merger.merge(
        "ties", weight=[0.01 * i, 1.0], density=(i + 1) / 100, into=merged
    )
  assert not compiled
  kernels = [
      engine.kernel(
          engine.bound(
              merging.METHODS["ties"],
              merging.METHODS["ties"].bind({"weight": 1.0}, 2),
              None,
          )[0],
          stacked=stacked,
          dtype=jnp.dtype(np.float32),
          layout=None,
          check=None,
          deals=False,
      )
      for stacked in (True, False)
  ]
  assert sum(k._cache_size() for k in kernels) == kinds


def test_a_result_is_written_into_the_former_one():
  merger = merging.Merger(_tree(0), [_tree(1)])
  first = merger.merge("task_arithmetic", weight=0.5)
  address = first["embed"].unsafe_buffer_pointer()
  second = merger.merge("task_arithmetic", weight=0.25, into=first)
  assert second["embed"].unsafe_buffer_pointer() == address
  assert first["embed"].is_deleted()
  # Leaves out of scope are the base's own, and stay.
  narrow = merging.Merger(_tree(0), [_tree(1)], scope="mlp")
  merged = narrow.merge("task_arithmetic", weight=0.5)
  merged = narrow.merge("task_arithmetic", weight=0.5, into=merged)
  assert not merged["embed"].is_deleted()


def test_the_sum_is_float32_and_rounded_once():
  base, expert = _tree(0, jnp.bfloat16), _tree(1, jnp.bfloat16)
  merged = merging.merge("task_arithmetic", base, [expert], weight=1.0)
  # Base + (expert - base) is the expert, if nothing is rounded in between.
  for found, expected in zip(
      jax.tree.leaves(merged), jax.tree.leaves(expert), strict=True
  ):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected)


def test_dtype_and_out_dtype():
  base, expert = _tree(0), _tree(1)
  merge = lambda **options: merging.merge(
      "task_arithmetic", base, [expert], weight=0.3, **options
  )["embed"]
  assert merge(dtype="bfloat16").dtype == jnp.bfloat16
  assert merge(out_dtype="float16").dtype == jnp.float16
  narrow = merge(dtype="bfloat16", out_dtype="float32")
  assert narrow.dtype == jnp.float32
  np.testing.assert_array_equal(
      narrow, narrow.astype(jnp.bfloat16).astype(jnp.float32)
  )
  # Inputs, differences and products are rounded, one by one.
  rounded = lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32)
  b, e = rounded(base["embed"]), rounded(expert["embed"])
  expected = rounded(b + rounded(rounded(np.float32(0.3)) * rounded(e - b)))
  np.testing.assert_array_equal(narrow, expected)


def test_what_is_not_finite_is_told_of_a_program():
  def broken(base, task_vectors, literals):
    return base / jnp.zeros_like(base)

  _, finite = merging.Merger(_tree(0), [_tree(1)]).run(_program(broken))
  assert not finite


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[] if name == "passthrough" else [pytest.mark.slow],
        )
        for name in merging.METHODS
    ],
)
def test_sharded_and_dealt_out_equal_one_device(name):
  base, experts = _tree(0), _experts(name)
  statistics = _statistics(name, experts)
  options = _parameters(name) | {"seed": 3, "statistics": statistics}
  expected = merging.merge(name, base, experts, **options)
  # Sums are added up in another order; a threshold may then lie elsewhere,
  # but not for numbers that are as different as these.
  tolerance = 2e-5
  mesh = jax.make_mesh(
      (4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2
  )

  def place(path, leaf):
    spec = {
        "up": P(None, "tensor", "fsdp"),
        "q": P(None, "fsdp", "tensor"),
        "embed": P("tensor", None),
    }.get(path[-1].key, P())
    return jax.device_put(leaf, NamedSharding(mesh, spec))

  shard = lambda tree: jax.tree_util.tree_map_with_path(place, tree)
  sharded = merging.merge(
      name, shard(base), list(map(shard, experts)), **options
  )
  up = sharded["layers"]["mlp"]["up"]
  assert up.sharding.spec == P(None, "tensor", "fsdp")
  assert len(up.sharding.device_set) == 8
  _assert_close(sharded, expected, tolerance)
  dealt = merging.Merger(base, experts, mode="pmap").merge(name, **options)
  _assert_close(dealt, expected, tolerance)


def test_dealt_out_results_are_used_again():
  merger = merging.Merger(_tree(0), [_tree(1)], mode="pmap")
  merged = merger.merge("task_arithmetic", weight=0.5)
  merged = merger.merge("task_arithmetic", weight=0.25, into=merged)
  expected = merging.merge("task_arithmetic", _tree(0), [_tree(1)], weight=0.25)
  _assert_close(merged, expected, 1e-6)


def test_random_masks_differ_between_layers_leaves_and_seeds():
  zeros = jax.tree.map(jnp.zeros_like, _tree(0))
  ones = jax.tree.map(jnp.ones_like, zeros)
  merger = merging.Merger(zeros, [ones])
  drop = lambda seed: merger.merge(
      "dare_linear", weight=1.0, density=0.5, rescale=False, seed=seed
  )
  first, again, other = drop(0), drop(0), drop(1)
  layers = np.asarray(first["layers"]["mlp"]["up"])
  assert 0.3 < layers.mean() < 0.7
  assert not np.array_equal(layers[0], layers[1])
  assert not np.array_equal(layers, first["layers"]["attention"]["q"])
  np.testing.assert_array_equal(layers, again["layers"]["mlp"]["up"])
  assert not np.array_equal(layers, other["layers"]["mlp"]["up"])


def _with(tree, path, change):
  """The tree with one leaf changed."""
  first, *rest = path.split("/")
  if not rest:
    return tree | {first: change(tree[first])}
  return tree | {first: _with(tree[first], "/".join(rest), change)}


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (
            "layers/mlp/up",
            lambda x: x[:, :-1],
            "expert b does not fit the base: layers/mlp/up is (3, 15, 24) there"
            " and (3, 16, 24) in the base",
        ),
        (
            "final_norm",
            lambda x: x.astype(jnp.bfloat16),
            "final_norm is bfloat16 there and float32 in the base",
        ),
        (
            "layers/mlp",
            lambda mlp: {"gate": mlp["up"]},
            "expert b does not fit the base: the base has no layers/mlp/gate",
        ),
        (
            "layers/attention/q",
            lambda x: x.at[1, 2, 3].set(jnp.nan),
            "expert b holds numbers in layers/attention/q that are not finite",
        ),
    ],
)
def test_experts_that_do_not_fit_are_named(path, change, message):
  experts = {"a": _tree(1), "b": _with(_tree(2), path, change)}
  with pytest.raises(merging.MergeError) as error:
    merging.Merger(_tree(0), experts)
  assert message in str(error.value) and "\n" not in str(error.value)
  assert isinstance(error.value, errors.UserError)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tie", {}, "no merge method 'tie'; there are linear, slerp"),
        ("ties", {}, "ties needs the parameter weight"),
        ("ties", {"weight": [1.0]}, "weight has 1 values for 2 experts"),
        ("ties", {"weight": 1, "density": 0.0}, "has to be in (0, 1]"),
        ("ties", {"weight": 1, "density": 1.5}, "density is 1.5"),
        ("ties", {"weight": float("nan")}, "weight is nan"),
        ("ties", {"weight": 1, "scale": 2.0}, "has no parameter 'scale'"),
        ("ties", {"weight": 1, "normalize": 1}, "takes true or false, not 1"),
        ("linear", {"weight": [1, -1]}, "the weights add up to 0"),
        ("della", {"weight": 1, "density": 0.1}, "density - epsilon"),
        ("slerp", {"t": 0.5}, "slerp merges 1 experts beside the base, not 2"),
        ("fisher", {}, "fisher needs fisher statistics, one for each of the 2"),
    ],
)
def test_parameters_that_cannot_be_are_named(name, options, message):
  merger = merging.Merger(_tree(0), [_tree(1), _tree(2)])
  with pytest.raises(merging.MergeError) as error:
    merger.merge(name, **options)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_without_a_base():
  experts = [_tree(1), _tree(2)]
  merged = merging.merge("linear", None, experts, weight=[1.0, 3.0])
  expected = jax.tree.map(lambda x, y: (x + 3 * y) / 4, *experts)
  _assert_close(merged, expected, 1e-6)
  with pytest.raises(merging.MergeError, match="ties needs a base model"):
    merging.merge("ties", None, experts, weight=1.0)
  with pytest.raises(merging.MergeError, match="no experts to merge"):
    merging.merge("linear", None, [], weight=1.0)


@pytest.mark.parametrize(("rows", "shared"), [((9, 11), 9), ((14, 13), 10)])
def test_of_another_vocabulary_the_shared_rows_are_merged(rows, shared):
  base = _tree(0)
  resize = lambda n: lambda x: jnp.asarray(np.resize(x, (n, _COLUMNS)))
  experts = {
      str(n): _with(_tree(i + 1), "embed", resize(n))
      for i, n in enumerate(rows)
  }
  merger = merging.Merger(base, experts)
  assert (shared, _COLUMNS) in merger.shapes
  assert any(
      f"expert {rows[0]} has {rows[0]} rows of vocabulary, the base 10" in note
      for note in merger.notes
  )
  merged, finite = merger.run(_program(_norm_scaled))
  assert finite
  common = [
      np.asarray(tree["embed"])[:shared] for tree in (base, *experts.values())
  ]
  deltas = [expert - common[0] for expert in common[1:]]
  expected = common[0] + sum(d / np.linalg.norm(d) for d in deltas)
  assert merged["embed"].shape == (10, _COLUMNS)
  np.testing.assert_allclose(merged["embed"][:shared], expected, atol=1e-5)
  np.testing.assert_array_equal(
      merged["embed"][shared:], base["embed"][shared:]
  )
  assert not merging.Merger(base, experts, scope="mlp").notes


def test_shards_meet_in_one_order(monkeypatch):
  """Collectives of two leaves at a time take each other's threads."""
  monkeypatch.setattr(engine.os, "cpu_count", lambda: 8)
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
  cut = NamedSharding(mesh, P(None, "fsdp", None))
  tree = lambda seed: {
      "layers": {
          f"leaf{i}": jax.device_put(
              np.random.default_rng(seed + i).normal(size=(2, 16, 8 + i)), cut
          )
          for i in range(6)
      }
  }
  merger = merging.Merger(tree(0), [tree(1), tree(2)])
  merged = None
  for _ in range(10):
    merged = merger.merge("model_stock", into=merged)
  assert np.isfinite(merged["layers"]["leaf5"]).all()


def test_a_merger_keeps_no_programs():
  merger = merging.Merger(_tree(0), [_tree(1)], scope="mlp")
  for scale in (1.0, 2.0, 3.0):
    merger.run(_program(lambda base, taus, _, s=scale: base + s * taus[0]))
  assert len(merger._compiled) == 3
  engine.kernel.cache_clear()
  engine.of_program.cache_clear()
  gc.collect()
  assert not merger._compiled
