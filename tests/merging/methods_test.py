"""Every method against a float64 twin in NumPy, written from its paper."""

import dataclasses
import math

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from selfdev_jax import merging

# ---- Twins: twin(base, experts, parameters) -> tensor, all in float64.
# Random methods also take the masks that were drawn, fisher and regmean their
# statistics. What a paper leaves open (counts, fallbacks where a quotient has
# no value) is as mergekit 0.1.5 does it.


def _linear(base, experts, p):
  del base
  total = sum(w * e for w, e in zip(p["weight"], experts, strict=True))
  return total / sum(p["weight"]) if p["normalize"] else total


def _passthrough(base, experts, p):
  del base
  return experts[0] * p["scale"]


def _slerp(base, experts, p):
  (expert,), t = experts, p["t"]
  unit = lambda x: x / (np.linalg.norm(x) if np.linalg.norm(x) > 1e-8 else 1.0)
  cosine = np.clip(np.sum(unit(base) * unit(expert)), -1, 1)
  if abs(cosine) > 0.9995:
    return (1 - t) * base + t * expert
  theta = np.arccos(cosine)
  return (np.sin((1 - t) * theta) * base + np.sin(t * theta) * expert) / np.sin(
      theta
  )


def _nuslerp(base, experts, p):
  total = sum(p["weight"])
  t = 0.5 if abs(total) < 1e-6 else p["weight"][1] / total
  origin = 0.0 if base is None else base
  v0, v1 = (e - origin for e in experts)
  if p["nuslerp_flatten"]:
    axis = None
  else:
    axis = 0 if p["nuslerp_row_wise"] else -1

  def unit(x):
    norm = np.sqrt(np.sum(x * x, axis=axis, keepdims=True))
    return x / np.maximum(norm, 1e-7)

  cosine = np.sum(unit(v0) * unit(v1), axis=axis, keepdims=True)
  cosine = np.clip(cosine, -1, 1)
  collinear = 1 - cosine**2 <= 1e-16
  theta = np.arccos(np.where(collinear, 0, cosine))
  arc = np.sin((1 - t) * theta) * v0 + np.sin(t * theta) * v1
  line = (1 - t) * v0 + t * v1
  return origin + np.where(collinear, line, arc / np.sin(theta))


def _multislerp(base, experts, p):
  if len(experts) == 1:
    return experts[0]
  origin = 0.0 if base is None else base
  vectors = [e - origin for e in experts]
  weights = np.asarray(p["weight"])
  if p["normalize_weights"]:
    weights = weights / weights.sum()
  mix = lambda xs: sum(w * x for w, x in zip(weights, xs, strict=True))
  norms = [np.linalg.norm(v) for v in vectors]
  units = [v / (n + p["eps"]) for v, n in zip(vectors, norms, strict=True)]
  mean = mix(units)
  if np.linalg.norm(mean) < p["eps"]:
    return origin + mix(vectors)
  mean = mean / np.linalg.norm(mean)
  tangent = mix([u - np.sum(u * mean) * mean for u in units])
  angle = np.linalg.norm(tangent) + p["eps"]
  point = np.cos(angle) * mean + np.sin(angle) / angle * tangent
  return origin + mix(norms) * point


def _karcher(base, experts, p):
  del base
  if len(experts) == 1:
    return experts[0]
  norms = [np.linalg.norm(e) for e in experts]
  units = [e / n for e, n in zip(experts, norms, strict=True) if n > p["tol"]]
  if not units:
    return np.zeros_like(experts[0])
  mean = sum(units) / len(units)
  length = np.linalg.norm(mean)
  mean = units[0] if length < p["tol"] else mean / length
  for _ in range(p["max_iter"]):
    tangent = np.zeros_like(mean)
    for unit in units:
      cosine = np.clip(np.sum(mean * unit), -1, 1)
      theta = np.arccos(cosine)
      if theta >= p["tol"]:
        tangent += theta / np.sin(theta) * (unit - cosine * mean) / len(units)
    length = np.linalg.norm(tangent)
    if length < p["tol"]:
      break
    mean = np.cos(length) * mean + np.sin(length) * tangent / length
    mean = mean / np.linalg.norm(mean)
  return np.mean(norms) * mean


