"""Training on toy pairs, stopped and taken up again."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.dpo import data as data_lib
from selfdev_jax.dpo import lora
from selfdev_jax.dpo import step as step_lib
from selfdev_jax.dpo import train as train_lib
from selfdev_jax.dpo import workdir as workdir_lib

_DECODER = models.DecoderConfig(
    vocab_size=32,
    embed=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp=24,
    max_positions=64,
)
_CONFIG = config_lib.Dpo(
    beta=0.5,
    sft_weight=0.1,
    learning_rate=3e-2,
    steps=10,
    batch_size=8,
    lora_rank=4,
    lora_alpha=8.0,
    save_every=3,
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
    "learning_rate",
    "num_tokens",
    "epoch",
}
_EOS = 0
_CHOSEN, _REJECTED = 5, 6


def _data(pairs=6, swapped=False):
  """One prompt; pair `i` is i + 1 times one token against another's."""
  completions, numbers = [], []
  for i in range(pairs):
    pair = []
    for token in (_CHOSEN, _REJECTED):
      pair.append(len(completions))
      completions.append(np.array([token] * (i + 1) + [_EOS], np.int32))
    numbers.append(pair[::-1] if swapped else pair)
  return data_lib.Data(
      prompts=(np.array([1, 2, 3, 4], np.int32),),
      completions=tuple(completions),
      prompt_of=np.zeros(len(completions), np.int32),
      pairs=np.array(numbers, np.int32),
      source=np.arange(10, 10 + pairs, dtype=np.int32),
      counts=data_lib.Counts(),
  )


_DATA = _data()


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture(scope="module")
def start():
  return lora.init(jax.random.key(1), _DECODER, _CONFIG.lora_rank)


@pytest.fixture(scope="module")
def whole(params, start, tmp_path_factory):
  """A training that nothing stopped: (adapter, history, workdir)."""
  workdir = tmp_path_factory.mktemp("whole") / "dpo"
  return *_train(workdir, params, start), workdir


def _train(
    workdir, params, adapter, data=_DATA, seed=0, weights="w", **changes
):
  return train_lib.train(
      dataclasses.replace(_CONFIG, **changes),
      _DECODER,
      params,
      adapter,
      data,
      jax.random.key(seed),
      workdir=workdir,
      weights=weights,
      label="toy",
  )


def _bits_equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def _histories_close(one, other):
  assert len(one) == len(other)
  for i, (got, wanted) in enumerate(zip(one, other, strict=True)):
    assert set(got) == set(wanted)
    for name in got:
      np.testing.assert_allclose(
          got[name],
          wanted[name],
          rtol=1e-5,
          atol=1e-5,
          err_msg=f"{name} {i}",
      )


def _lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _checkpoint(workdir, step):
  """What was saved, as NumPy arrays."""
  path = (workdir / "checkpoints" / str(step) / "default").absolute()
  with ocp.StandardCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata.tree
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        metadata,
    )
    return jax.device_get(checkpointer.restore(path, abstract))


