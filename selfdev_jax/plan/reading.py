"""What can be known of models and texts without fetching or loading any."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import re
import statistics

import huggingface_hub
import transformers

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import models
from selfdev_jax import programs
from selfdev_jax import records
from selfdev_jax.plan.estimate import Lengths
from selfdev_jax.plan.shapes import SHAPES
from selfdev_jax.tiny import world

# As `convert.resolve` reads it.
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_HUB_S = 10.0
# Characters in a token: of English and code, and of worked solutions, which
# are full of digits and LaTeX.
_CHARS_PER_TOKEN = 3.5
_CHARS_PER_MATH_TOKEN = 2.8
# (question, worked solution) in characters, and shots, where no data is at
# hand: means of the published files (GSM8K's training split, MATH's test split;
# the four shots of MATH that the field gives have shorter ones).
_PUBLISHED = {"gsm8k": (235, 287, 5), "math": (191, 520, 4)}
_SAMPLED_ITEMS = 200


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a model is.

  Attributes:
    name: as the config has it.
    path: its directory; None where nothing of it is here.
    hub: its id on the hub; None for directories and the toy world.
    revision: on the hub.
  """

  name: str
  path: pathlib.Path | None
  hub: str | None = None
  revision: str | None = None


@dataclasses.dataclass(frozen=True)
class OnHub:
  """What the hub says of a repository, or why it says nothing.

  Attributes:
    commit: that the revision stands for.
    nbytes: that a run would fetch.
    gated: whether its owner has to let you in.
    has_weights: whether it has safetensors.
    error: empty, or why there is no answer.
    answered: whether there was one, be it a refusal.
  """

  commit: str = ""
  nbytes: int = 0
  gated: bool = False
  has_weights: bool = True
  error: str = ""
  answered: bool = True


def places(config: config_lib.Config) -> dict[str, Place]:
  """Of the seed model and the experts, by name."""
  return {
      name: _place(name, config)
      for name in (config.seed_model, *config.experts)
  }


def _place(name: str, config: config_lib.Config) -> Place:
  if name.startswith(world.PREFIX) and config.tiny is not None:
    made = world.cache_directory(config.tiny, config.propose.prompt)
    path = made / name.removeprefix(world.PREFIX)
    return Place(name, path if path.is_dir() else None)
  if pathlib.Path(name).is_dir():
    return Place(name, pathlib.Path(name))
  match = _HUB_ID.fullmatch(name)
  if match is None:
    return Place(name, None)
  return Place(name, _cached(*match.groups()), *match.groups())


def _cached(hub: str, revision: str | None) -> pathlib.Path | None:
  """The hub's copy in the local cache, if it is whole as far as one can see."""
  try:
    path = huggingface_hub.snapshot_download(
        hub, revision=revision, local_files_only=True
    )
  except Exception:  # The hub's; whatever it is, nothing is here.
    return None
  path = pathlib.Path(path)
  return path if (path / "config.json").is_file() else None


@functools.cache
def ask_hub(hub: str, revision: str | None) -> OnHub:
  """Asks the hub for a repository's commit and sizes; fetches nothing."""
  try:
    info = huggingface_hub.HfApi().model_info(
        hub, revision=revision, files_metadata=True, timeout=_HUB_S
    )
  except huggingface_hub.errors.HfHubHTTPError as error:
    return OnHub(error=one_line(error))
  except Exception as error:  # HTTP's and the system's: no answer.
    return OnHub(error=one_line(error), answered=False)
  files = {f.rfilename: f.size or 0 for f in info.siblings or []}
  weights = [
      size
      for name, size in files.items()
      if name.startswith("model") and name.endswith(".safetensors")
  ]
  return OnHub(info.sha or "", sum(weights), bool(info.gated), bool(weights))


@functools.cache
def hub_answers() -> bool:
  """Whether the hub can be reached; asked for a data set that is there."""
  try:
    huggingface_hub.HfApi().dataset_info("openai/gsm8k", timeout=_HUB_S)
  except huggingface_hub.errors.HfHubHTTPError:
    return True  # An answer it is.
  except Exception:  # HTTP's and the system's.
    return False
  return True


def may_fetch(hub: str) -> bool:
  """Whether the hub lets whoever runs this have a gated repository."""
  try:
    huggingface_hub.HfApi().auth_check(hub)
  except Exception:  # Refused, or no answer.
    return False
  return True


