"""Whether all is there that a run needs; nothing is fetched or written."""

from collections.abc import Mapping
import dataclasses
import importlib.util
import os
import pathlib
import shutil
import socket

import huggingface_hub
import jax

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import loop
from selfdev_jax import models
from selfdev_jax import programs
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import sandbox
from selfdev_jax import store
from selfdev_jax.plan import reading
from selfdev_jax.plan import words
from selfdev_jax.plan.devices import Device
from selfdev_jax.plan.estimate import Estimate
from selfdev_jax.tiny import world

OK, MISSING, UNKNOWN = "ok", "missing", "unknown"
# Of a model whose own shapes do not matter: the layers around a program.
_ANY_SHAPES = ((8, 8),)
_VOCABULARY = ("embed", "head")
_CONNECT_S = 3.0


@dataclasses.dataclass(frozen=True)
class Check:
  """One thing that a run needs.

  Attributes:
    what: it is.
    status: OK, MISSING or UNKNOWN.
    found: what is there, or what is not.
    way_out: empty, or what to do about it.
  """

  what: str
  status: str
  found: str
  way_out: str = ""


def run(
    config: config_lib.Config,
    workdir: str | os.PathLike,
    host: loop.Host,
    *,
    places: Mapping[str, reading.Place],
    items: dict[str, list[evaluation.Item]] | str,
    sampler: str,
    device: Device | None,
    estimate: Estimate | None,
) -> list[Check]:
  """All checks, in the order in which a run would meet them.

  Args:
    config: the run's.
    workdir: the run's.
    host: what the sampler and the sandbox are told of this machine.
    places: of the models.
    items: of the benchmark, or why they are not there.
    sampler: "vllm" or "jax".
    device: that the estimate is for.
    estimate: None where no shape is known.
  """
  seed = places[config.seed_model]
  checks = [_config(config, items), _benchmark(config, items)]
  if config.evaluate.task.startswith("math"):
    checks.append(_math_extra())
  checks += [_model(place, seed, config) for place in places.values()]
  checks += [
      _lengths(config, seed, items),
      _sampler(config, host, sampler),
      _sandbox(config, host),
      _accelerator(config, device),
      _workdir(config, pathlib.Path(workdir)),
  ]
  if config.executor == "ray":
    checks += [
        _ray_extra(),
        _ray_address(config.ray.address),
        _ray_paths(config, pathlib.Path(workdir), places),
    ]
  if estimate is not None:
    checks += [
        _device_memory(device, estimate),
        *_vllm_memory(config, device, estimate),
        _host_memory(estimate),
        *_disks(pathlib.Path(workdir), places, estimate),
    ]
  return checks


def _config(config, items) -> Check:
  what = "config"
  try:
    programs.load_prompt(config.propose.prompt)
    if not isinstance(items, str):
      loop.check(config)
  except errors.UserError as error:
    return Check(what, MISSING, str(error))
  return Check(what, OK, f"{config.name}, {config_lib.digest(config)}")


def _benchmark(config, items) -> Check:
  settings = config.evaluate
  what = f"data of {settings.task}"
  if not isinstance(items, str):
    counts = ", ".join(f"{len(some):,} {k}" for k, some in items.items())
    return Check(what, OK, f"{counts} items")
  from_hub = None in (settings.train_file, settings.test_file)
  # "hub": one of the splits that no file is given for is not in the cache.
  if from_hub and " hub " in items and reading.hub_answers():
    return Check(
        what, UNKNOWN, "not in the cache; the hub answers, a run fetches it"
    )
  return Check(
      what,
      MISSING,
      items,
      "fetch it where there is a network, or give evaluate.train_file and"
      " evaluate.test_file",
  )


def _math_extra() -> Check:
  what = "math_verify"
  if importlib.util.find_spec("math_verify") is None:
    return Check(what, MISSING, "not installed", "pip install -e .[eval]")
  return Check(what, OK, "installed")


# Models.


def _model(place: reading.Place, seed: reading.Place, config) -> Check:
  what = f"model {place.name}"
  if place.path is not None:
    return _on_disk(what, place, seed)
  if place.name.startswith(world.PREFIX):
    if config.tiny is None:
      return Check(what, MISSING, "the config has no toy world", "set tiny")
    return Check(what, OK, "not there yet: a run trains it first")
  if place.hub is None:
    return Check(
        what, MISSING, "no such directory, and no hub id", "give org/name"
    )
  return _on_hub(what, place)


