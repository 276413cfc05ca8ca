"""Answers of `launch.inspect`: as text, as one JSON document, as CSV."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import shlex
import time
from typing import Any

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import compare as compare_lib
from selfdev_jax.inspection import queries
from selfdev_jax.inspection import stages as stages_lib
from selfdev_jax.inspection import text

_SHORT = 12  # Digits of a digest in text.
_FEW = 10  # Lines of a list within a page of text.
_PROMPT_END = 240  # Characters; the shots before are the same in all prompts.


@dataclasses.dataclass(frozen=True)
class View:
  """One answer in all forms, of which one is made.

  Attributes:
    document: gives what `json.dumps` takes.
    columns: of the CSV.
    rows: gives its rows; fractions are raw.
    write: gives the text, in which `show` escapes control characters.
  """

  document: Callable[[], Any]
  columns: Sequence[str]
  rows: Callable[[], Iterable[Sequence[Any]]]
  write: Callable[[], str]

  def show(self, form: str) -> str:
    """The answer as "text", "json" or "csv"."""
    if form == "json":
      return json.dumps(self.document(), indent=2)
    if form == "csv":
      return text.as_csv(self.columns, self.rows())
    return text.visible(self.write())


def _command(store, *flags):
  return shlex.join(
      [
          *("python", "-m", "launch.inspect"),
          f"--workdir={store.workdir}",
          *flags,
      ]
  )


def _leads(*lines: tuple[str, str]) -> str:
  return "\n".join(["Further:", *(f"  {c}   # {what}" for c, what in lines)])


def _next(store, flags, end, total):
  """The lead to the rest of a list of which `end` lines were shown."""
  if end >= total:
    return []
  return [(_command(store, *flags, f"--offset={end}"), "the next")]


# The run.


def overview(store: store_lib.Store) -> View:
  """Iterations, baselines and how far the run is."""
  iterations = queries.iterations(store)
  baselines = queries.baselines(store)
  stages = stages_lib.stages(store)
  names = [field.name for field in dataclasses.fields(queries.Iteration)]

  def write():
    parts = [_state(store, stages)]
    if iterations:
      parts.append(
          text.table(
              "Iterations (development accuracy of their candidates, %)",
              names,
              map(dataclasses.astuple, iterations),
          )
      )
    if baselines:
      parts.append(
          text.table(
              "Baselines (accuracy in %, 95 % interval; best of each on"
              " development)",
              ["model", "tried", "development", "test"],
              [
                  (
                      b.dev.model if b.dev else b.name,
                      b.tried,
                      _accuracy(b.dev),
                      _accuracy(b.test),
                  )
                  for b in baselines
              ],
          )
      )
    parts.append(
        _leads(
            (_command(store, "--programs"), "what was written"),
            (
                _command(store, "--completions=loop/1"),
                "all that an iteration sampled",
            ),
            (
                _command(store, "--programs", "--candidates=loop/1"),
                "what its mean is of",
            ),
            (_command(store, "--program=best"), "one in full"),
            *(
                (
                    _command(store, f"--scores={b.name.partition(':')[0]}"),
                    "all of a baseline's models",
                )
                for b in baselines[-1:]
            ),
            (
                _command(store, "--answers=seed", "--split=dev"),
                "the generations behind a score",
            ),
            *(
                [(_command(store, "--incidents"), "what happened to workers")]
                if queries.incident_counts(store)
                else []
            ),
        )
    )
    return "\n\n".join(parts)

  return View(
      lambda: {
          "workdir": str(store.workdir),
          "config": store.meta("config"),
          "identity": store.meta("identity"),
          "sessions": store.sessions(),
          "stages": list(map(dataclasses.asdict, stages)),
          "iterations": list(map(dataclasses.asdict, iterations)),
          "baselines": [
              {
                  "name": b.name,
                  "tried": b.tried,
                  "dev": _score(b.dev),
                  "test": _score(b.test),
              }
              for b in baselines
          ],
          "rejections": list(
              map(dataclasses.asdict, queries.rejections(store))
          ),
      },
      names,
      lambda: map(dataclasses.astuple, iterations),
      write,
  )


def _state(store, stages):
  """A line on how far the run is."""
  name = store.meta("config").get("name") or "without a name"
  if all(stage.state == "done" for stage in stages):
    seconds = sum(stage.seconds for stage in stages)
    return f"Run {text.line(name)}: finished after {text.duration(seconds)}."
  # The first that is not done: the one that is worked on, or the next.
  now = next((s for s in stages if s.state in ("running", "stopped")), None)
  stage = now or next(s for s in stages if s.state == "waiting")
  where = (
      f"{stage.arm}, iteration {stage.iteration}, " if stage.iteration else ""
  )
  at = f"{where}{stage.name}"
  if stage.total:
    at += f", {stage.done} of {stage.total} {stage.unit}s"
  if store_lib.is_running(store.workdir):
    known = [s.left_s for s in stages if s.left_s is not None]
    least = "at least " if len(known) < len(stages) else ""
    left = f"{least}about {text.duration(sum(known))} left"
    return f"Run {text.line(name)}: running, {at}; {left}."
  how = "in" if now else "before"
  return (
      f"Run {text.line(name)}: not running, stopped {how} {at}; the command"
      " that started it resumes it."
  )


# Lists.

_ROW_COLUMNS = (
    *("digest", "arm", "iteration", "item", "written"),
    *("stage", "code", "message"),
    *("dev", "dev_low", "dev_high", "dev_n", "dev_items"),
    *("test", "test_low", "test_high", "test_n", "test_items"),
)


def programs(
    store: store_lib.Store, *, limit: int | None, offset: int, **filters: Any
) -> View:
  """The list of programs; see `queries.programs`.

  Raises:
    UserError: if the run has no such verdict, or no such candidates.
  """
  rows, total = queries.programs(store, limit=limit, offset=offset, **filters)
  if not total:
    _check_filters(store, **filters)

  def write():
    lines = [
        (
            row.digest[:_SHORT] if row.digest else "-",
            _place(row),
            row.written,
            _ended(row),
            _accuracy(row.dev),
            _accuracy(row.test),
        )
        for row in rows
    ]
    title = (
        f"{_extent(len(rows), total, offset)} (accuracy in %, 95 % interval)"
    )
    columns = ["program", "first", "written", "verdict", "development", "test"]
    leads = [(_command(store, "--program=ID"), "one in full")]
    leads.append(
        (
            _command(store, "--completion=ARM/ITERATION/ITEM"),
            "a rejected one, by its first",
        )
    )
    return f"{text.table(title, columns, lines)}\n\n{_leads(*leads)}"

  return View(
      lambda: {
          "total": total,
          "offset": offset,
          "programs": list(map(_row, rows)),
      },
      _ROW_COLUMNS,
      lambda: map(_flat_row, rows),
      write,
  )


def _check_filters(store, *, verdict="", candidate_of=None, **_):
  reasons = queries.rejections(store)
  known = {"", queries.ADMITTED, queries.REJECTED}
  known |= {r.stage for r in reasons} | {f"{r.stage}:{r.code}" for r in reasons}
  if verdict not in known:
    there = text.line(", ".join(sorted(known - {""})), 1000)
    raise errors.UserError(
        f"{store.workdir} has no verdict {verdict!r}; it has {there}"
    )
  places = [
      (i.arm, i.iteration) for i in queries.iterations(store) if i.candidates
  ]
  if candidate_of and candidate_of not in places:
    raise queries.nothing_of(store, "candidates", *candidate_of, places)


def completions(
    store: store_lib.Store,
    arm: str,
    iteration: int,
    limit: int | None,
    offset: int,
) -> View:
  """What an arm sampled in an iteration, in order."""
  found, total = queries.completions(
      store, arm, iteration, limit=limit, offset=offset
  )
  place = f"{arm}/{iteration}"

  def write():
    lines = [
        (
            f"{place}/{c.item}",
            c.digest[:_SHORT] if c.digest else "-",
            _ended(c),
            "" if c.finished else "cut",
            _accuracy(c.dev),
        )
        for c in found
    ]
    title = (
        f"{_extent(len(found), total, offset)} completions of {place}"
        " (accuracy in %, 95 % interval)"
    )
    columns = ["completion", "program", "verdict", "length", "development"]
    leads = [
        (_command(store, f"--completion={place}/{c.item}"), "one in full")
        for c in found[:1]
    ]
    flag = f"--completions={place}"
    leads += _next(store, [flag], offset + len(found), total)
    table = text.table(title, columns, lines)
    return "\n\n".join([table] + ([_leads(*leads)] if leads else []))

  names = ("item", "finished", "digest", "stage", "code", "message")
  flat = lambda c: [getattr(c, name) for name in names]
  return View(
      lambda: {
          "arm": arm,
          "iteration": iteration,
          "total": total,
          "offset": offset,
          "completions": [
              dataclasses.asdict(c) | {"dev": _score(c.dev)} for c in found
          ],
      },
      (*names, *_ROW_COLUMNS[8:13]),
      lambda: ([*flat(c), *_flat_score(c.dev)] for c in found),
      write,
  )


def _ended(row):
  """What became of a completion, or of a program."""
  if row.stage is None:
    return "not judged yet"
  return f"{row.stage}: {row.code}" if row.stage else "admitted"


def _extent(shown, total, offset):
  if not shown:
    return f"None of {total}"
  if shown == total:
    return f"All {total}"
  return f"{offset + 1} to {offset + shown} of {total}"


def _place(row):
  return f"{row.arm}/{row.iteration}/{row.item}"


def _row(row):
  return dataclasses.asdict(row) | {
      "dev": _score(row.dev),
      "test": _score(row.test),
  }


def _flat_row(row):
  return [
      *(getattr(row, name) for name in _ROW_COLUMNS[:8]),
      *_flat_score(row.dev),
      *_flat_score(row.test),
  ]


def _flat_score(score):
  if score is None:
    return [None] * 5
  low, high = score.interval or (None, None)
  return [score.accuracy, low, high, score.n, score.items]


def _score(score):
  return score and dataclasses.asdict(score) | {
      "accuracy": score.accuracy,
      "interval": score.interval,
  }


def _accuracy(score):
  """A score in a cell."""
  if score is None:
    return ""
  if score.accuracy is None:
    return "no merged model"
  low, high = map(text.percent, score.interval)
  said = f"{text.percent(score.accuracy)} [{low}, {high}]"
  return said if score.complete else f"{said} of {score.n}/{score.items}"


# One program.


def program(store: store_lib.Store, prefix: str) -> View:
  """One program in full."""
  found = queries.program(store, prefix)
  model = records.PROGRAM + found.digest
  first = (found.row.arm, found.row.iteration, found.row.item)
  written = queries.completion(store, *first)
  scored = {
      split: queries.score_origin(store, model, split)
      for split, score in _splits(found)
      if score
  }

  def write():
    origins = [(written.activity, written.provenance), *scored.values()]
    return "\n\n".join(
        [
            _about(found),
            f"Source, as first written:\n{text.indented(found.source)}",
            _scores_table(found, scored),
            _writings(found, written),
            *_pairs(found),
            *_relatives(found),
            _sessions(origins),
            _program_leads(store, found),
        ]
    )

  fields = {
      name: getattr(found, name) for name in ("digest", "source", "stats")
  }
  document = fields | {
      "ir": json.loads(found.ir),
      "row": _row(found.row),
      "written": [w._asdict() for w in found.writings],
      "written_by": _made_by(written.activity, written.provenance),
      "scored_by": {
          split: _made_by(*origin) for split, origin in scored.items()
      },
      "pairs": list(map(dataclasses.asdict, found.pairs)),
      "same": found.same,
      "near": [{"digest": d, "distance": x} for d, x in found.near],
  }
  return View(
      lambda: document,
      (*_ROW_COLUMNS, *found.stats, "source"),
      lambda: [[*_flat_row(found.row), *found.stats.values(), found.source]],
      write,
  )


def _splits(found):
  return (records.DEV, found.dev), (records.TEST, found.test)


def _about(found):
  row = found.row
  verdict = (
      f"admitted, but {row.message} ({row.code})" if row.stage else "admitted"
  )
  stats = ", ".join(f"{k} {_number(v)}" for k, v in found.stats.items())
  return (
      f"Program {found.digest}\n"
      f"Verdict: {verdict}.\nIR: {stats or 'no statistics'}."
  )


def _number(value):
  is_whole = isinstance(value, float) and value.is_integer()
  return f"{int(value) if is_whole else value:,}"


def _scores_table(found, scored):
  rows = [
      (
          split,
          f"{s.correct} of {s.n}" if s.correct is not None else "-",
          _accuracy(s),
          text.duration(s.merge_s),
          text.duration(s.evaluate_s),
          s.engine,
      )
      for split, s in _splits(found)
      if s
  ]
  if not rows:
    return "Scores: none yet."
  columns = ["split", "right", "accuracy, %", "merge", "evaluate", "engine"]
  lines = [text.table("Scores (95 % interval)", columns, rows)]
  for split, score in _splits(found):
    if score and score.reused:
      other = score.reused.removeprefix(records.PROGRAM)
      lines.append(
          f"The {split} score is that of program {other[:_SHORT]}, which has"
          " the same fingerprint and gave the answers."
      )
    if score:
      lines.append(f"{split}: {_made(scored[split][0])}")
  return "\n".join(lines)


def _writings(found, written):
  lines = [
      f"Written by {len(found.writings)} completion"
      f"{'s' * (len(found.writings) > 1)} (arm/iteration/item, the factory's"
      " iteration):"
  ]
  lines += _few(
      [f"  {a}/{t}/{item}, factory {f}" for a, t, item, f in found.writings]
  )
  lines.append(f"The first: {_made(written.activity)}")
  return "\n".join(lines)


def _few(lines):
  more = len(lines) - _FEW
  if more <= 0:
    return lines
  return [*lines[:_FEW], f"  and {more} more; --format=json has all"]


def _pairs(found):
  if not found.pairs:
    return []
  lines = []
  for p in found.pairs:
    part = "chosen over" if p.is_chosen else "rejected for"
    other = "one that did not run,"
    if p.other_digest:
      other = p.other_digest[:_SHORT]
    lines.append(
        f"  {p.iteration}/{p.item}: {part} {other}"
        f" {records.LOOP}/{p.other_iteration}/{p.other_item}"
    )
  return ["\n".join([f"Pairs it took part in: {len(lines)}", *_few(lines)])]


def _relatives(found):
  parts = []
  if found.same:
    names = [f"  {digest[:_SHORT]}" for digest in found.same]
    title = "Programs with the same fingerprint that share its score:"
    parts.append("\n".join([title, *_few(names)]))
  if found.near:
    title = "Nearest fingerprints (0: does the same; at most 2):"
    names = [f"  {d[:_SHORT]}  {distance:.2g}" for d, distance in found.near]
    parts.append("\n".join([title, *names]))
  return parts


def _program_leads(store, found):
  short = found.digest[:_SHORT]
  leads = [
      (_command(store, f"--completion={_place(found.row)}"), "what wrote it"),
      (_command(store, f"--program={short}", "--ir"), "its verified IR"),
  ]
  leads += [
      (
          _command(
              store,
              f"--answers={records.PROGRAM}{found.digest}",
              f"--split={s}",
          ),
          f"the generations behind its {s} score",
      )
      for s, score in _splits(found)
      if score and score.correct is not None
  ]
  if found.pairs:
    pair_ = found.pairs[0]
    leads.append(
        (_command(store, f"--pair={pair_.iteration}/{pair_.item}"), "a pair")
    )
  return _leads(*leads)


def _made_by(activity, provenance):
  return {"activity": dataclasses.asdict(activity), "session": provenance}


def _made(activity: records.Activity) -> str:
  """What computed something; see `_sessions` for where."""
  where = f"{activity.arm}, iteration {activity.iteration}, "
  said = f"{where if activity.iteration else ''}{activity.stage}"
  if activity.started is not None:
    began = time.gmtime(activity.started)
    said += time.strftime(", begun %Y-%m-%d %H:%M:%S UTC", began)
  return (
      f"{said} (activity {activity.id}, seed {activity.seed}, session"
      f" {activity.session})"
  )


def _sessions(
    origins: Iterable[tuple[records.Activity, Mapping[str, Any]]],
) -> str:
  """Versions and hardware of all sessions that had a part."""
  lines = {}
  for activity, provenance in origins:
    values = config_lib.flatten(dict(provenance)).items()
    said = ", ".join(f"{k} {v}" for k, v in values if v != "")
    lines[activity.session] = f"Session {activity.session}: {said}"
  return "\n".join(lines[key] for key in sorted(lines))


# What lies behind.


def scores(
    store: store_lib.Store, family: str, limit: int | None, offset: int
) -> View:
  """The models of one of `queries.FAMILIES`, the best first."""
  found, total = queries.scores(store, family, limit, offset)

  def write():
    title = (
        f"{_extent(len(found), total, offset)} models of {family} (accuracy in"
        " %, 95 % interval)"
    )
    lines = [
        (dev.model, _accuracy(dev), _accuracy(test)) for dev, test in found
    ]
    leads = [
        (
            _command(store, f"--answers={dev.model}", f"--split={dev.split}"),
            "the generations behind a score",
        )
        for dev, _ in found[:1]
    ]
    leads += _next(store, [f"--scores={family}"], offset + len(found), total)
    table = text.table(title, ["model", "development", "test"], lines)
    return "\n\n".join([table] + ([_leads(*leads)] if leads else []))

  return View(
      lambda: {
          "family": family,
          "total": total,
          "offset": offset,
          "models": [
              {"model": dev.model, "dev": _score(dev), "test": _score(test)}
              for dev, test in found
          ],
      },
      ("model", *_ROW_COLUMNS[8:]),
      lambda: (
          [dev.model, *_flat_score(dev), *_flat_score(test)]
          for dev, test in found
      ),
      write,
  )


def answers(
    store: store_lib.Store,
    model: str,
    split: str,
    limit: int | None,
    offset: int,
) -> View:
  """The generations behind a score."""
  found, total = queries.answers(store, model, split, limit, offset)
  origins = queries.answered_by(store, model, split)
  columns = [field.name for field in dataclasses.fields(records.Response)]

  def write():
    blocks = [
        f"{_extent(len(found), total, offset)} {split} answers of {model}",
        *(f"By {_made(activity)}" for activity, _ in origins),
        *map(_answer, found),
        _sessions(origins),
    ]
    leads = []
    if model.startswith(records.PROGRAM):
      digest = model.removeprefix(records.PROGRAM)
      flag = f"--program={digest[:_SHORT]}"
      leads.append((_command(store, flag), "the program"))
    flags = [f"--answers={model}", f"--split={split}"]
    leads += _next(store, flags, offset + len(found), total)
    if leads:
      blocks.append(_leads(*leads))
    return "\n\n".join(blocks)

  return View(
      lambda: {
          "model": model,
          "split": split,
          "total": total,
          "offset": offset,
          "answered_by": [_made_by(*origin) for origin in origins],
          "answers": list(map(dataclasses.asdict, found)),
      },
      columns,
      lambda: map(dataclasses.astuple, found),
      write,
  )


def _answer(response):
  said = "right" if response.correct else "wrong"
  if response.trouble:
    said += f" ({response.trouble})"
  prompt = response.prompt
  start = "..." if len(prompt) > _PROMPT_END else ""
  extracted = "nothing"
  if response.extracted is not None:
    extracted = repr(text.line(response.extracted))
  return (
      f"Item {response.item}: {said}, extracted {extracted}, expected"
      f" {text.line(response.gold)!r}"
      f"{', the prompt was cut' if response.truncated else ''}\n"
      f"Prompt:\n{text.indented(start + prompt[-_PROMPT_END:])}\n"
      f"Answer:\n{text.indented(response.text)}"
  )


def incidents(store: store_lib.Store, limit: int | None, offset: int) -> View:
  """What happened to workers of a run over many hosts, in order."""
  found, total = queries.incidents(store, limit, offset)
  counts = queries.incident_counts(store)
  columns = [field.name for field in dataclasses.fields(queries.Incident)]

  def write():
    title = f"{_extent(len(found), total, offset)} incidents of workers, in UTC"
    if counts:
      title += f" ({', '.join(f'{n} {kind}' for kind, n in counts.items())})"
    lines = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(i.at)),
            i.kind,
            i.worker,
            i.host,
            f"{i.arm}/{i.iteration} {i.stage}" if i.iteration else i.stage,
            i.detail,
        )
        for i in found
    ]
    names = ["time", "what", "worker", "host", "during", "detail"]
    leads = _next(store, ["--incidents"], offset + len(found), total)
    flags = ("--incidents", "--format=json")
    leads.append((_command(store, *flags), "with exact times"))
    return f"{text.table(title, names, lines)}\n\n{_leads(*leads)}"

  return View(
      lambda: {
          "total": total,
          "offset": offset,
          "counts": counts,
          "incidents": list(map(dataclasses.asdict, found)),
      },
      columns,
      lambda: map(dataclasses.astuple, found),
      write,
  )


def completion(
    store: store_lib.Store, arm: str, iteration: int, item: int
) -> View:
  """A completion, its verdict and the factory that wrote it."""
  found = queries.completion(store, arm, iteration, item)
  factory = queries.factory(store, found.completion.factory)
  verdict = found.verdict
  document = {
      "completion": dataclasses.asdict(found.completion),
      "verdict": verdict and dataclasses.asdict(verdict),
      "factory": dataclasses.asdict(factory),
      **_made_by(found.activity, found.provenance),
  }

  def write():
    said = found.completion
    cut = "" if said.finished else ", cut at the token limit"
    leads = []
    if verdict and verdict.digest:
      flag = f"--program={verdict.digest[:_SHORT]}"
      leads.append((_command(store, flag), "the program"))
    elif verdict:
      flag = f"--verdict={verdict.stage}:{verdict.code}"
      leads.append((_command(store, "--programs", flag), "others like it"))
    if factory.pairs:
      flag = f"--pair={factory.iteration - 1}/0"
      leads.append(
          (_command(store, flag), "the first pair of its factory's training")
      )
    parts = [
        f"Completion {arm}/{iteration}/{item}, by {said.engine or 'unknown'}"
        f"{cut}\n{_verdict(verdict)}\n{_factory(factory)}\n"
        f"By {_made(found.activity)}",
        f"Text:\n{text.indented(said.text)}",
    ]
    if verdict:
      parts.append(f"Source taken from it:\n{text.indented(verdict.source)}")
    parts.append(_sessions([(found.activity, found.provenance)]))
    return "\n\n".join(parts + ([_leads(*leads)] if leads else []))

  flat = document["completion"] | {
      key: verdict and getattr(verdict, key)
      for key in ("source", "digest", "stage", "code", "message")
  }
  return View(lambda: document, list(flat), lambda: [flat.values()], write)


def _verdict(verdict):
  if verdict is None:
    return "Verdict: none yet."
  if verdict.admitted:
    return f"Verdict: admitted as program {verdict.digest}."
  return (
      f"Verdict: rejected, {verdict.stage}: {verdict.code}."
      f" {text.line(verdict.message, 400)}"
  )


def _factory(factory):
  if not factory.digest and factory.iteration == 1:
    return "Factory: the seed model."
  return (
      f"Factory: of iteration {factory.iteration}, adapter"
      f" {factory.digest or '(no digest kept)'}, trained on the {factory.pairs}"
      f" pairs of iteration {factory.iteration - 1}."
  )


def pair(store: store_lib.Store, iteration: int, item: int) -> View:
  """A preference pair."""
  found = queries.pair(store, iteration, item)
  document = dataclasses.asdict(found)

  def write():
    chosen = f"{records.LOOP}/{found.chosen_iteration}/{found.chosen_item}"
    rejected = f"{records.LOOP}/{iteration}/{found.rejected_item}"
    leads = [(_command(store, f"--completion={chosen}"), "the chosen one")]
    leads.append(
        (_command(store, f"--completion={rejected}"), "the rejected one")
    )
    leads += [
        (_command(store, f"--program={digest[:_SHORT]}"), f"{side} program")
        for side, digest in (
            ("the chosen", found.chosen_digest),
            ("the rejected", found.rejected_digest),
        )
        if digest
    ]
    return "\n\n".join(
        [
            f"Pair {iteration}/{item}, for the factory of iteration"
            f" {iteration + 1}",
            f"Chosen ({chosen}):\n{text.indented(found.chosen)}",
            f"Rejected ({rejected}):\n{text.indented(found.rejected)}",
            _leads(*leads),
        ]
    )

  return View(
      lambda: document, list(document), lambda: [document.values()], write
  )


# Two runs.


def comparison(
    here: store_lib.Store, there: store_lib.Store, limit: int | None
) -> View:
  """What differs between two runs; `limit` cuts the lists of programs."""
  found = compare_lib.compare(here, there)
  cut = dataclasses.replace(
      found,
      only_here=found.only_here[:limit],
      only_there=found.only_there[:limit],
      scores=found.scores[:limit],
  )
  document = lambda: dataclasses.asdict(cut) | {
      "here": str(here.workdir),
      "there": str(there.workdir),
      "iterations": [
          {"here": _iteration(a), "there": _iteration(b)}
          for a, b in found.iterations
      ],
  }

  def write():
    parts = [f"here:  {here.workdir}\nthere: {there.workdir}"]
    for title, differences in (
        ("Config", found.config),
        ("Models, prompt and items", found.identity),
        ("Versions and hardware", found.versions),
    ):
      if differences:
        rows = [
            (d.key, _short_value(d.here), _short_value(d.there))
            for d in differences
        ]
        parts.append(text.table(title, ["key", "here", "there"], rows))
      else:
        parts.append(f"{title}: the same.")
    if found.iterations:
      parts.append(_iterations_table(found.iterations))
    parts.append(_programs_text(here, there, found, limit))
    return "\n\n".join(parts)

  columns = ("kind", "key", "here", "there")
  return View(document, columns, lambda: _flat(cut), write)


def _iteration(iteration):
  return iteration and dataclasses.asdict(iteration)


def _short_value(value):
  return "-" if value is None else text.line(str(value))


_COMPARED = ("sampled", "admitted", "distinct", "candidates", "mean", "best")


def _iterations_table(iterations):
  rows = []
  for sides in iterations:
    known = next(side for side in sides if side)
    row = [known.arm, known.iteration]
    for name in _COMPARED:
      row.append(" | ".join(_side(side, name) for side in sides))
    rows.append(row)
  return text.table(
      "Iterations (here | there; development accuracy, %)",
      ["arm", "iteration", *_COMPARED],
      rows,
  )


def _side(iteration, name):
  value = iteration and getattr(iteration, name)
  if value is None:
    return "-"
  return text.percent(value) if isinstance(value, float) else str(value)


def _programs_text(here, there, found, limit):
  lines = [
      "Programs, the best first (development accuracy, %)",
      f"In both: {found.both}",
  ]
  for store, only in ((here, found.only_here), (there, found.only_there)):
    lines.append(f"Only in {store.workdir}: {len(only)}")
    lines += [
        f"  {digest[:_SHORT]} {'-' if dev is None else text.percent(dev)}"
        for digest, dev in only[:limit]
    ]
  lines.append(
      f"Scores of programs of both that differ: {len(found.scores)} (here |"
      " there)"
  )
  lines += [
      f"  {d.digest[:_SHORT]} {d.split}: {_of(d.here)} | {_of(d.there)}"
      for d in found.scores[:limit]
  ]
  leads = [
      (_command(store, "--program=ID"), "a program of " + name)
      for name, store in (("here", here), ("there", there))
  ]
  return "\n".join(lines) + f"\n\n{_leads(*leads)}"


def _of(outcome):
  right, n = outcome
  return "no merged model" if right is None else f"{right} of {n}"


def _flat(found):
  """The rows of the CSV."""
  rows = [
      (kind, d.key, d.here, d.there)
      for kind in ("config", "identity", "versions")
      for d in getattr(found, kind)
  ]
  for a, b in found.iterations:
    known = a or b
    rows += [
        (
            f"{known.arm} {known.iteration}",
            name,
            a and getattr(a, name),
            b and getattr(b, name),
        )
        for name in _COMPARED
    ]
  rows += [("only here", digest, dev, None) for digest, dev in found.only_here]
  rows += [
      ("only there", digest, None, dev) for digest, dev in found.only_there
  ]
  return rows + [
      (f"score {d.split}", d.digest, _of(d.here), _of(d.there))
      for d in found.scores
  ]
