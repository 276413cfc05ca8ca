"""Measures the sandbox: programs a second, screening, memory over many.

  python -m launch.benchmark_sandbox
  python -m launch.benchmark_sandbox --programs=10000

Programs are composed at random from what factories write (trimming, signs,
norms, ranks, noise, loops); no two are alike, all are admitted. They are for
the six leaf kinds of Mistral-7B, of whose weights nothing is needed. The last
line is JSON:

  programs_per_s     admitted in the second half, on all cores; in the first,
                     primitives are compiled for the probes
  screen_over_cold   CPU time of a program's admission (traced, verified and
                     run op by op on probes) / of compiling it for each leaf
                     kind, without a cache
  rss_growth         memory of all processes after the last program / after the
                     first tenth, - 1
"""

import json
import os
import pathlib
import random
import statistics
import tempfile
import time

from absl import flags
import jax

from launch import app
from launch import shapes as shapes_lib
from selfdev_jax import config as config_lib
from selfdev_jax import progress
from selfdev_jax import sandbox

_PROGRAMS = flags.DEFINE_integer(
    "programs", 300, "To admit, each of another kind.", lower_bound=20
)
_COMPILED = flags.DEFINE_integer(
    "compiled", 20, "Of them to compile, cold and warm.", lower_bound=1
)
_EXPERTS = 3
_SELECT = (
    "t",
    "jnp.where(jnp.abs(t) >= jnp.quantile(jnp.abs(t), {a}), t, 0.0)",
    "jnp.where(jnp.abs(t) > {a} * jnp.std(t), t, 0.0)",
    "t * (jnp.abs(t) > {a} * jnp.mean(jnp.abs(t)))",
    "t * jax.random.bernoulli(jax.random.key({k}), {a}, t.shape) / {a}",
    "jnp.clip(t, -{a} * jnp.std(t), {a} * jnp.std(t))",
    "jnp.sign(t) * jnp.maximum(jnp.abs(t) - {a} * jnp.mean(jnp.abs(t)), 0.0)",
)
_WEIGH = (
    "1.0",
    "1.0 / (jnp.linalg.norm(t) + 1e-8)",
    "jnp.exp(-{b} * jnp.mean(t * t))",
    "jnp.sum(t * base) / (jnp.sum(base * base) + 1e-8)",
    "{b} ** i",
    "jnp.std(t) / (jnp.std(base) + 1e-8)",
)
_COMBINE = (
    "sum(parts)",
    "jnp.mean(jnp.stack(parts), axis=0)",
    "jnp.median(jnp.stack(parts), axis=0)",
    "parts[0] + {c} * parts[1] - {c} * parts[2]",
    "jnp.where(jnp.sign(sum(parts)) == jnp.sign(parts[0]), sum(parts), 0.0)",
    "jnp.stack(parts)[jnp.argmax(jnp.array([jnp.sum(p * p) for p in parts]))]",
    "jnp.max(jnp.stack(parts), axis=0) + jnp.min(jnp.stack(parts), axis=0)",
)
_FINISH = (
    "base + {d} * merged",
    "base + {d} * merged * jnp.linalg.norm(base) / (jnp.linalg.norm(merged) +"
    " 1e-6)",
    "(1 - {d}) * base + {d} * (base + merged)",
    "base + {d} * jnp.tanh(merged)",
    "lax.fori_loop(0, 3, lambda i, x: x + {d} * (merged - 0.1 * x), base)",
)
_PROGRAM = """\
def weigh(base, t, i):
  return {weigh}

def merge(base, task_vectors):
  parts = []
  for i, t in enumerate(task_vectors):
    selected = {select}
    parts.append(weigh(base, t, i) * selected)
  merged = {combine}
  return {finish}
"""


