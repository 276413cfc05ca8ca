"""Eight fake CPU devices, strict dtypes, nothing fetched."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Half the time to compile, twice the time to run: right for small shapes.
jax.config.update("jax_disable_most_optimizations", True)

# A job that a script starts in the background ignores SIGINT, and so would all
# that Python sees of Ctrl-C here and in what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
  parser.addoption(
      "--kills",
      type=int,
      default=6,
      help="how often the test of killed runs kills one (6)",
  )
  parser.addoption(
      "--nodes",
      type=int,
      default=1,
      help="how many hosts the test of runs over several kills (1)",
  )


_WITHOUT_VLLM = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # After -m has chosen.
def pytest_collection_modifyitems(config, items):
  marked = [item for item in items if item.get_closest_marker("needs_vllm")]
  if not marked:
    return
  from selfdev_jax.sampling import vllm

  if vllm.is_installed():
    return
  config.stash[_WITHOUT_VLLM] = len(marked)
  for item in marked:
    item.add_marker(pytest.mark.skip("vLLM is not installed: make vllm-env"))


def pytest_terminal_summary(terminalreporter, config):
  skipped = config.stash.get(_WITHOUT_VLLM, 0)
  if skipped:
    terminalreporter.write_sep(
        "!",
        f"vLLM WAS NOT TESTED: {skipped} tests skipped; run make vllm-env",
        red=True,
        bold=True,
    )


@pytest.fixture(scope="session")
def random_params():
  """make(config) -> NumPy parameters; `models.init_params` compiles for 3 s.

  The norms' scales and biases are random too, which an initial model's are
  not.
  """
  from selfdev_jax import models

  def make(config):
    rng = np.random.default_rng(0)

    middle = 0.0 if config.unit_offset_norms else 1.0

    def draw(path, leaf):
      name = path[-1].key
      if name.endswith("norm"):
        scale = rng.uniform(middle - 0.5, middle + 0.5, leaf.shape)
        return scale.astype(np.float32)
      fan_in = leaf.shape[-1]
      std = 0.5 if name == "embed" or "bias" in name else fan_in**-0.5
      return rng.normal(0.0, std, leaf.shape).astype(np.float32)

    abstract = models.abstract_params(config)
    return jax.tree_util.tree_map_with_path(draw, abstract)

  return make


@pytest.fixture(scope="session")
def merging_here():
  """A context in which merges are made in this process: another takes seconds.

  It gives the MonkeyPatch that is undone at its end.
  """
  from selfdev_jax import convert
  from selfdev_jax.sandbox import runner

  def start(seed, directory, experts, scope, timeout_s):
    del directory, timeout_s
    trees = {name: convert.load(path)[1] for name, path in experts.items()}
    return contextlib.nullcontext(runner.Merges(seed, trees, scope))

  @contextlib.contextmanager
  def context():
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(runner, "Runner", start)
      yield patch

  return context


# The whole loop in miniature, run as a user runs it.

_ROOT = pathlib.Path(__file__).parents[1]
_PREPARE = """
from configs import smoke
from selfdev_jax import config
from selfdev_jax.tiny import world
world.prepare(config.from_config_dict(smoke.get_config()))
"""


def _as_a_user_has_it(cache):
  environment = dict(os.environ, SELFDEV_CACHE=str(cache))
  environment.pop("XLA_FLAGS", None)  # One device.
  return environment


@pytest.fixture(scope="session")
def smoke_cache(tmp_path_factory):
  """Where the smoke world is, already trained."""
  directory = tmp_path_factory.mktemp("cache")
  subprocess.run(
      [sys.executable, "-c", _PREPARE],
      cwd=_ROOT,
      env=_as_a_user_has_it(directory),
      check=True,
  )
  return directory


@pytest.fixture(scope="session")
def start_smoke():
  """start(workdir, cache, *overrides) -> the process of a run."""

  def start(workdir, cache, *overrides):
    command = [sys.executable, "-m", "launch.self_develop"]
    command += ["--config=configs/smoke.py", f"--workdir={workdir}", *overrides]
    return subprocess.Popen(
        command,
        cwd=_ROOT,
        env=_as_a_user_has_it(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

  return start


@pytest.fixture(scope="session")
def finish_smoke():
  """finish(process) -> (exit status, result without timings, its stderr)."""

  def finish(process):
    out, err = process.communicate(timeout=900)
    if process.returncode:
      return process.returncode, None, err
    result = json.loads(out.splitlines()[-1])
    del result["seconds"]
    return 0, result, err

  return finish
