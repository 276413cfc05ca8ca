"""The small archive of the report's tests, served to a browser."""

import contextlib
import importlib.util
import pathlib
import shutil
import socket
import threading

import pytest
import uvicorn

from selfdev_jax.dashboard import app

_REPORT = pathlib.Path(__file__).parents[1] / "report" / "conftest.py"


@pytest.fixture(scope="session")
def small():
  """The module that builds it: `build`, `score`, `CONFIG`, `HOSTILE`."""
  spec = importlib.util.spec_from_file_location("report_archive", _REPORT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small):
  """The workdir of a finished run; not to be changed."""
  workdir = tmp_path_factory.mktemp("finished")
  small.build(workdir).close()
  return workdir


@pytest.fixture(scope="session")
def serving():
  """serving(workdir) -> a context in which its dashboard has an address."""

  @contextlib.contextmanager
  def serve(workdir):
    with socket.create_server(("127.0.0.1", 0)) as listener:
      server = uvicorn.Server(
          uvicorn.Config(app.application(workdir), log_config=None)
      )
      thread = threading.Thread(target=server.run, args=([listener],))
      thread.start()
      try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
      finally:
        server.should_exit = True
        thread.join()

  return serve


@pytest.fixture(scope="session")
def browser():
  """A headless Chromium."""
  path = next(
      filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None
  )
  if path is None:
    pytest.skip("no Chromium is installed: apt-get install chromium")
  sync_api = pytest.importorskip("playwright.sync_api")
  with sync_api.sync_playwright() as playwright:
    chromium = playwright.chromium.launch(
        executable_path=path, args=["--no-sandbox"]
    )
    yield chromium
    chromium.close()
