"""One step: by hand, in parts, in both layouts, on every mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.dpo import batches
from selfdev_jax.dpo import data as data_lib
from selfdev_jax.dpo import lora
from selfdev_jax.dpo import step as step_lib
from selfdev_jax.models import partition

_DECODER = models.DecoderConfig(
    vocab_size=32,
    embed=16,
    layers=2,
    heads=8,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    max_positions=64,
)
# Without warm-up, and nothing clipped: the first moment is (1 - b1) gradient.
_CONFIG = config_lib.Dpo(
    beta=0.5,
    sft_weight=0.1,
    learning_rate=1e-2,
    warmup_fraction=0.0,
    max_grad_norm=0.0,
    steps=1,
    batch_size=8,
    lora_rank=4,
    lora_alpha=8.0,
)
_METRICS = {
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "nll_loss",
}
_INVOLUNTARY = "Involuntary full rematerialization"
_MESHES = [
    (data, fsdp, 8 // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if 8 % (data * fsdp) == 0
]


def _make_data():
  """Eight pairs of three prompts, completions of 1 to 20 tokens."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(1, 32, n).astype(np.int32)
  lengths = ((1, 20), (2, 3), (19, 4), (7, 7), (1, 1), (20, 2), (5, 11), (3, 1))
  completions, prompt_of, pairs = [], [], []
  for i, pair in enumerate(lengths):
    pairs.append([2 * i, 2 * i + 1])
    completions += map(draw, pair)
    prompt_of += [i % 3] * 2
  return data_lib.Data(
      prompts=(draw(1), draw(5), draw(20)),
      completions=tuple(completions),
      prompt_of=np.array(prompt_of, np.int32),
      pairs=np.array(pairs, np.int32),
      source=np.arange(len(pairs), dtype=np.int32),
      counts=data_lib.Counts(),
  )


_DATA = _make_data()
# Any numbers near the log-probabilities of random tokens.
_REFERENCE = np.array(
    [-3.4 * len(ids) + i % 3 for i, ids in enumerate(_DATA.completions)],
    np.float32,
)


def _mesh(shape=(1, 1, 1)):
  return jax.make_mesh(
      shape,
      (models.DATA, models.FSDP, models.TENSOR),
      axis_types=(AxisType.Auto,) * 3,
      devices=jax.devices()[: math.prod(shape)],
  )


def _plan(config, mesh):
  return batches.plan(
      _DATA,
      jax.random.key(0),
      steps=config.steps,
      batch_size=config.batch_size,
      parts=config.parts,
      per_row=batches.COMPLETIONS[config.layout],
      multiple=step_lib.rows_multiple(mesh),
  )


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture(scope="module")
def fresh():
  adapter = lora.init(jax.random.key(1), _DECODER, _CONFIG.lora_rank)
  return jax.tree.map(np.asarray, adapter)


