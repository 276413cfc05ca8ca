"""Self-Developing, iteration by iteration (paper, section 3 and algorithm 1).

Every stage reads what the archive already holds and adds what is missing, so
the same call starts a run, resumes a killed one and returns at once from a
finished one. Keys are folded from (seed, iteration, stage, item): a resumed
run draws what the uninterrupted one would have drawn.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from selfdev_jax import board as board_lib
from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import models
from selfdev_jax import preferences
from selfdev_jax import programs
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import sandbox
from selfdev_jax import store as store_lib
from selfdev_jax.dpo import lora
from selfdev_jax.dpo import workdir as workdir_lib
from selfdev_jax.evaluation import racing
from selfdev_jax.executors import access
from selfdev_jax.executors import executor as executor_lib
from selfdev_jax.executors import work as work_lib
from selfdev_jax.executors import worker as worker_lib

# What the sweeps search: factors of a task vector, evenly on a log scale (the
# best ones differ by an order of magnitude between worlds), densities of TIES.
SCALES = (0.02, 2.0)
_DENSITIES = (0.05, 1.0)

LAST_STAGE = "export"
_SELECT = "select"  # Settles which programs of an iteration are new.

_BOARD_S = 30.0  # TensorBoard sees new scores at least so often.

# The control draws at most this many times the loop's samples to evaluate as
# many new programs as the loop did.
_CONTROL_OVERSAMPLING = 3


@dataclasses.dataclass(frozen=True)
class Host:
  """What a run uses of the machine that it is on; no part of the config.

  Attributes:
    vllm_python: the interpreter that has vLLM; None: `.venv-vllm`, or this.
    vllm_address: of a vLLM server that is there; None: the run starts one.
    recording: file that keeps what the sampler says, or that `replay` reads.
    allow_weak_sandbox: run generated programs also where neither seccomp nor
      bubblewrap is to be had; the archive records it.
    trace: write a profile of the first iteration that is run into trace/.
  """

  vllm_python: str | None = None
  vllm_address: str | None = None
  recording: str | None = None
  allow_weak_sandbox: bool = False
  trace: bool = False


def run(
    config: config_lib.Config,
    workdir: str | os.PathLike,
    directories: Mapping[str, pathlib.Path] | None = None,
    host: Host = Host(),
    push: Callable[[], None] = lambda: None,
):
  """Runs or resumes Self-Developing in `workdir`.

  Args:
    config: the whole run.
    workdir: gets archive.sqlite, factories/ (LoRA adapters) and best/ (the
      best merged model, a Hugging Face directory).
    directories: where the models behind names such as `tiny:seed` are; other
      names are directories themselves, or `org/name[@revision]` on the hub.
    host: what the sampler needs of this machine.
    push: called when a stage is done; copies the workdir to where it is kept.

  Raises:
    UserError: for models, configs or workdirs that do not fit, in one line.
  """
  check(config)
  names = (config.seed_model, *config.experts)
  places = {name: str((directories or {}).get(name, name)) for name in names}
  paths = {name: convert.resolve(place) for name, place in places.items()}
  with store_lib.lock(workdir), contextlib.ExitStack() as stack:
    directory = paths[config.seed_model]
    decoder = convert.read_config(directory)
    longest = _check_lengths(config, decoder, convert.load_tokenizer(directory))
    identity = _identity(config, paths)
    if config.executor == "ray":
      archive, executor = _cluster(
          config, workdir, places, identity, decoder, longest, host, stack
      )
    else:
      archive, executor = _local(
          config, workdir, paths, identity, longest, host, stack
      )
    if archive.is_done(records.LOOP, 0, LAST_STAGE):
      return
    board = stack.enter_context(board_lib.Board(archive))
    _Run(config, archive, executor, board, host.trace, push).run()


def _identity(config, paths) -> dict[str, str]:
  """What has to be equal to resume, beside the config."""
  identity = {
      f"model {name}": convert.digest(path) for name, path in paths.items()
  }
  prompt = programs.load_prompt(config.propose.prompt)
  identity["prompt"] = hashlib.sha256(prompt.encode()).hexdigest()
  identity["items"] = evaluation.digest_items(config.evaluate)
  return identity


def _local(config, workdir, paths, identity, longest, host, stack):
  """The archive, and this process as its executor."""
  loaded = worker_lib.load(config, paths, stack)
  box = stack.enter_context(
      sandbox.Sandbox(
          config.sandbox,
          loaded.merges.shapes,
          len(config.experts),
          host.allow_weak_sandbox,
      )
  )
  archive = _archive(config, workdir, identity, box.layers(), host, stack)
  if archive.is_done(records.LOOP, 0, LAST_STAGE):
    return archive, None
  sampler = stack.enter_context(
      contextlib.closing(_sampler(config, loaded, longest, host, archive))
  )
  return archive, executor_lib.Local(config, loaded, box, sampler)


def _cluster(config, workdir, places, identity, decoder, longest, host, stack):
  """The archive, and the workers of a Ray cluster as its executor."""
  for flag, value in (
      ("recording", host.recording),
      ("vllm_address", host.vllm_address),
  ):
    if value is not None:
      raise errors.UserError(
          f"--{flag} is for one process: give --config.executor=local"
      )
  # What surrounds a program on each host stands in its worker's incident.
  archive = _archive(config, workdir, identity, {}, host, stack)
  if archive.is_done(records.LOOP, 0, LAST_STAGE):
    return archive, None
  if config.ray.address == "local":
    access.guard_local()
  # Ray is an extra, and reads the environment when it is imported.
  from selfdev_jax.executors import cluster as cluster_lib

  kind = _kind(config, host, archive.engines())
  python = host.vllm_python
  if kind == "vllm":
    python = str(sampling.find_python(python).absolute())
  files = {
      name: _absolute(value)
      for name in ("train_file", "test_file")
      if (value := getattr(config.evaluate, name)) is not None
  }
  setup = work_lib.Setup(
      config=dataclasses.replace(
          config, evaluate=dataclasses.replace(config.evaluate, **files)
      ),
      models={name: _absolute(place) for name, place in places.items()},
      digests={name: identity[f"model {name}"] for name in places},
      items=identity["items"],
      kind=kind,
      longest=longest,
      vllm_python=python,
      allow_weak_sandbox=host.allow_weak_sandbox,
      workdir=str(pathlib.Path(workdir).absolute()),
      decoder=decoder,
  )
  return archive, stack.enter_context(cluster_lib.Cluster(setup))


def _absolute(place: str) -> str:
  """A path for processes that are elsewhere; a hub id as it is."""
  path = pathlib.Path(place)
  return str(path.absolute()) if path.exists() else place


def _archive(config, workdir, identity, layers, host, stack) -> store_lib.Store:
  provenance = _provenance() | {
      "sandbox": layers,
      "allow_weak_sandbox": host.allow_weak_sandbox,
  }
  return stack.enter_context(
      store_lib.Store.create(workdir, config, identity, provenance)
  )


def check(config: config_lib.Config):
  """Finds what can be known to be wrong before anything is loaded.

  Raises:
    UserError: naming the key.
  """
  evaluation.load_items(config.evaluate)
  programs.load_prompt(config.propose.prompt)
  _check_place(config)
  if config.dpo.trains != "lora":
    raise errors.UserError(
        f"config key 'dpo.trains' is {config.dpo.trains!r}; a run's factories"
        " are adapters, 'lora' (launch.train_dpo trains whole models)"
    )
  if not config.experts:
    raise errors.UserError("config key 'experts' is empty; name at least one")
  if len(set(config.experts)) < len(config.experts):
    raise errors.UserError("config key 'experts' names a model twice")


def _check_place(config: config_lib.Config):
  """What `executor=ray` needs, before anything is looked for."""
  if config.executor == "local":
    return
  if importlib.util.find_spec("ray") is None:
    raise errors.UserError(
        "config key 'executor' is 'ray', which is not installed: pip install -e"
        " .[ray], on every host"
    )
  if config.sampler == "replay":
    raise errors.UserError(
        "config key 'sampler' is 'replay'; a recording is replayed with"
        " --config.executor=local"
    )


def _check_lengths(
    config: config_lib.Config,
    decoder: models.DecoderConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> int:
  """The positions that the longest prompt and what follows it need.

  Raises:
    UserError: if the factory's prompt, its completion and EOS do not fit.
  """
  positions = decoder.max_positions
  count = lambda text: len(tokenizer.encode(text))
  prompt = count(programs.load_prompt(config.propose.prompt))
  new = config.propose.max_new_tokens
  if sampling.slots(prompt) + new + 1 > positions:
    raise errors.UserError(
        f"a prompt of {prompt} tokens and {new} new ones exceed the model's"
        f" {positions} positions; lower propose.max_new_tokens"
    )
  longest = [prompt + new + 1]
  new = config.evaluate.max_new_tokens
  if new >= positions:
    raise errors.UserError(
        f"evaluate.max_new_tokens is {new}, the model has {positions}"
        " positions; lower it"
    )
  for split, items in evaluation.load_items(config.evaluate).items():
    lengths = [count(item.prompt) for item in items]
    cut = sum(length + new > positions for length in lengths)
    if cut:
      progress.note(
          f"{cut} of {len(items)} {split} prompts and {new} new tokens exceed"
          f" the model's {positions} positions; they lose their beginning, and"
          " their responses say so"
      )
    longest.append(min(max(lengths) + new, positions))
  return max(longest)


def _sampler(
    config: config_lib.Config,
    loaded: worker_lib.Models,
    longest: int,
    host: Host,
    archive: store_lib.Store,
) -> sampling.Sampler:
  """The config's sampler; the caller closes it."""
  # A recording is of one run, whoever samples for it.
  of_run = dataclasses.replace(
      config, sampler="auto", vllm=config_lib.Vllm(), name=""
  )
  run_id = config_lib.digest(of_run) + json.dumps(archive.meta("identity"))
  if config.sampler == "replay":
    if host.recording is None:
      raise errors.UserError("--config.sampler=replay needs --recording=FILE")
    return sampling.ReplaySampler(host.recording, run_id)
  sampler = worker_lib.open_sampler(
      _kind(config, host, archive.engines()),
      config.vllm,
      loaded,
      longest,
      archive.workdir / "vllm",
      host.vllm_python,
      host.vllm_address,
  )
  if host.recording is not None:
    return sampling.Recorder(sampler, host.recording, run_id)
  return sampler


