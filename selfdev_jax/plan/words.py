"""Numbers as one reads them."""

_SECONDS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
_COUNTS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def gigabytes(n: float) -> str:
  """Bytes, in GB or, where they are few, in MB."""
  return f"{n / 1e9:,.1f} GB" if n >= 1e8 else f"{n / 1e6:,.1f} MB"


def count(n: float) -> str:
  """Of tokens, FLOPs or parameters, three digits or so."""
  for unit, size in _COUNTS:
    if n >= size:
      return f"{n / size:,.1f} {unit}"
  return f"{n:,.0f}"


def duration(seconds: float | None) -> str:
  """In hours, minutes or seconds; empty where it is not known."""
  if seconds is None:
    return ""
  for unit, size in _SECONDS:
    if seconds >= size:
      return f"{seconds / size:,.1f} {unit}"
  return "< 1 s"
