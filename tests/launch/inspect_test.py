"""launch.inspect answers in three forms, and says what it cannot answer."""

import csv
import importlib.util
import io
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from selfdev_jax import errors
from selfdev_jax import storage
from selfdev_jax import store as store_lib

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "inspect.py"


def _archive():
  """tests/inspection's run."""
  path = _ROOT / "tests" / "inspection" / "conftest.py"
  spec = importlib.util.spec_from_file_location("inspected", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return _archive().build(tmp_path_factory.mktemp("inspected"))


# Every kind of question.
_QUESTIONS = [
    {},
    {"programs": True},
    {"programs": True, "verdict": "rejected", "sort": "found"},
    {"program": "best"},
    {"program": "b2"},  # Its merge failed.
    {"program": "d4"},
    {"scores": "weights"},
    {"answers": "program:c", "split": "dev"},
    {"completions": "loop/1"},
    {"completion": "loop/2/1"},
    {"completion": "loop/1/1"},
    {"pair": "1/0"},
    {"pair": "1/1"},
    {"incidents": True},
]
_each = pytest.mark.parametrize(
    "question", _QUESTIONS, ids=lambda q: ",".join(map(str, q.values())) or "-"
)


@_each
def test_text_is_safe_and_leads_on(launch, workdir, question):
  shown = launch(workdir=workdir, **question)
  assert all(c.isprintable() or c == "\n" for c in shown)
  assert f"python -m launch.inspect --workdir={workdir} --" in shown


@_each
def test_json_is_one_document(launch, workdir, question):
  assert json.loads(launch(workdir=workdir, format="json", **question))


@_each
def test_csv_is_a_header_and_rows(launch, workdir, question):
  shown = launch(workdir=workdir, format="csv", **question)
  header, *rows = csv.reader(io.StringIO(shown))
  assert rows
  assert {len(row) for row in rows} == {len(header)}
  assert not any(cell.startswith("=") for row in rows for cell in row)


def test_a_terminal_is_safe_in_any_form(launch, workdir, monkeypatch):
  question = {"completion": "loop/1/1", "format": "csv"}
  assert "\u202e\x07evil" in launch(workdir=workdir, **question)
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  assert "\\u202e\\x07evil" in launch(workdir=workdir, **question)


def test_only_text_cuts_a_list_unasked(launch, tmp_path):
  hand, n = _archive(), 51
  with store_lib.Store.create(tmp_path, hand.CONFIG, {}, {}) as store:
    hand._propose(store, hand.LOOP, 1, 1, n)
    hand._admit(store, hand.LOOP, 1, [("filter", "syntax", "")] * n)
  ask = lambda **more: launch(workdir=tmp_path, programs=True, **more)
  assert "1 to 50 of 51" in ask()
  assert len(json.loads(ask(format="json"))["programs"]) == n
  assert len(ask(format="csv").splitlines()) == 1 + n
  assert len(ask(format="csv", limit=2).splitlines()) == 1 + 2


def test_a_number_leads_to_its_generations(launch, workdir):
  """By what each page says comes next."""
  shown = launch(workdir=workdir)
  assert "finished after" in shown and "--candidates=loop/1" in shown
  listed = launch(workdir=workdir, programs=True, candidates="loop/2")
  assert "1 to 1 of 1" in listed or "All 1" in listed
  assert "100.0 [34.2, 100.0] of 2/4" in listed
  page = launch(workdir=workdir, program="c3")
  assert "score is that of program a1" in page
  assert "--answers=program:c3 --split=dev" in page
  assert "--scores=weights" in shown
  models = launch(workdir=workdir, scores="weights", limit=1)
  assert "1 to 1 of 2 models of weights" in models
  assert "--answers=weights:0.2 --split=dev" in models
  assert "--scores=weights --offset=1" in models
  answers = launch(workdir=workdir, answers="program:c3", limit=1)
  assert "1 to 1 of 4 dev answers of program:c3" in answers
  assert "By loop, iteration 1, evaluate" in answers
  assert "--offset=1" in answers and "Item 0: right" in answers
  written = launch(workdir=workdir, completion="loop/2/1")
  assert "adapter f00d, trained on the 2 pairs of iteration 1" in written
  assert "\\u202e\\x07evil" in written and "git abc" in written
  pair = launch(workdir=workdir, pair="1/1")
  assert "--completion=loop/1/3" in pair and "--program=b2" in pair


def test_numbers_are_raw_fractions(launch, workdir):
  shown = launch(workdir=workdir, programs=True, search="a1", format="csv")
  row = next(iter(csv.DictReader(io.StringIO(shown))))
  assert (row["dev"], row["dev_n"], row["written"]) == ("0.75", "4", "2")
  found = json.loads(launch(workdir=workdir, program="a1", format="json"))
  low, high = found["row"]["dev"]["interval"]
  assert low < 0.75 < high
  assert found["written_by"]["session"] == {"jax": "1", "git": "abc"}
  assert found["ir"] == {"of": "a1"}


def test_the_ir_alone(launch, workdir):
  assert json.loads(launch(workdir=workdir, program="a1", ir=True)) == {
      "of": "a1"
  }


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_two_runs(launch, workdir, tmp_path, form):
  _archive().build(tmp_path, "begun", jax="2")
  shown = launch(workdir=workdir, other=tmp_path, format=form)
  if form == "json":
    found = json.loads(shown)
    assert found["versions"] == [{"key": "jax", "here": "1", "there": "2"}]
    assert len(found["only_here"]) == 5
    (best,) = json.loads(
        launch(workdir=workdir, other=tmp_path, format=form, limit=1)
    )["only_here"]
    assert best == found["only_here"][0]
  else:
    assert "jax" in shown and "a9" in shown


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"program": "zz"}, "has no program 'zz'"),
        ({"program": "a"}, "several programs begin with 'a'"),
        ({"answers": "nobody"}, "no dev score of 'nobody'"),
        ({"answers": "program:zz"}, "has no program 'program:zz'"),
        ({"completions": "loop/1/1"}, "write it like loop/2 "),
        ({"completions": "loop/7"}, "has no completions of loop/7"),
        ({"completion": "loop/1"}, "write it like loop/2/17"),
        ({"completion": "both/1/1"}, "arms: loop, control"),
        ({"completion": "loop/1/99"}, "has no completion loop/1/99"),
        ({"pair": "loop/1"}, "write it like 2/17"),
        ({"pair": "7/7"}, "has no pair 7/7"),
        ({"programs": True, "arm": "both"}, "one of loop, control"),
        ({"programs": True, "sort": "date"}, "one of dev, test, found"),
        ({"answers": "seed", "split": "train"}, "one of dev, test"),
        ({"format": "xml"}, "one of text, json, csv"),
        ({"program": "a1", "pair": "1/0"}, "--program and --pair are two"),
        ({"ir": True}, "--ir goes with --program"),
        ({"verdict": "rejected"}, "--verdict goes with --programs"),
        (
            {"program": "a1", "limit": 3},
            "--limit goes with --programs or --scores or --answers or"
            " --completions or --incidents or --other",
        ),
        ({"split": "test"}, "--split goes with --answers"),
        ({"program": ""}, "--program needs a value: A digest's beginning"),
        ({"answers": ""}, "--answers needs a value: Model"),
        ({"programs": True, "iteration": 0}, "--iteration has to be 1 to"),
        ({"programs": True, "limit": 10**20}, "--limit has to be 1 to"),
        ({"programs": True, "offset": -1}, "--offset has to be 0 to"),
        ({"programs": True, "min_dev": "nan"}, "--min_dev has to be 0 to 1"),
        ({"programs": True, "max_dev": 67}, "--max_dev has to be 0 to 1"),
        ({"completion": f"loop/{10**20}/1"}, "write it like loop/2/17"),
        ({"pair": f"1/{'9' * 5000}"}, "write it like 2/17"),
        ({"programs": True, "search": "\udcff"}, "--search is not UTF-8"),
        ({"answers": "\udcff"}, "--answers is not UTF-8"),
        (
            {"programs": True, "verdict": "trace:syntax"},
            "no verdict 'trace:syntax'; it has .* trace:shape",
        ),
        (
            {"programs": True, "candidates": "loop/77"},
            "no candidates of loop/77; it has loop/1, loop/2, control/2",
        ),
        (
            {"programs": True, "candidates": "control/1"},
            "the control's first iteration is loop/1",
        ),
        ({"scores": "expert:x"}, "one of seed, expert, task_arithmetic"),
        ({"scores": "ties"}, "has no score of ties"),
        ({"other": "/nowhere"}, "/nowhere holds no run"),
    ],
)
def test_what_cannot_be_answered_is_one_line(launch, workdir, values, words):
  with pytest.raises(errors.UserError, match=words) as raised:
    launch(workdir=workdir, **values)
  assert "\n" not in str(raised.value)


