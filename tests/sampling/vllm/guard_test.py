"""No process outlives the one that started it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from selfdev_jax.sampling.vllm import guard

_GUARD = pathlib.Path(guard.__file__)
# Says its process id in a file, and sleeps.
_SLEEPER = """
import os, pathlib, signal, sys, time
{do}
path = pathlib.Path(sys.argv[1])
path.with_suffix(".partial").write_text(str(os.getpid()))
path.with_suffix(".partial").rename(path)
time.sleep(600)
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
  """started(command) -> the guard of that command."""
  # With the site's packages each start would take longer.
  monkeypatch.setenv("PYTHONNOUSERSITE", "1")
  running = []

  def start(*command):
    running.append(
        subprocess.Popen(
            [sys.executable, "-I", _GUARD, *command], stdin=subprocess.PIPE
        )
    )
    return running[-1]

  yield start
  for process in running:
    process.stdin.close()
    process.kill()
    process.wait()


def _python(script, *arguments):
  script = textwrap.dedent(script)
  return [sys.executable, "-I", "-S", "-c", script, *map(str, arguments)]


def _sleeper(path, do=""):
  return _python(_SLEEPER.format(do=do), path)


def _pid(path):
  for _ in range(200):
    if path.exists():
      return int(path.read_text())
    time.sleep(0.05)
  raise AssertionError(f"{path} did not come")


_STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.mark.slow
def test_all_that_descend_end_when_the_pipe_closes(
    started, tmp_path, monkeypatch, await_end
):
  kinds = {
      "plain": "",
      "stubborn": _STUBBORN,
      "session": "os.setsid()",
      "both": f"os.setsid(); {_STUBBORN}",
      "orphan": "os.fork() and os._exit(0); os.setsid(); os.fork() and"
      " os._exit(0)",
  }
  commands = [_sleeper(tmp_path / kind, do) for kind, do in kinds.items()]
  parent = _python(
      """
      import json, subprocess, sys, time
      for command in json.loads(sys.argv[1]):
        subprocess.Popen(command)
      time.sleep(600)
      """,
      json.dumps(commands),
  )
  process = started(*parent)
  pids = [_pid(tmp_path / kind) for kind in kinds]
  began = time.monotonic()
  process.stdin.close()
  assert process.wait(20) == 0
  await_end([process.pid, *pids], seconds=0.0)
  # Two ignored what they were asked.
  assert guard._GRACE_S <= time.monotonic() - began < guard._GRACE_S + 5


def test_who_listens_ends_at_once(started, tmp_path, await_end):
  process = started(*_sleeper(tmp_path / "pid"))
  pid = _pid(tmp_path / "pid")
  began = time.monotonic()
  process.stdin.close()
  assert process.wait(20) == 0
  assert time.monotonic() - began < guard._GRACE_S - 1
  await_end([pid], seconds=0.0)


def test_the_end_of_who_holds_the_pipe_is_enough(tmp_path, await_end):
  command = [sys.executable, "-I", str(_GUARD), *_sleeper(tmp_path / "pid")]
  holder = subprocess.Popen(
      _python(
          """
          import json, subprocess, sys, time
          process = subprocess.Popen(
              json.loads(sys.argv[1]), stdin=subprocess.PIPE,
              start_new_session=True)
          print(process.pid, flush=True)
          time.sleep(600)
          """,
          json.dumps(command),
      ),
      stdout=subprocess.PIPE,
  )
  with holder:
    pids = [int(holder.stdout.readline()), _pid(tmp_path / "pid")]
    holder.kill()
  await_end(pids)


def test_the_end_of_the_guard_ends_the_command(started, tmp_path, await_end):
  process = started(*_sleeper(tmp_path / "pid"))
  pid = _pid(tmp_path / "pid")
  process.kill()
  await_end([pid])


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", 128 + 9),
        ("import os; os.kill(os.getpid(), 15)", 128 + 15),
        ("import os; os.kill(os.getpid(), 2)", 128 + 2),
    ],
)
def test_the_status_of_the_command_is_passed_on(started, script, status):
  if "2)" in script:  # Python's own handler would turn it into status 130.
    script = f"import signal; signal.signal(2, signal.SIG_DFL); {script}"
  process = started(*_python(script))
  assert process.wait(10) == status


def test_children_end_with_a_command_that_ended(started, tmp_path, await_end):
  command = _python(
      """
      import json, os, subprocess, sys, time
      subprocess.Popen(json.loads(sys.argv[1]))
      while not os.path.exists(sys.argv[2]):
        time.sleep(0.02)
      sys.exit(7)
      """,
      json.dumps(_sleeper(tmp_path / "pid", "os.setsid()")),
      tmp_path / "pid",
  )
  process = started(*command)
  pid = _pid(tmp_path / "pid")
  assert process.wait(10) == 7
  await_end([pid], seconds=0.0)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
)
def test_the_guard_itself_ignores_what_a_terminal_sends(
    started, tmp_path, number
):
  process = started(*_sleeper(tmp_path / "pid"))
  pid = _pid(tmp_path / "pid")
  process.send_signal(number)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(0.3)
  assert pathlib.Path(f"/proc/{pid}").exists()


def test_the_command_takes_signals_as_usual(started, tmp_path):
  process = started(*_sleeper(tmp_path / "pid"))
  os.kill(_pid(tmp_path / "pid"), signal.SIGTERM)
  assert process.wait(10) == 128 + signal.SIGTERM


def test_what_lies_in_the_directory_of_sockets_goes_too(started, tmp_path):
  path = tmp_path / "where"
  script = """
      import os, pathlib, sys
      sockets = pathlib.Path(os.environ["VLLM_RPC_BASE_PATH"])
      (sockets / "left").touch()
      pathlib.Path(sys.argv[1]).write_text(str(sockets))
  """
  process = started(*_python(script, path))
  assert process.wait(10) == 0
  assert path.read_text() and not pathlib.Path(path.read_text()).exists()
