"""Imports go one way: a module imports only from the rows above its own."""

import ast
import pathlib

import pytest

_PACKAGE = pathlib.Path(__file__).parents[1] / "selfdev_jax"

# The plan of the house. Modules of one row may import each other only within
# their own package.
_ROWS = (
    ("cache", "errors", "progress"),
    ("storage",),
    ("tables",),
    ("config",),
    ("records",),
    ("schema", "migrations"),
    ("store",),
    ("inspection",),
    ("models",),
    ("convert",),
    ("merging",),
    ("programs",),
    ("sandbox",),
    ("sampling",),
    ("evaluation",),
    ("preferences",),
    ("dpo",),
    ("tiny",),
    ("board",),
    ("executors",),
    ("loop",),
    ("report",),
    ("dashboard",),
    ("transfer",),
    ("handover",),
    ("plan",),
)
_ROW = {name: i for i, row in enumerate(_ROWS) for name in row}


def _room(path: pathlib.Path) -> str:
  return path.relative_to(_PACKAGE).parts[0].removesuffix(".py")


def _imported(path: pathlib.Path) -> set[str]:
  """Rooms that a file imports from."""
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
      parts = name.split(".")
      if parts[0] == "selfdev_jax" and len(parts) > 1:
        rooms.add(parts[1])
  return rooms


_FILES = sorted(
    path for path in _PACKAGE.rglob("*.py") if path != _PACKAGE / "__init__.py"
)


@pytest.mark.parametrize(
    "path", _FILES, ids=lambda path: str(path.relative_to(_PACKAGE))
)
def test_imports_only_from_rows_above(path):
  room = _room(path)
  assert room in _ROW, f"{room} has no row in the plan of the house"
  for other in _imported(path) - {room}:
    assert _ROW[other] < _ROW[room], f"{path} imports {other} from below"


def test_the_plan_names_no_room_that_is_gone():
  assert set(_ROW) == {_room(path) for path in _FILES}


@pytest.mark.parametrize(
    "room", ["loop", "report", "preferences", "dpo", "transfer"]
)
def test_the_loop_knows_nothing_of_the_toy_world(room):
  files = [path for path in _FILES if _room(path) == room]
  assert files
  for path in files:
    assert "tiny" not in _imported(path)
