"""The text is that of transformers' own greedy `generate`."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax import sampling
from selfdev_jax.tiny import corpus

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "generate.py"
_VOCAB = 280
_DECODER = models.DecoderConfig(
    vocab_size=_VOCAB,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    max_positions=64,
)
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %} [answer]{% endif %}"
)
_PROMPT, _NEW = "two and two is", 12


@pytest.fixture(scope="module")
def plain(tmp_path_factory, random_params) -> pathlib.Path:
  """A model without BOS and without a chat template."""
  root = tmp_path_factory.mktemp("generate")
  tokenizer = corpus.train_tokenizer(
      [corpus.Document("two and two is", "four")], _VOCAB
  )
  corpus.save_tokenizer(tokenizer, root / "tokenizer")
  convert.save(
      root / "model", _DECODER, random_params(_DECODER), root / "tokenizer"
  )
  return root / "model"


@pytest.fixture(scope="module")
def chatty(plain) -> pathlib.Path:
  """The same with a template in tokenizer_config.json, and a BOS before all.

  As in Llama's and Gemma's: the tokenizer puts it there, the template too.
  """
  path = plain.with_name("chatty")
  shutil.copytree(plain, path)
  settings = path / "tokenizer_config.json"
  changed = json.loads(settings.read_text())
  changed |= {"chat_template": _TEMPLATE, "bos_token": "<pad>"}
  settings.write_text(json.dumps(changed))
  file = path / "tokenizer.json"
  tokenizer = json.loads(file.read_text())
  tokenizer["post_processor"] = {
      "type": "TemplateProcessing",
      "single": [
          {"SpecialToken": {"id": "<pad>", "type_id": 0}},
          {"Sequence": {"id": "A", "type_id": 0}},
      ],
      "pair": [
          {"Sequence": {"id": "A", "type_id": 0}},
          {"Sequence": {"id": "B", "type_id": 1}},
      ],
      "special_tokens": {
          "<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}
      },
  }
  file.write_text(json.dumps(tokenizer))
  return path


@pytest.fixture
def seen(monkeypatch):
  """What the sampler is given: a second BOS need not show in the text."""
  prompts, generate = [], sampling.JaxSampler.generate

  def record(self, rows, *args, **kwargs):
    prompts.extend(rows)
    return generate(self, rows, *args, **kwargs)

  monkeypatch.setattr(sampling.JaxSampler, "generate", record)
  return prompts


def _load(directory):
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32
  )
  return tokenizer, model


def _expected(directory, inputs, eos=None):
  """What transformers writes behind `inputs`, as a line."""
  tokenizer, model = _load(directory)
  eos = eos or model.generation_config.eos_token_id
  with torch.no_grad():
    (row,) = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=_NEW,
        do_sample=False,
        eos_token_id=eos,
    ).tolist()
  new = row[inputs.shape[1] :]
  eos = eos if isinstance(eos, list) else [eos]
  ends = [i for i, token in enumerate(new) if token in eos]
  return tokenizer.decode(new[: ends[0]] if ends else new) + "\n", new


@pytest.mark.parametrize("name", ["plain", "chatty"])
def test_goes_on_as_transformers_does(launch, seen, request, name):
  directory = request.getfixturevalue(name)
  tokenizer, _ = _load(directory)
  inputs = tokenizer(_PROMPT, return_tensors="pt").input_ids
  starts = inputs[0].tolist().count(0)
  assert starts == (1 if name == "chatty" else 0)
  expected, _ = _expected(directory, inputs)
  got = launch(model=directory, prompt=_PROMPT, max_new_tokens=_NEW)
  assert got == expected and len(got) > 1
  assert seen == inputs.tolist()


def test_answers_as_transformers_does(launch, seen, chatty):
  tokenizer, _ = _load(chatty)
  inputs = tokenizer.apply_chat_template(
      [{"role": "user", "content": _PROMPT}],
      add_generation_prompt=True,
      return_tensors="pt",
      return_dict=False,
  )
  assert inputs[0].tolist().count(0) == 1  # BOS is there, and once.
  expected, _ = _expected(chatty, inputs)
  got = launch(model=chatty, prompt=_PROMPT, chat=True, max_new_tokens=_NEW)
  assert got == expected
  assert seen == inputs.tolist()
  assert got != launch(model=chatty, prompt=_PROMPT, max_new_tokens=_NEW)


def test_stops_at_the_ends_that_the_model_names(launch, plain, tmp_path):
  """A chat model ends its turn with a token that is not the tokenizer's EOS."""
  shutil.copytree(plain, tmp_path / "model")
  tokenizer, _ = _load(plain)
  inputs = tokenizer(_PROMPT, return_tensors="pt").input_ids
  whole, tokens = _expected(plain, inputs)
  end = tokens[4]
  path = tmp_path / "model" / "generation_config.json"
  settings = json.loads(path.read_text()) | {"eos_token_id": [1, end]}
  path.write_text(json.dumps(settings))
  expected, _ = _expected(tmp_path / "model", inputs)
  got = launch(model=tmp_path / "model", prompt=_PROMPT, max_new_tokens=_NEW)
  assert got == expected and len(got) < len(whole)