def shape(
    place: Place, config: config_lib.Config
) -> tuple[models.DecoderConfig, int, str] | None:
  """(shape, bytes of a parameter, how it is known) of the seed model.

  None where nothing is known.
  """
  if place.path is not None:
    with contextlib.suppress(convert.ConvertError):
      decoder, leaves = convert.open_leaves(place.path)
      return decoder, leaves["embed"].dtype.itemsize, f"read in {place.path}"
    with contextlib.suppress(convert.ConvertError):
      decoder = convert.read_config(place.path)
      return decoder, 2, f"config.json of {place.path}, taken for bfloat16"
  if place.hub in SHAPES:
    known = SHAPES[place.hub]
    return known, 2, "the table in plan/shapes.py, taken for bfloat16"
  if place.name.startswith(world.PREFIX) and config.tiny is not None:
    return _of_world(config.tiny), 4, "the world's settings"
  return None


def _of_world(tiny: config_lib.World) -> models.DecoderConfig:
  return models.DecoderConfig(
      vocab_size=tiny.vocab_size,
      embed=tiny.width,
      layers=tiny.layers,
      heads=tiny.heads,
      kv_heads=tiny.kv_heads,
      head_dim=tiny.width // tiny.heads,
      mlp=tiny.mlp,
      max_positions=1024,
  )


def tokenizer(
    place: Place,
) -> transformers.PreTrainedTokenizerBase | None:
  """The seed model's, where it is here."""
  if place.path is None:
    return None
  with contextlib.suppress(convert.ConvertError):
    return convert.load_tokenizer(place.path)
  return None


def items(
    config: config_lib.Config,
) -> dict[str, list[evaluation.Item]] | str:
  """The items of both splits, or why there are none, nothing being fetched."""
  settings = config.evaluate
  sizes = {records.DEV: settings.dev_size, records.TEST: settings.test_size}
  try:
    with _offline():
      task = evaluation.load(settings)
      return {split: task.items(split, n) for split, n in sizes.items()}
  except errors.UserError as error:
    return str(error)


def lengths(
    config: config_lib.Config,
    found: dict[str, list[evaluation.Item]] | str,
    spoken: transformers.PreTrainedTokenizerBase | None,
) -> Lengths:
  """Tokens of the prompts: counted where there is a tokenizer."""
  if spoken is not None:
    count = lambda text: len(spoken.encode(text))
    math_tokens = count
    how = "counted with the seed model's tokenizer"
  else:
    count = lambda text: round(len(text) / _CHARS_PER_TOKEN)
    math_tokens = lambda text: round(len(text) / _CHARS_PER_MATH_TOKEN)
    how = (
        f"{_CHARS_PER_TOKEN} characters a token, {_CHARS_PER_MATH_TOKEN} in"
        " problems and answers"
    )
  prompt = count(programs.load_prompt(config.propose.prompt))
  if isinstance(found, str):
    question, answer, usual = _PUBLISHED.get(
        config.evaluate.task, _PUBLISHED["gsm8k"]
    )
    shots = config.evaluate.shots
    shots = usual if shots is None else shots
    shared = shots * (question + answer) / _CHARS_PER_MATH_TOKEN
    question, answer = (n / _CHARS_PER_MATH_TOKEN for n in (question, answer))
    how += "; no items here, lengths are the published sets' means"
    return Lengths(prompt, shared + question, shared, answer, how)
  some = found[records.DEV][:_SAMPLED_ITEMS]
  prompts = [item.prompt for item in some]
  shared = math_tokens(_common(prompts))
  answer = statistics.fmean(math_tokens(item.gold) for item in some)
  if config.evaluate.task == "arithmetic":  # Its gold answers are bare numbers.
    answer = config.evaluate.max_new_tokens
  return Lengths(
      prompt,
      statistics.fmean(map(math_tokens, prompts)),
      shared if len(prompts) > 1 else 0,
      min(answer, config.evaluate.max_new_tokens),
      f"{how}, over {len(some)} dev items; answers as long as the published"
      " solutions",
  )


def _common(texts: Sequence[str]) -> str:
  """What all of them begin with."""
  pairs = zip(min(texts), max(texts), strict=False)
  same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
  return "".join(a for a, _ in same)


def longest(
    found: dict[str, list[evaluation.Item]],
    spoken: transformers.PreTrainedTokenizerBase,
) -> dict[str, Sequence[int]]:
  """Tokens of every prompt, by split."""
  return {
      split: [len(spoken.encode(item.prompt)) for item in some]
      for split, some in found.items()
  }


@contextlib.contextmanager
def _offline() -> Iterator[None]:
  """Data sets come from the cache or not at all."""
  import datasets  # Here, as it takes a second.

  places_ = (huggingface_hub.constants, datasets.config)
  before = [place.HF_HUB_OFFLINE for place in places_]
  try:
    for place in places_:
      place.HF_HUB_OFFLINE = True
    yield
  finally:
    for place, value in zip(places_, before, strict=True):
      place.HF_HUB_OFFLINE = value


def one_line(error: BaseException) -> str:
  """The first paragraph of an error's text."""
  words = " ".join(str(error).split("\n\n")[0].split())
  return words or type(error).__name__
