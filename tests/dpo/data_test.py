"""Preference data: what is read, what is skipped, which ids come out."""

import dataclasses
import json
import string
import types

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors
import transformers

from selfdev_jax import errors
from selfdev_jax.dpo import data as data_lib

_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
_SPECIAL = (_BOS, _EOS, _PAD)
_CHARACTERS = string.ascii_letters + " .?\n:"
_SIZE = len(_SPECIAL) + len(_CHARACTERS)
_BOS_ID, _EOS_ID = 0, 1
# A turn ends with an EOS and a newline, as ChatML's does.
_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m.role == 'mute' %}{{ raise_exception('no mutes') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_WITHOUT_EOS = _TEMPLATE.replace("{{ eos_token }}", "")
_MANY = 10**6


def _tokenizer(pad=_PAD, template=_TEMPLATE, bos=True):
  """One token a character; a text begins with a BOS."""
  vocabulary = {c: i for i, c in enumerate((*_SPECIAL, *_CHARACTERS))}
  backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="."))
  backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  if bos:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, _BOS_ID)]
    )
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend,
      bos_token=_BOS,
      eos_token=_EOS,
      pad_token=pad,
      chat_template=template,
  )


@pytest.fixture(scope="module")
def tokenizer():
  return _tokenizer()


def _ids(text):
  """The ids of characters, and of EOS where there is a `$`."""
  return [
      _EOS_ID if c == "$" else len(_SPECIAL) + _CHARACTERS.index(c)
      for c in text
  ]


def _row(prompt, chosen, rejected, **more):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def _user(content):
  return [{"role": "user", "content": content}]


def _answer(content):
  return [{"role": "assistant", "content": content}]


def _tokenize(rows, tokenizer, vocab_size=_SIZE, max_length=_MANY):
  return data_lib.tokenize(
      rows, tokenizer, vocab_size=vocab_size, max_length=max_length
  )


def _lists(arrays):
  return [array.tolist() for array in arrays]


def _write(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
  return path


# Reading.


def test_jsonl(tmp_path):
  path = tmp_path / "pairs.jsonl"
  # A line separator of Unicode is no end of a line.
  path.write_bytes(
      b'\xef\xbb\xbf{"prompt": "p", "chosen": "c\xe2\x80\xa8", "rejected": "",'
      b' "score": 3}\n\n  \r\n'
      b'{"chosen": "a", "rejected": "\\ud83d\\ude00", "prompt": ""}'
  )
  assert data_lib.read(path) == [_row("p", "c\u2028", ""), _row("", "a", "😀")]
  assert data_lib.read(str(path)) == data_lib.read(path)


_GOOD = json.dumps(_row("p", "c", "r")).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p",', "is no JSON: Expecting"),
        (b'{"prompt": "\xff"}', "is no JSON: .*can't decode"),
        (b'{"chosen": "\\ud800"}', "is no JSON: .*surrogates"),
        (b"[" * 10**6, "is no JSON: .*recursion"),
        (b'["p", "c", "r"]', "is no JSON object"),
        (b'{"prompt": "p", "rejected": "r"}', "lacks chosen"),
        (b'{"prompt": "p", "chosen": "r"}', "lacks rejected"),
        (b'{"chosen": "p", "rejected": "r"}', "lacks prompt"),
        (b'{"prompt": null, "chosen": "c", "rejected": "r"}', "prompt is nei"),
        (b'{"prompt": "p", "chosen": 3, "rejected": "r"}', "chosen is neither"),
        (
            b'{"prompt": "p", "chosen": "c", "rejected": ["r"]}',
            "rejected is neither text nor a list of {",
        ),
        (
            b'{"prompt": "p", "chosen": "c", "rejected": [{"role": "user"}]}',
            "rejected is neither",
        ),
        (
            b'{"prompt": "p", "chosen": [{"role": "user", "content": [1]}],'
            b' "rejected": "r"}',
            "chosen is neither",
        ),
        (
            b'{"prompt": "p", "chosen": [], "rejected": []}',
            "prompt as text, but the rest as messages.*leave prompt out",
        ),
        (
            b'{"prompt": "p", "chosen": "c", "rejected": []}',
            "prompt and chosen as text",
        ),
    ],
)
def test_bad_lines(tmp_path, line, message):
  path = tmp_path / "pairs.jsonl"
  path.write_bytes(_GOOD + b"\n\n" + line + b"\n" + _GOOD)
  with pytest.raises(errors.UserError, match=message) as caught:
    data_lib.read(path)
  assert str(caught.value).startswith(f"{path}:3")
  assert "\n" not in str(caught.value)


