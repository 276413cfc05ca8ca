"""Runs Self-Developing: a model invents the merges that improve it.

  python -m launch.self_develop --config=configs/tiny.py --workdir=runs/tiny

Any key of the config can be overridden: --config.dpo.beta=0.2. The same
command resumes a run that was stopped. The last line is the result as JSON.
"""

import json

from absl import flags
from ml_collections import config_flags

from launch import app
from selfdev_jax import loop
from selfdev_jax import report
from selfdev_jax import store
from selfdev_jax.tiny import world

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), such as configs/tiny.py."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the archive, the factories and the report."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
  config = app.load_config(_CONFIG)
  loop.check(config)
  loop.run(config, _WORKDIR.value, world.prepare(config))
  with store.Store.read(_WORKDIR.value) as archive:
    summary = report.summarize(archive)
    page = report.write(archive)
  print(report.table(summary))
  print(f"Report: {page}")
  print(json.dumps(summary))


if __name__ == "__main__":
  app.run(main)
