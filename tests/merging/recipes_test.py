"""Recipes: mergekit's semantics, and a line for everything that is wrong."""

import dataclasses
import textwrap
import warnings

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.merging import recipes

_DECODER = models.DecoderConfig(
    vocab_size=37,
    embed=16,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
)
_LONG = dataclasses.replace(_DECODER, layers=5)
_CONFIGS = {"base": _DECODER, "a": _DECODER, "b": _DECODER, "long": _LONG}
_LAYERS = 9  # Tensors of a layer.


@pytest.fixture
def read(tmp_path):
  """read(text) -> the recipe."""

  def write_and_read(text):
    path = tmp_path / "r.yml"
    path.write_text(textwrap.dedent(text))
    return recipes.read(path)

  return write_and_read


@pytest.fixture
def plan(read):
  """plan(text) -> (config, step by the tensor's name)."""

  def read_and_plan(text, configs=_CONFIGS):
    config, steps = recipes.plan(read(text), configs)
    return config, {step.name: step for step in steps}

  return read_and_plan


_TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1]
      weight:
        - filter: mlp
          value: [0.5, 1.5]
        - value: 0
  - model: b
parameters:
  weight: 1e-1
  normalize: 0
  int8_mask: true
dtype: bfloat16
"""


def test_what_a_recipe_says(read):
  recipe = read(_TIES)
  assert (recipe.method, recipe.base, recipe.dtype) == (
      "ties",
      "base",
      "bfloat16",
  )
  assert recipe.models == ("base", "a", "b")
  assert recipe.out_dtype is recipe.chat_template is None
  assert recipe.tokenizer_source is None
  assert recipe.text == _TIES
  (part,) = recipe.slices
  assert [entry.model for entry in part.inputs] == ["a", "b", "base"]
  density = part.inputs[0].parameters["density"]
  assert density == recipes.Setting((recipes.Case(None, (1, 0.7, 0.1)),), 6)


def test_plan_of_whole_models(plan):
  config, steps = plan(_TIES)
  assert config == _DECODER
  assert len(steps) == 4 * _LAYERS + 3
  up = steps["model.layers.1.mlp.up_proj.weight"]
  assert (up.path, up.layer, up.base) == ("layers/mlp/up", 1, 2)
  assert up.sources == tuple(
      recipes.Source(model, 1, up.name) for model in ("a", "b", "base")
  )
  third = 1 / 3
  assert up.parameters["density"] == pytest.approx((0.8, 1.0))
  assert up.parameters["weight"] == pytest.approx((0.5 + third, 0.1))
  assert up.parameters["normalize"] is False
  assert up.parameters["lambda"] == 1.0
  q = steps["model.layers.1.self_attn.q_proj.weight"]
  assert q.parameters["weight"] == (0.0, 0.1)
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    assert steps[name].layer is None
    assert steps[name].parameters["density"] == (1.0, 1.0)


def test_steps_follow_the_table(read):
  recipe = read(_TIES)
  for tied in (False, True):
    config = dataclasses.replace(_DECODER, tied_head=tied)
    _, steps = recipes.plan(recipe, dict.fromkeys(recipe.models, config))
    tree = models.abstract_params(config)
    expected = []
    for path, _, names in convert.hf.named_leaves(config, tree):
      stacked = path.startswith("layers/")
      layers = range(len(names)) if stacked else [None]
      expected += zip([path] * len(names), layers, names, strict=True)
    assert [(step.path, step.layer, step.name) for step in steps] == expected


_SLICES = """\
merge_method: linear
base_model: base
slices:
  - sources:
      - model: long
        layer_range: [2, 5]
      - model: b
        layer_range: [0, 3]
        parameters:
          weight: [0, 1]
    parameters:
      weight:
        - filter: layers.3.
          value: 7
  - sources:
      - model: a
        layer_range: [1, 2]
        parameters:
          weight: [2, 3]
parameters:
  weight: 5
