"""Applies a merge to the leaves of stacked parameters, a kernel a leaf kind.

A leaf kind is a per-layer shape. Layers are vmapped, so a method or a program
sees one tensor at a time, and each kind is compiled once: numbers are traced.
"""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import concurrent.futures
import functools
import os
from typing import Any
import weakref
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from selfdev_jax import models
from selfdev_jax.merging import methods
from selfdev_jax.merging import select
from selfdev_jax.merging.methods import MergeError

# (base, task_vectors, literals) -> tensor of base's shape, all float32.
ProgramKernel = Callable[[jax.Array, Sequence[jax.Array], jax.Array], jax.Array]
# A per-layer shape -> the program's kernel for it and the literals it takes.
Program = Callable[[tuple[int, ...]], tuple[ProgramKernel, np.ndarray]]
# (base, experts, numbers, key, statistics) -> float32 tensor.
TensorMerge = Callable[..., jax.Array]

MLP, ALL = "mlp", "all"
JIT, PMAP = "jit", "pmap"
RESULT, INPUTS = "result", "inputs"
DTYPES = ("float32", "bfloat16", "float16")
_VOCABULARY = ("embed", "head")


def merge(
    method: str,
    base: models.Params | None,
    experts: Sequence[models.Params] | Mapping[str, models.Params],
    **options: Any,
) -> models.Params:
  """Merges models; see `Merger`, which does it many times for less.

  Args:
    method: a name in `METHODS`.
    base: parameters, layers stacked as in models/decoder.py; None for methods
      that need none.
    experts: parameters of the same structure, shapes and dtypes.
    **options: those of `Merger.merge`, the method's parameters among them.

  Returns:
    Parameters like the base's, or where there is none the first expert's.

  Raises:
    MergeError: naming the tensor or the parameter, and what is wrong with it.
  """
  return Merger(base, experts).merge(method, **options)


