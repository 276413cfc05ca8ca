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
"""

import json

from absl import flags
import jax
from ml_collections import config_flags

from launch import app
from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax.dpo import run

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), such as configs/dpo.py."
)
_MODEL = flags.DEFINE_string(
    "model", None, "Hugging Face directory, or org/name[@revision] on the hub."
)
_PAIRS = flags.DEFINE_string("pairs", None, "Preference pairs, see above.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the checkpoints, metrics and the adapter."
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
    "coordinator", None, "HOST:PORT of process 0; with several processes."
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
  _join()
  summary = run.run(
      config,
      _MODEL.value,
      _PAIRS.value,
      _WORKDIR.value,
      adapter=_ADAPTER.value,
      export=_EXPORT.value,
      seed=_SEED.value,
  )
  if jax.process_index() == 0:
    print(json.dumps(summary))


def _join():
  """Meets the other processes, where there are any."""
  holders = (_COORDINATOR, _PROCESSES, _PROCESS)
  given = [holder.value is not None for holder in holders]
  if not any(given):
    return
  if not all(given):
    raise errors.UserError(
        "--coordinator, --processes and --process go together"
    )
  if _PROCESS.value >= _PROCESSES.value:
    raise errors.UserError(
        f"--process={_PROCESS.value} has to be below"
        f" --processes={_PROCESSES.value}; they are counted from 0"
    )
  host, _, port = _COORDINATOR.value.rpartition(":")
  if not host or not port.isdigit():
    raise errors.UserError(
        f"--coordinator={_COORDINATOR.value} is not like HOST:PORT"
    )
  try:
    jax.distributed.initialize(
        _COORDINATOR.value,
        _PROCESSES.value,
        _PROCESS.value,
        # By default it would listen on every address of the host.
        coordinator_bind_address=_COORDINATOR.value,
    )
  except RuntimeError as error:
    reason = " ".join(str(error).split())
    raise errors.UserError(
        f"--coordinator={_COORDINATOR.value}: the processes did not meet"
        f" ({reason})"
    ) from None


if __name__ == "__main__":
  app.keep_compiled()
  app.run(main)
