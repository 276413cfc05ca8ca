r"""Scores generations that were made elsewhere.

  python -m launch.score --task=gsm8k --responses=FILE.jsonl
  python -m launch.score --task=math --responses=LM_EVAL_LOG.jsonl \
    --out=scored.jsonl

A line of --responses has `response` and `answer`, the gold one: the published
worked solution or the answer alone. Or it is a log of lm-evaluation-harness
(lm_eval --log_samples): then its verdicts are compared with ours, and the lines
where they differ are listed. --out gets every extraction and verdict. The last
line is the result as JSON.
"""

import json

from absl import flags

from launch import app
from selfdev_jax.evaluation import responses

_TASK = flags.DEFINE_string(
    "task", None, f"One of {', '.join(responses.TASKS)}."
)
_RESPONSES = flags.DEFINE_string("responses", None, "JSONL to be scored.")
_DATA = flags.DEFINE_string(
    "data",
    None,
    "JSONL with the test split, of which every item has to have a response.",
)
_OUT = flags.DEFINE_string("out", None, "File that gets a line a response.")
flags.mark_flags_as_required(["task", "responses"])


def main(_):
  result = responses.score(
      _TASK.value, _RESPONSES.value, _DATA.value, _OUT.value
  )
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
