import dataclasses
import importlib.util
import pathlib

import pytest

from selfdev_jax import config as config_lib

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = sorted(
    path for path in (_ROOT / "configs").glob("*.py") if path.stem != "__init__"
)


def _minimal(**changes):
  base = {"name": "x", "seed_model": "seed", "experts": ("a", "b")}
  return base | changes


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_every_config_builds_and_is_locked(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  tree = module.get_config()
  assert tree.is_locked
  config = config_lib.from_config_dict(tree)
  assert hash(config) == hash(config_lib.from_config_dict(tree))
  assert str(path.relative_to(_ROOT)) in module.__doc__


def test_round_trip_keeps_every_key():
  config = config_lib.Config(
      name="x", seed_model="s", experts=("a",), tiny=config_lib.World()
  )
  tree = config_lib.to_config_dict(config)
  assert config_lib.from_config_dict(tree) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (_minimal(dpo={"bta": 0.1}), "'dpo.bta'; did you mean 'dpo.beta'?"),
        (_minimal(sede=1), "'sede'; did you mean 'seed'?"),
        ({"name": "x", "experts": ()}, "'seed_model' is missing"),
        (_minimal(dpo={"beta": "x"}), "'dpo.beta' takes float, not 'x'"),
        (_minimal(seed=True), "'seed' takes int, not True"),
        (_minimal(seed=1.5), "'seed' takes int, not 1.5"),
        (_minimal(experts="a,b"), "'experts' takes a tuple, not 'a,b'"),
        (_minimal(experts=("a", 3)), r"'experts\[1\]' takes str, not 3"),
        (_minimal(dpo=3), "'dpo' takes a group of keys, not 3"),
        (_minimal(dpo={"beta": -1.0}), "'dpo.beta' is -1.0; .* at least 0.0"),
        (_minimal(dpo={"beta": float("nan")}), "'dpo.beta' is nan"),
        (
            _minimal(preferences={"top_fraction": 1.5}),
            r"'preferences.top_fraction' is 1.5; it has to be in \[0.0, 1.0\]",
        ),
        (
            _minimal(merge={"scope": "mpl"}),
            "'merge.scope' is 'mpl'; it takes one of 'mlp', 'all' .*'mlp'",
        ),
        (_minimal(tiny={"kind": "structure"}), "did you mean 'structured'"),
    ],
)
def test_bad_config_is_one_line_with_the_key(tree, message):
  with pytest.raises(config_lib.ConfigError, match=message) as error:
    config_lib.from_config_dict(tree)
  assert "\n" not in str(error.value)


def test_an_int_does_for_a_float():
  config = config_lib.from_config_dict(_minimal(dpo={"beta": 1}))
  assert isinstance(config.dpo.beta, float)


def test_temperature_is_the_papers():
  config = config_lib.from_config_dict(_minimal())
  found = [round(config.temperature(t), 3) for t in (1, 2, 3)]
  assert found == [1.2, 1.0, 0.857]


def test_digest_changes_with_any_value():
  world = config_lib.World()
  other = dataclasses.replace(world, seed=1)
  assert config_lib.digest(world) == config_lib.digest(config_lib.World())
  assert config_lib.digest(world) != config_lib.digest(other)
