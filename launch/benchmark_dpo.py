"""Measures a step of DPO against TRL 1.16's DPOTrainer, on the CPU.

  pip install -e .[bench]
  python -m launch.benchmark_dpo
  python -m launch.benchmark_dpo --ways="trl,trl unchecked" --splits=4:1

Both train the same random Mistral of 57.9M parameters (8 layers, 32,000 tokens,
untied) in float32 on the same token ids: 4 pairs a step, the longer row of each
256 tokens, prompt : completion as in --splits, the rejected completion up to an
eighth shorter than the chosen. No prompt is in two pairs. 2 batches take turns.
LoRA of rank 64, alpha 64, on all seven matrices, or all weights; beta 0.1,
gradients clipped to norm 1, AdamW without decay, linear warm-up from 0 and
cosine to 0. The reference's log-probabilities are computed before the first
step on both sides, except in the rows "online".

  trl            as its users run it: a model's path and a `LoraConfig`, its
                 defaults (gradient checkpointing, fused AdamW, its metrics)
                 but for what is said here. Only the preparation of the data
                 set is overridden, as it takes nothing but text; the order is
                 sequential, and metrics are logged each step.
  trl unchecked  without gradient checkpointing
  trl online     the reference in each step, too: with LoRA the adapter is
                 disabled for it; there is no such row for all weights
  ours padded    a row a completion, as TRL has
  ours shared    a row a prompt, which both completions share

Each is a process of its own that imports nothing of the other side, with as
many threads as there are cores. Those of a comparison are there together and
take turns of --block steps, in a drawn order, --rounds times, after --warm_up
steps; who waits computes nothing. CPU seconds are the process's, user and
system, of a whole step; medians over the rounds. TRL's has its log in it, ours
the metrics, but not the lines that `dpo.train` writes of them. What is compiled
falls into the warm-up: the JSON has its CPU seconds, "warm_up_cpu_s".
Peaks are the high-water mark of resident memory since the process began,
imports, the reference and mapped files included; "imported" is what was
resident before the model was read.

Parity, of each layout of ours with "trl", for LoRA and for all weights. Of the
first batch at the first of --splits, loss and gradients before clipping: at the
weights of the start (B is 0 there, and so are A's gradients) and at others,
where the policy is no longer its reference; of gradients a tensor's largest
difference by its largest. And the losses of --curve steps, which are the length
of every schedule, on 4 batches of a quarter of the tokens; float32 as it is,
not as it is logged.

In the JSON line "ratio_cpu_padded" and "ratio_cpu_prefix" are CPU seconds of
TRL's better row of the first two by ours, LoRA, at the first of --splits; the
other splits' are in "splits". "ratio_memory_lora" and "ratio_memory_full" are
the peak of "trl" by our shared layout's, beside them those of "trl unchecked".
None where a side was not asked for.

Measure on an idle machine: torch's threads wait for each other after every
operation, so that a core that is taken slows TRL down many times more.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags
import numpy as np
import safetensors.numpy

from selfdev_jax import errors
from selfdev_jax import progress

# JAX is imported where it is used: a child of TRL's must not have it, or it
# would count as TRL's memory.

_DECODERS = {
    "58m": {
        "vocab_size": 32_000,
        "embed": 512,
        "layers": 8,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 64,
        "mlp": 1536,
        "max_positions": 512,
    },
    # To see in a minute what this prints.
    "tiny": {
        "vocab_size": 128,
        "embed": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
        "mlp": 96,
        "max_positions": 64,
    },
}
_TOKENS = {"58m": 256, "tiny": 48}
_RANK = {"58m": 64, "tiny": 4}
_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
_LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}
_BETA = 0.1
_BETA_1 = 0.9  # Adam's, as both sides have by default.
_WARMUP = 0.1  # Of the schedule.
_PAIRS = 4
_BATCHES, _CURVE_BATCHES = 2, 4
_CURVE_SHARE = 4  # Of the tokens.
_STD = 0.02
# Of what is added for the other weights; log-probabilities move by some nats.
_MOVED_STD = {"lora": 0.05, "full": 0.01}
_EOS = 1

# Way -> what it changes.
_TRL = {
    "trl": {},
    "trl unchecked": {"checkpointing": False},
    "trl online": {"precompute": False},
    "trl online unchecked": {"precompute": False, "checkpointing": False},
}
_OURS = {
    "ours padded": {"layout": "padded"},
    "ours shared": {"layout": "shared"},
}
_BETTER_OF = ("trl", "trl unchecked")

_SHAPE = flags.DEFINE_enum("shape", "58m", list(_DECODERS), "Of the model.")
_WAYS = flags.DEFINE_list("ways", [*_TRL, *_OURS], "To measure.")
_TRAINS = flags.DEFINE_list("trains", ["lora", "full"], "What is trained.")
_SPLITS = flags.DEFINE_list(
    "splits", ["4:1", "1:1", "8:1"], "Prompt : completion; parity at the first."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Of each timing.", 1)
_WARM_UP = flags.DEFINE_integer("warm_up", 2, "Steps before them.", 1)
_BLOCK = flags.DEFINE_integer("block", 1, "Steps of a turn.", 1)
_CURVE = flags.DEFINE_integer("curve", 50, "Steps of the curve of losses.", 2)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "For models and logs; none: the temporary directory."
)


@dataclasses.dataclass(frozen=True)
class _Case:
  """What a child is to do; files are in `directory`, see `_write`."""

  way: str
  directory: str
  data: str  # Which pairs.
  trains: str  # "lora" or "full".
  steps: int  # Of the schedule.
  rank: int
  checkpointing: bool = True
  precompute: bool = True
  layout: str = "padded"

  @property
  def learning_rate(self) -> float:
    return _LEARNING_RATE[self.trains]

  def file(self, name: str) -> pathlib.Path:
    return pathlib.Path(self.directory) / name

  def pairs(self) -> dict[str, list[list[int]]]:
    return json.loads(self.file(f"{self.data}.json").read_text())


# --- A child ----------------------------------------------------------------


class _Turns:
  """Answers the parent's lines, one line each; measures steps.

  Both sides make it after their imports and before they read the model, and
  call `wait` between steps; it comes back when a step is due.

    {"do": "begin"}
    {"do": "steps", "n": 2}      -> {"cpu_s": s, "wall_s": s, "losses": [...]}
    {"do": "memory"}             -> {"peak_bytes": n, "imported_bytes": n}
    {"do": "gradients", "at": "moved", "to": file} -> {"loss": x}
    {"do": "end"}
  """

  def __init__(self, gradients):
    self._gradients = gradients
    # Whatever else prints does not get in between.
    self._out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    self._imported = _memory("VmRSS")
    self._due, self._losses = 0, []
    self._start = None
    self._answer({})
    sys.stdin.readline()  # The others have imported theirs, too.

  def wait(self, loss: float | None = None) -> bool:
    """Takes the loss of a step that is done; false if that was the last."""
    if loss is None:
      self._answer({})  # Ready.
    else:
      self._due -= 1
      self._losses.append(loss)
      if self._due:
        return True
      cpu, wall = (
          now - then for now, then in zip(_clocks(), self._start, strict=True)
      )
      self._answer({"cpu_s": cpu, "wall_s": wall, "losses": self._losses})
    return self._serve()

  def _serve(self) -> bool:
    for line in sys.stdin:
      asked = json.loads(line)
      if asked["do"] == "steps":
        self._due, self._losses = asked["n"], []
        self._start = _clocks()
        return True
      if asked["do"] == "memory":
        self._answer(
            {
                "peak_bytes": _memory("VmHWM"),
                "imported_bytes": self._imported,
            }
        )
      elif asked["do"] == "gradients":
        self._answer({"loss": self._gradients(asked["at"], asked["to"])})
      else:
        break
    return False

  def _answer(self, value: dict):
    print(json.dumps(value), file=self._out, flush=True)


def _clocks() -> tuple[float, float]:
  """(CPU seconds of this process, wall clock)."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime, time.perf_counter()


