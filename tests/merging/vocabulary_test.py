"""Vocabularies: the rules for rows, unions, and mergekit beside them."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as tokenizers_lib
import transformers

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.merging import vocabulary

_FIRST = ("<unk>", "</s>")


def _words(*words, added=(), **special):
  """A tokenizer whose tokens are words."""
  vocab = {word: i for i, word in enumerate((*_FIRST, *words))}
  backend = tokenizers_lib.Tokenizer(
      tokenizers_lib.models.WordLevel(vocab, unk_token="<unk>")
  )
  backend.pre_tokenizer = tokenizers_lib.pre_tokenizers.Whitespace()
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
  )
  tokenizer.add_tokens(list(added))
  for name, token in special.items():
    setattr(tokenizer, name, token)
  return tokenizer


def _special(text):
  return tokenizers_lib.AddedToken(text, special=True, normalized=False)


@pytest.fixture
def tokenizers():
  return {
      "base": _words("x", "y", added=[_special("<pad>")]),
      "a": _words("y", "x", "z", "w", added=[_special("<end>")]),
      "b": _words("x", "z", "v", added=["<tool>"]),
  }


@pytest.fixture
def sizes():
  # That of a is padded; <tool> has no row in b.
  return {"base": 5, "a": 9, "b": 5}


def _row(tokenizer, array, token):
  return array[tokenizer.get_vocab()[token]]


def _tensors(sizes, width=3, dtype=np.float32):
  rng = np.random.default_rng(0)
  return {
      model: rng.normal(size=(rows, width)).astype(dtype)
      for model, rows in sizes.items()
  }


def test_the_bases_tokenizer(tokenizers, sizes):
  found = vocabulary.align("base", "base", tokenizers, sizes)
  assert found.tokenizer.get_vocab() == tokenizers["base"].get_vocab()
  assert found.tokenizer is not tokenizers["base"]
  assert found.size == 5
  own = {model: rows.tolist() for model, rows in found.own.items()}
  assert own == {
      "base": [0, 1, 2, 3, 4],
      "a": [0, 1, 3, 2, -1],
      "b": [0, 1, 2, -1, -1],
  }
  assert all(rows.dtype == np.int32 for rows in found.own.values())


def test_without_a_base_it_is_the_first_ones(tokenizers, sizes):
  order = {name: sizes[name] for name in ("a", "b", "base")}
  found = vocabulary.align("base", None, tokenizers, order)
  assert found.tokenizer.get_vocab() == tokenizers["a"].get_vocab()
  assert found.base is None


def test_another_models_tokenizer(tokenizers, sizes):
  extra = {"other": _words("q", "x")}
  found = vocabulary.align("other", "base", tokenizers | extra, sizes)
  assert found.own.keys() == sizes.keys()
  assert found.own["base"].tolist() == [0, 1, -1, 2]


def test_the_union(tokenizers, sizes):
  before = {k: tokenizer.get_vocab() for k, tokenizer in tokenizers.items()}
  found = vocabulary.align("union", "base", tokenizers, sizes)
  tokens = [*_FIRST, "x", "y", "<pad>", "z", "w", "v", "<end>"]
  assert found.tokenizer.get_vocab() == {t: i for i, t in enumerate(tokens)}
  assert before == {k: t.get_vocab() for k, t in tokenizers.items()}
  ids = found.tokenizer("x w v <end> q", add_special_tokens=False)["input_ids"]
  assert ids == [2, 6, 7, 8, 0]
  assert found.tokenizer.decode(ids[:4], skip_special_tokens=True) == "x w v"
  assert found.own["b"].tolist() == [0, 1, 2, -1, -1, 3, -1, 4, -1]


def test_where_rows_come_from(tokenizers, sizes):
  found = vocabulary.align("union", "base", tokenizers, sizes)
  tensors = _tensors(sizes)
  aligned = vocabulary.rows(found, tensors, np.float32)
  assert {array.shape for array in aligned.values()} == {(9, 3)}

  def row(model, token):
    return _row(tokenizers[model], tensors[model], token)

  def out(model, token):
    return _row(found.tokenizer, aligned[model], token)

  for model in sizes:  # Its own.
    np.testing.assert_array_equal(out(model, "x"), row(model, "x"))
  np.testing.assert_array_equal(out("b", "y"), row("base", "y"))
  np.testing.assert_array_equal(out("b", "<end>"), row("a", "<end>"))
  average = (row("a", "z") + row("b", "z")) / 2
  np.testing.assert_array_equal(out("base", "z"), average)
  np.testing.assert_array_equal(out("a", "z"), row("a", "z"))


def test_rows_of_some_models_only(tokenizers, sizes):
  """A slice that lacks the base averages, and zeros stand for nobody's."""
  found = vocabulary.align("union", "base", tokenizers, sizes)
  tensors = _tensors(sizes)
  del tensors["base"]
  aligned = vocabulary.rows(found, tensors, np.float32)
  assert aligned.keys() == {"a", "b"}
  for model in aligned:
    assert not _row(found.tokenizer, aligned[model], "<pad>").any()
  np.testing.assert_array_equal(
      _row(found.tokenizer, aligned["b"], "y"),
      _row(tokenizers["a"], tensors["a"], "y"),
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_rows_have_the_dtype_asked_for(tokenizers, sizes, dtype):
  found = vocabulary.align("union", "base", tokenizers, sizes)
  tensors = _tensors(sizes)
  wide = vocabulary.rows(found, tensors, np.float32)
  narrow = vocabulary.rows(
      found, {k: jnp.asarray(v) for k, v in tensors.items()}, dtype
  )
  for model in tensors:
    assert narrow[model].dtype == dtype
    # Two roundings and an average of at most 3 rows.
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        narrow[model].astype(np.float32), wide[model], rtol=0, atol=tolerance
    )


