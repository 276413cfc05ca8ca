"""Every primitive of this JAX is classified: a JAX upgrade is a decision.

Any release of JAX may add or rename one. What the program IR does not know is
refused, so programs that worked would be lost; these tests say so instead.
"""

import jax
from jax import lax
import jax.extend.core.primitives as jex_primitives
import jax.numpy as jnp
import jax.scipy.linalg
import jax.scipy.special
import pytest

from selfdev_jax.sandbox import ir
from selfdev_jax.sandbox import rebuild

_ADVICE = (
    "Classify it. What a merge program may compute goes into ir.PRIMITIVES,"
    " with a codec for each parameter, into verify._flops where it costs more"
    " than an operation an element, into rebuild._check where `bind` takes what"
    " cannot be lowered, and into the corpus of fuzz_test.py. What hands its"
    " operands through goes into ir._IDENTITIES, a call into ir._CALLS. The"
    " rest goes into _REFUSED in this file, with the reason."
)

# What the reader takes apart: ir._Reader._equation.
_READ = ir.words("add_any custom_linear_solve platform_index")

_REASONS = {
    "More than one device, or another program's values.": """
        all_gather all_to_all axis_index pmax pmin ppermute psum
        ragged_all_to_all
    """,
    "Effects and mutable arrays; a program is a function.": """
        after_all create_token empty2 get swap
    """,
    "A loop whose number of trips depends on the values, so its cost too.": """
        igamma igamma_grad_a igammac polygamma random_gamma
        regularized_incomplete_beta while zeta
    """,
    "Lowered on some of the backends only.": """
        eig hessenberg rng_bit_generator rng_uniform schur tridiagonal
        tridiagonal_solve
    """,
    "Windows: the cost is a product of many parameters, and merging has no use"
    " for them that slices and dot_general do not serve.": """
        conv_general_dilated reduce_window reduce_window_max reduce_window_min
        reduce_window_sum select_and_gather_add select_and_scatter
        select_and_scatter_add
    """,
    "Holds a jaxpr for each reduction; the known ones have primitives.": """
        reduce
    """,
    "The result depends on the backend.": """
        approx_top_k
    """,
    "Of no use to a merge that was ever seen.": """
        bessel_i0e bessel_i1e
    """,
    "Its GPU kernel writes wherever the pivots say, and they may say anything;"
    " solve and inv do without.": """
        lu_pivots_to_permutation
    """,
    "An old kind of call, which nothing public emits.": """
        call
    """,
}
_REFUSED = {
    name: reason for reason, text in _REASONS.items() for name in ir.words(text)
}

# In the IR, but neither exported nor emitted by this JAX.
_HISTORICAL = {
    "copy_p": "copy",
    "core_call": "jit",
    "pjit": "jit",
    "remat": "checkpoint",
    "remat2": "checkpoint",
    "checkpoint": "remat2",
    "const": "no primitive: a constant array",
}

# Exported by jax.extend.core.primitives of jax 0.10.2.
_EXPORTED = """
    abs_p acos_p acosh_p add_jaxvals_p add_p after_all_p all_gather_p
    all_to_all_p and_p approx_top_k_p argmax_p argmin_p asin_p asinh_p atan2_p
    atan_p atanh_p axis_index_p bessel_i0e_p bessel_i1e_p bitcast_convert_type_p
    broadcast_in_dim_p call_p cbrt_p ceil_p cholesky_p clamp_p closed_call_p
    clz_p complex_p concatenate_p cond_p conj_p conv_general_dilated_p
    convert_element_type_p copy_p cos_p cosh_p create_token_p cumlogsumexp_p
    cummax_p cummin_p cumprod_p cumsum_p custom_jvp_call_p custom_lin_p
    custom_vjp_call_p device_put_p digamma_p div_p dot_general_p dynamic_slice_p
    dynamic_update_slice_p eig_p eigh_p empty2_p eq_p eq_to_p erf_inv_p erf_p
    erfc_p exp2_p exp_p expm1_p fft_p floor_p gather_p ge_p get_p gt_p
    hessenberg_p householder_product_p igamma_grad_a_p igamma_p igammac_p imag_p
    integer_pow_p iota_p is_finite_p jit_p le_p le_to_p lgamma_p linear_solve_p
    log1p_p log_p logistic_p lt_p lt_to_p lu_p max_p min_p mul_p name_p ne_p
    neg_p nextafter_p not_p or_p pad_p pmax_p pmin_p polygamma_p
    population_count_p pow_p ppermute_p psum_p qr_p ragged_all_to_all_p
    random_bits_p random_fold_in_p random_gamma_p random_seed_p random_split_p
    real_p reduce_and_p reduce_max_p reduce_min_p reduce_or_p reduce_p
    reduce_precision_p reduce_prod_p reduce_sum_p reduce_window_max_p
    reduce_window_min_p reduce_window_p reduce_window_sum_p reduce_xor_p
    regularized_incomplete_beta_p rem_p remat_p reshape_p rev_p
    rng_bit_generator_p rng_uniform_p round_p rsqrt_p scan_p scatter_add_p
    scatter_max_p scatter_min_p scatter_mul_p scatter_p schur_p
    select_and_gather_add_p select_and_scatter_add_p select_and_scatter_p
    select_n_p sharding_constraint_p shift_left_p shift_right_arithmetic_p
    shift_right_logical_p sign_p sin_p sinh_p slice_p sort_p sqrt_p square_p
    squeeze_p stop_gradient_p sub_p svd_p swap_p tan_p tanh_p threefry2x32_p
    top_k_p transpose_p triangular_solve_p tridiagonal_p tridiagonal_solve_p
    while_p xor_p zeta_p
"""

