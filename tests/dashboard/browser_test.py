"""The pages as a browser shows them: drawn, readable, reachable, live."""

import pathlib

import pytest

from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.dashboard import app
from selfdev_jax.dashboard import overview
from selfdev_jax.report import page as page_lib

_WIDE, _NARROW = 1280, 400
_ADDRESSES = (
    "/",
    "/programs",
    "/program/d3",
    "/program/d4",
    "/answers/program%3Ad3/test",
    "/completions/loop/1",
    "/completion/loop/2/3",
    "/pairs/1",
    "/pairs/1/0",
    "/nowhere",
    "report.html",
)
_LOOKS = [
    (width, scheme)
    for width in (_WIDE, _NARROW)
    for scheme in ("light", "dark")
]
_CHECKS = (pathlib.Path(__file__).parent / "checks.js").read_text("utf-8")


@pytest.fixture(name="address", scope="module")
def address_fixture(finished, serving):
  with serving(finished) as address:
    yield address


@pytest.fixture(name="report", scope="module")
def report_fixture(finished, tmp_path_factory):
  """The frozen page's address."""
  path = tmp_path_factory.mktemp("report") / "report.html"
  with store_lib.Store.read(finished) as store:
    path.write_text(page_lib.render(store), encoding="utf-8")
  return path.as_uri()


@pytest.fixture(name="visit")
def visit_fixture(browser):
  """visit(address, **options) -> a page, with all that it complained of."""
  contexts = []

  def visit(address, width=_WIDE, **options):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, **options
    )
    contexts.append(context)
    page = context.new_page()
    page.complaints, page.requests = [], []
    page.on("console", lambda m: page.complaints.append(m.text))
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    page.on("requestfailed", lambda r: page.complaints.append(r.url))
    page.on("request", lambda r: page.requests.append(r.url))
    page.goto(address)
    return page

  yield visit
  for context in contexts:
    context.close()


def _check(page, name):
  """What one of the functions in checks.js finds to be wrong."""
  return page.evaluate(f"{_CHECKS}; checks.{name}()")


def test_first_page_is_drawn(visit, address):
  page = visit(address)
  assert page.complaints == []
  assert all(url.startswith(address) for url in page.requests)
  assert page.evaluate("typeof htmx.version") == "string"
  marks = _check(page, "marks")
  assert len(marks) == 5 and min(marks.values()) >= 2, marks
  assert _check(page, "overflow") == []
  assert page.locator("#table tbody tr").count() == 8


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), _LOOKS)
def test_readable(visit, address, report, width, scheme):
  for path in _ADDRESSES:
    url = f"{address}{path}" if path.startswith("/") else report
    page = visit(url, width, color_scheme=scheme)
    # All that a reader may open is looked at too.
    page.evaluate(
        "document.querySelectorAll('details').forEach(d => d.open = true)"
    )
    for name in ("overflow", "small", "faint", "unnamed", "structure"):
      assert _check(page, name) == [], (path, name)
    if path in ("/", "report.html"):
      marks = _check(page, "marks")
      assert len(marks) == 5 and min(marks.values()) >= 2, marks
    if path != "/nowhere":
      assert page.complaints == [], path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("overflow", "document.querySelector('h1').style.width = '3000px'"),
        ("small", "document.querySelector('.wide text').style.font = '9px a'"),
        ("small", "document.querySelector('th').style.fontSize = '11px'"),
        ("faint", "document.querySelector('.wide text').style.fill = '#aaa'"),
        ("faint", "document.querySelector('h1').style.color = '#888'"),
        ("faint", "document.querySelector('tr').style.background = '#888'"),
        ("unnamed", "document.querySelector('caption').remove()"),
        (
            "unnamed",
            "document.querySelector('[role=img]').removeAttribute('aria-label')",
        ),
        ("structure", "document.querySelector('h2').outerHTML = '<h4>x</h4>'"),
        ("structure", "document.querySelector('main').id = 'verdict'"),
    ],
)
def test_checks_find_what_is_wrong(visit, address, check, fault):
  page = visit(address)
  assert _check(page, check) == []
  page.evaluate(fault)
  assert _check(page, check) != []


