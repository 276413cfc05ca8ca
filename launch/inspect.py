r"""Answers questions about a run from its archive, also while it runs.

  python -m launch.inspect --workdir=DIR                   # iterations, state
  python -m launch.inspect --workdir=DIR --programs --sort=test --limit=10
  python -m launch.inspect --workdir=DIR --programs --verdict=trace:shape
  python -m launch.inspect --workdir=DIR --programs --search='jnp.median'
  python -m launch.inspect --workdir=DIR --program=ID   # or best
  python -m launch.inspect --workdir=DIR --program=best --ir
  python -m launch.inspect --workdir=DIR --scores=ties   # all models of a sweep
  python -m launch.inspect --workdir=DIR --answers=program:best --split=test
  python -m launch.inspect --workdir=DIR --completions=loop/2
  python -m launch.inspect --workdir=DIR --completion=loop/2/17
  python -m launch.inspect --workdir=DIR --pair=1/0
  python -m launch.inspect --workdir=DIR --incidents   # of workers and hosts
  python -m launch.inspect --workdir=DIR --other=DIR       # what differs

--format=json is one document; numbers are raw fractions, and an interval is
Wilson's of 95 %. --format=csv is one header line and the rows, cells that a
spreadsheet would take for a formula behind an apostrophe. Both have all lines
of a list where no --limit is given, text has 50. Text, and any form on a
terminal, shows control characters of generated text as escapes. Accuracies of
unfinished or stopped evaluations are of what was answered.
"""

import contextlib
import os
import sys

from absl import flags

from launch import app
from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import storage
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import queries
from selfdev_jax.inspection import text
from selfdev_jax.inspection import views

_TEXT_LIMIT = 50
_DIGITS = 9  # More than any list has; SQLite takes twice as many.

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory or URL of the run.", required=True
)
_FORMAT = flags.DEFINE_string("format", "text", "Or json, or csv.")
_LIMIT = flags.DEFINE_integer(
    "limit",
    None,
    f"Lines of a list at most; without it {_TEXT_LIMIT} of text, else all.",
)
_OFFSET = flags.DEFINE_integer("offset", 0, "Lines of a list to leave out.")

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
_SCORES = flags.DEFINE_string(
    "scores", None, f"List the models of {', '.join(queries.FAMILIES)}."
)
_ANSWERS = flags.DEFINE_string(
    "answers",
    None,
    "Model whose generations to list: program:ID, seed, ...",
)
_SPLIT = flags.DEFINE_string("split", records.DEV, "Of the answers: dev, test.")
_COMPLETIONS = flags.DEFINE_string(
    "completions", None, "ARM/ITERATION whose completions to list."
)
_COMPLETION = flags.DEFINE_string("completion", None, "ARM/ITERATION/ITEM.")
_PAIR = flags.DEFINE_string("pair", None, "ITERATION/ITEM.")
_INCIDENTS = flags.DEFINE_bool(
    "incidents", False, "List what happened to workers on many hosts."
)
_OTHER = flags.DEFINE_string("other", None, "Another run, to compare with.")

# What can be asked, each with the flags that go with it.
_QUESTIONS = {
    "programs": (
        *("search", "verdict", "arm", "iteration", "candidates"),
        *("min_dev", "max_dev", "sort", "ascending", "limit", "offset"),
    ),
    "program": ("ir",),
    "scores": ("limit", "offset"),
    "answers": ("split", "limit", "offset"),
    "completions": ("limit", "offset"),
    "completion": (),
    "pair": (),
    "incidents": ("limit", "offset"),
    "other": ("limit",),
}
_BOUNDS = (
    (_ITERATION, 1, 10**_DIGITS),
    (_LIMIT, 1, 10**_DIGITS),
    (_OFFSET, 0, 10**_DIGITS),
    (_MIN_DEV, 0, 1),
    (_MAX_DEV, 0, 1),
)