def _on_disk(what, place, seed) -> Check:
  try:
    decoder, leaves = convert.open_leaves(place.path)
    if place == seed:
      convert.load_tokenizer(place.path)
    elif seed.path is not None:
      difference = _difference(convert.open_leaves(seed.path)[1], leaves)
      if difference:
        return Check(what, MISSING, difference, "take a fine-tune of the seed")
  except errors.UserError as error:
    return Check(what, MISSING, str(error))
  size = sum(
      leaf.dtype.itemsize * leaf.size
      for leaf in jax.tree.leaves(models.abstract_params(decoder))
  )
  where = f", commit {place.path.name}" if place.hub else ""
  size *= leaves["embed"].dtype.itemsize / 4  # Abstract ones are float32.
  return Check(
      what,
      OK,
      f"{decoder.family}, {words.gigabytes(size)}, {place.path}{where}",
  )


def _difference(seed: models.Params, expert: models.Params) -> str:
  """How an expert's tensors differ from the seed's; rows of words may."""
  ours, theirs = (
      {
          "/".join(key.key for key in path): leaf
          for path, leaf in jax.tree_util.tree_flatten_with_path(
              tree, is_leaf=lambda x: isinstance(x, convert.Lazy)
          )[0]
      }
      for tree in (seed, expert)
  )
  if ours.keys() != theirs.keys():
    names = sorted(ours.keys() ^ theirs.keys())
    return f"one of seed and expert lacks {', '.join(names)}"
  for path, leaf in ours.items():
    skipped = 1 if path in _VOCABULARY else 0
    if leaf.shape[skipped:] != theirs[path].shape[skipped:]:
      return f"{path} is {theirs[path].shape}, the seed's {leaf.shape}"
    if leaf.dtype != theirs[path].dtype:
      return f"{path} is {theirs[path].dtype}, the seed's {leaf.dtype}"
  return ""


def _on_hub(what, place) -> Check:
  found = reading.ask_hub(place.hub, place.revision)
  if found.error:
    way_out = (
        "see the name, the revision, and whether you are let in"
        if found.answered
        else "fetch it where there is a network and give its directory"
    )
    says = "the hub says" if found.answered else "the hub cannot be reached:"
    return Check(what, MISSING, f"not here; {says} {found.error}", way_out)
  commit = f"commit {found.commit}"
  if not found.has_weights:
    return Check(
        what,
        MISSING,
        f"{commit} has no safetensors",
        "convert it where torch is installed, and give its directory",
    )
  if found.gated and not reading.may_fetch(place.hub):
    return Check(
        what,
        MISSING,
        f"{commit} is gated",
        f"ask for it at https://huggingface.co/{place.hub}; hf auth login",
    )
  return Check(what, OK, f"{commit}, {words.gigabytes(found.nbytes)} to fetch")


# Lengths, sampler, sandbox.


def _lengths(config, seed, items) -> Check:
  what = "lengths"
  shape, spoken = reading.shape(seed, config), reading.tokenizer(seed)
  if shape is None or spoken is None:
    return Check(what, UNKNOWN, "the seed model's tokenizer is not here")
  positions, new = shape[0].max_positions, config.propose.max_new_tokens
  prompt = len(spoken.encode(programs.load_prompt(config.propose.prompt)))
  if sampling.slots(prompt) + new + 1 > positions:
    return Check(
        what,
        MISSING,
        f"a prompt of {prompt} tokens and {new} new ones exceed the model's"
        f" {positions} positions",
        "lower propose.max_new_tokens",
    )
  if isinstance(items, str):
    return Check(what, UNKNOWN, "the benchmark is not here")
  new = config.evaluate.max_new_tokens
  tokens = reading.longest(items, spoken)
  cut = {
      split: sum(n + new > positions for n in some)
      for split, some in tokens.items()
  }
  most = max(map(max, tokens.values()))
  if any(cut.values()):
    said = " and ".join(f"{n} {split}" for split, n in cut.items() if n)
    return Check(
        what,
        OK,
        f"{said} prompts and {new} new tokens exceed {positions} positions:"
        " they will lose their beginning",
        "lower evaluate.shots or evaluate.max_new_tokens to avoid it",
    )
  return Check(
      what,
      OK,
      f"the longest prompt has {most} of {positions} tokens, {new} new ones"
      " fit",
  )