def test_a_prompt_in_all_rows_or_in_none(tmp_path):
  path = _write(
      tmp_path / "pairs.jsonl",
      {"chosen": "ab", "rejected": "ac"},
      _row("a", "b", "c"),
  )
  with pytest.raises(errors.UserError, match="jsonl:2 has a prompt, but the f"):
    data_lib.read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.jsonl", None, "does not exist"),
        ("pairs.jsonl", "", "holds no preference pair"),
        ("pairs.jsonl", "\n\n", "holds no preference pair"),
        ("pairs.csv", "p,c,r", "is no preference file: give a .jsonl"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(errors.UserError, match=message):
    data_lib.read(tmp_path / name)


def test_a_missing_relative_file_is_not_sought_on_the_hub():
  with pytest.raises(errors.UserError, match=r"a/b[.]jsonl does not"):
    data_lib.read("a/b.jsonl")


def test_unreadable_file(tmp_path, monkeypatch):
  path = _write(tmp_path / "pairs.jsonl", _row("p", "c", "r"))

  def refuse(*args):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(type(path), "open", refuse)
  with pytest.raises(errors.UserError, match=r"cannot be read: .*denied"):
    data_lib.read(path)


def test_messages_and_what_templates_are_given(tmp_path):
  row = _row(
      _user("q"),
      [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
      _answer(""),
      tools=[{"name": "f"}],
      chat_template_kwargs={"thinking": False},
  )
  path = _write(tmp_path / "pairs.jsonl", row | {"score": 1, "id": "x"})
  assert data_lib.read(path) == [row]


@pytest.fixture(scope="module")
def datasets():
  import datasets

  return datasets


def test_saved_dataset(tmp_path, capfd, datasets):
  rows = [
      _row(_user("q"), _answer("c"), _answer("r")),
      _row(
          [{"role": "user", "content": "q", "name": "me"}],
          _answer("c"),
          _answer("r"),
          chat_template_kwargs={"thinking": False},
      ),
  ]
  dataset = datasets.Dataset.from_list(
      [rows[0] | {"chat_template_kwargs": None}, rows[1]]
  )
  dataset = dataset.add_column("picture", [b"", b""])
  dataset = dataset.cast_column("picture", datasets.Image())
  dataset.with_format("numpy").save_to_disk(str(tmp_path))
  was = datasets.are_progress_bars_disabled()
  capfd.readouterr()
  # Without the nulls that Arrow puts where another message has a name.
  assert data_lib.read(tmp_path) == rows
  assert not "".join(capfd.readouterr())
  assert datasets.are_progress_bars_disabled() == was


def test_saved_splits(tmp_path, datasets):
  train, test = (
      datasets.Dataset.from_list([_row("p", "c", name)]) for name in "ab"
  )
  datasets.DatasetDict({"test": test, "train": train}).save_to_disk(
      str(tmp_path / "both")
  )
  assert data_lib.read(tmp_path / "both") == [_row("p", "c", "a")]
  datasets.DatasetDict({"test": test, "dev": test}).save_to_disk(
      str(tmp_path / "other")
  )
  with pytest.raises(errors.UserError, match=r"splits \(dev, test\)"):
    data_lib.read(tmp_path / "other")
  assert data_lib.read(tmp_path / "other" / "dev") == [_row("p", "c", "b")]


def test_bad_directories(tmp_path, datasets):
  with pytest.raises(errors.UserError, match="not one that datasets saved"):
    data_lib.read(tmp_path)
  rows = [_row("p", "c", "r"), _row("p", None, "r")]
  datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "null"))
  with pytest.raises(errors.UserError, match="row 2 of 2 lacks chosen"):
    data_lib.read(tmp_path / "null")
  datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(
      str(tmp_path / "other")
  )
  with pytest.raises(errors.UserError, match="no column chosen, but text"):
    data_lib.read(tmp_path / "other")
  datasets.Dataset.from_list(rows[:1]).select([]).save_to_disk(
      str(tmp_path / "empty")
  )
  # `datasets` itself fails to load what it saved.
  with pytest.raises(errors.UserError, match="or holds no row: list index"):
    data_lib.read(tmp_path / "empty")
  next((tmp_path / "null").glob("*.arrow")).write_bytes(b"no Arrow")
  with pytest.raises(
      errors.UserError, match="not one that datasets saved"
  ) as e:
    data_lib.read(tmp_path / "null")
  assert "\n" not in str(e.value)


