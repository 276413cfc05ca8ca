r"""Scores responses that were made elsewhere, read from a file.

Rows have the fields `response` and `answer`, the gold one: the published worked
solution or the answer alone. Or the file is a log that lm-evaluation-harness
wrote with --log_samples; it has a row for each of a task's filters, and its
own verdicts, which are compared.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import tables
from selfdev_jax.evaluation import data
from selfdev_jax.evaluation import gsm8k
from selfdev_jax.evaluation import minerva
from selfdev_jax.evaluation import task as task_lib
from selfdev_jax.evaluation import tasks
from selfdev_jax.evaluation.task import Mark

_FIELDS = ("response", "answer")
_CHUNK = 256  # Responses between two looks at the progress.
_TOLD = 10  # Disagreements that are told one by one.


@dataclasses.dataclass(frozen=True)
class Response:
  """A response and what it is compared with.

  Attributes:
    line: of the file, from 1; of a log the first that has it.
    text: of the model.
    gold: as the task's scorer takes it.
    logged: what the harness said, by the task's metrics; may be empty.
  """

  line: int
  text: str
  gold: str
  logged: dict[str, bool]


def _gsm8k_gold(answer: str) -> str:
  wrong = gsm8k.fault({"answer": answer})
  if wrong:
    raise ValueError(f"{wrong}; a number alone will do")
  return answer


def _math_gold(answer: str) -> str:
  if "\\boxed" not in answer:
    answer = f"\\boxed{{{answer}}}"
  wrong = minerva.fault({"solution": answer})
  if wrong:
    raise ValueError(wrong)
  return answer


@dataclasses.dataclass(frozen=True)
class _Golds:
  """Where a task's gold answers are, and how they are made ready.

  Attributes:
    field: of a logged document.
    ready: answer -> what the task compares with; raises ValueError.
    value: of that, the answer alone.
  """

  field: str
  ready: Callable[[str], str]
  value: Callable[[str], Any]


_GOLDS = {
    "gsm8k": _Golds("answer", _gsm8k_gold, gsm8k.value),
    "math": _Golds("solution", _math_gold, minerva.answer),
    "math500": _Golds("solution", _math_gold, minerva.answer),
}
TASKS = tuple(_GOLDS)


def score(
    task: str,
    file: str | os.PathLike,
    data_file: str | None = None,
    out: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Scores a file of responses.

  Args:
    task: one of `TASKS`.
    file: JSONL, see above.
    data_file: the benchmark's; there have to be as many responses as items.
    out: gets a line a response: "line", "response", "answer", "marks" and
      "logged".

  Returns:
    What `json.dumps` takes: "n", "correct", "accuracy" and "ci95" (Wilson) by
    the metric "headline"; "metrics", each with these and with how many answers
    were not found, timed out or failed in the scorer: "unextracted",
    "timeouts", "errors"; "logged", by metric how many verdicts the log had,
    how many agree, and the lines of those that do not; "seconds" of scoring.

  Raises:
    UserError: the task is unknown, the file's line is wrong, or there are not
      as many responses as items.
  """
  if task not in TASKS:
    raise errors.UserError(
        f"the task is {task!r}; responses are scored for {', '.join(TASKS)}"
    )
  _check_out(out, file, data_file)
  loaded = tasks.load(config_lib.Evaluate(task=task, test_file=data_file))
  found = read(file, task, loaded.metrics)
  if data_file is not None:
    _check_items(found, file, task, loaded, data_file)
  start = time.monotonic()
  marks = _marks(task, loaded, found)
  seconds = time.monotonic() - start
  metrics = {
      name: task_lib.summarize([mark[name] for mark in marks])
      for name in loaded.metrics
  }
  headline = metrics[loaded.headline]
  if out is not None:
    _write(out, found, marks)
  return {
      "task": task,
      "responses": str(file),
      "n": len(found),
      **{key: headline[key] for key in ("correct", "accuracy", "ci95")},
      "headline": loaded.headline,
      "metrics": metrics,
      "logged": _agreement(loaded.metrics, found, marks, file),
      "seconds": round(seconds, 3),
      "out": None if out is None else str(out),
  }


def _check_out(out, *read_from):
  """Finds before anything is scored that it could not be written."""
  if out is None:
    return
  path = pathlib.Path(out)
  for file in filter(None, read_from):
    if path.resolve() == pathlib.Path(file).resolve():
      raise errors.UserError(f"--out is {file} itself; choose another file")
  target = path if path.exists() else path.parent
  if (
      path.is_dir()
      or not path.parent.is_dir()
      or not os.access(target, os.W_OK)
  ):
    raise errors.UserError(
        f"--out: {path} cannot be written; give a file in a directory that is"
        " there and yours"
    )


def _check_items(found, file, name, task, data_file):
  """Every item has its response, as far as answers tell them apart."""
  items, n = task.items(records.TEST, None), len(found)
  way_out = "leave out --data to score what is there"
  if n != len(items):
    few = n < len(items)
    what = f"{abs(len(items) - n)} {'are missing' if few else 'too many'}"
    raise errors.UserError(
        f"{file} has {n} responses, {data_file} {len(items)} items: {what};"
        f" {way_out}"
    )
  value = _GOLDS[name].value
  left = collections.Counter(value(item.gold) for item in items)
  for response in found:
    answer = value(response.gold)
    if not left[answer]:
      raise errors.UserError(
          f"{file}:{response.line} answers {answer}, which no item of"
          f" {data_file} does that is left; {way_out}"
      )
    left[answer] -= 1