def _by_name(tree):
  """{path: leaf}, whether a tuple was restored as a tuple, list or dict."""
  return {
      re.sub(r"\W+", ".", jax.tree_util.keystr(path, simple=True)): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.fixture
def stop(monkeypatch):
  """stop(step) kills training before that step is logged; stop(None) not."""
  original = workdir_lib.Workdir.log

  def choose(at):
    def log(self, step, metrics):
      if step == at:
        raise KeyboardInterrupt
      original(self, step, metrics)

    monkeypatch.setattr(workdir_lib.Workdir, "log", log)

  return choose


@pytest.fixture
def states(monkeypatch):
  """{step: a copy of the state after it}."""
  seen, stepper = {}, step_lib.stepper

  def copying(*args):
    made = stepper(*args)

    def step(*args):
      state, metrics = made.step(*args)
      seen[len(seen) + 1] = jax.tree.map(np.array, state)
      return state, metrics

    return dataclasses.replace(made, step=step)

  monkeypatch.setattr(step_lib, "stepper", copying)
  return seen


# What is learnt.


@pytest.mark.slow
def test_chosen_rises_over_rejected_with_one_compilation(
    params, start, tmp_path
):
  before = jax.tree.map(np.array, (params, start))
  step_lib.stepper.cache_clear()
  adapter, history = _train(tmp_path / "one", params, start)
  assert len(history) == _CONFIG.steps
  assert all(set(metrics) == _METRICS for metrics in history)
  assert all(isinstance(v, float) for v in history[0].values())
  dpo = [step["loss"] - 0.1 * step["nll_loss"] for step in history]
  assert math.isclose(dpo[0], math.log(2), rel_tol=1e-4)
  assert dpo[-1] < 0.5 * dpo[0]
  assert history[-1]["rewards/margins"] > 1.0
  assert history[-1]["rewards/accuracies"] == 1.0
  assert history[0]["learning_rate"] == 0.0
  assert history[-1]["epoch"] == 10 * 8 / 6
  # As TRL counts: a prompt for each completion of a pair.
  sizes = np.array([len(ids) for ids in _DATA.completions])
  assert history[-1]["num_tokens"] > history[0]["num_tokens"] > 8 * 2 * 4
  assert history[-1]["num_tokens"] <= 80 * 2 * (4 + sizes.max())
  # The arguments were neither changed nor given away.
  _bits_equal(before, (params, start))
  assert jax.tree.structure(adapter) == jax.tree.structure(start)
  for leaf in jax.tree.leaves(adapter):
    assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32
  # The next iteration's round starts from the adapter of this one.
  _train(tmp_path / "two", params, adapter, _data(swapped=True), seed=1)
  mesh = step_lib.make_mesh(_CONFIG)
  # The longest prompt with one completion has 11 tokens; 32 is the least.
  stepper = step_lib.stepper(_CONFIG, _DECODER, params["embed"].dtype, mesh, 32)
  assert step_lib.stepper.cache_info().currsize == 1
  assert stepper.step._cache_size() == 1
  assert stepper.reference._cache_size() == 1


@pytest.mark.slow
def test_equal_keys_equal_bits(params, start, whole, tmp_path):
  adapter, history, _ = whole
  same = _train(tmp_path / "same", params, start)
  _bits_equal(same[0], adapter)
  assert same[1] == history
  other = _train(tmp_path / "other", params, start, seed=1)
  assert other[1] != history


@pytest.mark.slow
def test_a_second_round_starts_at_margin_zero(params, start, whole, tmp_path):
  """The reference is the adapter that a round starts from."""
  moved, history, _ = whole
  assert history[-1]["rewards/margins"] > 0.1
  _, again = _train(tmp_path, params, moved)
  np.testing.assert_allclose(again[0]["rewards/margins"], 0.0, atol=1e-4)
  # Without its adapter the model is where the first round began.
  _, off = _train(
      tmp_path / "off", params, moved, steps=1, reference="adapter_off"
  )
  assert off[0]["rewards/margins"] > 0.5 * history[-1]["rewards/margins"]


@pytest.mark.slow
def test_every_weight_is_trained(params, tmp_path):
  before = jax.tree.map(np.array, params)
  options = dict(trains="full", fsdp=2, tensor=2, learning_rate=1e-2)
  trained, history = _train(tmp_path, params, None, **options)
  assert history[-1]["rewards/margins"] > 1.0
  _bits_equal(before, params)
  assert jax.tree.structure(trained) == jax.tree.structure(params)
  moved = jax.tree.map(lambda x, y: np.any(x != y), trained, before)
  assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_bfloat16_base_float32_adapter(params, start, tmp_path):
  narrow = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
  # JAX cannot lower its own attention's bfloat16 gradient under "strict".
  with jax.numpy_dtype_promotion("standard"):
    adapter, history = _train(tmp_path, narrow, start)
  assert history[-1]["rewards/margins"] > 0.1
  assert {str(x.dtype) for x in jax.tree.leaves(adapter)} == {"float32"}


@pytest.mark.slow
def test_a_loss_that_is_not_finite(params, start, tmp_path):
  """The first step that meets the pair is named, its pairs are written."""
  broken = params | {"embed": np.array(params["embed"])}
  broken["embed"][_CHOSEN] = np.nan
  with pytest.raises(
      errors.UserError, match=r"^toy: loss is nan at step 1 of 10; .*--workdir$"
  ) as caught:
    _train(tmp_path, broken, start)
  path = tmp_path / "not_finite_step_1.jsonl"
  assert f"its pairs are in {path}." in str(caught.value)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(rows) == _CONFIG.batch_size
  for row in rows:
    i = row["row"] - 11  # `source` counts the input's rows, from 0.
    assert row["prompt_ids"] == [1, 2, 3, 4]
    assert row["chosen_ids"] == [_CHOSEN] * (i + 1) + [_EOS]
    assert row["rejected_ids"] == [_REJECTED] * (i + 1) + [_EOS]
  assert _lines(tmp_path) == []


# The reference.


@pytest.mark.slow
def test_the_reference_is_computed_once(params, start, tmp_path, monkeypatch):
  computed, original = [], train_lib._reference

  def count(*args):
    computed.append(original(*args))
    return computed[-1]

  monkeypatch.setattr(train_lib, "_reference", count)
  _train(tmp_path, params, start)
  _, history = _train(tmp_path, params, start)
  assert len(computed) == 1
  path = tmp_path / "reference.safetensors"
  stored = safetensors.numpy.load_file(path)["logps"]
  np.testing.assert_array_equal(stored, computed[0])
  # What stands there is what is used.
  for name in ("checkpoints", "metrics.jsonl"):
    (tmp_path / name).rename(tmp_path / f"{name}.old")
  with safetensors.safe_open(path, "numpy") as file:
    metadata = file.metadata()
  moved = stored.copy()
  moved[_DATA.pairs[:, 0]] -= 3.0
  safetensors.numpy.save_file({"logps": moved}, path, metadata)
  _, changed = _train(tmp_path, params, start)
  np.testing.assert_allclose(
      changed[0]["rewards/margins"] - history[0]["rewards/margins"],
      3.0 * _CONFIG.beta,
      rtol=1e-4,
  )
  assert len(computed) == 1
  # And what is of other weights is not.
  metadata["weights"] = "other"
  safetensors.numpy.save_file({"logps": stored}, path, metadata)
  with pytest.raises(
      errors.UserError,
      match=r"reference.safetensors is stale: .* other weights; remove it",
  ) as caught:
    _train(tmp_path, params, start)
  assert "\n" not in str(caught.value)
  path.unlink()
  _train(tmp_path, params, start)
  assert len(computed) == 2


@pytest.mark.slow
def test_no_reference_where_the_adapter_is_switched_off(
    params, start, tmp_path
):
  moved = jax.tree.map(lambda x: x + 0.1, start)
  _, history = _train(tmp_path, params, moved, steps=1, reference="adapter_off")
  # The adapter that it starts from is not part of the reference.
  assert abs(history[0]["rewards/chosen"]) > 1e-3
  assert not (tmp_path / "reference.safetensors").exists()


@pytest.mark.slow
def test_float16_is_trained_in_bfloat16(params, start, tmp_path):
  # Numbers that both hold.
  narrow = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(np.float16), params
  )
  wide = jax.tree.map(lambda x: x.astype(jnp.bfloat16), narrow)
  # JAX cannot lower its own attention's bfloat16 gradient under "strict".
  with jax.numpy_dtype_promotion("standard"):
    one, other = (
        _train(tmp_path / name, tree, start, steps=2)
        for name, tree in (("f16", narrow), ("bf16", wide))
    )
  _bits_equal(one[0], other[0])