def _kind(config, host: Host, engines: Sequence[str]) -> str:
  """Of the sampler, where `auto` is settled.

  Args:
    config: of the run.
    host: that it begins on.
    engines: that have sampled for it already.
  """
  kind = config.sampler
  if kind == "auto":
    has_vllm = host.vllm_address is not None or sampling.is_installed()
    kind = "vllm" if has_vllm else "jax"
    # A run that goes on goes on with what it began with.
    kind = (engines or [kind])[0].partition(" ")[0]
    progress.note(f"sampler is auto: {kind}")
  return kind


def _git_revision() -> str:
  """Of this checkout; empty where there is none, or no git."""
  try:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
  except OSError:
    return ""
  return described.stdout.strip()


def _provenance() -> dict[str, Any]:
  """Versions and hardware of this session."""
  packages = ("selfdev-jax", "jax", "flax", "optax", "transformers")
  return {
      "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in packages},
      "git": _git_revision(),
      "command": shlex.join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
      "cpus": os.cpu_count(),
      "machine": platform.machine(),
  }


def _program(digest: str) -> str:
  """The name of a program's merged model."""
  return records.PROGRAM + digest


@dataclasses.dataclass(frozen=True)
class _Counters:
  """Several that count the same."""

  counters: Sequence[Callable[[int], None]]

  def update(self, n: int = 1):
    for count in self.counters:
      count(n)


