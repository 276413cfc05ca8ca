"""`launch.self_develop --plan`: what it prints, and that it does nothing."""

import json
import pathlib

import pytest

from configs import smoke
from selfdev_jax import config as config_lib
from selfdev_jax import errors

_ROOT = pathlib.Path(__file__).parents[2]
# What ml_collections does to read a config.
pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning"
)

SCRIPT = _ROOT / "launch" / "self_develop.py"


@pytest.fixture
def plan(launch, monkeypatch, tmp_path):
  """plan(config, ...) -> (text, JSON); nothing of this machine's cache."""
  monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))

  def run(name, **flags):
    out = launch(
        config=_ROOT / "configs" / name,
        workdir=tmp_path / "run",
        plan=True,
        **flags,
    )
    *text, last = out.splitlines()
    return "\n".join(text), json.loads(last)

  return run


def test_of_the_toy_world(plan, tmp_path):
  text, found = plan("smoke.py")
  config = config_lib.from_config_dict(smoke.get_config())
  assert found["config"] == config_lib.digest(config)
  assert found["missing"] == 0 and found["gpu_hours"] is None
  # The real sandbox was started.
  (box,) = (c for c in found["checks"] if c["what"] == "sandbox")
  assert "seccomp" in box["found"]
  assert "1 loop: refine" in text and "Checks" in text
  assert not list(tmp_path.iterdir())  # Nothing was written.


def test_of_the_paper_s_run(plan, capsys, tmp_path):
  with pytest.raises(errors.UserError, match=r"\d of \d+ things .* missing"):
    plan("paper_gsm8k.py", plan_device="H200")
  *text, last = capsys.readouterr().out.splitlines()
  found = json.loads(last)
  assert 10 < found["gpu_hours"] < 40
  assert found["device_bytes"] < 141e9
  assert found["model"]["parameters"] == 7_241_748_480
  statuses = {check["what"]: check["status"] for check in found["checks"]}
  assert statuses["model openchat/openchat-3.5-1210@main"] == "missing"
  assert statuses["device memory"] == "ok"
  assert any(line.startswith(" missing  accelerator") for line in text)
  assert not list(tmp_path.iterdir())
