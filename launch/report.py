"""Writes a run's report.html and prints its table, also while it runs.

python -m launch.report --workdir=runs/tiny
"""

from absl import flags

from launch import app
from selfdev_jax import report
from selfdev_jax import store as store_lib

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run.", required=True
)


def main(_):
  with store_lib.Store.read(_WORKDIR.value) as store:
    path = report.write(store)
    print(report.table(report.summarize(store)))
  print(f"Report: {path}")


if __name__ == "__main__":
  app.run(main)
