"""The tasks by name, and how their generations become responses."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
import re

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax.evaluation import arithmetic
from selfdev_jax.evaluation import gsm8k
from selfdev_jax.evaluation import minerva
from selfdev_jax.evaluation.task import digest
from selfdev_jax.evaluation.task import Item
from selfdev_jax.evaluation.task import Mark
from selfdev_jax.evaluation.task import Task


def _arithmetic_items(split: str, n: int | None) -> list[Item]:
  problems = arithmetic.problems(split, n or arithmetic.MAX_PROBLEMS)
  return [Item(p.prompt, p.answer) for p in problems]


def _after_hashes(text: str) -> str | None:
  """The first number behind `####`, GSM8K's mark of an answer."""
  found = re.search(r"#### (-?\d+)", text)
  return found and found.group(1)


def _score_arithmetic(
    responses: Sequence[str], golds: Sequence[str]
) -> list[dict[str, Mark]]:
  answers = map(_after_hashes, responses)
  return [
      {"exact_match": Mark(answer, answer == gold)}
      for answer, gold in zip(answers, golds, strict=True)
  ]


def _arithmetic(_: config_lib.Evaluate) -> Task:
  return Task(_arithmetic_items, ("exact_match",), _score_arithmetic)


TASKS: dict[str, Callable[[config_lib.Evaluate], Task]] = {
    "arithmetic": _arithmetic,
    "gsm8k": gsm8k.make,
    "math": minerva.make,
    "math500": minerva.make_500,
}


def load(settings: config_lib.Evaluate) -> Task:
  """The task that the settings name, with its data.

  Raises:
    UserError: naming the known tasks, or what is wrong with the data.
  """
  if settings.task not in TASKS:
    raise errors.UserError(
        f"the task is {settings.task!r}; known tasks:"
        f" {', '.join(sorted(TASKS))}"
    )
  return TASKS[settings.task](settings)


@functools.cache
def load_items(settings: config_lib.Evaluate) -> Mapping[str, list[Item]]:
  """What is asked on each split; made once, as MATH takes a while."""
  task = load(settings)
  return {
      records.DEV: task.items(records.DEV, settings.dev_size),
      records.TEST: task.items(records.TEST, settings.test_size),
  }


def digest_items(settings: config_lib.Evaluate) -> str:
  """`digest` of all that is asked, the splits one after the other."""
  return digest(list(itertools.chain(*load_items(settings).values())))


def grade(
    task: Task,
    items: Sequence[Item],
    generations: Sequence[sampling.Generation],
    first: int = 0,
) -> list[records.Response]:
  """One response an item, in order, by the task's headline metric.

  Args:
    task: of which the items are.
    items: in the task's order.
    generations: one for each.
    first: the number of the first item.
  """
  marks = task.score([g.text for g in generations], [i.gold for i in items])
  return [
      records.Response(
          item=first + i,
          prompt=item.prompt,
          text=generation.text,
          gold=item.gold,
          extracted=mark[task.headline].extracted,
          correct=mark[task.headline].correct,
          truncated=generation.truncated,
          trouble=mark[task.headline].trouble,
      )
      for i, (item, generation, mark) in enumerate(
          zip(items, generations, marks, strict=True)
      )
  ]