class Merger:
  """Models that are merged many times, checked once.

  Where embeddings and heads have different numbers of rows, those that all
  models have are merged; the others stay the base's.

  Attributes:
    notes: what a user should know of vocabularies that differ.
  """

  def __init__(
      self,
      base: models.Params | None,
      experts: Sequence[models.Params] | Mapping[str, models.Params],
      *,
      scope: str = ALL,
      mode: str = JIT,
  ):
    """Checks that the models fit each other and hold finite numbers.

    Args:
      base: parameters, layers stacked; on one device, or sharded over a mesh
        of automatic axes: results lie as the base does. None: there is none.
      experts: parameters of the same structure, or name -> parameters; the
        names are for errors.
      scope: `mlp` merges the MLP's weights, as the paper does, and leaves the
        others the base's; `all` merges every leaf.
      mode: `jit`, or `pmap`: layers are dealt out to all devices, and leaves
        without layers merged where they lie.

    Raises:
      MergeError: naming the model, the tensor and what is wrong with it.
    """
    if not isinstance(experts, Mapping):
      experts = {str(i): expert for i, expert in enumerate(experts)}
    if not experts:
      raise MergeError("there are no experts to merge")
    named = ({} if base is None else {"the base": base}) | {
        f"expert {name}": tree for name, tree in experts.items()
    }
    self._has_base = base is not None
    _check_alike(named, any_rows=self._has_base)
    _check_finite(named)
    template = base if self._has_base else next(iter(experts.values()))
    leaves, self._structure = jax.tree_util.tree_flatten_with_path(template)
    self._paths = [_name(path) for path, _ in leaves]
    self._template = [leaf for _, leaf in leaves]
    self._experts = [jax.tree.leaves(expert) for expert in experts.values()]
    self._scope = scope
    self._deals = mode == PMAP
    # Kernel -> leaves that it has merged; a run's programs come and go.
    self._compiled = weakref.WeakKeyDictionary()
    self._inputs = {
        i: self._input(i, stacked)
        for (stacked, _), indices in self._kinds().items()
        for i in indices
    }
    self.notes = self._vocabulary_notes(list(experts))

  def merge(
      self,
      method: str,
      *,
      dtype: Any = None,
      out_dtype: Any = None,
      seed: int = 0,
      statistics: Sequence[models.Params] | None = None,
      into: models.Params | None = None,
      **parameters: Any,
  ) -> models.Params:
    """Merges by a method of `METHODS`.

    Args:
      method: its name.
      dtype: what the arithmetic is rounded to, step by step, as mergekit's is;
        None: float32, rounded once at the end.
      out_dtype: of the result, what it cannot hold becoming infinite; None:
        `dtype`, or else the base's.
      seed: of random methods, below 2**32.
      statistics: an entry an expert, for methods that use data.
      into: a former result, whose buffers are used again: do not use it
        afterwards. New memory costs several times the merge.
      **parameters: the method's; a number, or where there is one an expert a
        sequence of them. `lambda` is spelled `lambda_`.

    Returns:
      Parameters like the base's; leaves out of scope are the base's own.

    Raises:
      MergeError: naming the parameter and what is wrong with it.
    """
    if method not in methods.METHODS:
      raise MergeError(
          f"no merge method {method!r}; there are {', '.join(methods.METHODS)}"
      )
    kind = methods.METHODS[method]
    if kind.base == "required" and not self._has_base:
      raise MergeError(f"{method} needs a base model")
    count = len(self._experts)
    kind.check_experts(count)
    for name, value in (("dtype", dtype), ("out_dtype", out_dtype)):
      if value is not None and _dtype_name(value) not in DTYPES:
        raise MergeError(f"{name} is {value}; supported: {', '.join(DTYPES)}")
    if not 0 <= seed < 2**32:
      raise MergeError(f"seed is {seed}; it has to be in [0, 2**32)")
    self._check_statistics(kind, statistics)
    if into is not None and jax.tree.structure(into) != self._structure:
      raise MergeError("into is no former result: it has other leaves")
    fn, numbers = bound(kind, kind.bind(parameters, count), dtype)
    merged, _ = self._apply(
        lambda shape: (fn, numbers),
        out_dtype=out_dtype or dtype,
        check=None,
        seed=seed if kind.random else None,
        statistics=statistics if kind.statistics else None,
        into=into,
    )
    return merged

  def _check_statistics(self, kind: methods.Method, statistics):
    if kind.statistics is None:
      if statistics is not None:
        raise MergeError(f"{kind.name} takes no statistics")
      return
    count = len(self._experts)
    if len(statistics or []) != count:
      raise MergeError(
          f"{kind.name} needs {kind.statistics} statistics, one for each of the"
          f" {count} experts: see merging.calibration"
      )
    if self.notes:
      raise MergeError(
          f"{kind.name} needs models of one vocabulary: {self.notes[0]}"
      )
    if kind.statistics != "fisher":
      return
    for tree in statistics:
      found = _shapes(tree)
      for path, leaf in zip(self._paths, self._template, strict=True):
        if path not in found or found[path].shape != leaf.shape:
          raise MergeError(
              f"fisher statistics do not fit the models: {path} is"
              f" {found[path].shape if path in found else 'absent'} there and"
              f" {leaf.shape} in them"
          )

  def run(
      self, program: Program, into: models.Params | None = None
  ) -> tuple[models.Params, bool]:
    """Merges by an admitted program.

    Args:
      program: gives the kernel of each per-layer shape.
      into: see `merge`.

    Returns:
      (parameters like the base's, whether all of them are finite).
    """

    def of_shape(shape):
      kernel, literals = program(shape)
      return of_program(kernel), literals

    return self._apply(of_shape, check=RESULT, into=into)

  @property
  def shapes(self) -> list[tuple[int, ...]]:
    """The distinct per-layer shapes that a merge meets, sorted."""
    return sorted({shape for _, shape in self._kinds()})

  def _apply(
      self,
      of_shape,
      *,
      out_dtype=None,
      check: str | None,
      seed: int | None = None,
      statistics=None,
      into=None,
  ) -> tuple[models.Params, bool]:
    merged = list(self._template)
    reused = [None] * len(merged) if into is None else jax.tree.leaves(into)
    is_random = seed is not None
    data = [_statistic_leaves(tree, self._paths) for tree in statistics or ()]
    # Looked up here: the cache of kernels does not lock, and threads would
    # make one twice.
    tasks = []
    for (stacked, shape), indices in self._kinds().items():
      fn, numbers = of_shape(shape)
      for i in indices:
        leaf = self._template[i]
        deals = stacked and self._deals
        compiled = kernel(
            fn,
            stacked=stacked,
            dtype=jnp.dtype(out_dtype or leaf.dtype),
            layout=None if deals else _layout(leaf),
            check=check,
            deals=deals,
        )
        tasks.append((i, compiled, stacked, numbers, deals))

    def arguments(task):
      i, _, stacked, numbers, deals = task
      leaf = self._template[i]
      place = _deal if deals else lambda x: x
      key, layers = None, None
      if is_random:
        key = leaf_key(seed, self._paths[i])
        if stacked:
          layers = place(np.arange(len(leaf), dtype=np.int32))
      return (
          place(_room(reused[i], leaf, out_dtype or leaf.dtype)),
          *self._inputs[i],
          layers,
          numbers,
          key,
          [place(leaves[i]) for leaves in data],
      )

    # A new program costs more to compile than to apply, and XLA compiles
    # outside of Python's lock: kinds are compiled side by side. They are
    # started one after the other: devices have to meet in the same order.
    new = {
        (task[1], self._template[task[0]].shape): task
        for task in tasks
        if not task[-1] and task[0] not in self._compiled.get(task[1], ())
    }
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      list(
          pool.map(lambda t: t[1].lower(*arguments(t)).compile(), new.values())
      )
    for i, compiled, *_ in tasks:
      self._compiled.setdefault(compiled, set()).add(i)
    finite = []
    for task in tasks:
      i, compiled, *_, deals = task
      found, is_finite = compiled(*arguments(task))
      merged[i] = _gather(found, len(self._template[i])) if deals else found
      if len(found.devices()) > 1 and jax.default_backend() == "cpu":
        # Two programs that wait for all devices can take each other's threads.
        jax.block_until_ready(found)
      finite.append(is_finite)
    tree = jax.tree.unflatten(self._structure, merged)
    return tree, all(np.all(flag) for flag in finite) if check else True

  def _input(self, i: int, stacked: bool):
    """(base or None, experts) of a leaf, where they are merged."""
    place = _deal if stacked and self._deals else lambda x: x
    base = place(self._template[i]) if self._has_base else None
    return base, [place(tree[i]) for tree in self._experts]

  def _kinds(self) -> dict[tuple[bool, tuple[int, ...]], list[int]]:
    """(is stacked, shape of what is merged) -> the numbers of such leaves."""
    kinds = collections.defaultdict(list)
    for i, (path, leaf) in enumerate(
        zip(self._paths, self._template, strict=True)
    ):
      if in_scope(path, self._scope):
        stacked = path.startswith("layers/")
        rows = min(len(leaf), *(len(tree[i]) for tree in self._experts))
        shape = leaf.shape[1:] if stacked else (rows, *leaf.shape[1:])
        kinds[stacked, shape].append(i)
    return kinds

  def _vocabulary_notes(self, names: Sequence[str]) -> list[str]:
    if self._scope != ALL or "embed" not in self._paths:
      return []
    embed = self._paths.index("embed")
    rows = len(self._template[embed])
    of_experts = [len(tree[embed]) for tree in self._experts]
    shared = min(rows, *of_experts)
    return [
        f"expert {name} has {n} rows of vocabulary, the base {rows}: the"
        f" first {shared} are merged, the others stay the base's"
        for name, n in zip(names, of_experts, strict=True)
        if n != rows
    ]


