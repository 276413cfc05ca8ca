"""Word problems of one arithmetic step: the task of the toy world.

A solution is `12+7=19` and, a line below, `#### 19`, as GSM8K ends its own. A
question's text decides which split it belongs to, so that no two splits share
one.
"""

import dataclasses
import functools
import hashlib
import random

from selfdev_jax import errors

ADD, SUBTRACT, MULTIPLY = "+", "-", "*"
OPERATIONS = (ADD, SUBTRACT, MULTIPLY)
TRAIN, DEV, TEST = "train", "dev", "test"
MAX_PROBLEMS = 9000

_TEMPLATES = {
    ADD: (
        "{name} has {a} {thing} and buys {b} more. How many now?",
        "{name} sees {a} {thing}, then {b} others. How many in all?",
        "There are {a} {thing} in a box. {name} adds {b}. How many?",
        "{name} found {a} {thing} today and {b} before. How many?",
    ),
    SUBTRACT: (
        "{name} has {a} {thing} and loses {b}. How many are left?",
        "{name} has {a} {thing} and sells {b}. How many remain?",
        "Of {a} {thing}, {name} eats {b}. How many are left?",
        "There were {a} {thing}. {name} took {b}. How many remain?",
    ),
    MULTIPLY: (
        "{name} has {a} bags of {b} {thing}. How many in all?",
        "Each of {a} boxes holds {b} {thing}. {name} counts all. How many?",
        "{name} fills {a} bags with {b} {thing} each. How many in all?",
        "There are {a} rows of {b} {thing}. {name} counts. How many?",
    ),
}
_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
_THINGS = ("apples", "books", "coins", "eggs", "nuts", "pens", "stones", "toys")


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question; `answer` is a whole number in digits."""

  question: str
  operation: str
  a: int
  b: int

  @property
  def answer(self) -> str:
    return str(_result(self.operation, self.a, self.b))

  @property
  def prompt(self) -> str:
    return f"Q: {self.question}\nA:"

  @property
  def solution(self) -> str:
    return f" {equation(self.operation, self.a, self.b)}\n#### {self.answer}"


def _result(operation: str, a: int, b: int) -> int:
  if operation == ADD:
    return a + b
  return a - b if operation == SUBTRACT else a * b


def equation(operation: str, a: int, b: int) -> str:
  """`12+7=19`."""
  return f"{a}{operation}{b}={_result(operation, a, b)}"


def draw_operands(rng: random.Random, operation: str) -> tuple[int, int]:
  """Two numbers in the operation's range; a difference is never negative."""
  if operation == ADD:
    return rng.randint(2, 20), rng.randint(2, 20)
  if operation == SUBTRACT:
    a = rng.randint(5, 30)
    return a, rng.randint(2, min(a, 20))
  return rng.randint(2, 9), rng.randint(2, 12)


def _split_of(question: str) -> str:
  bucket = hashlib.sha256(question.encode()).digest()[0]
  if bucket < 128:
    return TRAIN
  return DEV if bucket < 170 else TEST


def draw(rng: random.Random, split: str, operation: str) -> Problem:
  """One problem of a split, drawn evenly over the templates."""
  while True:
    a, b = draw_operands(rng, operation)
    question = rng.choice(_TEMPLATES[operation]).format(
        a=a, b=b, name=rng.choice(_NAMES), thing=rng.choice(_THINGS)
    )
    if _split_of(question) == split:
      return Problem(question, operation, a, b)


@functools.cache
def problems(split: str, n: int) -> tuple[Problem, ...]:
  """The first `n` problems of a split: distinct, the operations in turn.

  A smaller `n` is a prefix of a larger one.

  Args:
    split: `train`, `dev` or `test`.
    n: how many; at most `MAX_PROBLEMS`.

  Returns:
    `n` problems, the same ones in every process.

  Raises:
    UserError: if `n` is more than there are to draw.
  """
  if n > MAX_PROBLEMS:
    raise errors.UserError(
        f"the arithmetic task has {MAX_PROBLEMS} problems a split, not {n};"
        " lower evaluate.dev_size or evaluate.test_size"
    )
  rng = random.Random(f"arithmetic {split}")
  found: dict[str, Problem] = {}
  while len(found) < n:
    problem = draw(rng, split, OPERATIONS[len(found) % len(OPERATIONS)])
    found.setdefault(problem.question, problem)
  return tuple(found.values())
