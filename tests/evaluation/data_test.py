import json
import operator
import types

import pytest

from selfdev_jax import errors
from selfdev_jax.evaluation import data

_QUESTION = operator.itemgetter("question")
_SOURCE = data.Source(
    "org/name", ("one", "two"), "test", ("question", "answer")
)


def _row(question, answer="a"):
  return {"question": question, "answer": answer}


def _write(path, text):
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(path)


def _error(call, *args):
  with pytest.raises(errors.UserError) as caught:
    call(*args)
  assert "\n" not in str(caught.value)
  return str(caught.value)


# Files.


def test_rows_in_their_order_and_their_fields_alone(tmp_path):
  rows = [_row("b ") | {"level": 3}, _row("a\u2019")]
  lines = [json.dumps(rows[0]), "", json.dumps(rows[1], ensure_ascii=False)]
  file = _write(tmp_path / "f.jsonl", "\ufeff" + "\r\n".join(lines))
  assert data.read(_SOURCE, file) == (_row("b "), _row("a\u2019"))


def test_a_file_is_read_once(tmp_path):
  file = _write(tmp_path / "f.jsonl", json.dumps(_row("a")))
  first = data.read(_SOURCE, file)
  (tmp_path / "f.jsonl").unlink()
  assert data.read(_SOURCE, file) is first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "FILE:3 is no JSON: Expecting property name"),
        (b"\xff{}", "FILE:3 is no JSON: 'utf-8' codec can't decode byte 0xff"),
        ("[" * 100_000, "FILE:3 is no JSON: "),
        (
            r'{"question": "\ud800", "answer": "a"}',
            "FILE:3 is no JSON: 'utf-8' codec can't encode",
        ),
        ("[1]", "FILE:3 is no JSON object"),
        (
            '{"question": "q"}',
            "FILE:3 lacks 'answer'; a row needs question and answer",
        ),
        ('{"question": "q", "answer": 3}', "FILE:3: answer is no text but 3"),
        (
            '{"question": null, "answer": "3"}',
            "FILE:3: question is no text but",
        ),
        ('{"question": " ", "answer": "3"}', "FILE:3: question is empty"),
    ],
)
def test_a_line_that_is_wrong(tmp_path, line, message):
  line = line if isinstance(line, bytes) else line.encode()
  good = json.dumps(_row("q")).encode()
  file = _write(tmp_path / "f.jsonl", b"\n".join([good, b"", line, good]))
  assert _error(data.read, _SOURCE, file).startswith(
      message.replace("FILE", file)
  )


def test_a_rows_fault_is_told_with_its_line(tmp_path):
  source = data.Source(
      "org/name",
      ("one",),
      "test",
      ("question",),
      lambda row: "it is odd" if row["question"] == "odd" else "",
  )
  rows = "\n".join(json.dumps(_row(q)) for q in ("even", "odd"))
  file = _write(tmp_path / "f.jsonl", rows)
  assert _error(data.read, source, file) == f"{file}:2: it is odd"


def test_files_without_rows(tmp_path):
  none, empty = str(tmp_path / "none"), _write(tmp_path / "empty", "\n\n")
  assert (
      _error(data.read, _SOURCE, none)
      == f"{none} cannot be read: No such file or directory"
  )
  assert (
      _error(data.read, _SOURCE, str(tmp_path))
      == f"{tmp_path} cannot be read: Is a directory"
  )
  assert _error(data.read, _SOURCE, empty) == f"{empty} holds no row"


# The hub.


@pytest.fixture
def hub():
  """A stand-in for the hub: {config: rows}, and what was asked of it."""
  datasets = pytest.importorskip("datasets")
  data.read.cache_clear()
  with pytest.MonkeyPatch.context() as patch:
    patched = types.SimpleNamespace(rows={}, asked=[], kind="parquet")

    def builder(name, config):
      patched.asked.append((name, config))
      table = datasets.Dataset.from_list(patched.rows[config])
      return types.SimpleNamespace(
          name=patched.kind,
          download_and_prepare=lambda: patched.asked.append("fetched"),
          as_dataset=lambda split: patched.asked.append(split) or table,
      )

    patch.setattr(datasets, "load_dataset_builder", builder)
    yield patched
  data.read.cache_clear()


def test_all_configs_of_the_hub_one_after_the_other(hub):
  hub.rows = {"one": [_row("a"), _row("b") | {"level": 3}], "two": [_row("c")]}
  assert list(map(_QUESTION, data.read(_SOURCE, None))) == ["a", "b", "c"]
  fetched = ["fetched", "test"]
  one, two = ("org/name", "one"), ("org/name", "two")
  assert hub.asked == [one, *fetched, two, *fetched]


def test_a_row_of_the_hub_that_is_wrong(hub):
  hub.rows = {"one": [_row("a"), _row("")], "two": [_row("c")]}
  assert (
      _error(data.read, _SOURCE, None)
      == "org/name (one, test), row 2: question is empty"
  )


@pytest.mark.parametrize("kind", ["pandas", "name", "webdataset"])
def test_nothing_but_tables_is_fetched(hub, kind):
  hub.kind, hub.rows = kind, {"one": [_row("a")]}
  message = _error(data.read, _SOURCE, None)
  assert f"it is stored as {kind}, not as Parquet" in message
  assert hub.asked == [("org/name", "one")]


@pytest.mark.parametrize(
    ("split", "way_out"),
    [
        ("train", "give evaluate.train_file: JSONL"),
        ("test", "give evaluate.test_file or --data: JSONL"),
    ],
)
def test_a_hub_out_of_reach(split, way_out):
  # HF_HUB_OFFLINE is set in tests/conftest.py.
  source = data.Source("nobody/nothing", ("main",), split, ("question",))
  message = _error(data.read, source, None)
  assert message.startswith(
      f"the {split} split of nobody/nothing could not be had from the Hugging"
  )
  assert way_out in message


# Draws.


def _rows(n):
  return [_row(f"Question {i}?", str(i)) for i in range(n)]


def test_the_order_is_the_seeds():
  draws = [data.dev(_rows(50), [], [], seed, _QUESTION) for seed in (0, 0, 1)]
  assert draws[0] == draws[1] != draws[2]
  for drawn in draws:
    assert sorted(drawn, key=_QUESTION) == sorted(_rows(50), key=_QUESTION)
    assert drawn != _rows(50)
  # A seed gives this order in every version, or it is another experiment.
  assert [r["answer"] for r in draws[0][:5]] == ["37", "23", "39", "36", "31"]


def test_shots_test_items_and_repetitions_stay_out():
  rows = [*_rows(30), _row("question 5?"), _row("question 29?")]
  shots, test = [_row("Question  7?")], [_row("QUESTION\n11? "), _row("x")]
  drawn = data.dev(rows, shots, test, 0, _QUESTION)
  numbers = [int(r["question"].split()[1].rstrip("?")) for r in drawn]
  assert sorted(numbers) == [i for i in range(30) if i not in (7, 11)]


def test_leaving_out_one_more_moves_the_rest_up():
  whole = data.dev(_rows(30), [], [], 0, _QUESTION)
  left = data.dev(_rows(30), [], whole[3:5], 0, _QUESTION)
  assert left == whole[:3] + whole[5:]


def test_the_first_few():
  rows = _rows(9)
  assert data.first(rows, 4, "dev") == rows[:4]
  assert data.first(rows, 9, "dev") == data.first(rows, None, "dev") == rows
  assert (
      _error(data.first, rows, 10, "test")
      == "the test split has 9 items, not 10; lower evaluate.test_size or"
      " --limit"
  )
