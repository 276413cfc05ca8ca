"""A run as frozen dataclasses, and the way to them from an ml_collections file.

Defaults are the paper's (Ishibashi et al., NAACL 2025) where the paper has a
value. A file in configs/ writes a `Config`, `to_config_dict` turns it into the
locked ConfigDict that absl flags can override, and `from_config_dict` checks
what came back.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import hashlib
import json
import types
import typing
from typing import Any

import ml_collections

from selfdev_jax import errors


class ConfigError(errors.UserError):
  """A key that is unknown, missing, ill-typed or out of range."""


def _between(default, low=None, high=None):
  """A field with a default that has to lie in [low, high]."""
  return dataclasses.field(default=default, metadata={"low": low, "high": high})


def _one_of(*choices):
  """A field that takes one of `choices`; the first is the default."""
  return dataclasses.field(default=choices[0], metadata={"choices": choices})


_PLACES = ("executor", "ray")  # Keys of `Config`, see `without_places`.

# Of a layer, as models/decoder.py names them.
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Propose:
  """How the factory is sampled (paper, section 3.1)."""

  prompt: str = "default"  # A name in programs/prompts/, or a file.
  samples: int = _between(3000, 1)  # Programs an iteration.
  temperature: float = _between(1.2, 0.0)  # T_1.
  temperature_decay: float = _between(0.2, 0.0)  # rho in T_1/(1 + rho(t - 1)).
  max_new_tokens: int = _between(512, 1)
  batch_size: int = _between(64, 1)


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """What a generated program may cost, while traced and afterwards."""

  timeout_s: float = _between(10.0, 0.1)  # Wall clock of one trace.
  memory_bytes: int = _between(1 << 30, 1 << 26)  # Beyond the zygote's own.
  output_bytes: int = _between(1 << 16, 0)  # stdout and stderr kept, in total.
  ir_bytes: int = _between(1 << 22, 1 << 10)  # The JSON program at most.
  max_equations: int = _between(5000, 1)
  max_flops: float = _between(1e11, 1.0)  # On the largest leaf.
  max_peak_multiple: float = _between(64.0, 1.0)  # Live values / input size.
  max_constants: int = _between(65_000, 0)  # Elements of literal arrays.


@dataclasses.dataclass(frozen=True)
class Vllm:
  """How a vLLM server takes part, where the sampler is one."""

  # How weights get there; the latter two are for GPUs, and experimental.
  transport: str = _one_of("shm", "cuda_ipc", "nccl")
  tensor_parallel: int = _between(1, 1)  # GPUs that share a model.
  gpu_memory_utilization: float = _between(0.4, 0.01, 1.0)  # JAX has the rest.
  start_timeout_s: float = _between(600.0, 1.0)
  stall_timeout_s: float = _between(1800.0, 1.0)  # Without any answer.


@dataclasses.dataclass(frozen=True)
class Merge:
  scope: str = _one_of("mlp", "all")  # The paper merges the MLP weights.
  timeout_s: float = _between(900.0, 0.1)  # Of one merge and its compilation.


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """How merged models are scored (paper, sections 3.2 and 4).

  Attributes:
    task: a name in evaluation/tasks.py.
    train_file: JSONL in the published format, which shots and the development
      set are drawn from; None: the hub's.
    test_file: likewise, with the test set.
    shots: worked examples in a prompt; None: as many as the field gives.
    split_seed: of the draw from the training split.
    dev_size: items of the development set.
    test_size: items of the test set.
    batch_size: items that are answered at once.
    max_new_tokens: of an answer.
    racing: a model that can no longer be chosen or rejected is not scored on
      all of the development set; see evaluation/racing.py.
    racing_block: items between two decisions.
    racing_error: with at most this probability one was stopped wrongly, in a
      race: of an iteration's programs, of a sweep, or at the end.
  """

  task: str = "arithmetic"
  train_file: str | None = None
  test_file: str | None = None
  shots: int | None = _between(None, 0)
  split_seed: int = _between(0, 0)
  dev_size: int = _between(300, 1)
  test_size: int = _between(1200, 1)
  batch_size: int = _between(300, 1)
  max_new_tokens: int = _between(20, 1)
  racing: bool = True
  racing_block: int = _between(100, 1)
  racing_error: float = _between(0.05, 1e-9, 0.5)


@dataclasses.dataclass(frozen=True)
class Preferences:
  """Scores to (chosen, rejected) pairs (paper, section 3.3)."""

  top_fraction: float = _between(0.03, 0.0, 1.0)  # p_w.
  bottom_fraction: float = _between(0.10, 0.0, 1.0)  # p_l.
  elites: int = _between(3, 0)  # Best of every earlier iteration, from t = 2.
  # Share of the rejected that did not run at all. 0 as in the paper.
  invalid_fraction: float = _between(0.0, 0.0, 1.0)
  pairing: str = _one_of("product", "matched")
  max_pairs: int = _between(20_000, 1)


@dataclasses.dataclass(frozen=True)
class Dpo:
  """DPO with LoRA (Rafailov et al., 2023; Hu et al., 2021), or of all weights.

  Attributes:
    loss: see dpo/loss.py.
    length_normalized: log-probabilities are means over tokens.
    sft_weight: of the mean negative log-likelihood of a chosen token.
    max_grad_norm: of all gradients together; 0: they are not clipped.
    batch_size: pairs a step.
    parts: a batch is computed in so many, one after the other, with one
      update: less memory, the same result.
    max_length: tokens of a prompt with one completion; None: the model's.
    trains: `lora`, or `full`: every weight.
    lora_targets: the matrices that get an adapter.
    rslora: the adapter is scaled by alpha / sqrt(rank) instead of alpha / rank.
    reference: `precomputed`: log-probabilities under the model and the adapter
      that training starts from, computed once; `adapter_off`: in each step,
      under the model without its adapter.
    layout: `shared`: a prompt stands in a row once, with two completions;
      `padded`: with one.
    remat: what the backward pass computes anew: all (`full`), or all but the
      products with weights (`dots`): faster, with more memory.
    fsdp: devices that share each weight.
    tensor: devices that share each product; the others share out the batch.
    save_every: steps between checkpoints.
  """

  loss: str = _one_of("sigmoid", "ipo", "hinge", "robust")
  beta: float = _between(0.01, 0.0)
  label_smoothing: float = _between(0.0, 0.0, 0.5)
  length_normalized: bool = False
  sft_weight: float = _between(0.0, 0.0)
  learning_rate: float = _between(1e-6, 0.0)
  warmup_fraction: float = _between(0.1, 0.0, 1.0)
  max_grad_norm: float = _between(1.0, 0.0)
  weight_decay: float = _between(0.0, 0.0)
  steps: int = _between(100, 1)
  batch_size: int = _between(16, 1)
  parts: int = _between(1, 1)
  max_length: int | None = _between(None, 2)
  trains: str = _one_of("lora", "full")
  lora_rank: int = _between(256, 1)
  lora_alpha: float = _between(256.0, 0.0)
  lora_targets: tuple[str, ...] = _MATRICES
  rslora: bool = False
  reference: str = _one_of("precomputed", "adapter_off")
  layout: str = _one_of("shared", "padded")
  remat: str = _one_of("full", "dots")
  fsdp: int = _between(1, 1)
  tensor: int = _between(1, 1)
  save_every: int = _between(50, 1)

  def __post_init__(self):
    if self.batch_size % self.parts:
      raise ConfigError(
          f"config key 'dpo.parts' is {self.parts}; it has to divide"
          f" 'dpo.batch_size', {self.batch_size}"
      )
    if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
      raise ConfigError(
          "config key 'dpo.label_smoothing' goes with the losses 'sigmoid' and"
          f" 'robust', not with {self.loss!r}"
      )
    if self.loss == "robust" and self.label_smoothing == 0.5:
      raise ConfigError(
          "config key 'dpo.label_smoothing' is 0.5; the loss 'robust' divides"
          " by 1 - 2 x 0.5"
      )
    if self.loss == "ipo" and not self.beta:
      raise ConfigError(
          "config key 'dpo.beta' is 0; the loss 'ipo' divides by it"
      )
    if self.trains == "full" and self.reference == "adapter_off":
      raise ConfigError(
          "config key 'dpo.reference' is 'adapter_off', but with 'dpo.trains'"
          " 'full' there is no adapter"
      )
    unknown = set(self.lora_targets) - set(_MATRICES)
    if unknown or not self.lora_targets:
      raise ConfigError(
          f"config key 'dpo.lora_targets' is {self.lora_targets!r}; it takes"
          f" one or more of {', '.join(map(repr, _MATRICES))}"
      )


@dataclasses.dataclass(frozen=True)
class Training:
  """One phase of the toy world's training: AdamW, warm-up, cosine."""

  steps: int = _between(0, 0)
  batch_size: int = _between(10, 1)
  length: int = _between(160, 8)  # Tokens a row.
  learning_rate: float = _between(1e-3, 0.0)


