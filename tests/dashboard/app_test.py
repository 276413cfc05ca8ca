"""What the dashboard answers: all that it links to, and nothing else."""

import re
import threading
from urllib import parse

import pytest
from starlette import testclient

from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.dashboard import app
from selfdev_jax.dashboard import overview
from selfdev_jax.inspection import queries
from selfdev_jax.report import page

_ADDRESS = "http://127.0.0.1:8642"


def _client(workdir):
  return testclient.TestClient(
      app.application(workdir, ["box"]),
      base_url=_ADDRESS,
      raise_server_exceptions=False,
  )


@pytest.fixture(name="client", scope="module")
def client_fixture(finished):
  with _client(finished) as client:
    yield client


@pytest.fixture(name="running")
def running_fixture(tmp_path, small, monkeypatch):
  """A client, and the store that a run writes to."""
  monkeypatch.setattr(overview, "_REST", 0.0)
  with small.build(tmp_path, "first") as store, _client(tmp_path) as client:
    yield client, store


def _links(text):
  return {
      link.replace("&amp;", "&").partition("#")[0]
      for link in re.findall(r'(?:href|hx-get|src)="([^"]*)"', text)
  } - {""}


@pytest.fixture(name="pages", scope="module")
def pages_fixture(client):
  """Everything that can be reached from the first page, by address."""
  found, waiting = {}, {"/"}
  while waiting:
    address = waiting.pop()
    answer = client.get(address)
    assert answer.status_code in (200, 204), f"{address}: {answer.text}"
    found[address] = answer.text
    if "text/html" in answer.headers.get("content-type", ""):
      links = {parse.urljoin(address, link) for link in _links(answer.text)}
      waiting |= links - found.keys()
  return found


def test_every_link_resolves_and_every_record_is_linked(pages):
  paths = {parse.unquote(address.partition("?")[0]) for address in pages}
  assert {f"/program/d{i}" for i in range(1, 7)} <= paths
  assert {f"/completion/loop/1/{i}" for i in range(4)} <= paths
  assert {"/answers/seed/dev", "/answers/seed/test", "/pairs/1"} <= paths
  assert {"/pairs/1/0", "/answers/program:d3/test", "/programs"} <= paths


def test_generated_text_stays_text(pages, small):
  hostile = parse.quote(small.HOSTILE_EXPERT, safe="")
  assert f"/answers/{hostile}/dev" in pages
  for address, text in pages.items():
    if not address.startswith("/static"):
      assert "<img" not in text and "onclick='x'" not in text, address
      assert "\u202e" not in text, address
  assert "\\u202eevil" in pages["/program/d3"]
  assert "&lt;/script&gt;&lt;img" in pages["/completion/loop/2/3"]


def test_first_page_has_the_sections_of_the_report(pages):
  text = pages["/"]
  for name in page.SECTIONS:
    assert f'<section id="{name}"' in text
  assert text.index('id="verdict"') < text.index('id="progress"')
  assert text.count("<svg") == 10


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("/programs?search=d5", ["d5"]),
        ("/programs?verdict=rejected", ["d4"]),
        ("/programs?arm=control&sort=hash&ascending=1", ["d5", "d6"]),
        ("/programs?iteration=1&sort=dev", ["d2", "d1"]),
        ("/programs?search=base&sort=test", ["d3", "d2"]),
        ("/programs?rows=2&page=1&sort=dev", ["d5", "d1"]),
        # d3, which the loop wrote first, is none of them.
        ("/programs?candidates=control/2", ["d5", "d6"]),
    ],
)
def test_search_filter_and_sort(client, address, wanted):
  found = re.findall(r'href="/program/(\w+)"', client.get(address).text)
  assert found[: len(wanted)] == wanted


def test_a_failed_merge_leads_to_its_origin(pages):
  link = '<a href="/answers/program%3Ad4/dev">no merged model</a>'
  assert link in pages["/program/d4"]
  assert "in the stage" in pages["/answers/program%3Ad4/dev"]


def test_a_long_list_says_where_the_rest_is(client, monkeypatch):
  monkeypatch.setattr(app, "_FEW", 1)
  text = client.get("/program/d1").text
  assert "and 3 more; <code>python -m launch.inspect --workdir=" in text


def test_page_beyond_the_last_says_so(client):
  assert "There are only 8." in client.get("/programs?page=7").text