class _Run:
  """The stages over one archive; each method is safe to call again."""

  def __init__(
      self,
      config: config_lib.Config,
      archive: store_lib.Store,
      executor: executor_lib.Executor,
      board: board_lib.Board,
      trace: bool = False,
      push: Callable[[], None] = lambda: None,
  ):
    self._config = config
    self._archive = archive
    self._executor = executor
    self._prompt = programs.load_prompt(config.propose.prompt)
    self._items = evaluation.load_items(config.evaluate)
    self._board = board
    self._trace = trace
    self._push = push

  def run(self):
    """All iterations, the baselines, then the test set, once."""
    self._score_all(
        records.LOOP, 0, "single models", records.DEV, self._single_models()
    )
    for t in range(1, self._config.iterations + 1):
      with self._traced(t):
        self._iterate(records.LOOP, t)
        if t > 1:
          self._iterate(records.CONTROL, t)
        if t < self._config.iterations:
          self._refine(t)
    self._sweeps()
    self._finalists()
    with self._archive.stage(records.LOOP, 0, store_lib.SEARCH):
      pass
    self._test()
    with self._archive.stage(records.LOOP, 0, LAST_STAGE) as needed:
      if needed:
        self._export()

  def _key(self, t: int, stage: str) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(self._config.seed), t)
    return jax.random.fold_in(key, zlib.crc32(stage.encode()))

  @contextlib.contextmanager
  def _working(self, arm, t, stage, what, total, unit):
    """An activity and its bar; yields what has `update(n)`."""
    where = f"Iteration {t}, {arm}: " if t else ""
    with (
        self._archive.activity(arm, t, stage, total, unit),
        progress.bar(f"{where}{what}", total, unit) as bar,
        jax.profiler.TraceAnnotation(f"{where}{stage}"),
    ):
      try:
        yield _Counters((bar.update, self._archive.advance, self._beat))
      finally:  # What ended it is among them.
        self._keep_incidents()
    self._board.update()
    self._push()

  def _beat(self, _: int):
    """What is done now and then while work goes on."""
    self._keep_incidents()
    self._board.update(every_s=_BOARD_S)

  def _keep_incidents(self):
    for incident in self._executor.incidents():
      self._archive.add_incident(incident)

  def _traced(self, t: int) -> contextlib.AbstractContextManager:
    """Profiles iteration `t` where that is asked for and it has work left."""
    is_over = self._archive.is_done(records.LOOP, t, "refine") or (
        self._archive.is_done(records.LOOP, 0, store_lib.SEARCH)
    )
    if not self._trace or is_over:
      return contextlib.nullcontext()
    self._trace = False
    options = jax.profiler.ProfileOptions()
    # Python's own frames would be most of the file.
    options.python_tracer_level = 0
    return jax.profiler.trace(
        self._archive.workdir / "trace", profiler_options=options
    )

  # One iteration of one arm.

  def _iterate(self, arm: str, t: int):
    """Proposes, admits and evaluates the new programs of iteration `t`.

    The control samples the seed model itself with the same keys, and evaluates
    as many new programs as the loop did; where duplicates leave it short it
    draws more.
    """
    drawn = asked = self._config.propose.samples
    most = None
    if arm == records.CONTROL:
      most = len(self._archive.candidates(records.LOOP, t))
    while not self._archive.is_done(arm, t, _SELECT):
      self._propose(arm, t, drawn)
      self._admit(arm, t)
      new = self._new_programs(arm, t)
      is_short = most is not None and len(new) < most
      if is_short and drawn < _CONTROL_OVERSAMPLING * asked:
        more = self._config.propose.batch_size
        drawn = min(drawn + more, _CONTROL_OVERSAMPLING * asked)
        continue
      with self._archive.stage(arm, t, _SELECT):
        self._archive.add_candidates(arm, t, new[:most])
    self._evaluate(arm, t, self._archive.candidates(arm, t))

  def _propose(self, arm: str, t: int, samples: int):
    """Samples the arm's factory until it has written `samples` completions."""
    have = len(self._archive.completions(arm, t))
    if have >= samples:
      return
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        self._key(t, "propose"), jnp.arange(have, samples)
    )
    adapter = self._adapter(arm, t)
    factory = 1 if adapter is None else t
    work = work_lib.Sample(
        "seed" if adapter is None else f"factory:{t}",
        self._prompt,
        np.asarray(jax.random.key_data(keys)),
        self._config.temperature(t),
    )
    with (
        self._working(
            arm, t, "propose", "sampling", samples - have, "program"
        ) as bar,
        contextlib.closing(self._executor.sample(work, adapter)) as batches,
    ):
      if adapter is None:
        self._archive.add_factory(1, "")
      for batch in batches:
        engine = self._executor.engine
        self._archive.add_completions(
            [
                records.Completion(
                    arm, t, have + i, g.text, g.finished, engine, factory
                )
                for i, g in enumerate(batch)
            ]
        )
        have += len(batch)
        bar.update(len(batch))

  def _admit(self, arm: str, t: int):
    """Gives every completion its verdict."""
    judged = {v.item for v in self._archive.verdicts(arm, t)}
    waiting = [
        c for c in self._archive.completions(arm, t) if c.item not in judged
    ]
    if not waiting:
      return
    with self._working(
        arm, t, "admit", "admitting", len(waiting), "program"
    ) as bar:
      extracted = [self._extract(completion) for completion in waiting]
      sources = [x for x in extracted if isinstance(x, str)]
      with contextlib.closing(self._executor.admit(sources)) as answers:
        for completion, source in zip(waiting, extracted, strict=True):
          is_source = isinstance(source, str)
          self._keep(completion, source, next(answers) if is_source else source)
          bar.update()

  def _extract(self, completion: records.Completion) -> str | sandbox.Rejection:
    """The program in a completion, or why there is none."""
    try:
      return programs.extract(self._prompt, completion.text)
    except programs.ExtractionError as error:
      return sandbox.Rejection("extract", error.code, error.message)

  def _keep(self, completion, source, answer):
    """Archives the verdict on one completion."""
    about = (completion.arm, completion.iteration, completion.item)
    if isinstance(answer, sandbox.Rejection):
      text = source if isinstance(source, str) else completion.text
      self._archive.add_verdict(
          records.Verdict(
              *about, text, None, answer.stage, answer.code, answer.message
          )
      )
      return
    self._archive.add_verdict(
        records.Verdict(*about, source, answer.digest),
        answer.program,
        answer.stats,
        answer.fingerprint,
    )

  def _new_programs(self, arm: str, t: int) -> list[str]:
    """Digests of functions first admitted in iteration `t` of an arm.

    In order of items. The first iteration of both arms is the same: one
    factory, the same keys.
    """
    rounds = [
        [v.digest for v in self._verdicts(arm, before) if v.admitted]
        for before in range(1, t + 1)
    ]
    return sandbox.new_by_round(rounds, self._archive.fingerprints())[-1]

  def _verdicts(self, arm: str, t: int) -> list[records.Verdict]:
    return self._archive.verdicts(records.LOOP if t == 1 else arm, t)

  def _evaluate(self, arm: str, t: int, digests: Sequence[str]):
    """Scores programs on the development set; known ones are not run again."""
    names = list(map(_program, digests))
    top, bottom = preferences.bands(self._config.preferences, len(names))
    # The control races as the loop does, so that their means compare. A
    # program of a completion that was cut is no candidate, but ranks.
    cut = len(names) - len(self._written(arm, t, digests))
    self._score_all(
        arm, t, "evaluate", records.DEV, names, top + cut, bottom + cut
    )
    # What the arm admitted and does the same as what it has paid for.
    admitted = [v.digest for v in self._verdicts(arm, t) if v.admitted]
    self._reuse(
        arm,
        t,
        list(map(_program, dict.fromkeys(admitted))),
        list(map(_program, self._evaluated(arm, t))),
    )

  # Scores.

  def _score_all(
      self,
      arm: str,
      t: int,
      stage: str,
      split: str,
      names: Sequence[str],
      top: int | None = None,
      bottom: int = 0,
  ):
    """Scores the named merges as far as they are not scored yet.

    Args:
      arm: whose time it is.
      t: likewise.
      stage: likewise.
      split: development or test.
      names: of models.
      top: the best of the names that have to be known, where it is enough to
        know these and the worst; None: all of them.
      bottom: likewise of the worst.
    """
    if split == records.DEV:  # On the test set each gives its own answers.
      self._reuse(arm, t, names, list(self._archive.scores(split)))
    known = self._archive.scores(split)
    # One that took its score from another runs as that one.
    names = list(
        dict.fromkeys(
            known[name].reused or name if name in known else name
            for name in names
        )
    )
    race = self._race(split, names, known, top, bottom)
    if race.turn() is None:
      return
    what = f"scoring on {split}" if t else f"Scoring {stage} on {split}"
    with self._working(arm, t, stage, what, race.missing, "answer") as bar:
      self._run_race(race, names, split, bar)

  def _race(self, split, names, known, top, bottom):
    """A race with the answers there are."""
    size, settings = len(self._items[split]), self._config.evaluate
    is_race = settings.racing and top is not None
    seed = self._archive.answers("seed", split) if is_race else [True] * size
    race = racing.Race(
        len(names),
        seed,
        racing.block_ends(size, settings.racing_block if is_race else size),
        top if is_race else len(names),
        bottom,
        settings.racing_error,
    )
    for i, name in enumerate(names):
      if name not in known:
        continue
      if known[name].correct is None:
        race.fail(i)
      else:
        race.add(i, self._archive.answers(name, split))
    return race

  def _run_race(self, race, names, split, bar):
    """Asks who is next until nobody is."""
    missing = race.missing

    def work(i, first, before):
      # Whoever has answered, or was chosen for its answers, was merged.
      is_known = bool(first) or split == records.TEST
      return work_lib.Answer(names[i], split, first, before, is_known)

    upcoming = lambda: itertools.starmap(work, race.ahead())
    answering = self._executor.answer(upcoming, self._archive.program_of)
    with contextlib.closing(answering) as answers:
      for answered in answers:
        i, first, before = race.turn()
        self._keep_answers(names[i], split, before - first, answered)
        if answered.failure:
          race.fail(i)
        else:
          race.add(i, [r.correct for r in answered.responses])
        bar.update(missing - race.missing)
        missing = race.missing

  def _keep_answers(self, name, split, n, answered: work_lib.Answered):
    """Archives what a model said to `n` items, or why it is none."""
    items = len(self._items[split])
    score = self._archive.score(name, split)
    before = score.weights if score else ""
    # Told once a merge, not once a block.
    if answered.merge_s and before and answered.weights not in ("", before):
      progress.note(f"{name} has other weights than when it was begun")
    self._archive.add_score(
        records.Score(
            model=name,
            split=split,
            n=items if answered.failure else n,
            correct=None
            if answered.failure
            else sum(r.correct for r in answered.responses),
            merge_s=answered.merge_s,
            evaluate_s=answered.evaluate_s,
            engine=answered.engine,
            failure=answered.failure,
            items=items,
            weights=answered.weights,
        ),
        answered.responses,
    )

  def _reuse(
      self, arm: str, t: int, names: Sequence[str], models: Sequence[str]
  ):
    """Gives programs the dev scores of those that do the same.

    Args:
      arm: whose programs.
      t: likewise.
      names: those that have a score are left alone.
      models: whose scores may be taken, in this order.
    """
    known = self._archive.scores(records.DEV)
    is_program = lambda name: name.startswith(records.PROGRAM)
    new = [n for n in names if is_program(n) and n not in known]
    scored = [m for m in models if is_program(m)]
    if not new or not scored:
      return
    prints = self._archive.fingerprints()
    first = sandbox.first_alike(
        [prints[n.removeprefix(records.PROGRAM)] for n in (*scored, *new)]
    )
    alike = {
        name: known[scored[i]]
        for name, i in zip(new, first[len(scored) :], strict=True)
        if i < len(scored)
    }
    if not alike:
      return
    with self._archive.activity(arm, t, "reuse", len(alike), "program"):
      for name, score in alike.items():
        self._archive.add_score(
            dataclasses.replace(
                score,
                model=name,
                merge_s=0.0,
                evaluate_s=0.0,
                reused=score.reused or score.model,
                weights="",
            )
        )
        self._archive.advance(1)

  # Preferences and DPO.

  def _adapter(self, arm: str, t: int) -> models.Params | None:
    """The factory of iteration `t`, scaled; None where it is the seed model."""
    if arm == records.CONTROL or t == 1:
      return None
    path = self._factory_path(t)
    return convert.load_adapter(path, self._executor.decoder).scaled()

  def _factory_path(self, t: int) -> pathlib.Path:
    return self._archive.workdir / "factories" / f"iteration_{t}"

  def _candidates(self, t: int) -> list[preferences.Candidate]:
    """The loop's scored programs of one iteration, as they were written."""
    scores = self._archive.scores(records.DEV)
    new = self._archive.candidates(records.LOOP, t)
    written = self._written(records.LOOP, t, new)
    return [
        preferences.Candidate(
            preferences.Writing(t, item, text), digest, scores[_program(digest)]
        )
        for digest, (item, text) in written.items()
    ]

  def _written(
      self, arm: str, t: int, digests: Sequence[str]
  ) -> dict[str, tuple[int, str]]:
    """The first completion of each program that was not cut at the limit."""
    texts, found = self._finished(arm, t), {}
    for verdict in self._verdicts(arm, t):
      if verdict.item in texts:
        found.setdefault(verdict.digest, (verdict.item, texts[verdict.item]))
    return {digest: found[digest] for digest in digests if digest in found}

  def _finished(self, arm: str, t: int) -> dict[int, str]:
    """An arm's completions by item, without those cut at the limit.

    DPO ends every text in EOS, which a cut one never had.
    """
    return {
        c.item: c.text
        for c in self._archive.completions(records.LOOP if t == 1 else arm, t)
        if c.finished
    }

  def _refine(self, t: int):
    """Preferences of iteration `t` and the factory of the next."""
    config = self._config.dpo
    # A training is taken up from its last checkpoint.
    done = len(self._archive.steps(t)) // config.save_every * config.save_every
    with self._archive.stage(
        records.LOOP, t, "refine", config.steps - done, "step"
    ) as needed:
      if not needed:
        return
      texts = self._finished(records.LOOP, t)
      pairs = preferences.build(
          self._config.preferences,
          t,
          self._candidates(t),
          [self._candidates(before) for before in range(1, t)],
          [
              preferences.Writing(t, v.item, texts[v.item])
              for v in self._archive.verdicts(records.LOOP, t)
              if not v.admitted and v.item in texts
          ],
          self._prompt,
          self._config.seed,
      )
      if not pairs:
        raise errors.UserError(
            f"iteration {t} left nothing to prefer: {len(self._candidates(t))}"
            " programs were scored, none better than another; raise"
            " propose.samples or evaluate.dev_size, in another --workdir"
        )
      self._archive.replace_pairs(t, pairs)
      decoder = self._executor.decoder
      adapter = (
          lora.init(
              self._key(t, "lora"),
              decoder,
              config.lora_rank,
              config.lora_targets,
          )
          if t == 1
          else convert.load_adapter(self._factory_path(t), decoder).params
      )
      workdir = self._archive.workdir / "dpo" / str(t)
      training = work_lib.Training(
          pairs=[dataclasses.asdict(pair) for pair in pairs],
          adapter=jax.tree.map(np.asarray, adapter),
          key=np.asarray(jax.random.key_data(self._key(t, "dpo"))),
          workdir=str(workdir.absolute()),  # Others are elsewhere.
          weights=self._archive.meta("identity")[
              f"model {self._config.seed_model}"
          ],
          label=f"Iteration {t}, loop: DPO",
      )
      try:
        adapter, metrics = self._executor.train(
            training, functools.partial(self._keep_step, t)
        )
      finally:
        self._keep_incidents()
      convert.save_adapter(
          self._factory_path(t + 1),
          adapter,
          config=decoder,
          rank=config.lora_rank,
          alpha=config.lora_alpha,
          rslora=config.rslora,
          base=self._config.seed_model,
      )
      made = convert.load_adapter(self._factory_path(t + 1), decoder)
      self._archive.add_factory(t + 1, models.checksum(made.scaled()))
      # Those that are not there yet were taken before schema 5.
      kept = {step.step for step in self._archive.steps(t)}
      self._archive.put_steps(
          [
              records.Step(t, i, m)
              for i, m in enumerate(metrics, start=1)
              if i not in kept
          ]
      )
      # The adapter stands; how its training went stays too.
      workdir_lib.discard_checkpoints(workdir)
    self._push()

  def _keep_step(self, t: int, step: int, metrics: dict[str, float]):
    self._archive.put_steps([records.Step(t, step, metrics)])
    self._archive.advance(1)
    self._keep_incidents()
    if step % self._config.dpo.save_every == 0:
      self._push()

  # Controls and the end.

  def _sweeps(self):
    """Each sweep, with as many models as the loop evaluated."""
    for family in records.SWEEPS:
      names = self._sweep(family, len(self._evaluated(records.LOOP)))
      self._score_all(records.LOOP, 0, family, records.DEV, names, top=1)

  def _finalists(self):
    """Settles which programs of all iterations are the best."""
    for arm, top in self._tested():
      names = list(map(_program, self._evaluated(arm)))
      self._score_all(arm, 0, "finalists", records.DEV, names, top)

  def _tested(self) -> tuple[tuple[str, int], ...]:
    """How many programs of each arm go to the test set."""
    return (records.LOOP, self._config.top_k), (records.CONTROL, 1)

  def _single_models(self) -> list[str]:
    return ["seed", *(f"expert:{name}" for name in self._config.experts)]

  def _sweep(self, family: str, budget: int) -> list[str]:
    """Names of `budget` settings of a baseline, the same in every session."""
    experts = len(self._config.experts)
    if family == "task_arithmetic":
      scales = np.geomspace(*SCALES, budget).round(5)
      return [f"task_arithmetic:scale={s}" for s in scales]
    if family == "ties":
      # TIES averages where task arithmetic sums: the same range a sum over.
      side = math.isqrt(max(budget - 1, 0)) + 1
      scales = (np.geomspace(*SCALES, side) * experts).round(5)
      densities = np.geomspace(*_DENSITIES, side).round(5)
      grid = [f"ties:density={d},scale={s}" for s in scales for d in densities]
      kept = np.linspace(0, len(grid) - 1, budget).round().astype(int)
      return [grid[i] for i in kept]
    rng = np.random.default_rng([self._config.seed, zlib.crc32(b"weights")])
    drawn = np.exp(rng.uniform(*np.log(SCALES), (budget, experts))).round(5)
    return ["weights:" + ",".join(map(str, row)) for row in drawn]

  def _test(self):
    """Scores once, on the test set, what the development set chose."""
    dev = self._archive.scores(records.DEV)
    chosen = self._single_models()
    for family in records.SWEEPS:
      chosen += _best(dev, [m for m in dev if m.startswith(f"{family}:")], 1)
    for arm, n in self._tested():
      chosen += _best(dev, map(_program, self._evaluated(arm)), n)
    distinct = list(dict.fromkeys(chosen))
    self._score_all(records.LOOP, 0, "best", records.TEST, distinct)

  def _evaluated(self, arm: str, until: int | None = None) -> list[str]:
    """Digests that count for an arm up to an iteration, or in all, in order."""
    digests = []
    for t in range(1, (until or self._config.iterations) + 1):
      # The first iteration of both arms is the same.
      digests += self._archive.candidates(records.LOOP if t == 1 else arm, t)
    return digests

  def _export(self):
    """Writes the best merged model by development score to best/."""
    dev = self._archive.scores(records.DEV)
    programs = map(_program, self._evaluated(records.LOOP))
    for name in _best(dev, programs, 1):
      self._executor.export(
          name, self._archive.program_of(name), self._archive.workdir / "best"
      )
    self._keep_incidents()


def _best(
    scores: Mapping[str, records.Score], names: Iterable[str], n: int
) -> list[str]:
  """The `n` best of the models with all answers; ties to the earlier."""
  scored = [
      m for m in names if scores[m].complete and scores[m].correct is not None
  ]
  return sorted(scored, key=lambda m: -scores[m].accuracy)[:n]
