"""The page: complete, self-contained, the same every time, and not fooled."""

import base64
import hashlib
import html.parser
import re

import numpy as np
import pytest

from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.report import figures
from selfdev_jax.report import page
from selfdev_jax.report import reading
from selfdev_jax.report import words

STAGES = ("empty", "sampled", "admitted", "first", "dev", "test")
_VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}


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
  headings = re.findall('<h2 id="[a-z]+-title">(.*?)</h2>', source)
  assert headings == [
      "Stopped",
      "Does refining the factory lift what it writes?",
      "The best so far, at equal numbers of evaluations",
      "Every baseline",
      "The programs",
      "What was rejected, and why",
      "Refining the factory",
      "Where the time went",
      "How the toy world was made",
      "To repeat it",
  ]


def test_hostile_text_stays_text(source):
  parsed = _Page(source)
  assert not {"img", "iframe"} & set(parsed.tags)
  assert parsed.tags.count("script") == 1
  assert not [n for n, _ in parsed.attributes if n.startswith("on")]
  assert "</script><img src=x onerror=alert(1)>" in "".join(parsed.text)
  assert "\u202e" not in source
  assert "\\u202eevil" in source


def test_only_the_pages_own_script_may_run(source):
  (script,) = re.findall("<script>(.*?)</script>", source, flags=re.S)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert f"script-src 'sha256-{digest}'" in source
  assert script == page.resource("table.js")


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
  names = ("distribution", "progress", "hours", "bars", "dpo")
  for name in names:
    assert f'id="{name}860-' in source and f'id="{name}360-' in source
  assert source.count("<svg") == 10
  assert source.count('role="img"') == 5
  assert source.count('class="wide"') == source.count('class="narrow"') == 5


def test_says_which_commands_lead_to_what_is_behind_a_number(source):
  footer = source[source.index("<footer>") :]
  assert "launch.inspect --workdir=" in footer and "--answers=" in footer
  assert "launch.dashboard --workdir=" in footer


def test_table_of_programs(source):
  # d3 has the highest development score of seven programs and two rejections.
  rows = re.findall(
      r'<th scope="row"><code>(.*?)</code></th>\n<td class="name" data', source
  )
  assert len(rows) == 6
  assert rows[0] == '<a href="#program-d3">d3</a>'
  assert "All 8 programs and rejected completions" in source


def test_a_long_table_says_how_much_it_leaves_out(tmp_path, build, monkeypatch):
  monkeypatch.setattr(page, "_ROWS", 2)
  with build(tmp_path, "admitted") as store:
    text = page.render(store)
  assert "The best 2 of 3 programs and rejected completions" in text


def test_stages_of_a_run_that_stopped(tmp_path, build):
  with build(tmp_path, "admitted") as store:
    about = page.progress(store)
  assert [group["title"] for group in about["groups"]] == [
      "before the iterations",
      "iteration 1, both arms",
      "iteration 2, loop",
      "iteration 2, control",
      "after the iterations",
  ]
  assert not about["is_running"] and not about["is_complete"]


@pytest.mark.parametrize("until", STAGES[:-1])
def test_unfinished(tmp_path, build, until):
  with build(tmp_path, until) as store:
    text = page.render(store)
  _Page(text)
  assert "This run is not finished" in text
  assert "nan" not in text.lower().split()


def test_workers_are_told_of_where_something_happened(tmp_path, build):
  hostile = "<img src=x>\u202eevil"
  with build(tmp_path, "first") as store:
    assert '<section id="workers"' not in page.render(store)
    with store.activity(records.LOOP, 1, "evaluate"):
      for i in range(22):
        store.add_incident(
            records.Incident("duplicated", f"w{i}", "host", "a straggler")
        )
      store.add_incident(records.Incident("lost", hostile, hostile, hostile))
    source = page.render(store)
  _Page(source)
  section = re.search('<section id="workers".*?</section>', source, re.S)[0]
  assert "22 duplicated, 1 lost." in section
  assert "the last 20 of 23" in section
  rows = re.findall("<tr><th scope=.row.>(.*?)</tr>", section)
  assert len(rows) == 20
  assert '<td class="name">w3</td>' in rows[0]
  assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC<", rows[0])
  assert "</span>, iteration 1, " in rows[0]
  assert "<img" not in section and "&lt;img src=x&gt;\\u202eevil" in rows[-1]