def test_an_adapter_is_used(launch, plain, tmp_path):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  factors = {"down": {"a": draw(2, 3, 24), "b": draw(2, 16, 3)}}
  convert.save_adapter(
      tmp_path / "adapter",
      {"layers": {"mlp": factors}},
      config=_DECODER,
      rank=3,
      alpha=3.0,
      base=str(plain),
  )
  config, leaves = convert.open_leaves(plain)
  adapter = convert.load_adapter(tmp_path / "adapter", config)
  applied = convert.apply_adapter(leaves, adapter)
  convert.save(tmp_path / "applied", config, applied, like=plain)
  given = {"prompt": _PROMPT, "max_new_tokens": _NEW}
  got = launch(model=plain, adapter=tmp_path / "adapter", **given)
  assert got == launch(model=tmp_path / "applied", **given)
  assert got != launch(model=plain, **given)


def test_temperature_draws_by_the_seed(launch, plain):
  given = {"model": plain, "prompt": _PROMPT, "max_new_tokens": _NEW}
  texts = [launch(temperature=1.0, seed=seed, **given) for seed in (0, 0, 1)]
  assert texts[0] == texts[1] != texts[2]


def test_chat_without_a_template(launch, plain):
  with pytest.raises(errors.UserError, match="no chat template") as caught:
    launch(model=plain, prompt=_PROMPT, chat=True)
  assert "\n" not in str(caught.value)


def test_an_empty_prompt(launch, plain, chatty):
  with pytest.raises(errors.UserError, match="--prompt is empty"):
    launch(model=plain, prompt="")
  assert launch(model=chatty, prompt="", max_new_tokens=_NEW)


def test_a_prompt_that_is_too_long(launch, plain, monkeypatch):
  notes = []
  monkeypatch.setattr(progress, "note", notes.append)
  with pytest.raises(errors.UserError, match="no room for a prompt in the mod"):
    launch(model=plain, prompt=_PROMPT)
  assert launch(model=plain, prompt=_PROMPT * 20, max_new_tokens=_NEW)
  assert notes == ["the prompt does not fit the model; its beginning was cut"]


def test_no_model(launch, tmp_path):
  with pytest.raises(errors.UserError, match="nowhere does not exist"):
    launch(model=tmp_path / "nowhere", prompt=_PROMPT)


@pytest.mark.slow
def test_command_line(plain):
  done = subprocess.run(
      [
          sys.executable,
          "-m",
          "launch.generate",
          f"--model={plain}",
          f"--prompt={_PROMPT}",
          f"--max_new_tokens={_NEW}",
      ],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  tokenizer, _ = _load(plain)
  inputs = tokenizer(_PROMPT, return_tensors="pt").input_ids
  assert done.stdout == _expected(plain, inputs)[0]
