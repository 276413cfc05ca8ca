r"""Trains a model on preference pairs: DPO, with LoRA or of all weights.

  python -m launch.train_dpo --config=configs/dpo.py --model=HFDIR \
    --pairs=PAIRS.jsonl --workdir=runs/dpo
  ... --export=NEW_HFDIR             the whole model, the adapter added to it
  ... --config.trains=full           every weight, no adapter

--pairs is a JSONL file, a directory that `datasets` saved, or
`org/name[:split]` on the hub: rows with prompt, chosen and rejected, texts or
lists of messages, as TRL takes them. Pairs that teach nothing are skipped and
counted: equal texts, empty completions, completions that leave no room for
their prompt. A prompt that is too long is cut on the left, and counted.

The workdir gets adapter/ (PEFT), metrics.jsonl, tensorboard/ and checkpoints/;
the same command resumes a training that was stopped, on other devices too. Any
key of the config can be overridden: --config.beta=0.1.

Over several hosts, the same command on each, on a file system that they share:

  ... --coordinator=HOST:PORT --processes=2 --process=0      (and --process=1)
  srun python -m launch.train_dpo ... --coordinator=auto     (SLURM, Open MPI, a
                                     TPU slice, GKE: as the scheduler says)

One process may have its --workdir at a URL, such as gs://bucket/dpo: it works
in a copy on this machine and pushes that every --config.save_every steps, and
at its end, also where it is stopped.
"""

import json

from absl import flags
import jax
from ml_collections import config_flags

from launch import app
from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import storage
from selfdev_jax.dpo import processes
from selfdev_jax.dpo import run

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), such as configs/dpo.py."
)
_MODEL = flags.DEFINE_string(
    "model", None, "Hugging Face directory, or org/name[@revision] on the hub."
)
_PAIRS = flags.DEFINE_string("pairs", None, "Preference pairs, see above.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory, or URL, of the checkpoints, metrics and the adapter.",
)
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "PEFT directory to start from; by default a fresh adapter."
)
_EXPORT = flags.DEFINE_string(
    "export", None, "New Hugging Face directory for the whole model."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the fresh adapter and of the order of pairs.", lower_bound=0
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, or auto; with several processes.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "How many there are.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    "process", None, "Which of them this is, from 0.", lower_bound=0
)
flags.mark_flags_as_required(["config", "model", "pairs", "workdir"])


def main(_):
  config = app.load_config(_CONFIG, config_lib.Dpo)
  if storage.is_remote(_WORKDIR.value) and _COORDINATOR.value is not None:
    raise errors.UserError(
        f"--workdir={_WORKDIR.value} is for one process, without --coordinator;"
        " several need a directory that all their hosts share"
    )
  processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  with storage.open_workdir(_WORKDIR.value) as (workdir, push):

    def on_step(step, _):
      if step % config.save_every == 0:
        push()

    summary = run.run(
        config,
        _MODEL.value,
        _PAIRS.value,
        workdir,
        adapter=_ADAPTER.value,
        export=_EXPORT.value,
        seed=_SEED.value,
        on_step=on_step,
    )
  if jax.process_index() == 0:
    print(json.dumps(summary))


if __name__ == "__main__":
  app.keep_compiled()
  app.run(main)