@pytest.mark.parametrize(
    ("address", "status", "line"),
    [
        ("/programs?iteration=x", 400, "iteration has to be a number"),
        ("/programs?page=99999999999999999999", 400, "has to be a number"),
        ("/programs?sort=x", 404, "cannot sort by"),
        ("/program/zzz", 404, "no program"),
        ("/completion/loop/9/0", 404, "no completion loop/9/0"),
        ("/programs?candidates=loop", 400, "iteration of candidates has to"),
        (f"/completion/loop/1/{'9' * 5000}", 404, "Not Found"),
        (f"/pairs/{'9' * 5000}", 404, "Not Found"),
        ("/answers/nothing/dev", 404, "no dev score"),
        ("/answers/seed/train", 404, "no train score"),
        ("/completions/loop/9", 404, "no completions of loop/9"),
        ("/completions/x/1", 404, "no completions of x/1"),
        ("/pairs/9", 404, "no pairs of round 9"),
        ("/pairs/1/9", 404, "no pair 1/9; it has 1/0 to 0"),
        ("/nowhere", 404, "Not Found"),
        ("/static/../app.py", 404, "Not Found"),
        ("/static/%2e%2e/app.py", 404, "Not Found"),
    ],
)
def test_trouble_is_one_line(client, address, status, line):
  answer = client.get(address)
  assert answer.status_code == status
  (said,) = re.findall('role="alert">(.*?)</p>', answer.text, flags=re.S)
  assert line in said.replace("&#39;", "'")


@pytest.mark.parametrize("address", ["/", "/nowhere", "/static/htmx.min.js"])
def test_every_answer_is_guarded(client, address):
  headers = client.get(address).headers
  policy = headers["content-security-policy"]
  assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
  (scripts,) = re.findall("script-src ([^;]*)", policy)
  assert scripts == "'self'"
  assert headers["x-content-type-options"] == "nosniff"
  assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(client, method):
  assert client.request(method, "/").status_code == 405


def test_head(client):
  answer = client.head("/programs")
  assert answer.status_code == 200 and not answer.content


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8642", 200),
        ("localhost", 200),
        ("[::1]:8642", 200),
        ("192.168.7.7", 200),
        ("box:8642", 200),
        ("2001:db8::1.evil.example", 400),
        ("192.168.7.7.evil.example", 400),
        ("evil.example", 400),
        ("localhost.evil.example:8642", 400),
    ],
)
def test_other_names_of_this_machine_are_refused(client, host, status):
  answer = client.get("/programs", headers={"host": host})
  assert answer.status_code == status
  assert "content-security-policy" in answer.headers


def test_a_broken_address_of_the_page_is_none(client):
  headers = {"hx-current-url": "http://[/"}
  assert client.get("/programs", headers=headers).status_code == 200


def test_numbers_lead_to_what_they_are_of(client, pages):
  text = pages["/"].replace("&amp;", "&")
  assert '<dt>seed model</dt>\n<dd><b><a href="/answers/seed/test">' in text
  links = re.findall(r'<td[^>]*><a href="(/programs\?.*?)">([\d.]+)<', text)
  # Four numbers of each of three lists, and three reasons for a rejection, of
  # which a failed merge is listed where the program was written first.
  assert len(links) == 3 * 4 + 3
  assert sum("arm=loop&iteration=" in address for address, _ in links) == 2
  for address, number in links:
    if "." not in number:
      rows = client.get(address).text.count('<th scope="row"')
      assert rows == int(number), address


def test_counts_of_completions_lead_to_them(client, pages):
  for address in ("/completions/loop/1", "/completions/loop/1?admitted=1"):
    # In the table of iterations and below the reasons; of those that were
    # admitted, also the distinct programs.
    numbers = re.findall(
        rf'<td><a href="{re.escape(address)}">(\d+)</a>', pages["/"]
    )
    assert len(numbers) == 2 + ("admitted" in address)
    rows = client.get(address).text.count('<th scope="row"')
    assert rows == int(numbers[0]) == int(numbers[-1]), address


def test_a_long_list_of_completions_has_pages(client, monkeypatch):
  monkeypatch.setattr(app, "_ROWS", 1)
  address = "/completions/loop/1?admitted=1"
  text = client.get(address).text.replace("&amp;", "&")
  assert f'href="{address}&page=1" rel="next"' in text


def test_answers_name_the_computation_behind_them(tmp_path, small):
  """Of a score that was taken from another, that one's."""
  with small.build(tmp_path, "admitted") as store:
    score = records.Score("program:d2", "dev", 1, 1, weights="checksum")
    answer = records.Response(0, "dev 0", "1", "1", "1", True)
    small.score(store, score, responses=[answer])
    with store.activity("loop", 1, "reuse"):
      store.add_score(
          records.Score("program:d1", "dev", 1, 1, reused=score.model)
      )
  with _client(tmp_path) as client:
    text = client.get("/answers/program:d1/dev").text
  assert re.findall("in the stage <strong>(.*?)<", text) == ["evaluate"]
  assert "checksum</code></td>" in text


def test_a_browser_gets_only_what_changed(running):
  client, store = running
  seen = re.findall(r'name="seen" value="([^"]*)"', client.get("/").text)
  assert len(seen) == len(page.SECTIONS)
  query = {"seen": seen}
  assert client.get("/live", params=query).status_code == 204
  assert client.get("/live/progress", params=query).status_code == 204
  with store.activity("loop", 0, "ties", 7, "model"):
    store.advance(3)  # Written with what comes next.
    store.add_score(
        records.Score("ties:scale=1", "dev", 10, 9, weights="a"),
        [
            records.Response(i, f"dev {i}", "1", "1", "1", i < 9)
            for i in range(10)
        ],
    )
    answer = client.get("/live/progress", params=query)
    assert re.findall('<section id="(.*?)"', answer.text) == ["progress"]
    assert "3 of 7" in answer.text
  answer = client.get("/live", params=query)
  changed = re.findall('<section id="(.*?)"', answer.text)
  assert "baselines" in changed and "best" in changed
  assert not {"scores", "rejections", "origin", "progress"} & set(changed)