def main(_):
  # Room for two sorts of an embedding of 131 million numbers.
  limits = config_lib.Sandbox(max_flops=1e12)
  leaf_kinds = _leaf_kinds()
  sources = _compose(_PROGRAMS.value)
  with tempfile.TemporaryDirectory() as directory:
    os.environ["SELFDEV_CACHE"] = directory  # Nothing is compiled before.
    with sandbox.Sandbox(limits, leaf_kinds, _EXPERTS) as box:
      admitted, rate, cpu, growth = _admit(box, sources)
    cold, warm = _compile(
        admitted[:: max(1, len(admitted) // _COMPILED.value)],
        leaf_kinds,
        pathlib.Path(directory) / "compiled",
    )
  result = {
      "programs_per_s": round(rate, 2),
      "screen_over_cold": round(cpu / cold, 4),
      "rss_growth": growth["rss_growth"],
  }
  print(
      f"{len(sources)} programs, {len(leaf_kinds)} leaf kinds,"
      f" {len(os.sched_getaffinity(0))} cores: {1000 * cpu:.0f} CPU ms each;"
      f" compiled for every kind {1000 * cold:.0f} CPU ms cold,"
      f" {1000 * warm:.0f} with the persistent cache"
      f" (n = {min(_COMPILED.value, len(admitted))})"
  )
  print(json.dumps({key: growth[key] for key in growth}))
  print(json.dumps(result))


def _leaf_kinds():
  decoder = shapes_lib.SHAPES["mistral-7b"]
  width = decoder.embed
  return [
      (decoder.heads * decoder.head_dim, width),
      (decoder.kv_heads * decoder.head_dim, width),
      (decoder.mlp, width),
      (width, decoder.mlp),
      (width,),
      (decoder.vocab_size, width),
  ]


def _compose(n: int) -> list[str]:
  rng, sources = random.Random(0), {}
  pieces = (_SELECT, _WEIGH, _COMBINE, _FINISH)
  while len(sources) < n:
    numbers = {x: round(rng.uniform(0.1, 0.9), 3) for x in "abcd"}
    numbers["k"] = rng.randrange(1000)
    select, weigh, combine, finish = (
        rng.choice(piece).format(**numbers) for piece in pieces
    )
    sources[
        _PROGRAM.format(
            select=select, weigh=weigh, combine=combine, finish=finish
        )
    ] = None
  return list(sources)


def _admit(box, sources):
  """(admitted, programs a second, CPU seconds a program, growth)."""
  tenth, half = len(sources) // 10, len(sources) // 2
  box.layers()
  list(box.admit_all(sources[:20]))  # Starts every lane.
  busy, admitted, start = _cpu_seconds(), [], time.monotonic()
  with progress.bar("Admitting", len(sources), "program") as bar:
    for i, verdict in enumerate(box.admit_all(sources)):
      if isinstance(verdict, sandbox.Rejection):
        raise RuntimeError(f"{verdict}\n{sources[i]}")
      admitted.append(verdict.program if i < 1000 else "")
      if i + 1 == tenth:
        early = _memory()
      if i + 1 == half:
        middle = time.monotonic()
      bar.update()
  end = time.monotonic()
  late = _memory()
  growth = {
      "programs_per_s_of_all": round(len(sources) / (end - start), 2),
      "rss_growth": round(late["bytes"] / early["bytes"] - 1, 4),
      "megabytes": round(late["bytes"] / 1e6),
      "processes": late["processes"],
      "zombies": late["zombies"],
      "descriptors_growth": late["descriptors"] - early["descriptors"],
  }
  cpu = (_cpu_seconds() - busy) / len(sources)
  rate = (len(sources) - half) / (end - middle)
  return [p for p in admitted if p], rate, cpu, growth


def _descendants(pid):
  # Threads start processes, too.
  lists = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
  children = {c for path in lists for c in path.read_text().split()}
  return [int(c) for c in children] + [
      d for c in children for d in _descendants(int(c))
  ]


def _stat(pid):
  text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
  return text.rpartition(")")[2].split()


def _cpu_seconds():
  """Of this process and all that it has started and still knows."""
  ticks = 0
  for pid in [os.getpid(), *_descendants(os.getpid())]:
    ticks += sum(map(int, _stat(pid)[11:15]))
  return ticks / os.sysconf("SC_CLK_TCK")


def _memory():
  """Proportional set sizes: what is shared counts once."""
  pids = [os.getpid(), *_descendants(os.getpid())]
  total = descriptors = zombies = 0
  for pid in pids:
    try:
      zombies += _stat(pid)[0] == "Z"
      rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
      descriptors += len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
      continue  # A child of a zygote that has just ended.
    (line,) = (x for x in rollup.splitlines() if x.startswith("Pss:"))
    total += 1024 * int(line.split()[1])
  return {
      "bytes": total,
      "processes": len(pids),
      "zombies": zombies,
      "descriptors": descriptors,
  }


def _compile(programs, leaf_kinds, directory):
  """Mean CPU seconds of a program over all kinds: cold, and cached."""
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  times = {None: [], str(directory): [], "again": []}
  for where, seconds in times.items():
    name = str(directory) if where == "again" else where
    jax.config.update("jax_compilation_cache_dir", name)
    jax.clear_caches()
    for program in programs:
      start = time.process_time()
      for shape in leaf_kinds:
        merge = sandbox.build(program)
        leaf = jax.ShapeDtypeStruct(shape, "float32")
        jax.jit(merge).lower(leaf, [leaf] * _EXPERTS).compile()
      seconds.append(time.process_time() - start)
  return statistics.mean(times[None]), statistics.mean(times["again"])


if __name__ == "__main__":
  app.run(main)