@pytest.mark.slow
def test_each_completion_is_computed_once(params, start, tmp_path):
  """6 pairs of 12 completions, not 8 x 10 of what the steps see."""
  rows, stepper = [], step_lib.stepper

  def counting(*args):
    made = stepper(*args)

    def reference(frozen, trained, batch):
      rows.append(batch.tokens.shape[0])
      return made.reference(frozen, trained, batch)

    return dataclasses.replace(made, reference=reference)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib, "stepper", counting)
    _train(tmp_path, params, start, steps=1, layout="padded")
  assert sum(rows) == 16  # Rounded up to 8 devices.


# Stopped and taken up again.


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4, 9, 10])
def test_a_killed_training_ends_as_if_it_had_not_been(
    params, start, whole, tmp_path, stop, at
):
  adapter, history, workdir = whole
  stop(at)
  with pytest.raises(KeyboardInterrupt):
    _train(tmp_path, params, start)
  assert [line["step"] for line in _lines(tmp_path)] == list(range(1, at))
  stop(None)
  again, continued = _train(tmp_path, params, start)
  _bits_equal(again, adapter)
  assert continued == history
  assert _lines(tmp_path) == _lines(workdir)
  _bits_equal(_checkpoint(tmp_path, 10), _checkpoint(workdir, 10))
  # And again, when nothing is left to do.
  done, read = _train(tmp_path, params, start)
  _bits_equal(done, adapter)
  assert read == history
  assert _lines(tmp_path) == _lines(workdir)


