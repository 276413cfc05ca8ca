"""What a browser asks of the table of programs, and how it asks for more."""

import dataclasses
from urllib import parse

from starlette import convertors
from starlette import exceptions
from starlette import requests

PROGRAMS = "/programs"

_ROWS = 50
_MOST_ROWS = 500
_DIGITS = 9  # More than any list has; SQLite takes twice as many.


@dataclasses.dataclass(frozen=True)
class Query:
  """See `inspection.queries.programs`.

  `candidates` is "ARM/ITERATION"; `page` counts from 0, in `rows`.
  """

  search: str = ""
  verdict: str = ""
  arm: str = ""
  iteration: int | None = None
  candidates: str = ""
  sort: str = "dev"
  ascending: bool = False
  page: int = 0
  rows: int = _ROWS

  @classmethod
  def of(cls, request: requests.Request) -> "Query":
    values = request.query_params
    return cls(
        search=values.get("search", "").strip(),
        verdict=values.get("verdict", ""),
        arm=values.get("arm", ""),
        iteration=number(request, "iteration"),
        candidates=values.get("candidates", ""),
        sort=values.get("sort", "dev"),
        ascending=values.get("ascending") == "1",
        page=number(request, "page") or 0,
        rows=min(number(request, "rows") or _ROWS, _MOST_ROWS),
    )

  @property
  def candidate_of(self) -> tuple[str, int] | None:
    """Arm and iteration.

    Raises:
      HTTPException: if the iteration is no number.
    """
    if not self.candidates:
      return None
    arm, _, iteration = self.candidates.partition("/")
    return arm, _number("the iteration of candidates", iteration)

  def address(self, **changes: object) -> str:
    """Of the same table, but for the changes."""
    wanted = dataclasses.asdict(dataclasses.replace(self, **changes))
    given = {
        key: int(value) if isinstance(value, bool) else value
        for key, value in wanted.items()
        if value not in ("", None, False, 0)
    }
    return f"{PROGRAMS}?{parse.urlencode(given)}"

  def sorted_by(self, key: str) -> str:
    """Address of the table sorted by `key`, the other way if it is already.

    Scores begin with the highest, all else with the first.
    """
    is_again = self.sort == key
    ascending = not self.ascending if is_again else key in ("found", "hash")
    return self.address(sort=key, ascending=ascending, page=0)


def number(request: requests.Request, name: str) -> int | None:
  """A parameter of the address; None where it is not given.

  Raises:
    HTTPException: if it is no number.
  """
  text = request.query_params.get(name, "")
  return _number(name, text) if text else None


def _number(name, text):
  if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
    raise exceptions.HTTPException(
        400, f"{name} has to be a number, not {text[:40]!r}"
    )
  return int(text)


class _Number(convertors.IntegerConvertor):
  """A number of a path, as long as one of the parameters."""

  regex = f"[0-9]{{1,{_DIGITS}}}"


convertors.register_url_convertor("number", _Number())
