"""Merges directories into a directory, a tensor at a time.

The models may be larger than the memory: while one tensor is merged, the next
one's inputs are read and the last one's result is written.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
from typing import Any

import jax
import numpy as np

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax.merging import calibration
from selfdev_jax.merging import card
from selfdev_jax.merging import engine
from selfdev_jax.merging import methods
from selfdev_jax.merging import recipes
from selfdev_jax.merging import vocabulary
from selfdev_jax.merging.methods import MergeError

# One is read, one merged; what is written is a third.
_AHEAD = 2
_VOCABULARY = ("embed", "head")
_OTHER_ROWS = (
    "if their vocabularies differ, set tokenizer_source: base or union"
)
_OTHER_SHAPE = "models have to be fine-tunes of one model"
_OTHER_DTYPE = "say in which dtype to merge them, as in dtype: bfloat16"


@dataclasses.dataclass(frozen=True)
class Task:
  """One tensor of the output.

  Attributes:
    name: in the output's file.
    inputs: (model, its tensor); the base's first where there is one.
    has_base: whether there is one.
    fn: merges them.
    numbers: what it takes.
    key: makes the PRNG key, where there is one.
    statistics: an entry an expert, or none.
    align: brings embeddings to one vocabulary.
    dtype: of the inputs, once they are aligned; None: that of their files.
  """

  name: str
  inputs: tuple[tuple[str, convert.Tensor], ...]
  has_base: bool
  fn: engine.TensorMerge
  numbers: Any
  key: Callable[[], jax.Array] | None = None
  statistics: tuple[Any, ...] = ()
  align: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]] | None = None
  dtype: np.dtype | None = None


class _Buffers:
  """Host memory that is used again: new pages cost more than a merge."""

  def __init__(self):
    self._free = collections.defaultdict(list)

  def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
      return self._free[shape, dtype].pop()
    except IndexError:
      return convert.aligned_empty(shape, dtype)

  def give(self, buffer: np.ndarray):
    self._free[buffer.shape, buffer.dtype].append(buffer)


class MergedLeaf(convert.Lazy):
  """A leaf of the output: its tensors are merged when they are asked for."""

  def __init__(
      self, tasks: Sequence[Task], shape: tuple[int, ...], dtype: np.dtype
  ):
    """Leaves everything to `tensors`.

    Args:
      tasks: one a layer, or one.
      shape: [layers, ...], or the tensor's own.
      dtype: of the result.
    """
    self.shape, self.dtype = shape, np.dtype(dtype)
    self._tasks = tasks

  def attach(
      self, readers: concurrent.futures.Executor, on_tensor: Callable[[], Any]
  ):
    """Says who reads ahead, and who is told of each tensor that is done."""
    # An executor in `tensors` would be shut down wherever a generator that was
    # not finished is collected, and that may be where threads are made.
    self._readers, self._on_tensor = readers, on_tensor

  def __len__(self) -> int:
    return len(self._tasks)

  @property
  def signature(self) -> Any:
    """What it compiles for; leaves that agree in it share their kernels."""
    fns = {task.fn for task in self._tasks}
    return tuple(fns), self._abstract(), self.dtype

  def compile(self):
    """Compiles its kernels, so that they are there when tensors are."""
    _, like, inputs = self._abstract()
    inputs = [jax.ShapeDtypeStruct(*x) for x in inputs]
    base, experts = _split(self._tasks[0], inputs)
    out = jax.ShapeDtypeStruct(like, self.dtype)
    for fn in {task.fn for task in self._tasks}:
      task = self._tasks[0]
      key = None if task.key is None else task.key()
      engine.kernel(
          fn, stacked=False, dtype=self.dtype, check=engine.INPUTS
      ).lower(
          out, base, experts, None, task.numbers, key, list(task.statistics)
      ).compile()

  def _abstract(self):
    """(has a base, the result's shape, shapes and dtypes of the inputs)."""
    task = self._tasks[0]
    like = self.shape[-len(task.inputs[0][1].shape) :]
    return (
        task.has_base,
        like,
        tuple(
            (like, task.dtype or convert.DTYPES[t.dtype])
            for _, t in task.inputs
        ),
    )

  def tensors(self) -> Iterator[np.ndarray]:
    """Each is good until the next one is asked for."""
    buffers = _Buffers()
    tasks = iter(self._tasks)
    reads, running = collections.deque(), None

    def read_ahead():
      for task in itertools.islice(tasks, _AHEAD - len(reads)):
        reads.append((task, self._readers.submit(_read, task, buffers)))

    read_ahead()
    while reads or running:
      started = None
      if reads:
        task, read = reads.popleft()
        inputs, owned = read.result()
        out = _empty(inputs[0].shape, self.dtype)
        started = task, owned, _start(task, inputs, out, self.dtype)
      if running:
        task, owned, (merged, finite) = running
        if not finite:
          raise MergeError(_blame(task))
        yield np.asarray(merged)
        self._on_tensor()
        for buffer in owned:
          buffers.give(buffer)
        for _, tensor in task.inputs:
          tensor.forget()
      read_ahead()
      running = started


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
  """To be donated, so no other's memory; made by NumPy, nothing is compiled."""
  return jax.device_put(np.empty(shape, dtype), may_alias=False)


def _read(task: Task, buffers: _Buffers):
  """(arrays of a task's inputs, the buffers under them)."""
  found, owned = {}, []
  for model, tensor in task.inputs:
    # As it lies in the file, if XLA can use that: nothing is copied.
    found[model] = array = tensor.mapped()
    if array is None:
      array = buffers.take(tensor.shape, convert.DTYPES[tensor.dtype])
      tensor.read_into(array)
      found[model] = array
      owned.append(array)
  arrays = found if task.align is None else task.align(found)
  return [jax.device_put(a, may_alias=True) for a in arrays.values()], owned


def _start(task: Task, inputs, out, dtype):
  """Dispatches a merge: (result, whether it and all inputs are finite)."""
  kernel = engine.kernel(
      task.fn, stacked=False, dtype=dtype, check=engine.INPUTS
  )
  key = None if task.key is None else task.key()
  return kernel(
      out, *_split(task, inputs), None, task.numbers, key, list(task.statistics)
  )


def _split(task: Task, inputs):
  return (inputs[0], inputs[1:]) if task.has_base else (None, inputs)


def _blame(task: Task) -> str:
  """Which of a task's tensors is not finite."""
  for model, tensor in task.inputs:
    buffer = convert.aligned_empty(tensor.shape, convert.DTYPES[tensor.dtype])
    tensor.read_into(buffer)
    if not engine.all_finite(buffer):
      return (
          f"{model} holds numbers in {tensor.name} that are not finite; merging"
          " would spread them"
      )
  return f"the merge gives numbers in {task.name} that are not finite"


# --- Recipes ----------------------------------------------------------------


def merge_recipe(
    recipe: recipes.Recipe,
    out: str | os.PathLike,
    *,
    seed: int = 0,
    calibration_file: str | None = None,
) -> models.DecoderConfig:
  """Does what a recipe says and writes a Hugging Face directory.

  Args:
    recipe: of `recipes.read`.
    out: made anew, whole or not at all; an existing one is replaced.
    seed: of random methods.
    calibration_file: see `calibration.read_texts`; for methods that use data.

  Returns:
    The output's shape.

  Raises:
    UserError: naming the recipe's line, the model or the tensor.
  """
  method = methods.METHODS[recipe.method]
  opened = {name: _open(name) for name in recipe.models}
  _check_out(out, opened)
  configs = {name: model.config for name, model in opened.items()}
  config, steps = recipes.plan(recipe, configs)
  _check_heads(config, opened)
  tokenizers = _tokenizers(recipe, opened)
  aligned = _vocabulary(recipe, opened, tokenizers)
  if aligned is not None:
    config = dataclasses.replace(config, vocab_size=aligned.size)
  if aligned is not None and method.statistics:
    raise MergeError(
        f"{method.name} does not go with tokenizer_source: statistics are of"
        " the models' own vocabularies"
    )
  statistics = _statistics(method, opened, calibration_file)
  grouped = collections.defaultdict(list)
  for step in steps:
    grouped[step.path].append(
        _task(step, recipe, method, opened, aligned, statistics, seed)
    )
  leaves: models.Params = {}
  for path, tasks in grouped.items():
    dtype = recipe.out_dtype or recipe.dtype
    _check_layers(config, path, tasks, recipe.dtype is None)
    convert.set_path(leaves, path, _leaf(path, tasks, dtype, aligned))
  _save(
      out,
      config,
      leaves,
      _like(recipe, opened),
      None if aligned is None else aligned.tokenizer,
      vocabulary.chat_template(recipe.chat_template, tokenizers),
      card.card(
          recipe.text,
          recipe.method,
          recipe.models,
          recipe.base,
          pathlib.Path(out).name,
      ),
  )
  return config


def _like(recipe, opened) -> pathlib.Path:
  """Whose settings the output has: the ids in them are of a tokenizer."""
  source = recipe.tokenizer_source
  if source not in (None, vocabulary.BASE, vocabulary.UNION):
    return convert.resolve(source)
  first = next(iter(opened)) if recipe.base is None else recipe.base
  return opened[first].directory


def _check_out(out: str | os.PathLike, opened: Mapping[str, "_Model"]):
  """Raises where writing the output would delete what is merged."""
  out = pathlib.Path(out).resolve()
  for name, model in opened.items():
    if out in model.directory.resolve().parents:
      raise MergeError(f"{out} holds {name}, which is merged into it")


def _check_heads(config: models.DecoderConfig, opened: Mapping[str, "_Model"]):
  """Raises where some models tie the head to the embedding and others not."""
  for name, model in opened.items():
    if model.config.tied_head != config.tied_head:
      tied, own = (
          ("the output", name) if config.tied_head else (name, "the output")
      )
      raise MergeError(
          f"{tied} ties its head to the embedding (tie_word_embeddings), {own}"
          " has one of its own: it would be lost"
      )


@dataclasses.dataclass(frozen=True)
class _Model:
  directory: pathlib.Path
  config: models.DecoderConfig
  leaves: models.Params


def _open(name: str) -> _Model:
  directory = convert.resolve(name)
  return _Model(directory, *convert.open_leaves(directory))


def _tokenizers(recipe, opened) -> dict[str, Any]:
  """Of the models, where the recipe needs any."""
  if recipe.tokenizer_source is None and recipe.chat_template is None:
    return {}
  found = {
      name: convert.load_tokenizer(model.directory)
      for name, model in opened.items()
  }
  source = recipe.tokenizer_source
  if source not in (None, vocabulary.BASE, vocabulary.UNION, *found):
    found[source] = convert.load_tokenizer(convert.resolve(source))
  return found


def _vocabulary(recipe, opened, tokenizers) -> vocabulary.Vocabulary | None:
  if recipe.tokenizer_source is None:
    return None
  sizes = {name: model.config.vocab_size for name, model in opened.items()}
  return vocabulary.align(
      recipe.tokenizer_source, recipe.base, tokenizers, sizes
  )


def _statistics(method, opened, calibration_file) -> dict[str, models.Params]:
  """Of each model, where the method uses data."""
  if method.statistics is None:
    if calibration_file is not None:
      raise MergeError(f"{method.name} takes no --calibration")
    return {}
  if calibration_file is None:
    raise MergeError(
        f"{method.name} needs a calibration set: give --calibration=FILE, .txt"
        " with a text a line or .jsonl"
    )
  texts = calibration.read_texts(calibration_file)
  compute = getattr(calibration, method.statistics)
  found = {}
  with progress.bar("Calibrating", len(opened), "model") as bar:
    for name, model in opened.items():
      encode = convert.load_tokenizer(model.directory).encode
      config, params = convert.load(model.directory)
      found[name] = compute(config, params, [encode(text) for text in texts])
      bar.update()
  return found


def _task(step, recipe, method, opened, aligned, statistics, seed) -> Task:
  sources = list(step.sources)
  has_base = method.base != "ignored" and step.base is not None
  if has_base:
    sources.insert(0, sources.pop(step.base))
  inputs = tuple(
      (s.model, _tensor(opened[s.model], step.path, s)) for s in sources
  )
  of_vocabulary = step.path in _VOCABULARY
  aligns = aligned is not None and of_vocabulary
  _check_inputs(
      step.name,
      inputs,
      _OTHER_DTYPE if recipe.dtype is None else None,
      of_vocabulary=of_vocabulary,
      skipped=int(aligns),
  )
  experts = sources[1:] if has_base else sources
  values = method.bind(step.parameters, len(experts))
  fn, numbers = engine.bound(method, values, recipe.dtype)

  def key():
    leaf = engine.leaf_key(seed, step.path)
    return leaf if step.layer is None else jax.random.fold_in(leaf, step.layer)

  data = [statistics[s.model] for s in experts if statistics]
  align, dtype = None, None
  if aligns:
    dtype = np.dtype(recipe.dtype or convert.DTYPES[inputs[0][1].dtype])
    align = functools.partial(vocabulary.rows, aligned, dtype=dtype)
  return Task(
      step.name,
      inputs,
      has_base,
      fn,
      numbers,
      key if method.random else None,
      tuple(
          _part(tree, step.path, source.layer)
          for tree, source in zip(data, experts, strict=False)
      ),
      align,
      dtype,
  )


def _tensor(model: _Model, path: str, source: recipes.Source) -> convert.Tensor:
  try:
    leaf = convert.get_path(model.leaves, path)
  except KeyError:
    raise MergeError(f"{source.model} has no tensor {source.name}") from None
  return leaf.parts[source.layer or 0]


def _part(tree: models.Params, path: str, layer: int | None) -> Any:
  """Of a statistic what belongs to one tensor; None where it has nothing."""
  try:
    found = convert.get_path(tree, path)
  except KeyError:
    return None
  return found if found is None or layer is None else found[layer]


def _check_inputs(
    name: str,
    inputs: Sequence[tuple[str, convert.Tensor]],
    other_dtype: str | None,
    *,
    of_vocabulary: bool = False,
    skipped: int = 0,
):
  """Raises where the tensors that are to be merged do not fit each other.

  Args:
    name: of the result.
    inputs: (model, its tensor).
    other_dtype: the way out where dtypes differ; None: they may.
    of_vocabulary: whether a row is a token's, and a recipe may align them.
    skipped: how many dimensions may differ.
  """
  (first, expected), *others = inputs
  for model, tensor in others:
    if tensor.shape[skipped:] != expected.shape[skipped:]:
      raise MergeError(
          f"{name} is {tensor.shape} in {model} and {expected.shape} in"
          f" {first}; {_way_out(of_vocabulary, tensor.shape, expected.shape)}"
      )
    if other_dtype is not None and tensor.dtype != expected.dtype:
      raise MergeError(
          f"{name} is {tensor.dtype} in {model} and {expected.dtype} in"
          f" {first}; {other_dtype}"
      )


def _way_out(of_vocabulary, shape, expected) -> str:
  if of_vocabulary and shape[1:] == expected[1:]:
    return _OTHER_ROWS
  return _OTHER_SHAPE


def _check_layers(
    config: models.DecoderConfig,
    path: str,
    tasks: Sequence[Task],
    same_dtype: bool,
):
  """Raises where slices are of models that do not fit each other."""
  like = convert.get_path(models.abstract_params(config), path).shape
  _, first = tasks[0].inputs[0]
  for task in tasks:
    model, tensor = task.inputs[0]
    expected = like[len(like) - len(tensor.shape) :]
    if task.align is None and tensor.shape != expected:
      raise MergeError(
          f"{tensor.name} is {tensor.shape} in {model}, and the output has"
          f" {expected} there; "
          + _way_out(path in _VOCABULARY, tensor.shape, expected)
      )
    if same_dtype and tensor.dtype != first.dtype:
      raise MergeError(
          f"{tensor.name} is {tensor.dtype} in {model}, {first.name}"
          f" {first.dtype}; {_OTHER_DTYPE}"
      )


def _leaf(path, tasks, dtype, aligned) -> MergedLeaf:
  _, first = tasks[0].inputs[0]
  shape = first.shape
  if tasks[0].align is not None:
    shape = (aligned.size, *shape[1:])
  if path.startswith("layers/"):
    shape = (len(tasks), *shape)
  return MergedLeaf(tasks, shape, dtype or convert.DTYPES[first.dtype])


def _save(out, config, leaves, like, tokenizer, template, text):
  """Compiles what the leaves need side by side, then writes the directory."""

  def finish(directory: pathlib.Path):
    own = tokenizer
    if own is None and template is not None:
      own = convert.load_tokenizer(like)
    if own is not None:
      for name in convert.TOKENIZER_FILES:  # What is not written anew is old.
        (directory / name).unlink(missing_ok=True)
      if template is not None:
        own.chat_template = template
      own.save_pretrained(directory)
    (directory / "README.md").write_text(text, encoding="utf-8")

  merged = [x for x in jax.tree.leaves(leaves) if isinstance(x, MergedLeaf)]
  kinds = {leaf.signature: leaf for leaf in merged}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(MergedLeaf.compile, kinds.values()))
  total = sum(len(leaf) for leaf in merged)
  with (
      concurrent.futures.ThreadPoolExecutor(_AHEAD) as readers,
      progress.bar("Merging", total, "tensor") as bar,
  ):
    for leaf in merged:
      leaf.attach(readers, bar.update)
    convert.save(out, config, leaves, like, finish=finish)


