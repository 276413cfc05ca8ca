"""Model cards: the front matter, the references, and the recipe verbatim."""

import pytest
import yaml

from selfdev_jax.merging import card
from selfdev_jax.merging import methods

_RECIPE = "merge_method: ties\nbase_model: org/base\n"
_LINK = "[arXiv 2306.01708](https://arxiv.org/abs/2306.01708)"


def _front(text):
  _, front, _ = text.split("---\n", 2)
  return yaml.safe_load(front)


def test_a_card(tmp_path):
  (tmp_path / "mine").mkdir()
  models = ["org/base", str(tmp_path / "mine"), "org/b.c@v1"]
  text = card.card(_RECIPE, "ties", models, "org/base", "merged")
  assert _front(text) == {
      "base_model": ["org/base", "org/b.c"],
      "library_name": "transformers",
      "tags": ["merge", "selfdev_jax"],
  }
  assert "\n# merged\n" in text
  assert "A merge by the method `ties`" in text
  assert f"TIES-merging, {_LINK}." in text
  assert "- [org/base](https://huggingface.co/org/base) (base)\n" in text
  assert "- `mine`\n" in text and str(tmp_path) not in text
  assert "- [org/b.c@v1](https://huggingface.co/org/b.c/tree/v1)\n" in text
  assert text.endswith(f"## Recipe\n\n```yaml\n{_RECIPE}```\n")


def test_a_card_of_a_program(tmp_path, monkeypatch):
  # What looks like a hub id is a directory where there is one.
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs" / "base").mkdir(parents=True)
  source = 'def merge(base, taus):\n  """```"""\n  return base\n'
  text = card.card(source, None, ["runs/base"], "runs/base", "merged")
  assert "base_model" not in _front(text)
  assert "- `base` (base)\n" in text
  assert "arXiv" not in text
  assert text.endswith(f"## Program\n\n````python\n{source}````\n")


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_its_reference(name):
  text = card.card("", name, ["org/a"], None, "merged")
  reference, _ = text.split("selfdev_jax`.\n\n")[1].split("## Models")
  # Taking layers as they are is nobody's invention.
  assert name == "passthrough" or len(reference) > 20
