r"""Writes a program of a run as a package to hand on.

  python -m launch.export --workdir=runs/tiny --program=best --out=DIR
  python -m launch.export --workdir=runs/tiny --program=3f9a --out=DIR

DIR is a Hugging Face model directory with a card (what was merged, how, scores
and how to make it again), the program's source and verified IR, and all that is
known of where they come from. The model is merged again, and has to have the
checksum that the archive has of it. Without the run it is applied by

  python -m launch.merge --program=DIR/program.json --base=SEED \
    --experts=A,B --scope=all --out=NEW
"""

from absl import flags

from launch import app
from selfdev_jax import storage
from selfdev_jax.handover import export
from selfdev_jax.handover import reopen
from selfdev_jax.tiny import world

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory or URL of the run.")
_PROGRAM = flags.DEFINE_string(
    "program", "best", "How the program's digest begins, or 'best'."
)
_OUT = flags.DEFINE_string("out", None, "Directory to write; a new one.")
flags.mark_flags_as_required(["workdir", "out"])


def main(_):
  with storage.fetch(_WORKDIR.value) as workdir:
    provenance = export.run(
        workdir,
        _PROGRAM.value,
        _OUT.value,
        world.prepare(reopen.read_config(workdir)),
    )
  print(
      f"{_OUT.value}: program {provenance['program']}, weights"
      f" {provenance['weights']}"
  )


if __name__ == "__main__":
  app.run(main)
