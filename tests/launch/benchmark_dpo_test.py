"""A tiny shape in all the processes; no time is right or wrong."""

import importlib.util
import json
import os
import pathlib
import runpy

from absl import flags as absl_flags
import numpy as np
import pytest

from selfdev_jax import errors

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "benchmark_dpo.py"
_OURS = ("ours padded", "ours shared")


@pytest.fixture
def trl():
  # Not imported: that costs seconds.
  for name in ("trl", "peft", "datasets", "torch"):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f"{name} is not installed")


@pytest.mark.slow
def test_tiny(trl, launch, tmp_path):
  *lines, last = launch(
      shape="tiny",
      ways="trl,ours padded,ours shared",
      splits="4:1",
      rounds=1,
      curve=8,
      workdir=tmp_path,
  ).splitlines()
  result = json.loads(last)
  assert result["max_loss_diff"] <= 5e-6
  assert result["max_grad_rel"] <= 5e-5
  assert result["max_curve_diff"] <= 5e-6
  assert result["parameters"] == 78_144
  assert result["threads"] == os.cpu_count()
  assert not list(tmp_path.iterdir())
  lora, full = result["comparisons"]
  assert (lora["trains"], full["trains"]) == ("lora", "full")
  for comparison in (lora, full):
    _check(comparison)
    theirs, (padded, shared) = (
        comparison["ways"]["trl"],
        (comparison["ways"][way] for way in _OURS),
    )
    ratio = theirs["peak_bytes"] / shared["peak_bytes"]
    assert result[f"ratio_memory_{comparison['trains']}"] == ratio
    if comparison is lora:
      for name, row in (("padded", padded), ("prefix", shared)):
        assert result[f"ratio_cpu_{name}"] == theirs["cpu_s"] / row["cpu_s"]
        assert result["splits"]["4:1"]["trl"] == "trl"
  for way in ("trl", *_OURS):
    assert sum(line.startswith(f"{way}  ") for line in lines) == 2
  assert sum(" and trl: loss " in line for line in lines) == 4


def _check(comparison):
  rows = comparison["ways"]
  assert list(rows) == ["trl", *_OURS]
  for row in rows.values():
    assert row["cpu_s"] > 0 and row["wall_s"] > 0
    assert 2**26 < row["imported_bytes"] < row["peak_bytes"]
  losses = np.array([comparison["curves"][way] for way in rows])
  assert losses.shape == (3, 8)
  # The first step's rate is 0, but it does learn, and the loss can differ.
  np.testing.assert_allclose(losses[:, 0], np.log(2), rtol=1e-6)
  assert (losses.min(axis=1) < np.log(2) - 5e-5).all()
  for row in comparison["parity"].values():
    assert row["start"]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert abs(row["moved"]["loss"] - np.log(2)) > 1e-3


@pytest.fixture
def script():
  """What the script defines; its flags are taken back."""
  before = set(absl_flags.FLAGS)
  yield runpy.run_path(str(SCRIPT), run_name="launched")
  for name in set(absl_flags.FLAGS) - before:
    delattr(absl_flags.FLAGS, name)


def test_gradients_that_are_not_finite_are_no_parity(script):
  theirs = {"a": np.ones(3), "b": np.zeros(2)}
  difference = script["_largest_difference"]
  assert difference({"a": np.full(3, 1.5), "b": np.zeros(2)}, theirs) == 0.5
  with pytest.raises(ValueError, match="of b is not finite"):
    difference({"a": np.ones(3), "b": np.array([np.nan, 0])}, theirs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ways": "trl,tlr"}, "--ways: no 'tlr'; there are trl, trl unche"),
        ({"trains": "qlora"}, "--trains: no 'qlora'; there are lora, full"),
        ({"splits": "4/1"}, "--splits: '4/1' is not like 4:1"),
        ({"curve": 4}, "are 7 steps; --curve, the schedule's length, is 4"),
    ],
)
def test_bad_flags(trl, launch, flags, message):
  with pytest.raises(errors.UserError, match=message):
    launch(**flags)
