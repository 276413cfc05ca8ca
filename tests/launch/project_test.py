"""`launch.project`: its table, its JSON, and what it refuses."""

import json
import pathlib

import pytest

from selfdev_jax import errors

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "project.py"
# What ml_collections does to read a config.
pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning"
)


@pytest.fixture
def project(launch, monkeypatch, tmp_path):
  """project(config, ...) -> (lines, JSON)."""
  monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))

  def run(name="paper_gsm8k.py", **flags):
    *lines, last = launch(config=_ROOT / "configs" / name, **flags).splitlines()
    return lines, json.loads(last)

  return run


def test_the_paper_s_run_and_a_larger_one(project):
  lines, found = project(
      gpus="8,64,512", times="1,100", dollars_per_gpu_hour=2.5
  )
  rows = found["rows"]
  assert [(r["times"], r["gpus"], r["hosts"]) for r in rows] == [
      (times, gpus, gpus // 8) for times in (1, 100) for gpus in (8, 64, 512)
  ]
  table = [line for line in lines if line.startswith("|")]
  assert len(table) == 2 + len(rows)
  assert len({line.count(" | ") for line in table}) == 1
  for row, line in zip(rows, table[2:], strict=True):
    assert row["dollars"] == pytest.approx(2.5 * row["gpu_hours"])
    assert f"| x {row['times']} | {row['gpus']} |" in line
    assert f"{row['gpu_hours']:,.1f}" in line
  # Estimates are not passed off as measurements.
  assert any("no GPU was measured" in line for line in lines)
  assert all(f"- {said}" in lines for said in found["assumed"])


def test_no_dollars_without_a_price(project):
  lines, found = project(gpus="8")
  assert found["rows"][0]["dollars"] is None
  assert not any("dollars" in line for line in lines)


def test_a_device_that_is_too_small_is_said_to_be(project):
  _, found = project(gpus="8", device="L4-24GB")
  assert any("would not fit" in said for said in found["assumed"])
  _, found = project(gpus="8")
  assert not any("would not fit" in said for said in found["assumed"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"gpus": "8,x"}, "--gpus takes whole numbers .* not 'x'"),
        ({"gpus": "0"}, "--gpus takes"),
        ({"gpus": "8,-8"}, "--gpus takes"),
        ({"times": "1.5"}, "--times takes"),
        ({"times": "9" * 5000}, "at most 9 digits"),
        ({"gpus": ""}, "--gpus is empty"),
        ({"dollars_per_gpu_hour": "nan"}, "give a price"),
        ({"name": "tiny.py"}, "toy world.*paper_gsm8k"),
    ],
)
def test_what_is_refused(project, flags, says):
  with pytest.raises(errors.UserError, match=says) as caught:
    project(**flags)
  assert "\n" not in str(caught.value)


def test_a_model_of_which_nothing_is_known(project, tmp_path):
  config = tmp_path / "unknown.py"
  paper = (_ROOT / "configs" / "paper_gsm8k.py").read_text("utf-8")
  config.write_text(
      paper.replace("openchat/openchat-3.5-1210@main", "org/name"), "utf-8"
  )
  with pytest.raises(errors.UserError, match="shape of org/name"):
    project(config)
