"""The page: complete, self-contained, the same every time, and not fooled."""

import html.parser
import re

import pytest

from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.report import figures
from selfdev_jax.report import page
from selfdev_jax.report import reading

STAGES = ("empty", "sampled", "admitted", "first", "dev", "test")
_VOID = {"meta", "br", "img", "link", "input", "hr"}


class _Page(html.parser.HTMLParser):
  """Collects tags, attributes, ids and text; fails on unbalanced tags."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.text, self._open = [], [], [], []
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in _VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


@pytest.fixture(name="source", scope="module")
def source_fixture(tmp_path_factory, build):
  """The page of the finished run, rendered once: a second or so each time."""
  with build(tmp_path_factory.mktemp("run")) as store:
    return page.render(store)


def test_same_archive_same_page_in_one_file(archive):
  path = page.write(archive)
  assert path == archive.workdir / "report.html"
  assert path.read_text(encoding="utf-8") == page.render(archive)
  assert not list(archive.workdir.glob("*.tmp"))


def test_sections(source):
  headings = re.findall("<h2>(.*?)</h2>", source)
  assert headings == [
      "Does refining the factory lift what it writes?",
      "The best so far, at equal numbers of evaluations",
      "Every baseline",
      "The best programs",
      "What was rejected, and why",
      "Refining the factory",
      "Where the time went",
      "How the toy world was made",
      "To repeat it",
  ]


def test_hostile_text_stays_text(source):
  parsed = _Page(source)
  assert not {"script", "img", "iframe"} & set(parsed.tags)
  assert not [n for n, _ in parsed.attributes if n.startswith("on")]
  assert "</script><img src=x onerror=alert(1)>" in "".join(parsed.text)
  assert "\u202e" not in source
  assert "\\u202eevil" in source


def test_no_request_leaves_the_page(source):
  parsed = _Page(source)
  for name, value in parsed.attributes:
    if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
      assert value.startswith("#")
  assert not re.search(r"url\((?!#)", source)
  assert "@import" not in source
  assert not re.search("https?://", source)
  assert "default-src 'none'" in source


def test_ids_are_unique_and_resolve(source):
  parsed = _Page(source)
  ids = [value for name, value in parsed.attributes if name == "id"]
  assert len(ids) == len(set(ids))
  used = re.findall(r'(?:href="|url\()#([^")]+)', source)
  assert used and set(used) <= set(ids)


def test_figures_take_their_colours_from_the_page(source):
  style = source[source.index("<style>") : source.index("</style>")]
  used = set(re.findall(r"var\((--[\w-]+)\)", source))
  assert used <= set(re.findall(r"(--[\w-]+):", style)) | {"--share"}
  svg = "".join(re.findall("<svg.*?</svg>", source, flags=re.S))
  assert svg and not re.search(r"#[0-9a-f]{6}\b", svg)


def test_every_figure_has_two_widths_and_a_label(source):
  assert source.count("<svg") == 8
  assert source.count('role="img"') == 4
  assert source.count('class="wide"') == source.count('class="narrow"') == 4


@pytest.mark.parametrize("until", STAGES[:-1])
def test_unfinished(tmp_path, build, until):
  with build(tmp_path, until) as store:
    text = page.render(store)
  _Page(text)
  assert "This run is not finished" in text
  assert "nan" not in text.lower().split()


def test_writes_beside_a_writer(tmp_path, build):
  with build(tmp_path, "admitted") as writer:
    with store_lib.Store.read(tmp_path) as reader:
      page.write(reader)
    with writer.stage("loop", 2, "later"):
      pass
    with store_lib.Store.read(tmp_path) as reader:
      assert "later" in page.write(reader).read_text(encoding="utf-8")


def test_unwritable_page_is_a_one_line_error(tmp_path, build):
  (tmp_path / "report.html").mkdir()
  with (
      build(tmp_path, "empty") as store,
      pytest.raises(errors.UserError, match=r"cannot write .*report\.html"),
  ):
    page.write(store)
  assert not list(tmp_path.glob("*.tmp"))


def test_visible():
  assert page.visible("a\n\tb\u202e\x00\x1b é") == "a\n\tb\\u202e\\x00\\x1b é"


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([], []),
        ([0, 20], [0, 20]),
        ([0, 2], [-4, 6]),
        ([0, 0, 0], [-10, 0, 10]),
        # The first two push each other, then onto the third.
        ([0, 0, 8], [-7.333333, 2.666667, 12.666667]),
    ],
)
def test_spread(positions, expected):
  assert figures.spread(positions, 10) == pytest.approx(expected)


@pytest.mark.parametrize("losses", [[0.7], [float("nan")], [0.7, float("inf")]])
def test_dpo_figure_of_a_degenerate_round(losses):
  steps = [records.Step(1, i, {"loss": x}) for i, x in enumerate(losses)]
  for width in (figures.WIDE, figures.NARROW):
    assert "nan" not in figures.dpo(steps, width)


@pytest.mark.parametrize("accuracies", [[0.0], [0.5] * 3, [1.0, 0.0]])
def test_figures_of_a_degenerate_run(accuracies):
  scores = tuple(
      records.Score(f"program:{i}", "dev", 2, round(2 * a))
      for i, a in enumerate(accuracies)
  )
  arms = {"loop": (reading.Round(1, 3, (), scores, frozenset()),)}
  assert "nan" not in figures.distribution(arms, None, figures.NARROW)
  curves = {"loop": accuracies, "ties": [None, None]}
  assert "nan" not in figures.progress(curves, [1], 0.0, figures.NARROW)
