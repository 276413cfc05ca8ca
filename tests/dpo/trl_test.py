"""A step of DPO against TRL's DPOTrainer: losses, gradients, metrics, AdamW."""

import dataclasses
from typing import Any

import datasets
import jax
import numpy as np
import optax
import peft
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax.dpo import batches
from selfdev_jax.dpo import data as data_lib
from selfdev_jax.dpo import lora
from selfdev_jax.dpo import step as step_lib

pytestmark = [
    pytest.mark.slow,
    # TRL 1.16 gives transformers 5 a name that it will drop.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

_DECODER = models.DecoderConfig(
    vocab_size=67,
    embed=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    max_positions=64,
)
_EOS = 1
_CONFIG = config_lib.Dpo(
    beta=0.5,
    learning_rate=1e-3,
    max_grad_norm=0.0,
    steps=1,
    batch_size=6,
    lora_rank=4,
    lora_alpha=6.0,
)
_SFT_WEIGHT = 0.3


# --- What both are given ----------------------------------------------------


def _make_data() -> data_lib.Data:
  """3 prompts; completions are in several pairs, so rows are fewer."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(2, 67, n).astype(np.int32)
  sizes = ((0, 9), (0, 4), (0, 13), (1, 6), (1, 1), (2, 11), (2, 7))
  return data_lib.Data(
      prompts=tuple(map(draw, (7, 2, 15))),
      completions=tuple(
          np.append(draw(size), np.int32(_EOS)) for _, size in sizes
      ),
      prompt_of=np.array([prompt for prompt, _ in sizes], np.int32),
      pairs=np.array(
          [[0, 1], [0, 2], [1, 2], [3, 4], [4, 3], [5, 6]], np.int32
      ),
      source=np.arange(6, dtype=np.int32),
      counts=data_lib.Counts(),
  )


_DATA = _make_data()


def _plan(config):
  mesh = step_lib.make_mesh(config)
  return batches.plan(
      _DATA,
      jax.random.key(0),
      steps=config.steps,
      batch_size=config.batch_size,
      parts=config.parts,
      per_row=batches.COMPLETIONS[config.layout],
      multiple=step_lib.rows_multiple(mesh),
  )


def _examples(plan) -> list[dict[str, list[int]]]:
  """Every step's pairs as TRL has them once they are tokenised."""
  return [
      {
          name: pair[name]
          for name in ("prompt_ids", "chosen_ids", "rejected_ids")
      }
      for step in range(len(plan.order))
      for pair in plan.describe(step)
  ]


@dataclasses.dataclass(frozen=True)
class _Files:
  """Directories of Hugging Face and PEFT, and what is in them."""

  start: str
  moved: str
  adapter: str
  params: models.Params
  trained: dict[str, models.Params]  # Where the policy is: no reference's.


@pytest.fixture(scope="module")
def files(tmp_path_factory, random_params) -> _Files:
  root = tmp_path_factory.mktemp("trl")
  words = {"<unk>": 0, "</s>": _EOS} | {f"w{i}": i for i in range(2, 67)}
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer(
          tokenizers.models.WordLevel(words, "<unk>")
      ),
      eos_token="</s>",
      unk_token="<unk>",
  )
  rng = np.random.default_rng(1)
  move = lambda std: lambda x: (
      x + rng.normal(0.0, std, x.shape).astype(np.float32)
  )
  params = random_params(_DECODER)
  moved = jax.tree.map(move(0.02), params)
  fresh = lora.init(jax.random.key(0), _DECODER, _CONFIG.lora_rank)
  adapter = jax.tree.map(move(0.05), jax.device_get(fresh))
  for name, tree in (("start", params), ("moved", moved)):
    convert.save(root / name, _DECODER, tree)
    tokenizer.save_pretrained(root / name)
  _save_adapter(root / "adapter", adapter)
  return _Files(
      *(str(root / name) for name in ("start", "moved", "adapter")),
      params,
      {"full": moved, "lora": adapter},
  )


def _save_adapter(directory, adapter):
  convert.save_adapter(
      directory,
      adapter,
      config=_DECODER,
      rank=_CONFIG.lora_rank,
      alpha=_CONFIG.lora_alpha,
      base="start",
  )


# --- TRL's side -------------------------------------------------------------