def _sampler(config, host: loop.Host, kind: str) -> Check:
  what = f"sampler {kind}"
  if config.sampler == "replay":
    if host.recording is None or not pathlib.Path(host.recording).is_file():
      return Check(what, MISSING, "no recording", "give --recording=FILE")
    return Check(what, OK, f"replays {host.recording}")
  if kind == "jax":
    return Check(what, OK, f"jax {jax.__version__}")
  if host.vllm_address is not None:
    return Check(what, UNKNOWN, f"{host.vllm_address} is not asked")
  try:
    python = sampling.find_python(host.vllm_python)
  except errors.UserError as error:
    return Check(what, MISSING, str(error), "or --config.sampler=jax")
  return Check(what, OK, f"vLLM of {python}")


def _sandbox(config, host: loop.Host) -> Check:
  what = "sandbox"
  box = sandbox.Sandbox(
      config.sandbox, _ANY_SHAPES, len(config.experts), host.allow_weak_sandbox
  )
  try:
    with box:
      layers = box.layers()
  except errors.UserError as error:
    return Check(what, MISSING, str(error))
  holds = [name for name, reason in layers.items() if not reason]
  fails = [f"{name} ({reason})" for name, reason in layers.items() if reason]
  without = f"; without {', '.join(fails)}" if fails else ""
  return Check(what, OK, f"{', '.join(holds)}{without}")


# The cluster.


def _ray_extra() -> Check:
  what = "ray"
  if importlib.util.find_spec("ray") is None:
    return Check(what, MISSING, "not installed", "pip install -e .[ray]")
  return Check(what, OK, "installed")


def _ray_address(address: str) -> Check:
  """Whether anyone listens there; whether it is Ray is for a run to see."""
  what = f"cluster {address}"
  if address == "local":
    return Check(what, OK, "a run starts one on this machine")
  if address == "auto":
    return Check(what, UNKNOWN, "a run looks for one that this host is in")
  host, _, port = address.rpartition(":")
  is_port = port.isdecimal() and len(port) <= 5 and 0 < int(port) < 1 << 16
  if not host or not is_port:
    return Check(
        what,
        MISSING,
        "no address",
        "give ray.address as HOST:PORT, or auto, or local",
    )
  try:
    # An IPv6 address stands in brackets.
    with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S):
      return Check(what, OK, "answers")
  except (OSError, UnicodeError) as error:  # The latter of names too long.
    return Check(
        what,
        MISSING,
        f"nobody answers ({reading.one_line(error)})",
        "ray start --head on that host, or mend ray.address",
    )


def _ray_paths(config, workdir: pathlib.Path, places) -> Check:
  what = "paths on all hosts"
  if config.ray.address == "local":
    return Check(what, OK, "one host, this one")
  paths = [workdir.absolute()]
  for place in places.values():
    if place.path is not None:
      paths.append(place.path.absolute())
    elif place.name.startswith(world.PREFIX) and config.tiny is not None:
      # A run trains them first.
      paths.append(world.cache_directory(config.tiny, config.propose.prompt))
  named = ", ".join(map(str, dict.fromkeys(paths)))
  return Check(
      what, UNKNOWN, f"not known from here; every host has to see {named}"
  )


# The machine.


def _accelerator(config, device: Device | None) -> Check:
  what = "accelerator"
  here = [d for d in jax.devices() if d.platform != "cpu"]
  wanted = {"dpo.fsdp x dpo.tensor": config.dpo.fsdp * config.dpo.tensor}
  if config.sampler in ("auto", "vllm"):
    wanted["vllm.tensor_parallel"] = config.vllm.tensor_parallel
  if not here:
    if config.tiny is not None:
      return Check(what, OK, "none; the toy world needs none")
    named = f", planned for {device.name}" if device else ""
    if config.executor == "ray" and config.ray.address != "local":
      return Check(what, UNKNOWN, f"none here{named}; the cluster's count")
    return Check(
        what,
        MISSING,
        f"JAX {jax.__version__} finds none here{named}",
        "run it on a host with a GPU: pip install -e .[cuda12]",
    )
  found = f"{len(here)} x {here[0].device_kind}"
  more = [f"{key} is {n}" for key, n in wanted.items() if n > len(here)]
  if more:
    return Check(what, MISSING, f"{found}, {' and '.join(more)}", "lower that")
  if os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") != "false":
    return Check(
        what,
        MISSING,
        f"{found}; JAX takes most of its memory ahead of the other processes",
        "set XLA_PYTHON_CLIENT_PREALLOCATE=false",
    )
  return Check(what, OK, found)


