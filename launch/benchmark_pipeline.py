"""Measures candidates an hour against the PyTorch pipeline.

  make vllm-env; pip install -e .[bench]
  python -m launch.benchmark_pipeline

Both merge the same base and three experts by task arithmetic with the same
weights and arithmetic, and have one vLLM answer the same prompts, greedily:

  ours     merge in memory, swap into the engine that runs, evaluate
  pytorch  mergekit 0.1.5 writes a directory, a vLLM server is started on it,
           evaluate, the server is stopped

Random models of 134M parameters (12 layers, 32,000 tokens) in bf16, which lie
in the page cache. mergekit runs in this process, its imports done; vLLM starts
with the options that we start it with, compilation off, as that makes it start
ten times faster. A start ends when the first prompt has been read. --rounds
times, in turn: our engine is started, for --candidates of ours, and ended; one
candidate of theirs. Times are medians; our start is paid once a run and not
counted, nor is the first candidate after it, nor a first merge of mergekit's.
"same" is the share of texts that are equal. 2 GB of disk in --workdir.
"""

import functools
import json
import pathlib
import shutil
import statistics
import tempfile
import time

from absl import flags
import jax
import numpy as np
import tokenizers
import transformers

from launch import app
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import merging
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax import sampling

try:
  from mergekit.config import MergeConfiguration
  from mergekit.merge import run_merge
  from mergekit.options import MergeOptions
except ImportError as error:
  _MISSING = (error.name or str(error)).partition(".")[0]
else:
  _MISSING = None

_SHAPES = {
    "134m": models.DecoderConfig(
        vocab_size=32_000,
        embed=768,
        layers=12,
        heads=12,
        kv_heads=12,
        head_dim=64,
        mlp=2048,
        max_positions=512,
    ),
    # To see in two minutes what this prints.
    "tiny": models.DecoderConfig(
        vocab_size=300,
        embed=64,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=32,
        mlp=96,
        max_positions=512,
    ),
}
_EXPERTS = 3
_STD, _TASK_STD = 0.02, 0.002
_PROMPT_TOKENS = 64

_SHAPE = flags.DEFINE_enum("shape", "134m", list(_SHAPES), "Of the models.")
_PROMPTS = flags.DEFINE_integer("prompts", 32, "Of an evaluation.", 1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 16, "Written a prompt.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Candidates of theirs.", 1)
_CANDIDATES = flags.DEFINE_integer("candidates", 5, "Of ours a round.", 1)
_SCOPE = flags.DEFINE_enum(
    "scope", "all", ["all", "mlp"], "What ours merges and sends."
)
_VLLM_PYTHON = flags.DEFINE_string(
    "vllm_python", None, "As in launch.self_develop."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "For models and logs.")

_STAGES = {
    "ours": ("merge", "swap", "evaluate"),
    "pytorch": ("merge", "start", "evaluate", "stop"),
}


def _words(directory: pathlib.Path, size: int):
  """Writes a tokenizer of that many words."""
  words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}
  model = tokenizers.models.WordLevel(words, "<unk>")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
  ).save_pretrained(directory)


def _write_models(directory: pathlib.Path, config) -> list[pathlib.Path]:
  """A base and experts, random, in bf16."""
  _words(directory / "tokenizer", config.vocab_size)
  rng = np.random.default_rng(0)

  def draw(leaf, std):
    return rng.standard_normal(leaf.shape, np.float32) * np.float32(std)

  def begin(path, leaf):
    is_norm = path[-1].key.endswith("norm")
    return np.ones(leaf.shape, np.float32) if is_norm else draw(leaf, _STD)

  base = jax.tree_util.tree_map_with_path(begin, models.abstract_params(config))
  paths = []
  for i in range(_EXPERTS + 1):
    params = jax.tree.map(
        lambda leaf, i=i: (
            leaf + (draw(leaf, _TASK_STD) if i else np.float32(0))
        ).astype(jax.numpy.bfloat16),
        base,
    )
    paths.append(directory / f"model-{i}")
    convert.save(paths[-1], config, params, like=directory / "tokenizer")
  return paths


class _Clock:
  """Seconds of the stages of each candidate."""

  def __init__(self):
    self.candidates: list[dict[str, float]] = []
    self._last = time.monotonic()

  def begin(self):
    self.candidates.append({})
    self._last = time.monotonic()

  def lap(self, stage: str):
    now = time.monotonic()
    self.candidates[-1][stage] = now - self._last
    self._last = now

  def medians(self, stages) -> dict[str, float]:
    return {
        stage: statistics.median(c[stage] for c in self.candidates)
        for stage in stages
    }


def _evaluate(sampler, prompts) -> list[str]:
  batches = sampler.generate(
      prompts, max_new_tokens=_NEW_TOKENS.value, batch_size=len(prompts)
  )
  return [g.text for batch in batches for g in batch]


class _Ours:

  def __init__(self, base, experts, start, prompts):
    config, params = convert.load(base)
    named = {path.name: convert.load(path)[1] for path in experts}
    self._merger = merging.Merger(params, named, scope=_SCOPE.value)
    self._start = functools.partial(start, config, base)
    self._sampler = None
    self._prompts, self._merged = prompts, None
    self.clock = _Clock()

  def open(self):
    """Starts the engine; its first candidate does not count."""
    self._sampler = self._start()
    self.candidate(0.1)
    self.clock.candidates.pop()

  def candidate(self, weight: float) -> list[str]:
    self.clock.begin()
    self._merged = jax.block_until_ready(
        self._merger.merge(
            "task_arithmetic",
            weight=weight,
            dtype=jax.numpy.bfloat16,
            into=self._merged,
        )
    )
    self.clock.lap("merge")
    self._sampler.swap_weights(self._merged, f"weight {weight}")
    self.clock.lap("swap")
    texts = _evaluate(self._sampler, self._prompts)
    self.clock.lap("evaluate")
    return texts

  def close(self):
    """Leaves the cores to others."""
    if self._sampler is not None:
      self._sampler.close()


