"""Computes a number of a run again: the merge, the answers, the score."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import os
import pathlib
from typing import Any

from selfdev_jax import cache
from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import loop
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import store as store_lib
from selfdev_jax.evaluation import racing
from selfdev_jax.evaluation import run as run_lib
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.handover import reopen
from selfdev_jax.inspection import queries
from selfdev_jax.sampling import engine as engine_lib

_SPLITS = (records.DEV, records.TEST)


@dataclasses.dataclass(frozen=True)
class _Scored:
  """A score as it is archived.

  Attributes:
    score: of the model whose answers these are.
    responses: the answers.
  """

  score: records.Score
  responses: Sequence[records.Response]


def run(
    workdir: str | os.PathLike,
    *,
    program: str | None = None,
    model: str | None = None,
    split: str | None = None,
    directories: Mapping[str, pathlib.Path] | None = None,
    host: loop.Host | None = None,
) -> dict[str, Any]:
  """Merges a model of a run again, asks it the same, and compares.

  Where the run took a score from a program that does the same, the number is
  that program's, and it is what is merged and asked.

  Args:
    workdir: of the run; nothing is written there.
    program: "best" or how the program's digest begins.
    model: instead, the name of a score, such as `seed` or `ties:...`.
    split: development or test; None: both, as far as there are scores.
    directories: where models behind names are, as in `loop.run`.
    host: what the sampler uses of this machine.

  Returns:
    What `json.dumps` takes. "same_weights" is None where the archive knows no
    checksum, as those of earlier versions; "same_score"; "answers_differing",
    of "answers"; "splits" has the details.

  Raises:
    UserError: for what is not there or has changed, in one line.
  """
  host = host or loop.Host()
  with contextlib.ExitStack() as stack:
    with store_lib.Store.read(workdir) as archive:
      if model is None:
        model = records.PROGRAM + queries.find(archive, program)
      config = archive.config()
      wanted = _wanted(archive, model, split)
      items = evaluation.load_items(config.evaluate)
      found = evaluation.digest_items(config.evaluate)
      if found != archive.meta("identity")["items"]:
        raise errors.UserError(
            f"the items of {config.evaluate.task} are others than in the run"
            f" in {workdir}; its data files have changed"
        )
      loaded = reopen.load(archive, directories or {}, stack)
    kinds = {split: _kind(scored.score) for split, scored in wanted.items()}
    samplers = {
        kind: _open(kind, config, loaded, items, host, stack)
        for kind in dict.fromkeys(kinds.values())
    }
    splits = {}
    for name in dict.fromkeys(s.score.model for s in wanted.values()):
      with store_lib.Store.read(workdir) as archive:
        merged = worker_lib.merge(loaded, name, archive.program_of(name))
      if merged.failure:
        raise errors.UserError(
            f"{name} was merged in the run and now is not ({merged.failure});"
            " free memory, or stop what else runs here"
        )
      weights = models.checksum(merged.params)
      for split, scored in wanted.items():
        if scored.score.model != name:
          continue
        sampler, part = samplers[kinds[split]], items[split]
        sampler.swap_weights(merged.params, name)
        responses = _ask(sampler, config.evaluate, part, scored.score)
        splits[split] = _compare(scored, weights, responses, sampler.engine)
  return _result(model, splits)


def is_same(result: Mapping[str, Any]) -> bool:
  """Whether nothing differs; a checksum that is not known does not."""
  return (
      result["same_weights"] is not False
      and result["same_score"]
      and not result["answers_differing"]
  )


def _wanted(archive, model: str, split: str | None) -> dict[str, _Scored]:
  """What is archived of a model, by split.

  Raises:
    UserError: if there is nothing, or no merged model.
  """
  wanted = {}
  for name in _SPLITS if split is None else (split,):
    score = archive.score(model, name)
    if score is None:
      continue
    if score.reused:
      score = archive.score(score.reused, name)
    if score.correct is None:
      raise errors.UserError(
          f"{model} has no merged model in {archive.workdir}: its merge failed"
          f" ({score.failure})"
      )
    wanted[name] = _Scored(score, archive.responses(score.model, name))
  if not wanted:
    raise errors.UserError(
        f"{archive.workdir} has no {split or 'dev or test'} score of {model}"
    )
  return wanted


def _kind(score: records.Score) -> str:
  """The kind of sampler that was asked first; JAX's where none is known."""
  kinds = [engine.partition(" ")[0] for engine in score.engine.split(", ")]
  if len(set(kinds)) > 1:
    progress.note(
        f"{score.model} was asked through {score.engine}; here only through"
        f" {kinds[0]}"
    )
  return kinds[0] if kinds[0] in engine_lib.KINDS else "jax"


