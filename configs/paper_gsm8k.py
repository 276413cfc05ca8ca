r"""The paper's GSM8K run: openchat-3.5-1210, 3 candidates, 3 x 3,000 programs.

The paper reports 76.1 % on the test set, for the seed model 70.1, task
arithmetic 71.9, TIES 71.8 (Ishibashi et al., NAACL 2025). Nothing of this has
run here; what --plan estimates (2026-11-22, two cores, no GPU, lengths from the
published files), of 22 GPU hours on one H200:

  stage                             hours each       GB of the device
  propose, 5 times                        0.03         108 to 125
  admit, 5 times (CPU)                    0.07                  -
  merge and evaluate, 5 times              1.6                130
  DPO, twice                              0.08                125
  three sweeps as large                    4.2                130
  test, 23 models                          0.2                130

47 GB of the host, 37 GB in the workdir, 58 GB of models. An A100 would take 27
hours, but 80 GB do not hold it: the process that merges has the seed model and
three candidates on the device, 58 GB, beside the run's own copy and vLLM.
The hours are without racing, which is on: what it spares was not measured;
--config.evaluate.racing=False evaluates as the paper did.

  XLA_PYTHON_CLIENT_PREALLOCATE=false python -m launch.self_develop \
    --config=configs/paper_gsm8k.py --workdir=runs/gsm8k
  python -m launch.self_develop --config=configs/paper_gsm8k.py \
    --workdir=runs/gsm8k --plan --plan_device=H200

Where the paper is silent: 1,000 development items of the training split (2.6
points either way at 76 %; the cost of the run goes with them); at most 512 new
tokens, twice what all but a few published solutions need; all products of
chosen and rejected as pairs; 100 steps of 16 pairs, some ten passes over
them, and alpha = rank; batch sizes and vLLM's share of the memory. The control
arm and the sweeps as large as the loop are ours.

Revisions: the commits are those that public code has pinned. The hub could not
be reached from where this was written and none was found for openchat and Abel:
--plan prints the commit that @main stands for, and a run's archive pins the
weights of all by their digests. Whether each repository has safetensors is for
--plan to say, too. The paper's other candidates, for launch.transfer, are
WizardMath-7B-V1.1, Starling-LM-7B-alpha and BioMistral-7B.
"""

from selfdev_jax import config as config_lib

CONFIG = config_lib.Config(
    name="paper_gsm8k",
    seed_model="openchat/openchat-3.5-1210@main",
    experts=(
        "GAIR/Abel-7B-002@main",
        "teknium/OpenHermes-2.5-Mistral-7B"
        "@24c0bea14d53e6f67f1fbe2eca5bfe7cae389b33",
        "SciPhi/SciPhi-Mistral-7B-32k"
        "@8abed8a547b7c60bb29edc87da4423cef67acea5",
    ),
    iterations=3,
    top_k=15,
    sampler="vllm",
    # Of an H200, which the run shares with its merges.
    vllm=config_lib.Vllm(gpu_memory_utilization=0.16),
    propose=config_lib.Propose(
        samples=3000,
        temperature=1.2,
        temperature_decay=0.2,
        max_new_tokens=512,
        batch_size=1000,
    ),
    merge=config_lib.Merge(scope="mlp"),
    evaluate=config_lib.Evaluate(
        task="gsm8k",
        shots=5,
        dev_size=1000,
        test_size=1319,
        batch_size=1000,
        racing_block=250,
        max_new_tokens=512,
    ),
    preferences=config_lib.Preferences(
        top_fraction=0.03, bottom_fraction=0.10, elites=3
    ),
    dpo=config_lib.Dpo(
        beta=0.01, learning_rate=1e-6, lora_rank=256, lora_alpha=256.0
    ),
)


def get_config():
  return config_lib.to_config_dict(CONFIG)
