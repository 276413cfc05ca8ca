"""Golden completions and the programs in them."""

import pytest

from selfdev_jax import programs
from selfdev_jax.programs import contract

_CHAT = "Invent an algorithm.\n"
_OPEN = "# new\ndef merge(base, task_vectors):\n"
_FENCED = _CHAT + "```python\n"
_MERGE = "def merge(base, task_vectors):\n  return base\n"


@pytest.mark.parametrize(
    ("prompt", "completion", "source"),
    [
        (_CHAT, f"Here it is:\n```python\n{_MERGE}```\nIt works.", _MERGE),
        (_CHAT, f"```\n{_MERGE}```", _MERGE),
        # The first fence that defines merge, not the first fence.
        (_CHAT, f"```sh\npip install x\n```\n```python\n{_MERGE}```", _MERGE),
        (_CHAT, f"```python\n{_MERGE}```\n```python\n{_MERGE}# 2\n```", _MERGE),
        # Cut off by the token limit.
        (_CHAT, f"```python\n{_MERGE}", _MERGE),
        (
            _CHAT,
            f"```python\nimport math\n\n{_MERGE}x = 1\n```",
            f"import math\n\n{_MERGE}x = 1\n",
        ),
        # The prompt has opened the fence.
        (_FENCED, f"{_MERGE}```\nDone.", _MERGE),
        (_FENCED, f"x = 1\n{_MERGE}```\n", f"x = 1\n{_MERGE}"),
        # The prompt has opened the function.
        (_OPEN, "  return base\n", _MERGE),
        (_OPEN.rstrip(), "\n  return base\n", _MERGE),
        (_OPEN, "  return base", _MERGE),
        (_OPEN, "  return base\n# new\ndef merge(a, b):\n  return 1", _MERGE),
        (_OPEN, "  return base\n\nThat is all.", _MERGE),
        (_OPEN, "  return base\n<|endoftext|>", _MERGE),
        (
            _OPEN,
            "  x = base\n\n  return f(x)\n\ndef f(x):\n  return x\nend",
            "def merge(base, task_vectors):\n  x = base\n\n  return f(x)\n\n"
            "def f(x):\n  return x\n",
        ),
        (
            _OPEN,
            "  return sum(\n    task_vectors\n)\nend",
            "def merge(base, task_vectors):\n"
            "  return sum(\n    task_vectors\n)\n",
        ),
        (_OPEN, f"  return 1\n```python\n{_MERGE}```", _MERGE),
        # No fence at all.
        (_CHAT, f"Sure!\n{_MERGE}\nThis returns the base.", _MERGE),
        (
            _CHAT,
            f"import math\nK = 2\n\n{_MERGE}K",
            f"import math\nK = 2\n\n{_MERGE}",
        ),
        (
            _CHAT,
            f"def f(x):\n  return x\n\n{_MERGE}",
            f"def f(x):\n  return x\n\n{_MERGE}",
        ),
    ],
)
def test_extracts(prompt, completion, source):
  assert programs.extract(prompt, completion) == source


@pytest.mark.parametrize(
    ("prompt", "completion", "code"),
    [
        (_CHAT, "", "empty"),
        (_OPEN, " \n\n", "empty"),
        (_CHAT, "I cannot do that.", "no_merge"),
        (_CHAT, "```python\ndef combine(a, b):\n  return a\n```", "no_merge"),
        (_CHAT, "def merger(a, b):\n  return a\n", "no_merge"),
        (_OPEN, "  x\n" * contract.MAX_SOURCE_CHARS, "too_long"),
    ],
)
def test_refuses(prompt, completion, code):
  with pytest.raises(programs.ExtractionError) as caught:
    programs.extract(prompt, completion)
  assert caught.value.code == code
  assert caught.value.message == str(caught.value)
  assert "\n" not in caught.value.message
