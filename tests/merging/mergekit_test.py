"""Every method beside mergekit 0.1.5 itself, on the same tensors."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from selfdev_jax import merging

registry = pytest.importorskip("mergekit.merge_methods.registry")
from mergekit.merge_methods.base import TensorGroup  # noqa: E402

# Not asked for: reinforced models' own methods, known to mergekit only.
_LEFT_OUT = {"ram", "ramplus_tl"}
# mergekit has none like them.
_OURS_ALONE = {"fisher", "regmean"}
_SHARED = sorted(merging.METHODS.keys() - _OURS_ALONE)
# A choice of ours, and a choice of mergekit's that changes no number here.
_OWN_PARAMETERS, _IDLE_PARAMETERS = {"exact_k"}, {"int8_mask"}

_WEIGHTS = [0.6, -0.3, 0.9]
_TRIMMED = {"weight": _WEIGHTS, "density": [0.2, 0.5, 1.0]}
_CASES = {
    "linear": [{"weight": _WEIGHTS}, {"weight": _WEIGHTS, "normalize": False}],
    "slerp": [{"t": 0.3}],
    "nuslerp": [
        {"weight": [0.6, 0.3]},
        {"weight": [0.6, 0.3], "nuslerp_flatten": False},
        {
            "weight": [0.6, 0.3],
            "nuslerp_flatten": False,
            "nuslerp_row_wise": True,
        },
    ],
    "multislerp": [{"weight": [0.2, 0.5, 0.9]}],
    "karcher": [{}],
    "task_arithmetic": [
        {"weight": _WEIGHTS},
        {"weight": _WEIGHTS, "lambda": 1.3, "normalize": True},
    ],
    "ties": [
        _TRIMMED,
        _TRIMMED | {"lambda": 1.3, "normalize": False},
        _TRIMMED | {"rescale": True, "exact_k": True},
    ],
    "breadcrumbs": [
        _TRIMMED | {"gamma": 0.05},
        _TRIMMED | {"gamma": 0.05, "rescale": True, "exact_k": True},
    ],
    "breadcrumbs_ties": [
        _TRIMMED | {"gamma": 0.05},
        _TRIMMED | {"gamma": 0.05, "rescale": True, "exact_k": True},
    ],
    "sce": [{}, {"select_topk": 0.3, "exact_k": True}],
    "model_stock": [{}, {"filter_wise": True}],
    "nearswap": [{"t": 0.001}],
    "arcee_fusion": [{}],
    "passthrough": [{"scale": 0.7}],
}
_RANKED = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")
_RANDOM = [
    "dare_linear",
    "della_linear",
    pytest.param("dare_ties", marks=pytest.mark.slow),
    pytest.param("della", marks=pytest.mark.slow),
]
_SHAPE = (33, 70)
# Dtype -> bits after the binary point.
_DIGITS = {"float32": 23, "bfloat16": 7}
# As in methods_test.
_SLOW = ("breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion")


def _theirs(name, base, experts, parameters, dtype="float32"):
  """mergekit's result in float32, its arithmetic in `dtype`."""
  tensors = list(experts) if base is None else [base, *experts]
  group = TensorGroup.from_tensors(
      [torch.tensor(x) for x in tensors],
      base_index=None if base is None else 0,
  )
  known = {k: v for k, v in parameters.items() if k not in _OWN_PARAMETERS}
  (merged,) = registry.get(name)(
      [group], parameters=known, dtype=getattr(torch, dtype)
  )
  return merged.float().numpy()


def _tensors(count, shape=_SHAPE, dtype="float32", scale=0.02):
  """A base and fine-tunes of it, of the sizes that models have."""
  rng = np.random.default_rng(0)
  base = rng.normal(size=shape) * scale
  experts = base + rng.normal(size=(count, *shape)) * scale / 10
  cast = lambda x: np.asarray(jnp.asarray(x, dtype), np.float32)
  return cast(np.float32(base)), list(cast(np.float32(experts)))


def test_every_method_of_mergekit_is_here():
  theirs = {method.spec.name for method in registry.registered_methods()}
  assert theirs - _LEFT_OUT == merging.METHODS.keys() - _OURS_ALONE


@pytest.mark.parametrize("name", _SHARED)
def test_parameters_are_named_and_preset_as_in_mergekit(name):
  ours = {p.name: p for p in merging.METHODS[name].parameters}
  theirs = {p.name: p for p in registry.get(name).spec.parameters}
  assert ours.keys() - _OWN_PARAMETERS == theirs.keys() - _IDLE_PARAMETERS
  for parameter in ours.keys() & theirs.keys():
    mine, other = ours[parameter], theirs[parameter]
    assert mine.per_expert == (other.scope.value != "shared")
    if parameter == "scale":
      # None is theirs for: as it is.
      assert (mine.default, other.default) == (1.0, None)
    else:
      assert mine.default == (None if other.required else other.default)