class _Pytorch:

  def __init__(self, base, experts, start, prompts, directory):
    self._base, self._experts, self._start = base, experts, start
    self._prompts, self._out = prompts, directory
    self.clock = _Clock()

  def merge(self, weight: float):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(self._base),
        "dtype": "bfloat16",
        "models": [
            {"model": str(path), "parameters": {"weight": weight}}
            for path in self._experts
        ],
    }
    shutil.rmtree(self._out, ignore_errors=True)
    self.clock.begin()
    run_merge(
        MergeConfiguration.model_validate(recipe),
        str(self._out),
        MergeOptions(copy_tokenizer=True, write_model_card=False, quiet=True),
    )
    self.clock.lap("merge")

  def candidate(self, weight: float) -> list[str]:
    self.merge(weight)
    sampler = self._start(convert.read_config(self._out), self._out)
    try:
      self.clock.lap("start")
      texts = _evaluate(sampler, self._prompts)
      self.clock.lap("evaluate")
    finally:
      sampler.close()
    self.clock.lap("stop")
    return texts


def _start(config, directory, *, tokenizer, logs, python):
  return sampling.VllmSampler(
      config,
      tokenizer,
      (tokenizer.eos_token_id,),
      directory=directory,
      dtype=jax.numpy.bfloat16,
      max_length=_PROMPT_TOKENS + _NEW_TOKENS.value,
      log_dir=logs,
      python=python,
  )


def _measure(directory: pathlib.Path, python) -> dict:
  config = _SHAPES[_SHAPE.value]
  base, *experts = _write_models(directory, config)
  tokenizer = convert.load_tokenizer(base)
  rng = np.random.default_rng(1)
  prompts = rng.integers(
      2, config.vocab_size, (_PROMPTS.value, _PROMPT_TOKENS)
  ).tolist()
  start = functools.partial(
      _start, tokenizer=tokenizer, logs=directory / "logs", python=python
  )
  theirs = _Pytorch(base, experts, start, prompts, directory / "merged")
  ours = _Ours(base, experts, start, prompts)
  weights = np.linspace(0.2, 0.5, _ROUNDS.value * _CANDIDATES.value).round(3)
  same = []
  try:
    theirs.merge(0.1)  # Warms up.
    theirs.clock.candidates.pop()
    with progress.bar("Measuring", _ROUNDS.value, "round") as bar:
      for some in np.split(weights, _ROUNDS.value):
        ours.open()
        said = {float(w): ours.candidate(float(w)) for w in some}
        ours.close()
        weight = float(some[0])
        texts = theirs.candidate(weight)
        same += [a == b for a, b in zip(said[weight], texts, strict=True)]
        bar.update()
  finally:
    ours.close()
  seconds = {
      "ours": ours.clock.medians(_STAGES["ours"]),
      "pytorch": theirs.clock.medians(_STAGES["pytorch"]),
  }
  total = {name: sum(stages.values()) for name, stages in seconds.items()}
  sizes = [
      leaf.size for leaf in jax.tree.leaves(models.abstract_params(config))
  ]
  return {
      "parameters": sum(sizes),
      "dtype": "bfloat16",
      "scope": _SCOPE.value,
      "device": jax.default_backend(),
      "prompts": _PROMPTS.value,
      "new_tokens": _NEW_TOKENS.value,
      "n": {"ours": len(weights), "pytorch": _ROUNDS.value},
      "ours_per_hour": 3600 / total["ours"],
      "pytorch_per_hour": 3600 / total["pytorch"],
      "ratio": total["pytorch"] / total["ours"],
      "swap_s": seconds["ours"]["swap"],
      "restart_s": seconds["pytorch"]["start"] + seconds["pytorch"]["stop"],
      "ratio_swap": (
          (seconds["pytorch"]["start"] + seconds["pytorch"]["stop"])
          / seconds["ours"]["swap"]
      ),
      "share": {
          name: {k: v / total[name] for k, v in stages.items()}
          for name, stages in seconds.items()
      },
      "seconds": seconds,
      "same": sum(same) / len(same),
  }


def _table(result: dict) -> str:
  lines = []
  for name, stages in result["seconds"].items():
    total = sum(stages.values())
    parts = ", ".join(
        f"{stage} {s:.2f} s ({s / total:.0%})" for stage, s in stages.items()
    )
    lines.append(f"{name:8} {3600 / total:7.1f} candidates/h: {parts}")
  lines.append(
      f"ratio {result['ratio']:.1f}; a swap takes 1/{result['ratio_swap']:.0f}"
      f" of a restart; {result['same']:.0%} of the texts are the same"
  )
  return "\n".join(lines)


def main(_):
  if _MISSING is not None:
    raise errors.UserError(
        f"{_MISSING} is not installed; run: pip install -e .[bench]"
    )
  python = sampling.find_python(_VLLM_PYTHON.value)
  with tempfile.TemporaryDirectory(dir=_WORKDIR.value) as directory:
    result = _measure(pathlib.Path(directory), python)
  print(_table(result))
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