def main(_):
  _one_of(_FORMAT, ("text", "json", "csv"))
  _one_of(_SORT, queries.SORTS)
  _one_of(_ARM, ("", *records.ARMS))
  _one_of(_SPLIT, (records.DEV, records.TEST))
  _one_of(_SCORES, (None, *queries.FAMILIES))
  for flag, least, most in _BOUNDS:
    # Not a number is in no bounds.
    if flag.value is not None and not least <= flag.value <= most:
      raise errors.UserError(f"--{flag.name} has to be {least} to {most:,}")
  for flag in (_SEARCH, _VERDICT, _PROGRAM, _ANSWERS):
    if any("\ud800" <= c <= "\udfff" for c in flag.value or ""):
      raise errors.UserError(f"--{flag.name} is not UTF-8: {flag.value!r}")
  _check_question()
  with contextlib.ExitStack() as stack:
    given = [flag.value for flag in (_WORKDIR, _OTHER) if flag.value]
    copies = [stack.enter_context(storage.fetch(path)) for path in given]
    answer = _answer(
        *(stack.enter_context(store_lib.Store.read(copy)) for copy in copies)
    )
    # The commands that it shows are of the run, not of a copy of it.
    for copy, path in zip(copies, given, strict=True):
      answer = answer.replace(str(copy), path)
    _print(answer)


def _check_question():
  """One is asked at most, and what is given goes with it."""
  known = flags.FLAGS
  asked = [
      name for name in _QUESTIONS if known[name].value not in (None, False)
  ]
  if len(asked) > 1:
    raise errors.UserError(
        f"--{asked[0]} and --{asked[1]} are two questions; ask one"
    )
  for name in asked:
    if known[name].value == "":
      raise errors.UserError(f"--{name} needs a value: {known[name].help}")
  goes_with = {}
  for question, names in _QUESTIONS.items():
    for name in names:
      goes_with.setdefault(name, []).append(question)
  for name, questions in goes_with.items():
    if known[name].present and not set(asked) & set(questions):
      raise errors.UserError(f"--{name} goes with --{' or --'.join(questions)}")


def _limit():
  is_text = _FORMAT.value == "text"
  return _LIMIT.value or (_TEXT_LIMIT if is_text else None)


def _answer(store, other=None):
  if _IR.value:
    return store.program(queries.find(store, _PROGRAM.value))
  return _view(store, other).show(_FORMAT.value)


def _view(store, other):
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
        limit=_limit(),
        offset=_OFFSET.value,
    )
  if _PROGRAM.value:
    return views.program(store, _PROGRAM.value)
  if _SCORES.value:
    return views.scores(store, _SCORES.value, _limit(), _OFFSET.value)
  if _ANSWERS.value:
    model, split = _ANSWERS.value, _SPLIT.value
    if model.startswith(records.PROGRAM):
      model = records.PROGRAM + queries.find(store, model)
    return views.answers(store, model, split, _limit(), _OFFSET.value)
  if _COMPLETIONS.value:
    where = _place(_COMPLETIONS, "loop/2")
    return views.completions(store, *where, _limit(), _OFFSET.value)
  if _COMPLETION.value:
    return views.completion(store, *_place(_COMPLETION, "loop/2/17"))
  if _PAIR.value:
    return views.pair(store, *_place(_PAIR, "2/17"))
  if _INCIDENTS.value:
    return views.incidents(store, _limit(), _OFFSET.value)
  if other is not None:
    return views.comparison(store, other, _limit())
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
      part in records.ARMS
      if a in records.ARMS
      else part.isdecimal() and len(part) <= _DIGITS
      for part, a in zip(parts, like, strict=True)
  )
  if not fits:
    raise errors.UserError(
        f"--{holder.name} is {holder.value[:40]!r}; write it like {example}"
        f" (arms: {', '.join(records.ARMS)})"
    )
  return tuple(int(p) if p.isdecimal() else p for p in parts)


def _print(answer):
  """Prints, also what the terminal cannot show or a pager does not read."""
  sys.stdout.reconfigure(errors="backslashreplace")
  if sys.stdout.isatty():
    answer = text.visible(answer)
  try:
    print(answer, flush=True)
  except BrokenPipeError:
    # Python flushes once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
  app.run(main)
