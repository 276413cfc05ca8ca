"""Applies the best programs of a finished run to experts it never saw.

The paper's transfer test (section 4): the programs stay as they are; task
arithmetic, beside them, is tuned anew for the new experts. For each task:

  unchanged        the run's best program by its own development score, among
                   those that take so many experts: nothing of the new ones
                   chose it;
  best_of_top      of the run's top programs the one that is best on the task's
                   development split with the new experts;
  task_arithmetic  the best of as many scales, evenly on the loop's log scale,
                   on the same development split;

and the seed model and the new experts themselves. The same budget is the same
number of models scored on the same development items: the programs were
written before, so choosing among them is all that they are given, and task
arithmetic, whose one setting is its scale, is given as many choices. Then
every model is scored once on the test split, which chooses nothing.

The archive is only read. Everything that is computed goes to another
directory, line by line, and a transfer that was stopped goes on there.
"""

import ast
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import loop
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import sandbox
from selfdev_jax import store as store_lib
from selfdev_jax.evaluation import run as run_lib
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.report import intervals
from selfdev_jax.report import reading
from selfdev_jax.sampling import engine as engine_lib
from selfdev_jax.sandbox import runner

_ABOUT, _RESULT = "about.json", "results.json"
_SEED, _EXPERT, _SCALE = "seed", "expert:", "task_arithmetic:scale="
# Of a task's settings: what says where the items are from, and not which; a
# model answers all of them here.
_NO_MATTER = (
    "task",
    "train_file",
    "test_file",
    "racing",
    "racing_block",
    "racing_error",
)
# What is compared, and what it is compared with.
_UNCHANGED, _BEST, _ARITHMETIC = "unchanged", "best_of_top", "task_arithmetic"


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One of the run's top programs.

  Attributes:
    model: its name in the run, `program:DIGEST`.
    dev: its development score there.
    source: Python that gave it first.
    program: program IR for the new experts; None where there is none.
    rejection: why there is none.
  """

  model: str
  dev: float
  source: str
  program: str | None
  rejection: sandbox.Rejection | None = None


@dataclasses.dataclass(frozen=True)
class _Run:
  """What is read of the archive of a finished run."""

  config: config_lib.Config
  seed_digest: str
  engine: str
  top: Sequence[Candidate]


@dataclasses.dataclass(frozen=True)
class _Part:
  """One split of one task, and its prompts' tokens."""

  task: evaluation.Task
  settings: config_lib.Evaluate
  items: Sequence[evaluation.Item]
  prompts: Sequence[list[int]]


def read_config(workdir: str | os.PathLike) -> config_lib.Config:
  """The config of a finished run.

  Raises:
    UserError: if there is no run, or it is not finished.
  """
  with store_lib.Store.read(workdir) as archive:
    return _config(archive)


def _config(archive):
  if not archive.is_done(records.LOOP, 0, loop.LAST_STAGE):
    raise errors.UserError(
        f"the run in {archive.workdir} is not finished; the command that"
        " started it resumes it"
    )
  return archive.config()


def _read(workdir, top: int) -> _Run:
  with store_lib.Store.read(workdir) as archive:
    config = _config(archive)
    run = reading.read(archive)
    best = run.top(records.LOOP, top)
    if not best:
      raise errors.UserError(f"the run in {workdir} has no scored program")
    return _Run(
        config,
        archive.meta("identity")[f"model {config.seed_model}"],
        archive.engines()[0].partition(" ")[0],
        [
            Candidate(
                score.model,
                score.accuracy,
                run.found(score.model).source,
                archive.program(reading.digest_of(score.model)),
            )
            for score in best
        ],
    )


