"""Measures merging against mergekit 0.1.5 and against plain torch.

  pip install -e .[bench]
  python -m launch.benchmark_merge
  python -m launch.benchmark_merge --methods=ties,linear --noend_to_end

In memory, on the CPU: a base and three experts of 23.3M parameters in 29
tensors, random; task vectors are a tenth of the weights. Methods that take one
expert get one, nuslerp two. All are measured in the same rounds, in a drawn
order, after a round that warms up and compiles; times are medians of --repeats
rounds. Torch has as many threads as there are cores, as XLA has.

  ours      `Merger.merge(..., into=former)`, waited for; its default, float32
            arithmetic rounded once
  mergekit  its function of one tensor, called for each, with its defaults:
            arithmetic in the weights' dtype
  torch     what one would write by hand, into memory that is there: the
            fastest of some forms; weighted sums are also compiled. None for
            methods that nobody writes by hand.
  of triad  least traffic, that is, all inputs and the output once, by our time
            and by the bandwidth of c = a + 0.4 b, c donated, of the same rounds
  two-pass  for ties: the inputs twice and the output once, likewise

End to end: `launch.merge` and `mergekit-yaml` in processes of their own, in
turn, on 173M parameters in bf16 without a tokenizer, which lie in the page
cache; 3 GB of disk in --workdir. Imports are timed in the same rounds. Peaks
are the high-water mark of resident memory, files that are mapped included, and
the most anonymous memory that was seen. The JSON line's "ratio" there is the
lesser recipe's.

Measure on an idle machine: torch's threads wait for each other after every
operation, so that a core that is taken slows torch down many times more.
"""

import functools
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
from typing import NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import yaml

from launch import app
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import merging
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax.merging import roofline

try:
  from mergekit.merge_methods import registry
  from mergekit.merge_methods.base import TensorGroup
  import torch
except ImportError as error:
  _MISSING = (error.name or str(error)).partition(".")[0]
else:
  _MISSING = None

# In memory; end to end.
_SHAPES = {
    "small": (
        models.DecoderConfig(
            vocab_size=16_384,
            embed=512,
            layers=3,
            heads=8,
            kv_heads=8,
            head_dim=64,
            mlp=2560,
            tied_head=True,
        ),
        models.DecoderConfig(
            vocab_size=32_000,
            embed=1024,
            layers=8,
            heads=16,
            kv_heads=16,
            head_dim=64,
            mlp=3008,
        ),
    ),
    # To see in a minute what this prints.
    "tiny": (
        models.DecoderConfig(
            vocab_size=64,
            embed=32,
            layers=2,
            heads=2,
            kv_heads=2,
            head_dim=16,
            mlp=48,
            tied_head=True,
        ),
    )
    * 2,
}
_EXPERTS = 3
_STD, _TASK_STD = 0.02, 0.002
_TRIAD_SIZE = 2**24
_REST_S = 0.02
_BUSY = 0.25  # Of a core, as a load average.

# What both are given. Of the same weights, so that torch's forms are short.
_SPARSE = {"weight": 0.3, "density": 0.5}
_PARAMETERS = {
    "linear": {"weight": [0.2, 0.3, 0.5]},
    "slerp": {"t": 0.5},
    "nuslerp": {"weight": 1.0},
    "multislerp": {"weight": 1.0},
    "karcher": {},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_linear": _SPARSE,
    "dare_ties": _SPARSE,
    "della": _SPARSE,
    "della_linear": _SPARSE,
    "breadcrumbs": _SPARSE,
    "breadcrumbs_ties": _SPARSE,
    "sce": {"select_topk": 0.2},
    "model_stock": {},
    "nearswap": {"t": 0.001},
    "arcee_fusion": {},
    "passthrough": {},
}
_NOTES = {"passthrough": "mergekit hands its input back, ours is a copy"}
_RECIPES = ("task_arithmetic", "ties")
_IMPORTS = {
    "ours": "import launch.merge",
    "mergekit": "import mergekit.scripts.run_yaml",
}

