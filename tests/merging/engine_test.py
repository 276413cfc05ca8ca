import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import errors
from selfdev_jax import merging
from selfdev_jax import models

_CONFIG = models.DecoderConfig(
    vocab_size=11, embed=8, layers=3, heads=2, kv_heads=1, head_dim=4, mlp=12
)


def _tree(seed):
  """Random parameters, the norms' scales too."""
  return jax.tree.map(
      lambda x: x + 0.1 * seed, models.init_params(_CONFIG, seed)
  )


def _norm_scaled(base, task_vectors, coefficients):
  """Depends on the whole tensor: a layer must not see its neighbours."""
  return base + sum(t / jnp.linalg.norm(t) for t in task_vectors)


def test_layers_are_merged_one_by_one():
  base, expert = _tree(0), _tree(1)
  merged, finite = merging.merge(
      merging.constant(_norm_scaled, []), base, [expert], "all"
  )
  assert finite
  for layer in range(_CONFIG.layers):
    b, e = (t["layers"]["mlp"]["up"][layer] for t in (base, expert))
    expected = b + (e - b) / np.linalg.norm(e - b)
    found = merged["layers"]["mlp"]["up"][layer]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_scope_mlp_leaves_the_rest_the_bases():
  base, expert = _tree(0), _tree(1)
  half = merging.constant(merging.task_arithmetic, [0.5])
  merged, _ = merging.merge(half, base, [expert], "mlp")
  for path, leaf in jax.tree_util.tree_leaves_with_path(merged):
    original = base
    for key in path:
      original = original[key.key]
    same = np.array_equal(leaf, original)
    assert same != any(key.key == "mlp" for key in path)


def test_leaf_kinds_by_scope():
  assert merging.leaf_shapes(_tree(0), [_tree(1)], "mlp") == [(8, 12), (12, 8)]
  assert merging.leaf_shapes(_tree(0), [_tree(1)], "all") == [
      (4, 8),
      (8,),
      (8, 8),
      (8, 12),
      (11, 8),
      (12, 8),
  ]


def test_a_sweep_compiles_each_leaf_kind_once():
  traces = []

  def counted(base, task_vectors, coefficients):
    traces.append(base.shape)
    return merging.task_arithmetic(base, task_vectors, coefficients)

  base, expert = _tree(0), _tree(1)
  for scale in (0.1, 0.2, 0.3):
    merging.merge(merging.constant(counted, [scale]), base, [expert], "all")
  # Norms are vmapped over layers, but the final one has none: traced apart.
  kinds = merging.leaf_shapes(base, [base], "all")
  assert sorted(traces) == sorted([*kinds, (8,)])


def test_the_dtype_is_the_bases_and_the_sum_is_float32():
  base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _tree(0))
  expert = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _tree(1))
  seen = []

  def spy(base, task_vectors, coefficients):
    seen.extend([base.dtype, task_vectors[0].dtype])
    return merging.task_arithmetic(base, task_vectors, coefficients)

  merged, _ = merging.merge(merging.constant(spy, [1.0]), base, [expert], "all")
  assert set(seen) == {jnp.dtype("float32")}
  chex_equal = jax.tree.map(np.array_equal, merged, expert)
  assert all(jax.tree.leaves(chex_equal))
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(merged))


def test_non_finite_weights_are_told():
  def broken(base, task_vectors, coefficients):
    return base / jnp.zeros_like(base)

  _, finite = merging.merge(
      merging.constant(broken, []), _tree(0), [_tree(1)], "mlp"
  )
  assert not finite


def test_experts_of_another_shape_are_named():
  other = models.init_params(models.DecoderConfig(11, 8, 3, 2, 1, 4, mlp=16), 0)
  with pytest.raises(errors.UserError) as error:
    merging.check_experts(_tree(0), {"good": _tree(1), "bad": other}, "seed")
  message = str(error.value)
  assert "expert bad does not fit seed model seed: layers/mlp/down" in message
  assert "(3, 8, 16) there and (3, 8, 12) in the seed" in message
  assert "\n" not in message


def _with_rows(tree, rows):
  """The tree with another number of rows in its vocabulary."""
  resized = {
      name: np.resize(np.asarray(tree[name]), (rows, 8))
      for name in ("embed", "head")
  }
  return tree | resized


@pytest.mark.parametrize(("rows", "shared"), [((9, 11), 9), ((14, 13), 11)])
def test_of_another_vocabulary_the_shared_rows_are_merged(rows, shared):
  base = _tree(0)
  experts = [_with_rows(_tree(i + 1), n) for i, n in enumerate(rows)]
  merging.check_experts(base, dict(enumerate(experts)), "seed")
  shapes = merging.leaf_shapes(base, experts, "all")
  assert {(n, 8) for n in (11, *rows)} & set(shapes) == {(shared, 8)}
  merged, finite = merging.merge(
      merging.constant(_norm_scaled, []), base, experts, "all"
  )
  assert finite
  for name in ("embed", "head"):
    common = [tree[name][:shared] for tree in (base, *experts)]
    deltas = [expert - common[0] for expert in common[1:]]
    expected = common[0] + sum(d / np.linalg.norm(d) for d in deltas)
    assert merged[name].shape == (11, 8)
    np.testing.assert_allclose(merged[name][:shared], expected, atol=1e-5)
    np.testing.assert_array_equal(merged[name][shared:], base[name][shared:])


def test_another_vocabulary_is_said():
  base = _tree(0)
  experts = {"same": _tree(1), "paper": _with_rows(_tree(2), 9)}
  (note,) = merging.vocabulary_notes(base, experts, "all")
  assert "expert paper has 9 rows" in note and "the seed model 11" in note
  assert "the first 9 are merged, the others stay" in note
  # The vocabulary is the seed model's anyway.
  assert not merging.vocabulary_notes(base, experts, "mlp")