@pytest.mark.slow
def test_a_figure_without_marks_is_found(visit, address):
  page = visit(address)
  page.evaluate(
      "for (const kind of ['line2d', 'Collection', 'patch'])"
      " document.querySelectorAll(`.wide g[id*=${kind}]`)"
      ".forEach(e => e.remove())"
  )
  assert min(_check(page, "marks").values()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/", "/program/d3", "report.html"])
def test_keyboard(visit, address, report, path):
  page = visit(f"{address}{path}" if path.startswith("/") else report)
  focusable = page.evaluate(f"{_CHECKS}; checks.focusable().length")
  order = []
  for _ in range(focusable):
    page.keyboard.press("Tab")
    order.append(page.evaluate(f"{_CHECKS}; checks.focused()"))
  assert order[0]["text"] == "Skip to the content"
  assert all(each["visible"] for each in order), [
      each for each in order if not each["visible"]
  ]
  places = [each["place"] for each in order]
  assert places == sorted(set(places)) and len(places) == focusable


@pytest.mark.slow
def test_skip_link_leads_to_the_content(visit, address):
  page = visit(address)
  page.keyboard.press("Tab")
  page.keyboard.press("Enter")
  assert page.url.endswith("#main")


def test_search_as_one_types_and_sort(visit, address):
  page = visit(f"{address}/programs")
  page.evaluate("window.same = true")
  page.get_by_label("Digest, or text of the source").fill("d5")
  page.locator("#table tbody tr").nth(1).wait_for(state="detached")
  assert "d5" in page.locator("#table tbody tr").inner_text()
  page.get_by_label("Digest, or text of the source").fill("")
  page.locator("#table tbody tr").nth(7).wait_for()
  page.get_by_role("link", name="program", exact=True).click()
  page.locator("th[aria-sort=ascending]").wait_for()
  assert page.locator("#table tbody th").first.inner_text() == "d1"
  page.get_by_label("Arm").select_option("control")
  page.locator("#table tbody tr").nth(2).wait_for(state="detached")
  # The sort is kept, and the page was never loaded again.
  assert page.locator("#table tbody th").all_inner_texts() == ["d5", "d6"]
  assert page.evaluate("window.same") and page.complaints == []
  # Nor is it lost on the way to a program and back.
  page.get_by_role("link", name="d6").click()
  page.wait_for_url("**/program/d6")
  page.go_back()
  assert page.locator("#table tbody th").all_inner_texts() == ["d5", "d6"]
  assert page.locator("th[aria-sort=ascending]").count() == 1


@pytest.mark.slow
def test_works_without_scripts(visit, address):
  page = visit(f"{address}/", java_script_enabled=False)
  page.get_by_label("Digest, or text of the source").fill("d5")
  page.get_by_role("button", name="Search").click()
  assert page.locator("#table tbody tr").count() == 1
  page.get_by_role("link", name="d5").click()
  assert page.locator("h1").inner_text() == "d5"


@pytest.mark.slow
def test_frozen_page_works_from_the_disk(visit, report):
  page = visit(report)
  assert page.requests == [report] and page.complaints == []
  rows = page.locator("table.programs tbody tr:visible")
  assert rows.count() == 8
  page.get_by_label("Search in this table").fill("shape")
  assert rows.count() == 1
  assert page.locator("output").inner_text() == "1 of 8"
  page.get_by_label("Search in this table").fill("")
  first = page.locator("table.programs tbody tr").first
  page.get_by_role("button", name="dev %").click()
  assert first.locator("th").inner_text() == "d3"
  page.get_by_role("button", name="dev %").click()
  assert first.locator("th").inner_text() == "d6"
  # What has no score stays last.
  last = page.locator("table.programs tbody tr").last
  assert last.locator("td").nth(3).inner_text().strip() in ("–", "non_finite")
  for digest in ("d1", "d6"):
    page.get_by_role("button", name="program").click()
    assert first.locator("th").inner_text() == digest
    assert last.locator("th").inner_text() == "none"


@pytest.mark.slow
def test_frozen_page_is_whole_without_scripts(visit, report):
  page = visit(report, java_script_enabled=False)
  assert page.locator("table.programs tbody tr:visible").count() == 8
  assert not page.get_by_label("Search in this table").is_visible()


@pytest.mark.slow
def test_what_is_written_appears(visit, tmp_path, small, serving, monkeypatch):
  monkeypatch.setattr(overview, "_REST", 0.0)
  with (
      store_lib.lock(tmp_path),
      small.build(tmp_path, "first") as store,
      serving(tmp_path) as address,
  ):
    page = visit(address)
    page.evaluate("window.same = true")
    assert page.locator("#table tbody tr").count() == 3
    with store.activity("loop", 2, "admit", 8, "program"):
      store.add_factory(2, "abc")
      store.add_completions([records.Completion("loop", 2, 0, "x", True)])
      store.advance(1)
      store.add_verdict(
          records.Verdict("loop", 2, 0, "source", "d9"), "{}", {}, [1.0]
      )
      progress = page.locator("#progress")
      progress.get_by_text("1 of 8 programs").first.wait_for(timeout=6000)
      page.locator("#table").get_by_text("d9").wait_for(timeout=12000)
    with store.activity("loop", 0, "ties", 1, "model"):
      store.add_score(
          records.Score("ties:scale=1", "dev", 10, 9),
          [
              records.Response(i, f"dev {i}", "1", "1", "1", i < 9)
              for i in range(10)
          ],
      )
    page.locator("#baselines table").get_by_text("TIES").wait_for(timeout=20000)
    assert page.evaluate("window.same") and page.complaints == []


@pytest.mark.slow
def test_what_has_the_focus_stays(visit, tmp_path, small, serving, monkeypatch):
  monkeypatch.setattr(app, "_PERIOD_S", 1)
  with small.build(tmp_path, "first") as store, serving(tmp_path) as address:
    page = visit(address)
    page.locator("#table tbody a").first.focus()
    with store.activity("loop", 2, "admit"):
      store.add_factory(2, "abc")
      store.add_completions([records.Completion("loop", 2, 0, "x", True)])
      store.add_verdict(
          records.Verdict("loop", 2, 0, "source", "d9"), "{}", {}, [1.0]
      )
    page.wait_for_timeout(3000)
    assert page.evaluate("document.activeElement.textContent") == "d2"
    assert page.locator("#table tbody tr").count() == 3
    # A header has an id: it is exchanged, and has the focus again.
    page.locator("#sort-dev").focus()
    page.locator("#table").get_by_text("d9").wait_for(timeout=6000)
    assert page.evaluate("document.activeElement.id") == "sort-dev"


@pytest.mark.slow
def test_says_when_nobody_answers(visit, finished, serving):
  with serving(finished) as address:
    page = visit(address)
    assert not page.locator("#trouble").is_visible()
  page.locator("#trouble").wait_for(timeout=8000)