def _largest(score, k, exact):
  """Mask of the k largest: those that tie, or the lowest index first."""
  if k <= 0:
    return np.zeros(score.shape, bool)
  if not exact:
    return score >= np.partition(score, score.size - k, axis=None)[-k]
  order = np.lexsort((np.arange(score.size), -score.ravel()))
  mask = np.zeros(score.size, bool)
  mask[order[:k]] = True
  return mask.reshape(score.shape)


def _trimmed(delta, p, i):
  """TIES: the `density` of largest magnitude, at least one entry."""
  k = max(int(p["density"][i] * delta.size), 1)
  return _largest(np.abs(delta), k, p["exact_k"])


def _breadcrumbs_mask(delta, p, i):
  """`density` of the entries below the `gamma` of largest magnitude."""
  keep = int(p["density"][i] * delta.size)
  outliers = min(int(p["gamma"][i] * delta.size), delta.size - keep)
  size = np.abs(delta)
  if p["exact_k"]:
    above = _largest(size, outliers, True)
    return _largest(size, outliers + keep, True) & ~above
  if not keep:
    return np.zeros(delta.shape, bool)
  ranked = np.sort(size, axis=None)[::-1]
  low, high = ranked[outliers + keep - 1], ranked[outliers]
  return (low <= size) & (size <= high)


def _combined(base, deltas, p, elect):
  """Base + the weighted deltas, of the elected sign only if `elect`."""
  weights = np.reshape(p["weight"], (-1,) + (1,) * base.ndim)
  weighted = np.stack(deltas) * weights
  if elect:
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    agrees = np.sign(weighted) == sign
    divisor = np.sum(weights * agrees, 0)
    divisor = np.where(divisor == 0, 1, divisor)
    total = np.sum(weighted * agrees, 0)
  else:
    divisor = weights.sum()
    divisor = 1 if abs(divisor) < 1e-8 else divisor
    total = weighted.sum(0)
  return base + p["lambda"] * (total / divisor if p["normalize"] else total)


def _sparse(mask_of, elect):
  """A twin of the task-arithmetic family, whose masks `mask_of` computes."""

  def twin(base, experts, p):
    deltas = [e - base for e in experts]
    masks = [mask_of(d, p, i) for i, d in enumerate(deltas)]
    return _masked(elect)(base, experts, p, masks)

  return twin


def _masked(elect):
  """The same, with masks that were drawn."""

  def twin(base, experts, p, masks):
    deltas = []
    for expert, mask in zip(experts, masks, strict=True):
      delta = expert - base
      kept = np.where(mask, delta, 0)
      before, after = np.abs(delta).sum(), np.abs(kept).sum()
      if p.get("rescale") and before >= 1e-7 and after >= 1e-7:
        kept = kept * (before / after)
      deltas.append(kept)
    return _combined(base, deltas, p, elect)

  return twin


def _everything(delta, p, i):
  del p, i
  return np.ones(delta.shape, bool)


def _sce(base, experts, p):
  deltas = np.stack([e - base for e in experts])
  if p["select_topk"] < 1:
    variance = deltas.var(0)
    nonzero = np.count_nonzero(variance)
    k = int(np.float32(nonzero) * np.float32(p["select_topk"]))
    deltas = deltas * _largest(variance, k, p["exact_k"])
  sign = np.where(deltas.sum(0) >= 0, 1, -1)
  energy = np.mean(deltas**2, axis=tuple(range(1, deltas.ndim)))
  if energy.sum() < 1e-6:
    energy = np.ones_like(energy)
  weights = (energy / energy.sum()).reshape((-1,) + (1,) * base.ndim)
  weights = weights * (np.sign(deltas) == sign)
  return base + np.sum(weights * deltas, 0) / np.maximum(weights.sum(0), 1e-6)


