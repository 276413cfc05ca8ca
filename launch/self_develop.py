"""Runs Self-Developing: a model invents the merges that improve it.

  python -m launch.self_develop --config=configs/tiny.py --workdir=runs/tiny

Any key of the config can be overridden: --config.dpo.beta=0.2. The same
command resumes a run that was stopped. --config.sampler=vllm samples through a
vLLM server (`make vllm-env` installs one). The last line is the result as JSON.
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
_VLLM_PYTHON = flags.DEFINE_string(
    "vllm_python",
    None,
    "Interpreter that has vLLM; by default .venv-vllm, or else this one.",
)
_VLLM_ADDRESS = flags.DEFINE_string(
    "vllm_address",
    None,
    "A vLLM server that is running, such as http://127.0.0.1:8000; by default"
    " the run starts its own.",
)
_RECORDING = flags.DEFINE_string(
    "recording",
    None,
    "File that keeps every text that is sampled; --config.sampler=replay reads"
    " it instead of sampling.",
)
_ALLOW_WEAK = flags.DEFINE_bool(
    "allow_weak_sandbox",
    False,
    "Run generated programs also where neither seccomp nor bubblewrap is to be"
    " had; the archive records it.",
)
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
  config = app.load_config(_CONFIG)
  loop.check(config)
  host = loop.Host(
      _VLLM_PYTHON.value,
      _VLLM_ADDRESS.value,
      _RECORDING.value,
      _ALLOW_WEAK.value,
  )
  loop.run(config, _WORKDIR.value, world.prepare(config), host)
  with store.Store.read(_WORKDIR.value) as archive:
    summary = report.summarize(archive)
    page = report.write(archive)
  print(report.table(summary))
  print(f"Report: {page}")
  print(json.dumps(summary))


if __name__ == "__main__":
  app.run(main)
