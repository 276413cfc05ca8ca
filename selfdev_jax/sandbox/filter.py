"""A first reading of a program's syntax tree, for a reason one can act on.

This is feedback, not security: it says in one sentence, with the line, what
would fail or be refused later. It runs in the sandboxed child, because even
parsing hostile text can exhaust the parser.
"""

import ast

from selfdev_jax.programs import contract


class FilterError(ValueError):
  """A program that is refused unrun.

  Attributes:
    code: a word, such as "syntax" or "import".
    message: one sentence, with the line where there is one.
  """

  def __init__(self, code: str, message: str):
    super().__init__(message)
    self.code = code
    self.message = message


def check(source: str) -> None:
  """Reads a program's source.

  Args:
    source: any text.

  Raises:
    FilterError: it is not a program by `programs.contract`.
  """
  if not source.strip():
    raise FilterError("empty", "The program is empty.")
  if len(source) > contract.MAX_SOURCE_CHARS:
    raise FilterError(
        "too_long",
        f"The program has more than {contract.MAX_SOURCE_CHARS} characters.",
    )
  tree = _parse(source)
  for node in ast.walk(tree):
    visit = _VISITORS.get(type(node))
    if visit:
      visit(node)
  _check_entry(tree)


def _parse(source):
  try:
    return ast.parse(source)
  except SyntaxError as error:
    line = f"line {error.lineno}: " if error.lineno else ""
    raise FilterError("syntax", f"{line}{error.msg}.") from None
  except ValueError:  # A null byte, or a lone surrogate.
    raise FilterError(
        "encoding", "The program contains a character that Python cannot read."
    ) from None
  except (RecursionError, MemoryError):
    raise FilterError(
        "nesting", "The program's expressions are nested too deeply."
    ) from None


def _refuse(node, code, text):
  raise FilterError(code, f"line {node.lineno}: {text}")


def _check_entry(tree):
  entries = [
      node
      for node in tree.body
      if isinstance(node, ast.FunctionDef) and node.name == contract.ENTRY
  ]
  if not entries:
    raise FilterError(
        "no_merge",
        f"The program defines no function {contract.ENTRY}(base, task_vectors)"
        " at its top level.",
    )
  entry = entries[-1]  # The one that Python keeps.
  arguments = entry.args
  positional = len(arguments.posonlyargs) + len(arguments.args)
  required = positional - len(arguments.defaults)
  takes_two = required <= 2 and (positional >= 2 or arguments.vararg)
  if not takes_two or None in arguments.kw_defaults:
    _refuse(
        entry,
        "arity",
        f"{contract.ENTRY} has to take two arguments, base and"
        " task_vectors.",
    )


def _import(node):
  for alias in node.names:
    if alias.name not in contract.modules():
      _refuse_import(node, alias.name)


def _import_from(node):
  name = node.module or ""
  if node.level or name not in contract.modules():
    _refuse_import(node, "." * node.level + name)
  module = contract.modules()[name]
  for alias in node.names:
    if alias.name == "*" or not hasattr(module, alias.name):
      _refuse_import(node, f"{name}.{alias.name}")


def _refuse_import(node, name):
  _refuse(
      node,
      "import",
      f"cannot import {name[:60]}; a program may use jax.numpy, jax.lax,"
      " jax.nn, jax.random, torch, torch.nn.functional, torch.linalg, math,"
      " functools, itertools and typing.",
  )


def _name(node):
  if node.id in contract.FORBIDDEN_NAMES or node.id.startswith("__"):
    _refuse(node, "name", f"the name {node.id[:60]} may not be used.")


def _attribute(node):
  if node.attr in contract.FORBIDDEN_ATTRIBUTES or node.attr.startswith("_"):
    _refuse(
        node, "attribute", f"the attribute {node.attr[:60]} may not be used."
    )
  if not isinstance(node.ctx, ast.Load):
    _refuse(node, "assignment", "attributes cannot be assigned.")


def _match_class(node):
  # `case C(name=x)` reads the attribute of that name.
  for name in node.kwd_attrs:
    if name in contract.FORBIDDEN_ATTRIBUTES or name.startswith("_"):
      _refuse(node, "attribute", f"the attribute {name[:60]} may not be used.")


def _while(node):
  endless = isinstance(node.test, ast.Constant) and node.test.value
  leaves = (ast.Break, ast.Return, ast.Raise)
  if endless and not any(isinstance(x, leaves) for x in ast.walk(node)):
    _refuse(node, "endless_loop", "this loop never ends.")


def _statement(what):
  return lambda node: _refuse(node, "statement", f"{what} cannot be used.")


_VISITORS = {
    ast.Import: _import,
    ast.ImportFrom: _import_from,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.MatchClass: _match_class,
    ast.While: _while,
    ast.ClassDef: _statement("a class"),
    ast.AsyncFunctionDef: _statement("async"),
    ast.Await: _statement("await"),
    ast.Yield: _statement("yield"),
    ast.YieldFrom: _statement("yield"),
}
