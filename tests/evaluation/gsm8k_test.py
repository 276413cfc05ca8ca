"""Prompts and verdicts are those of lm-evaluation-harness's own task."""

import collections
from fractions import Fraction
import json
import operator
import pathlib
import random
import time

import hypothesis
from hypothesis import strategies as st
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import tables
from selfdev_jax.evaluation import data
from selfdev_jax.evaluation import gsm8k

_DATA = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"
_TRAIN, _TEST = _DATA / "gsm8k_train.jsonl", _DATA / "gsm8k_test.jsonl"
needs_data = pytest.mark.skipif(not _TRAIN.exists(), reason="no shared/data")


def _task(**settings):
  return evaluation.load(config_lib.Evaluate(task="gsm8k", **settings))


def _published(**settings):
  return _task(train_file=str(_TRAIN), test_file=str(_TEST), **settings)


def _verdicts(response, gold="#### 1234"):
  (marks,) = gsm8k.score([response], [gold])
  return {name: (mark.extracted, mark.correct) for name, mark in marks.items()}


# Against the harness's own task.


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
  """lm_eval's task `gsm8k`, its own YAML, over the local files."""
  lm_eval = pytest.importorskip("lm_eval.tasks")
  root = tmp_path_factory.mktemp("harness")
  yaml = pathlib.Path(lm_eval.__file__).parent / "gsm8k" / "gsm8k.yaml"
  settings = {
      "include": str(yaml),
      "task": "gsm8k_local",
      "tag": [],
      "dataset_path": "json",
      "dataset_name": None,
      "dataset_kwargs": {
          "data_files": {"train": str(_TRAIN), "test": str(_TEST)},
          "cache_dir": str(root / "cache"),
      },
  }
  # JSON is YAML.
  (root / "gsm8k_local.yaml").write_text(json.dumps(settings))
  manager = lm_eval.TaskManager(include_path=str(root), include_defaults=False)
  return manager.load(["gsm8k_local"])["tasks"]["gsm8k_local"]


def _harness_verdicts(harness, docs, generations):
  """For each generation {filter: (extracted, correct)}, by lm_eval's code."""
  from lm_eval.api.instance import Instance

  harness._instances = [
      Instance("generate_until", doc, ("", {}), 0, resps=[text])
      for doc, text in zip(docs, generations, strict=True)
  ]
  harness.apply_filters()
  verdicts = []
  for doc, instance in zip(docs, harness._instances, strict=True):
    found = {}
    for name, filtered in instance.filtered_resps.items():
      (value,) = harness.process_results(doc, [filtered]).values()
      found[name] = (None if filtered == "[invalid]" else filtered, bool(value))
    verdicts.append(found)
  return verdicts


def _tail(change):
  """A corruption of the published answer, what stands behind `#### `."""

  def corrupt(text, rng):
    work, _, answer = text.rpartition("#### ")
    return f"{work}#### {change(answer, rng)}"

  return corrupt


def _noise(text, rng):
  raw = bytearray(text.encode())
  for _ in range(rng.randint(1, 20)):
    raw[rng.randrange(len(raw))] = rng.randrange(256)
  return raw.decode(errors="replace")


def _cut(text, rng):
  return text[: rng.randrange(len(text))]


def _in_other_digits(text, rng):
  zero = rng.choice("\uff10\u0660\u0966")
  return text.translate({ord("0") + i: ord(zero) + i for i in range(10)})


def _wrong(answer, rng):
  return str(int(answer.replace(",", "")) + rng.randint(-3, 3))


def _number(rng):
  return rng.choice(["0", "7", "42", "1,000", "3.5", "-2", "$9.99", "1e3"])


