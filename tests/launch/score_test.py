"""Responses from elsewhere, logs of lm-evaluation-harness among them."""

import json
import pathlib

import pytest

from selfdev_jax import errors

_ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = _ROOT / "launch" / "score.py"
_DATA = _ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not _DATA.exists(), reason="no shared/data")

_TASKS = {  # Ours: lm_eval's YAML, the files of its training and test split.
    "gsm8k": ("gsm8k/gsm8k.yaml", "gsm8k_train", "gsm8k_test"),
    "math": (
        "minerva_math/minerva_math_algebra.yaml",
        "math500_test",
        "math500_test",
    ),
}
_N = {"gsm8k": 60, "math": 12}


def _answer(doc, i):
  """What a model might have written: right, wrong, or in another form."""
  gold = doc.get("solution") or doc["answer"]
  work, _, last = gold.rpartition(" ")
  forms = (
      gold,
      f"{gold}\nFinal Answer: The final answer is $"
      f"{doc['answer']}$. I hope it is correct.",
      f"{work} ${last}",
      f"{work} {last}.00, or so...",
      f"{gold}\n#### 12 or \\boxed{{12}}",
      f"The answer is {doc['answer'].rpartition(' ')[2]}.",
      "",
  )
  return forms[i % len(forms)]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
  """{task: a log of lm_eval's own evaluator and tracker, of a stand-in}."""
  if not _DATA.exists():
    pytest.skip("no shared/data")
  pytest.importorskip("lm_eval")
  from lm_eval import evaluator
  from lm_eval import loggers
  from lm_eval import tasks
  from lm_eval.api import model
  from lm_eval.tasks.minerva_math import utils

  # What sympy loads late, ahead of the harness's alarms: on a busy machine
  # they ring meanwhile, and in the middle of whatever Python is at.
  answer = r"Final Answer: The final answer is $\frac12$. I hope it is correct."
  doc = {"answer": r"\frac{2}{4}", "solution": r"$\boxed{\frac{2}{4}}$"}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(utils.timeout, "__enter__", lambda _: None)
    utils.process_results(doc, [answer])

  class Table(model.LM):

    def loglikelihood(self, requests):
      raise NotImplementedError

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests):
      return [_answer(request.doc, i) for i, request in enumerate(requests)]

  root, written = tmp_path_factory.mktemp("logs"), {}
  theirs = pathlib.Path(tasks.__file__).parent
  for name, (yaml, train, test) in _TASKS.items():
    files = {"train": train, "test": test}
    settings = {
        "include": str(theirs / yaml),
        "task": name,
        "tag": [],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {k: f"{_DATA}/{v}.jsonl" for k, v in files.items()},
            "cache_dir": str(root / "cache"),
        },
    }
    # JSON is YAML.
    (root / f"{name}.yaml").write_text(json.dumps(settings))
  manager = tasks.TaskManager(include_path=str(root), include_defaults=False)
  for name in _TASKS:
    task = manager.load([name])["tasks"][name]
    task.set_fewshot_seed(1234)
    found = evaluator.evaluate(
        Table(), {name: task}, limit=_N[name], bootstrap_iters=0
    )
    tracker = loggers.EvaluationTracker(output_path=str(root))
    tracker.general_config_tracker.model_name_sanitized = "table"
    tracker.date_id = "now"
    tracker.save_results_samples(name, found["samples"][name])
    written[name] = root / "table" / f"samples_{name}_now.jsonl"
  return written


def _rows(file):
  text = pathlib.Path(file).read_text(encoding="utf-8")
  return [json.loads(line) for line in text.split("\n") if line]


