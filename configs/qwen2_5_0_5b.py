r"""Qwen2.5-0.5B on GSM8K, the paper's settings, for one GPU of 24 GB.

The seed model is the chat model, as it has to write Python; its experts are the
coder and the base model it was made from. So small a factory will write few
programs that are admitted: the 7 % that --plan assumes are the paper's, of a 7B
model. No result is known. What --plan estimates (2026-11-22, two cores, no GPU,
lengths from the published files), of 11 GPU hours on one L4:

  stage                             hours each       GB of the device
  propose, 5 times                        0.02           12 to 13
  admit, 5 times (CPU)                    0.07                  -
  merge and evaluate, 5 times              0.8                 13
  DPO, twice                              0.06                 14
  three sweeps as large                    2.0                 13
  test, 22 models                          0.1                 13

12 GB of the host, 4 GB in the workdir, 3 GB of models. The hours
are without what racing spares.

  XLA_PYTHON_CLIENT_PREALLOCATE=false python -m launch.self_develop \
    --config=configs/qwen2_5_0_5b.py --workdir=runs/qwen_0_5b
  python -m launch.self_develop --config=configs/qwen2_5_0_5b.py \
    --workdir=runs/qwen_0_5b --plan --plan_device=L4-24GB
"""

from selfdev_jax import config as config_lib


def get_config():
  return config_lib.to_config_dict(
      config_lib.Config(
          name="qwen2_5_0_5b",
          seed_model="Qwen/Qwen2.5-0.5B-Instruct"
          "@7ae557604adf67be50417f59c2c2f167def9a775",
          experts=(
              "Qwen/Qwen2.5-Coder-0.5B-Instruct"
              "@ea3f2471cf1b1f0db85067f1ef93848e38e88c25",
              "Qwen/Qwen2.5-0.5B" "@060db6499f32faf8b98477b0a26969ef7d8b9987",
          ),
          sampler="vllm",
          vllm=config_lib.Vllm(gpu_memory_utilization=0.25),
          propose=config_lib.Propose(batch_size=1000),
          evaluate=config_lib.Evaluate(
              task="gsm8k",
              shots=5,
              dev_size=1000,
              test_size=1319,
              batch_size=1000,
              racing_block=250,
              max_new_tokens=512,
          ),
          dpo=config_lib.Dpo(lora_rank=64, lora_alpha=64.0),
      )
  )
