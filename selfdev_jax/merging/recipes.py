"""Recipes: mergekit's YAML, read strictly and planned tensor by tensor.

`read` checks all that can be checked without the models, `plan` says for each
tensor of the output which tensors it is made of and with which parameters.
Semantics are those of mergekit 0.1.5 (https://github.com/arcee-ai/mergekit);
what is not supported is refused by key and line, never ignored.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import difflib
import math
import os
import pathlib
from typing import Any
from typing import NoReturn

import yaml

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax.merging import methods

DTYPES = ("float32", "bfloat16", "float16")

_TOP = (
    "models",
    "slices",
    "merge_method",
    "base_model",
    "dtype",
    "out_dtype",
    "parameters",
    "tokenizer_source",
    "chat_template",
)
# What mergekit knows beyond these, and the way out.
_REFUSED = {
    "modules": "use models or slices",
    "tokenizer": "use tokenizer_source",
    "residual_weight": "take it out",
}
# mergekit's choice of a dtype for masks. Recipes of all methods have it; here
# no mask is stored.
_INT8_MASK = methods.Parameter("int8_mask", bool, False)
_STRING = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"

Scalar = float | int | bool


class RecipeError(errors.UserError):
  """What is wrong with a recipe, as "FILE:LINE: ..."."""


@dataclasses.dataclass(frozen=True)
class Case:
  """The value of a parameter for the tensors that `filter` matches.

  Attributes:
    filter: what the name of a tensor has to contain; None: all match.
    values: one, or a gradient over the layers of a slice.
  """

  filter: str | None
  values: tuple[Scalar, ...]


@dataclasses.dataclass(frozen=True)
class Setting:
  """What a recipe says of one parameter at one place; the first case wins."""

  cases: tuple[Case, ...]
  line: int


Settings = Mapping[str, Setting]


@dataclasses.dataclass(frozen=True)
class Input:
  """A model that a slice takes layers from.

  Attributes:
    model: a directory or `org/name[@revision]`.
    layers: [begin, end) of its layers; None: all.
    parameters: for this model alone.
    line: in the recipe.
  """

  model: str
  layers: tuple[int, int] | None
  parameters: Settings
  line: int


@dataclasses.dataclass(frozen=True)
class Slice:
  """Consecutive layers of the output, and what they are made of.

  Attributes:
    inputs: all of as many layers, the base model among them.
    base: one of their models; None where the method has none.
    parameters: for this slice.
  """

  inputs: tuple[Input, ...]
  base: str | None
  parameters: Settings


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A recipe that has been checked.

  Attributes:
    path: its file, for errors.
    text: the file's contents.
    method: a key of `methods.METHODS`.
    slices: in the order of the output's layers; one for a list of models.
    base: the recipe's base model.
    dtype: of the arithmetic, one of `DTYPES`; None: see `merging.merge`.
    out_dtype: likewise of the output.
    parameters: for all slices.
    tokenizer_source: "base", "union", a model or None; see vocabulary.py.
    chat_template: "auto", "chatml", a template or None; see vocabulary.py.
    line: of the method.
  """

  path: str
  text: str
  method: str
  slices: tuple[Slice, ...]
  base: str | None
  dtype: str | None
  out_dtype: str | None
  parameters: Settings
  tokenizer_source: str | None
  chat_template: str | None
  line: int

  @property
  def models(self) -> tuple[str, ...]:
    """All models, the base model first, then as the recipe names them."""
    named = [entry.model for part in self.slices for entry in part.inputs]
    first = [] if self.base is None else [self.base]
    return tuple(dict.fromkeys(first + named))


@dataclasses.dataclass(frozen=True)
class Source:
  """A tensor of an input: its model, its layer there, its name in the file."""

  model: str
  layer: int | None
  name: str


