r"""Merges models into a Hugging Face directory, by a recipe or a program.

  python -m launch.merge --recipe=FILE.yml --out=DIR
  python -m launch.merge --program=FILE.py --base=DIR --experts=DIR,DIR \
    --out=DIR
  python -m launch.merge --program=DIR/program.json --base=DIR \
    --experts=DIR,DIR --scope=all --out=DIR

A recipe is mergekit's YAML (models or slices, merge_method, base_model, dtype,
out_dtype, parameters, tokenizer_source, chat_template); what is not supported
is refused by key and line. A program defines merge(base, task_vectors), as the
factory writes them: it is admitted by the sandbox first, and merges the MLP's
weights, or with --scope=all every one. In JSON it is what launch.export wrote:
it is verified anew and merges as in the run, with the same bits.

Models are directories, or `org/name[@revision]` on the Hugging Face hub. They
may be larger than the memory: they pass tensor by tensor, but for a program in
JSON, which needs the room that the run's merges need.
"""

import pathlib
import sys
import time

if __name__ == "__main__":
  # transformers imports PyTorch where it finds it: seconds, for nothing here.
  sys.modules.setdefault("torch", None)

from absl import flags

from launch import app
from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import sandbox
from selfdev_jax.merging import recipes
from selfdev_jax.merging import stream

_RECIPE = flags.DEFINE_string("recipe", None, "mergekit's YAML.")
_PROGRAM = flags.DEFINE_string("program", None, "Program in Python or JSON.")
_BASE = flags.DEFINE_string("base", None, "Seed model; with --program.")
_EXPERTS = flags.DEFINE_list("experts", [], "Its experts; with --program.")
_SCOPE = flags.DEFINE_enum(
    "scope", "mlp", ["mlp", "all"], "What a program merges."
)
_OUT = flags.DEFINE_string("out", None, "Directory to write.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of random methods.", lower_bound=0, upper_bound=2**32 - 1
)
_CALIBRATION = flags.DEFINE_string(
    "calibration",
    None,
    "Texts for fisher and regmean: .txt, one a line, or .jsonl.",
)
_ALLOW_WEAK = flags.DEFINE_bool(
    "allow_weak_sandbox",
    False,
    "Run a program also where neither seccomp nor bubblewrap is to be had.",
)
flags.mark_flag_as_required("out")


def main(_):
  if (_RECIPE.value is None) == (_PROGRAM.value is None):
    raise errors.UserError("give either --recipe or --program")
  is_recipe = _RECIPE.value is not None
  unused = (
      ("base", "experts", "scope") if is_recipe else ("calibration", "seed")
  )
  for name in unused:
    if flags.FLAGS[name].present:
      raise errors.UserError(
          f"--{name} goes with --{'program' if is_recipe else 'recipe'}"
      )
  if not _OUT.value:
    raise errors.UserError("--out is empty; name a new directory")
  out = pathlib.Path(_OUT.value).resolve()
  if out.exists() and not _OVERWRITE.value:
    raise errors.UserError(
        f"--out={out} exists; name a new directory, or give --overwrite"
    )
  if out.exists() and not (out / "config.json").is_file():
    raise errors.UserError(
        f"--out={out} is no model directory, so it is not overwritten; name a"
        " new one"
    )
  start = time.monotonic()
  if is_recipe:
    config = stream.merge_recipe(
        recipes.read(_RECIPE.value),
        out,
        seed=_SEED.value,
        calibration_file=_CALIBRATION.value,
    )
  elif pathlib.Path(_PROGRAM.value).suffix == ".json":
    config, weights = _reapply(out)
    print(f"weights {weights}")
  else:
    config = _merge_program(out)
  size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
  print(
      f"{out}: {config.family}, {config.layers} layers, {size / 1e6:,.0f} MB,"
      f" {time.monotonic() - start:.1f} s"
  )


def _check_models():
  if _BASE.value is None or not _EXPERTS.value:
    raise errors.UserError(
        "--program needs --base, the seed model, and --experts, separated by"
        " commas"
    )


def _reapply(out: pathlib.Path):
  # The rest does without what a run imports.
  from selfdev_jax.handover import reapply

  _check_models()
  return reapply.run(
      _PROGRAM.value, _BASE.value, _EXPERTS.value, out, _SCOPE.value
  )


def _merge_program(out: pathlib.Path):
  _check_models()
  try:
    source = pathlib.Path(_PROGRAM.value).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
        f"--program={_PROGRAM.value} cannot be read: {error}"
    ) from None
  shapes = stream.program_shapes(_BASE.value, _SCOPE.value)
  limits = config_lib.Sandbox()
  with sandbox.Sandbox(
      limits, shapes, len(_EXPERTS.value), _ALLOW_WEAK.value
  ) as box:
    verdict = box.admit(source)
  if isinstance(verdict, sandbox.Rejection):
    raise errors.UserError(
        f"{_PROGRAM.value} is not admitted ({verdict.stage}, {verdict.code}):"
        f" {verdict.message}"
    )
  return stream.merge_program(
      sandbox.kernels(verdict.program),
      source,
      _BASE.value,
      _EXPERTS.value,
      out,
      _SCOPE.value,
  )


if __name__ == "__main__":
  # A small model is merged in less time than its kernels take to compile.
  app.keep_compiled()
  app.run(main)
