"""Lets a model write, in JAX: to see that it lives.

  python -m launch.generate --model=HFDIR --prompt="Two and two is"
  python -m launch.generate --model=org/name --chat --prompt="What is 17 * 3?"

--chat applies the model's chat template. The text goes to standard output.
"""

from absl import flags
import jax

from launch import app
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import progress
from selfdev_jax import sampling

_MODEL = flags.DEFINE_string(
    "model", None, "Hugging Face directory, or org/name[@revision] on the hub."
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to go on from, or answer.")
_ADAPTER = flags.DEFINE_string("adapter", None, "PEFT directory to use.")
_CHAT = flags.DEFINE_bool("chat", False, "Apply the chat template.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "Tokens to write at most.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0 takes the likeliest token.", lower_bound=0.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws, at a temperature.")
flags.mark_flags_as_required(["model", "prompt"])


def main(_):
  directory = convert.resolve(_MODEL.value)
  tokenizer = convert.load_tokenizer(directory)
  if not _CHAT.value:
    prompt = tokenizer.encode(_PROMPT.value)
  else:
    if not tokenizer.chat_template:
      raise errors.UserError(
          f"{directory} has no chat template; leave out --chat"
      )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PROMPT.value}],
        add_generation_prompt=True,
        return_dict=False,
    )
  if not prompt:
    raise errors.UserError("--prompt is empty, and the model has no BOS token")
  config, params = convert.load(directory)
  adapter = None
  if _ADAPTER.value is not None:
    adapter = convert.load_adapter(_ADAPTER.value, config).scaled()
  sampler = sampling.JaxSampler(
      config, tokenizer, convert.end_tokens(directory, tokenizer)
  )
  sampler.swap_weights(params, str(directory), adapter)
  batches = sampler.generate(
      [prompt],
      jax.random.key(_SEED.value)[None],
      max_new_tokens=_MAX_NEW_TOKENS.value,
      batch_size=1,
      temperature=_TEMPERATURE.value,
  )
  for (generation,) in batches:
    if generation.truncated:
      progress.note("the prompt does not fit the model; its beginning was cut")
    print(generation.text)


if __name__ == "__main__":
  app.run(main)
