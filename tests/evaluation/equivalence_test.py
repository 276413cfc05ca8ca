"""Verdicts are those of lm-evaluation-harness's own minerva_math."""

import json
import logging
import pathlib
import random
import time

import hypothesis
from hypothesis import strategies as st
import pytest

from selfdev_jax.evaluation import equivalence
from selfdev_jax.evaluation import workers

_DATA = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"
_TEST = _DATA / "math_test.jsonl"
needs_data = pytest.mark.skipif(not _TEST.exists(), reason="no shared/data")


@pytest.fixture(scope="module")
def harness():
  """The module of lm_eval that scores MATH."""
  return pytest.importorskip("lm_eval.tasks.minerva_math.utils")


def _sentence(answer):
  return f"Final Answer: The final answer is {answer}. I hope it is correct."


def _harness_verdicts(harness, generation, gold):
  boxed = harness.remove_boxed(harness.last_boxed_only_string(gold))
  doc = {"solution": gold, "answer": harness.normalize_final_answer(boxed)}
  return harness.process_results(doc, [generation])


# How models go wrong, and how they are right in other words. An answer
# becomes another one, a text is made around it.

_ANSWERS = {
    "same": lambda a, rng: a,
    "dfrac": lambda a, rng: a.replace("\\frac", "\\dfrac"),
    "tfrac": lambda a, rng: a.replace("\\frac", "\\tfrac"),
    "frac": lambda a, rng: a.replace("dfrac", "frac").replace("tfrac", "frac"),
    "slash": lambda a, rng: (
        a.replace("\\frac{", "").replace("}{", "/").replace("}", "")
    ),
    "short frac": lambda a, rng: a.replace("{", "").replace("}", ""),
    "decimal": lambda a, rng: _decimal(a),
    "trailing zeros": lambda a, rng: f"{a}.00",
    "more": lambda a, rng: f"{a}+1",
    "more, unsimplified": lambda a, rng: f"1 + {a} - 1",
    "negative": lambda a, rng: f"-{a}",
    "unicode minus": lambda a, rng: a.replace("-", "\u2212"),
    "half": lambda a, rng: f"\\frac{{{a}}}{{2}}",
    "named": lambda a, rng: f"x = {a}",
    "chain": lambda a, rng: f"2 \\cdot 3 = {a}",
    "unit": lambda a, rng: f"{a} \\text{{ cm}}^2",
    "glued unit": lambda a, rng: f"{a}cm",
    "mbox": lambda a, rng: f"{a} \\mbox{{ inches}}",
    "words": lambda a, rng: f"{a} square units",
    "text": lambda a, rng: f"\\text{{{a}}}",
    "mathrm": lambda a, rng: f"\\mathrm{{{a}}}",
    "degrees": lambda a, rng: f"{a}^\\circ",
    "degrees in words": lambda a, rng: f"{a} degrees",
    "percent": lambda a, rng: f"{a}\\%",
    "percent in words": lambda a, rng: f"{a} percent",
    "dollars": lambda a, rng: f"\\${a}",
    "no units": lambda a, rng: a.split("\\text")[0].replace("^\\circ", ""),
    "thousands": lambda a, rng: _thousands(a, ","),
    "thin spaces": lambda a, rng: _thousands(a, ",\\!"),
    "braced commas": lambda a, rng: _thousands(a, "{,}"),
    "spaces": lambda a, rng: " ".join(a),
    "no spaces": lambda a, rng: a.replace(" ", ""),
    "tex spaces": lambda a, rng: a.replace(" ", "\\ "),
    "left right": lambda a, rng: a.replace("(", "\\left(").replace(
        ")", "\\right)"
    ),
    "no left right": lambda a, rng: a.replace("\\left", "").replace(
        "\\right", ""
    ),
    "set": lambda a, rng: f"\\{{{a}\\}}",
    "bare set": lambda a, rng: a.strip("\\{}"),
    "tuple": lambda a, rng: f"({a})",
    "bare tuple": lambda a, rng: a.strip("()[]"),
    "open": lambda a, rng: a.replace("[", "(").replace("]", ")"),
    "interval": lambda a, rng: f"[0, {a})",
    "swapped": lambda a, rng: ",".join(reversed(a.split(","))),
    "in words": lambda a, rng: a.replace(",", " \\text{ and }"),
    "pmatrix": lambda a, rng: f"\\begin{{pmatrix}} {a} \\\\ 0 \\end{{pmatrix}}",
    "bmatrix": lambda a, rng: a.replace("pmatrix", "bmatrix"),
    "sqrt": lambda a, rng: a.replace("\\sqrt{", "\\sqrt ").replace("}", ""),
    "sqrt power": lambda a, rng: f"({a})^{{1/2}}",
    "pi": lambda a, rng: a.replace("\\pi", "3.14159"),
    "times": lambda a, rng: a.replace(" ", " \\cdot "),
    "union": lambda a, rng: f"{a} \\cup \\emptyset",
    "inequality": lambda a, rng: f"x \\le {a}",
    "approximately": lambda a, rng: f"\\approx {a}",
    "infinite": lambda a, rng: f"(-\\infty, {a}]",
    "variable": lambda a, rng: f"{a}x",
    "open brace": lambda a, rng: f"{{{a}",
    "closing brace": lambda a, rng: f"{a}}}",
    "cut": lambda a, rng: a[: rng.randrange(len(a) + 1)],
    "lost letter": lambda a, rng: _without(a, rng),
    "none": lambda a, rng: "",
}


