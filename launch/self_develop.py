r"""Runs Self-Developing: a model invents the merges that improve it.

  python -m launch.self_develop --config=configs/tiny.py --workdir=runs/tiny

Any key of the config can be overridden: --config.dpo.beta=0.2. The same
command resumes a run that was stopped. --config.sampler=vllm samples through a
vLLM server (`make vllm-env` installs one). The last line is the result as JSON.

--workdir=gs://bucket/run, or s3://...: the run works in a copy on this machine
and pushes it after each stage; the same command goes on from there on another.

  python -m launch.self_develop --config=configs/paper_gsm8k.py \
    --workdir=runs/gsm8k --plan --plan_device=H200

says what a run would do and take, stage by stage, and whether all is there for
it; it ends with status 2 where something is missing, and spends nothing.
"""

import json

from absl import flags
import jax
from ml_collections import config_flags

from launch import app
from selfdev_jax import errors
from selfdev_jax import loop
from selfdev_jax import plan
from selfdev_jax import report
from selfdev_jax import storage
from selfdev_jax import store
from selfdev_jax.tiny import world

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), such as configs/tiny.py."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the archive, the factories and the report, or a URL.",
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
_TRACE = flags.DEFINE_bool(
    "trace",
    False,
    "Write a profile of the first iteration that is run into WORKDIR/trace, for"
    " TensorBoard or Perfetto.",
)
_PLAN = flags.DEFINE_bool(
    "plan", False, "Say what the run would take and lacks, and run nothing."
)
_PLAN_DEVICE = flags.DEFINE_enum(
    "plan_device",
    None,
    list(plan.DEVICES),
    "Accelerator that --plan estimates for; by default the one that is here.",
)
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
  config = app.load_config(_CONFIG)
  host = loop.Host(
      _VLLM_PYTHON.value,
      _VLLM_ADDRESS.value,
      _RECORDING.value,
      _ALLOW_WEAK.value,
      _TRACE.value,
  )
  if _PLAN.value:
    with storage.fetch(_WORKDIR.value) as workdir:
      plan.show(config, workdir, host, _PLAN_DEVICE.value)
    return
  loop.check(config)
  if config.executor == "ray":
    # This process decides and archives: devices are for the workers.
    jax.config.update("jax_platforms", "cpu")
  _check_place(config, _WORKDIR.value)
  with storage.open_workdir(_WORKDIR.value) as (workdir, push):
    loop.run(config, workdir, world.prepare(config), host, push=push)
    with store.Store.read(workdir) as archive:
      summary = report.summarize(archive)
      page = report.write(archive)
  print(report.table(summary))
  print(f"Report: {page}")
  print(json.dumps(summary))


def _check_place(config, workdir):
  """Refuses a workdir that other hosts would not see."""
  is_elsewhere = config.executor == "ray" and config.ray.address != "local"
  if is_elsewhere and storage.is_remote(workdir):
    raise errors.UserError(
        f"--workdir={workdir} is worked on in a copy on this machine, which"
        " the cluster's other hosts do not see; name a directory that they"
        " share, mounted from an object store if need be"
    )


if __name__ == "__main__":
  app.run(main)
