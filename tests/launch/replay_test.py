"""The command's flags, its last line and its exit status."""

import json
import pathlib

import pytest

from selfdev_jax import errors
from selfdev_jax.handover import reopen
from selfdev_jax.handover import replay

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "replay.py"
_SAME = {
    "model": "seed",
    "same_weights": True,
    "same_score": True,
    "answers_differing": 0,
    "splits": {},
}


@pytest.fixture
def computed(monkeypatch):
  """computed(result) lets the replay say that; returns what it was asked."""
  asked = {}

  def give(result):
    def run(workdir, **kwargs):
      asked.update(kwargs, workdir=workdir)
      return result

    monkeypatch.setattr(replay, "run", run)
    return asked

  monkeypatch.setattr(reopen, "read_config", lambda workdir: None)
  monkeypatch.setattr("selfdev_jax.tiny.world.prepare", lambda config: {})
  return give


def test_no_run(launch, tmp_path):
  with pytest.raises(errors.UserError, match="holds no run"):
    launch(workdir=tmp_path, program="best")


def test_either_of_the_two(launch, tmp_path):
  match = "^give either --program or --model$"
  with pytest.raises(errors.UserError, match=match):
    launch(workdir=tmp_path)
  with pytest.raises(errors.UserError, match=match):
    launch(workdir=tmp_path, program="best", model="seed")


def test_the_same(launch, computed):
  asked = computed(_SAME)
  out = launch(workdir="w", model="seed", split="test")
  assert json.loads(out.splitlines()[-1]) == _SAME
  assert asked["workdir"] == "w" and asked["program"] is None
  assert asked["model"] == "seed" and asked["split"] == "test"


@pytest.mark.parametrize(
    ("key", "value"),
    [("same_weights", False), ("same_score", False), ("answers_differing", 1)],
)
def test_a_difference_is_an_exit_status(launch, computed, capsys, key, value):
  computed(_SAME | {key: value})
  with pytest.raises(SystemExit) as left:
    launch(workdir="w", program="best")
  assert left.value.code == 1
  assert json.loads(capsys.readouterr().out.splitlines()[-1])[key] == value


def test_weights_that_are_not_known_do_not_differ(launch, computed):
  computed(_SAME | {"same_weights": None})
  launch(workdir="w", program="best")
