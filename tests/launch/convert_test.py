"""There and back is bit by bit the same; what cannot be is one line."""

import filecmp
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.tiny import corpus

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "convert.py"
_DECODER = models.DecoderConfig(
    vocab_size=37,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    max_positions=128,
)


@pytest.fixture(scope="module")
def params(random_params):
  return jax.tree.map(lambda x: x.astype(np.float16), random_params(_DECODER))


@pytest.fixture(scope="module")
def model(tmp_path_factory, params) -> pathlib.Path:
  """A model with its tokenizer and a config.json of its own."""
  root = tmp_path_factory.mktemp("model")
  corpus.save_tokenizer(
      corpus.train_tokenizer([corpus.Document("a b", "c")], 300),
      root / "tokenizer",
  )
  (root / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
  convert.save(root / "model", _DECODER, params, like=root / "tokenizer")
  path = root / "model" / "config.json"
  path.write_text(path.read_text().replace("{", '{"own":   1,', 1))
  return root / "model"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("adapter") / "adapter"
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  factors = {"q": {"a": draw(2, 3, 16), "b": draw(2, 16, 3)}}
  convert.save_adapter(
      path,
      {"layers": {"attention": factors}},
      config=_DECODER,
      rank=3,
      alpha=6.0,
      base="base",
  )
  return path


def _assert_same_directory(one, two):
  """As `diff -r`."""
  names = sorted(p.name for p in one.iterdir())
  assert names == sorted(p.name for p in two.iterdir())
  assert len(names) == 6  # Nothing was lost before it was compared.
  assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


def test_there_and_back(launch, model, tmp_path):
  line = launch(hf=model, out=tmp_path / "orbax")
  count = sum(
      np.prod(x.shape)
      for x in jax.tree.leaves(models.abstract_params(_DECODER))
  )
  assert line.startswith(f"{tmp_path}/orbax: mistral, {count:,} parameters,")
  assert "float16" in line and line.count("\n") == 1
  launch(flax=tmp_path / "orbax", out=tmp_path / "back")
  _assert_same_directory(model, tmp_path / "back")


@pytest.mark.slow
def test_an_adapter_is_applied(launch, model, adapter, params, tmp_path):
  """On the way to Orbax, and on the way from it."""
  launch(hf=model, adapter=adapter, out=tmp_path / "applied")
  launch(flax=tmp_path / "applied", out=tmp_path / "one")
  launch(hf=model, out=tmp_path / "orbax")
  launch(flax=tmp_path / "orbax", adapter=adapter, out=tmp_path / "two")
  _assert_same_directory(tmp_path / "one", tmp_path / "two")
  loaded = convert.load_adapter(adapter, _DECODER)
  expected = jax.tree.map(np.asarray, convert.apply_adapter(params, loaded))
  _, got = convert.load(tmp_path / "one")
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  q = params["layers"]["attention"]["q"]
  assert (np.asarray(got["layers"]["attention"]["q"]) != q).mean() > 0.9


@pytest.mark.parametrize("both", [False, True])
def test_either_of_the_two(launch, model, tmp_path, both):
  given = {"hf": model, "flax": model} if both else {}
  with pytest.raises(errors.UserError, match="either --hf or --flax"):
    launch(out=tmp_path / "out", **given)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_nothing_is_overwritten(launch, model, tmp_path, kind):
  out = tmp_path / "out"
  out.mkdir() if kind == "directory" else out.write_text("x")
  with pytest.raises(errors.UserError, match=f"--out={out} exists"):
    launch(hf=model, out=out)
  assert list(tmp_path.rglob("*")) == [out]


def test_the_directions_are_told_apart(launch, model, tmp_path):
  with pytest.raises(errors.UserError, match="is no checkpoint of launch"):
    launch(flax=model, out=tmp_path / "out")
  launch(hf=model, out=tmp_path / "orbax")
  with pytest.raises(errors.UserError, match="no Hugging Face model directory"):
    launch(hf=tmp_path / "orbax", out=tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--hf=/nowhere/x"], "Flag --out must have a value"),
        (
            ["--hf=/nowhere/x", "--out=/tmp/never"],
            "error: model directory /nowhere/x does not exist\n",
        ),
    ],
)
@pytest.mark.slow
def test_command_line(arguments, line):
  done = subprocess.run(
      [sys.executable, "-m", "launch.convert", *arguments],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
  )
  assert done.returncode != 0
  assert line in done.stderr, done.stderr
  assert "Traceback" not in done.stderr