def _decimal(answer):
  parts = answer.replace("\\frac{", "").rstrip("}").split("}{")
  try:
    return f"{int(parts[0]) / int(parts[-1]):.4f}"
  except (ValueError, ZeroDivisionError):
    return "0.5"


def _thousands(answer, comma):
  digits = answer.replace(",", "").replace("\\!", "")
  if not digits.isdecimal():
    return answer
  return f"{int(digits):,}".replace(",", comma)


def _without(answer, rng):
  i = rng.randrange(len(answer) + 1)
  return answer[:i] + answer[i + 1 :]


def _reboxed(gold, answer):
  start = gold.rfind("\\boxed{")
  end = start + len(equivalence.last_boxed(gold))
  return f"{gold[:start]}\\boxed{{{answer}}}{gold[end:]}"


def _unboxed(gold):
  return _reboxed(gold, "").replace("\\boxed{}", "")


_FRAMES = {
    "boxed": _reboxed,
    "boxed and said": lambda g, a: f"{g}\n{_sentence(f'${a}$')}",
    "boxed, said wrongly": lambda g, a: f"{g}\n{_sentence(f'${a}+7$')}",
    "boxed wrongly, said": lambda g, a: (
        f"{_reboxed(g, '7')}\n{_sentence(f'${a}$')}"
    ),
    "said alone": lambda g, a: _sentence(f"${a}$"),
    "unboxed and said": lambda g, a: f"{_unboxed(g)}\n{_sentence(f'${a}$')}",
    "said plainly": lambda g, a: _sentence(a),
    "said in a box": lambda g, a: _sentence(f"$\\boxed{{{a}}}$"),
    "said, bold": lambda g, a: _sentence(f"**{a}**"),
    "said in brackets": lambda g, a: _sentence(f"\\({a}\\)"),
    "half said": lambda g, a: f"Final Answer: The final answer is ${a}$",
    "no full stop": lambda g, a: (
        f"Final Answer: The final answer is ${a}$ I hope it is correct."
    ),
    "small": lambda g, a: _sentence(f"${a}$").lower(),
    "broken line": lambda g, a: _sentence(f"\n${a}$\n"),
    "two lines": lambda g, a: (
        f"{_sentence(f'${a}$')}\n\nProblem:\nWhat is $1+1$?\n\nSolution:"
        f" $\\boxed{{2}}$.\n{_sentence('$2$')}"
    ),
    "trailing words": lambda g, a: (
        f"The answer is $\\boxed{{{a}}}$. We checked this with $n = 3$ too."
    ),
    "boxed twice": lambda g, a: f"$\\boxed{{{a}}}$ or $\\boxed{{5}}$",
    "several": lambda g, a: f"The answers are ${a}$, $2$ and $3$.",
    "plain": lambda g, a: f"The answer is {a}",
    "colon": lambda g, a: f"**Answer:** {a}",
    "display": lambda g, a: f"So\n\\[{a}\\]",
    "dollars": lambda g, a: f"So\n$${a}$$",
    "inline": lambda g, a: f"Therefore $y = {a}$.",
    "box without braces": lambda g, a: f"Thus $\\boxed {a}$.",
    "fbox": lambda g, a: f"Thus $\\fbox{{{a}}}$.",
    "only": lambda g, a: a,
    "hashes": lambda g, a: f"#### {a}",
    "cut": lambda g, a: g[: 2 * len(g) // 3],
    "worked only": lambda g, a: _unboxed(g),
    "very long": lambda g, a: f"{g}\n" * 10 + _sentence(f"${a}$"),
    "loop": lambda g, a: f"we get {a} and " * 200,
    "garbage": lambda g, a: g[::-1] + a,
    "unclosed": lambda g, a: f"$\\boxed{{{a}$",
    "signs": lambda g, a: f"$$ {{ }} \\( \\[ {a} # % & \\\\",
    "empty": lambda g, a: "",
    "blank": lambda g, a: " \n\t",
}

_GOLDS = (
    "so $\\boxed{7}$.",
    "so $x=\\boxed{-\\frac{3}{4}}$.",
    "we get $\\boxed{12,\\!345}$ ways",
    "it is $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$",
    "is $\\boxed{[2,5)}$",
    "\\[\\boxed{\\begin{pmatrix} -7 \\\\ 16 \\\\ 5 \\end{pmatrix}}.\\]",
    "$\\boxed{1,-2}$",
    "$\\boxed{70\\%}$, or $\\boxed{36^\\circ}$",
    "$\\boxed{2\\sqrt{13}+x^2}$",
    "$\\boxed{\\text{(C)}}$",
    "$\\boxed{\\$18.90}$",
    "$\\boxed{y = 2x+3}$",
)


def _corrupted(golds, seed):
  """(generation, gold), each answer and each frame in its turn."""
  rng = random.Random(seed)
  answers, frames = list(_ANSWERS.values()), list(_FRAMES.values())
  pairs = []
  for i, gold in enumerate(golds):
    answer = answers[i % len(answers)](equivalence.boxed(gold), rng)
    # Not in step with the answers, so that all meet in the end.
    frame = frames[(i + i // len(answers)) % len(frames)]
    pairs.append((frame(gold, answer), gold))
  return pairs


def _check_verdicts(harness, pairs, marks):
  """Returns how many were timed out, and so could not be compared."""
  late = 0
  for i, (generation, gold) in enumerate(pairs):
    theirs = _harness_verdicts(harness, generation, gold)
    for metric, mark in marks[i].items():
      if mark.trouble == equivalence.TIMEOUT:
        late += 1
      else:
        assert mark.correct == bool(theirs[metric]), (metric, generation, gold)
  return late


def test_verdicts_are_the_harnesss(harness):
  golds = [_GOLDS[i % len(_GOLDS)] for i in range(max(len(_ANSWERS), 61))]
  pairs = _corrupted(golds, 0)
  marks = [
      {
          "math_verify": equivalence.math_verify(*pair),
          "exact_match": equivalence.exact_match(*pair),
      }
      for pair in pairs
  ]
  assert not _check_verdicts(harness, pairs, marks)
  for metric in ("math_verify", "exact_match"):
    right = sum(mark[metric].correct for mark in marks)
    assert 5 <= right <= len(marks) - 20  # Both verdicts occur.


@pytest.mark.slow
@pytest.mark.timeout(3600)
@needs_data
def test_verdicts_are_the_harnesss_on_all_solutions(harness):
  """4 min of CPU time; took 11 min on two cores with three times the load."""
  lines = _TEST.read_text(encoding="utf-8").splitlines()
  golds = [json.loads(line)["solution"] for line in lines]
  assert len(golds) == 5000
  # In an order in which subjects mix.
  random.Random(1).shuffle(golds)
  pairs = _corrupted(golds, 1)
  pool = workers.Pool()
  metrics = ("math_verify", "exact_match")
  marks = pool.marks([(m, *pair) for pair in pairs for m in metrics])
  pool.close()
  each = [
      dict(zip(metrics, marks[i : i + 2], strict=True))
      for i in range(0, 10_000, 2)
  ]
  troubles = [mark.trouble for mark in marks if mark.trouble]
  assert len(troubles) <= 50
  assert _check_verdicts(harness, pairs, each) <= len(troubles)
  for metric in metrics:
    assert 500 <= sum(mark[metric].correct for mark in each) <= 4500


# The pieces that Minerva's rules are made of.

_PIECES = (
    *equivalence._REMOVED,
    *(before for before, _ in equivalence._SUBSTITUTIONS),
    *"{}[]()$=,.\\ \n1234567890ab%^_-+/",
    "\\boxed{",
    "\\boxed ",
    "\\fbox{",
    "\\frac",
    "\\frac{",
    "\\sqrt",
    "\\sqrt[3]",
    "\\text{",
    "\\textbf{",
    "\\overline{",
    "\\left",
    "\\pi",
    "1,000",
    "12,345,678",
    "Final Answer: The final answer is",
    ". I hope it is correct.",
)
_texts = st.lists(st.sampled_from(_PIECES), max_size=12).map("".join)


@hypothesis.given(_texts)
@hypothesis.settings(deadline=None, max_examples=200)
def test_texts_are_taken_apart_as_the_harness_does(harness, text):
  normal = harness.normalize_final_answer(text)
  assert equivalence.normalize(text) == normal
  said = harness.get_unnormalized_answer(text)
  assert equivalence.final_answer(text) == said
  box = harness.last_boxed_only_string(text)
  assert equivalence.last_boxed(text) == box
  try:
    inside = box and harness.remove_boxed(box)
  except AssertionError:
    inside = None
  if inside is None:
    with pytest.raises(ValueError, match=r"boxed"):
      equivalence.boxed(text)
  else:
    assert equivalence.boxed(text) == inside


def test_the_tables_are_the_harnesss(harness):
  assert tuple(harness.SUBSTITUTIONS) == equivalence._SUBSTITUTIONS
  assert tuple(harness.REMOVED_EXPRESSIONS) == equivalence._REMOVED


@pytest.mark.parametrize(
    ("generation", "extracted", "correct"),
    [
        (_sentence("$\\frac12$"), "\\frac{1}{2}", True),
        (_sentence("$0.5$"), "0.5", True),
        (_sentence("$x = \\frac{1}{2} \\text{ cm}$"), "\\frac{1}{2}", True),
        (_sentence("$\\frac{1}{2} \\text{ day}$"), "\\frac{1}{2}day", False),
        (_sentence("$2$"), "2", False),
        ("$\\boxed{\\frac{1}{2}}$", None, False),
        ("", None, False),
    ],
)
def test_exact_match(generation, extracted, correct):
  found = equivalence.exact_match(generation, "$\\boxed{\\frac{1}{2}}$")
  assert found == (extracted, correct, "")


@pytest.mark.parametrize(
    ("generation", "extracted", "correct"),
    [
        ("So $\\boxed{\\tfrac12}$.", "\\frac{1}{2}", True),
        ("The answer is 1/2", "1/2", True),
        ("$\\frac{2}{3}$", "\\frac{2}{3}", False),
        ("I do not know", None, False),
        ("", None, False),
    ],
)
def test_math_verify(generation, extracted, correct):
  found = equivalence.math_verify(generation, "$\\boxed{\\frac{1}{2}}$")
  assert found == (extracted, correct, "")


def test_a_solution_without_a_box():
  with pytest.raises(ValueError, match=r"no \\boxed"):
    equivalence.gold_answer("1/2")
  with pytest.raises(ValueError, match=r"no \\boxed"):
    equivalence.exact_match("1/2", "1/2")


def test_what_is_kept_of_an_answer_is_short_and_can_be_stored():
  found = equivalence.exact_match(_sentence("y-" * 300), "$\\boxed{1}$")
  assert len(found.extracted) == 500 and found.extracted.endswith("…")
  found = equivalence.exact_match(_sentence("\ud800"), "$\\boxed{1}$")
  assert found.extracted == "?"


# What takes too long. The libraries' own limits of 5 s are made 1 s here.


@pytest.fixture
def impatient(monkeypatch):
  library = equivalence.math_verify_lib
  parse, verify = library.parse, library.verify
  monkeypatch.setattr(equivalence, "_ALARM_S", 1)
  monkeypatch.setattr(library, "parse", lambda x: parse(x, parsing_timeout=1))
  monkeypatch.setattr(
      library, "verify", lambda **kw: verify(**kw, timeout_seconds=1)
  )


def test_a_parser_that_is_too_slow(impatient):
  start = time.monotonic()
  gold = "$\\boxed{\\frac{1}{3}}$"
  tower = _sentence("$\\binom{1000000000}{500000000}$")
  for metric in (equivalence.math_verify, equivalence.exact_match):
    found = metric(tower, gold)
    assert (found.correct, found.trouble) == (False, equivalence.TIMEOUT)
  assert time.monotonic() - start < 5
  # Nothing rings later, and nothing is left of the listening.
  assert equivalence.math_verify("$\\frac{2}{6}$", gold).correct
  assert not logging.getLogger("math_verify").handlers


def test_a_comparison_that_is_too_slow(impatient):
  found = equivalence.math_verify(
      "$(x+y+z+w)^{200}$", "$\\boxed{\\frac{1}{2}+x}$"
  )
  assert found == ("(x+y+z+w)^{200}", False, equivalence.TIMEOUT)


def test_a_solution_that_took_too_long_is_tried_again(impatient, monkeypatch):
  equivalence._parse_gold_once.cache_clear()
  slow = "$\\boxed{\\binom{1000000000}{500000000}}$"
  found = equivalence.math_verify("$5$", slow)
  assert (found.correct, found.trouble) == (False, equivalence.TIMEOUT)
  assert equivalence._parse_gold_once.cache_info().currsize == 0


def test_a_solution_is_parsed_once(monkeypatch):
  equivalence._parse_gold_once.cache_clear()
  parsed, parse = [], equivalence.math_verify_lib.parse
  monkeypatch.setattr(
      equivalence.math_verify_lib,
      "parse",
      lambda text: parsed.append(text) or parse(text),
  )
  gold = "so $\\boxed{11}$"
  for said in ("$11$", "$12$", "$11.0$"):
    equivalence.math_verify(said, gold)
  assert parsed.count(gold) == 1 and len(parsed) == 4


def test_an_answer_too_deep_for_the_stack_is_an_error():
  deep = _sentence("$" + "(" * 20_000 + "1" + ")" * 20_000 + "$")
  found = equivalence.exact_match(deep, "$\\boxed{1}$")
  assert (found.correct, found.trouble) == (False, equivalence.ERROR)


def test_what_the_machine_refuses_is_no_word_on_the_answer(monkeypatch):
  def refused(*_, **__):
    raise OSError(24, "Too many open files")

  said = r"Final Answer: The final answer is $0.5$. I hope it is correct."
  gold = r"$\boxed{\frac{1}{2}}$"
  assert equivalence.exact_match(said, gold).correct
  monkeypatch.setattr(equivalence.latex, "parse_latex", refused)
  found = equivalence.exact_match(said, gold)
  assert (found.correct, found.trouble) == (False, "error")


@pytest.mark.parametrize(
    "deep", ["$" + "-" * 800 + "0.5$", "$" + "(" * 90 + "0.5" + ")" * 90 + "$"]
)
def test_a_formula_too_deep_for_the_stack_is_told(deep):
  found = equivalence.math_verify(deep, r"$\boxed{\frac{1}{2}}$")
  assert found.correct or found.trouble == "error"