def test_a_workdir_that_is_none(launch, tmp_path):
  with pytest.raises(errors.UserError, match="holds no run"):
    launch(workdir=tmp_path)


@pytest.mark.parametrize(
    ("until", "words"),
    [
        ("", "not running, stopped before single models"),
        ("begun", "stopped before loop, iteration 1, propose"),
        ("second", "stopped before task_arithmetic"),
    ],
)
def test_a_run_that_is_not_finished(launch, tmp_path, until, words):
  _archive().build(tmp_path, until)
  assert words in launch(workdir=tmp_path)
  for form in ("text", "json", "csv"):
    assert launch(workdir=tmp_path, programs=True, format=form)


def test_it_starts_without_jax():
  """Importing jax takes longer than the answer may."""
  code = (
      "import sys, launch.inspect; sys.exit('jax' in sys.modules or"
      " 'alembic' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=_ROOT).returncode == 0


def test_incidents_are_counted_and_listed(launch, workdir, tmp_path):
  shown = launch(workdir=workdir, incidents=True)
  assert "All 3 incidents of workers, in UTC (2 lost, 1 joined)" in shown
  assert "loop/1 evaluate" in shown
  shown = launch(workdir=workdir, incidents=True, limit=2)
  assert "1 to 2 of 3" in shown and "--incidents --offset=2" in shown
  document = json.loads(launch(workdir=workdir, incidents=True, format="json"))
  assert document["total"] == 3
  assert document["counts"] == {"lost": 2, "joined": 1}
  last = document["incidents"][-1]
  assert last.pop("at") > 1e9
  assert last == {
      "kind": "lost",
      "worker": "worker 2",
      "host": "node-b",
      "detail": "its node is gone",
      "arm": "loop",
      "iteration": 1,
      "stage": "evaluate",
  }
  # The page of the run leads there, where there are any.
  assert "--incidents" in launch(workdir=workdir)
  begun = _archive().build(tmp_path, "begun")
  assert "--incidents" not in launch(workdir=begun)
  assert "None of 0 incidents" in launch(workdir=begun, incidents=True)
  with pytest.raises(errors.UserError, match="--sort goes with --programs"):
    launch(workdir=workdir, incidents=True, sort="dev")


def test_a_run_at_a_url(launch, workdir, tmp_path, monkeypatch):
  """The same is said of it, under its own name."""
  monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
  url = (tmp_path / "bucket").as_uri()
  with storage.open_workdir(url) as (copy, _):
    shutil.copytree(workdir, copy, dirs_exist_ok=True)
  for question in ({}, {"programs": True}, {"other": url}):
    there = launch(workdir=url, **question)
    here = launch(workdir=workdir, **question)
    assert there == here.replace(str(workdir), url)
    assert str(tmp_path / "cache") not in there


def test_no_run_at_a_url(launch, tmp_path, monkeypatch):
  monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
  url = (tmp_path / "bucket").as_uri()
  with pytest.raises(store_lib.StoreError, match=f"^{url} holds no run"):
    launch(workdir=url)