# Calls by paragraph, on base `b` [4, 3], a symmetric matrix `s` [3, 3], int32
# `i` and complex `c` like `b`, a mask `m`, a vector `v` [3] and a random `key`.
_CORPUS = """
[f(b) for f in (jnp.abs, jnp.sign, jnp.exp, jnp.exp2, jnp.expm1, jnp.sqrt,
jnp.cbrt, jnp.square, jnp.reciprocal, jnp.positive, jnp.negative)]

[f(b) for f in (jnp.log, jnp.log2, jnp.log10, jnp.log1p, jnp.floor, jnp.ceil,
jnp.trunc, jnp.rint, jnp.round, jnp.signbit, jnp.spacing)]

[f(b) for f in (jnp.sin, jnp.cos, jnp.tan, jnp.arcsin, jnp.arccos, jnp.arctan,
jnp.sinh, jnp.cosh, jnp.tanh, jnp.arcsinh, jnp.arccosh, jnp.arctanh, jnp.sinc)]

[f(b) for f in (jnp.isnan, jnp.isinf, jnp.isfinite, jnp.isposinf, jnp.isneginf,
jnp.nan_to_num, jnp.deg2rad, jnp.rad2deg, jnp.frexp, jnp.modf)]

[f(b, b) for f in (jnp.add, jnp.subtract, jnp.multiply, jnp.divide,
jnp.floor_divide, jnp.mod, jnp.fmod, jnp.remainder, jnp.divmod, jnp.power,
jnp.float_power)]

[f(b, b) for f in (jnp.maximum, jnp.minimum, jnp.fmax, jnp.fmin, jnp.hypot,
jnp.arctan2, jnp.copysign, jnp.nextafter, jnp.logaddexp, jnp.logaddexp2,
jnp.heaviside)]

[f(b, b) for f in (jnp.equal, jnp.not_equal, jnp.less, jnp.less_equal,
jnp.greater, jnp.greater_equal, jnp.isclose, jnp.allclose, jnp.array_equal)]

[f(m, m) for f in (jnp.logical_and, jnp.logical_or, jnp.logical_xor)],
jnp.logical_not(m)

[f(i, i) for f in (jnp.bitwise_and, jnp.bitwise_or, jnp.bitwise_xor,
jnp.left_shift, jnp.right_shift)], jnp.bitwise_not(i), jnp.bitwise_count(i)

[f(b, axis=1) for f in (jnp.sum, jnp.prod, jnp.mean, jnp.std, jnp.var, jnp.max,
jnp.min, jnp.ptp, jnp.median, jnp.cumsum, jnp.cumprod)]

[f(b, axis=1) for f in (jnp.nansum, jnp.nanprod, jnp.nanmean, jnp.nanstd,
jnp.nanvar, jnp.nanmax, jnp.nanmin, jnp.nanmedian, jnp.nancumsum,
jnp.nancumprod)]

[f(b, axis=1) for f in (jnp.argmax, jnp.argmin, jnp.nanargmax, jnp.nanargmin,
jnp.argsort, jnp.sort, jnp.any, jnp.all, jnp.count_nonzero)]

jnp.quantile(b, 0.3, axis=0), jnp.percentile(b, 20.0), jnp.nanquantile(b, 0.3),
jnp.average(b, axis=0, weights=b[:, 0])

jnp.partition(b, 1, axis=1), jnp.argpartition(b, 1, axis=1), jnp.lexsort((b[0],
b[1])), lax.top_k(b, 2)

jnp.where(m, b, 0), jnp.select([m, ~m], [b, 2 * b]), jnp.clip(b, -1, 1),
jnp.piecewise(b, [m], [lambda x: x, lambda x: -x])

jnp.dot(b, v), b @ s, jnp.matmul(b, s), jnp.vdot(b, b), jnp.inner(b, b),
jnp.outer(v, v), jnp.tensordot(b, b), jnp.kron(b, b), jnp.cross(b, b)

jnp.einsum('ij,kj->ik', b, b), jnp.einsum('ij,ij->', b, b), jnp.einsum('ii', s),
jnp.trace(s), jnp.vecdot(b, b)

jnp.reshape(b, -1), b.ravel(), b.T, jnp.swapaxes(b, 0, 1), jnp.moveaxis(b, 0,
1), jnp.squeeze(b[None]), jnp.expand_dims(b, 1), jnp.atleast_3d(b)

jnp.stack([b, b]), jnp.concatenate([b, b]), jnp.hstack([b, b]), jnp.vstack([b,
b]), jnp.dstack([b, b]), jnp.column_stack([b, b]), jnp.block([[b, b], [b, b]])

jnp.split(b, 2), jnp.array_split(b, 3), jnp.hsplit(b, 3), jnp.vsplit(b, 2),
jnp.unstack(b), jnp.append(b, b), jnp.insert(v, 1, 2.0), jnp.delete(v, 1)

jnp.tile(b, (2, 1)), jnp.repeat(b, 2, axis=0), jnp.broadcast_to(v, (4, 3)),
jnp.flip(b), jnp.fliplr(b), jnp.flipud(b), jnp.rot90(b), jnp.roll(b, 1, axis=0)

jnp.pad(b, 1), jnp.pad(b, 1, mode='edge'), jnp.pad(b, 1, mode='reflect'),
jnp.pad(b, 1, mode='wrap'), jnp.pad(b, 1, mode='mean')

jnp.diag(v), jnp.diag(s), jnp.diagonal(s), jnp.diagflat(v), jnp.tril(b),
jnp.triu(b), jnp.eye(3), jnp.tri(3), jnp.vander(v), jnp.fill_diagonal(s, 0,
inplace=False)

jnp.arange(5), jnp.linspace(0, 1, 5), jnp.logspace(0, 1, 5), jnp.geomspace(1, 2,
5), jnp.zeros_like(b), jnp.ones_like(b), jnp.full_like(b, 2), jnp.full((2,),
b[0, 0])

jnp.meshgrid(v, v), jnp.indices((2, 3)), jnp.ix_(jnp.arange(2), jnp.arange(3)),
jnp.tril_indices(3), jnp.diag_indices(3)

jnp.take(b, jnp.array([0, 2]), axis=0), jnp.take_along_axis(b, jnp.argsort(b,
1), 1), jnp.put_along_axis(b, jnp.argsort(b, 1), 0.0, 1, inplace=False),
jnp.choose(i[0] % 2, [v, v], mode='clip')

b[0], b[1:3, ::2], b[::-1], b[..., None], b[jnp.array([0, 1]), jnp.array([1,
2])], b[i[0, 0]], b[jnp.argmax(b, 0)]

b.at[0].set(1), b.at[0].add(v), b.at[0].subtract(v), b.at[0].multiply(v),
b.at[0].divide(v), b.at[0].power(2), b.at[0].min(v), b.at[0].max(v),
b.at[0].apply(jnp.sin), b.at[0].get(mode='fill')

jnp.cov(b), jnp.corrcoef(b), jnp.histogram(b, 5), jnp.digitize(b, v),
jnp.searchsorted(jnp.sort(v), b), jnp.interp(b, jnp.sort(v), v),
jnp.bincount(i.ravel(), length=4)

jnp.diff(b), jnp.ediff1d(v), jnp.gradient(b), jnp.trapezoid(b), jnp.unwrap(b),
jnp.polyval(v, b), jnp.polyder(v), jnp.polyint(v), jnp.cumulative_sum(b, axis=0)

jnp.unique(v, size=3), jnp.nonzero(v, size=3), jnp.argwhere(m, size=3),
jnp.flatnonzero(m, size=3), jnp.isin(b, v), jnp.union1d(v, v, size=4),
jnp.setdiff1d(v, v, size=3)

jnp.real(c), jnp.imag(c), jnp.conj(c), jnp.angle(c), jnp.abs(c), jnp.exp(c), c *
c, jnp.sqrt(c), c @ c.T

jnp.fft.fft(b), jnp.fft.ifft(c), jnp.fft.rfft(b), jnp.fft.irfft(c),
jnp.fft.fft2(b), jnp.fft.ifft2(c), jnp.fft.rfft2(b), jnp.fft.fftn(b),
jnp.fft.fftshift(b), jnp.fft.hfft(c), jnp.fft.fftfreq(4)

b.astype(jnp.bfloat16), b.astype(jnp.int8), b.astype(bool), b.view(jnp.int32),
jnp.float16(b), m.astype(jnp.float32)

jnp.apply_along_axis(jnp.sum, 0, b), jnp.vectorize(jnp.sin)(b),
jax.vmap(jnp.dot)(b, b), jnp.apply_over_axes(jnp.sum, b, [0])

jnp.convolve(v, v)

jnp.correlate(v, v)

jnp.gcd(i, i)

jnp.i0(b)

jnp.roots(v, strip_zeros=False)

linalg.norm(b), linalg.norm(b, ord='nuc'), linalg.norm(b, ord=2), linalg.norm(v,
ord=1), linalg.norm(b, axis=1), linalg.norm(b, ord=jnp.inf)

linalg.svd(b), linalg.svdvals(b), linalg.qr(b), linalg.eigh(s),
linalg.eigvalsh(s), linalg.cholesky(s)

linalg.inv(s), linalg.pinv(b), linalg.solve(s, v), linalg.lstsq(b, b[:, 0]),
linalg.det(s), linalg.slogdet(s), linalg.matrix_rank(b), linalg.cond(b)

linalg.matrix_power(s, 3), linalg.multi_dot([b, s, s]),
linalg.tensorinv(s.reshape(3, 3, 1), ind=1), linalg.cross(v, v), linalg.outer(v,
v), linalg.trace(s), linalg.vector_norm(b), linalg.matrix_norm(b)

linalg.eig(s)

jax.scipy.linalg.expm(s)

jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(s), v),
jax.scipy.linalg.lu(s), jax.scipy.linalg.solve_triangular(s, v),
jax.scipy.linalg.block_diag(s, s), jax.scipy.linalg.eigh(s),
jax.scipy.linalg.polar(s, method='svd')

jax.scipy.linalg.schur(s)

lax.linalg.householder_product(b, v), lax.linalg.triangular_solve(s, s),
lax.linalg.lu(b), lax.linalg.eigh(s), lax.linalg.svd(b), lax.linalg.qr(b)

jax.scipy.linalg.lu_solve(jax.scipy.linalg.lu_factor(s), v)

lax.linalg.tridiagonal(s)

[f(b, axis=0) for f in (lax.cumsum, lax.cumprod, lax.cummax, lax.cummin,
lax.cumlogsumexp)], lax.argmax(b, 0, jnp.int32), lax.sort((b, b), num_keys=2)

[f(b) for f in (lax.erf, lax.erfc, lax.erf_inv, lax.lgamma, lax.digamma,
lax.rsqrt, lax.logistic, lax.is_finite, lax.round, lax.stop_gradient,
lax.optimization_barrier)]

lax.clamp(0.0, b, 1.0), lax.rem(b, b), lax.pow(b, b), lax.integer_pow(b, 3),
lax.nextafter(b, b), lax.select(m, b, b), lax.select_n(i, b, b, b),
lax.reduce_precision(b, 5, 10), lax.clz(i), lax.population_count(i)

lax.pad(b, 0.0, ((1, 1, 1), (0, 0, 0))), lax.slice(b, (0, 0), (2, 2)),
lax.dynamic_slice(b, (i[0, 0], 0), (2, 2)), lax.dynamic_update_slice(b, b[:1],
(i[0, 0], 0)), lax.dynamic_index_in_dim(b, i[0, 0]), lax.rev(b, (0,)),
lax.expand_dims(b, (0,)), lax.collapse(b, 0, 2), lax.split(b, (1, 3))

lax.reduce(b, 0.0, lax.add, (0,)), lax.reduce_max(b, (0,)), lax.reduce_and(m,
(0,)), lax.reduce_or(m, (0,)), lax.reduce_xor(i, (0,)),
lax.associative_scan(jnp.add, b), lax.batch_matmul(b[None], s[None]),
lax.bitcast_convert_type(b, jnp.int32)

lax.reduce(b, 0.0, lambda x, y: x + 2 * y, (0,))

lax.fori_loop(0, 3, lambda k, x: x * 0.5, b), lax.scan(lambda x, y: (x + y, x),
v, b), lax.map(jnp.sum, b), lax.cond(m[0, 0], jnp.sin, jnp.cos, b),
lax.switch(i[0, 0], [jnp.sin, jnp.cos], b)

lax.while_loop(lambda x: x.sum() < 1, lambda x: 2 * x, b)

lax.reduce_window(b, 0.0, lax.add, (2, 2), (1, 1), 'VALID')

lax.reduce_window(b, -jnp.inf, lax.max, (2, 2), (1, 1), 'VALID')

lax.conv(b[None, None], b[None, None], (1, 1), 'SAME')

lax.approx_max_k(b, 2)

lax.igamma(b, b)

lax.betainc(b, b, b)

lax.rng_uniform(0.0, 1.0, (3,))

lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), (3,))

[f(b) for f in (nn.relu, nn.relu6, nn.sigmoid, nn.softplus, nn.silu, nn.swish,
nn.gelu, nn.elu, nn.selu, nn.celu, nn.leaky_relu, nn.log_sigmoid, nn.soft_sign,
nn.hard_tanh, nn.hard_sigmoid, nn.hard_silu, nn.mish, nn.squareplus,
nn.sparse_plus)]

nn.softmax(b), nn.log_softmax(b), nn.logsumexp(b), nn.standardize(b),
nn.one_hot(i[0], 3), nn.glu(b[:, :2]), nn.dot_product_attention(b[None, :,
None], b[None, :, None], b[None, :, None])

random.split(key), random.fold_in(key, 1), random.bits(key),
random.key_data(key), random.clone(key), random.PRNGKey(0),
random.wrap_key_data(random.key_data(key))

random.normal(key, (3,)), random.uniform(key, (3,)), random.bernoulli(key, 0.5,
(3,)), random.randint(key, (3,), 0, 9), random.truncated_normal(key, -1, 1,
(3,)), random.rademacher(key, (3,)), random.orthogonal(key, 3)

random.permutation(key, b), random.choice(key, v, (2,)), random.choice(key, v,
(2,), replace=False), random.categorical(key, b), random.gumbel(key, (3,)),
random.laplace(key, (3,)), random.exponential(key, (3,)), random.cauchy(key,
(3,)), random.logistic(key, (3,)), random.lognormal(key, 1.0, (3,)),
random.multivariate_normal(key, v, s), random.rayleigh(key, v),
random.pareto(key, 1.0, (3,)), random.triangular(key, 0.0, 0.5, 1.0, (3,)),
random.geometric(key, 0.5, (3,)), random.weibull_min(key, 1.0, 1.0, (3,))

random.gamma(key, 1.0, (3,))

random.beta(key, 1.0, 1.0, (3,))

random.dirichlet(key, jnp.ones(3))

random.poisson(key, 1.0, (3,))

[f(b) for f in (special.erf, special.erfc, special.erfinv, special.gammaln,
special.digamma, special.expit, special.logit, special.ndtr, special.log_ndtr,
special.ndtri, special.entr, special.logsumexp, special.softmax,
special.log_softmax)]

[f(b, b) for f in (special.xlogy, special.xlog1py, special.betaln,
special.kl_div, special.rel_entr)], special.gamma(b), special.factorial(b),
special.multigammaln(b, 2)

special.i0(b)

special.zeta(b, b)

special.polygamma(1, b)

special.gammainc(b, b)

jax.grad(lambda x: (jnp.sin(x) * x + x ** 3).sum())(b),
jax.value_and_grad(lambda x: jnp.sum((x @ s - b) ** 2))(b), jax.jvp(jnp.tanh,
(b,), (b,)), jax.grad(lambda x: linalg.norm(x))(b), jax.hessian(lambda x: (x **
3).sum())(v)

jax.jit(jnp.sin)(b), jax.checkpoint(jnp.sin)(b), jax.named_call(jnp.sin)(b),
jax.device_put(b)
"""


