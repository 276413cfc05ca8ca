"""Rows of a prompt and its completions, for XLA and for kernels."""

import dataclasses
import functools
import itertools
import re
import types

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from selfdev_jax import models
from selfdev_jax.models import flash

_FULL = models.DecoderConfig(
    vocab_size=61,
    embed=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    max_positions=64,
)
_LOCAL = dataclasses.replace(_FULL, window=5, local=(True, True))
_MIXED = dataclasses.replace(
    _LOCAL, local=(True, False), local_rope=models.Rope(100.0)
)
# The second row has but two completions; padding follows both.
_ENDS = np.array([[6, 11, 18, 21], [4, 9, 15, 15]], np.int32)
_LENGTH = 23
_SHORT = np.array([[2, 4], [3, 5]], np.int32)

_forward = jax.jit(
    models.forward,
    static_argnums=0,
    static_argnames=("attention", "span", "sharding"),
)


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_FULL)


@pytest.fixture
def on_cpu(monkeypatch):
  """Both kernels by what a CPU has; one jit for each test, none is kept."""
  for name, kernel in {
      "cudnn": functools.partial(flash._dot_product, implementation="xla"),
      "splash": functools.partial(flash._splash, interpret=True),
  }.items():
    monkeypatch.setitem(flash._KERNELS, name, kernel)
  yield
  jax.clear_caches()


def _tokens(*shape):
  return np.random.default_rng(0).integers(0, 61, shape).astype(np.int32)


def _apart(tokens, ends):
  """Each [prompt | completion] as a row, and the slots that it came from."""
  alone, slots = [], []
  for row, (prompt, *_), bounds in zip(tokens, ends, ends, strict=True):
    for start, stop in itertools.pairwise(bounds):
      where = np.r_[:prompt, start:stop]
      slots.append(where)
      alone.append(np.pad(row[where], (0, len(row) - len(where))))
  return np.stack(alone), slots


def _real(ends, length):
  return np.arange(length) < ends[:, -1:]


@pytest.mark.parametrize(
    "config, ends",
    [
        pytest.param(_FULL, _ENDS, id="full"),
        pytest.param(_LOCAL, _ENDS, id="local"),
        pytest.param(_MIXED, _ENDS, id="mixed"),
        pytest.param(_FULL, _ENDS[:, :2], id="one_completion"),
    ],
)
def test_shared_rows_equal_separate_rows(config, ends, params):
  tokens = _tokens(len(ends), _LENGTH)
  shared = _forward(config, params, tokens, ends=ends)
  alone, slots = _apart(tokens, ends)
  apart = _forward(config, params, alone)
  parts = ends.shape[1] - 1
  for i, where in enumerate(slots):
    np.testing.assert_allclose(
        shared[i // parts, where], apart[i, : len(where)], atol=2e-5
    )


def test_shared_rows_have_the_gradient_of_separate_rows(params):
  """Of a sum over completions, as DPO's is."""
  tokens = _tokens(len(_ENDS), _LENGTH)
  alone, slots = _apart(tokens, _ENDS)
  weights = np.random.default_rng(1).normal(size=(*tokens.shape, _FULL.embed))
  weights = weights.astype(np.float32)
  weights *= _real(_ENDS, _LENGTH)[..., None]
  weights *= (np.arange(_LENGTH) >= _ENDS[:, :1])[..., None]
  theirs = np.zeros((*alone.shape, _FULL.embed), np.float32)
  for i, where in enumerate(slots):
    theirs[i, : len(where)] = weights[i // 3, where]

  @jax.jit
  def gradient(tokens, weights, ends=None):

    def loss(params):
      hidden = models.forward(_FULL, params, tokens, ends=ends)
      return jnp.sum(hidden * weights)

    return jax.grad(loss)(params)

  _assert_near(gradient(tokens, weights, _ENDS), gradient(alone, theirs), 1e-5)


def _assert_near(got, expected, tolerance):
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(
          x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max())
      ),
      got,
      expected,
  )


