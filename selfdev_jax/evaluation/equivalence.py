"""Whether a generation answers a problem of MATH, by two rules of the field.

`exact_match` is Minerva's rule, `math_verify` that of the library of this name;
both as `minerva_math` of lm-evaluation-harness 0.4.13 (version 3.1 of the task)
applies them, quirks included: changing them would change published numbers.
Both set alarms, so they want a process's main thread, and neither has a limit
that holds against one long step of arithmetic: they run in the processes of
`workers`, and this module imports nothing of the package, which would cost
each of them JAX.

`last_boxed`, `without_box`, `final_answer`, `normalize` and `is_equiv` are from
lm_eval/tasks/minerva_math/utils.py, whose licence follows; `normalize` goes
back to appendix D of Lewkowycz et al., Solving quantitative reasoning problems
with language models (2022).

  MIT License

  Copyright (c) 2020 EleutherAI

  Permission is hereby granted, free of charge, to any person obtaining a copy
  of this software and associated documentation files (the "Software"), to deal
  in the Software without restriction, including without limitation the rights
  to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
  copies of the Software, and to permit persons to whom the Software is
  furnished to do so, subject to the following conditions:

  The above copyright notice and this permission notice shall be included in all
  copies or substantial portions of the Software.

  THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
  IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
  FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
  AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
  LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
  OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
  SOFTWARE.
"""

from collections.abc import Iterator
import contextlib
import functools
import importlib.metadata
import logging
import re
import signal
from typing import Any
from typing import NamedTuple

import math_verify as math_verify_lib
from math_verify import parser as math_verify_parser
import sympy
from sympy.parsing import latex

_ANTLR = importlib.metadata.version("antlr4-python3-runtime")
if not _ANTLR.startswith("4.11."):
  raise ImportError(f"antlr4-python3-runtime is {_ANTLR}, not 4.11")

INVALID_ANSWER = "[invalidanswer]"
_ALARM_S = 5  # lm-eval's; math-verify has the same for its steps.
_MAX_EXTRACTED_CHARS = 500
_GOLDS = 8192  # Parsed solutions that a process keeps; MATH has 5,000.

TIMEOUT = "timeout"
ERROR = "error"
# No word on the answer: another machine might have compared it.
_OF_THE_MACHINE = (MemoryError, RecursionError, OSError)


class Finding(NamedTuple):
  """The fields of a `task.Mark`."""

  extracted: str | None
  correct: bool
  trouble: str = ""


def exact_match(generation: str, gold: str) -> Finding:
  """Compares what stands in Minerva's closing sentence with the boxed answer.

  Args:
    generation: what a model wrote.
    gold: a solution with its answer in a box.

  Returns:
    The normalised answer and the verdict.

  Raises:
    ValueError: the solution has no box.
  """
  wanted = gold_answer(gold)
  answer = normalize(final_answer(generation))
  if answer == INVALID_ANSWER:
    return Finding(None, False)  # lm-eval compares it too: never equal.
  correct, trouble = is_equiv(answer, wanted)
  return Finding(_short(answer), correct, trouble)


def math_verify(generation: str, gold: str) -> Finding:
  """Compares what math-verify reads in the generation and in the solution.

  Args:
    generation: what a model wrote.
    gold: a solution with its answer in a box.

  Returns:
    The text that was read (math-verify's first candidate: to print what it
    was parsed into can take for ever), and the verdict. The library calls
    unequal what it could not finish, and only logs that; so it is done here,
    with the trouble added.
  """
  with _listening() as troubles:
    wanted = _parse_gold(gold)
    parsed = math_verify_lib.parse(generation)
    correct = math_verify_lib.verify(gold=wanted, target=parsed)
  texts = [text for text in parsed if isinstance(text, str)]
  trouble = troubles[0] if troubles else ""
  return Finding(_short(texts[0]) if texts else None, correct, trouble)


def gold_answer(solution: str) -> str:
  """The boxed answer of a solution, normalised.

  Raises:
    ValueError: there is none.
  """
  return normalize(boxed(solution))


def boxed(solution: str) -> str:
  """What stands in a solution's last box.

  Raises:
    ValueError: there is none.
  """
  box = last_boxed(solution)
  if box is None:
    raise ValueError("no \\boxed{...} in the solution")
  return without_box(box)


def last_boxed(text: str) -> str | None:
  r"""The last `\boxed{...}` or `\fbox{...}`, None where there is none."""
  start = text.rfind("\\boxed")
  if "\\boxed " in text:
    return "\\boxed " + text.split("\\boxed ")[-1].split("$")[0]
  if start < 0:
    start = text.rfind("\\fbox")
    if start < 0:
      return None
  depth = 0
  for i in range(start, len(text)):
    if text[i] == "{":
      depth += 1
    if text[i] == "}":
      depth -= 1
      if depth == 0:
        return text[start : i + 1]
  return None


def without_box(box: str) -> str:
  r"""What stands in `\boxed{...}` or after `\boxed `.

  Raises:
    ValueError: it is neither.
  """
  if box.startswith("\\boxed "):
    return box.removeprefix("\\boxed ")
  if box.startswith("\\boxed{") and box.endswith("}"):
    return box[len("\\boxed{") : -1]
  raise ValueError(f"not \\boxed{{...}}: {_short(box)}")


def final_answer(generation: str) -> str:
  """What the closing sentence names; `INVALID_ANSWER` where it is not there."""
  # The end is put there, so that it need not have been written.
  found = re.search(
      r"Final Answer: The final answer is(.*?). I hope it is correct.",
      generation + "I hope it is correct.",
  )
  return found.group(1).strip() if found else INVALID_ANSWER


