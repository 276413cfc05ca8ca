"""What each address of the dashboard answers.

Every answer is computed from one snapshot of the archive; none changes it.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import ipaddress
import math
import os
import re
import time
from urllib import parse

import markupsafe
from starlette import applications
from starlette import datastructures
from starlette import exceptions
from starlette import middleware
from starlette import requests
from starlette import responses
from starlette import routing
from starlette import staticfiles
from starlette import types
from starlette.middleware import trustedhost

from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.dashboard import overview as overview_lib
from selfdev_jax.dashboard import query as query_lib
from selfdev_jax.inspection import queries
from selfdev_jax.report import page as page_lib
from selfdev_jax.report import reading

_PACKAGE = "selfdev_jax.dashboard"
_FIRST_ROWS = 10  # Of the table on the first page.
_ROWS = 50  # Of a page of a list.
_FEW = 20  # Of a list that is a part of a page.
_WAIT_S = 0.4  # For figures that are being drawn.
_LONGER_S = 4.0  # Likewise, where nobody waits for the page.
# An open table asks again so often, at least, or after so many times what it
# took to answer.
_PERIOD_S = 5
_PERIODS = 20
# Parts that ask for themselves: quick ones, and the table with its search.
_OWN = ("progress", "programs")
_HEADERS = {
    # Figures colour and size their parts by style attributes, of our making.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; connect-src 'self';"
        " img-src 'self'; style-src-elem 'self'; style-src-attr"
        " 'unsafe-inline'; form-action 'self'; base-uri 'none';"
        " frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class _Links(page_lib.Links):
  """Every name has an address."""

  def program(self, digest):
    return f"/program/{_quoted(digest)}"

  def completion(self, arm, iteration, item):
    return f"/completion/{_quoted(arm)}/{iteration}/{item}"

  def completions(self, arm, iteration, admitted=False):
    # The first iteration of both arms is the same.
    arm = records.LOOP if arm == "both" else arm
    address = f"/completions/{_quoted(arm)}/{iteration}"
    return f"{address}?admitted=1" if admitted else address

  def answers(self, model, split):
    return f"/answers/{_quoted(model)}/{split}"

  def pairs(self, iteration):
    return f"/pairs/{iteration}"

  def candidates(self, arm, iteration):
    return query_lib.Query(candidates=f"{arm}/{iteration}").address()

  def rejected(self, stage, code, arm, iteration):
    query = query_lib.Query(verdict=f"{stage}:{code}")
    # A program whose merge failed stands where it was first written, and
    # counts wherever it was.
    if stage != queries.RUN:
      arm = records.LOOP if arm == "both" else arm
      query = dataclasses.replace(query, arm=arm, iteration=iteration)
    return query.address()


def _quoted(text):
  return parse.quote(text, safe="")


class _Headers:
  """Adds `_HEADERS` to every answer."""

  def __init__(self, app: types.ASGIApp):
    self._app = app

  async def __call__(
      self, scope: types.Scope, receive: types.Receive, send: types.Send
  ):
    async def answer(message):
      if message["type"] == "http.response.start":
        message["headers"] = [
            *message["headers"],
            *((k.encode(), v.encode()) for k, v in _HEADERS.items()),
        ]
      await send(message)

    await self._app(scope, receive, answer)


class _Hosts(trustedhost.TrustedHostMiddleware):
  """Also lets addresses pass; see `application`."""

  async def __call__(
      self, scope: types.Scope, receive: types.Receive, send: types.Send
  ):
    if scope["type"] == "http" and _is_address(scope):
      await self.app(scope, receive, send)
    else:
      await super().__call__(scope, receive, send)


def _is_address(scope):
  """Whether the browser called an address, not a name."""
  host = datastructures.Headers(scope=scope).get("host", "")
  try:
    ipaddress.ip_address(re.sub(r":\d*$", "", host).strip("[]"))
  except ValueError:
    return False
  return True


def application(
    workdir: str | os.PathLike, names: Sequence[str] = ()
) -> types.ASGIApp:
  """The dashboard of one run.

  Draws the first page before it returns.

  Args:
    workdir: the run's directory.
    names: by which a browser may call it, beside localhost and addresses. A
      page of another site could otherwise read the archive through a name of
      its own that it points here (DNS rebinding).

  Raises:
    store_lib.StoreError: if there is no run, or its archive is damaged or of a
      later version.
  """
  site = _Site(workdir)
  site.kept.latest(0.0)

  @contextlib.asynccontextmanager
  async def lifespan(_):
    yield
    site.archive.close()

  get = lambda path, endpoint: routing.Route(path, endpoint, methods=["GET"])
  answering = applications.Starlette(
      routes=[
          get("/", site.first),
          get("/live", site.live),
          get("/live/progress", site.progress),
          get(query_lib.PROGRAMS, site.programs),
          get("/program/{digest}", site.program),
          get(
              "/completion/{arm}/{iteration:number}/{item:number}",
              site.completion,
          ),
          get("/completions/{arm}/{iteration:number}", site.completions),
          get("/answers/{model:path}/{split}", site.answers),
          get("/pairs/{iteration:number}", site.pairs),
          get("/pairs/{iteration:number}/{item:number}", site.pair),
          get("/static/page.css", _style),
          routing.Mount(
              "/static",
              staticfiles.StaticFiles(packages=[(_PACKAGE, "static")]),
          ),
      ],
      middleware=[
          middleware.Middleware(
              _Hosts,
              allowed_hosts=["localhost", *names],
              www_redirect=False,
          ),
      ],
      exception_handlers={
          errors.UserError: site.trouble,
          exceptions.HTTPException: site.trouble,
          Exception: site.trouble,
      },
      lifespan=lifespan,
  )
  # Outermost: also what Starlette says of errors and of hosts has them.
  return _Headers(answering)


def _style(_):
  return responses.Response(
      page_lib.resource("page.css"), media_type="text/css"
  )


class _Site:
  """The endpoints; see `application`."""

  def __init__(self, workdir):
    self.archive = overview_lib.Archive(workdir)
    self._templates = page_lib.make_environment(_Links(), _PACKAGE)
    self.kept = overview_lib.Kept(self.archive, self._draw)

  def _draw(self, store):
    at = time.time()
    about = page_lib.context(reading.read(store))
    about |= self._table(store, query_lib.Query(rows=_FIRST_ROWS))
    about["state"] = ""
    drawn = page_lib.sections(self._templates, about)
    parts = {name: drawn.get(name, "") for name in page_lib.SECTIONS}
    contents = self._templates.get_template("contents.html")
    parts["contents"] = markupsafe.Markup(contents.render(sections=drawn))
    return overview_lib.Overview(about["summary"]["config"], parts, at)

  def _answer(self, template, status=200, **about):
    about = {"workdir": str(self.archive.workdir), "name": ""} | about
    text = self._templates.get_template(template).render(about)
    return responses.HTMLResponse(text, status)

  def _page(self, store, template, **about):
    name = store.meta("config")["name"]
    return self._answer(template, name=name, at=time.time(), **about)

  def first(self, _):
    shown = self.kept.latest(_WAIT_S)
    return self._answer(
        "overview.html",
        name=shown.name,
        at=shown.at,
        parts=shown.parts,
        versions=shown.versions,
    )

  def live(self, request: requests.Request):
    """The parts of the first page that are not as the browser has them."""
    seen = set(request.query_params.getlist("seen"))
    shown = self.kept.latest(_LONGER_S)
    changed = {
        name: html
        for name, html in shown.parts.items()
        if name not in _OWN and f"{name}-{shown.versions[name]}" not in seen
    }
    if not changed:
      return responses.Response(status_code=204)
    return self._answer(
        "live.html", parts=changed, versions=shown.versions, at=shown.at
    )

  def progress(self, request: requests.Request):
    with self.archive.read() as store:
      about = page_lib.progress(store)
    template = self._templates.get_template("sections/progress.html")
    html = markupsafe.Markup(template.render(about).strip())
    version = overview_lib.version(html)
    if f"progress-{version}" in request.query_params.getlist("seen"):
      return responses.Response(status_code=204)
    return self._answer(
        "live.html",
        parts={"progress": html},
        versions={"progress": version},
        at=None,
    )

  def programs(self, request: requests.Request):
    query = query_lib.Query.of(request)
    state = overview_lib.version(str(self.archive.state()))
    seen = request.query_params.get("seen", "").partition("-")[::2]
    if seen[0] == state:
      return responses.Response(status_code=204)
    with self.archive.read() as store:
      about = self._table(store, query)
      if seen[1] == about["table_version"]:
        return responses.Response(status_code=204)
      answer = self._page(store, "programs.html", state=state, **about)
    shown = re.split("[?#]", request.headers.get("hx-current-url", ""))[0]
    if shown.endswith(query_lib.PROGRAMS) and not seen[1]:
      # The way back from a program leads to the table as it was.
      answer.headers["hx-replace-url"] = query.address()
    return answer

  def _table(self, store, query):
    """The table of programs and the form above it."""
    start = time.monotonic()
    rows, total = queries.programs(
        store,
        search=query.search,
        verdict=query.verdict,
        arm=query.arm,
        iteration=query.iteration,
        candidate_of=query.candidate_of,
        sort=query.sort,
        ascending=query.ascending,
        limit=query.rows,
        offset=query.rows * query.page,
    )
    reasons = {(r.stage, r.code) for r in queries.rejections(store)}
    about = {
        "query": query,
        "rows": rows,
        "rows_total": total,
        "verdicts": sorted(reasons),
        "arms": records.ARMS,
        "iterations_planned": store.meta("config")["iterations"],
    }
    table = self._templates.get_template("table.html").render(about)
    took = time.monotonic() - start
    return about | {
        "table": markupsafe.Markup(table),
        "table_version": overview_lib.version(table),
        "period_s": max(_PERIOD_S, math.ceil(_PERIODS * took)),
    }

  def program(self, request: requests.Request):
    with self.archive.read() as store:
      found = queries.program(store, request.path_params["digest"])
      return self._page(store, "program.html", p=found, few=_FEW)

  def completion(self, request: requests.Request):
    key = request.path_params
    with self.archive.read() as store:
      found = queries.completion(
          store, key["arm"], key["iteration"], key["item"]
      )
      return self._page(store, "completion.html", w=found)

  def completions(self, request: requests.Request):
    arm = request.path_params["arm"]
    iteration = request.path_params["iteration"]
    is_admitted = request.query_params.get("admitted") == "1"
    number = query_lib.number(request, "page") or 0
    with self.archive.read() as store:
      found, total = queries.completions(
          store,
          arm,
          iteration,
          is_admitted=is_admitted,
          limit=_ROWS,
          offset=number * _ROWS,
      )
      address = _Links().completions(arm, iteration, is_admitted)
      return self._page(
          store,
          "completions.html",
          arm=arm,
          iteration=iteration,
          is_admitted=is_admitted,
          completions=found,
          total=total,
          page=number,
          limit=_ROWS,
          turned=f"{address}{'&' if is_admitted else '?'}page=",
      )

  def answers(self, request: requests.Request):
    model, split = request.path_params["model"], request.path_params["split"]
    number = query_lib.number(request, "page") or 0
    with self.archive.read() as store:
      found, total = queries.answers(store, model, split, _ROWS, number * _ROWS)
      # Without a merged model there are no answers.
      origins = queries.answered_by(store, model, split) or [
          queries.score_origin(store, model, split)
      ]
      score = store.score(model, split)
      return self._page(
          store,
          "answers.html",
          score=score,
          answering=store.score(score.reused or model, split),
          origins=origins,
          answers=found,
          total=total,
          page=number,
          limit=_ROWS,
      )

  def pairs(self, request: requests.Request):
    iteration = request.path_params["iteration"]
    number = query_lib.number(request, "page") or 0
    with self.archive.read() as store:
      pairs = store.pairs(iteration)
      if not pairs:
        raise exceptions.HTTPException(404, f"no pairs of round {iteration}")
      return self._page(
          store,
          "pairs.html",
          iteration=iteration,
          pairs=pairs[number * _ROWS : (number + 1) * _ROWS],
          total=len(pairs),
          page=number,
          limit=_ROWS,
      )

  def pair(self, request: requests.Request):
    key = request.path_params
    with self.archive.read() as store:
      found = queries.pair(store, key["iteration"], key["item"])
      return self._page(store, "pair.html", pair=found)

  def trouble(self, _, error: Exception):
    """One line that helps, and no traceback."""
    if isinstance(error, exceptions.HTTPException):
      status, line = error.status_code, error.detail
    elif isinstance(error, store_lib.StoreError):
      status, line = 503, str(error)
    elif isinstance(error, errors.UserError):
      status, line = 404, str(error)
    else:
      status, line = 500, "an error of the dashboard; its terminal says which"
    return self._answer("trouble.html", status=status, line=line, at=None)