_BASE = jax.ShapeDtypeStruct((4, 3), jnp.float32)


def _is_known(name):
  return name in ir.PRIMITIVES or name in ir._IDENTITIES or name in ir._CALLS


def _primitives(jaxpr):
  """The primitives of a jaxpr, by name, nested ones included."""
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for value in equation.params.values():
      for item in value if isinstance(value, (tuple, list)) else [value]:
        inner = getattr(item, "jaxpr", item)
        if hasattr(inner, "eqns"):
          yield from _primitives(inner)


def _traced(call):
  def function(b):
    names = {
        "jax": jax, "jnp": jnp, "lax": lax, "linalg": jnp.linalg,
        "nn": jax.nn, "random": jax.random, "special": jax.scipy.special,
        "b": b, "v": b[0], "s": b[:3] @ b[:3].T + jnp.eye(3), "m": b > 0,
        "c": lax.complex(b, b), "i": lax.convert_element_type(b, jnp.int32),
        "key": jax.random.key(0),
    }  # fmt: skip
    return jax.tree.leaves(eval(f"({call})", names))  # These lines are ours.

  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    return jax.make_jaxpr(function)(_BASE)


@pytest.fixture(scope="module")
def traced():
  """The jaxpr of each paragraph of the corpus."""
  return {call: _traced(call) for call in _CORPUS.split("\n\n")}


