"""The demo: Self-Developing on a toy world, for real, on two CPU cores.

Trains a 785k-parameter seed model and three experts (once, cached), then runs
three iterations of 80 programs, the loop without DPO beside it, and three
sweeps with as many evaluations as the loop had.

16 minutes and 1.7 GB on two shared cores, installing included. Expect the mean
development score of new programs 20 to 35 points above the control's by the
third iteration, and a best program near 64 % on test, where task arithmetic has
62 % and the seed model 57 % (one seed; BUILD_NOTES.md has the intervals).

  make demo
  python -m launch.self_develop --config=configs/tiny.py --workdir=runs/tiny
"""

from selfdev_jax import config as config_lib


def get_config():
  return config_lib.to_config_dict(
      config_lib.Config(
          name="tiny",
          seed_model="tiny:seed",
          experts=("tiny:add", "tiny:subtract", "tiny:multiply"),
          # A vLLM server takes longer to start than these models to sample.
          sampler="jax",
          iterations=3,
          top_k=15,
          propose=config_lib.Propose(
              prompt="tiny",
              samples=80,
              temperature=1.0,  # At 1.2 a third of the tiny programs break.
              temperature_decay=0.2,
              max_new_tokens=224,
              batch_size=80,
          ),
          merge=config_lib.Merge(scope="all"),
          evaluate=config_lib.Evaluate(
              task="arithmetic",
              dev_size=300,
              test_size=1200,
              batch_size=100,
              max_new_tokens=16,
              # A merge takes longer to compile here than its answers.
              racing=False,
          ),
          preferences=config_lib.Preferences(
              top_fraction=0.15,
              bottom_fraction=0.3,
              elites=3,
              invalid_fraction=0.3,
              pairing="product",
              max_pairs=400,
          ),
          dpo=config_lib.Dpo(
              beta=0.1,
              sft_weight=0.2,
              learning_rate=3e-4,
              steps=30,
              batch_size=16,
              lora_rank=32,
              lora_alpha=32.0,
          ),
          tiny=config_lib.World(kind="structured"),
      )
  )
