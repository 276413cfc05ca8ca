"""Eight fake CPU devices, strict dtypes, nothing fetched."""

import os

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