def _model_stock(base, experts, p):
  if not p["filter_wise"] or base.ndim == 1:
    axes = tuple(range(base.ndim))
  else:
    axes = (-1,)
  dot = lambda a, b: np.sum(a * b, axis=axes, keepdims=True)
  deltas = [e - base for e in experts]
  count = len(experts)
  cosines = []
  for i in range(count):
    for j in range(i):
      a, b = deltas[i], deltas[j]
      norms = np.sqrt(dot(a, a) * dot(b, b))
      cosines.append(np.clip(dot(a, b) / np.maximum(norms, 1e-6), -1, 1))
  cosine = np.mean(cosines, 0)
  divisor = 1 + (count - 1) * cosine
  singular = np.abs(divisor) < 1e-6
  t = np.where(singular, 0, count * cosine / np.where(singular, 1, divisor))
  return t * np.mean(experts, 0) + (1 - t) * base


def _nearswap(base, experts, p):
  (expert,) = experts
  share = np.clip(p["t"] / np.maximum(np.abs(base - expert), 1e-6), 0, 1)
  return share * expert + (1 - share) * base


def _arcee_fusion(base, experts, p):
  del p
  (expert,) = experts

  def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True) + 1e-8

  p, q = softmax(expert), softmax(base)
  divergence = np.sum(p * np.log(p / q), -1, keepdims=True)
  importance = np.abs(expert - base) * divergence
  ranked = np.sort(importance, axis=None)
  low, middle, high = (
      ranked[int(q * (ranked.size - 1))] for q in (0.25, 0.5, 0.75)
  )
  return np.where(importance >= middle + 1.5 * (high - low), expert, base)


def _fisher(base, experts, p, fishers):
  del base
  shares = [w * f for w, f in zip(p["weight"], fishers, strict=True)]
  return sum(s * e for s, e in zip(shares, experts, strict=True)) / sum(shares)


def _regmean(base, experts, p, grams):
  del base
  if grams[0] is None:
    return np.mean(experts, 0)
  # Off-diagonals are shrunk: reduce * G + (1 - reduce) * diag(G).
  shrunk = [
      p["reduce"] * g + (1 - p["reduce"]) * np.diag(np.diag(g)) for g in grams
  ]
  total = sum(e @ g for e, g in zip(experts, shrunk, strict=True))
  return np.linalg.solve(sum(shrunk), total.T).T


_TWINS = {
    "linear": _linear,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "task_arithmetic": _sparse(_everything, elect=False),
    "ties": _sparse(_trimmed, elect=True),
    "dare_linear": _masked(elect=False),
    "dare_ties": _masked(elect=True),
    "della": _masked(elect=True),
    "della_linear": _masked(elect=False),
    "breadcrumbs": _sparse(_breadcrumbs_mask, elect=False),
    "breadcrumbs_ties": _sparse(_breadcrumbs_mask, elect=True),
    "sce": _sce,
    "model_stock": _model_stock,
    "nearswap": _nearswap,
    "arcee_fusion": _arcee_fusion,
    "passthrough": _passthrough,
    "fisher": _fisher,
    "regmean": _regmean,
}

# ---- Every method, its options and its edges.

