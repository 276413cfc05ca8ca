"""Applies a program that was handed on, as the run that found it did."""

from collections.abc import Sequence
import contextlib
import os
import pathlib

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.merging import card
from selfdev_jax.sandbox import verify


def run(
    program: str | os.PathLike,
    base: str,
    experts: Sequence[str],
    out: str | os.PathLike,
    scope: str,
) -> tuple[models.DecoderConfig, str]:
  """Merges by program IR and writes a Hugging Face directory.

  All layers of a leaf are merged at once, by the code that merges in a run. A
  tensor at a time, as `stream.merge_program` does it, XLA adds up what a
  program sums over a tensor in another order, and the last bits differ.

  Args:
    program: file of JSON program IR; nothing in it is trusted.
    base: the seed model, a directory or `org/name[@revision]`.
    experts: likewise; in the order of the program's task vectors.
    out: made anew, whole or not at all; an existing one is replaced.
    scope: `mlp` or `all`; what is out of it is the base's.

  Returns:
    The output's shape and its `models.checksum`.

  Raises:
    UserError: naming the model, or what is wrong with the program.
  """
  try:
    text = pathlib.Path(program).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
        f"--program={program} cannot be read: {error}"
    ) from None
  names = (base, *experts)
  for i, name in enumerate(names):
    if name in names[:i]:
      raise errors.UserError(
          f"{name} is given twice among --base and --experts"
      )
  paths = {name: convert.resolve(name) for name in names}
  config = config_lib.Config(
      name="",
      seed_model=base,
      experts=tuple(experts),
      merge=config_lib.Merge(scope=scope),
  )
  with contextlib.ExitStack() as stack:
    loaded = worker_lib.load(config, paths, stack)
    try:
      verified = verify.verify(
          text, config.sandbox, loaded.merges.shapes, len(experts)
      )
    except verify.VerifyError as error:
      raise errors.UserError(
          f"{program} is not admitted (verify, {error.code}): {error.message} A"
          " program in JSON is for models of one shape and for one number of"
          " experts, its Python source for any"
      ) from None
    merged = loaded.merges.program(verified.program)
  if merged.failure:
    raise errors.UserError(
        f"{program} gives no model of {', '.join(names)}: {merged.failure}"
    )
  about = (
      f"# Program IR of {pathlib.Path(program).name}\n# {verified.digest}:"
      f" {verified.stats['equations']:.0f} operations"
  )
  text = card.card(about, None, names, base, pathlib.Path(out).name)
  convert.save(
      out,
      loaded.decoder,
      merged.params,
      loaded.directory,
      finish=lambda new: (new / "README.md").write_text(text, encoding="utf-8"),
  )
  return loaded.decoder, models.checksum(merged.params)
