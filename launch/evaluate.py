r"""Evaluates a model on the test split of a task, greedily.

  python -m launch.evaluate --model=HFDIR --task=gsm8k --sampler=vllm \
    --data=gsm8k_test.jsonl --out=answers.jsonl
  python -m launch.evaluate --model=HFDIR --task=arithmetic --limit=200 \
    --max_new_tokens=20 --out=answers.jsonl

A line of --out is an item: "prompt", "answer" (the gold one), "response",
"finished" (not cut at the token limit), "prompt_truncated", and "marks": what
each metric extracted, whether that is correct, and the scorer's troubles. The
same command resumes an evaluation that was stopped; OUT.about.json has its
settings. The last line is the result as JSON.
"""

import json

from absl import flags

from launch import app
from selfdev_jax import config as config_lib
from selfdev_jax import evaluation
from selfdev_jax.evaluation import run
from selfdev_jax.sampling import engine

_MODEL = flags.DEFINE_string(
    "model", None, "Hugging Face directory, or org/name[@revision] on the hub."
)
_TASK = flags.DEFINE_string(
    "task", None, f"One of {', '.join(sorted(evaluation.TASKS))}."
)
_SAMPLER = flags.DEFINE_enum(
    "sampler", "jax", engine.KINDS, "What generates; vllm wants make vllm-env."
)
_DATA = flags.DEFINE_string(
    "data", None, "JSONL with the test split; by default the hub's."
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Only the first so many items.", lower_bound=1
)
_SHOTS = flags.DEFINE_integer(
    "shots",
    None,
    "Worked examples in a prompt; by default as many as the field gives.",
    lower_bound=0,
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    run.MAX_NEW_TOKENS,
    "Tokens of an answer at most.",
    lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Items that are answered at once.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", None, "File that gets a line an item.")
_VLLM_PYTHON = flags.DEFINE_string(
    "vllm_python",
    None,
    "Interpreter that has vLLM; by default .venv-vllm, or else this one.",
)
_VLLM_ADDRESS = flags.DEFINE_string(
    "vllm_address", None, "A vLLM server that is running; by default its own."
)
flags.mark_flags_as_required(["model", "task", "out"])


def main(_):
  settings = config_lib.Evaluate(
      task=_TASK.value,
      test_file=_DATA.value,
      shots=_SHOTS.value,
      batch_size=_BATCH_SIZE.value,
      max_new_tokens=_MAX_NEW_TOKENS.value,
  )
  result = run.evaluate(
      _MODEL.value,
      settings,
      _OUT.value,
      limit=_LIMIT.value,
      kind=_SAMPLER.value,
      python=_VLLM_PYTHON.value,
      address=_VLLM_ADDRESS.value,
  )
  print(run.table(result))
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