def test_hub_out_of_reach(datasets):
  del datasets
  with pytest.raises(
      errors.UserError,
      match=r"nobody/nothing:dev is no file .*; fetch it where there is a netw",
  ) as caught:
    data_lib.read("nobody/nothing:dev")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "split"), [("org/name", "train"), ("org/name:dev[:5]", "dev[:5]")]
)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "cache", "pandas"])
def test_hub(monkeypatch, datasets, path, split, kind):
  asked = []
  loud = lambda: not datasets.are_progress_bars_disabled()
  was_loud = loud()
  dataset = datasets.Dataset.from_list([_row("p", "c", "r")])
  builder = types.SimpleNamespace(
      name=kind,
      download_and_prepare=lambda: asked.append(
          "loudly" if loud() else "quietly"
      ),
      as_dataset=lambda split: asked.append(split) or dataset,
  )
  monkeypatch.setattr(
      datasets,
      "load_dataset_builder",
      lambda name, config: asked.append(name) or builder,
  )
  if kind == "pandas":
    with pytest.raises(errors.UserError, match="stored as pandas, not as Parq"):
      data_lib.read(path)
    assert asked == ["org/name"]
  else:
    assert data_lib.read(path) == [_row("p", "c", "r")]
    assert asked == ["org/name", "quietly", split]
  assert loud() == was_loud


# Prompts that are not told apart.

_IMPLICIT = (
    ("The sky is blue.", "The sky is red."),
    ("The sky is  blue.", "The sky is  red."),
    ("a b", "a c"),
    ("ab", "ac"),
    ("abc", "ab"),
    ("ab", "abc"),
    ("ab ", "ab c"),
    ("abc", "abc"),
    ("a", "a"),
    (" a", " b"),
    ("a", "b"),
    (_user("q") + _answer("a"), _user("q") + _answer("b")),
    (
        _user("q") + _answer("a") + _user("r"),
        _user("q") + _answer("b") + _user("r"),
    ),
    (_user("q"), _user("q") + _answer("b")),
    (_user("q"), _user("r")),
)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is red.", "The sky is"),
        ("abc", "ab", "a"),
        # The two where TRL has no rule, or a slip of its index.
        ("", "ab", ""),
        ("a ", "b", ""),
        (_user("q") + _answer("a"), _user("q") + _answer("b"), _user("q")),
    ],
)
def test_implicit_prompts(tmp_path, chosen, rejected, prompt):
  path = _write(
      tmp_path / "pairs.jsonl", {"chosen": chosen, "rejected": rejected}
  )
  (row,) = data_lib.read(path)
  assert row["prompt"] == prompt
  assert row["prompt"] + row["chosen"] == chosen
  assert row["prompt"] + row["rejected"] == rejected


# Tokens.


