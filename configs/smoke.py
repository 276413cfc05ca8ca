"""The whole loop in miniature, for tests: every stage, no claim.

The simple toy world, a small seed model that answers hardly anything right.
About a minute and a half on two shared cores and under 1 GB; expect accuracies
of a few per cent, by chance.

  python -m launch.self_develop --config=configs/smoke.py --workdir=runs/smoke
"""

from selfdev_jax import config as config_lib


def get_config():
  return config_lib.to_config_dict(
      config_lib.Config(
          name="smoke",
          seed_model="tiny:seed",
          experts=("tiny:add", "tiny:subtract", "tiny:multiply"),
          # A vLLM server takes longer to start than these models to sample.
          sampler="jax",
          iterations=2,
          top_k=3,
          propose=config_lib.Propose(
              prompt="tiny",
              samples=24,
              temperature=0.8,
              max_new_tokens=160,
              batch_size=24,
          ),
          merge=config_lib.Merge(scope="all"),
          evaluate=config_lib.Evaluate(
              task="arithmetic",
              dev_size=60,
              test_size=120,
              batch_size=20,
              racing_block=20,
              max_new_tokens=16,
          ),
          preferences=config_lib.Preferences(
              top_fraction=0.25,
              bottom_fraction=0.5,
              elites=2,
              invalid_fraction=0.25,
              max_pairs=64,
          ),
          dpo=config_lib.Dpo(
              beta=0.1,
              sft_weight=0.2,
              learning_rate=3e-4,
              steps=6,
              batch_size=4,
              lora_rank=8,
              lora_alpha=8.0,
          ),
          tiny=config_lib.World(
              kind="simple",
              width=64,
              heads=2,  # vLLM on a CPU takes heads of 32 and more.
              kv_heads=1,
              layers=2,
              mlp=160,
              word_problems=600,
              equations=2000,
              programs=600,
              pretrain=config_lib.Training(
                  steps=150, batch_size=8, length=192, learning_rate=6e-3
              ),
              skill_steps=(20, 40, 30),
              skill_learning_rates=(7e-4, 1e-3, 1.5e-3),
              skill_problems=400,
              replay=0.0,
              house=config_lib.Training(steps=0),
          ),
      )
  )