def _marks(
    name: str, task: tasks.Task, found: Sequence[Response]
) -> list[dict[str, Mark]]:
  marks = []
  with progress.bar(f"Scoring {name}", len(found), "response") as bar:
    for start in range(0, len(found), _CHUNK):
      part = found[start : start + _CHUNK]
      marks += task.score([r.text for r in part], [r.gold for r in part])
      bar.update(len(part))
  return marks


def _agreement(
    metrics: Sequence[str],
    found: Sequence[Response],
    marks: Sequence[dict[str, Mark]],
    file: str | os.PathLike,
) -> dict[str, Any]:
  """How our verdicts compare with the log's."""
  agreement = {}
  for name in metrics:
    pairs = [
        (response.line, mark[name], response.logged[name])
        for response, mark in zip(found, marks, strict=True)
        if name in response.logged
    ]
    if not pairs:
      continue
    lines = [line for line, mark, theirs in pairs if mark.correct != theirs]
    agreement[name] = {
        "n": len(pairs),
        "agree": len(pairs) - len(lines),
        "disagree": lines,
    }
    if lines:
      some = ", ".join(map(str, lines[:_TOLD]))
      progress.note(
          f"{len(lines)} of {len(pairs)} verdicts of {name} are not those that"
          f" {file} has, at lines {some}{', ...' * (len(lines) > _TOLD)}"
      )
  return agreement


def _write(
    out: str | os.PathLike,
    found: Sequence[Response],
    marks: Sequence[dict[str, Mark]],
):
  with open(out, "w", encoding="utf-8") as file:
    for response, mark in zip(found, marks, strict=True):
      row = {
          "line": response.line,
          "response": response.text,
          "answer": response.gold,
          "marks": {k: dataclasses.asdict(m) for k, m in mark.items()},
          "logged": response.logged,
      }
      file.write(json.dumps(row) + "\n")


# Reading.


def read(
    file: str | os.PathLike, task: str, metrics: Sequence[str]
) -> list[Response]:
  """The responses of a file, those of a log once each.

  Args:
    file: JSONL, see above.
    task: one of `TASKS`.
    metrics: of that task.

  Returns:
    At least one.

  Raises:
    UserError: naming the file and the line.
  """
  golds = _GOLDS[task]
  found: dict[Any, Response] = {}
  several = 0
  for where, row in tables.read_lines(file):
    line = int(where.rpartition(":")[2])
    if "resps" not in row:
      text, answer = (data.text(row, name, where, _FIELDS) for name in _FIELDS)
      found[line] = Response(line, text, _gold(golds, answer, where), {})
      continue
    key, response, count = _logged(row, where, golds, metrics)
    before = found.setdefault(key, response)
    if before is not response:
      _join(before, response, where)
    else:
      several += count > 1
  if not found:
    raise errors.UserError(f"{file} holds no response")
  if several:
    progress.note(
        f"{several} documents of {file} have several responses; the first of"
        " each is scored, as by the harness"
    )
  return list(found.values())


def _gold(golds: _Golds, answer: str, where: str) -> str:
  try:
    if not answer.strip():
      raise ValueError("the answer is empty")
    return golds.ready(answer.strip())
  except ValueError as error:
    raise errors.UserError(f"{where}: {error}") from None


def _logged(
    row: dict[str, Any], where: str, golds: _Golds, metrics: Sequence[str]
) -> tuple[Any, Response, int]:
  """What names a logged document, its response, and how many it had."""
  needed = ("doc_id", "doc", "target", "resps")
  for name in needed:
    if name not in row:
      raise errors.UserError(
          f"{where} lacks {name!r}; a logged sample of lm-evaluation-harness"
          f" has {', '.join(needed)}"
      )
  # A list for each request of the document, of which these tasks have one.
  resps = row["resps"]
  asked = resps[0] if isinstance(resps, list) and resps else None
  if not isinstance(asked, list) or not asked or not isinstance(asked[0], str):
    raise errors.UserError(
        f"{where}: resps holds no text; only logs of tasks that generate, such"
        " as gsm8k and minerva_math, can be scored"
    )
  doc = row["doc"]
  answer = doc.get(golds.field) if isinstance(doc, dict) else None
  if not isinstance(answer, str):
    # A task of the user's own may name its fields otherwise.
    answer = str(row["target"])
  # Logs of several subjects, one behind the other, count each from 0.
  key = (str(row["doc_id"]), json.dumps(doc, sort_keys=True))
  response = Response(
      int(where.rpartition(":")[2]),
      asked[0],
      _gold(golds, answer, where),
      _verdicts(row, metrics),
  )
  return key, response, len(asked)


def _verdicts(row: dict[str, Any], metrics: Sequence[str]) -> dict[str, bool]:
  """The harness's own: GSM8K's by the filter's name, MATH's by the metric's."""
  if row.get("filter") in metrics:
    named = {row["filter"]: row.get("exact_match")}
  else:
    named = {name: row.get(name) for name in metrics}
  return {
      name: bool(value)
      for name, value in named.items()
      if value in (0, 1)  # NaN and shares are no verdicts.
  }


def _join(before: Response, again: Response, where: str):
  """Adds the verdicts of another filter's row."""
  if again.text != before.text or again.logged.keys() & before.logged.keys():
    raise errors.UserError(
        f"{where} has the document of line {before.line} once more; score the"
        " log of one run at a time"
    )
  before.logged.update(again.logged)
