"""What merges weigh a model's parameters by, from a few texts.

Each text is seen alone, so that beside the parameters and the result memory
holds one more like it. Activations and gradients are in the parameters' dtype,
sums in float32.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from selfdev_jax import errors
from selfdev_jax import models

# Leaf -> the one whose input it shares.
_READS = {
    **dict.fromkeys(("q", "k", "v"), "q"),
    "o": "o",
    **dict.fromkeys(("gate", "up"), "gate"),
    "down": "down",
}
_FIELDS = (("text",), ("question", "answer"))
_SHORTEST = 16


def read_texts(path: str | os.PathLike) -> list[str]:
  """The texts of a calibration file; blank lines are none.

  Args:
    path: .txt with a text a line, or .jsonl with an object a line that has
      "text", or "question" and "answer", which become two lines of one text.

  Raises:
    UserError: naming the file and the line.
  """
  path = pathlib.Path(path)
  if path.suffix not in (".txt", ".jsonl"):
    raise errors.UserError(
        f"{path} is neither .txt, a text a line, nor .jsonl, an object a line"
    )
  try:
    lines = path.read_bytes().split(b"\n")
  except OSError as error:
    raise errors.UserError(f"{path} cannot be read: {error}") from None
  texts = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        text = line.decode("utf-8").strip()
        texts.append(_of_object(text) if path.suffix == ".jsonl" else text)
      except ValueError as error:
        raise errors.UserError(f"{path}, line {number}: {error}") from None
  if not texts:
    raise errors.UserError(f"{path} holds no text")
  return texts


def _of_object(line: str) -> str:
  """The text of a line of JSON; ValueError where it has none."""
  try:
    found = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"no JSON: {error.msg}") from None
  for fields in _FIELDS:
    if isinstance(found, dict) and found.keys() >= set(fields):
      values = [found[field] for field in fields]
      if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"{' or '.join(fields)} is empty or no text")
      return "\n".join(values)
  raise ValueError('no object with "text", or with "question" and "answer"')


def fisher(
    config: models.DecoderConfig,
    params: models.Params,
    tokens: Sequence[Sequence[int]],
) -> models.Params:
  """The diagonal of the empirical Fisher information, a sequence a sample.

  The mean over the sequences x of (d log p(x) / d parameter)^2, where log p(x)
  sums over all tokens but the first: the labels are the texts' own tokens,
  none are drawn from the model, and tokens are summed before the square.

  Args:
    config: the decoder's shape.
    params: its parameters.
    tokens: of each sequence, two at least.

  Returns:
    Like `params`, float32.

  Raises:
    UserError: if the sequences do not fit the model, or a gradient is not
      finite.

  References:
    M. Matena, C. Raffel, Merging models with Fisher-weighted averaging, arXiv
    2111.09832, whose Fisher is over labels drawn from the model, or all of
    them, where there are few.
    F. Kunstner et al., Limitations of the empirical Fisher, arXiv 1905.12558.
  """
  params = jax.tree.map(jnp.asarray, params)
  total = _zeros(params)
  for row, length in _rows(config, tokens, least=2):
    total = _add_squared_gradient(config, total, params, row, length)
  return _mean(total, len(tokens))


def gram(
    config: models.DecoderConfig,
    params: models.Params,
    tokens: Sequence[Sequence[int]],
) -> models.Params:
  """X^T X / tokens of what each matrix of the layers is applied to.

  Args:
    config: the decoder's shape.
    params: its parameters.
    tokens: of each sequence, one at least.

  Returns:
    Like `params`: [layers, in, in] float32 for q, k, v, o, gate, up and down,
    None for the other leaves. Where inputs are shared, so is the array.

  Raises:
    UserError: if the sequences do not fit the model, or an activation is not
      finite.

  References:
    X. Jin et al., Dataless knowledge fusion by merging weights of language
    models, arXiv 2212.09849.
  """
  params = jax.tree.map(jnp.asarray, params)
  layers = params["layers"]
  total = _zeros(
      {
          name: jax.ShapeDtypeStruct((len(w), w.shape[2], w.shape[2]), w.dtype)
          for group in ("attention", "mlp")
          for name, w in layers[group].items()
          if name in _READS.values()
      }
  )
  for row, length in _rows(config, tokens, least=1):
    total = _add_gram(config, total, params, row, length)
  mean = _mean(total, sum(map(len, tokens)))
  return jax.tree_util.tree_map_with_path(
      lambda path, _: mean.get(_READS.get(path[-1].key)), params
  )


def _rows(
    config: models.DecoderConfig, tokens: Sequence[Sequence[int]], least: int
) -> Iterator[tuple[np.ndarray, np.int32]]:
  """([1, seq] int32 padded on the right, length) of each sequence."""
  if not tokens:
    raise errors.UserError("no calibration text is given")
  for i, text in enumerate(tokens):
    if not least <= len(text) <= config.max_positions:
      raise errors.UserError(
          f"calibration text {i + 1} has {len(text)} tokens, not {least} to"
          f" {config.max_positions}; cut it or leave it out"
      )
    if not 0 <= min(text) <= max(text) < config.vocab_size:
      raise errors.UserError(
          f"calibration text {i + 1} has tokens outside the model's"
          f" {config.vocab_size}; is this the model's tokenizer?"
      )
  for text in tokens:
    # Powers of two, as each length is compiled anew.
    padded = max(_SHORTEST, 1 << (len(text) - 1).bit_length())
    row = np.zeros((1, padded), np.int32)
    row[0, : len(text)] = text
    yield row, np.int32(len(text))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_squared_gradient(config, total, params, row, length):
  def log_likelihood(params):
    # Nothing before the padding sees the padding: causality is mask enough.
    hidden = models.forward(config, params, row, remat="full")
    logits = models.logits(config, params, hidden[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), row[:, 1:]
    )
    counted = jnp.arange(1, row.shape[1]) < length
    return -jnp.sum(losses, where=counted)

  gradient = jax.grad(log_likelihood)(params)
  return jax.tree.map(
      lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, gradient
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_gram(config, total, params, row, length):
  positions = jnp.arange(row.shape[1], dtype=jnp.int32)

  def square(x):
    x = jnp.where(positions[:, None] < length, x[0].astype(jnp.float32), 0.0)
    # A GPU would multiply in TF32.
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)

  found = models.bind(config, params).observe(
      row,
      positions[None],
      models.causal_mask(jnp.ones_like(row)),
      lambda inputs: jax.tree.map(square, inputs),
  )
  return jax.tree.map(jnp.add, total, found)


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), tree)


def _mean(total: models.Params, n: int) -> models.Params:
  mean, finite = _divide(total, np.float32(n))
  for path, is_finite in jax.tree_util.tree_leaves_with_path(finite):
    if not is_finite:
      name = "/".join(key.key for key in path)
      raise errors.UserError(
          f"the calibration texts give {name} statistics that are not finite;"
          " the model has to be finite, and in bfloat16 or float32"
      )
  return mean


@functools.partial(jax.jit, donate_argnums=0)
def _divide(total, n):
  mean = jax.tree.map(lambda x: x / n, total)
  return mean, jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), mean)
