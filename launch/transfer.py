r"""Applies the best programs of a finished run to experts it never saw.

  python -m launch.transfer --workdir=runs/gsm8k --experts=DIR,DIR \
    --tasks=gsm8k,math --evaluate=math.test_file=FILE.jsonl,math.test_size=500
  python -m launch.transfer --workdir=runs/tiny --experts=DIR,DIR,DIR \
    --tasks=arithmetic

Experts are models that came from the run's seed model, in the order in which
programs get them. Beside the programs stands task arithmetic, tuned for these
experts with as many evaluations, and the seed model and the experts themselves.
The run's own settings of a task hold; --evaluate changes them. Nothing is
written to the run's archive; --out gets every answer and results.json, and the
same command resumes. The last line is the result as JSON.
"""

import json

from absl import flags

from launch import app
from selfdev_jax import loop
from selfdev_jax import storage
from selfdev_jax import transfer
from selfdev_jax.sampling import engine
from selfdev_jax.tiny import world

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory or URL of the run.")
_EXPERTS = flags.DEFINE_list(
    "experts", None, "Directories, or org/name[@revision] on the hub."
)
_TASKS = flags.DEFINE_list("tasks", None, "Names of tasks.")
_TOP = flags.DEFINE_integer(
    "top", 15, "Programs of the run to apply, its best ones.", lower_bound=1
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Directory; by default WORKDIR/transfer/ and the experts' names.",
)
_EVALUATE = flags.DEFINE_list(
    "evaluate",
    [],
    "TASK.KEY=VALUE, with keys of config.evaluate: gsm8k.test_file=FILE.",
)
_SAMPLER = flags.DEFINE_enum(
    "sampler", None, engine.KINDS, "What generates; by default as in the run."
)
_VLLM_PYTHON = flags.DEFINE_string(
    "vllm_python",
    None,
    "Interpreter that has vLLM; by default .venv-vllm, or else this one.",
)
_VLLM_ADDRESS = flags.DEFINE_string(
    "vllm_address", None, "A vLLM server that is running; by default its own."
)
_ALLOW_WEAK = flags.DEFINE_bool(
    "allow_weak_sandbox",
    False,
    "Trace programs for another number of experts also where neither seccomp"
    " nor bubblewrap is to be had.",
)
flags.mark_flags_as_required(["workdir", "experts", "tasks"])


def main(_):
  with storage.fetch(_WORKDIR.value) as workdir:
    config = transfer.read_config(workdir)
    result = transfer.run(
        workdir,
        _EXPERTS.value,
        transfer.task_settings(config, _TASKS.value, _EVALUATE.value),
        top=_TOP.value,
        out=_OUT.value,
        kind=_SAMPLER.value,
        directories=world.prepare(config),
        host=loop.Host(
            vllm_python=_VLLM_PYTHON.value,
            vllm_address=_VLLM_ADDRESS.value,
            allow_weak_sandbox=_ALLOW_WEAK.value,
        ),
    )
  print(transfer.table(result))
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
