import json

import pytest

from selfdev_jax import errors
from selfdev_jax.evaluation import gsm8k
from selfdev_jax.evaluation import minerva
from selfdev_jax.evaluation import responses


def _write(path, *rows):
  path.write_text(
      "".join(
          (row if isinstance(row, str) else json.dumps(row)) + "\n"
          for row in rows
      )
  )
  return path


def _read(path, *rows, task="gsm8k"):
  metrics = gsm8k.METRICS if task == "gsm8k" else minerva.METRICS
  return responses.read(_write(path / "f.jsonl", *rows), task, metrics)


def _error(path, *rows, task="gsm8k"):
  with pytest.raises(errors.UserError) as caught:
    _read(path, *rows, task=task)
  assert "\n" not in str(caught.value)
  return str(caught.value).replace(str(path / "f.jsonl"), "FILE")


_GOOD = {"response": "It is 18.", "answer": "#### 18"}


def _logged(doc_id=0, filter="strict-match", value=1.0, text="#### 18", **more):
  return {
      "doc_id": doc_id,
      "doc": {"question": f"q{doc_id}", "answer": "work\n#### 18"},
      "target": "work\n#### 18",
      "resps": [[text]],
      "filter": filter,
      "metrics": ["exact_match"],
      "exact_match": value,
  } | more


def test_responses_with_their_answers(tmp_path):
  rows = [
      _GOOD | {"other": 3},
      "",
      {"response": "", "answer": " 18\n"},
      {"response": "x", "answer": "$1,800"},
  ]
  assert _read(tmp_path, *rows) == [
      responses.Response(1, "It is 18.", "#### 18", {}),
      responses.Response(3, "", "18", {}),
      responses.Response(4, "x", "$1,800", {}),
  ]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("3", r"\boxed{3}"),
        (r" \frac{1}{2} ", r"\boxed{\frac{1}{2}}"),
        (r"So it is $\boxed{3}$.", r"So it is $\boxed{3}$."),
    ],
)
def test_answers_of_math(tmp_path, answer, gold):
  pytest.importorskip("math_verify")
  row = {"response": "x", "answer": answer}
  (found,) = _read(tmp_path, row, task="math")
  assert found.gold == gold


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"response": "x"},
            "FILE:2 lacks 'answer'; a row needs response and answer",
        ),
        (
            {"answer": "18"},
            "FILE:2 lacks 'response'; a row needs response and answer",
        ),
        ({"response": None, "answer": "18"}, "FILE:2: response is no text but"),
        ({"response": "x", "answer": 18}, "FILE:2: answer is no text but 18"),
        ({"response": "x", "answer": " "}, "FILE:2: the answer is empty"),
        (
            {"response": "x", "answer": "eighteen"},
            "FILE:2: the answer ends in 'eighteen', not in '#### ' and a"
            " number; a number alone will do",
        ),
        ("[]", "FILE:2 is no JSON object"),
        ("{", "FILE:2 is no JSON: "),
        (
            {"doc_id": 0, "resps": [["x"]]},
            "FILE:2 lacks 'doc'; a logged sample of lm-evaluation-harness has",
        ),
        (_logged(resps=[]), "FILE:2: resps holds no text; only logs of tasks"),
        (_logged(resps=[[["-1.5", "False"]]]), "FILE:2: resps holds no text"),
        (_logged(resps=["text"]), "FILE:2: resps holds no text"),
        (
            _logged(doc={"answer": "none"}),
            "FILE:2: the answer ends in 'none', not in",
        ),
    ],
)
def test_a_line_that_is_wrong(tmp_path, row, message):
  assert _error(tmp_path, _GOOD, row).startswith(message)


def test_a_solution_of_math_with_a_box_that_does_not_close(tmp_path):
  pytest.importorskip("math_verify")
  row = {"response": "x", "answer": r"so $\boxed{3$"}
  message = _error(tmp_path, row, task="math")
  assert message.startswith("FILE:1: ")


@pytest.mark.parametrize("rows", [(), ("", " ")])
def test_an_empty_file(tmp_path, rows):
  assert _error(tmp_path, *rows) == "FILE holds no response"


