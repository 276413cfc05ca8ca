"""A row a leaf kind, the bytes that it has to move, and what went wrong."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "profile_merge.py"
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
# Numbers of a layer's tensors by shape; then those of the tensors in no layer.
_LAYER = {(16, 16): 2, (8, 16): 2, (24, 16): 2, (16, 24): 1, (16,): 2}
_OTHERS = {(37, 16): 2, (16,): 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory, random_params) -> pathlib.Path:
  path = tmp_path_factory.mktemp("profile") / "model"
  params = random_params(_DECODER)
  convert.save(
      path, _DECODER, jax.tree.map(lambda x: x.astype("float16"), params)
  )
  return path


def _check(result, layers, bytes_of):
  """Every tensor is in one row, which moves what `bytes_of` its size says."""
  expected = sorted(
      [(shape, n * layers) for shape, n in _LAYER.items()]
      + list(_OTHERS.items())
  )
  rows = sorted(result["rows"], key=lambda row: (row["shape"], row["tensors"]))
  expected.sort(key=lambda kind: (list(kind[0]), kind[1]))
  for row, (shape, n) in zip(rows, expected, strict=True):
    assert (tuple(row["shape"]), row["tensors"]) == (shape, n)
    assert row["bytes"] == n * bytes_of(math.prod(shape))
  total, triad = result["total"], result["triad_gb_per_s"]
  for key in ("tensors", "bytes", "ms", "compile_ms"):
    assert total[key] == pytest.approx(sum(row[key] for row in rows))
  for row in (*rows, total):
    rate = row["bytes"] / row["ms"] / 1e6
    assert row["gb_per_s"] == pytest.approx(rate)
    assert row["bandwidth_fraction"] == pytest.approx(rate / triad)
    assert row["ms"] > 0 and row["compile_ms"] >= 0
  assert result["copy_gb_per_s"] > 0 and triad > 0


@pytest.mark.slow
def test_a_row_a_leaf_kind(launch, model):
  out = launch(
      model=model,
      method="ties",
      parameter="density=0.3",
      dtype="float32",
      repeats=3,
  )
  source, setting, *table, last = out.splitlines()
  assert source == f"{model}, experts with noise: 2 of 2 layers timed"
  assert setting == "ties, weight 0.5, density 0.3; experts: 3, in float32"
  result = json.loads(last)
  assert result["parameters"] == {"density": 0.3, "weight": 0.5}
  assert result["dtype"] == "float32" and result["repeats"] == 3
  _check(result, 2, lambda size: (1 + 3 + 1) * 4 * size)
  assert sum(row["compile_ms"] for row in result["rows"]) > 0
  assert f"triad {result['triad_gb_per_s']:.1f} GB/s" in table[0]
  for row in result["rows"]:
    (line,) = (
        line
        for line in table
        if line.startswith("x".join(map(str, row["shape"])) + " ")
        and f" {row['leaves'][0].rpartition('/')[2]}" in line.replace(",", " ")
    )
    assert f"{row['ms']:.2f}" in line and f"{row['gb_per_s']:.1f}" in line


@pytest.mark.slow
def test_fewer_layers_and_no_base(launch, model):
  out = launch(
      model=model,
      method="linear",
      experts=2,
      parameter="weight=0.3,0.7",
      layers=1,
      repeats=3,
  )
  source, setting, *_ = out.splitlines()
  assert source.endswith(": 1 of 2 layers timed")
  assert setting == "linear, weight [0.3, 0.7]; experts: 2, in float16"
  result = json.loads(out.splitlines()[-1])
  assert result["parameters"] == {"weight": [0.3, 0.7]}
  _check(result, 1, lambda size: (2 + 1) * 2 * size)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_are_made_up(launch, model, method):
  out = launch(model=model, method=method, repeats=3)
  rows = json.loads(out.splitlines()[-1])["rows"]
  (down,) = (row for row in rows if row["leaves"] == ["layers/mlp/down"])
  statistic = 16 * 24 if method == "fisher" else 24 * 24
  assert down["bytes"] == 2 * ((3 + 1) * 2 * 16 * 24 + 3 * 4 * statistic)


@pytest.mark.slow
def test_a_trace_is_written(launch, model, tmp_path):
  launch(model=model, method="linear", repeats=3, trace_dir=tmp_path / "trace")
  (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
  assert b"37x16 embed" in trace.read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "either --model or --shape"),
        ({"shape": "mistral-7b", "model": "x"}, "either --model or --shape"),
        ({"model": "/nowhere/x"}, "/nowhere/x does not exist"),
        (
            {"shape": "stories-15m", "parameter": "density=2"},
            r"density is 2; it has to be in \(0, 1\]",
        ),
        (
            {"shape": "stories-15m", "parameter": "densty=2"},
            "ties has no parameter 'densty'",
        ),
        (
            {"shape": "stories-15m", "parameter": "density"},
            "--parameter=density is not like density=0.2",
        ),
        (
            {"shape": "stories-15m", "parameter": "density=high"},
            "--parameter=density=high is not like",
        ),
        ({"shape": "stories-15m", "layers": 7}, "--layers=7: there are 6"),
    ],
)
def test_bad_flags(launch, flags, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    launch(method="ties", **flags)
  assert "\n" not in str(caught.value)


def test_a_memory_that_is_too_small(launch, monkeypatch):
  monkeypatch.setattr(os, "sysconf", lambda name: 1000)
  with pytest.raises(
      errors.UserError, match=r"4\.8 GB are needed for --layers=1"
  ):
    launch(shape="mistral-7b", method="ties")


@pytest.mark.slow
def test_command_line():
  arguments = ["--shape=stories-15m", "--method=ties", "--repeats=3"]
  done = subprocess.run(
      [sys.executable, "-m", "launch.profile_merge", *arguments],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1])["dtype"] == "bfloat16"
