"""Shows how near a merge comes to what the memory allows, tensor by tensor.

  python -m launch.profile_merge --shape=mistral-7b --method=ties \
      --parameter=density=0.2
  python -m launch.profile_merge --model=HFDIR --method=linear --experts=2 \
      --parameter=weight=0.3,0.7 --trace_dir=/tmp/trace

Weights matter little to the time, so none are needed: --shape draws random
ones, and as many layers as fit the memory (--layers says how many). --model
takes a model's. Experts are the model with noise of a tenth of its root mean
square in each tensor.

A merge computes little, so reading each input once and writing the output once
is what it has to cost. A row a leaf kind, that is, a shape of tensors, says how
far from that it is:

  tensors     of that shape, over all layers that are timed
  MB          all inputs (base, experts, statistics) and the output, once
  ms          the median of --repeats merges of them, blocked until ready, the
              output written over the last one; of norms, what a call costs
  GB/s        MB / ms
  of triad    that by the bandwidth of c = a + 0.4 b, c donated, measured first:
              near 100 % nothing is left to gain, at 10 % the method computes,
              or reads its inputs ten times
  compile ms  tracing, lowering and compiling, once a kind

--trace_dir gets a trace of three more merges for TensorBoard's profiler or
XProf: pip install xprof; xprof --logdir=DIR. Standard output ends in the table
as one line of JSON.
"""

import functools
import json
import math
import os

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from launch import app
from launch.shapes import SHAPES
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import merging
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax.merging import roofline

_DTYPES = ("bfloat16", "float16", "float32")
_NOISE = 0.1
_MISSING = 0.5
_SHARE = 0.7  # Of the memory; the rest is for what merges have in between.
_TRACED = 3

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory or hub id.")
_SHAPE = flags.DEFINE_enum(
    "shape",
    None,
    list(SHAPES),
    "Random weights of these shapes instead.",
)
_METHOD = flags.DEFINE_enum(
    "method", None, sorted(merging.METHODS), "To profile.", required=True
)
_EXPERTS = flags.DEFINE_integer(
    "experts",
    None,
    "How many; none: three, or as near to it as the method takes.",
    lower_bound=1,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, _DTYPES, "Of the weights; none: the model's, or bfloat16."
)
_PARAMETER = flags.DEFINE_multi_string(
    "parameter",
    [],
    "Of the method, such as density=0.2, or weight=0.3,0.7 with one an expert;"
    " may be given several times. What has to be given and is not is 0.5.",
)
_LAYERS = flags.DEFINE_integer(
    "layers",
    None,
    "How many to time; none: all of them if the weights take less than 70 % of"
    " the memory, otherwise one.",
    lower_bound=1,
)
_MODE = flags.DEFINE_enum(
    "mode",
    "jit",
    ["jit", "pmap"],
    "One program over the leaf, or layers dealt out to all devices.",
)
_REPEATS = flags.DEFINE_integer("repeats", 9, "Of each timing.", lower_bound=3)
_TRACE_DIR = flags.DEFINE_string(
    "trace_dir", None, "Where a trace for TensorBoard or XProf is written."
)


def _experts(method) -> int:
  if _EXPERTS.value is not None:
    return _EXPERTS.value
  return max(method.min_experts, min(3, method.max_experts or 3))


def _parameters(method) -> dict[str, float | int | bool | list[float]]:
  """--parameter as `Merger.merge` takes it; `_MISSING` for what it lacks."""
  parameters = {
      p.name: _MISSING for p in method.parameters if p.default is None
  }
  for given in _PARAMETER.value:
    name, _, value = given.partition("=")
    try:
      values = json.loads(f"[{value}]")
    except json.JSONDecodeError:
      values = []
    if not values or not all(isinstance(v, int | float) for v in values):
      raise errors.UserError(
          f"--parameter={given} is not like density=0.2, weight=0.3,0.7 or"
          " rescale=true"
      )
    parameters[name] = values if len(values) > 1 else values[0]
  return parameters


def _memory() -> int:
  """Bytes that tensors can take."""
  stats = jax.devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _nbytes(tree) -> int:
  return sum(
      math.prod(leaf.shape) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
  )


def _keys(key, tree):
  leaves, structure = jax.tree.flatten(tree)
  return jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key, shape, dtype):
  return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@jax.jit
