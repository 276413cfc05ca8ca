import dataclasses
import importlib.util
import pathlib

import pytest

from selfdev_jax import config as config_lib

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = sorted(
    path for path in (_ROOT / "configs").glob("*.py") if path.stem != "__init__"
)
# The others hold a `Config`.
_CLASSES = {"dpo": config_lib.Dpo}


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
  cls = _CLASSES.get(path.stem, config_lib.Config)
  config = config_lib.from_config_dict(tree, cls)
  assert isinstance(config, cls)
  assert hash(config) == hash(config_lib.from_config_dict(tree, cls))
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
        (
            _minimal(dpo={"batch_size": 6, "parts": 4}),
            "'dpo.parts' is 4; it has to divide 'dpo.batch_size', 6",
        ),
        (_minimal(dpo={"parts": 0}), "'dpo.parts' is 0; .* at least 1"),
        *(
            (
                _minimal(dpo={"loss": loss, "label_smoothing": 0.1}),
                f"'dpo.label_smoothing' goes with .*, not with '{loss}'",
            )
            for loss in ("ipo", "hinge")
        ),
        (
            _minimal(dpo={"label_smoothing": 0.6}),
            r"'dpo.label_smoothing' is 0.6; it has to be in \[0.0, 0.5\]",
        ),
        (
            _minimal(dpo={"loss": "robust", "label_smoothing": 0.5}),
            "'dpo.label_smoothing' is 0.5; the loss 'robust' divides",
        ),
        (
            _minimal(dpo={"loss": "ipo", "beta": 0.0}),
            "'dpo.beta' is 0; the loss 'ipo' divides by it",
        ),
        (
            _minimal(dpo={"trains": "full", "reference": "adapter_off"}),
            "'dpo.reference' is 'adapter_off', but with 'dpo.trains' 'full'",
        ),
        (_minimal(dpo={"lora_targets": ()}), r"'dpo.lora_targets' is \(\)"),
        (
            _minimal(dpo={"lora_targets": ("q", "z")}),
            r"'dpo.lora_targets' is \('q', 'z'\); it takes .* 'q', 'k', 'v'",
        ),
        (
            _minimal(dpo={"lora_targets": "q"}),
            "'dpo.lora_targets' takes a tuple, not 'q'",
        ),
        (_minimal(dpo={"max_length": 1}), "'dpo.max_length' is 1"),
        (_minimal(dpo={"max_length": "1"}), "'dpo.max_length' takes int"),
        (
            _minimal(executor="rya"),
            "'executor' is 'rya'; it takes one of 'local', 'ray' .*'ray'",
        ),
        (_minimal(ray={"adress": "x"}), "did you mean 'ray.address'"),
        (_minimal(ray={"workers": 0}), "'ray.workers' is 0; .* at least 1"),
        (_minimal(ray={"worker_cpus": 0.0}), "'ray.worker_cpus' is 0.0"),
        (_minimal(ray={"train_hosts": 0}), "'ray.train_hosts' is 0"),
        (_minimal(ray={"start_timeout_s": 0.0}), "'ray.start_timeout_s' is 0"),
    ],
)
def test_bad_config_is_one_line_with_the_key(tree, message):
  with pytest.raises(config_lib.ConfigError, match=message) as error:
    config_lib.from_config_dict(tree)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"loss": "sigmoid", "label_smoothing": 0.5},
        {"loss": "robust", "label_smoothing": 0.49},
        {"loss": "hinge", "beta": 0.0},
        {"batch_size": 12, "parts": 12},
        {"trains": "full", "reference": "precomputed"},
        {"lora_targets": ("down",), "max_length": 2},
    ],
)
def test_what_dpo_takes(values):
  config = config_lib.from_config_dict(_minimal(dpo=values))
  assert config.dpo == config_lib.Dpo(**values)
  alone = config_lib.to_config_dict(config.dpo)
  assert config_lib.from_config_dict(alone, config_lib.Dpo) == config.dpo


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


_ELSEWHERE = {"executor": "ray", "ray": config_lib.Ray("auto", workers=4)}


def test_digest_is_the_same_wherever_it_runs():
  config = config_lib.Config(name="x", seed_model="s", experts=("a",))
  there = dataclasses.replace(config, **_ELSEWHERE)
  assert there != config
  assert config_lib.digest(there) == config_lib.digest(config)
  other = dataclasses.replace(there, seed=1)
  assert config_lib.digest(other) != config_lib.digest(there)


def test_only_where_it_runs_is_left_out_of_a_flat_config():
  config = config_lib.Config(name="x", seed_model="s", experts=("a",))
  flat = config_lib.flatten(config_lib.to_dict(config))
  rest = config_lib.without_places(flat)
  gone = {"executor", *(f"ray.{name}" for name in vars(config_lib.Ray()))}
  assert flat.keys() - rest.keys() == gone
  assert rest == {key: flat[key] for key in flat.keys() - gone}
  there = dataclasses.replace(config, **_ELSEWHERE)
  there = config_lib.flatten(config_lib.to_dict(there))
  assert config_lib.without_places(there) == rest
  # "ray" is a group, not what a key begins with.
  assert config_lib.without_places({"rays": 1}) == {"rays": 1}


def test_a_key_that_is_none_can_be_given_on_the_command_line():
  tree = config_lib.to_config_dict(
      config_lib.Config(name="n", seed_model="s", experts=("a",))
  )
  tree.evaluate.train_file = "train.jsonl"
  tree.evaluate.shots = 3
  tree.dpo.max_length = 100
  tree.ray.workers = 4
  with pytest.raises(TypeError):
    tree.evaluate.test_file = 7
  config = config_lib.from_config_dict(tree)
  assert config.evaluate.train_file == "train.jsonl"
  assert config.evaluate.test_file is None
  assert (config.evaluate.shots, config.dpo.max_length) == (3, 100)
  assert config.ray.workers == 4
