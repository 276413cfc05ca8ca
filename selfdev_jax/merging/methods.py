"""Merge methods people made, each a pure function of one tensor.

A method is `fn(base, experts, *, round, ...) -> tensor`, where

  base      is of any shape and float dtype; None where a method needs none,
  experts   is a list of arrays like it; where a method has no use for a base,
            these are all its inputs,
  round     rounds float32 values to the dtype that the arithmetic is done in,
  key       (random methods) is a PRNG key,
  statistics  (methods that use data) has one entry an expert,

and the others are its `Parameter`s: numbers of one value an expert are float32
[experts], other floats float32 scalars, ints and bools are Python's. Floats may
be traced, so that a sweep over them compiles once. All results are float32.

Semantics, names and defaults are those of mergekit 0.1.5, so that recipes give
here what they give there.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from selfdev_jax import errors
from selfdev_jax.merging import randomness
from selfdev_jax.merging import select

Round = Callable[[jax.Array], jax.Array]


class MergeError(errors.UserError):
  """A merge that cannot be done as it was asked for."""


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A number that a method takes.

  Attributes:
    name: as recipes spell it; an argument with an underscore behind where
      Python has other plans for that word.
    kind: float: may be traced; int or bool: compiled in.
    default: None where it has to be given.
    low: the least value.
    high: the largest value.
    open_low: `low` itself is not allowed.
    per_expert: it has a value an expert.
  """

  name: str
  kind: type = float
  default: float | int | bool | None = None
  low: float = -math.inf
  high: float = math.inf
  open_low: bool = False
  per_expert: bool = False

  @property
  def argument(self) -> str:
    return {"lambda": "lambda_"}.get(self.name, self.name)

  def check(self, value: Any) -> float | int | bool:
    """`value`, one number, as this parameter's kind.

    Raises:
      MergeError: if it is of another kind or out of range.
    """
    kinds = (int, float) if self.kind is float else (self.kind,)
    if hasattr(value, "item") and np.ndim(value) == 0:
      value = value.item()
    is_bool = isinstance(value, bool)
    if not isinstance(value, kinds) or is_bool != (self.kind is bool):
      raise MergeError(f"{self.name} takes {_KINDS[self.kind]}, not {value!r}")
    # Numbers are float32 where they are used.
    if self.kind is float and not abs(value) <= np.finfo(np.float32).max:
      raise MergeError(f"{self.name} is {value!r}; it has to be finite")
    above = value > self.low if self.open_low else value >= self.low
    if not (above and value <= self.high):
      left, right = "(" if self.open_low else "[", "]"
      raise MergeError(
          f"{self.name} is {value!r}; it has to be in"
          f" {left}{self.low:g}, {self.high:g}{right}"
      )
    return self.kind(value)