def test_finished_without_a_scored_program(tmp_path, build):
  with build(tmp_path, "sampled") as store:
    about = page.context(reading.read(store)) | {"is_complete": True}
  verdict = page.make_environment(page.Links()).get_template(
      "sections/verdict.html"
  )
  text = verdict.render(about)
  assert "no program gave a model that could be scored" in text
  assert "not finished" not in text and " yet" not in text


def test_writes_beside_a_writer(tmp_path, build):
  with build(tmp_path, "admitted") as writer:
    with store_lib.Store.read(tmp_path) as reader:
      page.write(reader)
    with writer.activity("loop", 2, "later"):
      pass
    with store_lib.Store.read(tmp_path) as reader:
      assert "later" in page.write(reader).read_text(encoding="utf-8")


def test_unwritable_page_is_a_one_line_error(tmp_path, build):
  with build(tmp_path, "empty") as store:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(errors.UserError, match=r"cannot write .*report\.html"):
      page.write(store)
  assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("units", "seconds", "expected"),
    [
        (1248, 3600, "1,248 programs an hour"),
        (9, 1, "32,400 programs an hour"),
        (600, 2, "300 programs a second"),
    ],
)
def test_rate(units, seconds, expected):
  assert words.rate(units, seconds, "program") == expected


def test_names_of_stages():
  names = ("weights", "task_arithmetic", "best", "propose")
  said = ["random weights", "task arithmetic", "test", "propose"]
  assert [words.stage(name) for name in names] == said


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


@pytest.mark.parametrize("accuracies", [[0.0], [0.5] * 3, [0.0, 1.0]])
def test_figures_of_a_degenerate_run(accuracies):
  arms = {"loop": (_round(accuracies),)}
  assert "nan" not in figures.distribution(arms, None, figures.NARROW)
  rises = np.unique(accuracies)
  count = len(rises)
  curve = reading.Curve(
      np.arange(1, count + 1), np.zeros(count), rises, len(accuracies), 0.0
  )
  for draw in (
      lambda width: figures.progress({"loop": curve}, [1], 0.0, width),
      lambda width: figures.hours({"loop": curve}, None, width),
  ):
    drawn = draw(figures.NARROW)
    assert "nan" not in drawn and "var(--loop)" in drawn


def _round(accuracies, iteration=1):
  n = len(accuracies)
  return reading.Round(
      iteration, n, n, n, n, np.sort(accuracies), max(accuracies)
  )


def test_a_strip_of_many_programs_shows_their_quantiles():
  many = np.random.default_rng(0).beta(2, 3, 50_000)
  drawn = figures.distribution({"loop": (_round(many),)}, None, figures.WIDE)
  assert 350 < drawn.count("<use") < 450
  assert len(drawn) < 200_000
  assert f"n={len(many):,}" in drawn
  assert f">{100 * many.mean():.1f}<" in drawn


def test_drawings_are_rounded_and_their_labels_are_not():
  curve = reading.Curve(
      np.array([1]), np.array([0.001]), np.array([0.5]), 2, 0.0025
  )
  drawn = figures.hours({"loop": curve}, None, figures.WIDE)
  labels = [float(x) for x in re.findall(r">(0\.\d+)</text>", drawn)]
  assert len(labels) > 3
  assert np.diff(labels) == pytest.approx(labels[0])
  assert not re.search(r'd="[^"]*\.\d{3}', drawn)


def test_many_iterations_do_not_write_over_each_other():
  arms = {
      arm: tuple(_round([0.2, 0.4], t) for t in range(1, 31))
      for arm in ("loop", "control")
  }
  for width in (figures.WIDE, figures.NARROW):
    drawn = figures.distribution(arms, 0.3, width)
    names = [t for t in range(1, 31) if f">{t}<" in drawn]
    assert 2 <= len(names) <= width // 24