def test_a_lost_worker_appears(running):
  client, store = running
  text = client.get("/").text
  assert "Workers and hosts" not in text
  seen = re.findall(r'name="seen" value="([^"]*)"', text)
  with store.activity("loop", 2, "evaluate"):
    store.add_incident(records.Incident("lost", "w1", "<b>", "killed"))
  answer = client.get("/live", params={"seen": seen}).text
  assert 'href="#workers"' in answer  # In the contents.
  (section,) = re.findall('<section id="workers".*?</section>', answer, re.S)
  assert "1 lost." in section and "&lt;b&gt;" in section


def test_the_table_is_sent_again_only_where_it_changed(running, small):
  client, store = running
  text = client.get("/programs").text
  (address,) = re.findall('id="table" hx-get="([^"]*)"', text)
  address = address.replace("&amp;", "&")
  assert client.get(address).status_code == 204
  small.score(store, records.Score("ties:scale=1", "dev", 10, 9))
  assert client.get(address).status_code == 204
  with store.activity("loop", 2, "admit"):
    store.add_factory(2, "abc")
    store.add_completions([records.Completion("loop", 2, 0, "x", True)])
    store.add_verdict(
        records.Verdict("loop", 2, 0, "source", "d9"), "{}", {}, [1.0]
    )
  assert "/program/d9" in client.get(address).text


@pytest.mark.parametrize(
    "address",
    ["/programs", "/program/d3", "/answers/seed/dev", "/live/progress"],
)
def test_an_answer_reads_one_snapshot(client, monkeypatch, address):
  reads = []
  read = store_lib.Store.read
  monkeypatch.setattr(
      store_lib.Store,
      "read",
      lambda workdir: reads.append(workdir) or read(workdir),
  )
  assert client.get(address).status_code == 200
  assert len(reads) == 1


def test_answers_agree_with_their_score_while_they_are_written(running, small):
  """A race adds answers to a score, block after block."""
  client, store = running
  stop = threading.Event()

  def ask():
    while not stop.is_set():
      text = client.get("/answers/ties:a=1/dev").text
      if "has no dev score" in text:
        continue
      said.append(
          (
              int(re.findall(r"of (\d+) answers", text)[0]),
              text.count('<li value="'),
          )
      )

  said = []
  thread = threading.Thread(target=ask)
  thread.start()
  with store.activity("loop", 0, "ties"):
    for i in range(45):
      store.add_score(
          records.Score("ties:a=1", "dev", 1, 1, items=45),
          [records.Response(i, f"dev {i}", "1", "1", "1", True)],
      )
  stop.set()
  thread.join()
  assert said and all(n == listed for n, listed in said)


def test_damaged_or_vanished_archive(tmp_path, small, monkeypatch):
  monkeypatch.setattr(overview, "_REST", 0.0)
  small.build(tmp_path, "admitted").close()
  archive = tmp_path / store_lib.ARCHIVE
  whole = archive.read_bytes()
  with _client(tmp_path) as client:
    for broken, line in (
        (whole[:4096] + b"\xff" * (len(whole) - 4096), "damaged"),
        (b"no archive at all" * 500, "is no archive"),
        (None, "holds no run"),
    ):
      if broken is None:
        archive.unlink()
      else:
        archive.write_bytes(broken)
      for address in ("/", "/programs", "/live"):
        answer = client.get(address)
        assert answer.status_code == 503, (address, line)
        assert line in answer.text and "Traceback" not in answer.text
    archive.write_bytes(whole)
    assert client.get("/programs").status_code == 200


def test_a_bug_shows_no_inside(client, monkeypatch):
  def fail(*_):
    raise ZeroDivisionError("secret")

  monkeypatch.setattr(queries, "program", fail)
  answer = client.get("/program/d3")
  assert answer.status_code == 500
  assert "secret" not in answer.text and "This cannot be shown" in answer.text


def test_without_a_run_there_is_no_dashboard(tmp_path):
  with pytest.raises(errors.UserError, match="holds no run"):
    app.application(tmp_path)


def test_an_older_archive_is_copied_once(finished, tmp_path, monkeypatch):
  copy = tmp_path / "copy"
  copy.mkdir()
  (copy / "x.sqlite").write_bytes((finished / store_lib.ARCHIVE).read_bytes())
  reads = []

  def read(workdir):
    reads.append(workdir)
    (copy / store_lib.ARCHIVE).write_bytes((copy / "x.sqlite").read_bytes())
    return original(copy)

  original = store_lib.Store.read
  monkeypatch.setattr(store_lib.Store, "read", read)
  archive = overview.Archive(finished)
  for _ in range(3):
    with archive.read() as store:
      assert store.config().name == "t"
  archive.close()
  assert len(reads) == 1