@dataclasses.dataclass(frozen=True)
class Step:
  """How one tensor of the output is made.

  Attributes:
    path: of the leaf, as in `models.Params`: "layers/mlp/up" or "embed".
    layer: which of the leaf's layers; None where it has none.
    name: the tensor's name in the file.
    sources: the tensors that are merged.
    base: which of them is the base; None where the method has none.
    parameters: by name, those shared as scalars, those per expert as tuples in
      the order of the experts: the sources without the base.
  """

  path: str
  layer: int | None
  name: str
  sources: tuple[Source, ...]
  base: int | None
  parameters: dict[str, Scalar | tuple[Scalar, ...]]


# Reading.


class _Loader(yaml.SafeLoader):
  """The safe loader, which would take the last of two equal keys."""

  def compose_mapping_node(self, anchor):
    node = super().compose_mapping_node(anchor)
    seen = set()
    for key, _ in node.value:
      if not isinstance(key, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(
            problem="a key has to be text", problem_mark=key.start_mark
        )
      if key.tag != _MERGE and key.value in seen:
        raise yaml.MarkedYAMLError(
            problem=f"key {key.value!r} is given twice",
            problem_mark=key.start_mark,
        )
      seen.add(key.value)
    self.flatten_mapping(node)
    return node


@dataclasses.dataclass(frozen=True)
class _Node:
  """A value in a recipe that knows where it stands.

  Attributes:
    path: the file.
    key: what it is the value of, for errors.
    yaml: the value.
    line: of its key, or its own in a list.
  """

  path: str
  key: str
  yaml: yaml.Node
  line: int

  def fail(self, message: str) -> NoReturn:
    raise _error(self.path, self.line, message)

  def mapping(self, known: Sequence[str], kind: str = "key") -> dict[str, Any]:
    """Its entries; keys other than `known` are refused."""
    if not isinstance(self.yaml, yaml.MappingNode):
      self.fail(f"{self.key} has to be a mapping")
    entries = {}
    for key, value in self.yaml.value:
      line = key.start_mark.line + 1
      if key.value not in known:
        raise _error(self.path, line, _unknown(kind, key.value, known))
      entries[key.value] = _Node(self.path, key.value, value, line)
    return entries

  def optional(self, known: Sequence[str]) -> dict[str, Any]:
    """Its entries without those that are null."""
    entries = self.mapping(known)
    return {k: node for k, node in entries.items() if node.yaml.tag != _NULL}

  def sequence(self) -> list["_Node"]:
    if not isinstance(self.yaml, yaml.SequenceNode):
      self.fail(f"{self.key} has to be a list")
    if not self.yaml.value:
      self.fail(f"{self.key} is empty")
    return [
        _Node(self.path, self.key, value, value.start_mark.line + 1)
        for value in self.yaml.value
    ]

  def scalar(self) -> Any:
    if not isinstance(self.yaml, yaml.ScalarNode):
      self.fail(f"{self.key} has to be a single value")
    try:
      return yaml.constructor.SafeConstructor().construct_object(self.yaml)
    except (yaml.YAMLError, ValueError):
      self.fail(f"{self.key} {self.yaml.value!r} cannot be read")

  def text(self) -> str:
    if self.yaml.tag != _STRING or not self.yaml.value:
      self.fail(f"{self.key} has to be text; quote it")
    return self.yaml.value


def _error(path: str, line: int, message: str) -> RecipeError:
  return RecipeError(f"{path}:{line}: {' '.join(message.split())}")


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
  if name in _REFUSED:
    return f"key {name!r} is not supported; {_REFUSED[name]}"
  near = difflib.get_close_matches(name, known, n=1)
  if near:
    return f"unknown {kind} {name!r}; did you mean {near[0]!r}?"
  return f"unknown {kind} {name!r}; known: {', '.join(known) or 'none'}"


def read(path: str | os.PathLike) -> Recipe:
  """Reads a recipe and checks what needs no model.

  Args:
    path: a YAML file as mergekit takes it, with the keys models or slices,
      merge_method, base_model, dtype, out_dtype, parameters, tokenizer_source
      and chat_template.

  Raises:
    RecipeError: naming the line and the key that is unknown, not supported,
      given twice, missing, or of a wrong type or value.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise RecipeError(f"recipe {path} cannot be read: {error}") from None
  top = _compose(str(path), text)
  entries = top.optional(_TOP)
  if "merge_method" not in entries:
    top.fail("merge_method is missing")
  name = entries["merge_method"].text()
  if name not in methods.METHODS:
    entries["merge_method"].fail(
        _unknown("merge_method", name, methods.METHODS)
    )
  method = methods.METHODS[name]
  if "models" in entries and "slices" in entries:
    entries["slices"].fail("slices beside models; give one of the two")
  if not entries.keys() & {"models", "slices"}:
    top.fail("models is missing, or slices in its place")
  base = entries.get("base_model")
  if "models" in entries:
    slices = (_models(entries["models"], base, method),)
  else:
    slices = tuple(
        _slice(node, base, method) for node in entries["slices"].sequence()
    )
  for key in ("dtype", "out_dtype"):
    if key in entries and entries[key].text() not in DTYPES:
      entries[key].fail(
          f"{key} {entries[key].text()!r} is not supported; take one of"
          f" {', '.join(DTYPES)}"
      )
  optional = {
      key: entries[key].text() if key in entries else None
      for key in ("dtype", "out_dtype", "tokenizer_source", "chat_template")
  }
  return Recipe(
      str(path),
      text,
      name,
      slices,
      None if base is None else _model(base),
      parameters=_settings(entries.get("parameters"), method),
      line=entries["merge_method"].line,
      **optional,
  )


def _compose(path: str, text: str) -> _Node:
  try:
    node = _Loader(text).get_single_node()
  except yaml.MarkedYAMLError as error:
    mark = error.problem_mark or error.context_mark
    raise _error(path, mark.line + 1, str(error.problem)) from None
  except yaml.reader.ReaderError as error:
    line = text.count("\n", 0, error.position) + 1
    raise _error(path, line, "a character that YAML does not allow") from None
  except RecursionError:
    raise RecipeError(f"{path} is nested too deeply") from None
  if node is None:
    raise RecipeError(f"{path}:1: the recipe is empty")
  return _Node(path, "a recipe", node, node.start_mark.line + 1)


def _models(node: _Node, base: _Node | None, method: methods.Method) -> Slice:
  """A list of whole models as the one slice that it is."""
  inputs = [_input(entry, method, ()) for entry in node.sequence()]
  # mergekit adds it whatever the method does with it.
  if base is not None and _model(base) not in [x.model for x in inputs]:
    inputs.append(Input(_model(base), None, {}, base.line))
  return _checked(node, inputs, base, {}, method)


def _slice(node: _Node, base: _Node | None, method: methods.Method) -> Slice:
  entries = node.optional(("sources", "base_model", "parameters"))
  if "sources" not in entries:
    node.fail("sources is missing")
  sources = entries["sources"]
  inputs = [
      _input(entry, method, ("layer_range",)) for entry in sources.sequence()
  ]
  lengths = [entry.layers[1] - entry.layers[0] for entry in inputs]
  for entry, length in zip(inputs, lengths, strict=True):
    if length != lengths[0]:
      message = (
          f"layer_range of {entry.model} has {length} layers, that of"
          f" {inputs[0].model} {lengths[0]}; a slice takes as many of each"
      )
      raise _error(node.path, entry.line, message)
  return _checked(
      sources,
      inputs,
      entries.get("base_model", base),
      _settings(entries.get("parameters"), method),
      method,
  )


def _checked(
    node: _Node,
    inputs: Sequence[Input],
    base: _Node | None,
    parameters: Settings,
    method: methods.Method,
) -> Slice:
  """The slice, after a look at what the method asks of its inputs."""
  names = [entry.model for entry in inputs]
  for i, entry in enumerate(inputs):
    if entry.model in names[:i]:
      raise _error(node.path, entry.line, f"{entry.model} is listed twice")
  if method.base == "ignored":
    base = None
  elif method.base == "required" and base is None:
    node.fail(f"{method.name} needs base_model")
  chosen = None if base is None else _model(base)
  if base is not None and chosen not in names:
    node.fail(
        f"base_model {chosen} is not one of the sources; {method.name}"
        " merges into it"
    )
  experts = len(names) - (base is not None)
  low, high = method.min_experts, method.max_experts
  if experts < low or (high is not None and experts > high):
    beside = "" if base is None else " beside base_model"
    node.fail(
        f"{method.name} merges {_count(low, high)}{beside}, not {experts}"
        f" ({', '.join(name for name in names if name != chosen)})"
    )
  return Slice(tuple(inputs), chosen, parameters)


def _count(low: int, high: int | None) -> str:
  if low == high:
    return f"{low} model{'s' if low > 1 else ''}"
  return f"{low} or more models" if high is None else f"{low} to {high} models"


def _input(
    node: _Node, method: methods.Method, required: Sequence[str]
) -> Input:
  entries = node.optional(("model", *required, "parameters"))
  for key in ("model", *required):
    if key not in entries:
      node.fail(f"{key} is missing")
  layers = None
  if "layer_range" in entries:
    layers = _layer_range(entries["layer_range"])
  return Input(
      _model(entries["model"]),
      layers,
      _settings(entries.get("parameters"), method, of_model=True),
      entries["model"].line,
  )


def _model(node: _Node) -> str:
  if isinstance(node.yaml, yaml.MappingNode):
    node.fail(
        f"{node.key} as a mapping (lora, override_architecture) is not"
        " supported; give a directory or org/name[@revision]"
    )
  model = node.text()
  if "+" in model:
    node.fail(
        f"{node.key} {model}: a LoRA adapter behind a + is not supported;"
        " apply it with launch.convert --adapter"
    )
  return model


def _layer_range(node: _Node) -> tuple[int, int]:
  bounds = [entry.scalar() for entry in node.sequence()]
  if len(bounds) != 2 or any(type(bound) is not int for bound in bounds):
    node.fail("layer_range has to be two whole numbers, [begin, end)")
  begin, end = bounds
  if not 0 <= begin < end:
    node.fail(f"layer_range [{begin}, {end}) holds no layers")
  return begin, end


def _settings(
    node: _Node | None, method: methods.Method, *, of_model: bool = False
) -> Settings:
  """The parameters that stand at one place.

  Args:
    node: the mapping; None: there is none.
    method: whose parameters they are.
    of_model: whether the place is one model's, where mergekit reads those per
      expert only.
  """
  if node is None:
    return {}
  known = {p.name: p for p in (_INT8_MASK, *method.parameters)}
  kind = f"parameter of {method.name}"
  settings = {}
  for name, value in node.mapping(list(known), kind).items():
    if of_model and not known[name].per_expert:
      value.fail(
          f"{name} is not a parameter of a single model; put it under the"
          " recipe's parameters or a slice's"
      )
    settings[name] = Setting(_cases(value, known[name]), value.line)
  return settings


def _cases(node: _Node, parameter: methods.Parameter) -> tuple[Case, ...]:
  if isinstance(node.yaml, yaml.MappingNode):
    return (_case(node, parameter),)
  if isinstance(node.yaml, yaml.SequenceNode):
    entries = node.sequence()
    filtered = [isinstance(x.yaml, yaml.MappingNode) for x in entries]
    if all(filtered):
      return tuple(_case(entry, parameter) for entry in entries)
    if any(filtered):
      node.fail(f"{node.key} mixes numbers and filters in one list")
  return (Case(None, _values(node, parameter)),)


def _case(node: _Node, parameter: methods.Parameter) -> Case:
  entries = node.optional(("filter", "value"))
  if "value" not in entries:
    node.fail(f"value is missing in {node.key}")
  name = entries["filter"].text() if "filter" in entries else None
  value = dataclasses.replace(entries["value"], key=node.key)
  return Case(None if name == "*" else name, _values(value, parameter))


def _values(node: _Node, parameter: methods.Parameter) -> tuple[Scalar, ...]:
  """One value, or those of a gradient."""
  if isinstance(node.yaml, yaml.SequenceNode):
    return tuple(_scalar(entry, parameter) for entry in node.sequence())
  return (_scalar(node, parameter),)


def _scalar(node: _Node, parameter: methods.Parameter) -> Scalar:
  """A value of the parameter's kind and in its range."""
  value = node.scalar()
  if parameter.kind is bool:
    if value not in (False, True):  # Recipes have 0 and 1 as well.
      node.fail(f"{node.key} has to be true or false, not {value!r}")
    return bool(value)
  try:
    # YAML takes 1e-5, which has no point, for text.
    number = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not math.isfinite(number):
    node.fail(f"{node.key} has to be a number, not {node.yaml.value!r}")
  if parameter.kind is int:
    if not number.is_integer():
      node.fail(f"{node.key} has to be a whole number, not {number:g}")
    number = int(number)
  try:
    return parameter.check(number)
  except methods.MergeError as error:
    node.fail(str(error))


# Planning.


def plan(
    recipe: Recipe, configs: Mapping[str, models.DecoderConfig]
) -> tuple[models.DecoderConfig, tuple[Step, ...]]:
  """Says what every tensor of the output is made of.

  The embedding is made as the first slice says and the final norm and the head
  as the last one does, both at the beginning of gradients. Whether the tensors
  fit each other is not looked at.

  Args:
    recipe: what `read` returned.
    configs: of each of `recipe.models`.

  Returns:
    (config of the output, a step a tensor in the order of the family's table).
    The config is the base model's, or else the first's, with the layers of the
    slices; whether a layer has a window follows the slice's first source.

  Raises:
    RecipeError: naming the line, if a layer is not in its model, a parameter is
      missing for a tensor, or models have other kinds of tensors.
  """
  first = recipe.models[0]
  table = convert.FAMILIES[configs[first].family].table
  for model in recipe.models:
    if convert.FAMILIES[configs[model].family].table != table:
      message = (
          f"{model} is of family {configs[model].family}, {first} of"
          f" {configs[first].family}: their tensors differ"
      )
      raise _error(recipe.path, recipe.line, message)
  slices = [_bounded(recipe, part, configs) for part in recipe.slices]
  config = _output_config(recipe, configs, slices)
  layers = [
      (part, offset, t)
      for part in slices
      for offset, t in enumerate(_positions(part))
  ]
  steps = []
  for path, pattern in table.items():
    if path.startswith("layers/"):
      for i, (part, offset, t) in enumerate(layers):
        steps.append(_step(recipe, part, path, pattern, i, offset, t))
    elif path != "head" or not config.tied_head:
      part = slices[0] if path == "embed" else slices[-1]
      steps.append(_step(recipe, part, path, pattern, None, None, 0.0))
  return config, tuple(steps)


def _bounded(
    recipe: Recipe, part: Slice, configs: Mapping[str, models.DecoderConfig]
) -> Slice:
  """The slice with a range of layers for every input, checked."""
  inputs = []
  expected = configs[part.inputs[0].model].layers
  for entry in part.inputs:
    layers = configs[entry.model].layers
    if entry.layers is None and layers != expected:
      message = (
          f"{entry.model} has {layers} layers, {part.inputs[0].model}"
          f" {expected}; choose as many of each with slices"
      )
      raise _error(recipe.path, entry.line, message)
    begin, end = entry.layers or (0, layers)
    if end > layers:
      message = (
          f"layer_range [{begin}, {end}) is outside of {entry.model}, which has"
          f" {layers} layers"
      )
      raise _error(recipe.path, entry.line, message)
    inputs.append(dataclasses.replace(entry, layers=(begin, end)))
  return dataclasses.replace(part, inputs=tuple(inputs))


def _output_config(
    recipe: Recipe,
    configs: Mapping[str, models.DecoderConfig],
    slices: Sequence[Slice],
) -> models.DecoderConfig:
  config = configs[recipe.models[0]]
  if recipe.slices[0].inputs[0].layers is None:  # Whole models.
    return config
  local = []
  for part in slices:
    theirs = configs[part.inputs[0].model]
    windowed = theirs.local or (False,) * theirs.layers
    local += windowed[slice(*part.inputs[0].layers)]
  has_window = config.window is not None and any(local)
  return dataclasses.replace(
      config,
      layers=len(local),
      local=tuple(local) if has_window else (),
      window=config.window if has_window else None,
  )


def _positions(part: Slice) -> list[float]:
  """Where on a gradient each layer of a slice is, in [0, 1]."""
  begin, end = part.inputs[0].layers
  last = end - begin - 1
  return [i / last for i in range(last + 1)] if last else [1.0]


def _step(
    recipe: Recipe,
    part: Slice,
    path: str,
    pattern: str,
    layer: int | None,
    offset: int | None,
    t: float,
) -> Step:
  """The step of one tensor; `offset` is its layer's place in the slice."""
  name = pattern.format(layer)
  sources = []
  for entry in part.inputs:
    theirs = None if offset is None else entry.layers[0] + offset
    sources.append(Source(entry.model, theirs, pattern.format(theirs)))
  parameters = {}
  method = methods.METHODS[recipe.method]
  for parameter in method.parameters:
    if not parameter.per_expert:
      scopes = (part.parameters, recipe.parameters)
      value = _resolve(recipe, parameter, scopes, name, t)
      if value is None:
        message = f"{parameter.name} is missing for {name}"
        raise _error(recipe.path, recipe.line, message)
      parameters[parameter.name] = value
      continue
    values = []
    for entry, source in zip(part.inputs, sources, strict=True):
      if entry.model == part.base:
        continue
      scopes = (entry.parameters, part.parameters, recipe.parameters)
      value = _resolve(recipe, parameter, scopes, source.name, t)
      if value is None:
        message = (
            f"{parameter.name} of {entry.model} is missing for {source.name}"
        )
        raise _error(recipe.path, entry.line, message)
      values.append(value)
    parameters[parameter.name] = tuple(values)
  chosen = [entry.model for entry in part.inputs]
  base = None if part.base is None else chosen.index(part.base)
  try:  # Values that are right alone may not go together.
    method.bind(parameters, len(chosen) - (base is not None))
  except methods.MergeError as error:
    raise _error(recipe.path, recipe.line, f"{error}, for {name}") from None
  return Step(path, layer, name, tuple(sources), base, parameters)


def _resolve(
    recipe: Recipe,
    parameter: methods.Parameter,
    scopes: Sequence[Settings],
    tensor: str,
    t: float,
) -> Scalar | None:
  """The value of the first scope that has one for the tensor, or the default.

  A scope none of whose filters match leaves it to the next one.
  """
  for settings in scopes:
    setting = settings.get(parameter.name)
    for case in setting.cases if setting else ():
      if case.filter is None or case.filter in tensor:
        value = interpolate(case.values, t)
        if parameter.kind is not int:
          return value
        if value != int(value):
          message = f"{parameter.name} is {value:g} for {tensor}, not whole"
          raise _error(recipe.path, setting.line, message)
        return int(value)
  return parameter.default


def interpolate(values: Sequence[Scalar], t: float) -> Scalar:
  """The value of a gradient, linear between its numbers.

  Args:
    values: evenly spaced over [0, 1]; of booleans the one at `t` or next below
      is taken.
    t: in [0, 1].
  """
  place = t * (len(values) - 1)
  low = int(place)
  if isinstance(values[0], bool):
    return values[low]
  high = min(low + 1, len(values) - 1)
  part = place - low
  return (1 - part) * values[low] + part * values[high]
