import random

import hypothesis
from hypothesis import strategies as st
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import evaluation
from selfdev_jax import sampling
from selfdev_jax.evaluation import arithmetic


def test_splits_share_no_question():
  questions = {
      split: {p.question for p in arithmetic.problems(split, 2000)}
      for split in (arithmetic.TRAIN, arithmetic.DEV, arithmetic.TEST)
  }
  assert all(len(found) == 2000 for found in questions.values())
  train, dev, test = questions.values()
  assert not train & dev and not train & test and not dev & test


def test_a_smaller_split_is_a_prefix():
  assert arithmetic.problems("dev", 50) == arithmetic.problems("dev", 80)[:50]


def test_operations_come_in_turn():
  found = [p.operation for p in arithmetic.problems("test", 6)]
  assert found == [*arithmetic.OPERATIONS] * 2


@hypothesis.given(
    st.integers(),
    st.sampled_from(arithmetic.OPERATIONS),
    st.sampled_from(["train", "dev", "test"]),
)
@hypothesis.settings(deadline=None)
def test_the_answer_is_right_and_is_what_the_scorer_reads(
    seed, operation, split
):
  problem = arithmetic.draw(random.Random(seed), split, operation)
  python = {"+": "+", "-": "-", "*": "*"}[operation]
  value = eval(f"{problem.a}{python}{problem.b}")  # Digits from our own code.
  assert problem.answer == str(value) and value >= 0
  assert str(problem.a) in problem.question
  assert str(problem.b) in problem.question
  task = evaluation.load(config_lib.Evaluate())
  item = evaluation.Item(problem.prompt, problem.answer)
  (response,) = evaluation.grade(task, [item], [_said(problem.solution)])
  assert response.correct and response.extracted == problem.answer


def _said(text, **fields):
  return sampling.Generation(text, True, **fields)


def test_a_response_keeps_that_its_prompt_was_cut():
  task, item = evaluation.load(config_lib.Evaluate()), evaluation.Item(
      "q", "19"
  )
  said = [_said("#### 19"), _said("#### 19", truncated=True)]
  whole, cut = evaluation.grade(task, [item, item], said)
  assert (whole.truncated, cut.truncated) == (False, True)


@pytest.mark.parametrize(
    ("text", "extracted", "correct"),
    [
        (" 12+7=19\n#### 19", "19", True),
        (" 12+7=18\n#### 18", "18", False),
        (" 12+7=19\n#### 19\n#### 20", "19", True),
        (" 12+7=19", None, False),
        ("", None, False),
        ("#### -19", "-19", False),
        ("#### 190", "190", False),
        ("####19", None, False),
    ],
)
def test_the_first_marked_number_counts(text, extracted, correct):
  task, item = evaluation.load(config_lib.Evaluate()), evaluation.Item(
      "q", "19"
  )
  (response,) = evaluation.grade(task, [item], [_said(text)])
  assert (response.extracted, response.correct) == (extracted, correct)
  assert response.text == text and response.gold == "19"


def test_an_unknown_task_names_the_known_ones():
  with pytest.raises(Exception, match="'gms8k'; known tasks: arithmetic"):
    evaluation.load(config_lib.Evaluate(task="gms8k"))