def task_settings(
    config: config_lib.Config, names: Sequence[str], changes: Sequence[str]
) -> dict[str, config_lib.Evaluate]:
  """How each task is scored.

  As the run scored its own; another task keeps the run's sizes, takes its data
  and shots from where it does by default, and has room for a worked solution.

  Args:
    config: the run's.
    names: of tasks.
    changes: `TASK.KEY=VALUE`, KEY of `config.Evaluate`.

  Raises:
    UserError: naming the task or key that is wrong.
  """
  own, found = config.evaluate, {}
  for name in names:
    found[name] = (
        own
        if name == own.task
        else dataclasses.replace(
            own,
            task=name,
            train_file=None,
            test_file=None,
            shots=None,
            max_new_tokens=run_lib.MAX_NEW_TOKENS,
        )
    )
  if len(found) < len(names) or not names:
    raise errors.UserError("--tasks names one or more tasks, each once")
  for change in changes:
    key, given, text = change.partition("=")
    name, _, key = key.partition(".")
    if name not in found or not given:
      raise errors.UserError(
          f"--evaluate={change}: write TASK.KEY=VALUE, TASK one of"
          f" {', '.join(found)}"
      )
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = text
    tree = config_lib.to_dict(found[name]) | {key: value}
    found[name] = config_lib.from_config_dict(tree, config_lib.Evaluate)
  return found


def run(
    workdir: str | os.PathLike,
    experts: Sequence[str],
    tasks: Mapping[str, config_lib.Evaluate],
    *,
    top: int = 15,
    out: str | os.PathLike | None = None,
    kind: str | None = None,
    directories: Mapping[str, pathlib.Path] | None = None,
    host: loop.Host | None = None,
) -> dict[str, Any]:
  """Applies a run's top programs to other experts of its seed model.

  Args:
    workdir: of a finished run; nothing in its archive is changed.
    experts: directories or hub ids, in the order that programs get them.
    tasks: name to settings, see `task_settings`.
    top: programs to apply, at least one.
    out: gets the answers of every model and results.json; None:
      WORKDIR/transfer/ and the experts' names.
    kind: of the sampler; None: as in the run.
    directories: where models behind names are, as in `loop.run`.
    host: what the sampler and the sandbox use of this machine.

  Returns:
    What `json.dumps` takes, and results.json holds.

  Raises:
    UserError: for what does not fit, in one line.
  """
  host = host or loop.Host()
  found = _read(workdir, top)
  config = dataclasses.replace(found.config, experts=tuple(experts))
  if len(set(experts)) < len(experts) or not experts:
    raise errors.UserError("--experts names one or more models, each once")
  directories = directories or {}
  paths = {
      name: convert.resolve(directories.get(name, name))
      for name in (config.seed_model, *experts)
  }
  digests = {name: convert.digest(path) for name, path in paths.items()}
  if digests[config.seed_model] != found.seed_digest:
    raise errors.UserError(
        f"the seed model {config.seed_model} has other weights than in the run"
    )
  if kind is None:
    kind = found.engine if found.engine in engine_lib.KINDS else "jax"
  if out is None:
    names = "_".join(_slug(pathlib.Path(name).name) for name in experts)
    out = pathlib.Path(workdir) / "transfer" / names
  out = pathlib.Path(out)
  parts = _parts(tasks, convert.load_tokenizer(paths[config.seed_model]))
  about = _about(found, config, digests, tasks, parts, top, kind)
  with store_lib.lock(out), contextlib.ExitStack() as stack:
    is_new = not (out / _ABOUT).exists()
    kept = run_lib.settle(out / _ABOUT, about, is_new, "out")
    if (out / _RESULT).exists():
      return json.loads((out / _RESULT).read_text(encoding="utf-8"))
    loaded = worker_lib.load(config, paths, stack)
    longest = _longest(parts, loaded.decoder.max_positions)
    candidates = _fit(found, config, loaded.merges.shapes, host)
    sampler = stack.enter_context(
        contextlib.closing(
            worker_lib.open_sampler(
                kind,
                config.vllm,
                loaded,
                longest,
                out / "vllm",
                host.vllm_python,
                host.vllm_address,
            )
        )
    )
    # Which version of it there is, only it can say.
    about["engine"] = sampler.engine
    run_lib.settle(out / _ABOUT, about, "engine" not in kept, "out")
    transfer = _Transfer(out, config, loaded, sampler, parts, candidates)
    result = {"run": str(workdir), **transfer.run(), **about, "out": str(out)}
    run_lib.write_json(out / _RESULT, result)
    return result


