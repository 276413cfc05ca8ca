"""MATH: competition problems, as lm-evaluation-harness asks and scores them.

The task is `minerva_math` of version 0.4.13: Minerva's four fixed examples, its
`exact_match`, and `math_verify`, which reads more of the ways to write an
answer and is the headline here (see `equivalence`). `math500` is the subset of
500 test problems that PRM800K left out of its training data.

A test item's place does not depend on the file: the published ones are sorted
by subject, so that their first 1,000 would all be algebra. Here the order is
that of a hash of the problem.

References:
  Hendrycks et al., Measuring mathematical problem solving with the MATH
  dataset, arXiv:2103.03874.
  Lewkowycz et al., Solving quantitative reasoning problems with language
  models, arXiv:2206.14858.
  Lightman et al., Let's verify step by step, arXiv:2305.20050 (MATH-500).
"""

from collections.abc import Sequence
import functools
import hashlib
import pathlib

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax.evaluation import data
from selfdev_jax.evaluation import workers
from selfdev_jax.evaluation.task import Item
from selfdev_jax.evaluation.task import Mark
from selfdev_jax.evaluation.task import Task

MATH_VERIFY, EXACT_MATCH = "math_verify", "exact_match"
METRICS = (MATH_VERIFY, EXACT_MATCH)
STOP = ("Problem:",)
SHOTS = 4
# Where they are from, and their licence: minerva.txt beside it.
SHOTS_FILE = pathlib.Path(__file__).parent / "shots" / "minerva.jsonl"


def fault(row: data.Row) -> str:
  """What is wrong with a row's solution; empty if it can be scored against."""
  try:
    if not answer(row["solution"]):
      return "nothing stands in its box"
  except ValueError as error:
    return str(error)
  return ""


def answer(solution: str) -> str:
  """The boxed answer, normalised.

  Raises:
    ValueError: there is no box.
  """
  return _equivalence().gold_answer(solution)


_HUB, _FIELDS = "EleutherAI/hendrycks_math", ("problem", "solution")
_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
TRAIN = data.Source(_HUB, _SUBJECTS, "train", _FIELDS)
TEST = data.Source(_HUB, _SUBJECTS, "test", _FIELDS, fault)
TEST_500 = data.Source(
    "HuggingFaceH4/MATH-500", ("default",), "test", _FIELDS, fault
)


def make(settings: config_lib.Evaluate) -> Task:
  """MATH; its data are read when items are asked for.

  Up to four shots are Minerva's, the first ones, as in the harness; it has no
  more. More are drawn from the training split, each with the sentence that
  Minerva's end in, for else the last example would teach to leave it out.

  Args:
    settings: of which `train_file`, `test_file`, `shots` and `split_seed` are
      used.

  Raises:
    UserError: the libraries that score it are not there.
  """
  return _make(settings, TEST)


def make_500(settings: config_lib.Evaluate) -> Task:
  """MATH-500: `make`, with another test split."""
  return _make(settings, TEST_500)


def _make(settings: config_lib.Evaluate, test: data.Source) -> Task:
  _equivalence()
  shots = SHOTS if settings.shots is None else settings.shots
  files = settings.train_file, settings.test_file

  def items(split: str, n: int | None) -> list[Item]:
    examples = _shots(test, shots, *files, settings.split_seed)
    if split == records.TEST:
      rows = data.apart(
          _in_order(data.read(test, settings.test_file)), examples, _text_of
      )
    else:
      rows = _dev(test, shots, *files, settings.split_seed)
    return [
        Item(prompt(examples, row["problem"]), row["solution"])
        for row in data.first(rows, n, split)
    ]

  score = functools.partial(_score, workers.Pool())
  return Task(items, METRICS, score, STOP, shots)


def _equivalence():
  """The scoring module, which wants libraries that not everybody has."""
  try:
    from selfdev_jax.evaluation import equivalence
  except ImportError as error:
    raise errors.UserError(
        f"MATH is scored with math-verify, which is not to be had ({error});"
        ' pip install -e ".[eval]"'
    ) from None
  return equivalence