def _memory(field: str) -> int:
  """Bytes; of /proc, as ru_maxrss starts from the parent's own."""
  status = pathlib.Path("/proc/self/status").read_text()
  fields = dict(line.split(":", 1) for line in status.splitlines())
  return 1024 * int(fields[field].split()[0])


def _trl(case: _Case):
  """TRL's side."""
  import datasets
  import peft
  import torch
  import transformers
  import trl

  torch.set_num_threads(os.cpu_count())

  class Trainer(trl.DPOTrainer):
    """Takes token ids, and keeps the loss, which a log rounds."""

    def _prepare_dataset(self, dataset, *_):
      return dataset

    def compute_loss(self, *args, **kwargs):
      loss = super().compute_loss(*args, **kwargs)
      self.last_loss = loss.item()
      return loss

  def load(at):
    """Puts the policy's weights in place."""
    directory = case.file(f"{case.trains}-{at}")
    if case.trains == "lora":
      tensors = _read(directory / "adapter_model.safetensors")
      peft.set_peft_model_state_dict(trainer.model, tensors)
    else:
      trainer.model.load_state_dict(_read(directory / "model.safetensors"))

  def gradients(at, to):
    load(at)
    trainer.model.train()
    trainer.model.zero_grad()
    batch = [trainer.train_dataset[i] for i in range(_PAIRS)]
    trainer.compute_loss(trainer.model, trainer.data_collator(batch)).backward()
    # As in PEFT's files, which do not say which adapter it is.
    found = {
        name.replace(".default.", "."): parameter.grad.numpy()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    safetensors.numpy.save_file(found, to)
    trainer.model.zero_grad()
    return trainer.last_loss

  def _read(file):
    arrays = safetensors.numpy.load_file(file)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}

  turns = _Turns(gradients)

  class Callback(transformers.TrainerCallback):

    def on_train_begin(self, args, state, control, **_):
      control.should_training_stop = not turns.wait()

    def on_step_end(self, args, state, control, **_):
      control.should_training_stop = not turns.wait(trainer.last_loss)

  lora = peft.LoraConfig(
      r=case.rank,
      lora_alpha=case.rank,
      target_modules=[f"{name}_proj" for name in _TARGETS],
      task_type="CAUSAL_LM",
  )
  trainer = Trainer(
      model=str(case.file("full-start")),
      args=trl.DPOConfig(
          output_dir=str(case.file("trl")),
          max_steps=case.steps,
          per_device_train_batch_size=_PAIRS,
          learning_rate=case.learning_rate,
          lr_scheduler_type="cosine",
          warmup_steps=round(_WARMUP * case.steps),
          max_grad_norm=1.0,
          beta=_BETA,
          precompute_ref_log_probs=case.precompute,
          gradient_checkpointing=case.checkpointing,
          train_sampling_strategy="sequential",
          logging_steps=1,
          save_strategy="no",
          report_to="none",
          disable_tqdm=True,
          use_cpu=True,
          bf16=False,
      ),
      train_dataset=datasets.Dataset.from_dict(
          {f"{name}_ids": rows for name, rows in case.pairs().items()}
      ),
      peft_config=lora if case.trains == "lora" else None,
      callbacks=[Callback()],
  )
  if case.trains == "lora":
    load("start")
  trainer.train()