def in_scope(path: str, scope: str) -> bool:
  """Whether the leaf "layers/mlp/up", say, is merged in that scope."""
  return scope == ALL or "mlp" in path.split("/")


@functools.lru_cache(maxsize=1024)
def leaf_key(seed: int, path: str) -> jax.Array:
  """The PRNG key of a leaf; a layer's is folded from it."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))


def bound(
    method: methods.Method, values: Mapping[str, Any], dtype: Any
) -> tuple[TensorMerge, dict[str, np.ndarray]]:
  """A method with its ints and bools put in, and its floats as arrays.

  Args:
    method: which.
    values: of `method.bind`.
    dtype: see `Merger.merge`.

  Returns:
    (a function that is the same object for the same ints, bools and dtype,
    numbers it takes, float32).
  """
  kinds = {p.argument: p.kind for p in method.parameters}
  fixed = {k: v for k, v in values.items() if kinds[k] is not float}
  numbers = {
      k: np.asarray(v, np.float32)
      for k, v in values.items()
      if kinds[k] is float
  }
  dtype = None if dtype is None else jnp.dtype(dtype)
  return _of_method(method, tuple(sorted(fixed.items())), dtype), numbers


@functools.lru_cache(maxsize=256)
def _of_method(method, fixed, dtype) -> TensorMerge:
  round_to = methods.rounding(dtype or jnp.float32)

  def narrow(x):
    """In `dtype`; one that lies in it already is widened where it is used."""
    if dtype is None or x.dtype == dtype:
      return x
    return round_to(x.astype(jnp.float32))

  def fn(base, experts, numbers, key, statistics):
    extra = {"key": key} if method.random else {}
    if method.statistics:
      extra["statistics"] = statistics
    # Accelerators multiply matrices in fewer bits unless they are told.
    with jax.default_matmul_precision("float32"):
      return method.fn(
          None if base is None or method.base == "ignored" else narrow(base),
          [narrow(expert) for expert in experts],
          round=round_to,
          **extra,
          **numbers,
          **dict(fixed),
      )

  fn.reassociates = True
  return fn


@functools.lru_cache(maxsize=64)
def of_program(kernel: ProgramKernel) -> TensorMerge:
  """A program's kernel as a merge; the same object for the same kernel."""

  def fn(base, experts, literals, key, statistics):
    del key, statistics
    wide = base.astype(jnp.float32)
    taus = [expert.astype(jnp.float32) - wide for expert in experts]
    return kernel(wide, taus, literals)

  fn.reassociates = False
  return fn


