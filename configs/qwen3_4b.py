r"""Qwen3-4B on MATH, the paper's settings, for one GPU of 80 GB.

The seed model is Instruct-2507, its experts the thinking model of that month
and the first Qwen3-4B, which has another RoPE (theta 1,000,000 instead of
5,000,000): merged models run with the seed model's, and the run says so. No
result is known. What --plan estimates (2026-11-22, two cores, no GPU, lengths
from the published files), of 53 GPU hours on one A100:

  stage                             hours each       GB of the device
  propose, 5 times                        0.04           61 to 72
  admit, 5 times (CPU)                    0.07                  -
  merge and evaluate, 5 times              3.7                 72
  DPO, twice                              0.12                 72
  three sweeps as large                     11                 72
  test, 22 models                          1.8                 72

29 GB of the host, 27 GB in the workdir, 24 GB of models. The hours are
without what racing spares.

  pip install -e .[eval]
  XLA_PYTHON_CLIENT_PREALLOCATE=false python -m launch.self_develop \
    --config=configs/qwen3_4b.py --workdir=runs/qwen3_4b
  python -m launch.self_develop --config=configs/qwen3_4b.py \
    --workdir=runs/qwen3_4b --plan --plan_device=A100-80GB
"""

from selfdev_jax import config as config_lib


def get_config():
  return config_lib.to_config_dict(
      config_lib.Config(
          name="qwen3_4b",
          seed_model="Qwen/Qwen3-4B-Instruct-2507"
          "@cdbee75f17c01a7cc42f958dc650907174af0554",
          experts=(
              "Qwen/Qwen3-4B" "@1cfa9a7208912126459214e8b04321603b3df60c",
              "Qwen/Qwen3-4B-Thinking-2507"
              "@768f209d9ea81521153ed38c47d515654e938aea",
          ),
          sampler="vllm",
          vllm=config_lib.Vllm(gpu_memory_utilization=0.28),
          propose=config_lib.Propose(batch_size=1000),
          evaluate=config_lib.Evaluate(
              task="math",
              shots=5,
              dev_size=1000,
              test_size=5000,
              batch_size=1000,
              racing_block=250,
              max_new_tokens=1024,
          ),
          dpo=config_lib.Dpo(parts=2),
      )
  )