def _about(found, config, digests, tasks, parts, top, kind):
  """What the results depend on, flat."""
  programs = " ".join(candidate.model for candidate in found.top)
  return {
      "run_config": config_lib.digest(found.config),
      "programs_sha256": hashlib.sha256(programs.encode()).hexdigest(),
      "seed_model_sha256": digests[config.seed_model],
      "experts": list(config.experts),
      "experts_sha256": [digests[name] for name in config.experts],
      "top": top,
      "scope": config.merge.scope,
      "sampler": kind,
      **{
          f"{name}.{key}": value
          for name, settings in tasks.items()
          for key, value in config_lib.to_dict(settings).items()
          if key not in _NO_MATTER
      },
      **{
          f"{name}.{split}_items_sha256": evaluation.digest(part.items)
          for (name, split), part in parts.items()
      },
      "versions": run_lib.versions(),
  }


def _parts(tasks, tokenizer) -> dict[tuple[str, str], _Part]:
  parts = {}
  for name, settings in tasks.items():
    task = evaluation.load(settings)
    for split, n in (
        (records.DEV, settings.dev_size),
        (records.TEST, settings.test_size),
    ):
      items = task.items(split, n)
      prompts = [tokenizer.encode(item.prompt) for item in items]
      parts[name, split] = _Part(task, settings, items, prompts)
  return parts


def _longest(parts, positions: int) -> int:
  """As `run.longest` over all parts; says which prompts do not fit."""
  needed = []
  for (name, split), part in parts.items():
    new = part.settings.max_new_tokens
    needed.append(run_lib.longest(part.prompts, new, positions))
    what = f"{split} prompts of {name}"
    run_lib.note_cut(what, part.prompts, new, positions)
  return max(needed)


def _fit(found: _Run, config, shapes, host) -> list[Candidate]:
  """The programs for so many experts.

  A program was traced for the run's number of experts; for another number its
  source is admitted anew.

  Raises:
    UserError: if none can be had.
  """
  experts = len(config.experts)
  if experts == len(found.config.experts):
    return list(found.top)
  with (
      sandbox.Sandbox(
          config.sandbox, shapes, experts, host.allow_weak_sandbox
      ) as box,
      progress.bar(
          f"Admitting for {experts} experts", len(found.top), "program"
      ) as bar,
  ):
    candidates = []
    verdicts = box.admit_all(candidate.source for candidate in found.top)
    for candidate, verdict in zip(found.top, verdicts, strict=True):
      is_rejected = isinstance(verdict, sandbox.Rejection)
      candidates.append(
          dataclasses.replace(
              candidate,
              program=None if is_rejected else verdict.program,
              rejection=verdict if is_rejected else None,
          )
      )
      bar.update()
  if all(candidate.rejection for candidate in candidates):
    raise errors.UserError(
        f"none of the run's {len(candidates)} top programs takes {experts}"
        f" experts; of the first: {candidates[0].rejection.message}"
    )
  return candidates


