"""The fixed 1-shot prompts: package data, or a file of the user's."""

import pathlib

from selfdev_jax import errors

_FOLDER = pathlib.Path(__file__).parent / "prompts"


def names() -> list[str]:
  """The prompts that come with the package."""
  return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def load(name: str) -> str:
  """Reads a prompt.

  Args:
    name: one of `names()`, or the path of a text file.

  Returns:
    The text, exactly as it stands in the file.

  Raises:
    UserError: there is no such prompt, or it cannot be read as text.
  """
  path = _FOLDER / f"{name}.txt" if name in names() else pathlib.Path(name)
  try:
    return path.read_text(encoding="utf-8")
  except FileNotFoundError:
    raise errors.UserError(
        f"no prompt {name!r}: give the path of a text file, or one of"
        f" {', '.join(names())}"
    ) from None
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
    raise errors.UserError(f"cannot read prompt {name!r}: {reason}") from None