def _layout(leaf: jax.Array) -> jax.sharding.Sharding | None:
  """Where the result has to lie; None: where its inputs do."""
  sharding = getattr(leaf, "sharding", None)
  return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


# A compiled kernel takes 3 MB and more, and a run meets thousands.
@functools.lru_cache(maxsize=64)
def kernel(
    fn: TensorMerge,
    *,
    stacked: bool,
    dtype: np.dtype,
    layout: jax.sharding.Sharding | None = None,
    check: str | None = None,
    deals: bool = False,
) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
  """`fn` compiled, over layers where there are some; once a shape.

  Args:
    fn: for one tensor.
    stacked: whether leaves have layers.
    dtype: of the result.
    layout: of the result; None: that of the inputs.
    check: whether to tell if the result is finite (`RESULT`), or the models as
      well (`INPUTS`); None: neither.
    deals: whether leaves have a leading axis of devices besides, see `_deal`.

  Returns:
    (into, base, experts, layers, numbers, key, statistics) -> (merged, whether
    it is finite or None). `into` is an array like the result, whose memory is
    used for it; `layers` are the layers' numbers, int32, where there is a key.
  """

  def one(base, experts, layer, numbers, key, statistics):
    if layer is not None:
      key = jax.random.fold_in(key, layer)
    return fn(base, experts, numbers, key, statistics).astype(dtype)

  def merge_leaf(into, base, experts, layers, numbers, key, statistics):
    del into  # Its memory is the result's.
    rows = min(len(expert) for expert in experts)
    rows = rows if base is None else min(rows, len(base))
    shared = jax.tree.map(lambda x: x[:rows], (base, experts))
    over_layers = one
    if stacked:
      of_layers = None if layers is None else 0
      over_layers = jax.vmap(one, (0, 0, of_layers, None, None, 0))
    merged = over_layers(*shared, layers, numbers, key, statistics)
    if base is not None and rows < len(base):
      merged = jnp.concatenate([merged, base[rows:].astype(dtype)])
    if check is None:
      return merged, None
    inputs = [x for x in (base, *experts) if x is not None]
    is_finite = are_finite([merged])
    if check == INPUTS:
      is_finite &= are_finite(inputs)
    return merged, is_finite

  if deals:
    # pmap of JAX 0.10 mixes up axes where some arguments have none.
    dealt = jax.pmap(merge_leaf, donate_argnums=0)
    copies = lambda x: jnp.broadcast_to(x, (jax.local_device_count(), *x.shape))

    def on_all(into, base, experts, layers, numbers, key, statistics):
      numbers, key = jax.tree.map(copies, (numbers, key))
      return dealt(into, base, experts, layers, numbers, key, statistics)

    return on_all
  # LLVM vectorises a sum only if it may reorder it; NaN and infinities stay.
  # A program computes as its author wrote it.
  fast = fn.reassociates and jax.default_backend() == "cpu"
  return jax.jit(
      merge_leaf,
      donate_argnums=0,
      keep_unused=True,
      out_shardings=(layout, None),
      compiler_options={"xla_cpu_enable_fast_math": True} if fast else None,
  )


