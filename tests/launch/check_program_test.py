"""The command as its users run it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_KEYS = [
    "file",
    "status",
    "stage",
    "code",
    "reason",
    "hash",
    "fingerprint",
    "equations",
    "flops",
    "peak_bytes",
    "ms",
]


def _run(*arguments):
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.run(
      [sys.executable, "-m", "launch.check_program", *map(str, arguments)],
      cwd=_ROOT,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
  )


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  directory = tmp_path_factory.mktemp("programs")
  for name, body in (
      ("good", "base + 0.3 * sum(task_vectors)"),
      ("same", "sum(task_vectors) * 0.3 + base"),
      ("alike", "base + 0.3 * jnp.stack(task_vectors).sum(0)"),
      ("bad", "base[0]"),
      ("nan", "jnp.log(-jnp.abs(base))"),
  ):
    (directory / f"{name}.py").write_text(
        f"def merge(base, task_vectors):\n  return {body}\n"
    )
  (directory / "bytes.py").write_bytes(b"\xff\x00")
  return directory


def test_one_line_a_file(programs):
  files = sorted(programs.glob("*.py"))
  done = _run("--shapes=4096x14336,4096", "--experts=2", *files)
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert [line["file"] for line in lines] == list(map(str, files))
  assert all(list(line) == _KEYS for line in lines)
  found = {pathlib.Path(line["file"]).stem: line for line in lines}
  good, same, alike = (found[name] for name in ("good", "same", "alike"))
  assert good["status"] == "admitted" and good["stage"] is None
  assert good["hash"] == same["hash"] != alike["hash"]
  assert good["fingerprint"] == pytest.approx(alike["fingerprint"], rel=1e-4)
  assert good["equations"] >= 3
  assert good["flops"] >= 3 * 4096 * 14336
  assert good["peak_bytes"] >= 3 * 4 * 4096 * 14336
  assert (found["bad"]["stage"], found["bad"]["code"]) == (
      "trace",
      "output_shape",
  )
  assert found["nan"]["code"] == "non_finite"
  assert found["bytes"]["stage"] == "filter"
  for name in ("bad", "nan", "bytes"):
    assert found[name]["status"] == "rejected"
    assert found[name]["reason"] and found[name]["hash"] is None


def test_layers():
  done = _run("--layers")
  assert done.returncode == 0, done.stderr
  for name in ("rlimits", "seccomp", "landlock", "namespaces", "bubblewrap"):
    assert f"\n{name} (" in "\n" + done.stdout
  assert "Nothing here stops" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give either files with programs or --layers"),
        (("--layers", "x.py"), "give either files with programs or --layers"),
        (("/none.py",), "/none.py cannot be read: No such file"),
        (("--shapes=axb", __file__), "--shapes: 'axb' is no shape"),
        (("--shapes=0x4", __file__), "--shapes: '0x4' is no shape"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line(arguments, complaint):
  done = _run(*arguments)
  assert done.returncode == 2
  assert done.stderr.strip().splitlines()[-1].startswith(f"error: {complaint}")
