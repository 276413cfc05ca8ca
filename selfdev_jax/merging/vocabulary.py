"""Vocabularies that differ: one tokenizer for the output, rows put in line.

The rules are those of mergekit 0.1.5; tokens are compared by their texts.
"""

import collections
from collections.abc import Mapping
import copy
import dataclasses
import json
from typing import Any

import jax
import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers as tokenizers_lib
import transformers

from selfdev_jax import errors

UNION, BASE = "union", "base"
AUTO = "auto"

Tokenizer = transformers.PreTrainedTokenizerBase

# As OpenAI described it: github.com/openai/openai-python, chatml.md, 2023.
_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n'"
        " + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\\n' }}"
        "{% endif %}"
    )
}


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """The vocabulary of a merge's output.

  Attributes:
    tokenizer: of the output, a copy.
    own: for each model [vocab_out] int32, which of its rows has the text of the
      output's token; -1 where it has none.
    base: the model that rows are taken from first; None: none.
  """

  tokenizer: Tokenizer
  own: Mapping[str, np.ndarray]
  base: str | None

  @property
  def size(self) -> int:
    """How many rows the output's embedding has."""
    return len(next(iter(self.own.values())))


def align(
    source: str,
    base: str | None,
    tokenizers: Mapping[str, Tokenizer],
    vocab_sizes: Mapping[str, int],
) -> Vocabulary:
  """Chooses or makes the output's tokenizer and finds its tokens in the models.

  Args:
    source: "base": the base model's, or without one that of the first model;
      "union": the same with all tokens that others have beyond it; or the
      model whose tokenizer it is.
    base: the base model; None: there is none.
    tokenizers: of all models, and of `source` if it is another; fast ones.
    vocab_sizes: how many rows the embeddings of the merged models have. Tokens
      without a row do not exist: they are left out of the tokenizer.

  Raises:
    UserError: if a tokenizer is not a fast one, or its model has fewer rows
      than its vocabulary without added tokens asks for.
  """
  for model, tokenizer in tokenizers.items():
    if not tokenizer.is_fast:
      raise errors.UserError(
          f"the tokenizer of {model} is not a fast one: tokenizer_source needs"
          " its tokenizer.json"
      )
  first = next(iter(vocab_sizes)) if base is None else base
  chosen = first if source in (BASE, UNION) else source
  out = _within(chosen, tokenizers[chosen], vocab_sizes.get(chosen))
  if source == UNION:
    order = dict.fromkeys([first, *vocab_sizes])
    _add_all(out, {model: tokenizers[model] for model in order}, vocab_sizes)
  vocab = out.get_vocab()
  own = {}
  for model, size in vocab_sizes.items():
    theirs = tokenizers[model].get_vocab()
    own[model] = np.full(max(vocab.values()) + 1, -1, np.int32)
    for token, row in vocab.items():
      found = theirs.get(token, -1)
      if found < size:
        own[model][row] = found
  return Vocabulary(out, own, base)


def _within(model: str, tokenizer: Tokenizer, size: int | None) -> Tokenizer:
  """A copy of the tokenizer without tokens that have no row."""
  tokenizer = copy.deepcopy(tokenizer)
  vocab = tokenizer.get_vocab()
  beyond = {
      token for token, row in vocab.items() if size is not None and row >= size
  }
  if not beyond:
    return tokenizer
  backend = tokenizer.backend_tokenizer
  needed = 1 + max(backend.get_vocab(with_added_tokens=False).values())
  if needed > size:
    raise errors.UserError(
        f"the vocabulary of {model} has {needed} tokens, its embedding"
        f" {size} rows: take another tokenizer_source"
    )
  # The library has no way to take a token out but to write it anew.
  parts = json.loads(backend.to_str())
  parts["added_tokens"] = [
      token for token in parts["added_tokens"] if token["content"] not in beyond
  ]
  tokenizer._tokenizer = tokenizers_lib.Tokenizer.from_str(json.dumps(parts))
  # What is named as special would be added again on loading.
  for name, token in tokenizer.special_tokens_map.items():
    if isinstance(token, str) and token in beyond:
      setattr(tokenizer, name, None)
  return tokenizer