@pytest.mark.slow
def test_a_killed_training_goes_on_on_another_mesh(
    params, start, whole, tmp_path, stop, monkeypatch
):
  adapter, history, _ = whole
  stop(8)
  with pytest.raises(KeyboardInterrupt):
    _train(tmp_path, params, start)
  stop(None)
  restored, original = [], workdir_lib.Workdir.restore

  def remember(self, abstract):
    state, step = original(self, abstract)
    assert jax.tree.all(
        jax.tree.map(lambda x, y: x.sharding == y.sharding, state, abstract)
    )
    restored.append((jax.device_get(state), step))
    return state, step

  saved = _by_name(_checkpoint(tmp_path, 6))
  monkeypatch.setattr(workdir_lib.Workdir, "restore", remember)
  options = dict(fsdp=2, tensor=2, save_every=100, remat="dots")
  moved, continued = _train(tmp_path, params, start, **options)
  ((state, step),) = restored
  assert step == 6
  found = _by_name(state)
  assert set(found) == set(saved)
  for name, leaf in found.items():
    np.testing.assert_array_equal(leaf, saved[name], err_msg=name)
  _histories_close(continued, history)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3), moved, adapter
  )


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full"])
def test_a_checkpoint_is_of_its_step(params, start, tmp_path, states, trains):
  """It is written in the background, and the next step takes the state over."""
  options = dict(save_every=1, trains=trains, learning_rate=1e-2)
  options |= dict(fsdp=2, tensor=2)
  adapter = start if trains == "lora" else None
  _train(tmp_path, params, adapter, **options)
  steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert steps == ["10", "9"]  # The last two.
  assert set(states) == set(range(1, 11))
  for step in (9, 10):
    saved, expected = _by_name(_checkpoint(tmp_path, step)), states[step]
    expected = _by_name(expected)
    assert set(saved) == set(expected)
    for name, leaf in expected.items():
      np.testing.assert_array_equal(saved[name], leaf, err_msg=name)
  trained = lambda step: jax.tree.leaves(states[step].trained)[0]
  assert np.any(trained(8) != trained(9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(beta=0.25), "dpo.beta was '0.5', is '0.25'"),
        (dict(steps=11), "dpo.steps was '10', is '11'"),
        (dict(layout="padded"), "dpo.layout was 'shared', is 'padded'"),
        (dict(lora_targets=("q",)), "dpo.lora_targets was"),
        (dict(data=_data(swapped=True)), "data was"),
        (dict(data=_data(5)), "data was"),
        (dict(weights="x"), "weights was 'w', is 'x'"),
        (dict(seed=1), "key was"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_workdir_of_another_training(
    params, start, tmp_path, stop, changes, message
):
  (tmp_path / "run.json").write_text(json.dumps(_made_from(start)))
  with pytest.raises(
      errors.UserError,
      match=f"^{tmp_path} belongs to another training: {message}",
  ) as caught:
    _train(tmp_path, params, start, **changes)
  assert str(caught.value).endswith("; name another --workdir")
  assert "\n" not in str(caught.value)
  assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def _made_from(adapter, **changes):
  """What `train` writes into run.json before it computes anything."""
  seen = []

  class SeenError(Exception):
    pass

  def refuse(directory, made_from):
    seen.append(made_from)
    raise SeenError

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workdir_lib, "Workdir", refuse)
    with pytest.raises(SeenError):
      _train("unused", {"embed": np.zeros(1, np.float32)}, adapter, **changes)
  return seen[0]


def test_what_may_change(start):
  made_from = _made_from(start)
  free = dict(fsdp=2, tensor=4, save_every=1, remat="dots")
  assert _made_from(start, **free) == made_from
  for change in (dict(beta=1.0), dict(seed=1), dict(weights="x")):
    assert _made_from(start, **change) != made_from
  other = jax.tree.map(lambda x: np.asarray(x) + np.float32(1), start)
  assert _made_from(other)["adapter"] != made_from["adapter"]