def _perturbed(key, leaf):
  wide = leaf.astype(jnp.float32)
  scale = _NOISE * jnp.sqrt(jnp.mean(wide**2))
  noise = scale * jax.random.normal(key, leaf.shape, jnp.float32)
  return (wide + noise).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _random_fisher(key, shape):
  return jax.random.uniform(key, shape, jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def _random_gram(key, shape):
  """Symmetric and positive definite, [layers, in, in] for [layers, out, in]."""
  inputs = shape[-1]
  x = jax.random.normal(key, (shape[0], inputs, inputs), jnp.float32)
  x = 0.1 * inputs**-0.5 * (x + jnp.swapaxes(x, 1, 2))
  return x + jnp.eye(inputs)


def _statistic(kind: str, key: jax.Array, params: models.Params):
  """Made up, as the time depends on the shapes alone."""
  if kind == "fisher":
    make = lambda path, key, leaf: _random_fisher(key, leaf.shape)
  else:
    make = lambda path, key, leaf: (
        _random_gram(key, leaf.shape)
        if path[0].key == "layers" and leaf.ndim == 3
        else None
    )
  return jax.tree_util.tree_map_with_path(make, _keys(key, params), params)


def _statistics(method, params: models.Params):
  if method.statistics is None:
    return None
  keys = jax.random.split(jax.random.key(2), _experts(method))
  return [_statistic(method.statistics, key, params) for key in keys]


def _first_layers(params: models.Params, layers: int, dtype) -> models.Params:
  """What is timed: so many layers, and what is in no layer; shapes."""
  stacked = lambda path: path[0].key == "layers"
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: jax.ShapeDtypeStruct(
          (layers, *leaf.shape[1:]) if stacked(path) else leaf.shape,
          dtype or leaf.dtype,
      ),
      params,
  )


def _choose_layers(method, config, params, dtype) -> int:
  """--layers, or what its help says."""

  def needed(layers):
    cut = _first_layers(params, layers, dtype)
    statistics = jax.eval_shape(lambda: _statistics(method, cut))
    return (2 + _experts(method)) * _nbytes(cut) + _nbytes(statistics)

  layers, memory = _LAYERS.value, _memory()
  if layers is None:
    layers = config.layers if needed(config.layers) < _SHARE * memory else 1
  if layers > config.layers:
    raise errors.UserError(f"--layers={layers}: there are {config.layers}")
  if needed(layers) > memory:
    raise errors.UserError(
        f"{needed(layers) / 1e9:.1f} GB are needed for --layers={layers}, and"
        f" there are {memory / 1e9:.1f} GB; take fewer layers or experts"
    )
  return layers


def _base(method) -> tuple[models.DecoderConfig, int, models.Params]:
  """(config, layers to time, weights of them)."""
  if _SHAPE.value is not None:
    config = SHAPES[_SHAPE.value]
    shapes, dtype = models.abstract_params(config), _DTYPE.value or "bfloat16"
    make = lambda key, leaf, like: _random(key, like.shape, like.dtype)
  else:
    config, shapes = convert.load(convert.resolve(_MODEL.value))
    dtype = _DTYPE.value
    # Copied, even where it is whole: timed as arrays that JAX has made.
    make = lambda key, leaf, like: jnp.array(
        leaf[: len(like)] if leaf.shape != like.shape else leaf, like.dtype
    )
  dtype = dtype and jnp.dtype(dtype)
  layers = _choose_layers(method, config, shapes, dtype)
  cut = _first_layers(shapes, layers, dtype)
  base = jax.tree.map(make, _keys(jax.random.key(0), cut), shapes, cut)
  return config, layers, base


def _merge(method, parameters, base, experts, statistics, paths):
  """(a call that merges these leaves over its last result, bytes it moves)."""
  pick = lambda tree: None if tree is None else roofline.pick(tree, paths)
  base, experts = pick(base), [pick(tree) for tree in experts]
  statistics = statistics and [pick(tree) for tree in statistics]
  merger = merging.Merger(
      None if method.base == "ignored" else base, experts, mode=_MODE.value
  )
  # Given from the start, so that one program is compiled, not two.
  merged = jax.tree.map(jnp.zeros_like, base)

  def call():
    nonlocal merged
    merged = merger.merge(
        method.name, into=merged, statistics=statistics, **parameters
    )
    return merged

  inputs = [experts, statistics] + [base] * (method.base != "ignored")
  return call, _nbytes(inputs) + _nbytes(base)