class _Transfer:
  """Scores models on splits, and says what came of it."""

  def __init__(
      self,
      out: pathlib.Path,
      config: config_lib.Config,
      loaded: worker_lib.Models,
      sampler: sampling.Sampler,
      parts: Mapping[tuple[str, str], _Part],
      candidates: Sequence[Candidate],
  ):
    self._out = out
    self._config = config
    self._models = loaded
    self._sampler = sampler
    self._parts = parts
    self._candidates = candidates
    self._programs = {c.model: c.program for c in candidates if c.program}
    self._scales = [
        f"{_SCALE}{scale}"
        for scale in np.geomspace(*loop.SCALES, len(self._programs)).round(5)
    ]

  def run(self) -> dict[str, Any]:
    """The development split, what it chooses, then the test split."""
    tasks = list(dict.fromkeys(name for name, _ in self._parts))
    tried = [*self._programs, *self._scales]
    dev = self._score(records.DEV, {model: tasks for model in tried})
    chosen = {task: self._choose(task, dev) for task in tasks}
    wanted = {}
    for task, roles in chosen.items():
      for model in roles.values():
        wanted.setdefault(model, []).append(task)
    # A model that has two roles is scored once.
    wanted = {model: list(dict.fromkeys(t)) for model, t in wanted.items()}
    test = self._score(records.TEST, wanted)
    return {
        "candidates": list(map(self._candidate, self._candidates)),
        "budget": {
            "programs": len(self._programs),
            "task_arithmetic": len(self._scales),
        },
        "tasks": {
            task: self._describe(task, roles, dev, test)
            for task, roles in chosen.items()
        },
    }

  def _choose(self, task, dev) -> dict[str, str]:
    """{role: model} for the test split, from the development split alone."""
    roles = {_UNCHANGED: next(iter(self._programs))}
    for role, models in ((_BEST, self._programs), (_ARITHMETIC, self._scales)):
      scored = [m for m in models if not dev[m, task]["failure"]]
      if scored:
        roles[role] = max(scored, key=lambda m: dev[m, task]["accuracy"])
    roles[_SEED] = _SEED
    return roles | {_EXPERT + n: _EXPERT + n for n in self._config.experts}

  # Scores.

  def _score(
      self, split: str, wanted: Mapping[str, Sequence[str]]
  ) -> dict[tuple[str, str], dict[str, Any]]:
    """{(model, task): its score} on a split; what is there is not done again.

    Args:
      split: of each task.
      wanted: model to the tasks that it answers.
    """
    scores, missing = {}, []
    for model, tasks in wanted.items():
      for task in tasks:
        with self._answers(model, task, split) as answers:
          if answers.is_whole:
            scores[model, task] = self._read(answers, task)
          else:
            missing.append((model, task, answers.n, len(answers.rows)))
    total = sum(n for _, _, n, _ in missing)
    done = sum(rows for *_, rows in missing)
    label = f"Transfer: answering {split}"
    with contextlib.ExitStack() as stack:
      if missing:
        bar = stack.enter_context(progress.bar(label, total, "item", done))
      for model in dict.fromkeys(model for model, *_ in missing):
        merged = self._merge(model)
        if not merged.failure:
          self._sampler.swap_weights(merged.params, model)
        for task, n, rows in [m[1:] for m in missing if m[0] == model]:
          if merged.failure:
            scores[model, task] = {"failure": merged.failure}
            bar.update(n - rows)
            continue
          part = self._parts[task, split]
          with self._answers(model, task, split) as answers:
            run_lib.respond(
                answers,
                part.task,
                part.items,
                part.prompts,
                self._sampler,
                part.settings,
                bar.update,
            )
            scores[model, task] = self._read(answers, task)
    return scores

  def _answers(self, model, task, split) -> run_lib.Answers:
    part = self._parts[task, split]
    kind, _, rest = model.partition(":")
    if model.startswith(_EXPERT):
      number = self._config.experts.index(rest)
      rest = f"{number}-{pathlib.Path(rest).name}"
    name = _slug(f"{kind}-{rest}" if rest else kind)
    path = self._out / task / split / f"{name}.jsonl"
    return run_lib.Answers(path, len(part.items), part.settings.batch_size)

  def _read(self, answers, task):
    metrics = self._parts[task, records.TEST].task.metrics
    summary = run_lib.summarize(metrics, answers.rows)
    marks = [row["marks"][metrics[0]] for row in answers.rows]
    return summary | {"failure": "", "right": [m["correct"] for m in marks]}

  def _merge(self, model: str) -> runner.Merged:
    if model == _SEED:
      return runner.Merged(self._models.seed)
    merges = self._models.merges
    if model.startswith(_EXPERT):
      return merges.expert(model.removeprefix(_EXPERT))
    if model.startswith(_SCALE):
      scale = float(model.removeprefix(_SCALE))
      return merges.method("task_arithmetic", weight=scale)
    return merges.program(self._programs[model])

  # What came of it.

  def _candidate(self, candidate: Candidate) -> dict[str, Any]:
    rejection = candidate.rejection
    return {
        "model": candidate.model,
        "dev_in_run": candidate.dev,
        "applies": candidate.program is not None,
        "rejection": rejection and dataclasses.asdict(rejection),
    }

  def _describe(self, task, roles, dev, test):
    scores = {role: test[model, task] for role, model in roles.items()}
    part = self._parts[task, records.TEST]
    return {
        "metric": part.task.headline,
        "n_dev": len(self._parts[task, records.DEV].items),
        "n_test": len(part.items),
        "shots": part.task.shots,
        "dev": {
            model: dev[model, task].get("accuracy")
            for model in (*self._programs, *self._scales)
        },
        "models": {
            role: {
                "model": model,
                "dev": dev.get((model, task), {}).get("accuracy"),
                **{k: v for k, v in scores[role].items() if k != "right"},
            }
            for role, model in roles.items()
        },
        "paired": {
            ours: {
                role: _paired(scores[ours], score)
                for role, score in scores.items()
                if role not in (_UNCHANGED, _BEST) and not score["failure"]
            }
            for ours in (_UNCHANGED, _BEST)
            if ours in roles and not scores[ours]["failure"]
        },
    }