def _value_and_gradient(attention, config, tokens, params, **settings):
  """Of hidden states that count, and of a sum of them."""
  ends = settings.get("ends")
  counts = np.ones(tokens.shape, bool)
  if ends is not None:
    counts = _real(ends, tokens.shape[1])
  weights = np.random.default_rng(1).normal(size=(*tokens.shape, config.embed))
  weights = jnp.asarray(weights * counts[..., None], jnp.float32)

  @jax.jit
  def run(params):

    def loss(params):
      hidden = models.forward(
          config, params, tokens, attention=attention, **settings
      )
      return jnp.sum(hidden * weights), hidden

    (_, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return hidden, gradient

  hidden, gradient = run(params)
  assert np.all(np.isfinite(hidden))
  return np.asarray(hidden)[counts], gradient


@pytest.mark.parametrize(
    "config, ends, span",
    [
        pytest.param(_FULL, _ENDS, None, id="full", marks=pytest.mark.slow),
        pytest.param(_LOCAL, _ENDS, 13, id="local"),
        pytest.param(
            _MIXED,
            _SHORT,
            5,
            id="no_longer_than_the_window",
            marks=pytest.mark.slow,
        ),
        pytest.param(_LOCAL, None, None, id="plain", marks=pytest.mark.slow),
    ],
)
def test_unpacked_rows_equal_masked_rows(config, ends, span, params, on_cpu):
  tokens = _tokens(len(_ENDS), _LENGTH)
  got = _value_and_gradient(
      "cudnn", config, tokens, params, ends=ends, span=span
  )
  expected = _value_and_gradient("xla", config, tokens, params, ends=ends)
  _assert_near(got, expected, 1e-5)


def test_what_exceeds_the_span_is_nan(params, on_cpu):
  tokens = _tokens(len(_ENDS), _LENGTH)
  hidden = _forward(
      _FULL, params, tokens, ends=_ENDS, attention="cudnn", span=12
  )
  # A prompt of 6 and its completion of 7; the other row's are 4 and 6.
  nan = np.isnan(hidden).any(axis=-1)
  assert np.flatnonzero(nan[0]).tolist() == [17]
  assert not nan[1].any()


def test_no_backward_pass_scatters():
  rows = flash.rows("cudnn", _LENGTH, _ENDS, 13)
  x = np.random.default_rng(0).normal(size=(2, _LENGTH, 2, 4))
  x = x.astype(np.float32)

  def through(x):
    return flash._pack(jnp.sin(flash._unpack(x, rows)), rows)

  # The plain transposes, which JAX makes of what is run forwards.
  def plain(x):
    y = jnp.sin(flash._take(x, rows.slots))
    return flash._take(flash._flat(y), rows.places)

  g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  y, vjp = jax.vjp(through, x)
  expected, plain_vjp = jax.vjp(plain, x)
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_allclose(vjp(g)[0], plain_vjp(g)[0], atol=1e-6)
  lower = lambda f: jax.jit(lambda x: jax.vjp(f, x)[1](g)).lower(x).as_text()
  assert "scatter" in lower(plain)
  assert "scatter" not in lower(through)


def test_mixed_windows_are_refused(params):
  with pytest.raises(ValueError, match="one window"):
    models.forward(_MIXED, params, _tokens(1, 8), attention="cudnn")
  with pytest.raises(ValueError, match="no attention kernel 'flash'"):
    models.forward(_FULL, params, _tokens(1, 8), attention="flash")


# Of a width that splash pads to three blocks of 128; parts end within them.
_LONG = 300
_LONG_ENDS = np.array([[70, 120, 290], [100, 180, 180]], np.int32)


def _outputs_and_gradients(mask, softcap, q, k, v, weights):

  @jax.jit
  def run(q, k, v):
    attend = lambda *x: models.decoder.attend(*x, mask, 0.3, softcap)
    y, vjp = jax.vjp(attend, q, k, v)
    return y, vjp(weights)

  return run(q, k, v)


@pytest.mark.parametrize(
    "window, softcap, ends, span",
    [
        pytest.param(None, None, _LONG_ENDS, None, id="full"),
        pytest.param(40, 2.0, _LONG_ENDS, 291, id="local_capped"),
        pytest.param(40, None, None, None, id="plain"),
    ],
)
@pytest.mark.slow
def test_splash_equals_xla(window, softcap, ends, span, on_cpu):
  rng = np.random.default_rng(0)
  draw = lambda heads: rng.normal(size=(2, _LONG, heads, 64)).astype("f")
  q, k, v, weights = (draw(heads) for heads in (2, 1, 1, 2))
  rows = flash.rows("splash", _LONG, ends, span)
  if ends is None:
    mask = models.causal_mask(jnp.ones((2, _LONG), jnp.int32))
    positions = np.broadcast_to(np.arange(_LONG), (2, _LONG))
  else:
    weights *= _real(ends, _LONG)[..., None, None]
    positions, mask = models.prefix_layout(ends, _LONG)
  if window:
    mask &= (positions[:, None] > positions[..., None] - window)[:, None]
    rows = rows.within(window)
  y, gradients = _outputs_and_gradients(rows, softcap, q, k, v, weights)
  expected, theirs = _outputs_and_gradients(mask, softcap, q, k, v, weights)
  counts = weights != 0
  np.testing.assert_allclose(y[counts], expected[counts], atol=2e-5)
  _assert_near(gradients, theirs, 2e-5)


def _mesh(**axes):
  types = (AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), types)


@pytest.mark.parametrize(
    "kernel, axes",
    [
        ("cudnn", {"fsdp": 2, "tensor": 2}),
        ("cudnn", {"tensor": 4}),  # More than there are kv heads.
        ("splash", {"fsdp": 2, "tensor": 2}),
    ],
)
@pytest.mark.slow
def test_rows_on_a_mesh(kernel, axes, params, on_cpu):
  """The batch is cut along `fsdp`; heads along what is left, or not."""
  mesh = _mesh(**axes)
  sharding = NamedSharding(mesh, P("fsdp" if "fsdp" in axes else None))
  placed = jax.device_put(params, models.shardings(_FULL, mesh))
  tokens = _tokens(len(_ENDS), _LENGTH)
  got = _value_and_gradient(
      kernel, _FULL, tokens, placed, ends=_ENDS, sharding=sharding
  )
  expected = _value_and_gradient("xla", _FULL, tokens, params, ends=_ENDS)
  _assert_near(got, expected, 1e-5)


