"""What is asked, and how an answer is read."""

from collections.abc import Callable
import dataclasses
import re

from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax.evaluation import arithmetic


@dataclasses.dataclass(frozen=True)
class Item:
  """One question as the model sees it, and the answer that counts."""

  prompt: str
  gold: str


@dataclasses.dataclass(frozen=True)
class Task:
  """A benchmark.

  Attributes:
    items: (split, n) -> the first n items of that split.
    extract: the answer in a generation, None where there is none.
  """

  items: Callable[[str, int], list[Item]]
  extract: Callable[[str], str | None]


def _arithmetic_items(split: str, n: int) -> list[Item]:
  return [Item(p.prompt, p.answer) for p in arithmetic.problems(split, n)]


def _after_hashes(text: str) -> str | None:
  """The first number behind `####`, GSM8K's mark of an answer."""
  found = re.search(r"#### (-?\d+)", text)
  return found and found.group(1)


TASKS = {"arithmetic": Task(_arithmetic_items, _after_hashes)}


def get(name: str) -> Task:
  """The task of that name.

  Raises:
    UserError: naming the known ones.
  """
  if name not in TASKS:
    raise errors.UserError(
        f"evaluate.task is {name!r}; known tasks: {', '.join(sorted(TASKS))}"
    )
  return TASKS[name]


def grade(
    task: Task, items: list[Item], generations: list[sampling.Generation]
) -> list[records.Response]:
  """One response an item, in order."""
  responses = []
  for i, (item, generation) in enumerate(zip(items, generations, strict=True)):
    answer = task.extract(generation.text)
    responses.append(
        records.Response(
            item=i,
            prompt=item.prompt,
            text=generation.text,
            gold=item.gold,
            extracted=answer,
            correct=answer == item.gold,
            truncated=generation.truncated,
        )
    )
  return responses