@pytest.fixture(scope="module")
def moved(fresh):
  """Both factors non-zero."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda x: x + rng.normal(0.0, 0.1, x.shape).astype(np.float32), fresh
  )


@pytest.fixture(scope="module")
def one_step(params, moved):
  """run(mesh's shape, *, start, model, logps, **changes) of the config.

  It returns what was trained, its first moments and the metrics. What one
  device computes is kept for the next to be compared with it.
  """
  known = {}

  def run(shape=(1, 1, 1), *, start=None, model=None, logps=None, **changes):
    config = dataclasses.replace(_CONFIG, **changes)
    key = (shape, config)
    plain = start is None and model is None and logps is None
    if plain and key in known:
      return known[key]
    mesh = _mesh(shape)
    base = params if model is None else model
    stepper = step_lib.stepper(config, _DECODER, base["embed"].dtype, mesh)
    is_lora = config.trains == "lora"
    start = (moved if is_lora else base) if start is None else start
    state = stepper.init(step_lib.put(start, stepper.trained_shardings))
    frozen = step_lib.put(base if is_lora else {}, stepper.frozen_shardings)
    logps = _REFERENCE if logps is None else logps
    batch = _plan(config, mesh).batch(0, logps)
    batch = step_lib.put(batch, stepper.batch_shardings)
    state, metrics = jax.device_get(stepper.step(frozen, state, batch))
    moments = optax.tree.get(state.optimizer, "mu")
    found = state.trained, moments, {k: float(v) for k, v in metrics.items()}
    if plain:
      known[key] = found
    return found

  return run


def _assert_same_step(found, expected, rtol, floor=1e-6):
  """Loss, metrics, every gradient and every parameter.

  Adam's first step is the learning rate times a gradient's sign: where the
  gradient is nothing but rounding, so is the step. Gradients are compared
  everywhere, the steps where a gradient is more than `floor`.
  """
  for name, value in expected[2].items():
    np.testing.assert_allclose(
        found[2][name], value, rtol=rtol, atol=rtol, err_msg=name
    )
  assert set(found[2]) == set(expected[2])

  def check(path, moment, wanted_moment, after, wanted):
    error = np.linalg.norm(moment - wanted_moment)
    name = jax.tree_util.keystr(path)
    assert error <= rtol * np.linalg.norm(wanted_moment), name
    if not wanted_moment.any():  # Of `a`, as long as `b` is zero.
      return
    sure = np.abs(wanted_moment) > floor
    # Tokens that are nowhere have no gradient.
    assert sure.mean() > (0.5 if "embed" in name else 0.9), name
    np.testing.assert_allclose(
        after[sure], wanted[sure], rtol=rtol, atol=rtol, err_msg=name
    )

  jax.tree_util.tree_map_with_path(
      check, found[1], expected[1], found[0], expected[0]
  )


@functools.partial(jax.jit, static_argnames="weight")
def _loss_by_hand(params, adapter, weight):
  """Each completion in a row of its own, the loss as the paper writes it."""
  # All of one length; the end of a row is not seen.
  rows = np.zeros((len(_DATA.completions), 40), np.int32)
  counted = np.zeros((len(rows), 39), bool)  # Slots that predict.
  for i, completion in enumerate(_DATA.completions):
    prompt = _DATA.prompts[_DATA.prompt_of[i]]
    end = len(prompt) + len(completion)
    rows[i, :end] = np.concatenate([prompt, completion])
    counted[i, len(prompt) - 1 : end - 1] = True
  hidden = models.forward(_DECODER, params, rows, lora=adapter)
  found = jax.nn.log_softmax(models.logits(_DECODER, params, hidden))[:, :-1]
  found = jnp.take_along_axis(found, rows[:, 1:, None], axis=2)[..., 0]
  logps = jnp.sum(found, axis=1, where=counted)
  chosen, rejected = _DATA.pairs.T
  ratios = logps - _REFERENCE
  h = _CONFIG.beta * (ratios[chosen] - ratios[rejected])
  tokens = sum(len(_DATA.completions[i]) for i in chosen)
  nll = -jnp.sum(logps[chosen]) / tokens
  return jnp.mean(jnp.log1p(jnp.exp(-h))) + weight * nll, nll


def _check_adamw(before, after, gradient, decay):
  # Adam's first step is lr g / (|g| + eps); b2's root cancels.
  step = gradient / (np.abs(gradient) + 1e-8) + decay * before
  sure = np.abs(gradient) > 1e-5  # Elsewhere rounding decides the sign.
  np.testing.assert_allclose(
      after[sure], (before - _CONFIG.learning_rate * step)[sure], atol=1e-5
  )


def test_a_step_by_hand(one_step, params, moved):
  """One step without warm-up is AdamW on the gradient of the loss."""
  trained, moments, metrics = one_step(weight_decay=0.1)

  def loss(adapter):
    scale = _CONFIG.lora_alpha / _CONFIG.lora_rank
    scaled = models.scale_adapter(adapter, scale)
    return _loss_by_hand(params, scaled, _CONFIG.sft_weight)

  (value, nll), gradient = jax.value_and_grad(loss, has_aux=True)(moved)
  assert set(metrics) == _METRICS
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  np.testing.assert_allclose(metrics["nll_loss"], nll, rtol=1e-5)
  np.testing.assert_allclose(
      metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-4
  )
  gradient = jax.device_get(gradient)
  jax.tree.map(
      lambda moment, g: np.testing.assert_allclose(
          moment, 0.1 * g, rtol=1e-3, atol=1e-6
      ),
      moments,
      gradient,
  )
  decayed = lambda *leaves: _check_adamw(*leaves, decay=0.1)
  jax.tree.map(decayed, moved, trained, gradient)


@pytest.mark.slow
def test_a_step_of_all_weights_by_hand(one_step, params):
  trained, moments, metrics = one_step(trains="full", weight_decay=0.1)
  loss = lambda params: _loss_by_hand(params, None, _CONFIG.sft_weight)
  (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  gradient = jax.device_get(gradient)

  def check(path, before, after, moment, gradient):
    np.testing.assert_allclose(moment, 0.1 * gradient, rtol=1e-3, atol=1e-6)
    # Norms do not decay.
    decay = 0.0 if path[-1].key.endswith("norm") else 0.1
    _check_adamw(before, after, gradient, decay)

  jax.tree_util.tree_map_with_path(check, params, trained, moments, gradient)


@pytest.mark.slow
def test_a_long_gradient_is_clipped(one_step):
  _, moments, plain = one_step()
  limit = 0.5 * plain["grad_norm"]
  _, clipped, metrics = one_step(max_grad_norm=limit)
  assert metrics == plain  # What is logged is the length before.
  np.testing.assert_allclose(optax.tree.norm(clipped), 0.1 * limit, rtol=1e-4)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, 0.5 * y, rtol=1e-4, atol=1e-9),
      clipped,
      moments,
  )
  _, longer, _ = one_step(max_grad_norm=2 * plain["grad_norm"])
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), longer, moments
  )


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full"])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_equal_the_batch(one_step, trains, parts):
  """Their pairs have 2 to 21 tokens: a mean of the parts' means is another."""
  found = one_step(parts=parts, trains=trains)
  _assert_same_step(found, one_step(trains=trains), 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full"])
def test_a_shared_prompt_equals_padded_rows(one_step, trains):
  found = one_step(layout="padded", trains=trains)
  _assert_same_step(found, one_step(trains=trains), 1e-5)


@pytest.mark.slow
def test_what_is_kept_changes_nothing(one_step):
  _assert_same_step(one_step(remat="dots"), one_step(), 1e-5)


@pytest.mark.slow
def test_adapter_off_is_the_reference_of_a_fresh_adapter(
    one_step, params, fresh
):
  dtype = params["embed"].dtype
  stepper = step_lib.stepper(_CONFIG, _DECODER, dtype, _mesh())
  filled = [[number] for number in range(len(_DATA.completions))]
  rows = batches.pack(_DATA, filled, 2, len(filled), (48, 32))
  computed = np.asarray(stepper.reference(params, fresh, rows))[:, 0]
  expected = one_step(start=fresh, logps=computed)
  assert abs(expected[2]["rewards/margins"]) < 1e-4
  # It is computed in the step: what the batch holds is not looked at.
  found = one_step(
      start=fresh,
      logps=np.full_like(computed, np.nan),
      reference="adapter_off",
  )
  _assert_same_step(found, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full"])
def test_bfloat16_is_trained_through_float32(one_step, params, trains):
  """The masters move by less than a bfloat16 can hold."""
  narrow = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
  rate = 1e-5
  # JAX cannot lower its own attention's bfloat16 gradient under "strict".
  with jax.numpy_dtype_promotion("standard"):
    found, moments, metrics = one_step(
        model=narrow, trains=trains, learning_rate=rate
    )
  assert {str(x.dtype) for x in jax.tree.leaves((found, moments))} == {
      "float32"
  }
  wide = jax.tree.map(lambda x: np.asarray(x, np.float32), narrow)
  _, expected_moments, expected = one_step(
      model=wide, trains=trains, learning_rate=rate
  )
  np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=3e-2)
  flat = lambda tree: np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
  one, other = flat(moments), flat(expected_moments)
  cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
  assert cosine > 0.99
  if trains == "full":
    step = np.abs(found["head"] - wide["head"])
    np.testing.assert_allclose(step, rate, rtol=0.05)


# Meshes.


def _single_and_mesh(one_step, capfd, shape, trains):
  expected = one_step(trains=trains)
  capfd.readouterr()
  found = one_step(shape, trains=trains)
  return found, expected, capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full"])
@pytest.mark.parametrize("shape", _MESHES, ids=str)
def test_every_mesh_equals_one_device(one_step, capfd, shape, trains):
  found, expected, said = _single_and_mesh(one_step, capfd, shape, trains)
  _assert_same_step(found, expected, 1e-5)
  assert _INVOLUNTARY not in said


@pytest.mark.slow
def test_parts_on_a_mesh_equal_one_device(one_step):
  found = one_step((2, 2, 2), parts=2, reference="adapter_off")
  expected = one_step(parts=2, reference="adapter_off")
  _assert_same_step(found, expected, 1e-5)


@pytest.mark.slow
def test_xla_says_when_it_rematerialises(one_step, capfd, monkeypatch):
  """So that it would be heard in the tests above."""
  axes = {**partition._AXES, "embed": (models.TENSOR, models.FSDP)}
  monkeypatch.setattr(partition, "_AXES", axes)
  step_lib.stepper.cache_clear()
  try:
    # Another config than theirs: what is known is not computed again.
    one_step((2, 2, 2), learning_rate=0.5)
  finally:
    step_lib.stepper.cache_clear()
  assert _INVOLUNTARY in capfd.readouterr().err


def test_the_mesh_is_of_all_devices():
  mesh = step_lib.make_mesh(dataclasses.replace(_CONFIG, fsdp=2, tensor=2))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert step_lib.rows_multiple(mesh) == 4
  with pytest.raises(
      errors.UserError,
      match=r"^8 devices cannot be .* dpo.fsdp=3 x dpo.tensor=1; .* number$",
  ):
    step_lib.make_mesh(dataclasses.replace(_CONFIG, fsdp=3))


@pytest.mark.slow
def test_one_shape_is_compiled_once(params, moved):
  config = dataclasses.replace(
      _CONFIG, label_smoothing=0.125, batch_size=2, steps=4
  )
  mesh = step_lib.make_mesh(config)
  stepper = step_lib.stepper(config, _DECODER, params["embed"].dtype, mesh)
  plan = _plan(config, mesh)
  assert len(set(plan.shapes)) == 1
  frozen = step_lib.put(params, stepper.frozen_shardings)
  state = stepper.init(step_lib.put(moved, stepper.trained_shardings))
  for step in range(config.steps):
    batch = plan.batch(step, _REFERENCE)
    batch = step_lib.put(batch, stepper.batch_shardings)
    state, _ = stepper.step(frozen, state, batch)
  assert stepper.step._cache_size() == 1
  again = step_lib.stepper(config, _DECODER, params["embed"].dtype, mesh)
  assert again is stepper


def test_the_schedule_is_transformers():
  """Step 0 of a warm-up has rate 0; the last step is one short of 0."""
  config = config_lib.Dpo(learning_rate=2.0, warmup_fraction=0.3, steps=10)
  rates = [float(step_lib.schedule(config)(i)) for i in range(11)]
  rise = [2.0 * i / 3 for i in range(3)]
  fall = [1 + math.cos(math.pi * i / 7) for i in range(8)]
  np.testing.assert_allclose(rates, rise + fall, atol=1e-6)
  # At least one step is left for the fall.
  all_rise = dataclasses.replace(config, warmup_fraction=1.0, steps=1)
  assert float(step_lib.schedule(all_rise)(0)) == 2.0
