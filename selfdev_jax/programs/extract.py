"""From what a factory wrote to the source of one program."""

import re

from selfdev_jax.programs import contract

# The fence may be cut off by the token limit: then it ends with the text.
_FENCE = re.compile(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(rf"^def {contract.ENTRY}\b", re.MULTILINE)
_OPEN_ENTRY = re.compile(rf"^def {contract.ENTRY}\(.*\).*:\s*\Z")
_OPEN_FENCE = re.compile(r"^```\w*\s*\Z")
_START = re.compile(r"^(?:import |from \w|def \w|@)", re.MULTILINE)
# What may follow at the left margin once `merge` has begun: a helper, an
# import, or the closing bracket of a statement.
_GOES_ON = re.compile(
    rf"(?:def (?!{contract.ENTRY}\b)|import |from \w|[)\]}}])"
)


class ExtractionError(ValueError):
  """A completion without a program.

  Attributes:
    code: "empty", "no_merge" or "too_long".
    message: one sentence for the author of the completion.
  """

  def __init__(self, code: str, message: str):
    super().__init__(message)
    self.code = code
    self.message = message


def extract(prompt: str, completion: str) -> str:
  """The program in a completion.

  The first fenced block that defines `merge`; else, where the prompt ends in
  an open `def merge(...):`, that line and the body that continues it; else
  everything from the first import or function on, up to the end of `merge`.

  Args:
    prompt: the text that the factory was given.
    completion: what it wrote.

  Returns:
    Python source; not yet known to be valid.

  Raises:
    ExtractionError: there is no program in it.
  """
  if not completion.strip():
    raise ExtractionError("empty", "The completion is empty.")
  source = _find(prompt, completion)
  if len(source) > contract.MAX_SOURCE_CHARS:
    raise ExtractionError(
        "too_long",
        f"The program has {len(source)} characters; at most"
        f" {contract.MAX_SOURCE_CHARS} are taken.",
    )
  return source


def _find(prompt, completion):
  last = prompt.rstrip().rpartition("\n")[2]
  if _OPEN_FENCE.match(last):
    completion = f"{last}\n{completion}"
  for fence in _FENCE.finditer(completion):
    if _ENTRY.search(fence[1]):
      return fence[1]
  if _OPEN_ENTRY.match(last):
    # A prompt that ends without a line feed: the completion brings its own.
    gap = "" if completion.startswith("\n") else "\n"
    return _cut(f"{last}{gap}{completion}")
  entry, start = _ENTRY.search(completion), _START.search(completion)
  if not entry:
    raise ExtractionError(
        "no_merge",
        f"The completion defines no function {contract.ENTRY}(base,"
        " task_vectors).",
    )
  return completion[start.start() : entry.start()] + _cut(
      completion[entry.start() :]
  )


def _cut(text):
  """`text`, which begins with `def merge`, up to the end of that function."""
  lines = text.split("\n")
  for i, line in enumerate(lines[1:], 1):
    if line[:1].strip() and not _GOES_ON.match(line):
      lines = lines[:i]
      break
  return "\n".join(lines).rstrip() + "\n"
