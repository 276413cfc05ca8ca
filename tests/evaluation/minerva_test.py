"""MATH's prompts, splits and marks."""

import functools
import json
import pathlib
import sys

import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import sampling
from selfdev_jax.evaluation import data
from selfdev_jax.evaluation import minerva

pytest.importorskip("math_verify")

_DATA = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"
_TEST, _TEST_500 = _DATA / "math_test.jsonl", _DATA / "math500_test.jsonl"
needs_data = pytest.mark.skipif(not _TEST.exists(), reason="no shared/data")


def _rows(path):
  lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  return list(map(json.loads, lines))


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _row(name):
  return {"problem": f"What is {name}?", "solution": f"\\boxed{{{name}}}"}


def _shots():
  return _rows(minerva.SHOTS_FILE)


@pytest.fixture
def make(tmp_path):
  """(train rows, test rows, settings) -> the task over them."""

  def make(train, test, task="math", **settings):
    return evaluation.load(
        config_lib.Evaluate(
            task=task,
            train_file=_write(tmp_path / "train.jsonl", train),
            test_file=_write(tmp_path / "test.jsonl", test),
            **settings,
        )
    )

  return make  # What is read is cached by name; another test has other names.


def _problems(items):
  """The last problem of each prompt."""
  return [
      item.prompt.rpartition("Problem:\n")[2].removesuffix("\n\nSolution:")
      for item in items
  ]


# Against the harness's own task.


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
  """lm_eval's `minerva_math_algebra`, its own YAML, over a local file."""
  lm_eval = pytest.importorskip("lm_eval.tasks")
  root = tmp_path_factory.mktemp("harness")
  yaml = (
      pathlib.Path(lm_eval.__file__).parent
      / "minerva_math"
      / "minerva_math_algebra.yaml"
  )

  def load(test):
    settings = {
        "include": str(yaml),
        "task": "math_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"train": str(test), "test": str(test)},
            "cache_dir": str(root / "cache"),
        },
    }
    # JSON is YAML.
    (root / "math_local.yaml").write_text(json.dumps(settings))
    manager = lm_eval.TaskManager(
        include_path=str(root), include_defaults=False
    )
    return manager.load(["math_local"])["tasks"]["math_local"]

  return functools.cache(load)


def _check_prompts(harness, name, file, shots):
  """That there is the same prompt and gold for every problem."""
  ours = evaluation.load(
      config_lib.Evaluate(task=name, test_file=str(file), shots=shots)
  )
  theirs = harness(file)
  assert theirs.config.metadata["version"] == 3.1
  n = 4 if shots is None else shots
  assert theirs.config.num_fewshot == 4 and ours.shots == n
  wanted = {
      theirs.fewshot_context(doc, n): doc["solution"]
      for doc in theirs.test_docs()
  }
  items = ours.items("test", None)
  assert {item.prompt: item.gold for item in items} == wanted
  assert len(items) == len(_rows(file))
  assert list(ours.stop) == theirs.config.generation_kwargs["until"]


@needs_data
@pytest.mark.parametrize("shots", [None, 0, 1, 3])
def test_prompts_are_the_harnesss(harness, tmp_path_factory, shots):
  file = tmp_path_factory.getbasetemp() / "some_of_math.jsonl"
  _write(file, _rows(_TEST)[::100])
  _check_prompts(harness, "math", file, shots)


@needs_data
@pytest.mark.slow
def test_all_prompts_are_the_harnesss(harness):
  _check_prompts(harness, "math", _TEST, None)
  _check_prompts(harness, "math500", _TEST_500, None)


def test_the_shots_are_the_harnesss():
  utils = pytest.importorskip("lm_eval.tasks.minerva_math.utils")
  for ours, theirs in zip(_shots(), utils.list_fewshot_samples(), strict=True):
    assert ours == {key: theirs[key] for key in ("problem", "solution")}


# The test split.