_METHODS = flags.DEFINE_list("methods", list(_PARAMETERS), "To measure.")
_DTYPES = flags.DEFINE_list(
    "dtypes", ["bfloat16", "float32"], "Of the weights in memory."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Of each timing.", lower_bound=1)
_SHAPE = flags.DEFINE_enum(
    "shape", "small", list(_SHAPES), "Of the models that are merged."
)
_COMPILE = flags.DEFINE_bool(
    "compile",
    True,
    "Whether torch's forms are compiled, too; needs a compiler.",
)
_END_TO_END = flags.DEFINE_bool(
    "end_to_end", True, "Whether the commands are measured, too."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where models are made; none: the temporary directory."
)


# --- What one would write in torch ------------------------------------------
#
# Each is `form(outs, *models)` with a list of tensors a model, the base first
# where the method takes one.


def _in_place(outs, *models, weights):
  """Weighted sums, rounded to the dtype at each step."""
  for out, first, *others in zip(outs, *models, strict=True):
    torch.mul(first, weights[0], out=out)
    for tensor, weight in zip(others, weights[1:], strict=True):
      out.add_(tensor, alpha=weight)


def _accumulated(outs, *models, weights):
  """Weighted sums, in float32."""
  for out, first, *others in zip(outs, *models, strict=True):
    total = first.float() * weights[0]
    for tensor, weight in zip(others, weights[1:], strict=True):
      total.add_(tensor, alpha=weight)
    out.copy_(total)


def _slerp(outs, base, expert, *, t):
  for out, *pair in zip(outs, base, expert, strict=True):
    one, other = (tensor.float() for tensor in pair)
    cosine = torch.sum(one * other) / (one.norm() * other.norm())
    angle = torch.arccos(cosine)
    mixed = torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other
    out.copy_(mixed / torch.sin(angle))


def _nearswap(outs, base, expert, *, t):
  for out, *pair in zip(outs, base, expert, strict=True):
    one, other = (tensor.float() for tensor in pair)
    share = (t / (one - other).abs().clamp(min=1e-6)).clamp(max=1)
    out.copy_(torch.lerp(one, other, share))


def _model_stock(outs, base, *experts):
  count = len(experts)
  for out, one, *others in zip(outs, base, *experts, strict=True):
    taus = torch.stack([x.float() - one.float() for x in others]).flatten(1)
    units = taus / taus.norm(dim=1, keepdim=True)
    cosine = ((units @ units.T).sum() - count) / (count * (count - 1))
    ratio = count * cosine / (1 + (count - 1) * cosine)
    out.copy_(one.float() + ratio * taus.mean(0).view_as(one))


def _ties(outs, base, *experts, density, exact_k):
  """With equal weights, which cancel."""
  for out, one, *others in zip(outs, base, *experts, strict=True):
    taus = torch.stack([x.float() - one.float() for x in others]).flatten(1)
    sizes, count = taus.abs(), max(1, int(density * one.numel()))
    if exact_k:
      indices = sizes.topk(count, sorted=False).indices
      taus = torch.zeros_like(taus).scatter_(
          1, indices, taus.gather(1, indices)
      )
    else:
      cuts = sizes.kthvalue(one.numel() - count + 1, keepdim=True).values
      taus = torch.where(sizes >= cuts, taus, 0.0)
    sign = torch.where(taus.sum(0) >= 0, 1.0, -1.0)
    agree = taus * sign > 0
    merged = (taus * agree).sum(0) / agree.sum(0).clamp(min=1)
    out.copy_(one + merged.view_as(one))


def _copy(outs, model):
  for out, tensor in zip(outs, model, strict=True):
    out.copy_(tensor)


def _sums(weights):
  return {
      "in place": functools.partial(_in_place, weights=weights),
      "float32": functools.partial(_accumulated, weights=weights),
  }


_WEIGHT = _PARAMETERS["task_arithmetic"]["weight"]
_DENSITY = _PARAMETERS["ties"]["density"]
_FORMS = {
    "linear": _sums(_PARAMETERS["linear"]["weight"]),
    "task_arithmetic": _sums([1 - _EXPERTS * _WEIGHT] + [_WEIGHT] * _EXPERTS),
    "slerp": {"float32": functools.partial(_slerp, **_PARAMETERS["slerp"])},
    "nearswap": {
        "float32": functools.partial(_nearswap, **_PARAMETERS["nearswap"])
    },
    "model_stock": {"float32": _model_stock},
    "ties": {
        "float32": functools.partial(_ties, density=_DENSITY, exact_k=False)
    },
    "ties exact_k": {
        "float32": functools.partial(_ties, density=_DENSITY, exact_k=True)
    },
    "passthrough": {"copy": _copy},
}
_COMPILED = ("linear", "task_arithmetic")


def _compiles() -> bool:
  """Whether torch.compile has what it needs, and is asked for."""
  if not _COMPILE.value:
    return False
  compiler = os.environ.get("CXX", "g++")
  if shutil.which(compiler) is None:
    progress.note(f"no {compiler}: torch's forms are not compiled")
    return False
  # No pool of processes, which would take time from what is measured.
  torch._inductor.config.compile_threads = 1
  return True


# --- In memory --------------------------------------------------------------


def _draw(rng, config, like=None) -> models.Params:
  """A base, or an expert of the base `like`; NumPy arrays, float32."""

  def draw(shape, base):
    noise = rng.standard_normal(shape.shape, np.float32)
    return _STD * noise if base is None else base + _TASK_STD * noise

  shapes = models.abstract_params(config)
  if like is None:
    return jax.tree.map(lambda shape: draw(shape, None), shapes)
  return jax.tree.map(draw, shapes, like)


def _to_torch(params, dtype: str):
  """A tensor a layer, each in memory of its own, as mergekit reads them."""
  tensors = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    whole = torch.from_numpy(leaf)
    parts = whole.unbind(0) if path[0].key == "layers" else [whole]
    tensors += [
        part.to(getattr(torch, dtype), copy=True).contiguous() for part in parts
    ]
  return tensors


def _cases(names) -> list[tuple[str, str, dict]]:
  """(row, method, parameters of ours alone)."""
  cases = []
  for name in names:
    cases.append((name, name, {}))
    if name == "ties":
      cases.append(("ties exact_k", name, {"exact_k": True}))
  return cases


def _ours(name, extra, base, experts):
  """A call that merges over its last result."""
  takes_base = merging.METHODS[name].base != "ignored"
  merger = merging.Merger(base if takes_base else None, experts)
  # Given from the start, so that one program is compiled, not two.
  merged = jax.tree.map(jnp.zeros_like, base)

  def call():
    nonlocal merged
    merged = merger.merge(name, into=merged, **_PARAMETERS[name], **extra)
    return merged

  return call


def _mergekit(name, tensors):
  """A call a tensor, as its executor does."""
  method = registry.get(name)
  base_index = None if merging.METHODS[name].base == "ignored" else 0
  groups = [
      TensorGroup.from_tensors(inputs, base_index=base_index)
      for inputs in zip(*tensors, strict=True)
  ]
  return lambda: [
      method([group], parameters=_PARAMETERS[name]) for group in groups
  ]


def _torch_ways(row, tensors, compiles: bool):
  """Calls that write over their last result."""
  outs = [torch.empty_like(tensor) for tensor in tensors[0]]
  ways = {}
  for name, form in _FORMS.get(row, {}).items():
    ways[f"eager {name}"] = functools.partial(form, outs, *tensors)
    if compiles and row in _COMPILED:
      fast = torch.compile(form, dynamic=False)
      ways[f"compiled {name}"] = functools.partial(fast, outs, *tensors)
  return ways


def _milliseconds(ways) -> dict[str, float]:
  """Medians, measured as in `roofline.interleaved`, but with rests between.

  After an operation torch's threads keep their cores busy for some
  milliseconds, in which XLA's had to share them; torch does not mind the rest.
  """
  taken = {name: [] for name in ways}
  order = random.Random(0)
  for repeat in range(_REPEATS.value + 1):
    for name, call in order.sample(list(ways.items()), len(ways)):
      time.sleep(_REST_S)
      start = time.perf_counter()
      jax.block_until_ready(call())
      if repeat:  # The first round compiles.
        taken[name].append(time.perf_counter() - start)
  return {name: 1e3 * statistics.median(taken[name]) for name in taken}


def _measure(row, name, extra, trees, tensors, compiles, triad) -> dict:
  """A row of the result; base and experts come as trees and as tensors."""
  method = merging.METHODS[name]
  count = min(_EXPERTS, method.max_experts or _EXPERTS)
  first = 1 if method.base == "ignored" else 0
  tensors = tensors[first : 1 + count]
  ways = {
      "ours": _ours(name, extra, trees[0], trees[1 : 1 + count]),
      "mergekit": _mergekit(name, tensors),
      "triad": triad,
  }
  torchs = _torch_ways(row, tensors, compiles)
  ms = _milliseconds(ways | torchs)
  forms = {way: ms[way] for way in torchs}
  fastest = min(forms, key=forms.get, default=None)
  nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees[0]))
  triad_gb_per_s = 3 * 4 * _TRIAD_SIZE / ms["triad"] / 1e6
  of_triad = lambda arrays: arrays * nbytes / ms["ours"] / 1e6 / triad_gb_per_s
  result = {
      "method": row,
      "dtype": str(trees[0]["embed"].dtype),
      "parameters": _PARAMETERS[name] | extra,
      "inputs": len(tensors),
      "ours_ms": ms["ours"],
      "mergekit_ms": ms["mergekit"],
      "torch_ms": forms.get(fastest),
      "torch_form": fastest,
      "torch_forms_ms": forms,
      "ratio_mergekit": ms["mergekit"] / ms["ours"],
      "ratio_torch": fastest and forms[fastest] / ms["ours"],
      "triad_gb_per_s": triad_gb_per_s,
      "bandwidth_fraction": of_triad(len(tensors) + 1),
  }
  if name == "ties":
    result["two_pass_fraction"] = of_triad(2 * len(tensors) + 1)
  if row in _NOTES:
    result["note"] = _NOTES[row]
  return result


