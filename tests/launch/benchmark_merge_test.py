"""Rows of all kinds on tiny models; no time is right or wrong."""

import json
import os
import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest

from selfdev_jax import errors
from selfdev_jax import merging

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "benchmark_merge.py"


@pytest.fixture
def benchmark(request):
  """Runs it on the tiny shape; gives (lines, the JSON line)."""
  pytest.importorskip("mergekit")
  launch = request.getfixturevalue("launch")

  def run(**values):
    values = {"repeats": 1, "compile": False, "end_to_end": False} | values
    *lines, last = launch(shape="tiny", **values).splitlines()
    return lines, json.loads(last)

  return run


@pytest.fixture
def script():
  pytest.importorskip("mergekit")
  from absl import flags

  before = set(flags.FLAGS)
  yield runpy.run_path(str(SCRIPT), run_name="launched")
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)


def _check(row):
  gb_per_s = row["bandwidth_fraction"] * row["triad_gb_per_s"]
  nbytes = 1e6 * gb_per_s * row["ours_ms"]
  itemsize = 2 if row["dtype"] == "bfloat16" else 4
  size = 19_616
  assert nbytes == pytest.approx((row["inputs"] + 1) * itemsize * size)
  assert row["ratio_mergekit"] == row["mergekit_ms"] / row["ours_ms"]
  if row["torch_ms"] is None:
    assert row["ratio_torch"] is None and not row["torch_forms_ms"]
  else:
    assert row["torch_ms"] == min(row["torch_forms_ms"].values())
    assert row["ratio_torch"] == row["torch_ms"] / row["ours_ms"]


@pytest.mark.slow
def test_a_row_a_method_and_dtype(benchmark):
  names = "task_arithmetic,ties,nuslerp,passthrough"
  lines, result = benchmark(methods=names)
  rows = result["rows"]
  found = [(row["method"], row["dtype"]) for row in rows]
  assert found == [
      (method, dtype)
      for dtype in ("bfloat16", "float32")
      for method in (
          "task_arithmetic",
          "ties",
          "ties exact_k",
          "nuslerp",
          "passthrough",
      )
  ]
  assert [row["inputs"] for row in rows] == 2 * [4, 4, 4, 3, 1]
  for row, line in zip(rows, lines[2:], strict=True):
    _check(row)
    assert line.startswith(row["method"]) and f"{row['ours_ms']:.2f}" in line
    assert ("two_pass_fraction" in row) == row["method"].startswith("ties")
    assert ("note" in row) == (row["method"] == "passthrough")
  ties = rows[1]
  assert ties["two_pass_fraction"] == pytest.approx(
      ties["bandwidth_fraction"] * 9 / 5
  )
  assert result["threads"] == os.cpu_count()
  assert result["parameters"] == 19_616 and result["end_to_end"] is None


@pytest.mark.slow
def test_a_row(benchmark):
  lines, result = benchmark(methods="nearswap", dtypes="float32")
  (row,) = result["rows"]
  _check(row)
  assert row["torch_form"] == "eager float32" and row["inputs"] == 2
  header, _, line = lines
  assert header.startswith("method") and line.startswith("nearswap")


def test_all_of_mergekits_methods(script):
  """That both have, but for those that learn."""
  registry = pytest.importorskip("mergekit.merge_methods.registry")
  theirs = {method.spec.name for method in registry.registered_methods()}
  assert set(script["_PARAMETERS"]) == theirs & merging.METHODS.keys()


@pytest.mark.slow
def test_torchs_forms_compute_the_same(script):
  """Or their times would say nothing."""
  import torch

  rng = np.random.default_rng(1)
  config, _ = script["_SHAPES"]["tiny"]
  base = script["_draw"](rng, config)
  trees = [base] + [script["_draw"](rng, config, base) for _ in range(3)]
  for row, name, extra in script["_cases"](script["_PARAMETERS"]):
    method = merging.METHODS[name]
    count = min(3, method.max_experts or 3)
    takes_base = method.base != "ignored"
    if row not in script["_FORMS"]:
      continue
    wanted = merging.merge(
        name,
        base if takes_base else None,
        trees[1 : 1 + count],
        **script["_PARAMETERS"][name],
        **extra,
    )
    wanted = script["_to_torch"](jax.tree.map(np.array, wanted), "float32")
    tensors = [
        script["_to_torch"](tree, "float32")
        for tree in trees[0 if takes_base else 1 : 1 + count]
    ]
    for call in script["_torch_ways"](row, tensors, False).values():
      call()
      outs = call.args[0]
      for out, like in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, like, rtol=0, atol=1e-6, msg=row)


@pytest.mark.slow
def test_end_to_end(benchmark, tmp_path):
  lines, result = benchmark(
      methods="passthrough", dtypes="float32", end_to_end=True, workdir=tmp_path
  )
  found = result["end_to_end"]
  assert set(found["recipes"]) == {"task_arithmetic", "ties"}
  least = min(found["recipes"].values(), key=lambda row: row["ratio"])
  assert {**found, "recipes": None} == {**least, "recipes": None}
  for row in found["recipes"].values():
    assert row["ratio"] == row["mergekit_s"] / row["ours_s"]
    for whose in ("ours", "mergekit"):
      assert row[f"{whose}_import_s"] > 0
      anonymous = row[f"{whose}_peak_anonymous_bytes"]
      assert 2**25 < anonymous < row[f"{whose}_peak_bytes"]
  assert lines[-1].startswith("ties") and not list(tmp_path.iterdir())


def test_a_command_that_fails_says_why(script, tmp_path):
  command = [sys.executable, "-c", "print('so'); raise SystemExit('no room')"]
  with pytest.raises(errors.UserError, match="failed: no room"):
    script["_run"](command, tmp_path / "log")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"methods": "ties,tise"}, "--methods: no 'tise'; there are linear,"),
        ({"dtypes": "int8"}, "--dtypes: no 'int8'; there are bfloat16,"),
    ],
)
def test_bad_flags(benchmark, flags, message):
  with pytest.raises(errors.UserError, match=message):
    benchmark(**flags)


@pytest.fixture
def no_mergekit(monkeypatch):
  monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
  monkeypatch.setitem(sys.modules, "mergekit", None)


def test_without_the_bench_extra(no_mergekit, launch):
  with pytest.raises(
      errors.UserError, match=r"mergekit.* not installed: pip install -e"
  ) as caught:
    launch()
  assert "\n" not in str(caught.value)