def _open(kind, config, loaded, items, host, stack) -> sampling.Sampler:
  prompts = [
      loaded.tokenizer.encode(item.prompt)
      for part in items.values()
      for item in part
  ]
  longest = run_lib.longest(
      prompts, config.evaluate.max_new_tokens, loaded.decoder.max_positions
  )
  return stack.enter_context(
      contextlib.closing(
          worker_lib.open_sampler(
              kind,
              config.vllm,
              loaded,
              longest,
              cache.directory() / "replay",
              host.vllm_python,
              host.vllm_address,
          )
      )
  )


def _ask(
    sampler: sampling.Sampler,
    settings: config_lib.Evaluate,
    items: Sequence[evaluation.Item],
    score: records.Score,
) -> list[records.Response]:
  """Asks what the run asked, in its blocks: a batch's shape moves last bits."""
  task, responses = evaluation.load(settings), []
  ends = [end for end in _ends(settings, score) if end <= score.n]
  with progress.bar(f"Asking on {score.split}", score.n, "answer") as bar:
    for end in ends:
      first = len(responses)
      responses += worker_lib.respond(
          sampler, task, settings, items[first:end], first
      )
      bar.update(end - first)
  return responses


def _ends(settings: config_lib.Evaluate, score: records.Score) -> Sequence[int]:
  """Of the blocks in which the run asked a model, see `loop`."""
  raced = score.split == records.DEV and (
      score.model.partition(":")[0] in ("program", *records.SWEEPS)
  )
  block = settings.racing_block if settings.racing and raced else score.items
  return racing.block_ends(score.items, block)


def _compare(scored, weights, responses, engine) -> dict[str, Any]:
  score = scored.score
  pairs = zip(scored.responses, responses, strict=True)
  there_and_here = lambda a, b: {"archived": a, "now": b}
  return {
      "model": score.model,
      "n": score.n,
      "items": score.items,
      "correct": there_and_here(
          score.correct, sum(r.correct for r in responses)
      ),
      "answers_differing": sum(a != b for a, b in pairs),
      "weights": there_and_here(score.weights, weights),
      "engine": there_and_here(score.engine, engine),
  }


def _result(model, splits) -> dict[str, Any]:
  pairs = [
      (s["weights"]["archived"], s["weights"]["now"]) for s in splits.values()
  ]
  scores = [s["correct"] for s in splits.values()]
  known = [a == b for a, b in pairs if a]
  return {
      "model": model,
      "same_weights": all(known) if known else None,
      "same_score": all(s["archived"] == s["now"] for s in scores),
      "answers_differing": sum(s["answers_differing"] for s in splits.values()),
      "answers": sum(s["n"] for s in splits.values()),
      "splits": splits,
  }


def table(result: Mapping[str, Any]) -> str:
  """The result of `run`, in lines for people."""
  lines = [result["model"]]
  for split, s in result["splits"].items():
    archived, now = s["correct"]["archived"], s["correct"]["now"]
    lines.append(
        f"  {split}: {archived} of {s['n']} right in the archive, {now} now;"
        f" {s['answers_differing']} answers differ"
    )
    if s["model"] != result["model"]:
      lines.append(f"    the score was taken from {s['model']}")
    if s["weights"]["archived"]:
      lines.append(
          f"    weights {s['weights']['archived']} in the archive,"
          f" {s['weights']['now']} now"
      )
    else:
      lines.append(
          f"    weights {s['weights']['now']}; the archive knows no checksum"
      )
    if s["engine"]["archived"] != s["engine"]["now"]:
      lines.append(
          f"    asked through {s['engine']['archived'] or 'what is not known'}"
          f" there, {s['engine']['now']} here"
      )
  return "\n".join(lines)