_HEADER = (
    f"{'method':<16} {'dtype':<8} {'ours ms':>8} {'mergekit':>9} {'ratio':>6}"
    f" {'torch':>8} {'ratio':>6} {'of triad':>8} {'two-pass':>8}"
)


def _line(row) -> str:
  known = lambda value, form: "-" if value is None else format(value, form)
  notes = [row.get("torch_form"), row.get("note")]
  return (
      f"{row['method']:<16} {row['dtype']:<8} {row['ours_ms']:8.2f}"
      f" {row['mergekit_ms']:9.2f} {row['ratio_mergekit']:6.1f}"
      f" {known(row['torch_ms'], '.2f'):>8}"
      f" {known(row['ratio_torch'], '.1f'):>6}"
      f" {row['bandwidth_fraction']:8.1%}"
      f" {known(row.get('two_pass_fraction'), '.1%'):>8}"
      f" {'; '.join(filter(None, notes))}".rstrip()
  )


def _in_memory(config) -> list[dict]:
  """A row a method and dtype, printed as it is measured."""
  rng = np.random.default_rng(0)
  base = _draw(rng, config)
  drawn = [base] + [_draw(rng, config, base) for _ in range(_EXPERTS)]
  a, b = (jnp.ones(_TRIAD_SIZE, jnp.float32) for _ in range(2))
  triad = roofline.reusing(lambda a, b: a + 0.4 * b, a, b)
  compiles, rows = _compiles(), []
  print(f"{_HEADER}\n{'-' * len(_HEADER)}", flush=True)
  for dtype in _DTYPES.value:
    trees = [
        jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: B023
        for tree in drawn
    ]
    tensors = [_to_torch(tree, dtype) for tree in drawn]
    for case in _cases(_METHODS.value):
      rows.append(_measure(*case, trees, tensors, compiles, triad))
      print(_line(rows[-1]), flush=True)
  return rows


