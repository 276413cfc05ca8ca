"""The dashboard as a user starts and ends it."""

import importlib.util
import pathlib
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request

import pytest

from selfdev_jax import dashboard
from selfdev_jax import errors
from selfdev_jax import storage
from selfdev_jax import store as store_lib
from selfdev_jax.dashboard import overview
from selfdev_jax.dashboard import server

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "dashboard.py"


@pytest.fixture(name="workdir", scope="module")
def workdir_fixture(tmp_path_factory):
  spec = importlib.util.spec_from_file_location(
      "report_archive", _ROOT / "tests" / "report" / "conftest.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  workdir = tmp_path_factory.mktemp("run")
  module.build(workdir, "admitted").close()
  return workdir


def _start(*flags):
  return subprocess.Popen(
      [sys.executable, "-m", "launch.dashboard", *flags],
      cwd=_ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


@pytest.mark.slow
def test_answers_until_ctrl_c(workdir):
  with _start(f"--workdir={workdir}", "--port=0") as process:
    line = process.stdout.readline()
    (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", line)
    with urllib.request.urlopen(address) as answer:
      assert b"Self-Developing run" in answer.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
  assert process.returncode == 0
  assert out == "" and err.strip() == f"Reading {workdir}"


def test_a_run_at_a_url(launch, workdir, tmp_path, monkeypatch):
  """What is pushed meanwhile is shown."""
  monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
  url = (tmp_path / "bucket").as_uri()
  with storage.open_workdir(url) as (run, push):
    shutil.copytree(workdir, run, dirs_exist_ok=True)
    push()

    def serve(copy, host, port):
      assert (host, port) == ("127.0.0.1", 8642)
      archive = overview.Archive(copy)
      with archive.read() as store:
        assert store.config().name == "t"
      state = archive.state()
      with sqlite3.connect(run / store_lib.ARCHIVE) as db:
        db.execute(
            "UPDATE meta SET value = json_set(value, '$.name', 'after')"
            " WHERE key = 'config'"
        )
      db.close()
      push()
      deadline = time.monotonic() + 20
      while archive.state() == state:
        assert time.monotonic() < deadline
        time.sleep(0.02)
      with archive.read() as store:
        assert store.config().name == "after"
      served.append(copy)

    served, fetch = [], storage.fetch
    monkeypatch.setattr(dashboard, "serve", serve)
    sooner = lambda path, every_s: fetch(path, every_s=every_s / 1000)
    monkeypatch.setattr(storage, "fetch", sooner)
    launch(workdir=url)
    assert served


@pytest.mark.slow
def test_a_workdir_without_a_run_is_one_line(tmp_path):
  with _start(f"--workdir={tmp_path}", "--port=0") as process:
    _, err = process.communicate(timeout=60)
  assert process.returncode == 2
  assert err.splitlines()[-1].startswith(f"error: {tmp_path} holds no run")
  assert "Traceback" not in err


def test_a_port_in_use_names_the_flag(workdir):
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(errors.UserError, match=rf"port {port} .*--port"):
      server.serve(workdir, "127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "line"),
    [
        ("nowhere.invalid", "--host=nowhere.invalid is no address"),
        ("203.0.113.7", "--host=203.0.113.7 is no address"),
        ("a..b", "--host=a..b is no address"),
        ("x" * 300, "is no address"),
        ("\ud800", "is no address"),
    ],
)
def test_what_cannot_be_listened_on(workdir, host, line):
  with pytest.raises(errors.UserError, match=line):
    server.serve(workdir, host, 0)


def test_a_run_that_is_not_there_takes_no_port(tmp_path):
  with pytest.raises(store_lib.StoreError, match="holds no run"):
    server.serve(tmp_path, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("host", "names"),
    [
        ("127.0.0.1", ("127.0.0.1",)),
        ("0.0.0.0", ("0.0.0.0", socket.gethostname())),
    ],
)
def test_only_loopback_is_quiet(workdir, monkeypatch, capsys, host, names):
  asked = []
  monkeypatch.setattr(
      server.app, "application", lambda _, names: asked.append(names)
  )
  monkeypatch.setattr(server.uvicorn.Server, "run", lambda *_, **__: None)
  server.serve(workdir, host, 0)
  assert asked == [names]
  warned = "whoever reaches it can read" in capsys.readouterr().err
  assert warned == (host == "0.0.0.0")