def test_a_logged_document_is_there_once(tmp_path):
  rows = [
      _logged(0),
      _logged(1, value=0.0),
      _logged(0, "flexible-extract", 0.0),
      _logged(1, "flexible-extract", 1.0),
  ]
  assert _read(tmp_path, *rows) == [
      responses.Response(
          1,
          "#### 18",
          "work\n#### 18",
          {"strict-match": True, "flexible-extract": False},
      ),
      responses.Response(
          2,
          "#### 18",
          "work\n#### 18",
          {"strict-match": False, "flexible-extract": True},
      ),
  ]


def test_documents_of_several_subjects_are_counted_from_0_each(tmp_path):
  other = {"question": "another", "answer": "#### 3"}
  found = _read(tmp_path, _logged(0), _logged(0, doc=other))
  assert [r.gold for r in found] == ["work\n#### 18", "#### 3"]


@pytest.mark.parametrize(
    "again",
    [
        _logged(0),
        _logged(0, "flexible-extract", text="#### 19"),
    ],
)
def test_the_logs_of_two_runs_in_one_file(tmp_path, again):
  message = "FILE:3 has the document of line 1 once more; score the log of one"
  assert _error(tmp_path, _logged(0), _logged(1), again).startswith(message)


def test_a_log_without_verdicts(tmp_path):
  row = _logged(filter="none", metrics=["bypass"], bypass=0)
  del row["exact_match"]
  (found,) = _read(tmp_path, row)
  assert found.logged == {}


def test_a_log_of_minerva_math(tmp_path):
  pytest.importorskip("math_verify")
  doc = {"problem": "p", "solution": r"so $\boxed{x}$", "answer": "x"}
  row = _logged(filter="none", doc=doc, target="x", value=0, math_verify=1)
  (found,) = _read(tmp_path, row, task="math")
  assert found.gold == doc["solution"]
  assert found.logged == {"math_verify": True, "exact_match": False}


def test_the_target_of_a_task_with_fields_of_its_own(tmp_path):
  (found,) = _read(tmp_path, _logged(doc={"q": "?"}, target="18"))
  assert found.gold == "18"


def test_the_first_of_several_responses(tmp_path, capsys):
  rows = [_logged(resps=[["#### 1", "#### 18"]]), _logged(1)]
  assert [r.text for r in _read(tmp_path, *rows)] == ["#### 1", "#### 18"]
  assert "Note: 1 documents of" in capsys.readouterr().err


def test_what_is_no_verdict_in_a_log_is_none(tmp_path):
  row = {
      "doc_id": 0,
      "doc": {"question": "q", "answer": "#### 1"},
      "target": "#### 1",
      "resps": [["#### 1"]],
      "filter": "strict-match",
  }
  for value, logged in ((1.0, True), (0, False), (0.5, None), ("NaN", None)):
    line = json.dumps(row | {"exact_match": value}).replace('"NaN"', "NaN")
    (found,) = responses.read(
        _write(tmp_path / "log.jsonl", line), "gsm8k", ("strict-match",)
    )
    assert found.logged.get("strict-match") is logged


def test_every_item_has_its_own_response(tmp_path):
  items = [{"question": f"q{i}", "answer": f"#### {i}"} for i in (1, 2, 2)]
  benchmark = _write(tmp_path / "data.jsonl", *items)
  said = lambda *answers: _write(
      tmp_path / "said.jsonl", *({"response": "", "answer": a} for a in answers)
  )
  for answers in (("1", "#### 2", "2.0"), ("2", "2", "#### 1")):
    file = said(*answers)
    assert responses.score("gsm8k", file, benchmark)["n"] == 3
  with pytest.raises(errors.UserError, match=r"said.jsonl:3 answers 1, which"):
    responses.score("gsm8k", said("1", "2", "1"), benchmark)
  with pytest.raises(errors.UserError, match=r"--out is .* itself"):
    responses.score("gsm8k", said("1", "2", "2"), benchmark, benchmark)