# --- End to end -------------------------------------------------------------


class _Run(NamedTuple):
  """What a process took; the peaks in bytes."""

  seconds: float
  resident: int
  anonymous: int


def _memory(pid: int) -> tuple[int, int]:
  """(high-water mark of resident memory, anonymous memory now), bytes."""
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  fields = dict(line.split(":", 1) for line in status.splitlines())
  found = [fields.get(name, "0 kB") for name in ("VmHWM", "RssAnon")]
  return tuple(1024 * int(value.split()[0]) for value in found)


def _run(command, log: pathlib.Path) -> _Run:
  """Runs it to its end, and looks at its memory meanwhile.

  The mark of /proc, not wait4's, which starts from this process's own: Linux
  counts what was resident before exec.
  """
  resident, anonymous = 0, 0
  with open(log, "w") as file:
    start = time.perf_counter()
    child = subprocess.Popen(
        command,
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
    )
    while child.poll() is None:
      mark, now = _memory(child.pid)
      resident, anonymous = max(resident, mark), max(anonymous, now)
      time.sleep(0.005)
    seconds = time.perf_counter() - start
  if child.returncode:
    said = log.read_text().strip().splitlines()
    raise errors.UserError(
        f"{' '.join(map(str, command))} failed: {said[-1] if said else '?'}"
    )
  return _Run(seconds, resident, anonymous)


def _make(root: pathlib.Path, config) -> None:
  """Writes base, experts and recipes."""
  rng = np.random.default_rng(0)
  base = _draw(rng, config)
  narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  convert.save(root / "base", config, narrow(base))
  for i in range(_EXPERTS):
    expert = _draw(rng, config, base)
    convert.save(root / f"expert-{i}", config, narrow(expert))
  for method in _RECIPES:
    recipe = {
        "models": [
            {
                "model": str(root / f"expert-{i}"),
                "parameters": dict(_PARAMETERS[method]),
            }
            for i in range(_EXPERTS)
        ],
        "merge_method": method,
        "base_model": str(root / "base"),
        "dtype": "bfloat16",
    }
    (root / f"{method}.yml").write_text(yaml.safe_dump(recipe))


