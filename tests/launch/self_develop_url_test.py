"""A whole run whose workdir is at a URL, and a machine that is lost."""

import json
import shutil
import signal
import time

import pytest


def _pushed(bucket):
  """How many states were."""
  try:
    return json.loads((bucket / "MANIFEST.json").read_text())["generation"]
  except FileNotFoundError:
    return 0


@pytest.mark.slow
def test_another_machine_ends_what_one_began(
    start_smoke, finish_smoke, smoke_cache, tmp_path
):
  """kill -9 once stages are pushed; the same command, where nothing is."""
  _, expected, err = finish_smoke(start_smoke(tmp_path / "local", smoke_cache))
  assert expected, err
  bucket = tmp_path / "bucket"
  for name in ("lost", "new"):
    shutil.copytree(smoke_cache, tmp_path / name)
  process = start_smoke(bucket.as_uri(), tmp_path / "lost")
  deadline = time.monotonic() + 300
  while _pushed(bucket) < 4:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  shutil.rmtree(tmp_path / "lost")
  status, result, err = finish_smoke(
      start_smoke(bucket.as_uri(), tmp_path / "new")
  )
  assert status == 0, err
  assert result == expected
  assert "was fetched into" in err
