"""A random model answers arithmetic: lines, sums, resuming, refusals."""

import dataclasses
import fcntl
import json
import pathlib
import shutil

import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax.evaluation import run
from selfdev_jax.evaluation import tasks
from selfdev_jax.sampling import engine
from selfdev_jax.tiny import corpus

_DECODER = models.DecoderConfig(
    vocab_size=280,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    max_positions=60,  # Some prompts and 8 tokens fit.
)
_SETTINGS = config_lib.Evaluate(max_new_tokens=8, batch_size=4)
_N = 10


def _evaluate(model, out, settings=_SETTINGS, **changes):
  return run.evaluate(model, settings, out, **({"limit": _N} | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory, random_params) -> pathlib.Path:
  root = tmp_path_factory.mktemp("run")
  documents = [corpus.Document("two and two is", "four")]
  tokenizer = corpus.train_tokenizer(documents, _DECODER.vocab_size)
  corpus.save_tokenizer(tokenizer, root / "tokenizer")
  params = random_params(_DECODER)
  convert.save(root / "model", _DECODER, params, root / "tokenizer")
  return root / "model"


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
  """(file, result) of an evaluation that nothing interrupted."""
  out = tmp_path_factory.mktemp("done") / "answers.jsonl"
  return out, _evaluate(model, out)


@pytest.fixture
def copied(done, tmp_path):
  """copied(bytes) -> a file cut there, with its settings beside it."""
  out, _ = done
  about = "answers.jsonl.about.json"

  def copy(size):
    (tmp_path / out.name).write_bytes(out.read_bytes()[:size])
    (tmp_path / about).write_bytes((out.parent / about).read_bytes())
    return tmp_path / out.name

  return copy


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_what_grade_makes_of_the_sampler(done, model):
  out, result = done
  task = evaluation.load(_SETTINGS)
  items = task.items(records.TEST, _N)
  decoder, params = convert.load(model)
  tokenizer = convert.load_tokenizer(model)
  eos = convert.end_tokens(model, tokenizer)
  sampler = sampling.JaxSampler(decoder, tokenizer, eos)
  sampler.swap_weights(params, "")
  generations = [
      g
      for batch in sampler.generate(
          [item.prompt for item in items], max_new_tokens=8, batch_size=4
      )
      for g in batch
  ]
  graded = evaluation.grade(task, items, generations)
  rows = _rows(out)
  assert len(rows) == _N
  for row, response, generation in zip(rows, graded, generations, strict=True):
    assert row == {
        "item": response.item,
        "prompt": response.prompt,
        "answer": response.gold,
        "response": response.text,
        "finished": generation.finished,
        "prompt_truncated": response.truncated,
        "tokens": len(generation.tokens),
        "marks": {
            "exact_match": {
                "extracted": response.extracted,
                "correct": response.correct,
                "trouble": "",
            }
        },
    }
  assert result["correct"] == sum(r.correct for r in graded)
  truncated = sum(r.truncated for r in graded)
  assert 0 < truncated == result["prompts_truncated"] < _N
  assert result["cut"] == sum(not g.finished for g in generations) > 0
  assert result["generated_tokens"] == sum(len(g.tokens) for g in generations)


def test_the_result_says_what_it_is_of(done, model):
  out, result = done
  assert result["n"] == _N and result["shots"] == 0
  assert result["accuracy"] == result["correct"] / _N
  assert result["ci95"] == list(records.wilson(result["correct"], _N))
  assert result["headline"] == "exact_match"
  assert result["engine"].startswith("jax ")
  assert set(result["versions"]) == {"selfdev-jax", "jax", "transformers"}
  assert result["weights_sha256"] == convert.digest(model)
  assert result["model"] == str(model) and result["revision"] is None
  assert result["max_new_tokens"] == 8 and result["template"] is None
  assert not result["bos_in_prompt"]
  assert result["out"] == str(out)
  json.dumps(result)
  table = run.table(result)
  assert "n = 10" in table and "exact_match" in table
  assert "Cut at 8 tokens" in table and "without BOS" in table


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 0.999])
def test_a_file_cut_anywhere_becomes_the_same(done, copied, model, share):
  expected, result = done
  whole = expected.read_bytes()
  out = copied(int(share * len(whole)))
  again = _evaluate(model, out)
  assert out.read_bytes() == whole
  sessions = ("seconds", "tokens_per_s", "out")
  assert {k: v for k, v in again.items() if k not in sessions} == {
      k: v for k, v in result.items() if k not in sessions
  }


def test_a_whole_file_is_only_read(done, copied, model, monkeypatch):
  expected, result = done
  out = copied(None)
  monkeypatch.setattr(engine, "open_sampler", None)
  again = _evaluate(model, out)
  assert again["correct"] == result["correct"]
  assert again["tokens_per_s"] is None and again["engine"] == result["engine"]
  assert out.read_bytes() == expected.read_bytes()


def test_other_settings_are_refused_by_name(done, copied, model):
  out = copied(None)
  other = dataclasses.replace(_SETTINGS, max_new_tokens=9)
  with pytest.raises(errors.UserError) as error:
    _evaluate(model, out, other)
  said = str(error.value)
  assert "max_new_tokens (8 there, 9 here). Choose another --out" in said
  assert "\n" not in said
  with pytest.raises(errors.UserError, match=r"is no answer to item 4 of 4"):
    _evaluate(model, out, limit=4)
  with pytest.raises(errors.UserError, match=r"items \(10 there, 11 here\)"):
    _evaluate(model, out, limit=11)
  assert out.read_bytes() == done[0].read_bytes()