def _device_memory(device: Device | None, estimate: Estimate) -> Check:
  what = "device memory"
  needed = words.gigabytes(estimate.device_bytes)
  if device is None:
    return Check(
        what,
        UNKNOWN,
        f"{needed} at most; for which device?",
        "--plan_device names one",
    )
  stage = max(estimate.stages, key=lambda s: s.device_bytes or 0)
  has = words.gigabytes(device.memory_bytes)
  found = f"{needed} at most ({stage.name}) of {has}"
  if estimate.device_bytes <= device.memory_bytes:
    return Check(what, OK, found)
  return Check(
      what,
      MISSING,
      found,
      "a device with more memory, fewer experts, or smaller models; less for"
      " vLLM: vllm.gpu_memory_utilization; less for DPO: dpo.parts",
  )


def _vllm_memory(config, device, estimate: Estimate) -> list[Check]:
  if estimate.vllm_texts is None:
    return []
  share = config.vllm.gpu_memory_utilization * device.memory_bytes
  found = (
      f"{words.gigabytes(share)}; beside the weights"
      f" {estimate.vllm_texts:,} evaluations at once"
  )
  if estimate.vllm_texts:
    return [Check("vLLM's memory", OK, found)]
  return [
      Check(
          "vLLM's memory", MISSING, found, "raise vllm.gpu_memory_utilization"
      )
  ]


def _host_memory(estimate: Estimate) -> Check:
  what = "host memory"
  free = _available_bytes()
  found = words.gigabytes(estimate.host_bytes)
  if free is None:
    return Check(what, UNKNOWN, f"{found} needed")
  found += f" of {words.gigabytes(free)} that are free"
  if free >= estimate.host_bytes:
    return Check(what, OK, found)
  return Check(what, MISSING, found, "a host with more memory")


def _available_bytes() -> int | None:
  try:
    with open("/proc/meminfo", encoding="ascii") as file:
      lines = dict(line.split(":") for line in file)
    return 1024 * int(lines["MemAvailable"].split()[0])
  except (OSError, KeyError):
    return None


def _disks(workdir, places, estimate: Estimate) -> list[Check]:
  fetched = [p for p in places.values() if p.hub and p.path is None]
  cache = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE)
  needs = [("disk of the workdir", workdir, estimate.disk_bytes)]
  if fetched:
    share = len(fetched) / len(places)
    needs.append(
        ("disk of the hub's cache", cache, share * estimate.download_bytes)
    )
  checks = []
  for what, path, nbytes in needs:
    free = shutil.disk_usage(_existing(path)).free
    found = (
        f"{words.gigabytes(nbytes)} of {words.gigabytes(free)} that are free"
    )
    if free >= nbytes:
      checks.append(Check(what, OK, found))
    else:
      checks.append(Check(what, MISSING, found, f"make room in {path}"))
  return checks


def _existing(path: pathlib.Path) -> pathlib.Path:
  """The path, or the nearest directory above that exists."""
  path = path.absolute()
  while not path.exists():
    path = path.parent
  return path


def _workdir(config, path: pathlib.Path) -> Check:
  what = f"workdir {path}"
  nearest = _existing(path)
  if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
    return Check(
        what, MISSING, f"{nearest} cannot be written to", "choose another"
    )
  if not (path / "archive.sqlite").exists():
    return Check(what, OK, "new")
  try:
    with store.Store.read(path) as archive:
      theirs, engines = archive.meta("config"), archive.engines()
      is_done = archive.is_done(records.LOOP, 0, "export")
  except errors.UserError as error:
    return Check(what, MISSING, str(error), "choose another --workdir")
  ours = config_lib.without_places(
      config_lib.flatten(config_lib.to_dict(config))
  )
  theirs = config_lib.without_places(theirs)
  # As JSON has them: tuples are lists.
  plain = lambda value: list(value) if isinstance(value, tuple) else value
  differing = sorted(
      key
      for key in ours.keys() | theirs.keys()
      if plain(ours.get(key)) != theirs.get(key)
  )
  if differing:
    return Check(
        what,
        MISSING,
        f"holds a run of another config, which differs in"
        f" {', '.join(differing)}",
        "choose another --workdir",
    )
  by = f", sampled by {', '.join(engines)}" if engines else ""
  state = "is finished" if is_done else "would go on"
  return Check(what, OK, f"holds this run, which {state}{by}")
