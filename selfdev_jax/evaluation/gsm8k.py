r"""GSM8K: word problems of several steps, as lm-evaluation-harness scores it.

`strict-match` and `flexible-extract` are version 0.4.13's of the task `gsm8k`,
item by item, with what is odd about them: `#### $18` is none to the first,
and `18.00`, or a later `...`, wrong to the second. `numeric-match` is ours and
reads numbers as a person would, by these rules:

1. What follows one of the task's stops is left out, unless nothing stands
   before it.
2. The answer is sought behind the last `####`; failing that behind the last
   `\boxed{`, up to its brace; failing that behind the last `answer is` or
   `answer:`. Each looks no further than the end of its line, and counts only
   if a number is there. The answer is the first one behind the last `=`, or
   where none stands there, the first one.
3. Failing all of these it is the last number of the text.
4. A number may have a minus (not behind a letter, digit or bracket, where it
   subtracts), commas between its digits, a thin or unbreakable space between
   thousands, decimals, and a second number behind `/`, which divides;
   `\frac{a}{b}` is a/b. Signs of currency, `%`, units and a full stop behind
   it are no part of it: `50 %` is 50. Exponents and mixed numbers (`1 1/2`)
   are not read.
5. It is right if it equals the gold answer exactly: 1234.00 is 1,234.

References:
  Cobbe et al., Training verifiers to solve math word problems,
  arXiv:2110.14168.
  lm_eval/tasks/gsm8k/gsm8k.yaml, lm_eval/filters/extraction.py and
  exact_match_hf_evaluate in lm_eval/api/metrics.py.
"""

from collections.abc import Sequence
import fractions
import functools
import operator
import pathlib
import re

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax.evaluation import data
from selfdev_jax.evaluation.task import Item
from selfdev_jax.evaluation.task import Mark
from selfdev_jax.evaluation.task import Task

STRICT, FLEXIBLE, NUMERIC = "strict-match", "flexible-extract", "numeric-match"
METRICS = (STRICT, FLEXIBLE, NUMERIC)
STOP = ("Question:", "</s>", "<|im_end|>")
SHOTS = 5
# How they were drawn, and their licence: gsm8k.txt beside it.
SHOTS_FILE = pathlib.Path(__file__).parent / "shots" / "gsm8k.jsonl"

_QUESTION = operator.itemgetter("question")


def fault(row: data.Row) -> str:
  """What is wrong with a row's answer; empty if it can be scored against."""
  try:
    _gold(row["answer"])
  except ValueError as error:
    return str(error)
  return ""


_HUB, _CONFIGS, _FIELDS = "openai/gsm8k", ("main",), ("question", "answer")
TRAIN = data.Source(_HUB, _CONFIGS, "train", _FIELDS, fault)
TEST = data.Source(_HUB, _CONFIGS, "test", _FIELDS, fault)


def make(settings: config_lib.Evaluate) -> Task:
  """The task; its data are read when items are asked for.

  Up to five shots come with the package. They are the same for every question
  of a run, unlike the harness's, which draws anew for each from one running
  `Random(1234)`: there a prompt depends on which questions came before, so
  that a subset, another order or a resumed run is another test.

  Args:
    settings: of which `train_file`, `test_file`, `shots` and `split_seed` are
      used.
  """
  shots = SHOTS if settings.shots is None else settings.shots
  files = settings.train_file, settings.test_file

  def items(split: str, n: int | None) -> list[Item]:
    examples = _shots(shots, *files, settings.split_seed)
    if split == records.TEST:
      rows = data.apart(
          data.read(TEST, settings.test_file), examples, _QUESTION
      )
    else:
      rows = _dev(shots, *files, settings.split_seed)
    return [
        Item(prompt(examples, row["question"]), row["answer"])
        for row in data.first(rows, n, split)
    ]

  return Task(items, METRICS, score, STOP, shots)


def prompt(shots: Sequence[data.Row], question: str) -> str:
  """What the model sees, byte for byte the harness's for the same shots.

  Args:
    shots: rows with "question" and "answer", the whole worked solution.
    question: to be answered.
  """
  examples = [
      f"Question: {s['question']}\nAnswer: {s['answer']}" for s in shots
  ]
  return "\n\n".join([*examples, f"Question: {question}\nAnswer:"])


@functools.cache
def _shots(
    n: int, train_file: str | None, test_file: str | None, seed: int
) -> tuple[data.Row, ...]:
  """The worked examples: those of the package, more by the seed."""
  packaged = data.read(TRAIN, str(SHOTS_FILE))
  if n <= len(packaged):
    return packaged[:n]
  known = [*packaged, *data.read(TEST, test_file)]
  train = data.read(TRAIN, train_file)
  more = data.draw(train, known, f"shots {seed}", _QUESTION)
  more = more[: n - len(packaged)]
  if len(packaged) + len(more) < n:
    raise errors.UserError(
        f"evaluate.shots is {n}, but there are {len(packaged) + len(more)};"
        " lower it"
    )
  return packaged + tuple(more)


@functools.cache
def _dev(
    shots: int, train_file: str | None, test_file: str | None, seed: int
) -> tuple[data.Row, ...]:
  """The development set, all of it."""
  # The package's five stay out of it however many are used: a run with fewer
  # shots has the same development set.
  used = _shots(max(shots, SHOTS), train_file, test_file, seed)
  train = data.read(TRAIN, train_file)
  test = data.read(TEST, test_file)
  return tuple(data.dev(train, used, test, seed, _QUESTION))


# Scoring.


