"""Writes a run's report.html and prints its table, also while it runs.

python -m launch.report --workdir=runs/tiny

The page of a run whose workdir is at a URL is written on this machine.
"""

import shutil
import tempfile

from absl import flags

from launch import app
from selfdev_jax import report
from selfdev_jax import storage
from selfdev_jax import store as store_lib

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory or URL of the run.", required=True
)


def main(_):
  with (
      storage.fetch(_WORKDIR.value) as workdir,
      store_lib.Store.read(workdir) as store,
  ):
    path = report.write(store)
    if storage.is_remote(_WORKDIR.value):
      path = shutil.copy(path, tempfile.mkdtemp(prefix="selfdev-report-"))
    print(report.table(report.summarize(store)))
  print(f"Report: {path}")


if __name__ == "__main__":
  app.run(main)