def _ours(case: _Case):
  """Our side; as `dpo.train`, without its checkpoints."""
  import jax

  jax.config.update("jax_platforms", "cpu")

  from selfdev_jax import config as config_lib
  from selfdev_jax import convert
  from selfdev_jax import models
  from selfdev_jax.dpo import step as step_lib

  config = config_lib.Dpo(
      beta=_BETA,
      learning_rate=case.learning_rate,
      warmup_fraction=_WARMUP,
      max_grad_norm=1.0,
      steps=case.steps,
      batch_size=_PAIRS,
      trains=case.trains,
      lora_rank=case.rank,
      lora_alpha=case.rank,
      layout=case.layout,
  )
  base = case.file("full-start")
  decoder = convert.read_config(base)
  mesh = step_lib.make_mesh(config)
  stepper = step_lib.stepper(config, decoder, np.dtype(np.float32), mesh)

  def load_model(name):
    shardings = models.shardings(decoder, mesh)
    return convert.load(case.file(name), shardings)[1]

  def load_trained(at):
    if case.trains == "full":
      return load_model(f"full-{at}")
    adapter = convert.load_adapter(case.file(f"lora-{at}"), decoder).params
    return step_lib.put(adapter, stepper.trained_shardings)

  def gradients(at, to):
    loss, found = _our_gradients(
        config, decoder, mesh, frozen, load_trained(at), plan.batch(0, logps)
    )
    _write_gradients(case, decoder, found, to)
    return loss

  turns = _Turns(gradients)
  plan = _plan(case)
  frozen = load_model("full-start") if case.trains == "lora" else {}
  trained = load_trained("start")
  logps = _reference(stepper, frozen, trained, plan)
  state = stepper.init(trained)
  del trained
  step, loss, batch = 0, None, plan.batch(0, logps)
  while turns.wait(loss):
    placed = step_lib.put(batch, stepper.batch_shardings)
    state, metrics = stepper.step(frozen, state, placed)
    step += 1
    batch = plan.batch(step % case.steps, logps)
    loss = float(jax.device_get(metrics)["loss"])