_CORRUPTIONS = {
    "none": lambda text, rng: text,
    "dollar": _tail(lambda a, rng: f"${a}"),
    "dollar behind": _tail(lambda a, rng: f"{a}$"),
    "euro": _tail(lambda a, rng: f"{rng.choice('€£¥₹')}{a}"),
    "TeX dollar": _tail(lambda a, rng: f"\\${a}"),
    "sentence": _tail(lambda a, rng: f"{a}\nSo she has 12 of 40, or 30%."),
    "words": _tail(lambda a, rng: f"{a} dollars each for {_number(rng)} days"),
    "dot": _tail(lambda a, rng: f"{a}."),
    "dots": _tail(lambda a, rng: f"{a}{'.' * rng.randint(2, 9)}"),
    "dots later": lambda text, rng: f"{text} And so{'.' * rng.randint(1, 4)}",
    "cents": _tail(lambda a, rng: f"{a}.00"),
    "cents and dot": _tail(lambda a, rng: f"${a}.0."),
    "decimals": _tail(lambda a, rng: f"{a}.{rng.randint(0, 99)}"),
    "commas": _tail(lambda a, rng: f"{int(a.replace(',', '')):,}"),
    "odd commas": _tail(
        lambda a, rng: rng.choice([f"{a},", f",{a}", f"{a},,."])
    ),
    "more numbers": lambda text, rng: f"{text} {_number(rng)} {_number(rng)}",
    "several hashes": lambda text, rng: f"{text}\n#### {_number(rng)}",
    "hashes first": lambda text, rng: f"#### {_number(rng)}\n{text}",
    "no hashes": lambda text, rng: text.replace("#### ", ""),
    "hashes, no space": lambda text, rng: text.replace("#### ", "####"),
    "more hashes": lambda text, rng: text.replace(
        "####", "#" * rng.randint(3, 7)
    ),
    "hashes, spaces": lambda text, rng: text.replace("#### ", "####   "),
    "hashes, newline": lambda text, rng: text.replace("#### ", "####\n"),
    "hashes, no number": _tail(lambda a, rng: "none"),
    "percent": _tail(lambda a, rng: f"{a}%"),
    "space, percent": _tail(lambda a, rng: f"{a} %"),
    "negative": _tail(lambda a, rng: f"-{a}"),
    "negative dollar": _tail(lambda a, rng: rng.choice([f"-${a}", f"$-{a}"])),
    "two minus": _tail(lambda a, rng: f"--{a}"),
    "Unicode minus": _tail(lambda a, rng: f"\u2212{a}"),
    "wrong": _tail(_wrong),
    "box": _tail(lambda a, rng: f"\\boxed{{{a}}}"),
    "box only": lambda text, rng: f"$\\boxed{{{text.rpartition(' ')[2]}}}$.",
    "answer is": lambda text, rng: f"The answer is {text.rpartition(' ')[2]}.",
    "bold": _tail(lambda a, rng: f"**{a}**"),
    "fraction": _tail(lambda a, rng: f"\\frac{{{a}}}{{1}}"),
    "other digits": _in_other_digits,
    "spaces": lambda text, rng: f"  {text.replace(' ', '  ')} \t ",
    "thin spaces": _tail(lambda a, rng: f"{a}\u202f000"),
    "no break spaces": lambda text, rng: text.replace(" ", "\u00a0"),
    "newlines": lambda text, rng: text.replace("\n", "\r\n") + "\n\n\n",
    "NULs": lambda text, rng: text + "\0" * rng.randint(1, 3),
    "NULs within": _tail(lambda a, rng: "\0".join(a)),
    "continued": lambda text, rng: f"{text}\n\nQuestion: Tom has {_number(rng)}"
    f" pens?\nAnswer: He has them.\n#### {_number(rng)}",
    "stopped": lambda text, rng: f"{text}<|im_end|>\n<|im_start|>user 5",
    "upper case": lambda text, rng: text.upper(),
    "empty": lambda text, rng: "",
    "blank": lambda text, rng: rng.choice([" ", "\n", "\t\n ", "."]),
    "long": lambda text, rng: "so we add 1 and 2, " * 1000 + text,
    "long number": _tail(lambda a, rng: a * rng.randint(2, 300)),
    "repeated": lambda text, rng: f"{text}\n" * rng.randint(2, 6),
    "cut": _cut,
    "noise": _noise,
    "points only": _tail(lambda a, rng: rng.choice(["...", ",", ".,.", "$$"])),
    "leading zeros": _tail(lambda a, rng: f"00{a}"),
    "invalid": _tail(lambda a, rng: "[invalid]"),
    "of another": None,  # The whole solution of another question.
}


