r"""Llama-3.1-8B on GSM8K, the paper's settings, for one GPU of 141 GB.

The seed model is Meta's Instruct model (gated: ask for it on its page, then
`hf auth login`), its experts are Hermes 3 and DeepSeek-R1's distillate, both
made from Llama-3.1-8B. No result is known. What --plan estimates (2026-11-22,
two cores, no GPU, lengths from the published files), of 18 GPU hours on one
H200:

  stage                             hours each       GB of the device
  propose, 5 times                        0.03         105 to 124
  admit, 5 times (CPU)                    0.07                  -
  merge and evaluate, 5 times              1.4                128
  DPO, twice                              0.08                123
  three sweeps as large                    3.5                128
  test, 22 models                          0.2                128

49 GB of the host, 39 GB in the workdir, 48 GB of models. 80 GB do not hold it:
three models of 16 GB are where the merges are, another one where the run is,
and two results of 11 GB. The hours are without what racing spares.

  XLA_PYTHON_CLIENT_PREALLOCATE=false python -m launch.self_develop \
    --config=configs/llama3_1_8b.py --workdir=runs/llama_8b
  python -m launch.self_develop --config=configs/llama3_1_8b.py \
    --workdir=runs/llama_8b --plan --plan_device=H200
"""

from selfdev_jax import config as config_lib


def get_config():
  return config_lib.to_config_dict(
      config_lib.Config(
          name="llama3_1_8b",
          seed_model="meta-llama/Llama-3.1-8B-Instruct"
          "@0e9e39f249a16976918f6564b8830bc894c89659",
          experts=(
              "NousResearch/Hermes-3-Llama-3.1-8B"
              "@896ea440e5a9e6070e3d8a2774daf2b481ab425b",
              "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
              "@6a6f4aa4197940add57724a7707d069478df56b1",
          ),
          sampler="vllm",
          vllm=config_lib.Vllm(gpu_memory_utilization=0.2),
          propose=config_lib.Propose(batch_size=1000),
          evaluate=config_lib.Evaluate(
              task="gsm8k",
              shots=5,
              dev_size=1000,
              test_size=1319,
              batch_size=1000,
              racing_block=250,
              max_new_tokens=512,
              # Coming back to a model of 16 GB takes as long as a block.
          ),
      )
  )