_WEIGHTS = [0.6, -0.3, 0.9]
_DRAWN = [
    {"weight": _WEIGHTS, "density": [0.3, 0.5, 0.8]},
    {
        "weight": 0.7,
        "density": 0.5,
        "lambda": 1.3,
        "rescale": False,
        "normalize": True,
    },
]
_CRUMBS = [
    {"weight": _WEIGHTS, "density": [0.3, 0.5, 1.0], "gamma": [0.1, 0.2, 0.0]},
    {
        "weight": 0.7,
        "density": 0.5,
        "gamma": 0.7,
        "lambda": 1.3,
        "normalize": True,
        "rescale": True,
        "exact_k": True,
    },
]
# The first of each is run on all shapes, the others on the last. Where there
# are fewer experts, they have the first values.
_CASES = {
    "linear": [
        {"weight": [0.2, 0.5, 0.9]},
        {"weight": _WEIGHTS, "normalize": False},
    ],
    "slerp": [{"t": 0.3}],
    "nuslerp": [
        {"weight": [0.6, 0.3]},
        {"weight": [0.5, -0.5], "nuslerp_flatten": False},
        {
            "weight": [0.6, 0.3],
            "nuslerp_flatten": False,
            "nuslerp_row_wise": True,
        },
    ],
    "multislerp": [
        {"weight": [0.2, 0.5, 0.9]},
        {"weight": _WEIGHTS, "normalize_weights": False, "eps": 1e-3},
    ],
    "karcher": [{}, {"max_iter": 1, "tol": 1e-3}],
    "task_arithmetic": [
        {"weight": _WEIGHTS},
        {"weight": _WEIGHTS, "lambda": 1.3, "normalize": True},
    ],
    "ties": [
        {"weight": _WEIGHTS, "density": [0.2, 0.5, 1.0]},
        {
            "weight": 0.7,
            "density": 0.4,
            "lambda": 1.3,
            "normalize": False,
            "rescale": True,
            "exact_k": True,
        },
    ],
    "dare_linear": _DRAWN,
    "dare_ties": _DRAWN,
    "della": [_DRAWN[0], _DRAWN[1] | {"epsilon": [0.3, 0.01, 0.1]}],
    "della_linear": [_DRAWN[0], _DRAWN[1] | {"epsilon": [0.3, 0.01, 0.1]}],
    "breadcrumbs": _CRUMBS,
    "breadcrumbs_ties": _CRUMBS,
    "sce": [{"select_topk": 0.4}, {"select_topk": 0.7, "exact_k": True}, {}],
    "model_stock": [{}, {"filter_wise": True}],
    "nearswap": [{"t": 0.4}],
    "arcee_fusion": [{}],
    "passthrough": [{"scale": 0.7}],
    "fisher": [{}, {"weight": [0.2, 0.5, 0.9]}],
    "regmean": [{}, {"reduce": 0.4}],
}
_VECTOR, _SMALL, _LARGE = (7,), (5, 9), (33, 70)
# Tried on vectors only by the fast tests: these take longest to compile, 0.3 to
# 0.9 s, or differ from another method in the election of signs only.
_SLOW = (
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "arcee_fusion",
    "dare_ties",
    "della",
)
_SLOW_OPTIONS = (*_SLOW, "ties", "dare_linear", "della_linear")


@dataclasses.dataclass(frozen=True)
class _Case:
  name: str
  parameters: dict
  shape: tuple[int, ...]
  has_base: bool

  def __str__(self):
    changed = ",".join(self.parameters)
    origin = "" if self.has_base else "-baseless"
    return f"{self.name}-{self.shape}-{changed}{origin}"


def _all_cases():
  cases = []
  for name, method in merging.METHODS.items():
    assert name in _TWINS, f"method {name} has no twin in {__file__}"
    origins = {"required": [True], "ignored": [False]}
    for has_base in origins.get(method.base, [True, False]):
      for i, parameters in enumerate(_CASES[name]):
        for shape in [_LARGE] if i else [_VECTOR, _SMALL, _LARGE]:
          is_slow = shape in (_SMALL, _LARGE) or i > 0
          case = _Case(name, parameters, shape, has_base)
          cases.append(_maybe_slow(case, is_slow))
  return cases


def _maybe_slow(value, is_slow):
  return pytest.param(value, marks=pytest.mark.slow if is_slow else ())


def _marked(names):
  """Those slow that need more than the compiled functions of vectors."""
  return [_maybe_slow(name, name in _SLOW) for name in names]


def _count(name, shape):
  """How many experts a method is tried with."""
  method = merging.METHODS[name]
  wanted = max(len(shape) + 1, method.min_experts)
  return min(method.max_experts or wanted, wanted)


def _cut(parameters, count):
  return {
      key: value[:count] if isinstance(value, list) else value
      for key, value in parameters.items()
  }


def _grid(rng, shape):
  """Normal float32, rounded so that differences of two are exact."""
  return (np.round(rng.normal(size=shape) * 4096) / 4096).astype(np.float32)