def _generations(rows, rng, each):
  """(row, name of a corruption, text), `each` for every row."""
  names = list(_CORRUPTIONS)
  for i, row in enumerate(rows):
    for j in range(each):
      name = names[(i * each + j) % len(names)]
      if _CORRUPTIONS[name] is None:
        yield row, name, rng.choice(rows)["answer"]
      else:
        yield row, name, _CORRUPTIONS[name](row["answer"], rng)


def _disagreements(harness, rows, rng, each):
  """(How often each corruption came, where verdicts differ, how many hold)."""
  made = list(_generations(rows, rng, each))
  docs, texts = [row for row, _, _ in made], [text for _, _, text in made]
  theirs = _harness_verdicts(harness, docs, texts)
  marks = gsm8k.score(texts, [doc["answer"] for doc in docs])
  differ, correct = [], collections.Counter()
  for (_, kind, text), their, our in zip(made, theirs, marks, strict=True):
    assert set(their) == {gsm8k.STRICT, gsm8k.FLEXIBLE}
    for name, verdict in their.items():
      correct[name, verdict[1]] += 1
      if (our[name].extracted, our[name].correct) != verdict:
        differ.append((kind, name, text[-80:], verdict, our[name]))
  return collections.Counter(kind for _, kind, _ in made), differ, correct


def _rows(*paths):
  return [
      json.loads(line)
      for path in paths
      for line in path.read_text(encoding="utf-8").splitlines()
  ]


@needs_data
def test_every_verdict_is_the_harnesss(harness):
  rng = random.Random(0)
  rows = rng.sample(_rows(_TEST, _TRAIN), 600)
  kinds, differ, correct = _disagreements(harness, rows, rng, 1)
  assert not differ
  assert min(kinds.values()) >= 10 and len(correct) == 4


@pytest.mark.slow
@needs_data
def test_every_verdict_is_the_harnesss_on_all_solutions(harness):
  rows = _rows(_TEST, _TRAIN)
  kinds, differ, correct = _disagreements(harness, rows, random.Random(1), 3)
  assert not differ
  assert kinds.total() == 3 * 8792 and min(kinds.values()) >= 450
  assert min(correct.values()) >= 5000


_PIECES = st.sampled_from([
    "#### ", "####", "1", "12", "1,234", ".", "..", "-", "$", ",", " ", "\n",
    "18", "=", "answer is", "\\boxed{", "}", "%", "x", "\0", "€", "Question:",
])  # fmt: skip


@needs_data
@hypothesis.given(st.lists(_PIECES | st.text(max_size=3), max_size=12))
@hypothesis.settings(deadline=None, max_examples=80)
def test_verdicts_on_made_up_texts_are_the_harnesss(harness, pieces):
  text, doc = "".join(pieces), {"question": "q", "answer": "#### 1,234"}
  (their,) = _harness_verdicts(harness, [doc], [text])
  ours = _verdicts(text, doc["answer"])
  assert {name: ours[name] for name in their} == their


def _check_prompts(harness, monkeypatch, n):
  """Ours with the shots that lm_eval drew for a question is lm_eval's."""
  drawn, sample = [], harness.sampler.sample
  monkeypatch.setattr(
      harness.sampler,
      "sample",
      lambda *args, **kwargs: drawn.append(sample(*args, **kwargs))
      or drawn[-1],
  )
  harness.set_fewshot_seed(1234)
  harness.build_all_requests(limit=n)
  rows = _rows(_TEST)[:n]
  assert len(harness.instances) == len(drawn) == n
  for row, shots, instance in zip(rows, drawn, harness.instances, strict=True):
    assert len(shots) == gsm8k.SHOTS
    ours = gsm8k.prompt(shots, row["question"]).encode()
    assert ours == instance.args[0].encode()
  assert instance.args[1]["until"] == list(gsm8k.STOP)


