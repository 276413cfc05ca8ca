"""Measures reading and converting against safetensors' own reader.

  python -m launch.benchmark_convert

Makes a random Mistral of 1.6 GB (bf16) in --workdir, needs 7 GB of disk there
for two minutes, and ends in one line of JSON:

  ratio_read_aligned     time of safetensors.flax.load_file / ours, our file
  ratio_read_touched     the same, with every number read once afterwards
  ratio_read_unaligned   the same as the first, on a file safetensors wrote
  peak_private_over_model, ..._mesh, ..._aligned, ..._theirs
                         most anonymous memory while reading / the model's
                         bytes: the unaligned file, the same onto 4 CPU devices,
                         the aligned file, safetensors.flax.load_file
  streamed_limit_over_model, streamed_is_bitwise, unstreamed_fits
                         converted to Orbax and back under that limit on private
                         memory; whether reading it whole passes there, too

Files are in the page cache; medians over --repeats interleaved repeats.
"""

import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy

from launch import app
from selfdev_jax import convert
from selfdev_jax import models

_REPEATS = flags.DEFINE_integer("repeats", 9, "Of each timing.", lower_bound=3)
_LIMIT = flags.DEFINE_float(
    "limit", 0.75, "Private memory of the streamed run / the model's bytes."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the model is made; none: the temporary directory."
)

_DECODER = models.DecoderConfig(
    vocab_size=32_000,
    embed=2048,
    layers=12,
    heads=16,
    kv_heads=4,
    head_dim=128,
    mlp=7168,
    rope=models.Rope(1e6),
)
_DEVICES = 4

# Each runs in a process of its own, after JAX has started there; it waits for
# a line before it reads, so that what came before is not counted.
_START = """
import sys
import jax, safetensors.flax
from selfdev_jax import convert, models
path = sys.argv[1]
config = convert.read_config(path)
mesh = jax.make_mesh(
    (1, jax.device_count()), ("fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
)
shardings = models.shardings(config, mesh) if jax.device_count() > 1 else None
jax.block_until_ready(jax.numpy.zeros(8) + 1)
print("ready", flush=True)
sys.stdin.readline()
"""
_READ = "params = jax.block_until_ready(convert.load(path, shardings)[1])"
_READ_THEIRS = (
    "params = jax.block_until_ready("
    "safetensors.flax.load_file(path + '/model.safetensors'))"
)
_LIMITED = """
import re, resource
data = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
limit = 1024 * data + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
"""
_TO_ORBAX = """
config, leaves = convert.open_leaves(path)
convert.save_checkpoint(path + "-orbax", config, leaves, path)
"""
_TO_HF = """
config, leaves, like = convert.open_checkpoint(path + "-orbax")
convert.save(path + "-back", config, leaves, like)
"""


def _child(code: str, *args, devices: int = 1) -> tuple[bool, int]:
  """Runs `code`; (whether it ended well, most anonymous bytes it added)."""
  flag = f"--xla_force_host_platform_device_count={devices}"
  child = subprocess.Popen(
      [sys.executable, "-c", _START + code, *map(str, args)],
      env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
  )
  child.stdout.readline()
  before = peak = _anonymous_bytes(child.pid)
  child.stdin.write("\n")
  child.stdin.flush()
  while child.poll() is None:
    peak = max(peak, _anonymous_bytes(child.pid))
    time.sleep(0.002)
  return child.returncode == 0, peak - before


def _anonymous_bytes(pid: int) -> int:
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  for line in status.splitlines():
    if line.startswith("RssAnon:"):
      return 1024 * int(line.split()[1])
  return 0  # It has just ended.


