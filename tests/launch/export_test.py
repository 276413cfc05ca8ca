"""The command without a run; tests/handover/smoke_test.py has it with one."""

import pathlib

import pytest

from selfdev_jax import errors

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "export.py"


def test_no_run(launch, tmp_path):
  with pytest.raises(errors.UserError, match="holds no run") as error:
    launch(workdir=tmp_path, out=tmp_path / "out")
  assert "\n" not in str(error.value)
