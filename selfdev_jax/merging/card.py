"""The model card of a merge: of what it is made, how, and the recipe itself."""

from collections.abc import Sequence
import inspect
import pathlib
import re

import yaml

from selfdev_jax.merging import methods

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_ARXIV = re.compile(r"arXiv[ :]+(\d{4}\.\d{4,5})")
_SECTION = "References:"


def card(
    text: str,
    method: str | None,
    models: Sequence[str],
    base: str | None,
    name: str,
) -> str:
  """Writes the README.md of a merged model.

  Args:
    text: the recipe in YAML, or the program in Python.
    method: a key of `methods.METHODS`; None: `text` is a program.
    models: all that were merged: directories, of which the name alone is told,
      or `org/name[@revision]` on the Hugging Face hub.
    base: the one of them that the others are merged into; None: none.
    name: of the merged model.

  Returns:
    Markdown, with the front matter in YAML that the hub reads.
  """
  hub = [match[1] for match in map(_hub_id, models) if match]
  front = {
      "base_model": list(dict.fromkeys(hub)),
      "library_name": "transformers",
      "tags": ["merge", "selfdev_jax"],
  }
  if not hub:  # The hub takes no names that it does not have.
    del front["base_model"]
  if method is None:
    title, made, kind = "Program", "a program that was discovered", "python"
  else:
    title, made, kind = "Recipe", f"the method `{method}`", "yaml"
  listed = [
      f"- {_shown(model)}{' (base)' if model == base else ''}"
      for model in dict.fromkeys(models)
  ]
  paragraphs = [
      f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
      f"# {name}",
      f"A merge by {made}, made with `selfdev_jax`.",
      *_references(method),
      "## Models",
      "\n".join(listed),
      f"## {title}",
      _block(text, kind),
  ]
  return "\n\n".join(paragraphs) + "\n"


def _hub_id(model: str) -> re.Match[str] | None:
  return None if pathlib.Path(model).is_dir() else _HUB_ID.fullmatch(model)


def _shown(model: str) -> str:
  match = _hub_id(model)
  if match is None:  # Paths tell of the machine, and mean nothing elsewhere.
    return f"`{pathlib.Path(model).resolve().name}`"
  revision = f"/tree/{match[2]}" if match[2] else ""
  return f"[{model}](https://huggingface.co/{match[1]}{revision})"


def _references(method: str | None) -> list[str]:
  """The section of the method's docstring, with links; empty without one."""
  doc = inspect.getdoc(methods.METHODS[method].fn) if method else None
  _, found, rest = (doc or "").partition(f"\n{_SECTION}\n")
  if not found:
    return []
  lines = []
  for line in rest.splitlines():
    if line and not line.startswith(" "):  # The next section.
      break
    lines.append(line.strip())
  text = " ".join("\n".join(lines).split())
  return [_ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)]


def _block(text: str, kind: str) -> str:
  """A block of code, whatever fences the text has in it."""
  longest = max((len(run) for run in re.findall("`+", text)), default=0)
  fence = "`" * max(3, longest + 1)
  return f"{fence}{kind}\n{text.strip()}\n{fence}"
