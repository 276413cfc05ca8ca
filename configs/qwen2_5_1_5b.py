r"""Qwen2.5-1.5B on GSM8K, the paper's settings, for one GPU of 24 GB.

Experts are the coder and the mathematician of the same size. The latter was
trained with another RoPE (theta 10,000 instead of 1,000,000): merged models run
with the seed model's, and the run says so. vLLM does not fit beside the merges,
so JAX samples, and reads the shots with each question anew; therefore 500
development items (3.8 points either way at 75 %) and 256 new tokens; few
published solutions are longer. No result is known. What --plan estimates
(2026-11-22, two cores, no GPU, lengths from the published files), of 46 GPU
hours on one RTX 4090:

  stage                             hours each       GB of the device
  propose, 5 times                        0.05           18 to 19
  admit, 5 times (CPU)                    0.07                  -
  merge and evaluate, 5 times              3.3                 22
  DPO, twice                              0.09                 19
  three sweeps as large                    9.3                 22
  test, 22 models                          0.9                 22

15 GB of the host, 9 GB in the workdir, 9 GB of models. The hours are
without what racing spares. An L4 takes 119 hours.

  XLA_PYTHON_CLIENT_PREALLOCATE=false python -m launch.self_develop \
    --config=configs/qwen2_5_1_5b.py --workdir=runs/qwen_1_5b
  python -m launch.self_develop --config=configs/qwen2_5_1_5b.py \
    --workdir=runs/qwen_1_5b --plan --plan_device=RTX4090-24GB
"""

from selfdev_jax import config as config_lib


def get_config():
  return config_lib.to_config_dict(
      config_lib.Config(
          name="qwen2_5_1_5b",
          seed_model="Qwen/Qwen2.5-1.5B-Instruct"
          "@989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
          experts=(
              "Qwen/Qwen2.5-Coder-1.5B-Instruct"
              "@2e1fd397ee46e1388853d2af2c993145b0f1098a",
              "Qwen/Qwen2.5-Math-1.5B-Instruct"
              "@aafeb0fc6f22cbf0eaeed126eff8be45b0360a35",
          ),
          sampler="jax",
          propose=config_lib.Propose(batch_size=128),
          evaluate=config_lib.Evaluate(
              task="gsm8k",
              shots=5,
              dev_size=500,
              test_size=1319,
              batch_size=24,
              racing_block=96,
              max_new_tokens=256,
          ),
          dpo=config_lib.Dpo(lora_rank=128, lora_alpha=128.0, parts=4),
      )
  )