def _statistics(name, rng, shape, count):
  if merging.METHODS[name].statistics == "fisher":
    return [np.float32(rng.uniform(0.1, 2, shape)) for _ in range(count)]
  if merging.METHODS[name].statistics == "gram":
    if len(shape) != 2:
      return [None] * count
    data = rng.normal(size=(count, 3 * shape[1], shape[1]))
    return [np.float32(x.T @ x / len(x)) for x in data]
  return None


def _masks(apply, name, deltas, parameters):
  """The masks that the method draws: each expert alone has weight."""
  zero = np.zeros_like(deltas[0])
  found = []
  for i in range(len(deltas)):
    one_hot = {"weight": list(np.eye(len(deltas))[i])}
    merged = apply(name, zero, deltas, parameters | one_hot)
    found.append(merged != 0)
  return found


def _expected(apply, name, base, experts, parameters, statistics=None):
  """What the twin says of the same input."""
  extra = [] if statistics is None else [statistics]
  if merging.METHODS[name].random:
    deltas = [e - base for e in experts]
    extra = [_masks(apply, name, deltas, parameters)]
  wide = lambda x: x.astype(np.float64)
  values = apply.resolve(name, parameters, len(experts))
  twin = _TWINS[name]
  extra = jax.tree.map(wide, extra) if statistics is not None else extra
  return twin(
      None if base is None else wide(base),
      [wide(e) for e in experts],
      values,
      *extra,
  )


# A few roundings of float32, whose epsilon is 1.2e-7, at values up to 5.
_TOLERANCE = {name: 4e-6 for name in _TWINS}
# Stops when a step is shorter than 1e-5, which rounding shifts by one step.
_TOLERANCE["karcher"] = 2e-5
# Solves with matrices whose condition is about 100.
_TOLERANCE["regmean"] = 1e-4


def _check(apply, name, base, experts, parameters):
  """That the method does what the twin does."""
  rng = np.random.default_rng(0)
  statistics = _statistics(name, rng, experts[0].shape, len(experts))
  found = apply(name, base, experts, parameters, statistics=statistics)
  assert found.shape == experts[0].shape
  assert np.isfinite(found).all()
  expected = _expected(apply, name, base, experts, parameters, statistics)
  tolerance = _TOLERANCE[name]
  np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", _all_cases(), ids=str)
def test_matches_float64_twin(apply, case):
  rng = np.random.default_rng(0)
  count = _count(case.name, case.shape)
  base, *experts = _grid(rng, (count + 1, *case.shape))
  base = base if case.has_base else None
  _check(apply, case.name, base, experts, _cut(case.parameters, count))


def _pattern(seed):
  """[7] of 0 and four of -0.5 or 0.5: norms and their products are exact."""
  signs = np.random.default_rng(seed).choice(np.float32([-0.5, 0.5]), 4)
  return np.concatenate([np.zeros(3, np.float32), signs])


def _edges(count):
  """Name -> (base, experts) where a quotient or an angle has no value."""
  base, step, other = _pattern(0), _pattern(1), _pattern(2)
  zero = np.zeros_like(base)
  return {
      "zero tensors": (zero, [zero] * count),
      "zero task vectors": (base, [base] * count),
      "identical experts": (base, [base + step] * count),
      "tied magnitudes": (
          base,
          [base + step, base + other, base - other][:count],
      ),
      "antipodal": (
          (zero, [step, -step, zero][:count]) if count > 1 else (step, [-step])
      ),
      "one expert is zero": (base, [zero, step, other][:count]),
  }


_PLAIN = {"weight": 0.5, "density": 0.5, "t": 0.3, "scale": 0.7} | {
    "select_topk": 0.5
}


def _plain(name):
  declared = {p.name for p in merging.METHODS[name].parameters}
  return {key: v for key, v in _PLAIN.items() if key in declared}


def _where_used(name, base):
  return None if merging.METHODS[name].base == "ignored" else base


def _with_density():
  return [
      name
      for name, method in merging.METHODS.items()
      if any(p.name == "density" for p in method.parameters)
      and name != "task_arithmetic"
  ]