@needs_data
def test_prompts_are_the_harnesss(harness, monkeypatch):
  _check_prompts(harness, monkeypatch, 200)


@pytest.mark.slow
@needs_data
def test_all_prompts_are_the_harnesss(harness, monkeypatch):
  _check_prompts(harness, monkeypatch, 1319)


# Scoring.


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 1234", ("1234", True), ("1234", True)),
        ("#### 1,234.", ("1,234.", True), ("1,234.", True)),
        # What is odd about them is part of them.
        ("#### $1,234", (None, False), ("$1,234", True)),
        ("#### 1234.00", ("1234.00", False), ("1234.00", False)),
        ("#### 1234 and so on...", ("1234", True), ("...", False)),
        ("#### 1234\n#### 5", ("1234", True), ("5", False)),
        ("", (None, False), (None, False)),
    ],
)
def test_the_harnesss_metrics(text, strict, flexible):
  found = _verdicts(text)
  assert (found[gsm8k.STRICT], found[gsm8k.FLEXIBLE]) == (strict, flexible)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1234", "1234"),
        ("#### $1,234", "1,234"),
        ("#### €1,234.00.", "1,234.00"),
        ("#### \\$1{,}234", "1,234"),
        ("#### 1\u202f234", "1,234"),
        ("#### 1234 and so on...", "1234"),
        ("#### 1234 apples for 3 days", "1234"),
        ("####1234", "1234"),
        ("#### 5\n#### 1,234", "1,234"),  # The last mark counts.
        ("#### 2 * 617 = 1234 dollars", "1234"),
        ("#### <<2*617=1234>>1234", "1234"),
        ("#### 2468/2", "2468/2"),
        ("#### \\frac{2468}{2}", "2468/2"),
        ("#### \\boxed{1234}", "1234"),
        ("#### \uff11\uff12\uff13\uff14", "\uff11\uff12\uff13\uff14"),
        ("The total is 1234\n####", "1234"),
        ("#### none\nThe answer is: **1,234**.", "1,234"),
        ("So \\boxed{1234} in 7 days.", "1234"),
        ("So \\boxed{\\text{$1,234$ in all}} in 7 days.", "1,234"),
        ("\\boxed{} so it is 1234", "1234"),
        ("The answer is 1,234. She had 3.", "1,234"),
        ("ANSWER: $1234. She had 3.", "1234"),
        ("Answer:\nShe had 3 and 1231: 1234", "1234"),  # A heading.
        ("The answer is 5. No, the answer is 1234.", "1234"),
        ("She had 3 - 1 + 1232 = 1234 %", "1234"),
        ("from 5-1234", "1234"),  # It subtracts.
        ("#### 1234\n\nQuestion: Tom has 5?\nAnswer: 5\n#### 5", "1234"),
        ("Question: 3 and 1231?\nAnswer: 1234", "1234"),
        ("#### 1234<|im_end|> 5", "1234"),
    ],
)
def test_numeric_match_reads(text, number):
  assert _verdicts(text)[gsm8k.NUMERIC] == (number, True)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("none", None),
        ("...", None),
        ("#### -1234", "-1234"),
        ("#### -$1234", "-1234"),
        ("#### \u22121234", "-1234"),
        ("#### 1234.01", "1234.01"),
        ("#### 1234/2", "1234/2"),
        ("#### 1234/0", "1234/0"),
        ("#### \\frac{1234}{2}", "1234/2"),
        ("#### .1234", ".1234"),
        ("#### 12345", "12345"),
        ("1234 of 5", "5"),
        ("#### " + "1234" * 30, "1234" * 30),  # Too long to be one.
    ],
)
def test_numeric_match_refuses(text, number):
  assert _verdicts(text)[gsm8k.NUMERIC] == (number, False)