@needs_data
def test_the_beginning_of_the_test_split_has_all_subjects():
  task = evaluation.load(
      config_lib.Evaluate(task="math", test_file=str(_TEST), shots=0)
  )
  subject = {row["problem"]: row["type"] for row in _rows(_TEST)}
  items = task.items("test", None)
  assert len(items) == 5000
  found = [subject[problem] for problem in _problems(items)]
  assert len(set(found[:100])) == len(set(found)) == 7
  share = found.count("Algebra") / len(found)
  assert abs(found[:1000].count("Algebra") / 1000 - share) < 0.04


def test_the_order_of_the_test_split_is_not_the_files(make, tmp_path):
  rows = [_row(str(i)) for i in range(30)]
  forth = make([_row("a")], rows).items("test", None)
  data.read.cache_clear()  # The next is another file of this name.
  back = make([_row("a")], rows[::-1]).items("test", None)
  assert forth == back
  assert sorted(item.gold for item in forth) == sorted(
      row["solution"] for row in rows
  )
  data.read.cache_clear()
  assert make([_row("a")], rows).items("test", 7) == forth[:7]


def test_a_test_problem_without_an_answer_is_told_by_line(make):
  task = make([], [_row("1"), {"problem": "p", "solution": "It is 3."}])
  with pytest.raises(errors.UserError, match=r"test.jsonl:2: no \\boxed"):
    task.items("test", None)


def test_more_items_than_there_are(make):
  task = make([], [_row("1")])
  with pytest.raises(errors.UserError, match="has 1 items, not 2"):
    task.items("test", 2)


# What may be learned from.


def test_the_development_set_has_neither_shots_nor_test_problems(make):
  test = [_row(f"t{i}") for i in range(10)]
  # As MATH has them: other spaces, another solution.
  shots = [
      {
          "problem": shot["problem"].replace("  ", " ").replace("\n", " "),
          "solution": shot["solution"].partition("\nFinal")[0],
      }
      for shot in _shots()
  ]
  copies = [_row(f"T{i}") | {"problem": f"what is  t{i} ?"} for i in range(10)]
  train = [_row(f"d{i}") for i in range(20)]
  for task in ("math", "math500"):
    for n in (0, 4):
      made = make([*shots, *test, *train, *copies], test, task, shots=n)
      found = sorted(_problems(made.items("dev", None)))
      assert found == sorted(row["problem"] for row in train)
    data.read.cache_clear()


def test_more_shots_are_drawn_from_the_training_split(make):
  test = [_row(f"t{i}") for i in range(10)]
  train = [_row(f"d{i}") for i in range(20)]
  prompts = set()
  for seed in range(5):
    task = make([*test, *train], test, shots=6, split_seed=seed)
    dev, items = task.items("dev", None), task.items("test", None)
    (shots,) = {
        item.prompt.rpartition("Problem:\n")[0] for item in [*dev, *items]
    }
    prompts.add(shots)
    assert task.shots == 6 and shots.count("Problem:\n") == 6
    four, end = _shots(), "I hope it is correct.\n\n"
    assert shots.startswith(minerva.prompt(four, "")[: -len("\n\nSolution:")])
    assert shots.endswith(end) and shots.count(end) == 6
    drawn = [d for d in train if f"Problem:\n{d['problem']}\n" in shots]
    assert len(drawn) == 2 and "What is t" not in shots
    for row in drawn:
      answer = row["solution"].removeprefix("\\boxed{").removesuffix("}")
      assert (
          f"Solution: {row['solution']}\nFinal Answer: The final answer is"
          f" ${answer}$. I hope it is correct.\n"
      ) in shots
    assert sorted(_problems(dev)) == sorted(
        row["problem"] for row in train if row not in drawn
    )
  assert len(prompts) == 5


def test_more_shots_than_there_are(make):
  task = make([_row("d"), _row("t")], [_row("t")], shots=6)
  with pytest.raises(errors.UserError, match="shots is 6, but there are 5"):
    task.items("test", None)


def test_the_development_set_is_drawn_by_the_seed(make):
  train, test = [_row(f"d{i}") for i in range(50)], [_row("t")]
  first = make(train, test, split_seed=1).items("dev", None)
  again = make(train, test, split_seed=1).items("dev", 20)
  other = make(train, test, split_seed=2).items("dev", None)
  assert again == first[:20] and other != first
  assert sorted(_problems(other)) == sorted(_problems(first))