"""


def test_plan_of_slices(plan):
  config, steps = plan(_SLICES)
  assert config == _DECODER
  up = "model.layers.{}.mlp.up_proj.weight".format
  assert [source.name for source in steps[up(1)].sources] == [up(3), up(1)]
  assert [source.layer for source in steps[up(1)].sources] == [3, 1]
  assert all(step.base is None for step in steps.values())
  weights = [steps[up(i)].parameters["weight"] for i in range(4)]
  # The filter is matched with the name in the input. A single layer is at the
  # end of a gradient.
  assert weights == [(5, 0), (7, 0.5), (5, 1), (3,)]
  assert steps["model.embed_tokens.weight"].parameters["weight"] == (5, 0)
  assert steps["model.norm.weight"].parameters["weight"] == (2,)
  assert [source.model for source in steps["lm_head.weight"].sources] == ["a"]


def test_windows_follow_the_layers(plan):
  config = models.DecoderConfig(
      37,
      16,
      4,
      4,
      2,
      4,
      24,
      family="gemma2",
      window=8,
      local=(True, False, True, False),
  )
  text = """\
      merge_method: passthrough
      slices:
        - sources: [{model: a, layer_range: [0, 3]}]
        - sources: [{model: a, layer_range: [2, 4]}]
      """
  found, steps = plan(text, {"a": config})
  assert (found.layers, found.window) == (5, 8)
  assert found.local == (True, False, True, True, False)
  assert steps["model.layers.4.mlp.up_proj.weight"].sources[0].layer == 3
  found, _ = plan(text, {"a": dataclasses.replace(config, local=(False,) * 4)})
  assert found.local == () and found.window is None


def test_whole_models_keep_the_base_models_window(plan):
  windowed = dataclasses.replace(_DECODER, window=8, local=(True,) * 4)
  config, _ = plan(_TIES, _CONFIGS | {"base": windowed})
  assert config == windowed


def test_anchors_and_merge_keys(plan):
  _, steps = plan("""\
      merge_method: task_arithmetic
      base_model: base
      models:
        - {model: a, parameters: &p {weight: 0.5}}
        - {model: b, parameters: {<<: *p, weight: 0.25}}
      parameters: *p
      """)
  assert steps["model.norm.weight"].parameters["weight"] == (0.5, 0.25)


_HEAD = "merge_method: ties\nbase_model: base\n"
_MODELS = "models:\n  - model: a\n  - model: b\n"
_SLICE = """\
merge_method: slerp
base_model: a
parameters: {t: 0.5}
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2]}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yml:1: the recipe is empty"),
        ("- a\n", "r.yml:1: a recipe has to be a mapping"),
        ("a: b: c\n", "r.yml:1: mapping values are not allowed here"),
        ("a: \x07\n", "r.yml:1: a character that YAML does not allow"),
        ("a: " + "[" * 600, "nested too deeply"),
        ("? [a]\n: b\n", "r.yml:1: a key has to be text"),
        (_HEAD + "dtype: !!python/name:os.system x\n" + _MODELS, ":3: dtype"),
        (
            _HEAD + "dtype: float16\ndtype: float32\n",
            ":4: key 'dtype' is given",
        ),
        (_HEAD + "foo: 1\n" + _MODELS, ":3: unknown key 'foo'; known: models,"),
        (
            _HEAD + "modles: []\n",
            ":3: unknown key 'modles'; did you mean 'mode",
        ),
        (
            _HEAD + "modules: {}\n",
            ":3: key 'modules' is not supported; use mod",
        ),
        (_HEAD + "tokenizer: {}\n", "'tokenizer' is not supported; use tokeni"),
        (_HEAD + "name: x\n", ":3: unknown key 'name'"),
        (_HEAD, ":1: models is missing, or slices in its place"),
        (_HEAD + _MODELS + "slices: []\n", ":6: slices beside models"),
        (_HEAD + "models: []\n", ":3: models is empty"),
        (_HEAD + "models: a\n", ":3: models has to be a list"),
        (_HEAD + "models: [a]\n", ":3: models has to be a mapping"),
        (_HEAD + "models: [{parameters: {}}]\n", ":3: model is missing"),
        (
            _HEAD + "models:\n - model: 1\n",
            ":4: model has to be text; quote it",
        ),
        (
            _HEAD + "models:\n - model: {model: a, lora: b}\n",
            ":4: model as a mapping (lora, override_architecture) is not supp",
        ),
        (_HEAD + "models:\n - model: a+b\n", ":4: model a+b: a LoRA adapter"),
        (_HEAD + _MODELS + "  - model: a\n", ":6: a is listed twice"),
        ("models: [{model: a}]\n", ":1: merge_method is missing"),
        (
            "merge_method: tise\n" + _MODELS,
            ":1: unknown merge_method 'tise'; d",
        ),
        ("merge_method: [ties]\n" + _MODELS, ":1: merge_method has to be text"),
        ("merge_method: ties\n" + _MODELS, ":2: ties needs base_model"),
        (
            _HEAD + "models: [{model: base}]\n",
            ":3: ties merges 1 or more models",
        ),
        (
            "merge_method: slerp\nbase_model: base\n" + _MODELS,
            ":3: slerp merges 1 model beside base_model, not 2 (a, b)",
        ),
        (
            "merge_method: passthrough\n" + _MODELS,
            "merges 1 model, not 2 (a, b)",
        ),
        (
            _HEAD + _MODELS + "dtype: float64\n",
            ":6: dtype 'float64' is not sup",
        ),
        (_HEAD + _MODELS + "out_dtype: 16\n", ":6: out_dtype has to be text"),
        (
            _HEAD + _MODELS + "parameters:\n  wieght: 1\n",
            ":7: unknown parameter of ties 'wieght'; did you mean 'weight'?",
        ),
        (_HEAD + _MODELS + "parameters: 1\n", ":6: parameters has to be a map"),
        (
            _HEAD + _MODELS + "    parameters:\n      normalize: true\n",
            ":7: normalize is not a parameter of a single model; put it under",
        ),
        (
            _HEAD + _MODELS + "    parameters:\n      density: 0\n",
            ":7: density is 0.0; it has to be in (0, 1]",
        ),
        (
            _HEAD
            + _MODELS
            + "    parameters:\n      density:\n       - 1\n       - 2",
            ":9: density is 2.0; it has to be in (0, 1]",
        ),
        (
            _HEAD + _MODELS + "parameters: {weight: x}\n",
            "weight has to be a num",
        ),
        (_HEAD + _MODELS + "parameters: {weight: .inf}\n", "not '.inf'"),
        (_HEAD + _MODELS + "parameters: {weight: true}\n", "not 'true'"),
        (
            _HEAD + _MODELS + "parameters: {weight: }\n",
            "has to be a number, no",
        ),
        (_HEAD + _MODELS + "parameters: {weight: []}\n", ":6: weight is empty"),
        (
            _HEAD + _MODELS + "parameters: {weight: [[1]]}\n",
            "be a single value",
        ),
        (
            _HEAD + _MODELS + "parameters: {weight: [{value: 1}, 2]}\n",
            ":6: weight mixes numbers and filters in one list",
        ),
        (
            _HEAD + _MODELS + "parameters: {weight: [{filter: mlp}]}\n",
            ":6: value is missing in weight",
        ),
        (
            _HEAD + _MODELS + "parameters: {weight: {fliter: mlp, value: 1}}\n",
            ":6: unknown key 'fliter'; did you mean 'filter'?",
        ),
        (
            _HEAD + _MODELS + "parameters: {normalize: 2}\n",
            ":6: normalize has to be true or false, not 2",
        ),
        (
            "merge_method: karcher\nparameters: {max_iter: 2.5}\n" + _MODELS,
            ":2: max_iter has to be a whole number, not 2.5",
        ),
        (
            _SLICE.replace("[0, 2]", "[0, 3]", 1),
            ":7: layer_range of b has 2 la",
        ),
        (_SLICE.replace("[0, 2]", "[2, 2]", 1), ":6: layer_range [2, 2) holds"),
        (
            _SLICE.replace("[0, 2]", "[0, x]", 1),
            ":6: layer_range has to be two",
        ),
        (
            _SLICE.replace(", layer_range: [0, 2]", "", 1),
            "layer_range is missin",
        ),
        (
            _SLICE.replace("base_model: a", "base_model: c"),
            ":5: base_model c is not one of the sources; slerp merges into it",
        ),
        (
            _SLICE + "    residual_weight: 1\n",
            ":8: key 'residual_weight' is not",
        ),
        (_SLICE.replace("sources", "source"), ":5: unknown key 'source'; did"),
        (_HEAD + "slices: [{parameters: {}}]\n", ":3: sources is missing"),
    ],
)
def test_what_is_wrong_is_told_by_key_and_line(read, text, message):
  with pytest.raises(errors.UserError) as error:
    read(text)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_there(tmp_path):
  with pytest.raises(errors.UserError, match=r"none\.yml cannot be read"):
    recipes.read(tmp_path / "none.yml")
  (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(errors.UserError, match=r"bytes\.yml cannot be read"):
    recipes.read(tmp_path / "bytes.yml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            _SLICE.replace("[0, 2]", "[3, 5]"),
            ":6: layer_range [3, 5) is outside of a, which has 4 layers",
        ),
        (
            _HEAD + "models: [{model: a}]\n",
            ":3: weight of a is missing for model.embed_tokens.weight",
        ),
        (
            _SLICE.replace("{t: 0.5}", "{t: [{filter: mlp, value: 1}]}"),
            ":1: t is missing for model.embed_tokens.weight",
        ),
        (
            _HEAD + "parameters: {weight: 1}\nmodels: [{model: long}]\n",
            ":2: base has 4 layers, long 5; choose as many of each with slices",
        ),
        (
            _HEAD + "parameters: {weight: 1}\nmodels: [{model: other}]\n",
            ":1: other is of family qwen2, base of mistral: their tensors",
        ),
        (
            "merge_method: karcher\nparameters: {max_iter: [2, 4]}\n" + _MODELS,
            ":2: max_iter is 2.66667 for model.layers.1.input_layernorm",
        ),
        (
            "merge_method: linear\nparameters: {weight: [1, 0]}\n" + _MODELS,
            ", for model.layers.3.input_layernorm.weight",
        ),
    ],
)
def test_what_does_not_fit_the_models(plan, text, message):
  other = dataclasses.replace(_DECODER, family="qwen2", qkv_bias=True)
  with pytest.raises(errors.UserError) as error:
    plan(text, _CONFIGS | {"other": other})
  assert message in str(error.value)
  assert "\n" not in str(error.value)