@pytest.mark.parametrize("name", _SHARED)
def test_inputs_are_asked_for_as_in_mergekit(name):
  ours, theirs = merging.METHODS[name], registry.get(name).spec.contract
  assert ours.base == theirs.base.value
  of_base = int(ours.base == "required")
  least = theirs.min_non_base or max(theirs.min_inputs - of_base, 1)
  assert ours.min_experts == least
  most = theirs.max_non_base
  if theirs.max_inputs is not None:
    most = theirs.max_inputs - of_base
  assert ours.max_experts == most


# ---- Without chance: entry by entry.


def _cases():
  cases = []
  for name, options in _CASES.items():
    origins = {"required": [True], "ignored": [False]}
    for has_base in origins.get(merging.METHODS[name].base, [True, False]):
      for i, parameters in enumerate(options):
        for dtype in _DIGITS:
          # In float32 methods_test has compiled the first of the others.
          is_slow = i > 0 or dtype != "float32"
          is_slow |= name in _SLOW
          origin = "" if has_base else "-baseless"
          cases.append(
              pytest.param(
                  name,
                  parameters,
                  has_base,
                  dtype,
                  marks=pytest.mark.slow if is_slow else (),
                  id=f"{name}-{i}-{dtype}{origin}",
              )
          )
  return cases


def _on_thresholds(name, base, experts, parameters, dtype):
  """Entries of a magnitude that a threshold falls on; mergekit keeps some.

  Its sort is not stable, so which of them it keeps follows from no rule.
  """
  cast = lambda x: np.asarray(jnp.asarray(x, dtype), np.float32)
  found = np.zeros(experts[0].shape, bool)
  if name == "sce":
    if parameters.get("select_topk", 1.0) == 1.0:
      return found
    deltas = np.stack([cast(e - base) for e in experts])
    variance = cast(deltas.var(0))
    k = int(np.count_nonzero(variance) * parameters["select_topk"])
    ranked = np.sort(variance, axis=None)[::-1]
    if ranked[k - 1] == ranked[k]:
      found |= variance == ranked[k]
    return found
  gamma = parameters.get("gamma", 0.0)
  for expert, density in zip(experts, parameters["density"], strict=True):
    size = np.abs(cast(expert - base))
    keep = int(density * size.size)
    outliers = min(int(gamma * size.size), size.size - keep)
    ranked = np.sort(size, axis=None)[::-1]
    for rank in (outliers, outliers + keep):
      if 0 < rank < size.size and ranked[rank - 1] == ranked[rank]:
        found |= size == ranked[rank]
  return found


# Steps of the dtype at the size of the largest input of an entry. Sums, norms
# and dot products are added up in another order than torch's: that moves a
# rounding now and then, and each later operation may add one.
_STEPS = {"float32": 8, "bfloat16": 4}
# Rounded wherever torch rounds: the same, bit by bit, but for what fused
# operations of either compiler may do to a few entries.
_STEPWISE = {"task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"}
# What mergekit iterates or subtracts in bfloat16 is rounding for the most part:
# its Karcher mean is up to 37 steps from its own in float32. These compute in
# float32 here, and are compared with that.
_ALWAYS_WIDE = {"karcher", "arcee_fusion"}


def _assert_close(found, expected, inputs, dtype, steps):
  size = np.max(np.abs([*inputs, expected]), axis=0)
  step = np.exp2(np.floor(np.log2(size)) - _DIGITS[dtype])
  np.testing.assert_array_less(np.abs(found - expected), (steps + 0.01) * step)