def _add_all(
    out: Tokenizer,
    tokenizers: Mapping[str, Tokenizer],
    vocab_sizes: Mapping[str, int],
):
  """Adds to `out` what it lacks, in the order of the models and their rows.

  What is an added token in a model becomes one, as the first has it.
  """
  plain, added = {}, {}
  for model, tokenizer in tokenizers.items():
    specials = {
        token.content: token
        for token in tokenizer.added_tokens_decoder.values()
    }
    vocab = tokenizer.get_vocab()
    for token in sorted(vocab, key=vocab.get):
      if vocab[token] >= vocab_sizes[model]:
        continue
      if token in specials:
        added.setdefault(token, specials[token])
      else:
        plain.setdefault(token)
  known = out.get_vocab()
  out.add_tokens([t for t in plain if t not in known and t not in added])
  out.add_tokens(list(added.values()))


def rows(
    vocabulary: Vocabulary,
    tensors: Mapping[str, np.ndarray | jax.Array],
    dtype: Any,
) -> dict[str, np.ndarray]:
  """Puts embeddings or heads in line with the output's vocabulary.

  A model without a token gets the row of the only one that has it, or else the
  base's, or else the average of those that have it, or zeros.

  Args:
    vocabulary: from `align`.
    tensors: of the models that are merged, each [its vocab, embed].
    dtype: of the result and of the average.

  Returns:
    For each model [vocab_out, embed].
  """
  arrays = {model: np.asarray(tensor) for model, tensor in tensors.items()}
  own = {model: vocabulary.own[model] for model in arrays}
  counts = sum((rows >= 0).astype(np.int32) for rows in own.values())
  lacking = np.flatnonzero(counts < len(own))
  width = next(iter(arrays.values())).shape[1]
  given = np.zeros((len(lacking), width), dtype)
  for model, array in arrays.items():
    there = np.flatnonzero(own[model][lacking] >= 0)
    given[there] += array[own[model][lacking[there]]].astype(dtype)
  given /= np.maximum(counts[lacking], 1)[:, None].astype(dtype)
  if vocabulary.base in arrays:
    theirs = own[vocabulary.base]
    there = np.flatnonzero(theirs[lacking] >= 0)
    given[there] = arrays[vocabulary.base][theirs[lacking[there]]]
  aligned = {}
  for model, array in arrays.items():
    result = np.zeros((vocabulary.size, width), dtype)
    result[lacking] = given
    there = np.flatnonzero(own[model] >= 0)
    result[there] = array[own[model][there]]
    aligned[model] = result
  return aligned


def chat_template(
    setting: str | None, tokenizers: Mapping[str, Tokenizer]
) -> str | None:
  """The chat template that a recipe asks for.

  Args:
    setting: "auto": the commonest of the models', the first where several are;
      "chatml"; or a template in Jinja.
    tokenizers: of the models, in order.

  Returns:
    The template; None: the tokenizer is left as it is.

  Raises:
    UserError: if the setting is another name, or is not a template.
  """
  if setting is None:
    return None
  if setting == AUTO:
    found = [_own_template(tokenizer) for tokenizer in tokenizers.values()]
    counts = collections.Counter(text.strip() for text in found if text)
    return counts.most_common(1)[0][0] if counts else None
  if setting in _TEMPLATES:
    return _TEMPLATES[setting]
  if "{" not in setting:
    raise errors.UserError(
        f"chat_template {setting!r} is no template; give {AUTO},"
        f" {', '.join(_TEMPLATES)}, or paste the template"
    )
  # As transformers compiles them.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  try:
    environment.parse(setting)
  except jinja2.TemplateSyntaxError as error:
    raise errors.UserError(
        f"chat_template is not Jinja: line {error.lineno}: {error.message}"
    ) from None
  return setting


def _own_template(tokenizer: Tokenizer) -> str | None:
  template = tokenizer.chat_template
  # Some have several, by name.
  return template.get("default") if isinstance(template, dict) else template


class _Generation(jinja2.ext.Extension):
  """The tag around what the assistant says, transformers' own."""

  tags = frozenset({"generation"})

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(["name:endgeneration"], drop_needle=True)
