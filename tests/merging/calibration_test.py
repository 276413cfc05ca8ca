"""Statistics against PyTorch's gradients and hooks on the same model."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.merging import calibration

_DECODER = models.DecoderConfig(
    vocab_size=31,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp=20,
    max_positions=32,
)
_CONFIGS = {
    "mistral": _DECODER,
    "qwen2": dataclasses.replace(
        _DECODER, family="qwen2", head_dim=4, qkv_bias=True, tied_head=True
    ),
    "gemma2": dataclasses.replace(
        _DECODER,
        family="gemma2",
        activation="gelu_tanh",
        scaled_embedding=True,
        unit_offset_norms=True,
        post_norms=True,
        query_scale=24,
        attention_softcap=2.0,
        logit_softcap=3.0,
        window=5,
        local=(True, False),
        tied_head=True,
    ),
}
# As long as a padded row, shorter, and the shortest; without 0, whose gradient
# PyTorch drops where a family pads with it.
_ROWS = [list(range(1, 17)), [5, 3, 3, 8, 30, 7, 12], [9, 4]]
_GSM8K = pathlib.Path(__file__).parents[3] / "shared/data/gsm8k_test.jsonl"


@pytest.fixture
def pair(random_params, tmp_path):
  """name -> (config, parameters, the same in transformers, in float64)."""

  def make(name):
    config = _CONFIGS[name]
    params = random_params(config)
    convert.save(tmp_path / name, config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / name, dtype=torch.float64, attn_implementation="eager"
    )
    return config, params, model

  return make


def _stack(config, of_name):
  """{path: of_name(name), layers stacked} for each leaf of the decoder."""
  abstract = models.abstract_params(config)
  table = convert.FAMILIES[config.family].table

  def gather(path, leaf):
    name = table["/".join(key.key for key in path)]
    if "{}" not in name:
      return of_name(name)
    found = [of_name(name.format(i)) for i in range(config.layers)]
    return None if found[0] is None else np.stack(found)

  return jax.tree_util.tree_map_with_path(gather, abstract)


def _assert_close(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)

  def check(x, y):
    assert x.dtype == jnp.float32
    # Sums over a few tokens of products in float32, layer after layer.
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5 * np.abs(y).max())

  jax.tree.map(check, got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma2"])
def test_fisher_is_the_mean_square_of_each_sequences_gradient(pair, name):
  config, params, model = pair(name)
  weights = dict(model.named_parameters())
  squares = dict.fromkeys(weights, 0.0)
  for row in _ROWS:
    model.zero_grad()
    logps = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
    logps[range(len(row) - 1), row[1:]].sum().backward()
    for name, weight in weights.items():
      squares[name] = squares[name] + weight.grad.numpy() ** 2
  expected = _stack(config, lambda name: squares[name] / len(_ROWS))
  got = calibration.fisher(config, params, _ROWS)
  _assert_close(got, expected)
  again = calibration.fisher(config, params, _ROWS)
  jax.tree.map(np.testing.assert_array_equal, got, again)


@pytest.mark.parametrize("name", _CONFIGS)
def test_gram_is_that_of_the_linear_maps_inputs(pair, name):
  config, params, model = pair(name)
  grams = {}

  def note(name):
    def hook(module, args):
      x = args[0].reshape(-1, args[0].shape[-1]).numpy()
      grams[name] = grams.get(name, 0.0) + x.T @ x / sum(map(len, _ROWS))

    return hook

  hooks = [
      module.register_forward_pre_hook(note(f"{name}.weight"))
      for name, module in model.named_modules()
      if isinstance(module, torch.nn.Linear) and "layers" in name
  ]
  with torch.no_grad():
    for row in _ROWS:
      model(torch.tensor([row]))
  for hook in hooks:
    hook.remove()
  assert len(grams) == 7 * config.layers
  got = calibration.gram(config, params, _ROWS)
  _assert_close(got, _stack(config, grams.get))
  attention = got["layers"]["attention"]
  assert attention["q"] is attention["k"] is attention["v"]
  assert got["embed"] is None
  assert got["layers"].keys() == params["layers"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fisher", "gram"])
def test_half_precision_is_summed_in_float32(random_params, name):
  statistic = getattr(calibration, name)
  params = random_params(_DECODER)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  # The gradient of JAX's attention relies on promotion.
  with jax.numpy_dtype_promotion("standard"):
    got = statistic(_DECODER, half, _ROWS)
  expected = statistic(_DECODER, params, _ROWS)

  def check(x, y):
    assert x.dtype == jnp.float32
    assert np.abs(x - y).sum() < 0.1 * np.abs(y).sum()

  jax.tree.map(check, got, expected)


@pytest.mark.parametrize(
    ("statistic", "rows", "message"),
    [
        (calibration.fisher, [], "no calibration text"),
        (calibration.fisher, [[1, 2], [3]], "text 2 has 1 tokens, not 2 to 32"),
        (calibration.gram, [[]], "text 1 has 0 tokens, not 1 to 32"),
        (calibration.gram, [[1] * 33], "text 1 has 33 tokens"),
        (calibration.gram, [[1, 31]], "outside the model's 31"),
        (calibration.fisher, [[1, -1]], "outside the model's 31"),
    ],
)
def test_sequences_that_do_not_fit(random_params, statistic, rows, message):
  with pytest.raises(errors.UserError, match=message):
    statistic(_DECODER, random_params(_DECODER), rows)


def test_what_is_not_finite_is_named(random_params):
  params = random_params(_DECODER)
  params["layers"]["mlp"]["up"][1, 0, 0] = np.nan
  with pytest.raises(errors.UserError, match="give down statistics that are"):
    calibration.gram(_DECODER, params, _ROWS)


def test_texts_are_lines(tmp_path):
  path = tmp_path / "texts.txt"
  path.write_bytes("One.\r\n\n  Zwei, drei: vier ½.\n".encode())
  assert calibration.read_texts(path) == ["One.", "Zwei, drei: vier ½."]


def test_texts_are_fields(tmp_path):
  path = tmp_path / "texts.jsonl"
  lines = [{"text": "One\ntwo.", "id": 1}, {"question": "3?", "answer": "4"}]
  path.write_text("\n\n".join(map(json.dumps, lines)))
  assert calibration.read_texts(path) == ["One\ntwo.", "3?\n4"]


@pytest.mark.skipif(not _GSM8K.exists(), reason="needs GSM8K's file")
def test_texts_of_gsm8k():
  texts = calibration.read_texts(_GSM8K)
  assert len(texts) == 1319
  assert texts[0].startswith("Janet’s ducks") and texts[0].endswith("#### 18")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a", "a.csv is neither .txt, a text a line"),
        ("a.txt", b"\n \n", "a.txt holds no text"),
        ("a.txt", b"a\n\xff\n", "a.txt, line 2: 'utf-8' codec"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text"', "a.jsonl, line 3: no JSON"),
        ("a.jsonl", b'["text"]', 'line 1: no object with "text", or'),
        ("a.jsonl", b'{"question": "a"}', 'line 1: no object with "text", or'),
        ("a.jsonl", b'{"text": " "}', "line 1: text is empty or no text"),
        ("a.jsonl", b'{"text": 3}', "line 1: text is empty or no text"),
        ("a.jsonl", None, "a.jsonl cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.UserError, match=message) as caught:
    calibration.read_texts(tmp_path / name)
  assert "\n" not in str(caught.value)