def _plan(case: _Case):
  """The pairs in their order, again and again."""
  from selfdev_jax.dpo import batches
  from selfdev_jax.dpo import data as data_lib

  pairs = case.pairs()
  count = len(pairs["prompt"])
  arrays = lambda rows: tuple(np.array(ids, np.int32) for ids in rows)
  data = data_lib.Data(
      prompts=arrays(pairs["prompt"]),
      completions=arrays(pairs["chosen"] + pairs["rejected"]),
      prompt_of=np.tile(np.arange(count, dtype=np.int32), 2),
      pairs=np.arange(2 * count, dtype=np.int32).reshape(2, count).T,
      source=np.arange(count, dtype=np.int32),
      counts=data_lib.Counts(),
  )
  per_row = batches.COMPLETIONS[case.layout]
  need = batches.most_tokens(
      data, batches.fill(data, range(2 * count), per_row)
  )
  return batches.Plan(
      data,
      np.resize(np.arange(count), (case.steps, 1, _PAIRS)),
      per_row,
      2 * _PAIRS // per_row,
      batches.shapes([need] * case.steps),
  )


def _reference(stepper, frozen, trained, plan) -> np.ndarray:
  """[completions] float32; of the batches before they recur."""
  import jax

  from selfdev_jax.dpo import batches
  from selfdev_jax.dpo import step as step_lib

  logps = np.zeros(len(plan.data.completions), np.float32)
  for step in range(len(plan.data.pairs) // _PAIRS):
    batch = plan.batch(step, logps)
    rows = step_lib.put(
        jax.tree.map(lambda leaf: leaf[0], batch.rows),
        batches.Rows(*(stepper.rows_sharding,) * 5),
    )
    found = np.asarray(stepper.reference(frozen, trained, rows)).reshape(-1)
    logps[plan.data.pairs[plan.order[step, 0]]] = found[batch.pairs[0]]
  return logps


def _our_gradients(config, decoder, mesh, frozen, trained, batch):
  """(loss, gradients), from what a first step leaves in Adam's mean."""
  import jax
  import optax

  from selfdev_jax.dpo import step as step_lib

  config = dataclasses.replace(config, max_grad_norm=0.0)
  stepper = step_lib.stepper(config, decoder, np.dtype(np.float32), mesh)
  batch = step_lib.put(batch, stepper.batch_shardings)
  state, metrics = stepper.step(frozen, stepper.init(trained), batch)
  mean = jax.device_get(optax.tree.get(state.optimizer, "mu"))
  return float(metrics["loss"]), jax.tree.map(
      lambda leaf: leaf / np.float32(1 - _BETA_1), mean
  )


def _write_gradients(case: _Case, decoder, found, to: str):
  """Under the names that TRL's side gives."""
  from selfdev_jax import convert

  with tempfile.TemporaryDirectory(dir=case.directory) as directory:
    made = pathlib.Path(directory) / "gradients"
    if case.trains == "lora":
      convert.save_adapter(
          made,
          found,
          config=decoder,
          rank=case.rank,
          alpha=case.rank,
          base="",
      )
    else:
      convert.save(made, decoder, found)
    (file,) = made.glob("*.safetensors")
    os.replace(file, to)


def _child(case: str):
  """Runs one side until the parent has no more steps for it."""
  case = _Case(**json.loads(case))
  (_trl if case.way in _TRL else _ours)(case)


# --- The parent -------------------------------------------------------------


class _Child:
  """A side in a process of its own."""

  def __init__(self, case: _Case):
    self._log = case.file(f"{case.way} {case.trains} {case.data}.log")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    environment.pop("XLA_FLAGS", None)  # One device, and XLA's defaults.
    with self._log.open("w") as log:
      self._process = subprocess.Popen(
          [
              *(sys.executable, "-m", "launch.benchmark_dpo", "--child"),
              json.dumps(dataclasses.asdict(case)),
          ],
          cwd=pathlib.Path(__file__).parents[1],
          env=environment,
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=log,
          text=True,
      )
    self.way = case.way

  def answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      said = self._log.read_text().strip().splitlines()
      raise errors.UserError(
          f"{self.way} ended: {said[-1] if said else 'it said nothing'}"
      )
    return json.loads(line)

  def ask(self, do: str, **values) -> dict:
    print(
        json.dumps({"do": do, **values}), file=self._process.stdin, flush=True
    )
    return self.answer()

  def close(self):
    """Ends it; whatever it does."""
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()


def _write(directory: pathlib.Path):
  """What the children read.

  full-start, full-moved     models, with a tokenizer of that many words
  lora-start, lora-moved     adapters
  4:1.json, ..., curve.json  "prompt", "chosen" and "rejected": rows of ids
  """
  import jax

  jax.config.update("jax_platforms", "cpu")

  from selfdev_jax import convert
  from selfdev_jax import models
  from selfdev_jax.dpo import lora

  config = models.DecoderConfig(**_DECODERS[_SHAPE.value])
  rank, rng = _RANK[_SHAPE.value], np.random.default_rng(0)
  _write_tokenizer(directory / "tokenizer", config.vocab_size)

  def begin(path, leaf):
    is_norm = path[-1].key.endswith("norm")
    return np.ones(leaf.shape, np.float32) if is_norm else noise(leaf, _STD)

  def noise(leaf, std):
    return rng.standard_normal(leaf.shape, np.float32) * np.float32(std)

  def move(trains, tree):
    std = _MOVED_STD[trains]
    return jax.tree.map(lambda leaf: np.asarray(leaf) + noise(leaf, std), tree)

  params = jax.tree_util.tree_map_with_path(
      begin, models.abstract_params(config)
  )
  adapter = lora.init(jax.random.key(0), config, rank)
  for name, change in (("start", lambda _, tree: tree), ("moved", move)):
    convert.save(
        directory / f"full-{name}",
        config,
        change("full", params),
        like=directory / "tokenizer",
    )
    convert.save_adapter(
        directory / f"lora-{name}",
        change("lora", adapter),
        config=config,
        rank=rank,
        alpha=rank,
        base=str(directory / "full-start"),
    )
  sizes = {split: (*_split_tokens(split), _BATCHES) for split in _SPLITS.value}
  prompt, completion, _ = sizes[_SPLITS.value[0]]
  sizes["curve"] = (
      prompt // _CURVE_SHARE,
      completion // _CURVE_SHARE,
      _CURVE_BATCHES,
  )
  for name, size in sizes.items():
    pairs = _draw_pairs(rng, config.vocab_size, *size)
    (directory / f"{name}.json").write_text(json.dumps(pairs))
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _write_tokenizer(directory: pathlib.Path, size: int):
  """Of words that nobody encodes; TRL asks for one."""
  import tokenizers
  import transformers

  words = {"<unk>": 0, "</s>": _EOS} | {f"w{i}": i for i in range(2, size)}
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer(
          tokenizers.models.WordLevel(words, "<unk>")
      ),
      eos_token="</s>",
      unk_token="<unk>",
  ).save_pretrained(directory)


