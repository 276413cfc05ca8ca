"""Converts a model from Hugging Face to Orbax and back, bit by bit.

  python -m launch.convert --hf=DIR --out=DIR          to an Orbax checkpoint
  python -m launch.convert --flax=DIR --out=HFDIR      and back
  python -m launch.convert --hf=DIR --adapter=PEFTDIR --out=DIR

--hf also takes `org/name[@revision]` on the Hugging Face hub. A LoRA adapter
is applied on the way. The model may be larger than the memory: it passes leaf
by leaf. Weights keep their dtypes.
"""

import math
import pathlib
import time

from absl import flags
import jax

from launch import app
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import progress

_HF = flags.DEFINE_string("hf", None, "Hugging Face directory or hub id.")
_FLAX = flags.DEFINE_string("flax", None, "Checkpoint of this script.")
_OUT = flags.DEFINE_string("out", None, "Directory to write; has to be new.")
_ADAPTER = flags.DEFINE_string("adapter", None, "PEFT directory to apply.")
flags.mark_flag_as_required("out")


def main(_):
  if (_HF.value is None) == (_FLAX.value is None):
    raise errors.UserError("give either --hf or --flax, the model to convert")
  out = pathlib.Path(_OUT.value)
  if out.exists():
    raise errors.UserError(f"--out={out} exists; name a new directory")
  start = time.monotonic()
  if _HF.value is not None:
    like = convert.resolve(_HF.value)
    config, leaves = convert.open_leaves(like)
    save = convert.save_checkpoint
  else:
    config, leaves, like = convert.open_checkpoint(_FLAX.value)
    save = convert.save
  if _ADAPTER.value is not None:
    adapter = convert.load_adapter(_ADAPTER.value, config)
    leaves = convert.apply_adapter(leaves, adapter)
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves))
  progress.note(f"writing {size:,} parameters to {out}")
  save(out, config, leaves, like)
  print(
      f"{out}: {config.family}, {size:,} parameters,"
      f" {leaves['embed'].dtype}, {time.monotonic() - start:.1f} s"
  )


if __name__ == "__main__":
  app.run(main)