@hypothesis.given(
    st.decimals(-(10**9), 10**9, places=2), st.sampled_from(["", "$", "€"])
)
def test_numeric_match_reads_every_decimal(value, currency):
  text = f"{currency}{value:,}"
  (marks,) = gsm8k.score([f"So it is {text}."], [f"#### {value}"])
  assert marks[gsm8k.NUMERIC].correct
  (marks,) = gsm8k.score([f"So it is {text}."], [f"#### {value + 1}"])
  assert not marks[gsm8k.NUMERIC].correct


def test_a_value_is_exact():
  assert gsm8k._value("0.1") == Fraction(1, 10)
  assert gsm8k._value("1,000 / 3") == Fraction(1000, 3)


def test_bare_golds():
  for gold in ("1234", "1,234", "$1,234", "work\n#### 1,234"):
    assert all(correct for _, correct in _verdicts("#### 1234", gold).values())


@pytest.mark.parametrize(
    "gold", ["", "none", "#### ", "12 dollars", "#### 12 dollars", "1" * 101]
)
def test_a_gold_answer_without_a_number(gold):
  with pytest.raises(errors.UserError, match="gold answer 2: the answer ends"):
    gsm8k.score(["#### 1", "#### 1"], ["#### 1", gold])


@needs_data
def test_published_solutions_are_right_by_every_metric():
  golds = [row["answer"] for row in _rows(_TEST, _TRAIN)]
  marks = gsm8k.score(golds, golds)
  assert len(marks) == 8792
  assert all(mark.correct for marked in marks for mark in marked.values())