@dataclasses.dataclass(frozen=True)
class World:
  """The toy world: how a tiny seed model and its experts are made."""

  kind: str = _one_of("structured", "simple")
  seed: int = 0
  vocab_size: int = _between(375, 280)
  width: int = _between(128, 8)
  layers: int = _between(4, 1)
  heads: int = _between(4, 1)
  kv_heads: int = _between(2, 1)
  mlp: int = _between(320, 8)
  word_problems: int = _between(2000, 1)  # Documents in the pre-training mix.
  equations: int = _between(14_000, 0)
  programs: int = _between(900, 0)
  pretrain: Training = Training(
      steps=320, batch_size=12, length=192, learning_rate=4e-3
  )
  # One entry an operation: addition, subtraction, multiplication.
  skill_steps: tuple[int, ...] = (110, 110, 110)
  skill_learning_rates: tuple[float, ...] = (1e-3, 1e-3, 1e-3)
  skill_problems: int = _between(2500, 1)
  replay: float = _between(2 / 7, 0.0, 1.0)  # Share of other operations.
  house: Training = Training(steps=50, learning_rate=8e-3)

  def __post_init__(self):
    for name in ("skill_steps", "skill_learning_rates"):
      if len(getattr(self, name)) != 3:
        raise ConfigError(
            f"config key 'tiny.{name}' takes three values, one an operation"
        )
    if self.width % (2 * self.heads) or self.heads % self.kv_heads:
      raise ConfigError(
          "config keys 'tiny.width', 'tiny.heads' and 'tiny.kv_heads': twice"
          " the heads have to divide the width, the KV heads the heads"
      )