def score(
    responses: Sequence[str], golds: Sequence[str]
) -> list[dict[str, Mark]]:
  """A mark by each metric for each response.

  Args:
    responses: what a model wrote behind the prompt.
    golds: worked solutions that end in `#### N`, or N alone.

  Raises:
    UserError: a gold answer has no number.
  """
  marks = []
  for i, (response, gold) in enumerate(zip(responses, golds, strict=True), 1):
    try:
      text, value = _gold(gold)
    except ValueError as error:
      raise errors.UserError(f"gold answer {i}: {error}") from None
    marks.append(
        {
            STRICT: _harness_mark(_first(response), text),
            FLEXIBLE: _harness_mark(_last(response), text),
            NUMERIC: _numeric_mark(response, value),
        }
    )
  return marks


_BARE = re.compile(r"-?\$?\d[\d,]*(\.\d+)?", re.ASCII)


@functools.lru_cache(1 << 14)
def _gold(answer: str) -> tuple[str, fractions.Fraction]:
  """A gold answer as the harness compares it, and its value.

  Raises:
    ValueError: what stands behind its last `#### ` is no number.
  """
  last = answer.rpartition("#### ")[2]
  value = _value(last.replace("$", "")) if _BARE.fullmatch(last) else None
  if value is None:
    raise ValueError(
        f"the answer ends in {_shortened(last)!r}, not in '#### ' and a number"
    )
  return _comparable(answer), value


def _shortened(text: str) -> str:
  return text if len(text) <= 40 else f"...{text[-40:]}"


_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def _first(response: str) -> str | None:
  found = _STRICT.search(response)
  return found and found.group(1)


def _last(response: str) -> str | None:
  # The harness takes the last of `findall`, never one that overlaps: only a
  # walk from the left finds it.
  found = _FLEXIBLE.findall(response)
  return found[-1] if found else None


def _harness_mark(extracted: str | None, gold: str) -> Mark:
  # Where nothing matches the harness compares "[invalid]", no gold answer.
  if extracted is None:
    return Mark(None, False)
  return Mark(extracted, _comparable(extracted) == gold)


_FULL_STOP = re.compile(r"\.$")


def _comparable(text: str) -> str:
  r"""What is left of an answer by gsm8k.yaml's `regexes_to_ignore`.

  In their order: `,`, `\$`, `(?s).*#### ` and `\.$`. The third is written
  otherwise here: on a long text without a match it takes quadratic time. Case,
  which is ignored too, and NULs at the end, which NumPy's strings lose, occur
  neither in numbers nor in what the filters extract.
  """
  text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
  return _FULL_STOP.sub("", text)


def value(answer: str) -> fractions.Fraction:
  """The number of a gold answer.

  Raises:
    ValueError: there is none.
  """
  return _gold(answer)[1]


# Our own metric.

_SPELLINGS = (
    # Between thousands: in TeX; and spaces that do not break, or are thin.
    (re.compile(r"\{,\}|\\,"), ","),
    (re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\!"), ""),
    (
        re.compile(r"\\[dt]?frac\{(-?[\d.,]{1,40})\}\{([\d.,]{1,40})\}"),
        r"\1/\2",
    ),
    (re.compile(r"\\?[$€£]"), ""),
    (re.compile("[\N{MINUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}]"), "-"),
)
_DIGITS = r"(?:\d[\d,]*(?:\.\d+)?|(?<![\d.])\.\d+)"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?{_DIGITS}(?:\s?/\s?{_DIGITS})?")
_ANSWER = re.compile(r"answer\s*(?:is\b|:)", re.IGNORECASE)
# Longer ones are no answers, and take long to compute with.
_MAX_DIGITS = 100


def _numeric_mark(response: str, gold: fractions.Fraction) -> Mark:
  number = _number(response)
  if number is None:
    return Mark(None, False)
  return Mark(number, _value(number) == gold)


def _number(response: str) -> str | None:
  """The number that answers, by the rules at the top."""
  response = _before_stop(response)
  for behind in (_behind_hashes, _in_box, _behind_answer):
    line = _plain(behind(response))
    found = _NUMBER.search(line, line.rfind("=") + 1) or _NUMBER.search(line)
    if found:
      return found.group().rstrip(",")
  found = _NUMBER.findall(_plain(response))
  return found[-1].rstrip(",") if found else None


def _before_stop(response: str) -> str:
  ends = [i for i in map(response.find, STOP) if i >= 0]
  head = response[: min(ends, default=len(response))]
  return head if head.strip() else response


def _rest_of_line(text: str, start: int) -> str:
  return text[start:].partition("\n")[0]


def _behind_hashes(response: str) -> str:
  start = response.rfind("####")
  return "" if start < 0 else _rest_of_line(response, start + len("####"))


def _in_box(response: str) -> str:
  r"""What is in the last `\boxed{...}`, at most to the end of its line."""
  start = response.rfind("\\boxed{")
  if start < 0:
    return ""
  inside = _rest_of_line(response, start + len("\\boxed{"))
  depth = 1
  for i, letter in enumerate(inside):
    depth += (letter == "{") - (letter == "}")
    if not depth:
      return inside[:i]
  return inside


def _behind_answer(response: str) -> str:
  _, *behind = _ANSWER.split(response)
  return _rest_of_line(behind[-1], 0) if behind else ""


def _plain(text: str) -> str:
  """A text whose numbers are spelt with digits, commas, `.`, `-` and `/`."""
  for pattern, replacement in _SPELLINGS:
    text = pattern.sub(replacement, text)
  return text


def _value(number: str) -> fractions.Fraction | None:
  """The exact value of what `_NUMBER` matches; None where it has none."""
  if len(number) > _MAX_DIGITS:
    return None
  above, _, below = number.replace(",", "").partition("/")
  try:
    return fractions.Fraction(above.strip()) / fractions.Fraction(
        below.strip() or 1
    )
  except ZeroDivisionError:
    return None
