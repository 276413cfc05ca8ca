"""A program's model as a package that another can read, check and repeat."""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import jax

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import report
from selfdev_jax import store as store_lib
from selfdev_jax.evaluation import run as run_lib
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.handover import card
from selfdev_jax.handover import reopen
from selfdev_jax.inspection import queries

SOURCE, IR, PROVENANCE = "program.py", "program.json", "provenance.json"


def run(
    workdir: str | os.PathLike,
    program: str,
    out: str | os.PathLike,
    directories: Mapping[str, pathlib.Path] | None = None,
) -> dict[str, Any]:
  """Merges a program of a run again and writes what is to be handed on.

  Args:
    workdir: of the run; nothing is written there.
    program: "best" or how the program's digest begins.
    out: a new directory: a Hugging Face model with its tokenizer, README.md
      (the card), program.py (as it was written), program.json (the verified
      IR) and provenance.json. Written whole or not at all.
    directories: where models behind names are, as in `loop.run`.

  Returns:
    What provenance.json holds.

  Raises:
    UserError: for what is not there, has changed, or gives other weights than
      in the run; in one line, and nothing is left behind.
  """
  out, directories = pathlib.Path(out), directories or {}
  if out.exists():
    raise errors.UserError(f"--out={out} exists; name a new directory")
  with contextlib.ExitStack() as stack:
    archive = stack.enter_context(store_lib.Store.read(workdir))
    found = queries.program(archive, program)
    _check(archive, found)
    loaded = reopen.load(archive, directories, stack)
    name = records.PROGRAM + found.digest
    merged = worker_lib.merge(loaded, name, archive.program_of(name))
    if merged.failure:
      raise errors.UserError(
          f"program {found.digest[:12]} was merged in the run and now is not"
          f" ({merged.failure}); free memory, or stop what else runs here"
      )
    weights = models.checksum(merged.params)
    for score in filter(None, (found.dev, found.test)):
      if score.weights not in ("", weights):
        raise errors.UserError(
            f"program {found.digest[:12]} gives other weights here ({weights})"
            f" than in the run ({score.weights}), where"
            f" {_versions(archive.sessions()[-1])} made them; nothing was"
            " written. launch.replay says how much that changes"
        )
    provenance = _provenance(archive, found, weights, directories)
    text = card.card(provenance, found.source, out.name)

    def finish(new: pathlib.Path):
      if models.checksum(convert.open_leaves(new)[1]) != weights:
        raise errors.UserError(
            f"what was written to {new} is not what was merged; is the disk"
            " sound?"
        )
      for name, content in (
          ("README.md", text),
          (SOURCE, found.source.rstrip() + "\n"),
          (IR, found.ir),
          (PROVENANCE, json.dumps(provenance, indent=2) + "\n"),
      ):
        (new / name).write_text(content, encoding="utf-8")

    convert.save(
        out, loaded.decoder, merged.params, loaded.directory, finish=finish
    )
  return provenance


def _check(archive: store_lib.Store, found: queries.Program):
  """Raises where a program has no model to hand on."""
  name = f"program {found.digest[:12]} of {archive.workdir}"
  if found.row.stage:
    raise errors.UserError(
        f"{name} has no merged model: its merge failed ({found.row.code})"
    )
  if found.dev is None:
    raise errors.UserError(f"{name} has not been scored")


def _versions(session: Mapping[str, Any]) -> str:
  named = [
      f"{name} {session[name]}"
      for name in ("jax", "device", "machine")
      if name in session
  ]
  return ", ".join(named) or "another session"


def _provenance(archive, found, weights, directories) -> dict[str, Any]:
  """All that is known of a program's model, as `json.dumps` takes it."""
  config, identity = archive.config(), archive.meta("identity")
  summary = report.summarize(archive)
  return {
      "program": found.digest,
      "weights": weights,
      "stats": found.stats,
      "found": _found(archive, found),
      "written": [w._asdict() for w in found.writings],
      "models": [
          {
              "name": name,
              "role": "expert" if i else "seed",
              "path": _path(name, directories),
              "digest": identity[f"model {name}"],
          }
          for i, name in enumerate((config.seed_model, *config.experts))
      ],
      "is_toy": config.tiny is not None and config.seed_model in directories,
      "scope": config.merge.scope,
      "scores": {
          score.split: _score(archive, score)
          for score in (found.dev, found.test)
          if score is not None
      },
      "chosen_among": summary["best"]["evaluated"],
      "is_best": found.digest == summary["best"]["program_id"],
      "baselines": summary["baselines"],
      "task": config.evaluate.task,
      "sampled_by": summary["sampled_by"],
      "seed": config.seed,
      "config": config_lib.to_dict(config),
      "config_digest": config_lib.digest(config),
      "identity": identity,
      "sessions": archive.sessions(),
      "exported": {
          "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
          "device": jax.devices()[0].device_kind,
          **run_lib.versions(),
      },
  }


def _found(archive, found) -> dict[str, Any]:
  """The completion that gave it first, and what sampled that."""
  row = found.row
  writing = queries.completion(archive, row.arm, row.iteration, row.item)
  factory = queries.factory(archive, writing.completion.factory)
  return {
      "completion": dataclasses.asdict(writing.completion),
      "factory_digest": factory.digest,
      **_by(writing.activity, writing.provenance),
  }


def _score(archive, score: records.Score) -> dict[str, Any]:
  return dataclasses.asdict(score) | {
      "accuracy": score.accuracy,
      "ci95": score.interval,
      **_by(*queries.score_origin(archive, score.model, score.split)),
  }


def _by(activity, session) -> dict[str, Any]:
  return {"activity": dataclasses.asdict(activity), "session": session}


def _path(name: str, directories: Mapping[str, pathlib.Path]) -> str:
  """How another machine may name a model: without this one's directories."""
  if name in directories:
    return "/".join(directories[name].parts[-2:])
  return pathlib.Path(name).name if pathlib.Path(name).is_dir() else name