@pytest.mark.parametrize(("name", "parameters", "has_base", "dtype"), _cases())
def test_is_mergekits_result(apply, name, parameters, has_base, dtype):
  count = min(merging.METHODS[name].max_experts or 3, 3)
  # The divergence of two rows of weights as small as they are is so little that
  # mergekit's is off by several percent, and its mask with it.
  scale = 1.0 if name == "arcee_fusion" else 0.02
  base, experts = _tensors(count, dtype=dtype, scale=scale)
  base = base if has_base else None
  theirs = "float32" if name in _ALWAYS_WIDE else dtype
  # The engine rounds a result to the dtype of the output, as mergekit does.
  found, expected = (
      np.asarray(jnp.asarray(merged, dtype), np.float32)
      for merged in (
          apply(name, base, experts, parameters, dtype=dtype),
          _theirs(name, base, experts, parameters, theirs),
      )
  )
  compared = np.ones(_SHAPE, bool)
  if name in _RANKED:
    compared = ~_on_thresholds(name, base, experts, parameters, dtype)
    assert compared.mean() > (0.5 if dtype == "bfloat16" else 0.99)
  inputs = experts if base is None else [base, *experts]
  cut = lambda x: x[compared]
  _assert_close(
      cut(found), cut(expected), list(map(cut, inputs)), dtype, _STEPS[dtype]
  )
  if dtype == "bfloat16" and name in _STEPWISE:
    assert np.mean(cut(found) == cut(expected)) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("dtype", _DIGITS)
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_as_many_entries_are_kept(apply, name, dtype):
  """Of integers -4 to 4, so that nearly all entries tie."""
  rng = np.random.default_rng(0)
  tau = rng.integers(-4, 5, size=_SHAPE).astype(np.float32)
  zero = np.zeros_like(tau)
  for density in (0.05, 0.3, 0.6):
    parameters = {"weight": 1.0, "density": density, "exact_k": True}
    theirs = _theirs(name, zero, [tau], parameters, dtype)
    ours = apply(name, zero, [tau], parameters, dtype=dtype)
    # Which of the tied is another matter; the magnitudes are the same.
    np.testing.assert_array_equal(
        np.sort(np.abs(ours), axis=None), np.sort(np.abs(theirs), axis=None)
    )


@pytest.mark.slow
def test_sce_keeps_as_many_entries(apply):
  rng = np.random.default_rng(0)
  base, *experts = rng.integers(-2, 3, size=(3, *_SHAPE)).astype(np.float32)
  for share in (0.1, 0.5, 0.9):
    parameters = {"select_topk": share, "exact_k": True}
    theirs = _theirs("sce", base, experts, parameters)
    ours = apply("sce", base, experts, parameters)
    assert np.count_nonzero(ours != base) == np.count_nonzero(theirs != base)


# ---- Random masks: in their statistics.

# A share or mean this far off has a probability of 6e-7.
_SIGMAS = 5


@pytest.fixture(autouse=True)
def _seeded():
  torch.manual_seed(0)


def _sparsified(apply, name, dtype):
  """(ours, mergekit's, delta): the base is 0, all others have no weight."""
  _, (delta, *others) = _tensors(3, dtype=dtype)
  zero, experts = np.zeros_like(delta), [delta, *others]
  parameters = {"weight": [1.0, 0.0, 0.0], "density": 0.4}
  ours = apply(name, zero, experts, parameters, dtype=dtype)
  theirs = _theirs(name, zero, experts, parameters, dtype)
  return ours, theirs, delta


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", _RANDOM)
def test_as_much_is_kept_and_the_norm_too(apply, name, dtype):
  *both, delta = _sparsified(apply, name, dtype)
  sigma = np.sqrt(0.4 * 0.6 / delta.size)
  for found in both:
    assert abs(np.mean(found != 0) - 0.4) < _SIGMAS * sigma
    # Each of the two norms and the scale is rounded once.
    norms = np.abs(found).sum() / np.abs(delta).sum()
    assert abs(norms - 1) < 3 * 2.0 ** -_DIGITS[dtype] + 1e-5
    scale = np.float64(found[found != 0]) / delta[found != 0]
    np.testing.assert_allclose(
        scale, np.median(scale), rtol=2 * 2.0 ** -_DIGITS[dtype]
    )


@pytest.mark.parametrize("name", _RANDOM[1::2])
def test_della_keeps_as_often_by_rank(apply, name):
  ours, theirs, delta = _sparsified(apply, name, "float32")
  ranks = np.abs(delta).argsort(-1).argsort(-1)
  for low in range(0, 70, 10):
    inside = (ranks >= low) & (ranks < low + 10)
    rates = [np.mean(found[inside] != 0) for found in (ours, theirs)]
    sigma = np.sqrt(2 * 0.4 * 0.6 / inside.sum())
    assert abs(rates[0] - rates[1]) < _SIGMAS * sigma


@pytest.mark.parametrize("name", _RANDOM)
def test_the_mean_over_many_masks_is_mergekits(apply, name):
  base, experts = _tensors(2, shape=(7,))
  parameters = {"weight": [0.6, -0.3], "density": [0.3, 0.7]}
  draws = 200
  ours = np.stack(
      [apply(name, base, experts, parameters, seed=i) for i in range(draws)]
  )
  theirs = np.stack(
      [_theirs(name, base, experts, parameters) for _ in range(draws)]
  )
  error = np.sqrt((ours.var(0) + theirs.var(0)) / draws)
  assert np.all(np.abs(ours.mean(0) - theirs.mean(0)) < _SIGMAS * error)
  np.testing.assert_allclose(ours.std(0).mean(), theirs.std(0).mean(), rtol=0.1)