_KINDS = {float: "a number", int: "a whole number", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Method:
  """A merge method and what it asks for.

  Attributes:
    name: as in recipes.
    fn: see the module.
    parameters: what it takes.
    base: "required", "optional" or "ignored": all its inputs are experts.
    min_experts: the least number of them.
    max_experts: the most; None: any.
    random: `fn` takes a key.
    statistics: "fisher" or "gram" where `fn` takes those.
    check: raises MergeError where values do not go together.
  """

  name: str
  fn: Callable[..., jax.Array]
  parameters: tuple[Parameter, ...] = ()
  base: str = "required"
  min_experts: int = 1
  max_experts: int | None = None
  random: bool = False
  statistics: str | None = None
  check: Callable[[Mapping[str, Any]], None] = lambda values: None

  def bind(self, given: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """Checked values of all parameters, defaults filled in.

    Args:
      given: name -> number, or where it is per expert a sequence of them.
      experts: how many there are.

    Returns:
      argument of `fn` -> Python number, or tuple of `experts` numbers.

    Raises:
      MergeError: naming what is unknown, missing, of a wrong length or range.
    """
    known = {p.name: p for p in self.parameters}
    names = {p.argument: p.name for p in self.parameters} | {
        n: n for n in known
    }
    for name in given:
      if name not in names:
        raise MergeError(
            f"{self.name} has no parameter {name!r}; it takes"
            f" {', '.join(known) or 'none'}"
        )
    given = {names[name]: value for name, value in given.items()}
    values = {}
    for name, parameter in known.items():
      value = given.get(name, parameter.default)
      if value is None:
        raise MergeError(f"{self.name} needs the parameter {name}")
      if parameter.per_expert:
        if np.ndim(value) == 0:
          value = [value] * experts
        if len(value) != experts:
          raise MergeError(
              f"{name} has {len(value)} values for {experts} experts"
          )
        values[parameter.argument] = tuple(map(parameter.check, value))
      else:
        values[parameter.argument] = parameter.check(value)
    self.check(values)
    return values

  def check_experts(self, experts: int):
    """Raises MergeError where the method does not merge that many."""
    most = self.max_experts
    if experts < self.min_experts or (most is not None and experts > most):
      if most == self.min_experts:
        wanted = f"{most}"
      elif most is None:
        wanted = f"at least {self.min_experts}"
      else:
        wanted = f"{self.min_experts} to {most}"
      what = "models" if self.base == "ignored" else "experts beside the base"
      raise MergeError(f"{self.name} merges {wanted} {what}, not {experts}")


def rounding(dtype: Any) -> Round:
  """Rounds float32 to another float dtype's values; float32: not at all.

  XLA drops a conversion there and back; this one stays.
  """
  dtype = jnp.dtype(dtype)
  if dtype == jnp.float32:
    return lambda x: x
  if dtype == jnp.bfloat16:
    return _round_to_bfloat16
  info = jnp.finfo(dtype)
  unit, tiny = np.float32(info.smallest_subnormal), np.float32(info.tiny)

  def round_to(x):
    # reduce_precision flushes what is below the least normal number to 0.
    small = jnp.round(x / unit) * unit
    normal = lax.reduce_precision(x, info.nexp, info.nmant)
    return jnp.where(jnp.abs(x) < tiny, small, normal)

  return round_to


def _round_to_bfloat16(x: jax.Array) -> jax.Array:
  """To the nearest, ties to even; five times faster than reduce_precision."""
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  even = (bits >> 16) & 1
  bits = (bits + 0x7FFF + even) & np.uint32(0xFFFF0000)
  rounded = lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(jnp.isnan(x), x, rounded)  # Some would be carried to 0.


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32)


def _task_vectors(base, experts, round: Round) -> list[jax.Array]:
  return [round(_wide(expert) - _wide(base)) for expert in experts]


def _weighted(tensors, weights) -> jax.Array:
  """sum_i weights[i] tensors[i], in float32."""
  return sum(w * _wide(x) for w, x in zip(weights, tensors, strict=True))


# --- Averages ---------------------------------------------------------------


def linear(base, experts, *, round: Round, weight, normalize=True):
  """Weighted average of all models.

  References:
    M. Wortsman et al., Model soups, arXiv 2203.05482.
  """
  del base, round
  merged = _weighted(experts, weight)
  return merged / jnp.sum(weight) if normalize else merged


def passthrough(base, experts, *, round: Round, scale):
  """The one model itself, times a number: for slices of layers.

  References:
    C. Goddard et al., Arcee's MergeKit, arXiv 2403.13257.
  """
  del base
  return round(_wide(experts[0]) * scale[0])


def nearswap(base, experts, *, round: Round, t):
  """The base, drawn to the other model where both are less than `t` apart.

  References:
    alchemonaut, QuartetAnemoi-70B-t0.0001 (Hugging Face), 2024.
  """
  ours, theirs = _wide(base), _wide(experts[0])
  apart = jnp.maximum(jnp.abs(round(ours - theirs)), 1e-6)
  share = jnp.clip(round(t / apart), 0, 1)
  return round(round(share * theirs) + round(round(1 - share) * ours))


def model_stock(base, experts, *, round: Round, filter_wise=False):
  """Between base and average, by the angle between the task vectors.

  With `filter_wise` each row of a matrix has a ratio of its own.

  References:
    D.-H. Jang et al., Model Stock, arXiv 2403.19522.
  """
  count = len(experts)
  gram = select.apart(
      lambda inputs: _gram(_task_vectors(*inputs, round), filter_wise),
      (base, experts),
  )
  lengths = [jnp.sqrt(gram[i, i]) for i in range(count)]
  cosines = [
      jnp.clip(gram[i, j] / jnp.maximum(lengths[i] * lengths[j], 1e-6), -1, 1)
      for i in range(count)
      for j in range(i + 1, count)
  ]
  cosine = sum(cosines) / len(cosines)
  below = 1 + (count - 1) * cosine
  is_singular = jnp.abs(below) < 1e-6
  ratio = jnp.where(
      is_singular, 0.0, count * cosine / jnp.where(is_singular, 1.0, below)
  )
  ratio = ratio[..., None] if filter_wise else ratio
  average = sum(map(_wide, experts)) / count
  return ratio * average + (1 - ratio) * _wide(base)


# --- On spheres -------------------------------------------------------------
#
# What these compute lies in the span of their inputs, so that it follows from
# the inner products: one pass for those, one for the combination.


def _gram(tensors, by_row: bool = False) -> dict[tuple[int, int], jax.Array]:
  """(i, j) -> inner product of two tensors, or of their rows."""
  wide = list(map(_wide, tensors))
  pairs = [(i, j) for i in range(len(wide)) for j in range(i, len(wide))]
  add_up = select.row_sums if by_row else select.sums
  found = add_up([wide[i] * wide[j] for i, j in pairs])
  products = dict(zip(pairs, found, strict=True))
  return products | {(j, i): value for (i, j), value in products.items()}


def _gram_matrix(gram: dict[tuple[int, int], jax.Array], n: int) -> jax.Array:
  return jnp.stack([gram[i, j] for i in range(n) for j in range(n)]).reshape(
      n, n
  )


def slerp(base, experts, *, round: Round, t):
  """From the base along the great circle to the other model, a share `t`.

  Nearly parallel tensors are interpolated along the line between them.

  References:
    K. Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
  """
  del round
  gram = select.apart(_gram, [base, experts[0]])
  lengths = [jnp.sqrt(gram[i, i]) for i in (0, 1)]
  lengths = [jnp.where(length > 1e-8, length, 1.0) for length in lengths]
  cosine = jnp.clip(gram[0, 1] / lengths[0] / lengths[1], -1, 1)
  shares = _along_arc(t, cosine, jnp.abs(cosine) > 0.9995)
  return _weighted([base, experts[0]], shares)


def _along_arc(t, cosine, is_straight) -> tuple[jax.Array, jax.Array]:
  """Factors of two vectors for a share `t` of the way between them."""
  angle = jnp.arccos(jnp.where(is_straight, 0.0, cosine))
  return tuple(
      jnp.where(is_straight, part, jnp.sin(part * angle) / jnp.sin(angle))
      for part in (1 - t, t)
  )


def nuslerp(
    base,
    experts,
    *,
    round: Round,
    weight,
    nuslerp_row_wise=False,
    nuslerp_flatten=True,
):
  """Spherical interpolation of two models, or of two task vectors.

  Unless it is told to flatten, of each vector along the last dimension, or
  with `nuslerp_row_wise` along the first.

  References:
    C. Goddard et al., Arcee's MergeKit, arXiv 2403.13257.
  """
  over_first = nuslerp_row_wise and not nuslerp_flatten

  def offsets(inputs):
    base, experts = inputs
    tensors = map(_wide, experts)
    if base is not None:
      tensors = _task_vectors(base, experts, round)
    return [jnp.swapaxes(x, 0, -1) if over_first else x for x in tensors]

  gram = select.apart(
      lambda inputs: _gram(offsets(inputs), not nuslerp_flatten),
      (base, experts),
  )
  total = weight[0] + weight[1]
  is_zero = jnp.abs(total) < 1e-6
  t = jnp.where(is_zero, 0.5, weight[1] / jnp.where(is_zero, 1.0, total))
  lengths = [jnp.maximum(jnp.sqrt(gram[i, i]), 1e-7) for i in (0, 1)]
  cosine = jnp.clip(gram[0, 1] / lengths[0] / lengths[1], -1, 1)
  shares = _along_arc(t, cosine, 1 - jnp.square(cosine) <= 1e-16)
  if not nuslerp_flatten:
    shares = [share[..., None] for share in shares]
  merged = _weighted(offsets((base, experts)), shares)
  merged = jnp.swapaxes(merged, 0, -1) if over_first else merged
  return merged if base is None else _wide(base) + merged


def multislerp(
    base, experts, *, round: Round, weight, normalize_weights=True, eps=1e-8
):
  """Weighted mean of directions, as long as the tensors are on average.

  The blog's step in the tangent space is 0 at the mean it starts from, but
  for rounding, and left out. Directions that cancel are averaged instead.

  References:
    C. Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea, 2025.
  """
  if len(experts) == 1:
    return _wide(experts[0])

  def offsets(inputs):
    base, experts = inputs
    return experts if base is None else _task_vectors(base, experts, round)

  if normalize_weights:
    weight = weight / jnp.sum(weight)
  gram = select.apart(lambda inputs: _gram(offsets(inputs)), (base, experts))
  gram = _gram_matrix(gram, len(experts))
  lengths = jnp.sqrt(jnp.diagonal(gram))
  shares = weight / (lengths + eps)
  length = jnp.sqrt(jnp.maximum(shares @ gram @ shares, 0.0))
  wanted = jnp.sum(lengths * weight)
  cancel = length < eps
  scaled = shares * wanted / jnp.where(cancel, 1.0, length)
  shares = jnp.where(cancel, weight, scaled)
  merged = _weighted(offsets((base, experts)), shares)
  return merged if base is None else _wide(base) + merged


def karcher(base, experts, *, round: Round, max_iter=10, tol=1e-5):
  """The point on the sphere nearest to all directions, by average length.

  References:
    H. Karcher, Riemannian center of mass and mollifier smoothing, Comm. Pure
    Appl. Math. 30, 1977.
  """
  del base, round
  if len(experts) == 1:
    return _wide(experts[0])
  gram = _gram_matrix(select.apart(_gram, experts), len(experts))
  lengths = jnp.sqrt(jnp.diagonal(gram))
  is_valid = lengths > tol
  valid = is_valid.astype(jnp.float32)
  share = valid / jnp.maximum(jnp.sum(valid), 1.0)
  # Row i: unit vector i as a combination of the tensors.
  units = jnp.diag(jnp.where(is_valid, 1 / jnp.maximum(lengths, tol), 0.0))
  length = lambda x: jnp.sqrt(jnp.maximum(x @ gram @ x, 0.0))
  first = units[jnp.argmax(is_valid)]
  mean = share @ units
  size = length(mean)
  mean = jnp.where(size < tol, first, mean / jnp.where(size < tol, 1.0, size))

  def step(_, state):
    mean, done = state
    cosines = jnp.clip(units @ gram @ mean, -1, 1)
    angles = jnp.arccos(cosines)
    is_far = is_valid & (angles >= tol)
    sines = jnp.where(is_far, jnp.sin(angles), 1.0)
    pull = jnp.where(is_far, share * angles / sines, 0.0)
    tangent = pull @ (units - cosines[:, None] * mean)
    size = length(tangent)
    done = done | (size < tol)
    new = jnp.cos(size) * mean + jnp.sinc(size / np.pi) * tangent
    new = new / jnp.maximum(length(new), tol)
    return jnp.where(done, mean, new), done

  mean, _ = lax.fori_loop(0, max_iter, step, (mean, jnp.bool(False)))
  scale = jnp.where(jnp.any(is_valid), jnp.mean(lengths), 0.0)
  return _weighted(experts, scale * mean)


# --- Task vectors -----------------------------------------------------------
#
# Each of these decides what is kept of the task vectors, as a function from
# them to masks, and leaves the rest to `_combined`, whose keyword arguments are
# theirs, too. Their defaults differ, and stand in `METHODS`.


def _combined(
    base,
    experts,
    keep,
    *,
    round: Round,
    elect: bool,
    weight,
    normalize: bool,
    rescale: bool,
    lambda_,
):
  """Base + lambda sum_i weight_i tau_i, of what is kept of the tau_i.

  Args:
    base: any shape.
    experts: arrays like it.
    keep: task vectors -> masks.
    round: see the module.
    elect: takes only what has the sign of the sum, entry by entry.
    weight: [experts].
    normalize: divides by the sum of the weights that take part.
    rescale: scales what is kept to the L1 norm of the whole.
    lambda_: scalar.
  """

  def kept(inputs):
    taus = _task_vectors(*inputs, round)
    masks = keep(taus)
    return taus, [
        jnp.where(m, t, 0.0) for m, t in zip(masks, taus, strict=True)
    ]

  def factors(inputs):
    taus, rest = kept(inputs)
    norms = round(select.sums([jnp.abs(x) for x in (*taus, *rest)]))
    before, after = norms[: len(taus)], norms[len(taus) :]
    is_small = (before < 1e-7) | (after < 1e-7)
    ratios = round(before / jnp.where(is_small, 1.0, after))
    return jnp.where(is_small, 1.0, ratios)

  weight = round(weight)
  _, parts = kept((base, experts))
  if rescale:
    scales = select.apart(factors, (base, experts))
    parts = [round(s * x) for s, x in zip(scales, parts, strict=True)]
  parts = [round(w * x) for w, x in zip(weight, parts, strict=True)]
  total = round(sum(parts))
  below = jnp.sum(weight)
  if elect:
    agree = [jnp.where(total >= 0, part > 0, part < 0) for part in parts]
    pick = lambda values: sum(
        jnp.where(a, x, 0.0) for a, x in zip(agree, values, strict=True)
    )
    total, below = round(pick(parts)), pick(weight)
  if normalize:
    below = round(below)
    is_none = below == 0 if elect else jnp.abs(below) < 1e-8
    total = round(total / jnp.where(is_none, 1.0, below))
  return round(_wide(base) + round(total * lambda_))


def _keep_all(taus):
  return [np.True_] * len(taus)


def _share(fraction: jax.Array, size) -> jax.Array:
  """floor(fraction * size) as int32, to float32's precision.

  That is exact up to 2**24 entries but for fractions such as 0.29, which is
  28.999998 of 100: a product that is short of a whole number by its rounding is
  that number.
  """
  product = fraction * jnp.asarray(size, jnp.float32)
  slack = jnp.minimum(product * np.float32(2.0**-22), 0.25)
  return jnp.floor(product + slack).astype(jnp.int32)


def _keys(taus) -> list[jax.Array]:
  return list(map(select.magnitude_keys, taus))


def _cuts(base, experts, counts, exact_k: bool, round: Round):
  """A cut for each [experts] of `counts`, by magnitude."""
  keys = lambda inputs: _keys(_task_vectors(*inputs, round))
  return select.largest(keys, (base, experts), counts, exact_k)


def _keep_largest(base, experts, density, exact_k: bool, round: Round):
  """Of each task vector its max(floor(density size), 1) largest entries."""
  count = jnp.clip(_share(density, base.size), 1, base.size)
  (cut,) = _cuts(base, experts, [count], exact_k, round)
  return lambda taus: cut.mask(_keys(taus))


def _keep_middle(base, experts, density, gamma, exact_k: bool, round: Round):
  """Without the `gamma` largest the next floor(density size) entries.

  Where they are fewer than that, fewer of the largest are left out.
  """
  count = _share(density, base.size)
  outliers = jnp.minimum(_share(gamma, base.size), base.size - count)
  outliers = jnp.where(density < 1, outliers, 0)
  both = [outliers + count, outliers]
  inner, outer = _cuts(base, experts, both, exact_k, round)
  if not exact_k:
    # What ties with the largest entry that is kept is kept, too.
    ties = (outer.reached > outliers).astype(jnp.int32)
    outer = outer._replace(key=outer.key + ties)

  def keep(taus):
    keys = _keys(taus)
    masks = zip(inner.mask(keys), outer.mask(keys), strict=True)
    return [kept & ~outlier for kept, outlier in masks]

  return keep


def _keep_random(density, key):
  """Every entry with the probability `density`."""
  return lambda taus: [
      randomness.uniform(key, i, tau.shape) < density[i]
      for i, tau in enumerate(taus)
  ]


def _keep_by_rank(base, experts, density, epsilon, key, round: Round):
  """Every entry with a probability that rises with its rank in its row.

  From density - epsilon for the smallest to density + epsilon for the largest
  magnitude, evenly. What ties is ranked by column; magnitudes count as tied if
  they agree in the bits that a column's number leaves of 32.
  """

  def mask(i, tau):
    rows = tau.reshape(-1, tau.shape[-1])
    last = rows.shape[1] - 1
    low, span = density[i] - epsilon[i], 2 * epsilon[i]
    u = randomness.uniform(key, i, rows.shape)
    # An entry of that rank is kept if u < low + span rank / last: if its key is
    # above that of the rank at which both are equal.
    rank = jnp.floor((u - low) / jnp.maximum(span, 1e-12) * max(last, 1))
    keys, ordered = select.row_order(rows)
    next_rank = jnp.clip(rank + 1, 0, last).astype(jnp.int32)
    reached = keys >= jnp.take_along_axis(
        ordered, next_rank, axis=1, mode="promise_in_bounds"
    )
    kept = (rank < 0) | (reached & (rank < last)) | (density[i] >= 1)
    return kept.reshape(tau.shape)

  taus = _task_vectors(base, experts, round)
  masks = [mask(i, tau) for i, tau in enumerate(taus)]
  return lambda taus: masks


def task_arithmetic(base, experts, *, round: Round, density, **combine):
  """Base + lambda sum_i weight_i tau_i.

  References:
    G. Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089.
  """
  del density  # Recipes may have it; mergekit does not use it, either.
  return _combined(
      base, experts, _keep_all, round=round, elect=False, **combine
  )


def ties(base, experts, *, round: Round, density, exact_k, **combine):
  """Trims each task vector, elects a sign an entry, averages who agrees.

  References:
    P. Yadav et al., TIES-merging, arXiv 2306.01708.
  """
  keep = _keep_largest(base, experts, density, exact_k, round)
  return _combined(base, experts, keep, round=round, elect=True, **combine)


def dare_linear(base, experts, *, round: Round, key, density, **combine):
  """Drops entries of the task vectors at random and rescales the others.

  They get the L1 norm of the whole, as in mergekit; the paper divides by the
  density.

  References:
    L. Yu et al., Language models are super Mario, arXiv 2311.03099.
  """
  keep = _keep_random(density, key)
  return _combined(base, experts, keep, round=round, elect=False, **combine)


def dare_ties(base, experts, *, round: Round, key, density, **combine):
  """Drops entries at random, then elects a sign an entry as TIES does.

  References:
    L. Yu et al., Language models are super Mario, arXiv 2311.03099.
  """
  keep = _keep_random(density, key)
  return _combined(base, experts, keep, round=round, elect=True, **combine)


def della(base, experts, *, round: Round, key, density, epsilon, **combine):
  """Drops small entries with a higher probability, then elects a sign.

  References:
    P. T. Deep et al., DELLA-Merging, arXiv 2406.11617.
  """
  keep = _keep_by_rank(base, experts, density, epsilon, key, round)
  return _combined(base, experts, keep, round=round, elect=True, **combine)


def della_linear(
    base, experts, *, round: Round, key, density, epsilon, **combine
):
  """Drops small entries with a higher probability, and adds up the others.

  References:
    P. T. Deep et al., DELLA-Merging, arXiv 2406.11617.
  """
  keep = _keep_by_rank(base, experts, density, epsilon, key, round)
  return _combined(base, experts, keep, round=round, elect=False, **combine)


def breadcrumbs(
    base, experts, *, round: Round, density, gamma, exact_k, **combine
):
  """Leaves the largest and the smallest entries of the task vectors out.

  References:
    M. Davari, E. Belilovsky, Model Breadcrumbs, arXiv 2312.06795.
  """
  keep = _keep_middle(base, experts, density, gamma, exact_k, round)
  return _combined(base, experts, keep, round=round, elect=False, **combine)


def breadcrumbs_ties(
    base, experts, *, round: Round, density, gamma, exact_k, **combine
):
  """Leaves the largest and the smallest entries out, then elects a sign.

  References:
    M. Davari, E. Belilovsky, Model Breadcrumbs, arXiv 2312.06795.
  """
  keep = _keep_middle(base, experts, density, gamma, exact_k, round)
  return _combined(base, experts, keep, round=round, elect=True, **combine)


def sce(base, experts, *, round: Round, select_topk, exact_k):
  """Selects where task vectors vary, weighs them by energy, erases minorities.

  References:
    F. Wan et al., FuseChat, arXiv 2408.07990.
  """

  def variance(inputs):
    taus = _task_vectors(*inputs, round)
    mean = sum(taus) / len(taus)
    return round(sum(jnp.square(t - mean) for t in taus) / len(taus))

  def nonzero(inputs):
    return select.count(variance(inputs) != 0)

  keys = lambda inputs: _keys([variance(inputs)])
  inputs = (base, experts)
  count = _share(select_topk, select.apart(nonzero, inputs))[None]
  (cut,) = select.largest(keys, inputs, [count], exact_k)

  def selected(inputs):
    (mask,) = cut.mask(keys(inputs))
    mask |= select_topk >= 1
    return [jnp.where(mask, t, 0.0) for t in _task_vectors(*inputs, round)]

  def energy(inputs):
    squares = [round(jnp.square(t)) for t in selected(inputs)]
    return round(select.sums(squares) / base.size)

  energies = select.apart(energy, inputs)
  total = jnp.sum(energies)
  is_small = jnp.abs(total) < 1e-6
  weights = jnp.where(
      is_small, 1 / len(experts), energies / jnp.where(is_small, 1.0, total)
  )
  taus = selected(inputs)
  is_positive = round(sum(taus)) >= 0
  erased = [
      jnp.where(jnp.where(is_positive, t > 0, t < 0), w, 0.0)
      for w, t in zip(round(weights), taus, strict=True)
  ]
  merged = round(sum(round(w * t) for w, t in zip(erased, taus, strict=True)))
  below = jnp.maximum(round(sum(erased)), 1e-6)
  return round(_wide(base) + round(merged / below))


def arcee_fusion(base, experts, *, round: Round):
  """Takes from the other model what differs most, by a quartile threshold.

  An entry's importance is its change times the divergence of its row's softmax.
  Quantiles are exact; mergekit's are of a sample where a tensor has more than a
  million entries.

  References:
    C. Goddard et al., Arcee's MergeKit, arXiv 2403.13257.
  """
  ours, theirs = _wide(base), _wide(experts[0])
  q, p = (jax.nn.softmax(x, axis=-1) + 1e-8 for x in (ours, theirs))
  divergence = jnp.sum(p * jnp.log1p((p - q) / q), axis=-1, keepdims=True)
  # Of equal rows the sum may be below 0 by a rounding.
  importance = jnp.abs(theirs - ours) * jnp.maximum(divergence, 0.0)
  keys = lambda inputs: _keys([inputs])
  size = importance.size
  # From the largest; quantiles are counted from the smallest.
  ranks = [size - int(share * (size - 1)) for share in (0.25, 0.5, 0.75)]
  found, _ = select.thresholds(keys, importance, jnp.int32([ranks]), exact=True)
  first, median, third = select.magnitudes(found[0])
  mask = importance >= median + 1.5 * (third - first)
  return round(ours + jnp.where(mask, round(theirs - ours), 0.0))


# --- With data --------------------------------------------------------------


def fisher(base, experts, *, round: Round, statistics, weight):
  """Average weighted by Fisher information, entry by entry.

  Where none of the models has any, the plain average.

  Args:
    base: ignored.
    experts: all models.
    round: unused.
    statistics: [experts] diagonal Fisher information, arrays like `experts`.
    weight: [experts], not negative.

  References:
    M. Matena, C. Raffel, Merging models with Fisher-weighted averaging, arXiv
    2111.09832.
  """
  del base, round
  parts = [w * _wide(f) for w, f in zip(weight, statistics, strict=True)]
  total = sum(parts)
  is_none = total == 0
  merged = _weighted(experts, parts) / jnp.where(is_none, 1.0, total)
  return jnp.where(
      is_none, _weighted(experts, weight) / jnp.sum(weight), merged
  )


def regmean(base, experts, *, round: Round, statistics, reduce):
  """The matrix whose outputs are nearest to all models', on their inputs.

  W = (sum_i W_i G_i) (sum_i G_i)^-1, off-diagonal entries of each G_i times
  `reduce`. Whatever is not a matrix with a statistic is averaged.

  Args:
    base: ignored.
    experts: all models; [out, in].
    round: unused.
    statistics: [experts] Gram matrices of the inputs, [in, in] float32; or
      None.
    reduce: in [0, 1].

  References:
    X. Jin et al., Dataless knowledge fusion by merging weights of language
    models, arXiv 2212.09849.
  """
  del base, round
  if any(gram is None for gram in statistics):
    return _weighted(experts, [1 / len(experts)] * len(experts))
  diagonal = jnp.eye(statistics[0].shape[-1], dtype=bool)
  grams = [jnp.where(diagonal, g, reduce * g) for g in statistics]
  total = sum(grams)
  # An input that is always 0 tells nothing: its column is averaged.
  unit = 1e-6 * jnp.mean(jnp.diagonal(total)) + np.float32(1e-30)
  unit = jnp.where(diagonal, unit, 0.0)
  grams = [g + unit for g in grams]
  outputs = sum(_wide(e) @ g for e, g in zip(experts, grams, strict=True))
  return jax.scipy.linalg.solve(sum(grams), outputs.T, assume_a="pos").T


# --- The registry -----------------------------------------------------------

_WEIGHT = Parameter("weight", per_expert=True)
_DENSITY = Parameter(
    "density", default=1.0, low=0.0, high=1.0, open_low=True, per_expert=True
)
_EXACT_K = Parameter("exact_k", bool, False)
_GAMMA = Parameter("gamma", default=0.01, low=0.0, high=1.0, per_expert=True)
_EPSILON = Parameter(
    "epsilon", default=0.15, low=0.0, high=1.0, per_expert=True
)


def _combine(normalize: bool, rescale: bool) -> tuple[Parameter, ...]:
  """What all methods that add up task vectors take."""
  return (
      _WEIGHT,
      _DENSITY,
      Parameter("normalize", bool, normalize),
      Parameter("rescale", bool, rescale),
      Parameter("lambda", default=1.0),
  )


def _check_sum(values: Mapping[str, Any]):
  """What is divided by the sum of the weights needs one."""
  divides = values.get("normalize", values.get("normalize_weights", True))
  total, size = sum(values["weight"]), sum(map(abs, values["weight"]))
  if divides and abs(total) <= 1e-6 * size:
    raise MergeError(
        f"weight is {', '.join(map(str, values['weight']))}: the weights add up"
        " to 0, and cannot be normalised"
    )


def _check_epsilon(values: Mapping[str, Any]):
  pairs = zip(values["density"], values["epsilon"], strict=True)
  for density, epsilon in pairs:
    if density < 1 and not (density > epsilon and density + epsilon < 1):
      raise MergeError(
          f"density {density:g} and epsilon {epsilon:g}: density - epsilon and"
          " density + epsilon have to be in (0, 1)"
      )


METHODS = {
    method.name: method
    for method in (
        Method(
            "linear",
            linear,
            (_WEIGHT, Parameter("normalize", bool, True)),
            base="ignored",
            check=_check_sum,
        ),
        Method("slerp", slerp, (Parameter("t"),), max_experts=1),
        Method(
            "nuslerp",
            nuslerp,
            (
                _WEIGHT,
                Parameter("nuslerp_row_wise", bool, False),
                Parameter("nuslerp_flatten", bool, True),
            ),
            base="optional",
            min_experts=2,
            max_experts=2,
        ),
        Method(
            "multislerp",
            multislerp,
            (
                _WEIGHT,
                Parameter("normalize_weights", bool, True),
                Parameter("eps", default=1e-8, low=0.0),
            ),
            base="optional",
            check=_check_sum,
        ),
        Method(
            "karcher",
            karcher,
            (
                Parameter("max_iter", int, 10, low=0, high=1000),
                Parameter("tol", default=1e-5, low=0.0, open_low=True),
            ),
            base="ignored",
        ),
        Method("task_arithmetic", task_arithmetic, _combine(False, False)),
        Method("ties", ties, (*_combine(True, False), _EXACT_K)),
        Method("dare_linear", dare_linear, _combine(False, True), random=True),
        Method("dare_ties", dare_ties, _combine(False, True), random=True),
        Method(
            "della",
            della,
            (*_combine(True, True), _EPSILON),
            random=True,
            check=_check_epsilon,
        ),
        Method(
            "della_linear",
            della_linear,
            (*_combine(False, True), _EPSILON),
            random=True,
            check=_check_epsilon,
        ),
        Method(
            "breadcrumbs",
            breadcrumbs,
            (*_combine(False, False), _GAMMA, _EXACT_K),
        ),
        Method(
            "breadcrumbs_ties",
            breadcrumbs_ties,
            (*_combine(False, False), _GAMMA, _EXACT_K),
        ),
        Method(
            "sce",
            sce,
            (
                Parameter(
                    "select_topk", default=1.0, low=0.0, high=1.0, open_low=True
                ),
                _EXACT_K,
            ),
        ),
        Method(
            "model_stock",
            model_stock,
            (Parameter("filter_wise", bool, False),),
            min_experts=2,
        ),
        Method("nearswap", nearswap, (Parameter("t", low=0.0),), max_experts=1),
        Method("arcee_fusion", arcee_fusion, max_experts=1),
        Method(
            "passthrough",
            passthrough,
            (Parameter("scale", default=1.0, per_expert=True),),
            base="ignored",
            max_experts=1,
        ),
        Method(
            "fisher",
            fisher,
            (Parameter("weight", default=1.0, low=0.0, per_expert=True),),
            base="ignored",
            statistics="fisher",
            check=_check_sum,
        ),
        Method(
            "regmean",
            regmean,
            (Parameter("reduce", default=0.9, low=0.0, high=1.0),),
            base="ignored",
            statistics="gram",
        ),
    )
}