@pytest.fixture(scope="module")
def make_trainer(files, tmp_path_factory):
  """make_trainer(trains, examples, ...) -> a DPOTrainer of the moved policy."""
  trl = pytest.importorskip("trl")

  class Trainer(trl.DPOTrainer):
    """Takes token ids, and keeps losses, which its log rounds."""

    def _prepare_dataset(self, dataset, *_):
      return dataset

    def compute_loss(self, *args, **kwargs):
      loss = super().compute_loss(*args, **kwargs)
      self.losses = [*getattr(self, "losses", []), loss.item()]
      return loss

  def make(trains, examples, batch_size=_CONFIG.batch_size, **options):
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy = {"model": files.start}
    if trains == "full":
      policy = {
          "model": load(files.moved, dtype=torch.float32),
          "ref_model": load(files.start, dtype=torch.float32),
      }
    else:
      policy["peft_config"] = peft.LoraConfig(
          r=_CONFIG.lora_rank,
          lora_alpha=_CONFIG.lora_alpha,
          target_modules=[
              f"{name}_proj"
              for name in ("q", "k", "v", "o", "gate", "up", "down")
          ],
          task_type="CAUSAL_LM",
      )
    trainer = Trainer(
        **policy,
        args=trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trainer")),
            per_device_train_batch_size=batch_size,
            beta=_CONFIG.beta,
            learning_rate=_CONFIG.learning_rate,
            lr_scheduler_type="cosine",
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            model_init_kwargs=(
                {"dtype": torch.float32} if trains == "lora" else None
            ),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **options,
        ),
        train_dataset=datasets.Dataset.from_list(examples),
    )
    if trains == "lora":
      found = safetensors.numpy.load_file(
          f"{files.adapter}/adapter_model.safetensors"
      )
      peft.set_peft_model_state_dict(
          trainer.model,
          {name: torch.from_numpy(array) for name, array in found.items()},
      )
    return trainer

  return make


def _of_trainer(trainer, leaf) -> dict[str, np.ndarray]:
  """A tensor for each trained parameter, under the names in files."""
  return {
      name.replace(".default.", "."): leaf(parameter).detach().numpy().copy()
      for name, parameter in trainer.model.named_parameters()
      if parameter.requires_grad
  }


# --- Ours -------------------------------------------------------------------


def _under_their_names(trains, tree, directory) -> dict[str, np.ndarray]:
  tree = jax.device_get(tree)
  if trains == "lora":
    _save_adapter(directory, tree)
  else:
    convert.save(directory, _DECODER, tree)
  (file,) = directory.glob("*.safetensors")
  return safetensors.numpy.load_file(file)


@pytest.fixture(scope="module")
def reference(files) -> np.ndarray:
  """[completions], under the model at the start."""
  config = dataclasses.replace(_CONFIG, trains="full")
  stepper = _stepper(config)
  numbers = range(len(_DATA.completions))
  filled = batches.fill(_DATA, numbers, 2)
  shape = batches.most_tokens(_DATA, filled)
  rows = batches.pack(_DATA, filled, 2, 8, shape)
  found = np.asarray(stepper.reference({}, files.params, rows))
  logps = np.zeros(len(numbers), np.float32)
  for i, row in enumerate(filled):
    logps[row] = found[i, : len(row)]
  return logps


def _stepper(config):
  mesh = step_lib.make_mesh(config)
  assert mesh.size == 8
  return step_lib.stepper(config, _DECODER, np.dtype(np.float32), mesh)


def _steps(config, files, reference, plan) -> tuple[step_lib.State, list[Any]]:
  """The state after `config.steps`, and each one's metrics."""
  stepper = _stepper(config)
  frozen = files.params if config.trains == "lora" else {}
  frozen = step_lib.put(frozen, stepper.frozen_shardings)
  state = stepper.init(files.trained[config.trains])
  history = []
  for step in range(config.steps):
    batch = step_lib.put(plan.batch(step, reference), stepper.batch_shardings)
    state, metrics = stepper.step(frozen, state, batch)
    history.append(
        {name: float(value) for name, value in metrics.items()}
        | {"num_tokens": plan.tokens(step)}
    )
  return state, history


# --- The comparison ---------------------------------------------------------


def _check_metrics(ours, theirs):
  """All that TRL has; ours has a few more."""
  assert set(theirs) == set(ours) - {"loss", "grad_norm", "nll_loss"}
  for name, value in theirs.items():
    np.testing.assert_allclose(
        ours[name], value, rtol=2e-5, atol=2e-5, err_msg=name
    )


