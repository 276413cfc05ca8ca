r"""Projects time, GPU hours and dollars of a run, and of larger ones.

  python -m launch.project --config=configs/paper_gsm8k.py \
    --gpus=8,64,512 --times=1,100 --device=H200 --dollars_per_gpu_hour=3

prints a Markdown table, a line for each run and cluster, what it assumes, and
one line of JSON. --times=100 is the run with a hundred times the samples of
each iteration, and so as many candidates. Any key of the config can be
overridden: --config.ray.train_hosts=2. Nothing is fetched, loaded or measured:
the seconds come from data sheets and stated efficiencies, as those of
`launch.self_develop --plan`, which says what one device would do, and whether
all is there for it.
"""

import math

from absl import flags
from ml_collections import config_flags

from launch import app
from selfdev_jax import errors
from selfdev_jax import plan
from selfdev_jax.plan import projection

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), such as configs/paper_gsm8k.py."
)
_GPUS = flags.DEFINE_list("gpus", ["8", "64", "512"], "Of each cluster.")
_TIMES = flags.DEFINE_list(
    "times", ["1"], "How many times the config's samples each run has."
)
_DEVICE = flags.DEFINE_enum("device", "H200", list(plan.DEVICES), "The GPUs.")
_RATE = flags.DEFINE_float(
    "dollars_per_gpu_hour",
    None,
    "What a GPU costs; by default no dollars are given.",
    lower_bound=0.0,
)
_DIGITS = 9
flags.mark_flag_as_required("config")


def _numbers(holder: flags.FlagHolder) -> list[int]:
  """Of a flag that takes several, in their order."""
  for text in holder.value:
    if not text.isdecimal() or len(text) > _DIGITS or not int(text):
      raise errors.UserError(
          f"--{holder.name} takes whole numbers from 1 on, of at most {_DIGITS}"
          f" digits, such as 8,64, not {text!r}"
      )
  if not holder.value:
    raise errors.UserError(f"--{holder.name} is empty; give 8, or 8,64")
  return list(map(int, holder.value))


def main(_):
  if _RATE.value is not None and not math.isfinite(_RATE.value):
    raise errors.UserError(
        f"--dollars_per_gpu_hour is {_RATE.value}; give a price, such as 3"
    )
  projection.show(
      app.load_config(_CONFIG),
      _numbers(_GPUS),
      _numbers(_TIMES),
      plan.DEVICES[_DEVICE.value],
      _RATE.value,
  )


if __name__ == "__main__":
  app.run(main)
