"""The prompts that come with the package, and one of the user's."""

import ast

import pytest

from selfdev_jax import errors
from selfdev_jax import programs
from selfdev_jax.programs import contract
from selfdev_jax.programs import prompt
from selfdev_jax.sandbox import filter as filter_lib


def test_every_prompt_loads():
  assert {"default", "tiny"} <= set(prompt.names())
  assert all(programs.load_prompt(name).strip() for name in prompt.names())


def test_the_example_of_the_default_prompt_is_a_program():
  text = programs.load_prompt("default")
  filter_lib.check(programs.extract("", text))
  # The completion opens a fence of its own.
  assert text.count("```") == 2


def test_the_tiny_prompt_ends_in_an_open_function():
  text = programs.load_prompt("tiny")
  source = programs.extract(text, "  return base\n")
  assert ast.parse(source).body[-1].name == contract.ENTRY


def test_a_file(tmp_path):
  path = tmp_path / "mine.txt"
  path.write_text("Merge these, é.\n", encoding="utf-8")
  assert programs.load_prompt(str(path)) == "Merge these, é.\n"


def test_no_such_prompt(tmp_path):
  with pytest.raises(errors.UserError, match="default, tiny") as caught:
    programs.load_prompt("defualt")
  assert "'defualt'" in str(caught.value)
  with pytest.raises(errors.UserError, match="cannot read"):
    programs.load_prompt(str(tmp_path))
  (tmp_path / "bytes.txt").write_bytes(b"\xff")
  with pytest.raises(errors.UserError, match="UTF-8"):
    programs.load_prompt(str(tmp_path / "bytes.txt"))