def test_ids(tokenizer):
  data = _tokenize([_row("ab", "c", "de")], tokenizer)
  assert _lists(data.prompts) == [[_BOS_ID, *_ids("ab")]]
  assert _lists(data.completions) == [_ids("c$"), _ids("de$")]
  assert data.prompt_of.tolist() == [0, 0]
  assert data.pairs.tolist() == [[0, 1]]
  assert data.source.tolist() == [0]
  assert data.counts == data_lib.Counts()
  assert {array.dtype for array in (*data.prompts, *data.completions)} == {
      np.dtype(np.int32)
  }
  assert {
      array.dtype for array in (data.prompt_of, data.pairs, data.source)
  } == {np.dtype(np.int32)}


def test_everything_once_in_order(tokenizer):
  rows = [
      _row("a", "c", "d"),
      _row("b", "c", "d"),
      _row("a", "e", "c"),
      _row("a", "c", "d"),
  ]
  data = _tokenize(rows, tokenizer)
  assert _lists(data.prompts) == [[_BOS_ID, *_ids(p)] for p in "ab"]
  assert _lists(data.completions) == [
      _ids(c) for c in ("c$", "d$", "c$", "d$", "e$")
  ]
  assert data.prompt_of.tolist() == [0, 0, 1, 1, 0]
  assert data.pairs.tolist() == [[0, 1], [2, 3], [4, 0], [0, 1]]
  assert data.source.tolist() == [0, 1, 2, 3]


def test_each_text_is_encoded_once(tokenizer, monkeypatch):
  seen = []
  encode = tokenizer.encode
  monkeypatch.setattr(
      tokenizer,
      "encode",
      lambda text, **kwargs: seen.append(text) or encode(text, **kwargs),
  )
  _tokenize([_row("a", "c", "d"), _row("a", "d", "c")] * 9, tokenizer)
  assert seen == ["a", "c", "d"]


@pytest.mark.parametrize("pad", [_PAD, _EOS])
def test_eos_is_the_end_whatever_the_padding_is(pad):
  data = _tokenize([_row("ab", "c", f"d{_EOS}")], _tokenizer(pad))
  assert _lists(data.completions) == [_ids("c$"), _ids("d$")]


def test_tokens_do_not_merge_across_the_boundary():
  vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "ab": 5}
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token=_BOS, eos_token=_EOS
  )
  assert tokenizer.encode("ab") == [5]
  data = _tokenize([_row("a", "b", "c")], tokenizer)
  assert _lists(data.prompts) == [[2]]
  assert _lists(data.completions) == [[3, 1], [4, 1]]


def test_no_warning_of_the_tokenizers_own_length(caplog, monkeypatch):
  monkeypatch.setattr(transformers.utils.logging.get_logger(), "propagate", 1)
  tokenizer = _tokenizer()
  tokenizer.model_max_length = 2
  _tokenize([_row("abcdef", "c", "d")], tokenizer)
  assert not caplog.records


# Messages.


def test_messages(tokenizer):
  rows = [_row(_user("q"), _answer("c"), _answer("de"))]
  data = _tokenize(rows, tokenizer)
  assert _lists(data.prompts) == [
      [_BOS_ID, *_ids("user:q$\nassistant:")],
  ]
  # With what the template puts behind the EOS.
  assert _lists(data.completions) == [_ids("c$\n"), _ids("de$\n")]


def test_messages_without_an_eos_get_one():
  rows = [_row(_user("q"), _answer("c"), _answer("d"))]
  data = _tokenize(rows, _tokenizer(template=_WITHOUT_EOS))
  assert _lists(data.completions) == [_ids("c\n$"), _ids("d\n$")]


def test_completion_starts_where_the_template_diverges():
  # The beginning of an answer is not as in a whole conversation.
  template = _TEMPLATE.replace("%}assistant:{", "%}assistant: thinks{")
  rows = [_row(_user("q"), _answer(" c"), _answer(" td"))]
  data = _tokenize(rows, _tokenizer(template=template))
  assert _lists(data.prompts) == [
      [_BOS_ID, *_ids("user:q$\nassistant: ")],
  ]
  assert _lists(data.completions) == [_ids("c$\n"), _ids("td$\n")]