_FLOATS = st.floats(-1e3, 1e3)


@hypothesis.settings(deadline=None)  # The machine may be busy.
@hypothesis.given(
    st.lists(_FLOATS, min_size=1, max_size=6),
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(st.integers(0, n), st.just(n))
    ),
)
def test_a_gradient_is_linear_between_its_numbers(values, place):
  t = place[0] / place[1]
  found = recipes.interpolate(values, t)
  spaced = np.linspace(0, 1, len(values))
  expected = np.interp(t, spaced, values) if len(values) > 1 else values[0]
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
  assert min(values) - 1e-9 <= found <= max(values) + 1e-9


def test_a_gradient_of_booleans_takes_the_one_below():
  steps = [
      recipes.interpolate([True, False, True], t) for t in (0, 0.49, 0.5, 1)
  ]
  assert steps == [True, True, False, True]


# Side by side with mergekit. Models stand as {base}, {a}, ...
_PARITY = {
    "scalars": """\
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.3}}}}
  - {{model: {b}, parameters: {{weight: 1e-1}}}}
parameters: {{lambda: 0.7, normalize: true, int8_mask: true}}
""",
    "base_listed": """\
merge_method: ties
base_model: {base}
models:
  - {{model: {base}}}
  - {{model: {a}, parameters: {{weight: 1, density: [1, 0.7, 0.1]}}}}
  - {{model: {b}, parameters: {{weight: [0, 0.3, 0.7, 1]}}}}
parameters: {{normalize: 0}}
""",
    "base_in_the_middle": """\
merge_method: della
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.1, density: 0.5}}}}
  - {{model: {base}, parameters: {{weight: 9}}}}
  - {{model: {b}, parameters: {{epsilon: 0.1}}}}
parameters: {{weight: 0.2}}
""",
    "filters": """\
merge_method: dare_ties
base_model: {base}
models:
  - model: {a}
    parameters:
      density: {{filter: mlp, value: 0.3}}
      weight:
        - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
        - {{filter: layers.2, value: 0.25}}
        - {{filter: mlp, value: [1, 0.5]}}
  - model: {b}
    parameters:
      weight: [{{filter: "*", value: [0.1, 0.9]}}, {{value: 3}}]
parameters:
  weight: [{{filter: norm, value: 4}}, {{value: [5, 6]}}]
  density: [{{filter: lm_head, value: 0.9}}, {{value: [0.5, 0.6, 0.2]}}]
  rescale: [{{filter: mlp, value: [true, false]}}, {{value: false}}]
""",
    "linear_adds_the_base": """\
merge_method: linear
base_model: {base}
models:
  - {{model: {a}}}
parameters: {{weight: [{{filter: q_proj, value: 2}}, {{value: 1}}]}}
""",
    "linear": """\
merge_method: linear
models:
  - {{model: {b}, parameters: {{weight: 2}}}}
  - {{model: {a}, parameters: {{weight: [1, 3]}}}}
parameters: {{normalize: false}}
""",
    "slerp": """\
merge_method: slerp
base_model: {b}
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 4]}}
      - {{model: {b}, layer_range: [0, 4]}}
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
    - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}
    - value: 0.5
""",
    "slice_precedence": """\
merge_method: linear
slices:
  - sources:
      - {{model: {long}, layer_range: [2, 5], parameters: {{weight: [1, 2]}}}}
      - {{model: {a}, layer_range: [0, 3]}}
    parameters:
      weight: [{{filter: layers.1.mlp, value: [7, 8]}}]
      normalize: [{{filter: layers.2, value: false}}]
  - sources:
      - {{model: {b}, layer_range: [1, 2], parameters: {{weight: [3, 4]}}}}
      - {{model: {long}, layer_range: [0, 1]}}
parameters:
  weight: [{{filter: layers.3, value: 5}}, {{value: [0.1, 0.2]}}]
""",
    "base_of_a_slice": """\
merge_method: breadcrumbs
base_model: {base}
slices:
  - base_model: {a}
    sources:
      - {{model: {a}, layer_range: [0, 2]}}
      - {{model: {b}, layer_range: [1, 3], parameters: {{gamma: 0.2}}}}
  - sources:
      - {{model: {b}, layer_range: [0, 3]}}
      - {{model: {base}, layer_range: [1, 4], parameters: {{weight: 3}}}}
parameters: {{weight: [1, 0], density: [0.9, 0.1]}}
""",
    "passthrough": """\
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 3]}}]
  - sources:
      - model: {long}
        layer_range: [1, 5]
        parameters:
          scale: [{{filter: o_proj, value: 0.0}}, {{value: 1.0}}]
parameters: {{scale: 0.5}}
""",
    "nuslerp_with_a_base": """\
merge_method: nuslerp
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: [0.2, 0.8]}}}}
  - {{model: {b}, parameters: {{weight: 0.5}}}}
parameters: {{nuslerp_row_wise: true, nuslerp_flatten: [true, false]}}
""",
    "defaults": """\
merge_method: karcher
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{max_iter: [{{filter: mlp, value: 20}}], tol: 1e-7}}
""",
    "no_experts_parameters": """\
merge_method: model_stock
base_model: {base}
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{filter_wise: [false, true]}}
""",
}