def _paired(first, second):
  """First minus second on the same test items."""
  pairs = list(zip(first["right"], second["right"], strict=True))
  better = sum(a and not b for a, b in pairs)
  worse = sum(b and not a for a, b in pairs)
  n = len(pairs)
  return {
      "difference": (better - worse) / n,
      "ci95": list(intervals.paired(better, worse, n)),
      "n": n,
      "better": better,
      "worse": worse,
  }


def _slug(name: str) -> str:
  """A name that a file can have."""
  return re.sub(r"[^\w.=@-]+", "_", name).strip("_") or "_"


def table(result: Mapping[str, Any]) -> str:
  """The result of `run`, in lines for people."""
  lines = []
  rejected = [c for c in result["candidates"] if not c["applies"]]
  lines.append(
      f"{len(result['candidates'])} top programs of {result['run']} on"
      f" {len(result['experts'])} other experts, {len(rejected)} not applicable"
  )
  for candidate in rejected:
    lines.append(
        f"  {candidate['model'][:20]}: {candidate['rejection']['message']}"
    )
  budget = result["budget"]
  lines.append(
      f"Chosen on development: of {budget['programs']} programs, of"
      f" {budget['task_arithmetic']} scales; then once on test"
  )
  for name, task in result["tasks"].items():
    lines += ["", *_task_lines(name, task)]
  return "\n".join(lines)


def _task_lines(name, task):
  lines = [
      f"{name}, {task['metric']}, %, dev n = {task['n_dev']}, test n ="
      f" {task['n_test']}",
      f"{'':<28}{'dev':>6}{'test':>7}{'95 %':>15}"
      f"{'unchanged - this':>22}{'best - this':>22}",
  ]
  for role, entry in task["models"].items():
    label = role
    if role.startswith(_EXPERT):
      label = f"expert {pathlib.Path(role.removeprefix(_EXPERT)).name}"[:27]
    if entry["failure"]:
      lines.append(f"{label:<28}{'no merge: ' + entry['failure']:>28}")
      continue
    dev = "" if entry["dev"] is None else f"{100 * entry['dev']:.1f}"
    low, high = (f"{100 * x:.1f}" for x in entry["ci95"])
    cells = [
        _difference(task["paired"].get(ours, {}).get(role))
        for ours in (_UNCHANGED, _BEST)
    ]
    lines.append(
        f"{label:<28}{dev:>6}{100 * entry['accuracy']:>7.1f}"
        f"{f'{low} to {high}':>15}{cells[0]:>22}{cells[1]:>22}".rstrip()
    )
  return lines


def _difference(pair):
  if pair is None:
    return ""
  low, high = (f"{100 * x:+.1f}" for x in pair["ci95"])
  return f"{100 * pair['difference']:+.1f} [{low}, {high}]"