def test_turns_and_tools_of_a_conversation():
  template = "{{ tools[0].name if tools else '' }}{{ word }}" + _TEMPLATE
  tokenizer = _tokenizer(template=template)
  chosen = _answer("c") + _user("r") + _answer("d")
  rows = [
      _row(_user("q"), chosen, _answer("e"), tools=tools, **kwargs)
      for tools, kwargs in (
          ([{"name": "f"}], {}),
          ('[{"name": "g"}]', {"chat_template_kwargs": {"word": "w"}}),
          (None, {"chat_template_kwargs": None}),
      )
  ]
  data = _tokenize(rows, tokenizer)
  assert _lists(data.prompts) == [
      [*_ids(begin), _BOS_ID, *_ids("user:q$\nassistant:")]
      for begin in ("f", "gw", "")
  ]
  assert _lists(data.completions[:2]) == [
      _ids("c$\nuser:r$\nassistant:d$\n"),
      _ids("e$\n"),
  ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            _row(_user("q"), _answer("c"), _answer("d"), tools="["),
            "tools is no",
        ),
        (
            _row(
                _user("q"), _answer("c"), _answer("d"), chat_template_kwargs=3
            ),
            "chat_template_kwargs is no object",
        ),
        (
            _row(
                _user("q"),
                _answer("c"),
                _answer("d"),
                chat_template_kwargs={"tokenize": False},
            ),
            "template does not take it: .*tokenize",
        ),
        (
            _row(
                [{"role": "mute", "content": "q"}], _answer("c"), _answer("d")
            ),
            "template does not take it: no mutes",
        ),
        (_row([], _answer("c"), _answer("d")), "a prompt without a message"),
    ],
)
def test_bad_conversations(tokenizer, row, message):
  good = _row(_user("q"), _answer("c"), _answer("d"))
  with pytest.raises(errors.UserError, match=f"row 2 of 2: .*{message}") as e:
    _tokenize([good, row], tokenizer)
  assert "\n" not in str(e.value)


def test_no_chat_template():
  rows = [_row(_user("q"), _answer("c"), _answer("d"))]
  with pytest.raises(errors.UserError, match=r"row 1 of 1 .*no chat template"):
    _tokenize(rows, _tokenizer(template=None))


def test_a_conversation_is_rendered_once(tokenizer, monkeypatch):
  seen = []
  apply = tokenizer.apply_chat_template
  monkeypatch.setattr(
      tokenizer,
      "apply_chat_template",
      lambda messages, **kwargs: seen.append(messages)
      or apply(messages, **kwargs),
  )
  _tokenize([_row(_user("q"), _answer("c"), _answer("d"))] * 9, tokenizer)
  assert len(seen) == 3


# What is skipped, cut or refused.


def test_equal_and_empty_pairs_are_skipped(tokenizer):
  rows = [
      _row("a", "c", "c"),
      _row("a", "c", f"c{_EOS}"),  # Equal as tokens.
      _row("a", "", "c"),
      _row("a", "c", _EOS),
      _row("", "", ""),
      _row(_user("q"), _answer("c"), _answer("c")),
      _row(_user("q"), _answer("c"), _answer("")),
      _row(_user("q"), [], _answer("c")),
      _row("a", "c", "d"),
  ]
  data = _tokenize(rows, tokenizer)
  assert data.counts == data_lib.Counts(equal=3, empty=5)
  assert data.source.tolist() == [8]
  assert len(data.prompts) == 1
  assert len(data.completions) == 2


@pytest.mark.parametrize(
    ("max_length", "prompt", "cut"),
    [(8, "<abcd", 0), (7, "abcd", 1), (6, "bcd", 1), (4, "d", 1)],
)
def test_prompts_are_cut_on_the_left(tokenizer, max_length, prompt, cut):
  # The longer completion has three tokens, the prompt five.
  data = _tokenize([_row("abcd", "c", "de")], tokenizer, max_length=max_length)
  expected = [_BOS_ID] * prompt.startswith("<") + _ids(prompt.lstrip("<"))
  assert _lists(data.prompts) == [expected]
  assert _lists(data.completions) == [_ids("c$"), _ids("de$")]
  assert data.counts == data_lib.Counts(cut_prompts=cut)


