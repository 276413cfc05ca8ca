"""From files to files, in this process."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.dpo import run as run_lib

_DECODER = models.DecoderConfig(
    vocab_size=60,
    embed=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    mlp=48,
    max_positions=64,
)
_CONFIG = config_lib.Dpo(
    beta=0.5,
    learning_rate=1e-2,
    steps=5,
    batch_size=4,
    lora_rank=4,
    lora_alpha=8.0,
)


def _make_model(directory, params, words=60, decoder=_DECODER):
  _write_tokenizer(directory / "tokenizer", words)
  convert.save(
      directory / "model", decoder, params, like=directory / "tokenizer"
  )
  return directory / "model"


def _write_tokenizer(directory, size):
  """A token a word: `w7` is 7."""
  words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}
  model = tokenizers.models.WordLevel(words, "<unk>")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
  ).save_pretrained(directory)


def _words(rng, n):
  return " ".join(f"w{i}" for i in rng.integers(2, 60, n))


def _rows(n=9):
  rng = np.random.default_rng(0)
  return [
      {
          "prompt": _words(rng, rng.integers(2, 12)),
          "chosen": _words(rng, rng.integers(1, 12)) + " w3",
          "rejected": _words(rng, rng.integers(1, 12)) + " w4",
      }
      for _ in range(n)
  ]


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(_DECODER)


@pytest.fixture(scope="module")
def model(tmp_path_factory, params) -> pathlib.Path:
  return _make_model(tmp_path_factory.mktemp("run"), params)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory, params) -> pathlib.Path:
  """The same in bfloat16."""
  params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
  return _make_model(tmp_path_factory.mktemp("narrow"), params)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> pathlib.Path:
  return _write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", _rows())


@pytest.fixture
def run(model, pairs, tmp_path):
  """run(*, model, pairs, workdir, adapter, export, seed, **changes)."""

  def run(
      *,
      model=model,
      pairs=pairs,
      workdir=tmp_path / "workdir",
      adapter=None,
      export=None,
      seed=0,
      **changes,
  ):
    return run_lib.run(
        dataclasses.replace(_CONFIG, **changes),
        str(model),
        str(pairs),
        workdir,
        adapter=adapter and str(adapter),
        export=export and str(export),
        seed=seed,
    )

  return run


def _save_adapter(directory, rank=4, alpha=8.0, targets=("q", "down")):
  rng = np.random.default_rng(3)
  draw = lambda *shape: rng.normal(0.0, 0.2, shape).astype(np.float32)
  shapes = {"q": ("attention", 32, 32), "down": ("mlp", 32, 48)}
  layers = {}
  for name in targets:
    group, outputs, inputs = shapes[name]
    factors = {"a": draw(2, rank, inputs), "b": draw(2, outputs, rank)}
    layers.setdefault(group, {})[name] = factors
  convert.save_adapter(
      directory,
      {"layers": layers},
      config=_DECODER,
      rank=rank,
      alpha=alpha,
      base="base",
  )
  return directory


def _logits(model, ids):
  with torch.no_grad():
    return model(input_ids=torch.tensor(ids)[None]).logits.numpy()


def _hf(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32
  )


def _assert_refused(action, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    action()
  assert "\n" not in str(caught.value)


# What comes out.


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_and_the_model_with_it(
    run, model, params, tmp_path, capsys, rslora
):
  export = tmp_path / "export"
  summary = run(export=export, rslora=rslora)
  assert summary["pairs"] == 9 and summary["steps"] == 5
  lines = (tmp_path / "workdir" / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[-1]) == {
      "step": 5,
      **{k: v for k, v in summary.items() if k not in ("pairs", "steps")},
  }
  adapter = tmp_path / "workdir" / "adapter"
  loaded = convert.load_adapter(adapter, _DECODER)
  assert loaded.scale == (4.0 if rslora else 2.0)
  _, exported = convert.load(export)
  for group, names in loaded.params["layers"].items():
    for name, factors in names.items():
      base = params["layers"][group][name]
      update = loaded.scale * np.einsum(
          "lor,lri->loi", factors["b"], factors["a"]
      )
      assert np.abs(update).max() > 1e-3, name
      np.testing.assert_allclose(
          exported["layers"][group][name], base + update, atol=1e-6
      )
  for name in ("embed", "head", "final_norm"):
    np.testing.assert_array_equal(exported[name], params[name])
  # As PEFT and transformers see both.
  ids = [5, 9, 3, 40, 8]
  whole = _logits(_hf(export), ids)
  with_adapter = peft.PeftModel.from_pretrained(_hf(model), adapter)
  np.testing.assert_allclose(_logits(with_adapter, ids), whole, atol=1e-4)
  assert np.abs(_logits(_hf(model), ids) - whole).max() > 1e-2
  tokenizer = transformers.AutoTokenizer.from_pretrained(export)
  assert tokenizer("w7 w8").input_ids == [7, 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "narrow"])
def test_a_whole_model(run, request, tmp_path, capsys, name):
  directory, export = request.getfixturevalue(name), tmp_path / "export"
  # JAX cannot lower its own attention's bfloat16 gradient under "strict".
  with jax.numpy_dtype_promotion("standard"):
    run(model=directory, export=export, trains="full", fsdp=2)
  assert not (tmp_path / "workdir" / "adapter").exists()
  _, before = convert.load(directory)
  _, after = convert.load(export)
  changed = lambda old, new: old.dtype == new.dtype and np.any(old != new)
  assert jax.tree.all(jax.tree.map(changed, before, after))
  dtype = "float32" if name == "model" else "bfloat16"
  assert json.loads((export / "config.json").read_text())["dtype"] == dtype
  ids = [5, 9, 3]
  assert np.isfinite(_logits(_hf(export), ids)).all()


@pytest.mark.slow
def test_a_whole_model_can_be_asked_for_later(run, tmp_path, capsys):
  """The note says how."""
  first = run(trains="full")
  assert "--export=DIR" in capsys.readouterr().err
  second = run(trains="full", export=tmp_path / "one")
  assert first == second
  run(trains="full", workdir=tmp_path / "other", export=tmp_path / "two")
  one, two = (convert.load(tmp_path / name)[1] for name in ("one", "two"))
  jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_an_adapter_to_start_from(run, tmp_path, capsys):
  start = _save_adapter(tmp_path / "start")
  options = dict(adapter=start, lora_targets=("q", "down"))
  run(**options, learning_rate=0.0)
  found = convert.load_adapter(tmp_path / "workdir" / "adapter", _DECODER)
  expected = convert.load_adapter(start, _DECODER)
  assert found.scale == expected.scale
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
  # Which is not where a fresh one starts.
  lines = (tmp_path / "workdir" / "metrics.jsonl").read_text().splitlines()
  assert abs(json.loads(lines[0])["rewards/margins"]) < 1e-4
  run(learning_rate=0.0, workdir=tmp_path / "fresh")
  other = (tmp_path / "fresh" / "metrics.jsonl").read_text().splitlines()
  key = "logps/chosen"
  assert abs(json.loads(lines[0])[key] - json.loads(other[0])[key]) > 1e-2


@pytest.mark.slow
def test_the_seed_is_of_adapter_and_order(run, tmp_path, capsys):
  one, other = (run(seed=seed, workdir=tmp_path / str(seed)) for seed in (0, 1))
  assert one != other
  a, b = (
      convert.load_adapter(tmp_path / str(seed) / "adapter", _DECODER).params
      for seed in (0, 1)
  )
  assert np.any(a["layers"]["mlp"]["up"]["a"] != b["layers"]["mlp"]["up"]["a"])


@pytest.mark.slow
def test_what_could_not_be_taken_is_counted(run, tmp_path, capsys):
  good = _rows(2)
  rng = np.random.default_rng(1)
  rows = [
      *good,
      {**good[0], "rejected": good[0]["chosen"]},
      {**good[1], "chosen": ""},
      {**good[0], "prompt": _words(rng, 80)},
      {**good[0], "chosen": _words(rng, 80)},
  ]
  summary = run(pairs=_write(tmp_path / "pairs.jsonl", rows), steps=1)
  assert summary["pairs"] == 3
  assert (
      "Note: 3 pairs skipped (1 equal, 1 empty, 1 too long), 1 prompt cut on"
      " the left\n"
  ) in capsys.readouterr().err


# What does not fit.


@pytest.mark.parametrize(
    ("adapter", "changes", "message"),
    [
        (
            dict(),
            dict(lora_rank=3),
            r"holds layers.attention.q.a of shape \(2, 4, 32\), but"
            r" dpo.lora_rank=3 .* \(2, 3, 32\); let them describe the adapter",
        ),
        (
            dict(),
            dict(lora_targets=("q", "v", "down")),
            "holds layers.attention.v.a of shape None",
        ),
        (
            dict(),
            dict(lora_targets=("q",)),
            r"holds layers.mlp.down.a of shape \(2, 4, 48\), .* ask for None",
        ),
        (
            dict(),
            dict(lora_alpha=4.0),
            "is scaled by 2, but dpo.lora_alpha=4 and dpo.rslora=False ask for",
        ),
        (dict(), dict(rslora=True), "dpo.rslora=True ask for 4; let them"),
        (dict(), dict(trains="full"), "--adapter goes with .*trains=lora"),
    ],
)
def test_an_adapter_that_is_not_the_configs(
    run, tmp_path, adapter, changes, message
):
  start = _save_adapter(tmp_path / "start", **adapter)
  options = {"lora_targets": ("q", "down"), **changes}
  _assert_refused(lambda: run(adapter=start, **options), message)
  assert not (tmp_path / "workdir").exists()


def test_an_adapter_that_is_not_there(run, tmp_path):
  _assert_refused(lambda: run(adapter=tmp_path / "none"), "none")


def test_an_adapter_of_another_model(run, tmp_path):
  other = dataclasses.replace(_DECODER, layers=3)
  ones = lambda *shape: np.ones(shape, np.float32)
  factors = {"q": {"a": ones(3, 4, 32), "b": ones(3, 32, 4)}}
  convert.save_adapter(
      tmp_path / "start",
      {"layers": {"attention": factors}},
      config=other,
      rank=4,
      alpha=8.0,
      base="base",
  )
  _assert_refused(
      lambda: run(adapter=tmp_path / "start", lora_targets=("q",)),
      "which is no LoRA factor of a",
  )


def test_a_tokenizer_that_is_larger_than_the_model(run, tmp_path, params):
  model = _make_model(tmp_path, params, words=70)
  rows = [*_rows(2), {"prompt": "w5", "chosen": "w65", "rejected": "w6"}]
  pairs = _write(tmp_path / "pairs.jsonl", rows)
  _assert_refused(
      lambda: run(model=model, pairs=pairs),
      "row 3 of 3: the tokenizer of 70 tokens gives token 65, but the model has"
      " 60",
  )
  assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "pairs.jsonl holds no preference pair"),
        (
            [{"prompt": "w5", "chosen": "w6", "rejected": "w6"}],
            "no preference pair is left to train on: 1 pair skipped .1 equal",
        ),
    ],
)
def test_no_pair(run, tmp_path, rows, message):
  pairs = _write(tmp_path / "pairs.jsonl", rows)
  _assert_refused(lambda: run(pairs=pairs), message)


def test_nothing_is_overwritten(run, tmp_path):
  (tmp_path / "export").mkdir()
  _assert_refused(
      lambda: run(export=tmp_path / "export", model="/nowhere/x"),
      f"^--export={tmp_path}/export exists; name a new directory$",
  )


def test_devices_that_cannot_be_shared_out(run, tmp_path):
  _assert_refused(
      lambda: run(fsdp=3), "8 devices cannot be shared out by dpo.fsdp=3"
  )
  assert not (tmp_path / "workdir").exists()


@pytest.mark.slow
def test_a_workdir_of_another_model(run, narrow, tmp_path, capsys):
  run(steps=1)
  _assert_refused(
      lambda: run(steps=1, model=narrow),
      "workdir belongs to another training: weights was",
  )
  _assert_refused(
      lambda: run(steps=1, seed=1),
      "workdir belongs to another training: adapter was",
  )