def _rows(method, parameters, base, layers):
  """A row a leaf kind, largest first, and the calls that were timed."""
  keys = jax.random.split(jax.random.key(1), _experts(method))
  experts = [jax.tree.map(_perturbed, _keys(key, base), base) for key in keys]
  statistics = _statistics(method, base)
  rows, calls = [], {}
  for (stacked, shape), paths in roofline.leaf_kinds(base).items():
    name = "x".join(map(str, shape))
    call, nbytes = _merge(method, parameters, base, experts, statistics, paths)
    _, compiling = roofline.compile_seconds(call)
    calls[f"{name} {paths[0]}"] = call
    rows.append(
        {
            "shape": shape,
            "leaves": paths,
            "tensors": len(paths) * (layers if stacked else 1),
            "bytes": nbytes,
            "compile_ms": 1e3 * compiling,
        }
    )
  seconds = roofline.interleaved(calls, _REPEATS.value)
  for row, taken in zip(rows, seconds.values(), strict=True):
    row["ms"] = 1e3 * float(np.median(taken))
  return sorted(rows, key=lambda row: -row["bytes"]), calls


def _trace(calls, directory: str):
  """A few merges of each kind, under its name."""
  with jax.profiler.trace(directory):
    for _ in range(_TRACED):
      for name, call in calls.items():
        with jax.profiler.TraceAnnotation(name):
          jax.block_until_ready(call())
  progress.note(f"the trace is in {directory}: xprof --logdir={directory}")


def _table(result) -> str:
  source = (
      f"{_SHAPE.value} with random weights"
      if _MODEL.value is None
      else f"{_MODEL.value}, experts with noise"
  )
  parameters = "".join(f", {k} {v}" for k, v in result["parameters"].items())
  header = (
      f"{'kind':<28} {'tensors':>7} {'MB':>8} {'ms':>8} {'GB/s':>6}"
      f" {'of triad':>8} {'compile ms':>10}"
  )
  lines = [
      f"{source}: {result['layers_timed']} of {result['layers']} layers timed",
      f"{result['method']}{parameters}; experts: {result['experts']}, in"
      f" {result['dtype']}",
      f"{result['device']}: copy {result['copy_gb_per_s']:.1f} GB/s, triad"
      f" {result['triad_gb_per_s']:.1f} GB/s",
      "",
      header,
      "-" * len(header),
  ]
  for row in (*result["rows"], result["total"]):
    shape = "x".join(map(str, row.get("shape", ["total"])))
    leaves = [path.rpartition("/")[2] for path in row.get("leaves", [])]
    name = f"{shape} {','.join(leaves)}"
    lines.append(
        f"{name:<28.28} {row['tensors']:7} {row['bytes'] / 1e6:8.1f}"
        f" {row['ms']:8.2f} {row['gb_per_s']:6.1f}"
        f" {row['bandwidth_fraction']:8.1%} {row['compile_ms']:10.0f}"
    )
  return "\n".join(lines)


def main(_):
  if (_MODEL.value is None) == (_SHAPE.value is None):
    raise errors.UserError("give either --model or --shape, what to merge")
  method = merging.METHODS[_METHOD.value]
  parameters = _parameters(method)
  method.check_experts(_experts(method))
  method.bind(parameters, _experts(method))  # To complain before it takes time.
  config, layers, base = _base(method)
  copy, triad = roofline.copy_bandwidth(), roofline.triad_bandwidth()
  rows, calls = _rows(method, parameters, base, layers)
  total = {
      "tensors": sum(row["tensors"] for row in rows),
      "bytes": sum(row["bytes"] for row in rows),
      "compile_ms": sum(row["compile_ms"] for row in rows),
      "ms": sum(row["ms"] for row in rows),
  }
  for row in (*rows, total):
    row["gb_per_s"] = row["bytes"] / row["ms"] / 1e6
    row["bandwidth_fraction"] = 1e9 * row["gb_per_s"] / triad
  if _TRACE_DIR.value is not None:
    _trace(calls, _TRACE_DIR.value)
  result = {
      "method": method.name,
      "parameters": parameters,
      "experts": _experts(method),
      "dtype": str(base["embed"].dtype),
      "device": jax.devices()[0].device_kind,
      "layers": config.layers,
      "layers_timed": layers,
      "repeats": _REPEATS.value,
      "copy_gb_per_s": copy / 1e9,
      "triad_gb_per_s": triad / 1e9,
      "rows": rows,
      "total": total,
  }
  print(_table(result))
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