def test_cut_prompts_are_other_prompts(tokenizer):
  rows = [_row("abc", "c", "d"), _row("abc", "c", "de"), _row("xbc", "c", "fg")]
  data = _tokenize(rows, tokenizer, max_length=5)
  assert _lists(data.prompts) == [_ids("abc"), _ids("bc")]
  assert data.prompt_of.tolist() == [0, 0, 1, 1, 1]
  assert data.pairs.tolist() == [[0, 1], [2, 3], [2, 4]]


def test_completions_without_room_for_a_prompt_are_skipped(tokenizer):
  rows = [_row("a", "c", "defg"), _row("a", "c", "d"), _row("a", "cdef", "g")]
  data = _tokenize(rows, tokenizer, max_length=5)
  assert data.counts == data_lib.Counts(too_long=2)
  assert data.source.tolist() == [1]


@pytest.mark.parametrize(
    ("rows", "max_length", "message"),
    [
        ([], _MANY, "at least one preference pair, got none"),
        (
            [_row("a", "c", "c"), _row("a", "", "c"), _row("a", "b", "c")],
            2,
            r"3 pairs skipped \(1 equal, 1 empty, 1 too long\); raise max_le",
        ),
        ([_row("a", "c", "c")], _MANY, r"1 pair skipped \(1 equal\)$"),
    ],
)
def test_no_pair_left(tokenizer, rows, max_length, message):
  with pytest.raises(errors.UserError, match=message):
    _tokenize(rows, tokenizer, max_length=max_length)


def test_prompt_without_a_token():
  rows = [_row("a", "c", "d"), _row("", "c", "d")]
  assert len(_tokenize(rows, _tokenizer()).prompts) == 2
  with pytest.raises(errors.UserError, match="row 2 of 2: a prompt without a"):
    _tokenize(rows, _tokenizer(bos=False))


def test_tokenizer_of_another_model(tokenizer):
  (last,) = _ids("b")
  rows = [_row("a", "a", "aa"), _row("a", "a", "ab")]
  _tokenize(rows, tokenizer, vocab_size=last + 1)
  with pytest.raises(
      errors.UserError,
      match=f"row 2 of 2: .*of {_SIZE} tokens gives token {last}, but the"
      f" model has {last}; the tokenizer is not",
  ):
    _tokenize(rows, tokenizer, vocab_size=last)


def test_tokenizer_without_an_eos():
  tokenizer = _tokenizer()
  tokenizer.eos_token = None
  with pytest.raises(errors.UserError, match="names no EOS"):
    _tokenize([_row("a", "c", "d")], tokenizer)


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        ({}, ""),
        (
            {"equal": 2, "empty": 1, "cut_prompts": 5},
            "3 pairs skipped (2 equal, 1 empty), 5 prompts cut on the left",
        ),
        ({"too_long": 1}, "1 pair skipped (1 too long)"),
        ({"cut_prompts": 1}, "1 prompt cut on the left"),
    ],
)
def test_note(counts, note):
  assert data_lib.Counts(**counts).note() == note


def test_digest(tokenizer):
  base = [_row("a", "b", "c"), _row("a", "b", "d")]
  others = [
      base[::-1],
      [_row("a", "c", "b"), base[1]],
      [_row("ab", "b", "c"), base[1]],
      [_row("a", "bb", "c"), _row("a", "bb", "d")],
      base[:1],
      [base[0], base[0]],
  ]
  digests = [_tokenize(rows, tokenizer).digest() for rows in (base, *others)]
  assert len(set(digests)) == len(digests)
  skipping = _tokenize([_row("a", "b", "b"), *base], tokenizer)
  assert skipping.digest() == digests[0]
  assert len(digests[0]) == 64
  # Nothing but the sizes tells these apart.
  data = _tokenize(base, tokenizer)
  moved = dataclasses.replace(
      data,
      prompts=(np.append(data.prompts[0], data.completions[0][:1]),),
      completions=(data.completions[0][1:], *data.completions[1:]),
  )
  assert moved.digest() != data.digest()