@pytest.mark.parametrize("edge", _edges(2))
@pytest.mark.parametrize("name", merging.METHODS)
def test_edges_are_finite_and_as_the_twin_says(apply, name, edge):
  base, experts = _edges(_count(name, _VECTOR))[edge]
  _check(apply, name, _where_used(name, base), experts, _plain(name))


@pytest.mark.parametrize(
    "name",
    [
        _maybe_slow(name, name in _SLOW_OPTIONS)
        for name, method in merging.METHODS.items()
        if method.min_experts == 1
    ],
)
def test_a_single_expert(apply, name):
  base, expert = _grid(np.random.default_rng(0), (2, 7))
  _check(apply, name, _where_used(name, base), [expert], _plain(name))


@pytest.mark.parametrize("density", [1.0, 0.9, 0.15])
@pytest.mark.parametrize("name", _with_density())
def test_densities_at_the_ends(apply, name, density):
  """Of 7 entries 0.15 keeps one."""
  base, *experts = _grid(np.random.default_rng(0), (3, 7))
  parameters = _plain(name) | {"density": density}
  if name.startswith("della"):
    parameters["epsilon"] = 0.06
  _check(apply, name, base, experts, parameters)


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_outliers_that_tie_with_what_is_kept_stay(apply, name):
  base, parameters = np.zeros(7, np.float32), {"weight": 1.0, "density": 0.5}
  for values in ([1, 1, 1, -1, 1, 1, -1], [3, 1, -2, 2, 2, 0.5, 0.25]):
    taus = [np.float32(values)] * 2
    _check(apply, name, base, taus, parameters | {"gamma": 0.3})


def test_fisher_without_information_is_the_average(apply):
  experts = _grid(np.random.default_rng(0), (2, 7))
  first, second = np.ones((2, 7), np.float32)
  first[:4], second[2:] = 0, 0
  found = apply("fisher", None, experts, statistics=[first, second])
  expected = np.where(first > 0, experts[0], experts[1])
  neither = (first == 0) & (second == 0)
  assert neither.any()
  expected = np.where(neither, np.mean(experts, 0), expected)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_regmean_averages_where_an_input_is_always_0(apply):
  rng = np.random.default_rng(0)
  experts = _grid(rng, (3, *_LARGE))
  data = rng.normal(size=(3, 200, _LARGE[1]))
  data[:, :, 4] = 0
  grams = [np.float32(x.T @ x / len(x)) for x in data]
  found = apply("regmean", None, experts, statistics=grams)
  np.testing.assert_allclose(
      found[:, 4], np.mean(experts, 0)[:, 4], atol=_TOLERANCE["regmean"]
  )


# ---- Random masks.

_RANDOM = [name for name, m in merging.METHODS.items() if m.random]
# A share this far off has a probability of 6e-7.
_SIGMAS = 5


def _drawn(apply, name, parameters, seeds=8):
  """([seeds, 3, 33, 70] masks of three experts, [3, 33, 70] task vectors)."""
  deltas = _grid(np.random.default_rng(0), (3, *_LARGE))
  deltas[deltas == 0] = 1.0
  zero, masks = np.zeros_like(deltas[0]), []
  for seed in range(seeds):
    for one_hot in np.eye(3):
      weights = parameters | {"weight": one_hot}
      merged = apply(name, zero, list(deltas), weights, seed=seed)
      masks.append(merged != 0)
  return np.reshape(masks, (seeds, *deltas.shape)), deltas


def _assert_share(mask, probability):
  sigma = math.sqrt(probability * (1 - probability) / mask.size)
  assert abs(mask.mean() - probability) < _SIGMAS * sigma


@pytest.mark.parametrize("name", _marked(["dare_linear", "dare_ties"]))
def test_dare_draws_every_entry_alone(apply, name):
  density = [0.2, 0.5, 0.8]
  masks, _ = _drawn(apply, name, {"density": density})
  for i, share in enumerate(density):
    mask = masks[:, i]
    _assert_share(mask, share)
    other = (i + 1) % 3
    _assert_share(mask & masks[:, other], share * density[other])
    # Neighbours along both axes, and the masks of two keys.
    _assert_share(mask[:, :-1:2] & mask[:, 1::2], share**2)
    _assert_share(mask[:, :, ::2] & mask[:, :, 1::2], share**2)
    _assert_share(mask[::2] & mask[1::2], share**2)