@pytest.fixture(scope="module")
def mergekit_plan():
  """mergekit_plan(recipe's text) -> what its own planner resolves."""
  pytest.importorskip("mergekit")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit import architecture
    from mergekit import config
    from mergekit import merge
    from mergekit import options
    from mergekit import plan
  import yaml

  def make(text):
    settings = options.MergeOptions()
    parsed = config.MergeConfiguration.model_validate(yaml.safe_load(text))
    info = architecture.get_architecture_info(parsed, settings)
    out = merge._model_out_config(parsed, info)
    planner = plan.MergePlanner(parsed, info, settings, out)
    planner._plan()
    return out, planner._tensors

  return make


@pytest.fixture(scope="module")
def directories(tmp_path_factory, random_params):
  parent = tmp_path_factory.mktemp("models")
  for name, config in _CONFIGS.items():
    convert.save(parent / name, config, random_params(config))
  return {name: str(parent / name) for name in _CONFIGS}


@pytest.mark.slow  # mergekit's import alone takes several seconds.
@pytest.mark.parametrize("name", _PARITY)
@pytest.mark.filterwarnings("ignore")
def test_every_tensor_as_mergekit_plans_it(
    name, read, mergekit_plan, directories
):
  text = _PARITY[name].format(**directories)
  configs = {directories[name]: _CONFIGS[name] for name in _CONFIGS}
  config, steps = recipes.plan(read(text), configs)
  out, planned = mergekit_plan(text)
  assert config.layers == out.num_hidden_layers
  ours = {step.name: step for step in steps}
  assert ours.keys() == {weight.name for weight, _ in planned}
  for weight, task in planned:
    step = ours[weight.name]
    gathered = dict(task.gather_tensors.weight_info.items())
    assert [(source.model, source.name) for source in step.sources] == [
        (str(model), gathered[model].name) for model in task.model_order
    ]
    expected = {k: v for k, v in task.parameters.items() if k != "int8_mask"}
    found = dict(step.parameters)
    ignored = {"int8_mask", "exact_k"}
    experts = [i for i in range(len(step.sources)) if i != step.base]
    for i, values in enumerate(zip(*_per_expert(found), strict=True)):
      model = task.model_order[experts[i]]
      theirs = dict(task.input_parameters[model].items())
      assert dict(zip(_names(found), values, strict=True)) == _scale(theirs)
    shared = {
        k: v
        for k, v in found.items()
        if not isinstance(v, tuple) and k not in ignored
    }
    assert shared == expected
    if step.base is not None:
      assert task.model_order[step.base] == task.base_model


def _names(parameters):
  return [k for k, v in parameters.items() if isinstance(v, tuple)]


def _per_expert(parameters):
  return [v for v in parameters.values() if isinstance(v, tuple)]


def _scale(parameters):
  """mergekit leaves a passthrough without a scale alone: it is 1."""
  return {k: 1.0 if v is None else v for k, v in parameters.items()}
