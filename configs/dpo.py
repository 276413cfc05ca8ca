"""DPO of a 7B model with LoRA, as the paper refines its factory.

Rank 256 on all seven matrices, beta 0.01, 1e-6, 16 pairs a step. BUILD_NOTES.md
has the memory that a step of it needs on eight devices; it was compiled there,
not run. For a small model, or to try it on a CPU, lower the rank:

  python -m launch.train_dpo --config=configs/dpo.py --model=HFDIR \
    --pairs=PAIRS.jsonl --workdir=runs/dpo --config.lora_rank=8 \
    --config.lora_alpha=8.0 --config.learning_rate=1e-4
"""

from selfdev_jax import config as config_lib


def get_config():
  return config_lib.to_config_dict(config_lib.Dpo(max_length=1024))