@pytest.mark.parametrize("name", _marked(["della_linear", "della"]))
def test_della_keeps_the_large_more_often(apply, name):
  parameters = {"density": [0.3, 0.5, 0.7], "epsilon": [0.25, 0.15, 0.05]}
  masks, deltas = _drawn(apply, name, parameters)
  # Ranks within a row, of the smallest 0.
  ranks = np.abs(deltas).argsort(-1, kind="stable").argsort(-1) / 69
  density, epsilon = (
      np.reshape(value, (3, 1, 1)) for value in parameters.values()
  )
  chances = density - epsilon + 2 * epsilon * ranks
  for i, chance in enumerate(chances):
    mask, other = masks[:, i], (i + 1) % 3
    _assert_share(mask, density[i].item())
    both = (chance * chances[other]).mean()
    _assert_share(mask & masks[:, other], both)
    _assert_share(mask[::2] & mask[1::2], (chance**2).mean())
    for low in np.arange(7) / 7:
      inside = (ranks[i] >= low) & (ranks[i] < low + 1 / 7)
      _assert_share(mask[:, inside], chance[inside].mean())


@pytest.mark.parametrize("name", _marked(_RANDOM))
def test_a_key_is_a_mask(apply, name):
  first, _ = _drawn(apply, name, {"density": 0.5}, seeds=1)
  again, _ = _drawn(apply, name, {"density": 0.5}, seeds=1)
  np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", _marked(_RANDOM))
def test_what_is_kept_makes_up_for_what_is_not(apply, name):
  """The L1 norm stays: kept entries are scaled by sum|tau| / sum|kept|."""
  (masks,), deltas = _drawn(apply, name, {"density": 0.3}, seeds=1)
  zero, parameters = np.zeros_like(deltas[0]), {"density": 0.3}
  for mask, delta, one_hot in zip(masks, deltas, np.eye(3), strict=True):
    weights = parameters | {"weight": one_hot}
    found = apply(name, zero, list(deltas), weights)
    kept = np.where(mask, delta, 0)
    scale = np.abs(delta).sum() / np.abs(kept).sum()
    # The norms are float32 sums of 2,310 entries.
    np.testing.assert_allclose(found, kept * scale, rtol=1e-5)


# ---- Thresholds.

_SIZE = 100


def _entries(values):
  return st.lists(values, min_size=_SIZE, max_size=_SIZE)


_ADVERSARIAL = st.one_of(
    _entries(st.floats(width=32, allow_nan=False, allow_infinity=False)),
    _entries(st.sampled_from([0.0, -1.0, 1.0, 2.0])),
    _entries(st.sampled_from([0.0, 1e-40, -3e-42, 1.5e-45, 2e-38])),
    # Powers of two from denormals to near the largest.
    _entries(st.integers(-149, 127).map(lambda e: math.ldexp(1.0, e))),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(
        lambda x: [x] * _SIZE
    ),
    st.integers(0, _SIZE - 1).map(lambda i: list(np.eye(_SIZE)[i])),
)


@pytest.mark.parametrize("exact", [False, True])
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(values=_ADVERSARIAL, k=st.integers(1, _SIZE))
def test_ties_keeps_the_k_largest(apply, exact, values, k):
  tau = np.float32(values).reshape(4, 25)
  density = min((k + 0.5) / _SIZE, 1.0)
  parameters = {"weight": 1.0, "density": density, "exact_k": exact}
  found = apply("ties", np.zeros_like(tau), [tau], parameters)
  # XLA's CPU code takes denormals for zeros, so those may go or stay.
  tiny = np.finfo(np.float32).tiny
  expected = np.where(_largest(np.abs(tau), k, exact), tau, 0)
  flat = lambda x: np.where(np.abs(x) < tiny, 0, x)
  np.testing.assert_array_equal(flat(found), flat(expected))
  if exact:
    assert np.count_nonzero(found) <= k