@pytest.fixture(scope="module")
def emitted(traced):
  """The primitives of each paragraph of the corpus."""
  return {
      call: frozenset(_primitives(closed.jaxpr))
      for call, closed in traced.items()
  }


def _exported():
  return sorted(name for name in dir(jex_primitives) if name.endswith("_p"))


def test_jax_exports_what_it_did():
  found, pinned = set(_exported()), ir.words(_EXPORTED)
  assert found == pinned, (
      f"New in JAX: {sorted(found - pinned)}; gone: {sorted(pinned - found)}."
      f" {_ADVICE} Then bring _EXPORTED up to date."
  )


def test_every_exported_primitive_is_classified():
  names = {getattr(jex_primitives, name).name for name in _exported()}
  unknown = sorted(
      name for name in names - _REFUSED.keys() - _READ if not _is_known(name)
  )
  assert not unknown, f"{unknown} are not classified. {_ADVICE}"
  assert not [name for name in _REFUSED if _is_known(name)]


def test_every_emitted_primitive_is_classified(emitted):
  unknown = {
      name: call
      for call, names in emitted.items()
      for name in names - _REFUSED.keys() - _READ
      if not _is_known(name)
  }
  assert not unknown, f"{unknown} are not classified. {_ADVICE}"


def test_every_known_name_exists(emitted):
  exist = {getattr(jex_primitives, name).name for name in _exported()}
  exist = exist.union(*emitted.values())
  known = ir.PRIMITIVES.keys() | ir._IDENTITIES | ir._CALLS.keys()
  gone = sorted(known - exist - _HISTORICAL.keys())
  assert not gone, (
      f"JAX has no {gone} any more: find out how it is called now, add that"
      " name, and list the old one in _HISTORICAL."
  )
  assert not known - exist - _HISTORICAL.keys()
  assert not _REFUSED.keys() - exist


def test_what_is_allowed_is_read_and_rebuilt(traced, emitted):
  # A parameter that no codec takes refuses a program as well.
  for call, closed in traced.items():
    if emitted[call] & _REFUSED.keys():
      continue
    block = ir.decode_block(ir.encode_block(ir.from_jaxpr(closed)))
    rebuilt = jax.make_jaxpr(
        lambda *arguments, block=block: rebuild.evaluate(block, arguments)
    )(_BASE)
    assert [(x.shape, x.dtype) for x in rebuilt.out_avals] == [
        (x.shape, x.dtype) for x in closed.out_avals
    ], call