def prompt(shots: Sequence[data.Row], problem: str) -> str:
  """What the model sees, byte for byte the harness's for the same shots.

  Args:
    shots: rows with "problem" and "solution".
    problem: to be solved.
  """
  examples = [
      f"Problem:\n{s['problem']}\n\nSolution: {s['solution']}" for s in shots
  ]
  return "\n\n".join([*examples, f"Problem:\n{problem}\n\nSolution:"])


def _text_of(row: data.Row) -> str:
  """A problem without spaces, of which copies have others (Minerva's too)."""
  return "".join(row["problem"].split())


def _in_order(rows: Sequence[data.Row]) -> list[data.Row]:
  return sorted(
      rows, key=lambda row: hashlib.sha256(row["problem"].encode()).digest()
  )


@functools.cache
def _shots(
    test: data.Source,
    n: int,
    train_file: str | None,
    test_file: str | None,
    seed: int,
) -> tuple[data.Row, ...]:
  """The worked examples: Minerva's, more by the seed."""
  fixed = data.read(TRAIN, str(SHOTS_FILE))
  if n <= len(fixed):
    return fixed[:n]
  known = [*fixed, *_test_rows(test, train_file, test_file)]
  train = _train_rows(train_file)
  more = data.draw(train, known, f"shots {seed}", _text_of)
  more = more[: n - len(fixed)]
  if len(fixed) + len(more) < n:
    raise errors.UserError(
        f"evaluate.shots is {n}, but there are {len(fixed) + len(more)}; lower"
        " it"
    )
  return fixed + tuple(map(_with_sentence, more))


def _with_sentence(row: data.Row) -> data.Row:
  boxed = _equivalence().boxed(row["solution"])
  sentence = (
      f"Final Answer: The final answer is ${boxed}$. I hope it is correct."
  )
  return row | {"solution": f"{row['solution']}\n{sentence}"}


@functools.cache
def _dev(
    test: data.Source,
    shots: int,
    train_file: str | None,
    test_file: str | None,
    seed: int,
) -> tuple[data.Row, ...]:
  """The development set, all of it."""
  # Minerva's four stay out of it however many are used: a run with fewer
  # shots has the same development set.
  used = _shots(test, max(shots, SHOTS), train_file, test_file, seed)
  known = _test_rows(test, train_file, test_file)
  train = _train_rows(train_file)
  return tuple(data.dev(train, used, known, seed, _text_of))


@functools.cache
def _train_rows(file: str | None) -> tuple[data.Row, ...]:
  """The training split, save what cannot be scored against."""
  rows = data.read(TRAIN, file)
  sound = tuple(row for row in rows if not fault(row))
  left_out = len(rows) - len(sound)
  words = (
      f"{left_out} of {len(rows)} solutions of MATH's training split"
      f" ({file or _HUB}) have no \\boxed{{...}}"
  )
  if left_out > len(sound):
    raise errors.UserError(f"{words}; is that the file?")
  if left_out:
    progress.note(f"{words} and are left out")
  return sound


def _test_rows(
    test: data.Source, train_file: str | None, test_file: str | None
) -> tuple[data.Row, ...]:
  """The test items to keep others apart from.

  Besides those of the task all of MATH's, where the training split comes from
  the same place as they do.
  """
  rows = data.read(test, test_file)
  if test != TEST and train_file is None:
    rows += data.read(TEST, None)
  return rows


def _score(
    pool: workers.Pool, responses: Sequence[str], golds: Sequence[str]
) -> list[dict[str, Mark]]:
  r"""A mark by each metric for each response.

  Args:
    pool: that marks.
    responses: what a model wrote behind the prompt.
    golds: solutions with their answer in `\boxed{...}`.

  Raises:
    UserError: a gold answer has no box.
  """
  for i, gold in enumerate(golds, 1):
    wrong = fault({"solution": gold})
    if wrong:
      raise errors.UserError(
          f"gold answer {i}: {wrong}; give the published solution, or the"
          " answer alone as \\boxed{...}"
      )
  marks = pool.marks(
      [
          (metric, response, gold)
          for response, gold in zip(responses, golds, strict=True)
          for metric in METRICS
      ]
  )
  each = len(METRICS)
  return [
      dict(zip(METRICS, marks[i : i + each], strict=True))
      for i in range(0, len(marks), each)
  ]
