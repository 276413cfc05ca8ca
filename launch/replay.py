r"""Computes a score of a run again, and compares weights and answers.

  python -m launch.replay --workdir=runs/tiny --program=best
  python -m launch.replay --workdir=runs/tiny --program=3f9a --split=test
  python -m launch.replay --workdir=runs/tiny --model=seed

The model is merged again from what the archive has, and asked the same items,
by the same kind of sampler and in the same batches. Nothing is written. The
last line is the result as JSON; the exit status is 0 where all is the same, and
1 where the weights, the score or an answer is not.
"""

import json
import sys

from absl import flags

from launch import app
from selfdev_jax import errors
from selfdev_jax import loop
from selfdev_jax import records
from selfdev_jax import storage
from selfdev_jax.handover import reopen
from selfdev_jax.handover import replay
from selfdev_jax.tiny import world

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory or URL of the run.")
_PROGRAM = flags.DEFINE_string(
    "program", None, "How the program's digest begins, or 'best'."
)
_MODEL = flags.DEFINE_string(
    "model", None, "Another model by the name of its score: seed, ties:..."
)
_SPLIT = flags.DEFINE_enum(
    "split",
    None,
    [records.DEV, records.TEST],
    "By default both, as far as there are scores.",
)
_VLLM_PYTHON = flags.DEFINE_string(
    "vllm_python",
    None,
    "Interpreter that has vLLM; by default .venv-vllm, or else this one.",
)
_VLLM_ADDRESS = flags.DEFINE_string(
    "vllm_address", None, "A vLLM server that is running; by default its own."
)
flags.mark_flag_as_required("workdir")


def main(_):
  if (_PROGRAM.value is None) == (_MODEL.value is None):
    raise errors.UserError("give either --program or --model")
  with storage.fetch(_WORKDIR.value) as workdir:
    result = replay.run(
        workdir,
        program=_PROGRAM.value,
        model=_MODEL.value,
        split=_SPLIT.value,
        directories=world.prepare(reopen.read_config(workdir)),
        host=loop.Host(_VLLM_PYTHON.value, _VLLM_ADDRESS.value),
    )
  print(replay.table(result))
  print(json.dumps(result))
  if not replay.is_same(result):
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