def test_math500_keeps_apart_from_all_of_math_on_the_hub(monkeypatch):
  hub = {
      minerva.TRAIN: [_row("d"), _row("t"), _row("m")],
      minerva.TEST: [_row("t"), _row("m")],
      minerva.TEST_500: [_row("t")],
  }
  read = data.read
  monkeypatch.setattr(
      data,
      "read",
      lambda source, file: read(source, file) if file else tuple(hub[source]),
  )
  monkeypatch.setattr(minerva, "_dev", minerva._dev.__wrapped__)
  monkeypatch.setattr(minerva, "_train_rows", minerva._train_rows.__wrapped__)
  task = evaluation.load(config_lib.Evaluate(task="math500"))
  assert _problems(task.items("test", None)) == ["What is t?"]
  assert _problems(task.items("dev", None)) == ["What is d?"]


def test_training_problems_without_an_answer_are_left_out(make, capsys):
  without = {"problem": "p", "solution": "It is \\fbox{3}."}
  task = make([_row("d"), without, _row("e")], [_row("t")])
  assert len(task.items("dev", None)) == 2
  assert "1 of 3 solutions" in capsys.readouterr().err


def test_a_training_file_of_something_else(make):
  without = {"problem": "p", "solution": "It is 3."}
  task = make([without, _row("d"), without], [_row("t")])
  with pytest.raises(errors.UserError, match=r"2 of 3 .*train.jsonl.* no"):
    task.items("dev", None)


# Marks.


@pytest.fixture(scope="module")
def task():
  return evaluation.load(config_lib.Evaluate(task="math"))


def test_both_metrics_mark_every_response(task):
  gold = "so $x = \\boxed{\\frac{1}{2}}$."
  said = [
      "Final Answer: The final answer is $\\frac12$. I hope it is correct.",
      "So $x=\\boxed{0.5}$.",
      "It is 3.",
  ]
  marks = task.score(said, [gold] * 3)
  assert [list(mark) for mark in marks] == [["math_verify", "exact_match"]] * 3
  assert [mark["math_verify"].correct for mark in marks] == [True, True, False]
  assert [mark["exact_match"].correct for mark in marks] == [True, False, False]
  assert [mark["exact_match"].extracted for mark in marks] == [
      "\\frac{1}{2}",
      None,
      None,
  ]
  assert task.score([], []) == []


def test_a_response_has_the_headline_and_its_trouble(task, monkeypatch):
  mark = evaluation.Mark(None, False, "timeout")
  monkeypatch.setattr(
      minerva.workers.Pool, "marks", lambda self, asked: [mark] * len(asked)
  )
  item = evaluation.Item("q", "\\boxed{1}")
  (response,) = evaluation.grade(
      task, [item], [sampling.Generation("$1$", True)]
  )
  assert (response.correct, response.trouble) == (False, "timeout")


def test_a_gold_answer_without_a_box(task):
  message = r"gold answer 2: no \\boxed\{...\} in the solution; give"
  with pytest.raises(errors.UserError, match=message):
    task.score(["1", "2"], ["\\boxed{1}", "2"])


@pytest.mark.parametrize("name", ["math", "math500"])
def test_without_the_libraries_one_line_says_so(monkeypatch, name):
  monkeypatch.delattr(evaluation, "equivalence", raising=False)
  monkeypatch.delitem(
      sys.modules, "selfdev_jax.evaluation.equivalence", raising=False
  )
  monkeypatch.setitem(sys.modules, "math_verify", None)
  with pytest.raises(errors.UserError, match=r'pip install -e "\.\[eval\]"$'):
    evaluation.load(config_lib.Evaluate(task=name))


def test_with_another_antlr_one_line_says_so(monkeypatch):
  monkeypatch.delattr(evaluation, "equivalence", raising=False)
  monkeypatch.delitem(
      sys.modules, "selfdev_jax.evaluation.equivalence", raising=False
  )
  monkeypatch.setattr("importlib.metadata.version", lambda name: "4.13.2")
  with pytest.raises(errors.UserError, match=r"4\.13\.2, not 4\.11"):
    evaluation.load(config_lib.Evaluate(task="math"))