def _write(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _result(out):
  return json.loads(out.splitlines()[-1])


def test_a_log_of_gsm8k(launch, logs, tmp_path):
  out = tmp_path / "out.jsonl"
  found = _result(launch(task="gsm8k", responses=logs["gsm8k"], out=out))
  # Each document is there once for each of two filters.
  assert len(_rows(logs["gsm8k"])) == 120 and found["n"] == 60
  assert found["logged"] == {
      name: {"n": 60, "agree": 60, "disagree": []}
      for name in ("strict-match", "flexible-extract")
  }
  for name in found["logged"]:
    score = found["metrics"][name]
    theirs = [r["exact_match"] for r in _rows(logs["gsm8k"])
              if r["filter"] == name]  # fmt: skip
    assert score["correct"] == sum(theirs)
    assert 10 < score["correct"] < 50
    low, high = score["ci95"]
    assert low < score["accuracy"] == score["correct"] / 60 < high
  assert found["metrics"]["numeric-match"]["correct"] > score["correct"]
  assert (found["headline"], found["correct"]) == (
      "strict-match",
      found["metrics"]["strict-match"]["correct"],
  )
  scored = _rows(out)
  assert [row["line"] for row in scored] == list(range(1, 61))
  for row, logged in zip(scored, _rows(logs["gsm8k"]), strict=False):
    assert row["response"] == logged["resps"][0][0]
    assert row["answer"] == logged["doc"]["answer"]
    extracted = row["marks"]["strict-match"]["extracted"]
    assert logged["filtered_resps"] == [extracted or "[invalid]"]
  correct = sum(row["marks"]["numeric-match"]["correct"] for row in scored)
  assert correct == found["metrics"]["numeric-match"]["correct"]


def test_a_log_of_minerva_math(launch, logs):
  found = _result(launch(task="math", responses=logs["math"]))
  assert found["n"] == 12 and found["headline"] == "math_verify"
  assert found["logged"] == {
      name: {"n": 12, "agree": 12, "disagree": []}
      for name in ("math_verify", "exact_match")
  }
  assert 0 < found["correct"] < 12
  assert 0 < found["metrics"]["exact_match"]["correct"] < 12


def test_verdicts_that_are_not_ours_are_listed(launch, logs, tmp_path, capsys):
  rows = _rows(logs["gsm8k"])
  for i in (3, 64):
    rows[i]["exact_match"] = 1.0 - rows[i]["exact_match"]
  file = _write(tmp_path / "log.jsonl", *rows)
  found = _result(launch(task="gsm8k", responses=file))
  assert found["logged"] == {
      "strict-match": {"n": 60, "agree": 59, "disagree": [4]},
      # The line that has the response first.
      "flexible-extract": {"n": 60, "agree": 59, "disagree": [5]},
  }


@needs_data
@pytest.mark.parametrize("bare", [False, True])
def test_responses_to_the_whole_test_set(launch, tmp_path, bare):
  data = _DATA / "gsm8k_test.jsonl"
  golds = [row["answer"] for row in _rows(data)]
  rows = [
      {
          "response": golds[i] if i % 4 else "no idea",
          "answer": gold.rpartition(" ")[2] if bare else gold,
      }
      for i, gold in enumerate(golds)
  ]
  whole = _write(tmp_path / "whole.jsonl", *rows)
  found = _result(launch(task="gsm8k", responses=whole, data=data))
  assert (found["n"], found["correct"]) == (1319, 1319 - 330)
  assert {s["correct"] for s in found["metrics"].values()} == {989}
  assert {s["unextracted"] for s in found["metrics"].values()} == {330}
  assert found["seconds"] < 1
  few = _write(tmp_path / "few.jsonl", *rows[:1300])
  with pytest.raises(
      errors.UserError,
      match=r"few.jsonl has 1300 responses, .*test.jsonl 1319 items: 19 are"
      r" missing; leave out --data to score what is there$",
  ):
    launch(task="gsm8k", responses=few, data=data)
  assert _result(launch(task="gsm8k", responses=few))["n"] == 1300
  many = _write(tmp_path / "many.jsonl", *rows, rows[0])
  with pytest.raises(errors.UserError, match="1 too many"):
    launch(task="gsm8k", responses=many, data=data)


def test_math_with_bare_answers(launch, tmp_path):
  pytest.importorskip("math_verify")
  file = _write(
      tmp_path / "r.jsonl",
      {"response": r"So \boxed{\frac{1}{2}}.", "answer": r"\frac12"},
      {"response": "It is $3$.", "answer": r"It is $\boxed{3}$."},
      {"response": "", "answer": "3"},
  )
  found = _result(launch(task="math500", responses=file))
  assert (found["n"], found["correct"]) == (3, 2)
  assert (found["task"], found["headline"]) == ("math500", "math_verify")


def test_an_unknown_task(launch, tmp_path):
  file = _write(tmp_path / "r.jsonl", {"response": "1", "answer": "1"})
  with pytest.raises(
      errors.UserError,
      match="the task is 'gms8k'; responses are scored for gsm8k, math, math5",
  ):
    launch(task="gms8k", responses=file)


def test_an_out_that_cannot_be_written(launch, tmp_path):
  file = _write(tmp_path / "r.jsonl", {"response": "1", "answer": "1"})
  given = {"task": "gsm8k", "responses": file}
  with pytest.raises(errors.UserError, match=r"--out is .*r.jsonl itself"):
    launch(**given, out=tmp_path / "." / "r.jsonl")
  for out in (tmp_path, tmp_path / "none" / "out.jsonl"):
    with pytest.raises(errors.UserError, match=f"--out: {out} cannot be"):
      launch(**given, out=out)
