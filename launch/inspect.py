r"""Answers questions about a run from its archive, also while it runs.

  python -m launch.inspect --workdir=DIR                   # iterations, state
  python -m launch.inspect --workdir=DIR --programs --sort=test --limit=10
  python -m launch.inspect --workdir=DIR --programs --verdict=trace:shape
  python -m launch.inspect --workdir=DIR --programs --search='jnp.median'
  python -m launch.inspect --workdir=DIR --program=ID   # or best
  python -m launch.inspect --workdir=DIR --program=best --ir
  python -m launch.inspect --workdir=DIR --answers=program:best --split=test
  python -m launch.inspect --workdir=DIR --completion=loop/2/17
  python -m launch.inspect --workdir=DIR --pair=1/0
  python -m launch.inspect --workdir=DIR --other=DIR       # what differs

--format=json is one document; numbers are raw fractions, and an interval is
Wilson's of 95 %. --format=csv is one header line and the rows, cells that a
spreadsheet would take for a formula behind an apostrophe. Text shows control
characters of generated text as escapes. Accuracies of unfinished or stopped
evaluations are of what was answered.
"""

import os
import sys

from absl import flags

from launch import app
from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import queries
from selfdev_jax.inspection import views

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run.", required=True
)
_FORMAT = flags.DEFINE_string("format", "text", "Or json, or csv.")
_LIMIT = flags.DEFINE_integer(
    "limit", 50, "Lines of a list at most.", lower_bound=1
)
_OFFSET = flags.DEFINE_integer(
    "offset", 0, "Lines of a list to leave out.", lower_bound=0
)

_PROGRAMS = flags.DEFINE_bool(
    "programs", False, "List programs and rejected completions."
)
_SORT = flags.DEFINE_string("sort", "dev", f"By {', '.join(queries.SORTS)}.")
_ASCENDING = flags.DEFINE_bool("ascending", False, "Smallest first.")
_VERDICT = flags.DEFINE_string(
    "verdict", "", "admitted, rejected, a stage, or STAGE:CODE."
)
_SEARCH = flags.DEFINE_string(
    "search", "", "How the digest begins, or text in the source."
)
_MIN_DEV = flags.DEFINE_float("min_dev", None, "Development accuracy, from.")
_MAX_DEV = flags.DEFINE_float("max_dev", None, "Development accuracy, to.")
_ARM = flags.DEFINE_string("arm", "", "First written by loop or control.")
_ITERATION = flags.DEFINE_integer("iteration", None, "First written in.")
_CANDIDATES = flags.DEFINE_string(
    "candidates", None, "ARM/ITERATION that evaluated them as its own."
)

_PROGRAM = flags.DEFINE_string(
    "program", None, "A digest's beginning, or best."
)
_IR = flags.DEFINE_bool("ir", False, "Print the program's IR, which is JSON.")
_ANSWERS = flags.DEFINE_string(
    "answers",
    None,
    "Model whose generations to list: program:ID, seed, ...",
)
_SPLIT = flags.DEFINE_string("split", records.DEV, "Of the answers: dev, test.")
_COMPLETION = flags.DEFINE_string("completion", None, "ARM/ITERATION/ITEM.")
_PAIR = flags.DEFINE_string("pair", None, "ITERATION/ITEM.")
_OTHER = flags.DEFINE_string("other", None, "Another run, to compare with.")

_MODES = (_PROGRAMS, _PROGRAM, _ANSWERS, _COMPLETION, _PAIR, _OTHER)


def main(_):
  _one_of(_FORMAT, ("text", "json", "csv"))
  _one_of(_SORT, queries.SORTS)
  _one_of(_ARM, ("", *records.ARMS))
  _one_of(_SPLIT, (records.DEV, records.TEST))
  asked = [flag.name for flag in _MODES if flag.value]
  if len(asked) > 1:
    raise errors.UserError(
        f"--{asked[0]} and --{asked[1]} are two questions; ask one"
    )
  if _IR.value and not _PROGRAM.value:
    raise errors.UserError("--ir needs --program=ID")
  with store_lib.Store.read(_WORKDIR.value) as store:
    _print(_answer(store))


def _answer(store):
  if _IR.value:
    return store.program(queries.find(store, _PROGRAM.value))
  return _view(store).show(_FORMAT.value)


def _view(store):
  if _PROGRAMS.value:
    return views.programs(
        store,
        search=_SEARCH.value,
        verdict=_VERDICT.value,
        arm=_ARM.value,
        iteration=_ITERATION.value,
        min_dev=_MIN_DEV.value,
        max_dev=_MAX_DEV.value,
        candidate_of=_place(_CANDIDATES, "loop/2"),
        sort=_SORT.value,
        ascending=_ASCENDING.value,
        limit=_LIMIT.value,
        offset=_OFFSET.value,
    )
  if _PROGRAM.value:
    return views.program(store, _PROGRAM.value)
  if _ANSWERS.value:
    model, split = _ANSWERS.value, _SPLIT.value
    if model.startswith(records.PROGRAM):
      model = records.PROGRAM + queries.find(store, model)
    return views.answers(store, model, split, _LIMIT.value, _OFFSET.value)
  if _COMPLETION.value:
    return views.completion(store, *_place(_COMPLETION, "loop/2/17"))
  if _PAIR.value:
    return views.pair(store, *_place(_PAIR, "2/17"))
  if _OTHER.value:
    with store_lib.Store.read(_OTHER.value) as other:
      return views.comparison(store, other, _LIMIT.value)
  return views.overview(store)


def _one_of(holder, choices):
  if holder.value not in choices:
    raise errors.UserError(
        f"--{holder.name} is {holder.value!r}; it has to be one of"
        f" {', '.join(filter(None, choices))}"
    )


def _place(holder, example):
  """(arm, iteration, item) of "loop/2/17"; parts as in the example."""
  if holder.value is None:
    return None
  parts, like = holder.value.split("/"), example.split("/")
  fits = len(parts) == len(like) and all(
      part in records.ARMS if a in records.ARMS else part.isdecimal()
      for part, a in zip(parts, like, strict=True)
  )
  if not fits:
    raise errors.UserError(
        f"--{holder.name} is {holder.value!r}; write it like {example} (arms:"
        f" {', '.join(records.ARMS)})"
    )
  return tuple(int(p) if p.isdecimal() else p for p in parts)


def _print(answer):
  """Prints, also what the terminal cannot show or a pager does not read."""
  sys.stdout.reconfigure(errors="backslashreplace")
  try:
    print(answer, flush=True)
  except BrokenPipeError:
    # Python flushes once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
  app.run(main)