@needs_data
def test_ten_thousand_in_five_seconds():
  rows = _rows(_TRAIN)
  made = [t for _, _, t in _generations(rows, random.Random(2), 2)][:10_000]
  golds = [row["answer"] for row in rows for _ in range(2)][:10_000]
  start = time.process_time()
  assert len(gsm8k.score(made, golds)) == 10_000
  assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "piece",
    ["9", "1,", "$", "#### ", ".", "-", "answer ", "\\boxed{", "1/", " ",
     "\\frac{1", "= ", "1{,}", "Question:", "\n"],
)  # fmt: skip
def test_time_grows_no_faster_than_the_text(piece):
  text = piece * (300_000 // len(piece))
  start = time.process_time()
  gsm8k.score([text], ["#### 9"])
  assert time.process_time() - start < 2  # 0.02 to 0.1 s; quadratic: minutes.


# Items.


@needs_data
def test_test_items_are_the_published_ones_in_order():
  task = _published()
  items, rows = task.items("test", None), _rows(_TEST)
  assert [item.gold for item in items] == [row["answer"] for row in rows]
  assert len(items) == 1319 and task.items("test", 7) == items[:7]
  for item, row in zip(items, rows, strict=True):
    assert item.prompt.endswith(f"\n\nQuestion: {row['question']}\nAnswer:")
    assert item.prompt.count("Question: ") == 6
  assert (task.headline, task.shots, task.stop) == (
      "strict-match",
      5,
      ("Question:", "</s>", "<|im_end|>"),
  )


@needs_data
def test_the_shots_of_the_package_are_drawn_from_the_training_split():
  drawn = data.draw(
      _rows(_TRAIN), _rows(_TEST), "shots 0", operator.itemgetter("question")
  )
  assert _rows(gsm8k.SHOTS_FILE) == drawn[:5]


@needs_data
@pytest.mark.parametrize("shots", [0, 1, 5, 8])
def test_fewer_shots_begin_as_more_do(shots):
  (item,) = _published(shots=shots).items("test", 1)
  (most,) = _published(shots=9).items("test", 1)
  examples = most.prompt.split("\n\n")[:shots]
  question = _rows(_TEST)[0]["question"]
  assert item.prompt == "\n\n".join(
      [*examples, f"Question: {question}\nAnswer:"]
  )


@needs_data
def test_more_shots_are_drawn_by_the_seed():
  prompts = [
      _published(shots=8, split_seed=seed).items("test", 1)[0].prompt
      for seed in (0, 0, 1)
  ]
  assert prompts[0] == prompts[1] != prompts[2]
  with pytest.raises(
      errors.UserError, match=r"evaluate.shots is 9000, .* 7473"
  ):
    _published(shots=9000).items("test", 1)


@needs_data
def test_the_test_set_needs_no_training_split(monkeypatch):
  monkeypatch.setattr(data, "_read_hub", _no_hub)
  assert len(_task(test_file=str(_TEST)).items("test", 3)) == 3
  with pytest.raises(errors.UserError, match="openai/gsm8k train asked for"):
    _task(test_file=str(_TEST)).items("dev", 3)


def _no_hub(source):
  raise errors.UserError(f"{source.hub} {source.split} asked for")


@needs_data
def test_no_development_set_without_the_test_set(monkeypatch):
  monkeypatch.setattr(data, "_read_hub", _no_hub)
  gsm8k._dev.cache_clear()
  # Whatever is in the training file could be a test question.
  with pytest.raises(errors.UserError, match="openai/gsm8k test asked for"):
    _task(train_file=str(_TEST), split_seed=3).items("dev", 50)


@needs_data
def test_an_item_whose_answer_stands_among_the_shots_is_left_out(capsys):
  items = _task(test_file=str(_TRAIN)).items("test", None)
  assert len(items) == 7473 - 5
  assert "5 of 7473 items are among the shots" in capsys.readouterr().err
  questions = [item.prompt.rpartition("Question: ")[2] for item in items]
  shots = items[0].prompt.split("Question: ")[1:-1]
  assert not any(q.splitlines()[0] in "".join(shots) for q in questions)
  assert len(_task(test_file=str(_TRAIN), shots=0).items("test", None)) == 7473


def _write(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _row(question, answer="#### 1"):
  return {"question": question, "answer": answer}


def test_what_is_in_the_test_set_is_not_in_the_development_set(tmp_path):
  train = [_row(f"Question {i}?") for i in range(20)]
  test = [_row("  question 3? "), _row("QUESTION\n7?"), _row("other?")]
  task = _task(
      train_file=_write(tmp_path / "train.jsonl", *train),
      test_file=_write(tmp_path / "test.jsonl", *test),
      shots=0,
  )
  prompts = {item.prompt for item in task.items("dev", None)}
  assert prompts == {
      f"Question: Question {i}?\nAnswer:" for i in range(20) if i not in (3, 7)
  }
  with pytest.raises(
      errors.UserError,
      match=r"dev split has 18 items, not 19; lower evaluate.dev_size or --lim",
  ):
    task.items("dev", 19)
  with pytest.raises(errors.UserError, match="test split has 3 items, not 4"):
    task.items("test", 4)


def test_a_test_file_that_is_given_and_wrong_is_told_of(tmp_path):
  task = _task(
      train_file=_write(tmp_path / "train.jsonl", _row("a?")),
      test_file=str(tmp_path / "none.jsonl"),
  )
  with pytest.raises(errors.UserError, match=r"none.jsonl cannot be read"):
    task.items("dev", 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q"},
            r"test.jsonl:2 lacks 'answer'; a row needs question",
        ),
        (_row("q", "it is 12"), r"test.jsonl:2: the answer ends in 'it is 12'"),
        (_row("q", "#### twelve"), r":2: the answer ends in 'twelve', not in"),
        (_row("q", 12), r":2: answer is no text but 12"),
        (_row(" "), r":2: question is empty"),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path, row, message):
  file = _write(tmp_path / "test.jsonl", _row("first?"), row)
  with pytest.raises(errors.UserError, match=message):
    _task(test_file=file).items("test", 1)


def test_files_are_read_once(tmp_path, monkeypatch):
  file = _write(tmp_path / "test.jsonl", _row("a?"), _row("b?"))
  task = _task(test_file=file)
  before = task.items("test", None)
  monkeypatch.setattr(tables, "read_lines", None)
  assert task.items("test", None) == before