def test_answers_of_another_engine_are_refused(copied, model):
  out = copied(-1)
  about = out.with_name(out.name + ".about.json")
  about.write_text(about.read_text().replace('"jax 0', '"jax 9'))
  with pytest.raises(errors.UserError, match=r"engine \('jax 9"):
    _evaluate(model, out)


def test_a_file_of_something_else_is_left_alone(model, tmp_path):
  out = tmp_path / "answers.jsonl"
  for text in ('{"item": 1}\n', "text\n", '["item"]\n', "\n"):
    out.write_text(text)
    with pytest.raises(errors.UserError, match="line 1, is no answer to item"):
      _evaluate(model, out)
    assert out.read_text() == text
  for text in ('{"item": 0}\n', "text"):
    out.write_text(text)
    with pytest.raises(errors.UserError, match="does not say what"):
      _evaluate(model, out)
    assert out.read_text() == text


def test_one_process_writes_a_file(copied, model):
  out = copied(100)
  with open(out, "ab") as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(errors.UserError, match="in use by another process"):
      _evaluate(model, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 9001}, "--limit is 9001; the test split of arithmetic has"),
        ({"model": "nowhere"}, "nowhere does not exist"),
        ({"settings": config_lib.Evaluate(task="gms8k")}, "known tasks: arit"),
        ({"settings": config_lib.Evaluate(max_new_tokens=60)}, "60 positions"),
        ({"out": "/proc/answers.jsonl"}, "cannot be written"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(changes, message, model, tmp_path):
  given = {"model": model, "out": tmp_path / "answers.jsonl"} | changes
  with pytest.raises(errors.UserError, match=message) as error:
    _evaluate(**given)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_every_metric_and_its_troubles_are_kept(model, tmp_path, monkeypatch):
  def score(texts, golds):
    del golds
    troubles = ["timeout", "error", ""]
    return [
        {
            "first": evaluation.Mark(None, False, troubles[i % 3]),
            "second": evaluation.Mark(text, i % 2 == 0),
        }
        for i, text in enumerate(texts)
    ]

  def make(settings):
    arithmetic = tasks._arithmetic(settings)
    return evaluation.Task(
        arithmetic.items, ("first", "second"), score, shots=3
    )

  monkeypatch.setitem(tasks.TASKS, "two", make)
  settings = dataclasses.replace(_SETTINGS, task="two")
  result = _evaluate(model, tmp_path / "a.jsonl", settings)
  assert result["headline"] == "first" and result["correct"] == 0
  # By batches of 4, 4 and 2.
  assert result["metrics"]["first"] == {
      "correct": 0,
      "accuracy": 0.0,
      "ci95": list(records.wilson(0, _N)),
      "unextracted": _N,
      "timeouts": 5,
      "errors": 3,
  }
  second = result["metrics"]["second"]
  assert second["correct"] == 5 and second["unextracted"] == 0
  assert result["shots"] == 3
  rows = _rows(tmp_path / "a.jsonl")
  assert [r["marks"]["first"]["trouble"] for r in rows[:3]] == [
      "timeout",
      "error",
      "",
  ]
  assert all(r["marks"]["second"]["extracted"] == r["response"] for r in rows)


def test_a_stop_text_ends_an_answer_that_is_not_cut(
    model, done, tmp_path, monkeypatch
):
  text = _rows(done[0])[0]["response"]
  stop = text[2:4]

  def make(settings):
    task = tasks._arithmetic(settings)
    return evaluation.Task(task.items, task.metrics, task.score, (stop,))

  monkeypatch.setitem(tasks.TASKS, "stopped", make)
  settings = dataclasses.replace(_SETTINGS, task="stopped")
  _evaluate(model, tmp_path / "a.jsonl", settings, limit=1)
  (row,) = _rows(tmp_path / "a.jsonl")
  assert row["response"] == text[: text.index(stop)] and row["finished"]


def test_a_warm_up_is_kept_apart():
  pace = run.Pace()
  pace.add(100, 10.0, is_warm=False)
  assert pace.tokens_per_s is None
  pace.add(100, 1.0, is_warm=True)
  pace.add(50, 0.5, is_warm=True)
  assert pace.tokens_per_s == 100.0
  assert pace.tokens == 250 and pace.seconds == 11.5


def test_bos_is_seen(model, tmp_path):
  path = shutil.copytree(model, tmp_path / "model")
  for name, changes in (
      ("tokenizer_config.json", {"bos_token": "<pad>"}),
      (
          "tokenizer.json",
          {
              "post_processor": {
                  "type": "TemplateProcessing",
                  "single": [
                      {"SpecialToken": {"id": "<pad>", "type_id": 0}},
                      {"Sequence": {"id": "A", "type_id": 0}},
                  ],
                  "pair": [
                      {"Sequence": {"id": "A", "type_id": 0}},
                      {"Sequence": {"id": "B", "type_id": 1}},
                  ],
                  "special_tokens": {
                      "<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}
                  },
              }
          },
      ),
  ):
    settings = json.loads((path / name).read_text()) | changes
    (path / name).write_text(json.dumps(settings))
  result = _evaluate(path, tmp_path / "a.jsonl", limit=4)
  assert result["bos_in_prompt"]
  assert "with BOS" in run.table(result)


def test_the_revision_is_that_of_the_hub_copy(tmp_path):
  snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
  snapshot.mkdir(parents=True)
  assert run._revision(snapshot) == "0123abc"
  assert run._revision(tmp_path) is None
