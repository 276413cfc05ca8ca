"""Evaluates a model on a task's test split, into a file that resumes.

The file has a line an item, in the task's order, and grows batch by batch. One
that was killed goes on at a batch's beginning, with the same batches padded to
the same length: it computes what it would have computed.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
import time
from typing import Any

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax.evaluation import task as task_lib
from selfdev_jax.evaluation import tasks
from selfdev_jax.sampling import engine as engine_lib

# Of an answer: a worked solution of a word problem has up to 400.
MAX_NEW_TOKENS = 512

_PACKAGES = ("selfdev-jax", "jax", "transformers")


@dataclasses.dataclass
class Pace:
  """How fast answers came.

  The first batch of a session is its warm-up: JAX compiles for it.

  Attributes:
    tokens: generated, in all batches.
    seconds: of all batches.
    warm_tokens: in batches that were no warm-up.
    warm_seconds: of these.
  """

  tokens: int = 0
  seconds: float = 0.0
  warm_tokens: int = 0
  warm_seconds: float = 0.0

  def add(self, tokens: int, seconds: float, is_warm: bool):
    """Counts one batch."""
    self.tokens += tokens
    self.seconds += seconds
    if is_warm:
      self.warm_tokens += tokens
      self.warm_seconds += seconds

  @property
  def tokens_per_s(self) -> float | None:
    """Without warm-ups; None where there was nothing else."""
    if not self.warm_seconds:
      return None
    return self.warm_tokens / self.warm_seconds


class Answers:
  """The file of one model's answers; a context manager, one writer."""

  def __init__(self, path: str | os.PathLike, n: int, batch_size: int):
    """Opens or makes it; what a killed process left half done is passed over.

    Args:
      path: of the file.
      n: items to be answered.
      batch_size: items that are written together.

    Raises:
      UserError: if it cannot be written, another process writes it, or it
        holds something else.
    """
    self.path = pathlib.Path(path)
    self.n = n
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(self.path, "a+b")  # noqa: SIM115
    except OSError as error:
      raise errors.UserError(
          f"{path} cannot be written: {error.strerror}"
      ) from None
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self._file.seek(0)
      lines = self._file.read().splitlines(keepends=True)
      self.is_empty = not lines
      self.rows = [self._parsed(i, x) for i, x in enumerate(lines)]
      if self.rows and self.rows[-1] is None:
        self.rows.pop()
      if len(self.rows) < n:
        del self.rows[len(self.rows) // batch_size * batch_size :]
      self._size = sum(map(len, lines[: len(self.rows)]))
    except BlockingIOError:
      self._file.close()
      raise errors.UserError(
          f"{path} is in use by another process; wait for it, stop it, or"
          " choose another file"
      ) from None
    except BaseException:
      self._file.close()
      raise

  def _parsed(self, i: int, line: bytes) -> dict[str, Any] | None:
    """A line's object; None for the end of a file that was cut there."""
    if not line.endswith(b"\n"):
      return None
    try:
      row = json.loads(line)
      if row["item"] == i < self.n:
        return row
    except (ValueError, TypeError, KeyError):
      pass
    raise errors.UserError(
        f"{self.path}, line {i + 1}, is no answer to item {i} of {self.n};"
        " choose another file"
    )

  @property
  def is_whole(self) -> bool:
    return len(self.rows) == self.n

  def append(self, rows: Sequence[dict[str, Any]]):
    """Writes a batch; it is with the operating system then."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    self._file.truncate(self._size)
    self._file.write(text)
    self._file.flush()
    self._size += len(text)
    self.rows += rows

  def __enter__(self) -> "Answers":
    return self

  def __exit__(self, *unused_exception):
    self._file.close()


def settle(
    path: pathlib.Path, settings: Mapping[str, Any], is_new: bool, flag: str
) -> dict[str, Any]:
  """Keeps the settings of a result in a file, or compares them with it.

  Args:
    path: of the file.
    settings: what JSON takes; keys of groups come joined with dots.
    is_new: whether there is nothing yet that settings would belong to.
    flag: that names the place of the result.

  Returns:
    What the file holds: the settings, and what was added to it since.

  Raises:
    UserError: naming the settings that differ.
  """
  settings = json.loads(json.dumps(settings))
  if is_new:
    write_json(path, settings)
    return settings
  try:
    kept = json.loads(path.read_text(encoding="utf-8"))
    differing = [
        f"{key} ({kept.get(key)!r} there, {ours!r} here)"
        for key, ours in settings.items()
        if kept.get(key) != ours
    ]
  except (OSError, ValueError, AttributeError) as error:
    raise errors.UserError(
        f"{path} does not say what the results beside it are of ({error});"
        f" choose another --{flag}"
    ) from None
  if differing:
    raise errors.UserError(
        f"{path} is of another evaluation, which differs in"
        f" {'; '.join(differing)}. Choose another --{flag}"
    )
  return kept


def write_json(path: pathlib.Path, value: Any):
  """Writes all of it or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  partial.replace(path)


def versions() -> dict[str, str]:
  """Of the packages that an answer depends on."""
  return {name: importlib.metadata.version(name) for name in _PACKAGES}


def respond(
    answers: Answers,
    task: task_lib.Task,
    items: Sequence[task_lib.Item],
    prompts: Sequence[list[int]],
    sampler: sampling.Sampler,
    settings: config_lib.Evaluate,
    tell: Callable[[int], Any],
) -> Pace:
  """Answers what is missing, greedily, and marks it.

  Args:
    answers: gets a line an item: "item", "prompt", "answer" (the gold one),
      "response", "finished" (not cut at the token limit), "prompt_truncated",
      "tokens" (generated) and "marks", by metric "extracted", "correct" and
      "trouble".
    task: whose items these are.
    items: all of them.
    prompts: their tokens.
    sampler: has the weights.
    settings: of these, batch_size and max_new_tokens.
    tell: is told of each batch how many items it had.
  """
  pace, first, n = Pace(), len(answers.rows), len(items)
  batches = sampler.generate(
      # Prompts are padded to the longest that is asked, so it always is; its
      # own second answer is not used.
      [*prompts[first:], max(prompts, key=len)],
      max_new_tokens=settings.max_new_tokens,
      batch_size=settings.batch_size,
      stop=task.stop,
  )
  with contextlib.closing(batches):
    for start in range(first, n, settings.batch_size):
      clock = time.monotonic()
      generations = next(batches)[: n - start]
      seconds = time.monotonic() - clock
      tokens = sum(len(g.tokens) for g in generations)
      pace.add(tokens, seconds, is_warm=start > first)
      end = start + len(generations)
      answers.append(_rows(task, items[start:end], generations, start))
      tell(len(generations))
  return pace


def _rows(task, items, generations, first):
  marks = task.score([g.text for g in generations], [i.gold for i in items])
  return [
      {
          "item": first + i,
          "prompt": item.prompt,
          "answer": item.gold,
          "response": generation.text,
          "finished": generation.finished,
          "prompt_truncated": generation.truncated,
          "tokens": len(generation.tokens),
          "marks": {k: dataclasses.asdict(m) for k, m in mark.items()},
      }
      for i, (item, generation, mark) in enumerate(
          zip(items, generations, marks, strict=True)
      )
  ]


def longest(
    prompts: Sequence[list[int]], max_new_tokens: int, positions: int
) -> int:
  """Positions that the longest prompt and its answer need, at most all.

  Raises:
    UserError: if answers alone fill the model's positions.
  """
  if max_new_tokens >= positions:
    raise errors.UserError(
        f"max_new_tokens is {max_new_tokens}, the model has {positions}"
        " positions; lower it"
    )
  return min(max(map(len, prompts)) + max_new_tokens, positions)


def note_cut(
    what: str, prompts: Sequence[list[int]], max_new_tokens: int, positions: int
):
  """Says how many prompts lose their beginning, if any.

  Args:
    what: they are.
    prompts: tokens.
    max_new_tokens: of an answer.
    positions: of the model.
  """
  cut = sum(len(prompt) + max_new_tokens > positions for prompt in prompts)
  if cut:
    progress.note(
        f"{cut} of {len(prompts)} {what} and {max_new_tokens} new tokens exceed"
        f" the model's {positions} positions; they lose their beginning, and"
        " their answers say so"
    )


def evaluate(
    model: str,
    settings: config_lib.Evaluate,
    out: str | os.PathLike,
    *,
    limit: int | None = None,
    kind: str = "jax",
    python: str | None = None,
    address: str | None = None,
) -> dict[str, Any]:
  """Answers the task's test split, or what is missing of it in `out`.

  Args:
    model: Hugging Face directory, or `org/name[@revision]` on the hub.
    settings: the task, its data, and how it is answered.
    out: gets the answers, see `respond`; beside it `OUT.about.json` has the
      settings that they are of, and `OUT.vllm` the logs of vLLM.
    limit: the first so many items; None: all.
    kind: of the sampler, see `engine.open_sampler`.
    python: the interpreter that has vLLM.
    address: of a vLLM server that is there.

  Returns:
    What `json.dumps` takes; "tokens_per_s" and "seconds" are of this session,
    all else is the same however often the run was interrupted.

  Raises:
    UserError: for a model, data or a file that do not fit, in one line.
  """
  task = tasks.load(settings)
  items = _test_items(task, settings.task, limit)
  directory = convert.resolve(model)
  decoder = convert.read_config(directory)
  tokenizer = convert.load_tokenizer(directory)
  prompts = [tokenizer.encode(item.prompt) for item in items]
  positions = longest(prompts, settings.max_new_tokens, decoder.max_positions)
  note_cut("prompts", prompts, settings.max_new_tokens, positions)
  about = {
      "task": settings.task,
      "items": len(items),
      "items_sha256": task_lib.digest(items),
      "shots": task.shots,
      "template": None,
      "bos_in_prompt": {tokenizer.bos_token_id} == {p[0] for p in prompts},
      "max_new_tokens": settings.max_new_tokens,
      "batch_size": settings.batch_size,
      "temperature": 0.0,
      "weights_sha256": convert.digest(directory),
      "sampler": kind,
      "versions": versions(),
  }
  out = pathlib.Path(out)
  beside = out.with_name(out.name + ".about.json")
  pace = Pace()
  with Answers(out, len(items), settings.batch_size) as answers:
    is_new = answers.is_empty and not beside.exists()
    kept = settle(beside, about, is_new, "out")
    if not answers.is_whole:
      with contextlib.ExitStack() as stack:
        decoder, params = convert.load(directory)
        sampler = stack.enter_context(
            contextlib.closing(
                engine_lib.open_sampler(
                    kind,
                    decoder,
                    params,
                    tokenizer,
                    directory,
                    longest=positions,
                    log_dir=out.with_name(out.name + ".vllm"),
                    settings=config_lib.Vllm(),
                    python=python,
                    address=address,
                )
            )
        )
        # Which version of it there is, only it can say.
        kept = settle(
            beside,
            about | {"engine": sampler.engine},
            "engine" not in kept,
            "out",
        )
        sampler.swap_weights(params, str(directory))
        bar = stack.enter_context(
            progress.bar(settings.task, len(items), "item", len(answers.rows))
        )
        pace = respond(
            answers, task, items, prompts, sampler, settings, bar.update
        )
    rows = answers.rows
  return {
      "model": str(model),
      "revision": _revision(directory),
      **summarize(task.metrics, rows),
      **kept,
      "seconds": round(pace.seconds, 3),
      "tokens_per_s": pace.tokens_per_s,
      "out": str(out),
  }


def _test_items(task, name, limit):
  items = task.items(records.TEST, None)
  if limit is not None and limit > len(items):
    raise errors.UserError(
        f"--limit is {limit}; the test split of {name} has {len(items)} items"
    )
  return items[:limit]


def _revision(directory: pathlib.Path) -> str | None:
  """The commit, where the directory is the hub's copy of one."""
  path = directory.resolve()
  return path.name if path.parent.name == "snapshots" else None


def summarize(
    metrics: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """What the answers amount to.

  Args:
    metrics: the task's, the headline first.
    rows: lines of `Answers`, at least one.

  Returns:
    "n", "correct", "accuracy" and "ci95" (Wilson) by the headline, "headline",
    its name, and "metrics", each with these and with how many answers were
    not found, timed out or failed in the scorer: "unextracted", "timeouts",
    "errors". "cut" counts generations that the token limit ended and
    "prompts_truncated" prompts that lost their beginning; "generated_tokens"
    are those of all answers.
  """
  scores = {
      name: task_lib.summarize(
          [task_lib.Mark(**row["marks"][name]) for row in rows]
      )
      for name in metrics
  }
  headline = scores[metrics[0]]
  n = len(rows)
  cut = sum(not row["finished"] for row in rows)
  return {
      "n": n,
      **{key: headline[key] for key in ("correct", "accuracy", "ci95")},
      "headline": metrics[0],
      "metrics": scores,
      "cut": cut,
      "cut_rate": cut / n,
      "prompts_truncated": sum(row["prompt_truncated"] for row in rows),
      "generated_tokens": sum(row["tokens"] for row in rows),
  }


def table(result: Mapping[str, Any]) -> str:
  """The result of `evaluate`, in lines for people."""
  n = result["n"]
  lines = [
      f"{result['model']} on {result['task']}, test, n = {n}",
      f"{'metric':<20}{'%':>6}{'95 % interval':>16}{'right':>7}"
      f"{'unread':>8}{'timeouts':>10}{'errors':>8}",
  ]
  for name, score in result["metrics"].items():
    low, high = (f"{100 * x:.1f}" for x in score["ci95"])
    lines.append(
        f"{name:<20}{100 * score['accuracy']:>6.1f}{f'{low} to {high}':>16}"
        f"{score['correct']:>7}{score['unextracted']:>8}"
        f"{score['timeouts']:>10}{score['errors']:>8}"
    )
  limit, truncated = result["max_new_tokens"], result["prompts_truncated"]
  lines += [
      f"Cut at {limit} tokens: {result['cut']} ({100 * result['cut_rate']:.1f}"
      f" %); prompts that lost their beginning: {truncated}",
      f"{result['shots']} shots, no template,"
      f" {'with' if result['bos_in_prompt'] else 'without'} BOS, greedy;"
      f" {result['engine']}",
  ]
  if result["tokens_per_s"] is not None:
    lines.append(
        f"{result['tokens_per_s']:.1f} tokens/s after warm-up, batches of"
        f" {result['batch_size']}"
    )
  return "\n".join(lines)