def test_digest_is_stable(tokenizer):
  assert _tokenize([_row("a", "b", "c")], tokenizer).digest() == (
      "bb3122f10c76c910fc6d4b4c2dfbf4c067d28d3e412074540b86842ab00b579a"
  )


_TEXT = st.text("abc ", max_size=6)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    rows=st.lists(st.builds(_row, _TEXT, _TEXT, _TEXT), min_size=1, max_size=6),
    max_length=st.integers(1, 12),
)
def test_ids_say_what_the_rows_say(tokenizer, rows, max_length):
  try:
    data = _tokenize(rows, tokenizer, max_length=max_length)
  except errors.UserError as error:
    assert "no preference pair is left" in str(error)
    return
  assert len(data.pairs) == len(data.source)
  assert len(data.pairs) + data.counts.skipped == len(rows)
  assert len(data.prompt_of) == len(data.completions)
  cut = 0
  for pair, i in zip(data.pairs, data.source, strict=True):
    (number,) = {int(data.prompt_of[c]) for c in pair}
    prompt = data.prompts[number].tolist()
    whole = [_BOS_ID, *_ids(rows[i]["prompt"])]
    assert prompt
    assert prompt == whole[-len(prompt) :]
    cut += prompt != whole
    lengths = []
    for completion, name in zip(pair, ("chosen", "rejected"), strict=True):
      ids = data.completions[completion].tolist()
      assert ids == [*_ids(rows[i][name]), _EOS_ID]
      lengths.append(len(prompt) + len(ids))
    # Not one token is lost in vain.
    assert max(lengths) == max_length or prompt == whole
    assert max(lengths) <= max_length
  assert cut == data.counts.cut_prompts
  numbered = list(zip(data.prompt_of, data.completions, strict=True))
  for items in (data.prompts, numbered):
    assert len(set(map(str, items))) == len(items)
  assert sorted(set(data.pairs.ravel())) == list(range(len(data.completions)))


# As TRL has it.


@pytest.mark.slow  # TRL's import alone takes several seconds.
@pytest.mark.filterwarnings("ignore")
def test_prompts_as_trl_extracts_them():
  data_utils = pytest.importorskip("trl.data_utils")
  for chosen, rejected in _IMPLICIT:
    expected = data_utils.extract_prompt(
        {"chosen": chosen, "rejected": rejected}
    )
    assert data_lib.extract_prompt(chosen, rejected) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["texts", "messages", "diverging"])
def test_ids_as_trl_makes_them(kind, datasets):
  trainer = pytest.importorskip("trl.trainer.dpo_trainer")
  template = _TEMPLATE
  if kind == "diverging":
    template = _TEMPLATE.replace("%}assistant:{", "%}assistant: thinks{")
  tokenizer = _tokenizer(template=template)
  texts = [("ab c", " de", "f"), ("x", "y", f"zz{_EOS}"), ("ab c", "g", "h")]
  if kind == "texts":
    rows = [_row(*row) for row in texts]
  else:
    rows = [
        _row(_user(p), _answer(f" {c}"), _answer(r) + _user(c) + _answer(p))
        for p, c, r in texts
    ]
  # The method asks of its trainer nothing but the tokenizer.
  theirs = trainer.DPOTrainer._prepare_dataset(
      types.SimpleNamespace(_tokenizer=tokenizer),
      datasets.Dataset.from_list(rows),
      tokenizer,
      types.SimpleNamespace(
          dataset_num_proc=None, max_length=None, truncation_mode="keep_start"
      ),
      "train",
  )
  ours = _tokenize(rows, tokenizer)
  assert ours.source.tolist() == list(range(len(rows)))
  for (chosen, rejected), row in zip(ours.pairs, theirs, strict=True):
    prompt = ours.prompts[ours.prompt_of[chosen]]
    assert prompt.tolist() == row["prompt_ids"]
    assert ours.completions[chosen].tolist() == row["chosen_ids"]
    assert ours.completions[rejected].tolist() == row["rejected_ids"]