def _room(former: jax.Array | None, leaf: jax.Array, dtype: Any) -> jax.Array:
  """An array to write a result like `leaf` into; the former result if it fits.

  A leaf that was not merged is no result.
  """
  fits = former is not None and former is not leaf
  if fits and former.shape == leaf.shape and former.dtype == dtype:
    return former
  return jnp.zeros(leaf.shape, dtype, device=getattr(leaf, "sharding", None))


def _deal(x: jax.Array | np.ndarray | None) -> jax.Array | None:
  """[layers, ...] as [devices, layers a device, ...], filled with the last."""
  if x is None:
    return None
  devices = jax.local_devices()
  share = -(-len(x) // len(devices))
  missing = len(devices) * share - len(x)
  if missing:
    x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
  x = x.reshape(len(devices), share, *x.shape[1:])
  mesh = jax.make_mesh(
      (len(devices),),
      ("devices",),
      axis_types=(jax.sharding.AxisType.Auto,),  # pmap knows no other.
      devices=devices,
  )
  spec = jax.sharding.PartitionSpec("devices")
  return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


def _gather(x: jax.Array, layers: int) -> jax.Array:
  """What `_deal` dealt out."""
  return x.reshape(-1, *x.shape[2:])[:layers]


def are_finite(arrays: Sequence[jax.Array]) -> jax.Array:
  """Whether all numbers of arrays of one shape are, in one pass over them."""
  is_bad = functools.reduce(jnp.logical_or, [~jnp.isfinite(x) for x in arrays])
  bad, good = select.row_sums(
      [is_bad.astype(jnp.int32), (~is_bad).astype(jnp.int32)]
  )
  return jnp.all(bad == 0) & jnp.all(good == is_bad.shape[-1])


all_finite = jax.jit(lambda x: are_finite([x]))


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _dtype_name(dtype: Any) -> str:
  try:
    return str(jnp.dtype(dtype))
  except TypeError:
    return str(dtype)


def _shapes(params: models.Params) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {_name(path): leaf for path, leaf in leaves}


def _check_alike(named: Mapping[str, models.Params], any_rows: bool):
  """Raises where the models differ in names, dtypes or shapes.

  With `any_rows` embeddings and heads may have different numbers of rows.
  """
  (first, tree), *others = named.items()
  expected = _shapes(tree)
  for name, other in others:
    found = _shapes(other)
    for path in sorted(expected.keys() | found.keys()):
      ours, theirs = expected.get(path), found.get(path)
      if ours is None or theirs is None:
        where = name if theirs is None else first
        raise MergeError(
            f"{name} does not fit {first}: {where} has no {path}; experts have"
            " to be fine-tunes of one model"
        )
      skipped = 1 if any_rows and path in _VOCABULARY else 0
      if ours.shape[skipped:] != theirs.shape[skipped:]:
        raise MergeError(
            f"{name} does not fit {first}: {path} is {theirs.shape} there and"
            f" {ours.shape} in {first}; experts have to be fine-tunes of one"
            " model"
        )
      if ours.dtype != theirs.dtype:
        raise MergeError(
            f"{name} does not fit {first}: {path} is {theirs.dtype} there and"
            f" {ours.dtype} in {first}; convert one of them"
        )


def _check_finite(named: Mapping[str, models.Params]):
  """Raises where a model holds what is not a number or infinite."""
  flags = {
      (name, path): all_finite(leaf)
      for name, tree in named.items()
      for path, leaf in _shapes(tree).items()
  }
  for (name, path), flag in flags.items():
    if not flag:
      raise MergeError(
          f"{name} holds numbers in {path} that are not finite; merging would"
          " spread them"
      )


def _statistic_leaves(tree, paths: Sequence[str]) -> list[jax.Array | None]:
  """A statistic for each path; None where the tree has none."""
  found = _shapes(tree)
  return [found.get(path) for path in paths]