@pytest.mark.parametrize(
    "trl_options, changes",
    [
        ({"loss_type": "sigmoid"}, {"layout": "shared", "trains": "full"}),
        (
            {"loss_type": "sigmoid"},
            {"layout": "padded", "reference": "adapter_off"},
        ),
        (
            {"loss_type": "ipo"},
            {"loss": "ipo", "length_normalized": True, "layout": "padded"},
        ),
        ({"loss_type": "hinge"}, {"loss": "hinge", "layout": "shared"}),
        (
            {"loss_type": "robust", "label_smoothing": 0.1},
            {"loss": "robust", "label_smoothing": 0.1, "layout": "shared"},
        ),
        (
            {"loss_type": "sigmoid_norm"},
            {"length_normalized": True, "layout": "shared"},
        ),
        (
            {
                "loss_type": ["sigmoid", "sft"],
                "loss_weights": [1.0, _SFT_WEIGHT],
            },
            {
                "sft_weight": _SFT_WEIGHT,
                "layout": "padded",
                "trains": "full",
                "parts": 2,
            },
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_loss_gradients_and_metrics(
    files, reference, make_trainer, tmp_path, trl_options, changes
):
  config = dataclasses.replace(_CONFIG, **changes)
  plan = _plan(config)
  trainer = make_trainer(config.trains, _examples(plan), **trl_options)
  trainer.model.train()
  batch = trainer.data_collator(list(trainer.train_dataset))
  trainer.compute_loss(trainer.model, batch).backward()
  theirs = _of_trainer(trainer, lambda parameter: parameter.grad)

  state, (metrics,) = _steps(config, files, reference, plan)
  # The first step leaves 0.1 of the gradient in Adam's mean.
  mean = jax.device_get(optax.tree.get(state.optimizer, "mu"))
  ours = _under_their_names(
      config.trains,
      jax.tree.map(lambda x: x / np.float32(1 - 0.9), mean),
      tmp_path / "gradients",
  )
  # The policy is another than its reference.
  assert abs(metrics["rewards/chosen"]) > 0.1
  np.testing.assert_allclose(metrics["loss"], trainer.losses[0], atol=5e-6)
  assert set(ours) == set(theirs)
  for name, gradient in theirs.items():
    size = np.linalg.norm(gradient)
    assert size > 1e-6, name
    assert np.linalg.norm(ours[name] - gradient) <= 1e-5 * size, name
  norm = np.linalg.norm([np.linalg.norm(x) for x in theirs.values()])
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  found = trainer._metrics["train"]
  _check_metrics(metrics, {name: value for name, (value,) in found.items()})
  if config.sft_weight:
    tokens = sum(len(example["chosen_ids"]) for example in _examples(plan))
    nll = -metrics["logps/chosen"] * len(_DATA.pairs) / tokens
    np.testing.assert_allclose(metrics["nll_loss"], nll, rtol=1e-5)


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_steps_of_adamw(files, reference, make_trainer, tmp_path, trains):
  """Schedule, clipping, decay (but of norms) and all logged metrics."""
  config = dataclasses.replace(
      _CONFIG,
      trains=trains,
      steps=4,
      batch_size=4,
      warmup_fraction=0.25,
      weight_decay=0.1,
      max_grad_norm=0.5,
  )
  plan = _plan(config)
  trainer = make_trainer(
      trains,
      _examples(plan),
      config.batch_size,
      max_steps=config.steps,
      warmup_steps=1,
      weight_decay=config.weight_decay,
      max_grad_norm=config.max_grad_norm,
  )
  before = _of_trainer(trainer, lambda parameter: parameter)
  trainer.train()
  after = _of_trainer(trainer, lambda parameter: parameter)
  state, history = _steps(config, files, reference, plan)
  ours = _under_their_names(trains, state.trained, tmp_path / "trained")
  np.testing.assert_allclose(
      [step["loss"] for step in history], trainer.losses, atol=1e-5
  )
  assert history[0]["grad_norm"] > config.max_grad_norm
  assert abs(history[-1]["loss"] - history[0]["loss"]) > 1e-2
  names = set(history[0]) - {"loss", "nll_loss"}
  tokens = 0
  for step, logged in zip(history, trainer.state.log_history, strict=False):
    tokens += step["num_tokens"]
    for name in names - {"num_tokens"}:
      np.testing.assert_allclose(
          step[name], logged[name], rtol=1e-4, atol=1e-4, err_msg=name
      )
    assert tokens == logged["num_tokens"]
  assert set(ours) == set(before)
  for name, start in before.items():
    size = np.linalg.norm(after[name] - start)
    assert size > 1e-3, name
    assert np.linalg.norm(ours[name] - after[name]) <= 2e-4 * size, name