def test_tokens_without_a_row_are_taken_out(tmp_path):
  base = _words("x", added=[_special("<pad>"), "<kept>"], pad_token="<pad>")
  base.chat_template = "{{ messages }}"
  found = vocabulary.align("base", "base", {"base": base}, {"base": 3})
  found.tokenizer.save_pretrained(tmp_path)
  again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  for tokenizer in (found.tokenizer, again):
    assert tokenizer.get_vocab() == {"<unk>": 0, "</s>": 1, "x": 2}
    assert tokenizer.pad_token is None and tokenizer.eos_token == "</s>"
    assert tokenizer.chat_template == "{{ messages }}"
  assert base.pad_token == "<pad>" and len(base) == 5
  with pytest.raises(errors.UserError, match="has 3 tokens, its embedding 2 r"):
    vocabulary.align("base", "base", {"base": base}, {"base": 2})


def test_slow_tokenizers_are_refused(tokenizers, sizes, monkeypatch):
  slow = type("Slow", (), {"is_fast": False})()
  with pytest.raises(errors.UserError, match="tokenizer of a is not a fast"):
    vocabulary.align("base", "base", tokenizers | {"a": slow}, sizes)


# Chat templates.


def test_the_commonest_chat_template(tokenizers):
  assert vocabulary.chat_template(None, tokenizers) is None
  assert vocabulary.chat_template("auto", tokenizers) is None
  tokenizers["base"].chat_template = "{{ one }}"
  tokenizers["a"].chat_template = "{{ two }}\n"
  assert vocabulary.chat_template("auto", tokenizers) == "{{ one }}"
  tokenizers["b"].chat_template = {"default": "{{ two }}", "tools": "{{ x }}"}
  assert vocabulary.chat_template("auto", tokenizers) == "{{ two }}"


def test_chatml(tokenizers):
  tokenizer = tokenizers["base"]
  tokenizer.chat_template = vocabulary.chat_template("chatml", tokenizers)
  chat = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]
  text = tokenizer.apply_chat_template(
      chat, tokenize=False, add_generation_prompt=True
  )
  assert text == (
      "<|im_start|>user\nx<|im_end|>\n<|im_start|>tool\ny<|im_end|>\n"
      "<|im_start|>assistant\n"
  )


def test_a_template_of_ones_own(tokenizers):
  own = (
      "{% for m in messages %}{% generation %}{{ m.content }}"
      "{% endgeneration %}{% break %}{% endfor %}"
  )
  assert vocabulary.chat_template(own, tokenizers) == own
  with pytest.raises(errors.UserError, match=r"'llama3' is no .* or paste the"):
    vocabulary.chat_template("llama3", tokenizers)
  with pytest.raises(errors.UserError, match="not Jinja: line 2: unexpected"):
    vocabulary.chat_template("\n{{ x", tokenizers)


@pytest.mark.slow  # mergekit's import alone takes several seconds.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize("with_base", [True, False])
def test_rows_as_mergekit_aligns_them(
    tmp_path, random_params, source, with_base
):
  pytest.importorskip("mergekit")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit import common
    from mergekit import tokenizer as theirs
    from mergekit.tokenizer import build
  import torch

  tokenizers = {
      "base": _words("x", "y", added=[_special("<pad>")]),
      "a": _words("y", "x", "z", "w", "u", added=[_special("<end>")]),
      "b": _words("x", "z", "v", "u", added=["<tool>"]),
  }
  sizes = {"base": 5, "a": 9, "b": 7}
  paths = {}
  for model, tokenizer in tokenizers.items():
    config = models.DecoderConfig(sizes[model], 8, 1, 2, 1, 4, 8)
    paths[model] = str(tmp_path / model)
    convert.save(paths[model], config, random_params(config))
    tokenizer.save_pretrained(paths[model])
  references = {m: common.ModelReference.parse(p) for m, p in paths.items()}
  base = "base" if with_base else None
  info = build.build_tokenizer(
      base_model=references["base"] if with_base else None,
      referenced_models=list(references.values()),
      tokenizer_source=source,
      trust_remote_code=False,
      add_tokens=[],
  )
  tensors = _tensors(sizes, 8, jnp.bfloat16)
  permuted = theirs.PermutedVocabulary.model_construct(
      tokens=None,
      pad_to_multiple_of=None,
      base_model=references["base"] if with_base else None,
      vocabulary_axis=0,
  ).execute(
      info,
      {
          references[m]: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
          for m, x in tensors.items()
      },
  )
  found = vocabulary.align(source, base, tokenizers, sizes)
  ours = vocabulary.rows(found, tensors, jnp.bfloat16)
  vocab, expected = found.tokenizer.get_vocab(), info.tokenizer.get_vocab()
  assert vocab.keys() == expected.keys()
  for model, reference in references.items():
    array = permuted[reference].view(torch.int16).numpy().view(jnp.bfloat16)
    assert array.shape == ours[model].shape
    for token in vocab:  # The rows of a union have another order there.
      np.testing.assert_array_equal(
          ours[model][vocab[token]], array[expected[token]]
      )