def _lowered(platform, attention, config, dtype, **settings):
  """StableHLO of a training step's gradient; nothing is compiled."""
  cast = lambda x: jax.ShapeDtypeStruct(x.shape, dtype)
  abstract = jax.tree.map(cast, models.abstract_params(config))
  tokens = jax.ShapeDtypeStruct((2, _LONG), jnp.int32)
  ends = jax.ShapeDtypeStruct((2, 3), jnp.int32)

  def loss(params, tokens, ends):
    hidden = models.forward(
        config,
        params,
        tokens,
        ends=ends,
        attention=attention,
        remat="full",
        **settings,
    )
    return jnp.sum(hidden.astype(jnp.float32) ** 2)

  traced = jax.jit(jax.grad(loss)).trace(abstract, tokens, ends)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def _squares(text, *sizes):
  """Types with two dimensions as long as a row: masks and logits."""
  types = set(re.findall(r"tensor<((?:\d+x)+)\w+>", text))
  sizes = map(str, sizes)
  return {x for n in sizes for x in types if x.split("x").count(n) > 1}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 100])
def test_splash_lowers_for_tpu(head_dim, window):
  config = dataclasses.replace(
      _FULL,
      head_dim=head_dim,
      window=window,
      local=(window is not None,) * 2,
      attention_softcap=50.0,
  )
  text = _lowered("tpu", "splash", config, jnp.bfloat16)
  # Forwards, again for the backward pass, and two kernels of that.
  assert text.count("@tpu_custom_call") == 4
  assert not _squares(text, 300, 384)


def test_splash_lowers_for_tpus():
  """Mosaic's kernels must not meet an axis that XLA is to cut."""
  mesh = _mesh(fsdp=2, tensor=2)
  sharding = NamedSharding(mesh, P("fsdp"))
  text = _lowered("tpu", "splash", _FULL, jnp.bfloat16, sharding=sharding)
  assert text.count("@tpu_custom_call") == 4
  assert "manual_computation" in text


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_lowers_for_cuda(window, monkeypatch):
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  config = dataclasses.replace(
      _FULL, head_dim=128, window=window, local=(window is not None,) * 2
  )
  text = _lowered("cuda", "cudnn", config, jnp.bfloat16)
  assert text.count("@__cudnn$fmhaSoftmax(") == 2
  assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
  assert "CAUSAL" in text and "PADDING" not in text
  window = f"sliding_window_length\\22: {window or 0}"
  assert window in text
  assert not _squares(text, 300)
  assert _squares(_lowered("cuda", "xla", config, jnp.float32), 300)


_H100 = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
_A100 = types.SimpleNamespace(platform="gpu", compute_capability="8.0")
_T4 = types.SimpleNamespace(platform="gpu", compute_capability="7.5")
_TPU = types.SimpleNamespace(platform="tpu")
_CPU = types.SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    "device, dtype, changes, expected",
    [
        (_CPU, jnp.bfloat16, {}, "xla"),
        (_A100, jnp.bfloat16, {}, "cudnn"),
        (_A100, jnp.float16, {"head_dim": 128}, "cudnn"),
        (_A100, jnp.float32, {}, "xla"),
        (_A100, jnp.bfloat16, {"head_dim": 12}, "xla"),
        (_A100, jnp.bfloat16, {"head_dim": 256}, "xla"),
        (_H100, jnp.bfloat16, {"head_dim": 256}, "cudnn"),
        (_T4, jnp.float16, {}, "xla"),
        (_A100, jnp.bfloat16, {"attention_softcap": 50.0}, "xla"),
        (_A100, jnp.bfloat16, {"window": 16, "local": (True, True)}, "cudnn"),
        (_A100, jnp.bfloat16, {"window": 16, "local": (True, False)}, "xla"),
        (_A100, jnp.bfloat16, {"window": 32, "local": (True, False)}, "cudnn"),
        (_TPU, jnp.bfloat16, {"head_dim": 128}, "splash"),
        (_TPU, jnp.float32, {"head_dim": 64}, "splash"),
        (_TPU, jnp.bfloat16, {"head_dim": 80}, "xla"),
        (
            _TPU,
            jnp.bfloat16,
            {"head_dim": 256, "attention_softcap": 50.0},
            "splash",
        ),
    ],
)
def test_attention_kernel(device, dtype, changes, expected):
  config = dataclasses.replace(_FULL, **changes)
  assert models.attention_kernel(config, dtype, 32, device) == expected


def test_attention_kernel_of_the_default_device():
  assert models.attention_kernel(_FULL, jnp.bfloat16, 32) == "xla"