def test_exactly_k_takes_the_lowest_index_first(apply):
  tau = np.zeros((4, 25), np.float32)
  tau[1:3, 2:6] = [[1, -2, 1, -1], [1, 1, -1, 3]]
  parameters = {"weight": 1.0, "density": 0.04, "exact_k": True}
  found = apply("ties", np.zeros_like(tau), [tau], parameters)
  expected = np.zeros_like(tau)
  expected[1:3, 2:6] = [[1, -2, 1, 0], [0, 0, 0, 3]]
  np.testing.assert_array_equal(found, expected)


def test_the_count_is_that_of_the_decimal_density(apply):
  """0.29 of 100 is 29, though as floats it is 28.999999999999996."""
  tau = np.arange(1, 101, dtype=np.float32).reshape(4, 25)
  for percent in range(1, 101):
    parameters = {"weight": 1.0, "density": percent / 100}
    found = apply("ties", np.zeros_like(tau), [tau], parameters)
    assert np.count_nonzero(found) == percent


# ---- What holds whatever the numbers are.


def _random(name):
  rng = np.random.default_rng(3)
  count = _count(name, _LARGE)
  base, *experts = _grid(rng, (count + 1, *_LARGE))
  statistics = _statistics(name, rng, _LARGE, count)
  return _where_used(name, base), experts, statistics


def _deterministic(minimum):
  return [
      name
      for name, method in merging.METHODS.items()
      if not method.random and (method.max_experts or minimum) >= minimum
  ]


@pytest.mark.slow
@pytest.mark.parametrize("name", _deterministic(minimum=3))
def test_the_order_of_the_experts_does_not_matter(apply, name):
  base, experts, statistics = _random(name)
  # A variance that is rounded otherwise may fall on the threshold's other side.
  parameters = {} if name == "sce" else _CASES[name][0]
  values = apply.resolve(name, parameters, 3)
  order = [2, 0, 1]
  pick = lambda xs: None if xs is None else [xs[i] for i in order]
  turned = {
      key: pick(v) if isinstance(v, list) else v for key, v in values.items()
  }
  first = apply(name, base, experts, parameters, statistics=statistics)
  second = apply(name, base, pick(experts), turned, statistics=pick(statistics))
  tolerance = _TOLERANCE[name]
  np.testing.assert_allclose(first, second, rtol=tolerance, atol=tolerance)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    st.lists(st.floats(-2, 2, width=32), min_size=6, max_size=6),
)
def test_task_arithmetic_is_linear_in_the_weights(apply, weights):
  first, second = np.reshape(weights, (2, 3))
  base, experts, _ = _random("task_arithmetic")
  change = lambda w: (
      apply("task_arithmetic", base, experts, {"weight": w}) - base
  )
  np.testing.assert_allclose(
      change(first + second), change(first) + change(second), atol=1e-5
  )


@pytest.mark.parametrize(
    "name",
    _marked(
        name
        for name, method in merging.METHODS.items()
        if any(p.name == "weight" for p in method.parameters)
    ),
)
def test_an_expert_of_weight_0_changes_nothing(apply, name):
  base, experts, statistics = _random(name)
  weights = [0.2, 0.5, 0.0] if len(experts) == 3 else [0.5, 0.0]
  parameters = _plain(name) | {"weight": weights}
  others = [*experts[:-1], 3 * experts[-1] + 1]
  first, second = (
      apply(name, base, e, parameters, statistics=statistics)
      for e in (experts, others)
  )
  if name == "nuslerp":
    # The angle to the other one is still measured.
    np.testing.assert_allclose(first, second, rtol=4e-6, atol=4e-6)
  else:
    np.testing.assert_array_equal(first, second)


def test_a_method_states_its_parameters_and_its_source():
  for name, method in merging.METHODS.items():
    assert method.name == name
    assert "References:" in (method.fn.__doc__ or ""), name
    for parameter in method.parameters:
      assert parameter.low < parameter.high
      if parameter.kind is float and parameter.default is not None:
        assert parameter.low <= parameter.default <= parameter.high
