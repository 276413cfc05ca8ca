"""A small archive through all of it; no time is right or wrong."""

import json
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "benchmark_archive.py"


@pytest.mark.slow
def test_small(launch, tmp_path):
  ask = lambda: launch(
      programs=200, answers=20_000, repeats=1, workdir=tmp_path
  )
  *lines, last = ask().splitlines()
  result = json.loads(last)
  assert 200 <= result["programs"] <= 219
  assert result["bytes"] == (tmp_path / "archive.sqlite").stat().st_size
  assert 50 < result["bytes_per_answer"] < 500
  assert 3000 < result["bytes_per_program"] < 9000
  for kind in ("query", "inspect"):
    seconds = result[f"{kind}_s"]
    assert result[f"slowest_{kind}_s"] == max(seconds.values()) > 0
    assert result[f"{kind}_cpu_s"].keys() == seconds.keys()
    for name in seconds:
      assert any(line.startswith(f"{kind:>8} {name} ") for line in lines)
  assert result["dashboard"]["requests"] > 3
  for cost in result["writes"].values():
    assert {*cost} == {"add_completions", "add_verdict", "add_score"}
    assert all(0 < c["median_ms"] <= c["p99_ms"] for c in cost.values())
  made = (tmp_path / "archive.sqlite").read_bytes()
  ask()  # What is there is used as it is.
  assert (tmp_path / "archive.sqlite").read_bytes() == made
  assert {p.name for p in tmp_path.iterdir()} <= {
      f"archive.sqlite{end}" for end in ("", "-wal", "-shm")
  }