def _commands(root: pathlib.Path) -> dict[tuple[str, str], list[str]]:
  """(whose, what) -> command; merges write to root / "out"."""
  commands, out = {}, root / "out"
  for whose, code in _IMPORTS.items():
    commands[whose, "import"] = [sys.executable, "-c", code]
  for method in _RECIPES:
    recipe = root / f"{method}.yml"
    commands["ours", method] = [
        *(sys.executable, "-m", "launch.merge"),
        *(f"--recipe={recipe}", f"--out={out}"),
    ]
    # What the script mergekit-yaml runs; that may not be in the path.
    commands["mergekit", method] = [
        *(sys.executable, "-m", "mergekit.scripts.run_yaml"),
        *(str(recipe), str(out)),
    ]
  return commands


def _compare(runs, method: str) -> dict:
  """The result of one recipe."""
  result = {"method": method}
  seconds = {}
  for whose in _IMPORTS:
    for what, name in ((method, "s"), ("import", "import_s")):
      taken = statistics.median(run.seconds for run in runs[whose, what])
      result[f"{whose}_{name}"] = seconds[whose, name] = taken
    peaks = runs[whose, method]
    result[f"{whose}_peak_bytes"] = max(run.resident for run in peaks)
    result[f"{whose}_peak_anonymous_bytes"] = max(
        run.anonymous for run in peaks
    )
  alone = [
      seconds[whose, "s"] - seconds[whose, "import_s"] for whose in _IMPORTS
  ]
  return result | {
      "ratio": seconds["mergekit", "s"] / seconds["ours", "s"],
      "ratio_without_imports": alone[1] / alone[0],
  }


def _end_to_end(config) -> dict:
  """The result of all recipes; at the top that with the least ratio."""
  root = pathlib.Path(tempfile.mkdtemp(dir=_WORKDIR.value))
  try:
    _make(root, config)
    commands = _commands(root)
    for whose in _IMPORTS:  # Reads the libraries from disk.
      _run(commands[whose, "import"], root / "log")
    runs = {key: [] for key in commands}
    order = random.Random(0)
    for _ in range(_REPEATS.value):
      for key in order.sample(list(commands), len(commands)):
        shutil.rmtree(root / "out", ignore_errors=True)
        runs[key].append(_run(commands[key], root / "log"))
  finally:
    shutil.rmtree(root)
  results = {method: _compare(runs, method) for method in _RECIPES}
  least = min(results.values(), key=lambda result: result["ratio"])
  return least | {"recipes": results}


def _print_end_to_end(result):
  header = (
      f"{'end to end':<16} {'ours s':>8} {'mergekit':>9} {'ratio':>6}"
      f" {'no imports':>11} {'peak MB':>12} {'anonymous MB':>13}"
  )
  print(f"\n{header}\n{'-' * len(header)}")
  for row in result["recipes"].values():
    peaks = [
        "/".join(f"{row[f'{whose}_{name}'] / 1e6:.0f}" for whose in _IMPORTS)
        for name in ("peak_bytes", "peak_anonymous_bytes")
    ]
    print(
        f"{row['method']:<16} {row['ours_s']:8.2f} {row['mergekit_s']:9.2f}"
        f" {row['ratio']:6.1f} {row['ratio_without_imports']:11.1f}"
        f" {peaks[0]:>12} {peaks[1]:>13}"
    )


def _check(flag, known):
  for name in flag.value:
    if name not in known:
      raise errors.UserError(
          f"--{flag.name}: no {name!r}; there are {', '.join(known)}"
      )


def main(_):
  if _MISSING is not None:
    raise errors.UserError(
        f"{_MISSING} is not installed: pip install -e .[bench]"
    )
  _check(_METHODS, list(_PARAMETERS))
  _check(_DTYPES, ["bfloat16", "float16", "float32"])
  threads, load = os.cpu_count(), os.getloadavg()[0]
  torch.set_num_threads(threads)
  jax.config.update("jax_platforms", "cpu")  # As torch is.
  if load > _BUSY:
    progress.note(
        f"the load was {load:.1f} in the last minute: on a busy machine the"
        " ratios are too good"
    )
  small, large = _SHAPES[_SHAPE.value]
  shapes = models.abstract_params(small)
  result = {
      "threads": threads,
      "load": load,
      "repeats": _REPEATS.value,
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
      "rows": _in_memory(small),
      "end_to_end": _end_to_end(large) if _END_TO_END.value else None,
  }
  if _END_TO_END.value:
    _print_end_to_end(result["end_to_end"])
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