# --- Programs ---------------------------------------------------------------


def merge_program(
    of_shape: engine.Program,
    source: str,
    base: str,
    experts: Sequence[str],
    out: str | os.PathLike,
    scope: str,
) -> models.DecoderConfig:
  """Applies an admitted program and writes a Hugging Face directory.

  Args:
    of_shape: gives the program's kernel for each shape of `program_shapes`.
    source: the program's text, for the card.
    base: the seed model, a directory or `org/name[@revision]`.
    experts: likewise; in the order of the program's task vectors.
    out: made anew, whole or not at all; an existing one is replaced.
    scope: `mlp` or `all`; what is out of it is the base's.

  Returns:
    The output's shape.

  Raises:
    UserError: naming the model or the tensor.
  """
  names = [base, *experts]
  for i, name in enumerate(names):
    if name in names[:i]:
      raise MergeError(f"{name} is given twice among --base and --experts")
  opened = {name: _open(name) for name in names}
  config = opened[base].config
  table = convert.FAMILIES[config.family].table
  for name in experts:
    theirs = opened[name].config
    if convert.FAMILIES[theirs.family].table != table:
      raise MergeError(
          f"{name} is of family {theirs.family}, {base} of {config.family}:"
          " their tensors differ"
      )
    if theirs.layers != config.layers:
      raise MergeError(
          f"{name} has {theirs.layers} layers, {base} {config.layers};"
          f" {_OTHER_SHAPE}"
      )
  leaves: models.Params = {}
  for path, leaf, tensors in convert.named_leaves(config, opened[base].leaves):
    if not engine.in_scope(path, scope):
      convert.set_path(leaves, path, leaf)
      continue
    tasks = []
    for layer, name in enumerate(tensors):
      sources = [recipes.Source(model, layer, name) for model in opened]
      inputs = tuple(
          (s.model, _tensor(opened[s.model], path, s)) for s in sources
      )
      _check_inputs(name, inputs, "convert one of them")
      kernel, literals = of_shape(inputs[0][1].shape)
      fn = engine.of_program(kernel)
      tasks.append(Task(name, inputs, True, fn, literals))
    convert.set_path(leaves, path, _leaf(path, tasks, None, None))
  text = card.card(source, None, names, base, pathlib.Path(out).name)
  _save(out, config, leaves, opened[base].directory, None, None, text)
  return config


def program_shapes(base: str, scope: str) -> list[tuple[int, ...]]:
  """The shapes of the tensors that a program will meet, sorted."""
  config = convert.read_config(convert.resolve(base))
  abstract = models.abstract_params(config)
  return sorted(
      {
          leaf.shape[1:] if path.startswith("layers/") else leaf.shape
          for path, leaf, _ in convert.named_leaves(config, abstract)
          if engine.in_scope(path, scope)
      }
  )
