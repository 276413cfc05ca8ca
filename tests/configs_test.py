"""Every file in configs/ is built, and says what --plan says."""

import pathlib
import re
import runpy

import pytest

from selfdev_jax import config as config_lib
from selfdev_jax.plan import cost
from selfdev_jax.plan import devices
from selfdev_jax.plan import estimate as estimate_lib
from selfdev_jax.plan import reading

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_FILES = sorted(_CONFIGS.glob("[!_]*.py"))
_CLASSES = {"dpo.py": config_lib.Dpo}
_TOY = ("smoke.py", "tiny.py", "dpo.py")
_LARGE = [path for path in _FILES if path.name not in _TOY]


def _build(path: pathlib.Path):
  tree = runpy.run_path(str(path))["get_config"]()
  cls = _CLASSES.get(path.name, config_lib.Config)
  return config_lib.from_config_dict(tree, cls)


def _estimate(config, device):
  """As --plan makes it where neither models nor data are at hand."""
  place = reading.Place(
      config.seed_model, None, config.seed_model.split("@")[0]
  )
  decoder, itemsize, _ = reading.shape(place, config)
  return estimate_lib.estimate(
      config,
      cost.Model(decoder, itemsize, config.merge.scope),
      reading.lengths(config, "no items", None),
      config.sampler,
      devices.DEVICES[device],
  )


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_is_built_and_says_how_it_is_run(path):
  config = _build(path)
  if isinstance(config, config_lib.Config):
    assert config.name == path.stem
  assert f"--config=configs/{path.name}" in runpy.run_path(str(path))["__doc__"]


@pytest.mark.parametrize("path", _LARGE, ids=lambda path: path.stem)
def test_the_docstring_has_the_plan_s_numbers(path):
  doc, config = runpy.run_path(str(path))["__doc__"], _build(path)
  (device,) = re.findall(r"--plan_device=(\S+)", doc)
  estimate = _estimate(config, device)
  hours = float(re.search(r"of (\d+)\s+GPU\s+hours", doc)[1])
  # Admission goes by this machine's cores.
  assert hours == pytest.approx(estimate.seconds / 3600, rel=0.05, abs=0.6)
  evaluate = re.search(r"merge and evaluate, 5 times +([\d.]+) +(\d+)", doc)
  (stage,) = (s for s in estimate.stages if s.name == "1 loop: evaluate")
  assert float(evaluate[1]) == pytest.approx(stage.seconds / 3600, abs=0.06)
  assert int(evaluate[2]) == round(stage.device_bytes / 1e9)
  assert estimate.device_bytes < devices.DEVICES[device].memory_bytes
  assert estimate.vllm_texts != 0


@pytest.mark.parametrize("path", _LARGE, ids=lambda path: path.stem)
def test_models_are_pinned_and_the_seed_s_shape_is_known(path):
  config = _build(path)
  for name in (config.seed_model, *config.experts):
    assert re.fullmatch(r"[\w.-]+/[\w.-]+@(main|[0-9a-f]{40})", name)


@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_the_paper_s_settings(name):
  """../shared/paper.md, "Settings" and "The loop"."""
  config = _build(_CONFIGS / f"paper_{name}.py")
  models = (config.seed_model, *config.experts)
  assert [model.split("@")[0] for model in models] == [
      "openchat/openchat-3.5-1210",
      "GAIR/Abel-7B-002",
      "teknium/OpenHermes-2.5-Mistral-7B",
      "SciPhi/SciPhi-Mistral-7B-32k",
  ]
  assert config.merge.scope == "mlp"
  assert (config.propose.samples, config.iterations) == (3000, 3)
  temperatures = [config.temperature(t) for t in (1, 2, 3)]
  assert temperatures == pytest.approx([1.2, 1.0, 0.857], abs=5e-4)
  settings = config.preferences
  assert (settings.top_fraction, settings.bottom_fraction) == (0.03, 0.10)
  assert (settings.elites, settings.invalid_fraction) == (3, 0.0)
  assert config.top_k == 15
  dpo = config.dpo
  assert (dpo.beta, dpo.learning_rate, dpo.lora_rank) == (0.01, 1e-6, 256)
  assert (dpo.loss, dpo.trains, dpo.sft_weight) == ("sigmoid", "lora", 0.0)
  assert config.evaluate.task == name
  assert config.evaluate.shots == 5
  assert config.evaluate.test_size == {"gsm8k": 1319, "math": 5000}[name]