def _split_tokens(split: str) -> tuple[int, int]:
  """(tokens of a prompt, of the longer completion)."""
  prompt, completion = map(int, split.split(":"))
  size = round(_TOKENS[_SHAPE.value] * prompt / (prompt + completion))
  return size, _TOKENS[_SHAPE.value] - size


def _draw_pairs(rng, vocab, prompt, completion, batches) -> dict[str, list]:
  """Pairs of prompts and completions of so many tokens."""
  draw = lambda size: rng.integers(_EOS + 1, vocab, size).tolist()
  end = lambda size: [*draw(size - 1), _EOS]
  shorter = lambda: completion - int(rng.integers(1, 2 + completion // 8))
  count = range(_PAIRS * batches)
  return {
      "prompt": [draw(prompt) for _ in count],
      "chosen": [end(completion) for _ in count],
      "rejected": [end(shorter()) for _ in count],
  }


def _ways(trains: str, split: str) -> list[str]:
  """What is compared; "online" for LoRA and at the first split alone."""
  has_online = trains == "lora" and split == _SPLITS.value[0]
  return [way for way in _WAYS.value if has_online or "online" not in way]


@contextlib.contextmanager
def _children(directory: pathlib.Path, ways, trains: str, data: str):
  """Yields way -> child; all are ready."""
  with contextlib.ExitStack() as stack:
    children = {}
    for way in ways:
      case = _Case(
          way=way,
          directory=str(directory),
          data=data,
          trains=trains,
          steps=_CURVE.value,
          rank=_RANK[_SHAPE.value],
          **(_TRL | _OURS)[way],
      )
      children[way] = _Child(case)
      stack.callback(children[way].close)
    for child in children.values():
      child.answer()
    for child in children.values():
      # One after the other: torch is slow beside others.
      child.ask("begin")
    yield children


def _compare(directory: pathlib.Path, trains: str, split: str) -> dict:
  """Times, memory and, at the first split, parity."""
  ways = _ways(trains, split)
  ours = [way for way in ways if way in _OURS]
  has_parity = "trl" in ways and ours and split == _SPLITS.value[0]
  result = {"trains": trains, "split": split}
  with _children(directory, ways, trains, split) as children:
    warm_up = {
        way: child.ask("steps", n=_WARM_UP.value)
        for way, child in children.items()
    }
    turns = _take_turns(children, f"{trains} {split}")
    result["ways"] = {
        way: _medians(turns[way])
        | child.ask("memory")
        | {"warm_up_cpu_s": warm_up[way]["cpu_s"]}
        for way, child in children.items()
    }
    if has_parity:
      result["parity"] = _parity(directory, children)
  if has_parity:
    result["curves"] = _curves(directory, ["trl", *ours], trains)
    for way, row in result["parity"].items():
      differences = np.subtract(result["curves"][way], result["curves"]["trl"])
      row["curve_diff"] = float(np.abs(differences).max())
  return result


def _take_turns(children, label: str) -> dict[str, list[dict]]:
  """Way -> its turns' answers."""
  turns = {way: [] for way in children}
  order = random.Random(0)
  with progress.bar(label, _ROUNDS.value, "round") as shown:
    for _ in range(_ROUNDS.value):
      for way in order.sample(list(children), len(children)):
        turns[way].append(children[way].ask("steps", n=_BLOCK.value))
      shown.update()
  return turns


def _medians(turns: list[dict]) -> dict:
  """Of a step."""
  return {
      clock: statistics.median(turn[clock] for turn in turns) / _BLOCK.value
      for clock in ("cpu_s", "wall_s")
  }


def _curves(directory: pathlib.Path, ways, trains: str) -> dict:
  """Way -> losses of all steps of the schedule."""
  with _children(directory, ways, trains, "curve") as children:
    return {
        way: child.ask("steps", n=_CURVE.value)["losses"]
        for way, child in children.items()
    }


def _parity(directory: pathlib.Path, children) -> dict:
  """Loss and gradients of each layout of ours with "trl"'s."""
  result = {way: {} for way in children if way in _OURS}
  for at in ("start", "moved"):
    file = directory / "gradients.safetensors"
    loss, gradients = _gradients(children["trl"], at, file)
    for way, row in result.items():
      our_loss, our_gradients = _gradients(children[way], at, file)
      row[at] = {
          "loss": our_loss,
          "loss_diff": abs(our_loss - loss),
          "grad_rel": _largest_difference(our_gradients, gradients),
      }
  return result


def _gradients(child: _Child, at: str, file: pathlib.Path):
  """(loss, name -> gradient)."""
  loss = child.ask("gradients", at=at, to=str(file))["loss"]
  return loss, safetensors.numpy.load_file(file)


def _largest_difference(ours: dict, theirs: dict) -> float:
  """Over the tensors, by the tensor's largest gradient."""
  if ours.keys() != theirs.keys():
    raise ValueError(f"other gradients: {sorted(ours.keys() ^ theirs.keys())}")
  worst = 0.0
  for name, gradient in theirs.items():
    difference = np.abs(ours[name] - gradient).max()
    if not np.isfinite(difference):
      raise ValueError(f"the gradient of {name} is not finite on both sides")
    if difference:  # A's are zeros where B is 0.
      worst = max(worst, float(difference / np.abs(gradient).max()))
  return worst


# --- The result -------------------------------------------------------------


def _ratio(rows, theirs, ours, what) -> float | None:
  """Theirs by ours; None where a side was not asked for."""
  if not {theirs, ours} <= rows.keys():
    return None
  return rows[theirs][what] / rows[ours][what]


def _better(rows) -> str | None:
  """TRL's row that takes fewer CPU seconds."""
  known = [way for way in _BETTER_OF if way in rows]
  return min(known, key=lambda way: rows[way]["cpu_s"], default=None)


def _ratios(comparison: dict) -> dict:
  rows = comparison["ways"]
  better = _better(rows)
  found = {"trl": better}
  for name, ours in (("padded", "ours padded"), ("prefix", "ours shared")):
    found[f"ratio_cpu_{name}"] = _ratio(rows, better, ours, "cpu_s")
    found[f"ratio_wall_{name}"] = _ratio(rows, better, ours, "wall_s")
    for theirs in _BETTER_OF:
      unchecked = "_unchecked" if "unchecked" in theirs else ""
      found[f"ratio_memory_{name}{unchecked}"] = _ratio(
          rows, theirs, ours, "peak_bytes"
      )
  return found


def _print(comparison: dict):
  """A table of one comparison."""
  prompt, completion = _split_tokens(comparison["split"])
  header = (
      f"{comparison['trains']} {comparison['split']}"
      f" ({prompt} + {completion} tokens)"
  )
  header = (
      f"{header:<28} {'CPU s':>8} {'wall s':>8} {'ratio':>6} {'peak MB':>9}"
      f" {'ratio':>6} {'imported':>9}"
  )
  print(f"\n{header}\n{'-' * len(header)}")
  rows = comparison["ways"]
  known = lambda value: "-" if value is None else f"{value:.2f}"
  for way, row in rows.items():
    ratios = [
        known(_ratio(rows, way, "ours shared", what))
        for what in ("cpu_s", "peak_bytes")
    ]
    print(
        f"{way:<28} {row['cpu_s']:8.3f} {row['wall_s']:8.3f} {ratios[0]:>6}"
        f" {row['peak_bytes'] / 1e6:9.0f} {ratios[1]:>6}"
        f" {row['imported_bytes'] / 1e6:9.0f}"
    )
  for way, row in comparison.get("parity", {}).items():
    loss, gradients = (
        "/".join(f"{row[at][key]:.1e}" for at in ("start", "moved"))
        for key in ("loss_diff", "grad_rel")
    )
    print(
        f"{way} and trl: loss {loss}, gradients {gradients} (start/moved),"
        f" curve {row['curve_diff']:.1e}"
    )
  sys.stdout.flush()


def _summary(comparisons: list[dict]) -> dict:
  """The keys at the top of the result."""
  ratios = {(c["trains"], c["split"]): _ratios(c) for c in comparisons}
  first = _SPLITS.value[0]
  lora, full = (ratios.get((trains, first), {}) for trains in ("lora", "full"))
  parity = [row for c in comparisons for row in c.get("parity", {}).values()]
  points = [row[at] for row in parity for at in ("start", "moved")]
  # NumPy's maximum of anything and NaN is NaN.
  worst = lambda rows, key: (
      float(np.max([row[key] for row in rows])) if rows else None
  )
  return {
      "max_loss_diff": worst(points, "loss_diff"),
      "max_grad_rel": worst(points, "grad_rel"),
      "max_curve_diff": worst(parity, "curve_diff"),
      "ratio_cpu_padded": lora.get("ratio_cpu_padded"),
      "ratio_cpu_prefix": lora.get("ratio_cpu_prefix"),
      "ratio_memory_lora": lora.get("ratio_memory_prefix"),
      "ratio_memory_full": full.get("ratio_memory_prefix"),
      "ratio_memory_lora_unchecked": lora.get("ratio_memory_prefix_unchecked"),
      "ratio_memory_full_unchecked": full.get("ratio_memory_prefix_unchecked"),
      "splits": {
          split: of
          for (trains, split), of in ratios.items()
          if trains == "lora"
      },
      "full": full or None,
  }


def _check():
  """Raises a UserError for a flag that cannot be meant."""
  for name in ("trl", "peft", "datasets", "torch"):
    if importlib.util.find_spec(name) is None:
      raise errors.UserError(
          f"{name} is not installed; run: pip install -e .[bench]"
      )
  for flag, known in ((_WAYS, _TRL | _OURS), (_TRAINS, _LEARNING_RATE)):
    for value in flag.value:
      if value not in known:
        raise errors.UserError(
            f"--{flag.name}: no {value!r}; there are {', '.join(known)}"
        )
  for split in _SPLITS.value:
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", split):
      raise errors.UserError(f"--splits: {split!r} is not like 4:1")
  timed = _WARM_UP.value + _ROUNDS.value * _BLOCK.value
  if timed > _CURVE.value:
    raise errors.UserError(
        f"--rounds x --block and --warm_up are {timed} steps; --curve,"
        f" the schedule's length, is {_CURVE.value}"
    )


def main(_):
  _check()
  load = os.getloadavg()[0]
  comparisons = []
  with tempfile.TemporaryDirectory(dir=_WORKDIR.value) as name:
    directory = pathlib.Path(name)
    parameters = _write(directory)
    for trains in _TRAINS.value:
      # All weights at one split: the steps are slow.
      splits = _SPLITS.value if trains == "lora" else _SPLITS.value[:1]
      for split in splits:
        comparisons.append(_compare(directory, trains, split))
        _print(comparisons[-1])
  result = {
      **_summary(comparisons),
      "parameters": parameters,
      "tokens": _TOKENS[_SHAPE.value],
      "rank": _RANK[_SHAPE.value],
      "threads": os.cpu_count(),
      "load": load,
      "rounds": _ROUNDS.value,
      "comparisons": comparisons,
  }
  print(json.dumps(result))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    _child(sys.argv[2])
  else:
    from launch import app

    app.run(main)