_SUBSTITUTIONS = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_REMOVED = (
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "ft",
    "hours",
    "km",
    "units",
    "\\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
    "\\text{s}",
    "\\text{.}",
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    r"\mathrm{th}",
    r"^\circ",
    r"^{\circ}",
    r"\;",
    r",\!",
    "{,}",
    '"',
    "\\dots",
)


def normalize(answer: str) -> str:
  """Strips an answer of what does not matter, as Minerva does."""
  answer = answer.split("=")[-1]
  # Units as words, while there is whitespace around them.
  for word in filter(str.isalpha, _REMOVED):
    answer = re.sub(rf"(?<!\\)\b{word}\b", "", answer)
  for before, after in _SUBSTITUTIONS:
    answer = answer.replace(before, after)
  for expression in _REMOVED:
    if expression.isalpha():
      # What still sticks to its neighbours, but nothing of a LaTeX command:
      # `\left` keeps its `ft`.
      parts = re.split(r"(\\[a-zA-Z]+)", answer)
      parts[::2] = [part.replace(expression, "") for part in parts[::2]]
      answer = "".join(parts)
    else:
      answer = answer.replace(expression, "")
  # What stands in mathematics, bold, a box.
  answer = re.sub(r"(.*?)(\$)(.*?)(\$)(.*)", "$\\3$", answer)
  answer = re.sub(r"(\\text\{)(.*?)(\})", "\\2", answer)
  answer = re.sub(r"(\\textbf\{)(.*?)(\})", "\\2", answer)
  answer = re.sub(r"(\\overline\{)(.*?)(\})", "\\2", answer)
  answer = re.sub(r"(\\boxed\{)(.*)(\})", "\\2", answer)
  # \fracab is \frac{a}{b}, \sqrt[3]a is \sqrt[3]{a}, \sqrta is \sqrt{a}.
  answer = re.sub(r"(frac)([^{])(.)", "frac{\\2}{\\3}", answer)
  answer = re.sub(r"(sqrt)(\[[^\]]*\])(\w)", "\\1\\2{\\3}", answer)
  answer = re.sub(r"(sqrt)(?!\[)([^{])", "sqrt{\\2}", answer)
  answer = answer.replace("$", "")
  # 100,000 is 100000, but 0,1 is a pair.
  if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer):
    answer = answer.replace(",", "")
  return answer


def is_equiv(answer: str, wanted: str) -> tuple[bool, str]:
  """Whether two normalised answers are equal, to sympy.

  Returns:
    The verdict, and the trouble: `TIMEOUT` where sympy took too long, `ERROR`
    where memory, the stack or a file did not suffice; both are called unequal.
  """
  if answer and answer == wanted:
    return True, ""
  try:
    with _alarm(_ALARM_S):
      difference = latex.parse_latex(answer) - latex.parse_latex(wanted)
      return bool(sympy.simplify(difference) == 0), ""
  except TimeoutError:
    return False, TIMEOUT
  except _OF_THE_MACHINE:
    return False, ERROR
  except ImportError:
    raise
  except Exception:
    # What cannot be parsed, subtracted or simplified is unequal, by the rule.
    return False, ""


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
  """A TimeoutError after so many seconds, at sympy's next step."""

  def ring(*unused_signal):
    raise TimeoutError

  before = signal.signal(signal.SIGALRM, ring)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class _Ear(logging.Handler):
  """Hears of what math-verify did not finish."""

  def __init__(self):
    super().__init__(logging.DEBUG)
    self.troubles: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    if record.levelno >= logging.WARNING:
      if str(record.msg).startswith("Timeout during"):
        self.troubles.append(TIMEOUT)
    elif record.exc_info and isinstance(record.exc_info[1], _OF_THE_MACHINE):
      self.troubles.append(ERROR)


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
  """Yields a list that fills with the troubles that math-verify meets.

  It logs some; those of its LaTeX parser it drops.
  """
  logger, ear = logging.getLogger("math_verify"), _Ear()
  level, propagate = logger.level, logger.propagate
  parse = math_verify_parser.latex2sympy

  def heard(*args, **kwargs):
    try:
      return parse(*args, **kwargs)
    except _OF_THE_MACHINE:
      ear.troubles.append(ERROR)
      raise

  math_verify_parser.latex2sympy = heard
  logger.addHandler(ear)
  logger.setLevel(logging.DEBUG)
  logger.propagate = False
  try:
    yield ear.troubles
  finally:
    math_verify_parser.latex2sympy = parse
    logger.removeHandler(ear)
    logger.setLevel(level)
    logger.propagate = propagate


class _UnfinishedError(Exception):
  """A solution was not parsed in time: to be tried again, not kept."""


def _parse_gold(solution: str) -> list[Any]:
  try:
    return _parse_gold_once(solution)
  except _UnfinishedError:
    return []


@functools.lru_cache(_GOLDS)
def _parse_gold_once(solution: str) -> list[Any]:
  # Many models answer the same problem.
  with _listening() as troubles:
    parsed = math_verify_lib.parse(solution)
  if troubles:
    raise _UnfinishedError
  return parsed


def _short(text: str) -> str:
  """Fit to be stored: not too long, and no half of a surrogate pair."""
  text = text[: _MAX_EXTRACTED_CHARS + 1]
  text = text.encode(errors="replace").decode()
  if len(text) <= _MAX_EXTRACTED_CHARS:
    return text
  return text[: _MAX_EXTRACTED_CHARS - 1] + "…"