@dataclasses.dataclass(frozen=True)
class Ray:
  """Where a run over many hosts takes place; see executors/cluster.py.

  Attributes:
    address: HOST:PORT of a cluster's head; `auto`: of the cluster that this
      host is in; `local`: one is started on this machine, for this run.
    workers: how many merge and evaluate, each with vllm.tensor_parallel GPUs of
      one host where the cluster has GPUs; None: as many as it has room for.
    worker_cpus: that a worker takes of its host; may be a fraction.
    train_hosts: hosts that train together, with all GPUs of each.
    models: `path`: each host reads them where the config says, or has them from
      the hub; `store`: the head reads them, and each host keeps a copy that
      came through Ray's object store.
    start_timeout_s: until the first worker has to be ready, its models read.
  """

  address: str = "local"
  workers: int | None = _between(None, 1)
  worker_cpus: float = _between(1.0, 0.001)
  train_hosts: int = _between(1, 1)
  models: str = _one_of("path", "store")
  start_timeout_s: float = _between(600.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Config:
  """One run of Self-Developing.

  Attributes:
    name: stands in the report and in the archive.
    seed: every random key of the run is folded from it.
    seed_model: a Hugging Face directory, `org/name[@revision]` on the hub, or
      `tiny:NAME` for a model of the toy world that `tiny` describes.
    experts: likewise; each shares the seed model's architecture.
    iterations: T, rounds of propose, evaluate, refine.
    sampler: `vllm`; `jax`, which needs nothing else; `auto`: vLLM where it is
      installed; or `replay`, which says what was recorded.
    top_k: programs that are scored on the test set at the end.
    executor: `local`: this process does all of it; `ray`: the workers of a
      cluster do, and this process alone decides and writes the archive.
    tiny: the toy world behind `tiny:NAME`; None when real models are used.
  """

  name: str
  seed_model: str
  experts: tuple[str, ...]
  seed: int = _between(0, 0)
  iterations: int = _between(3, 1)
  top_k: int = _between(15, 1)
  sampler: str = _one_of("auto", "jax", "vllm", "replay")
  executor: str = _one_of("local", "ray")
  ray: Ray = Ray()
  vllm: Vllm = Vllm()
  propose: Propose = Propose()
  sandbox: Sandbox = Sandbox()
  merge: Merge = Merge()
  evaluate: Evaluate = Evaluate()
  preferences: Preferences = Preferences()
  dpo: Dpo = Dpo()
  tiny: World | None = None

  def temperature(self, iteration: int) -> float:
    """T_t = T_1 / (1 + rho (t - 1)), t counted from 1 (paper, section 3.1)."""
    p = self.propose
    return p.temperature / (1 + p.temperature_decay * (iteration - 1))


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """A locked ConfigDict with every key of `config`, for `--config` flags."""
  return ml_collections.ConfigDict(_with_placeholders(config)).lock()


def _with_placeholders(config):
  """Nested dict in which a None has a type, so that a flag can replace it."""
  hints, tree = typing.get_type_hints(type(config)), {}
  for name in hints:
    value = getattr(config, name)
    kinds = [k for k in typing.get_args(hints[name]) if k is not type(None)]
    if dataclasses.is_dataclass(value):
      value = _with_placeholders(value)
    elif value is None and not dataclasses.is_dataclass(kinds[0]):
      value = ml_collections.config_dict.placeholder(kinds[0])
    tree[name] = value
  return tree


def to_dict(config: Any) -> dict[str, Any]:
  """Nested plain dict of a config dataclass; tuples stay tuples."""
  return dataclasses.asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"dpo.beta": 0.1, ...} from a nested dict."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  """The nested dict that `flatten` was given."""
  tree = {}
  for key, value in flat.items():
    *groups, name = key.split(".")
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
    node[name] = value
  return tree


def without_places(flat: Mapping[str, Any]) -> dict[str, Any]:
  """A flat config without what says only where a run takes place.

  A run may go on elsewhere: its results do not depend on it.
  """
  return {
      key: value
      for key, value in flat.items()
      if key.partition(".")[0] not in _PLACES
  }


def digest(config: Any) -> str:
  """16 hex digits that name a config, wherever it runs."""
  tree = {k: v for k, v in to_dict(config).items() if k not in _PLACES}
  text = json.dumps(tree, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_config_dict(tree: Any, cls: type = Config) -> Any:
  """Checks a (nested) mapping and turns it into a frozen dataclass.

  Args:
    tree: a ConfigDict or dict with the fields of `cls`.
    cls: the dataclass to build.

  Returns:
    An instance of `cls`.

  Raises:
    ConfigError: naming the key, what it holds and what it should hold.
  """
  if isinstance(tree, ml_collections.ConfigDict):
    tree = tree.to_dict()
  return _build(cls, tree, "")


def _build(cls, tree, path):
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  for key in tree:
    if key not in fields:
      near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
      raise ConfigError(
          f"unknown config key '{path}{key}'; did you mean '{path}{near[0]}'?"
      )
  values = {}
  for name, field in fields.items():
    if name in tree:
      value = _coerce(tree[name], hints[name], path + name)
      _check_range(value, field.metadata, path + name)
      values[name] = value
    elif field.default is dataclasses.MISSING:
      raise ConfigError(f"config key '{path}{name}' is missing")
  return cls(**values)


def _coerce(value, hint, path):
  """`value` as the annotated type, or a ConfigError that says what is wrong."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    (hint,) = (arg for arg in args if arg is not type(None))
    return _coerce(value, hint, path)
  if origin is tuple:
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
      raise ConfigError(_ill_typed(path, value, "a tuple"))
    return tuple(
        _coerce(item, args[0], f"{path}[{i}]") for i, item in enumerate(value)
    )
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    if not isinstance(value, dict):
      raise ConfigError(_ill_typed(path, value, "a group of keys"))
    return _build(hint, value, f"{path}.")
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(_ill_typed(path, value, hint.__name__))
  return value


def _ill_typed(path, value, wanted):
  return f"config key '{path}' takes {wanted}, not {value!r}"


def _check_range(value, metadata, path):
  if value is None:  # Where the type allows it.
    return
  choices = metadata.get("choices")
  if choices and value not in choices:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"config key '{path}' is {value!r}; it takes one of"
        f" {', '.join(map(repr, choices))} (did you mean {near!r}?)"
    )
  low, high = metadata.get("low"), metadata.get("high")
  # `not (a <= b)` rather than `a > b`: NaN has to fail too.
  if (low is not None and not low <= value) or (
      high is not None and not value <= high
  ):
    bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
    raise ConfigError(f"config key '{path}' is {value}; it has to be {bounds}")