def _make(directory: pathlib.Path) -> int:
  """Writes the model twice, as we do and as safetensors does; its bytes."""
  rng = np.random.default_rng(0)
  noise = rng.normal(0.0, 0.02, 1 << 22).astype(jnp.bfloat16)
  params = jax.tree.map(
      lambda leaf: np.resize(noise, leaf.shape),
      models.abstract_params(_DECODER),
  )
  convert.save(directory / "aligned", _DECODER, params)
  shutil.copytree(
      directory / "aligned",
      directory / "plain",
      ignore=shutil.ignore_patterns("*.safetensors"),
  )
  tensors = safetensors.numpy.load_file(
      directory / "aligned" / "model.safetensors"
  )
  # One in eight such files happens to be aligned; this one is to be not.
  path, made_by = directory / "plain" / "model.safetensors", "safetensors"
  start = 0
  while start % 64 == 0:
    metadata = {"format": "pt", "made_by": made_by}
    safetensors.numpy.save_file(tensors, path, metadata)
    with open(path, "rb") as file:
      start = 8 + int.from_bytes(file.read(8), "little")
    made_by += "-" * 8
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _times(directory: pathlib.Path) -> dict[str, float]:
  """Median seconds of each way to read."""
  file = lambda name: directory / name / "model.safetensors"
  touch = jax.jit(lambda tree: jax.tree.map(jnp.max, tree))
  theirs = lambda name: safetensors.flax.load_file(file(name))
  ours = lambda name: convert.load(directory / name)[1]
  ways = {
      "theirs": lambda: theirs("aligned"),
      "ours": lambda: ours("aligned"),
      "theirs touched": lambda: touch(theirs("aligned")),
      "ours touched": lambda: touch(ours("aligned")),
      "theirs unaligned": lambda: theirs("plain"),
      "ours unaligned": lambda: ours("plain"),
  }
  seconds = {name: [] for name in ways}
  order = random.Random(0)
  for repeat in range(_REPEATS.value + 1):
    # What ran before leaves the allocator warm or cold.
    for name, read in order.sample(list(ways.items()), len(ways)):
      start = time.perf_counter()
      jax.block_until_ready(read())
      if repeat:  # The first one compiles, and fills the page cache.
        seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(taken) for name, taken in seconds.items()}


def _is_bitwise(one: pathlib.Path, other: pathlib.Path) -> bool:
  left, right = (
      safetensors.numpy.load_file(path / "model.safetensors")
      for path in (one, other)
  )
  return left.keys() == right.keys() and all(
      np.array_equal(left[k].view(np.uint8), right[k].view(np.uint8))
      for k in left
  )


def main(_):
  root = pathlib.Path(tempfile.mkdtemp(dir=_WORKDIR.value))
  try:
    size = _make(root)
    aligned, plain = root / "aligned", root / "plain"
    peaks = {
        "": _child(_READ, plain),
        "_mesh": _child(_READ, plain, devices=_DEVICES),
        "_aligned": _child(_READ, aligned),
        "_theirs": _child(_READ_THEIRS, plain),
    }
    limit = int(_LIMIT.value * size)
    streamed = all(
        _child(_LIMITED + code, plain, limit)[0] for code in (_TO_ORBAX, _TO_HF)
    )
    unstreamed, _ = _child(_LIMITED + _READ, plain, limit)
    seconds = _times(root)
    result = {
        "model_bytes": size,
        "repeats": _REPEATS.value,
        "ratio_read_aligned": seconds["theirs"] / seconds["ours"],
        "ratio_read_touched": (
            seconds["theirs touched"] / seconds["ours touched"]
        ),
        "ratio_read_unaligned": (
            seconds["theirs unaligned"] / seconds["ours unaligned"]
        ),
        **{
            f"peak_private_over_model{name}": peak / size if ended else None
            for name, (ended, peak) in peaks.items()
        },
        "streamed_limit_over_model": _LIMIT.value,
        "streamed_is_bitwise": (
            streamed and _is_bitwise(plain, root / "plain-back")
        ),
        "unstreamed_fits": unstreamed,
    }
  finally:
    shutil.rmtree(root)
  for name, taken in seconds.items():
    print(f"{name:>20} {1e3 * taken:8.1f} ms")
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
