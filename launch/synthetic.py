"""Makes up the archive of a run, of any size, for benchmarks and tests.

It has the tables, keys and order of writing of a real one of ten iterations. Of
the completions 60 % are rejected, and of those that are let through 10 % repeat
a program; 3 % of the programs take the score of one that does the same, 0.5 %
fail on the weights. Each of the three sweeps has as many settings as the loop
has candidates, as in a run. Every model answers a tenth of the development
set, and as many as the plan allows answer all of it, the other end of a race.
Texts are drawn from a seed: sources and completions of 550 bytes, programs of
3 kB, answers of 50 bytes.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import random
import sqlite3
import tempfile
from typing import Any

import numpy as np
import sqlalchemy as sa

from selfdev_jax import config as config_lib
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import schema
from selfdev_jax import store as store_lib

_ITERATIONS = 10
_REJECTED = 0.6  # Of the completions.
_REPEATED = 0.1  # Of the others: a program that the iteration has.
_REUSED = 0.03  # Of the programs: they do the same as another.
_FAILED = 0.005  # Of the merges.
_BLOCKS = 10  # Of the development set; all models answer the first.
_FIRST = 0.8  # Of all answers: those in first blocks.
_TESTED = 20  # Models that answer the test set.
_STEPS = 300  # Of DPO, an iteration.
_PAIRS = 400
_EXPERTS = ("tiny:add", "tiny:subtract", "tiny:multiply")
_SHAPES = ((64, 128), (128,), (128, 128), (128, 320), (320, 128), (375, 128))
# (stage, code, message, weight), about as in the demo run.
_REASONS = (
    ("extract", "no_program", "the completion holds no program", 4),
    ("filter", "syntax", "line 5: unmatched ')'.", 41),
    ("filter", "import", "line 2: 'os' may not be imported.", 3),
    ("trace", "name", "line 4: NameError: name 'd' is not defined.", 38),
    ("trace", "type", "line 6: TypeError: unsupported operand.", 6),
    ("trace", "attribute", "line 3: no attribute 'medain' in jnp.", 5),
    ("run", "non_finite", "the result is not finite", 3),
)
_PROMPT = "# An example:\ndef merge(base, task_vectors):\n"
_LINES = (
    "  w = [jnp.linalg.norm(t) for t in tvs]\n",
    "  tvs = [jnp.where(jnp.sign(t) == s, t, 0.0) for t in tvs]\n",
    "  s = jnp.sign(sum(tvs))\n",
    "  m = jnp.median(jnp.stack(tvs), axis=0)\n",
    "  z = jnp.sort(jnp.stack(tvs), axis=0)\n",
    "  # The experts disagree on the sign of a third of their entries.\n",
)


# Of each table, in the order of the rows that `_Maker` puts there.
_COLUMNS = {
    "questions": "split item prompt gold",
    "done": "arm iteration stage activity",
    "activities": (
        "id session arm iteration stage seed started seconds "
        "writing_s done total unit finished"
    ),
    "factories": "iteration digest activity",
    "completions": "arm iteration item text finished engine factory activity",
    "candidates": "arm iteration position digest activity",
    "programs": "digest program stats fingerprint arm iteration item activity",
    "verdicts": "arm iteration item source digest stage code message activity",
    "scores": (
        "model split n correct merge_s evaluate_s engine failure "
        "reused items program weights at activity"
    ),
    "responses": (
        "model split item text extracted correct truncated trouble activity"
    ),
    "pairs": (
        "iteration item prompt chosen rejected chosen_digest "
        "rejected_digest arm chosen_iteration chosen_item "
        "rejected_item activity"
    ),
    "steps": "iteration step metrics activity",
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """How many of everything.

  Attributes:
    programs: distinct ones, of both arms.
    answers: of all models.
  """

  programs: int
  answers: int

  @property
  def new(self) -> int:
    """Programs that an iteration finds; the arms share the first one."""
    return -(-self.programs // (2 * _ITERATIONS - 1))

  @property
  def samples(self) -> int:
    """Completions of an iteration."""
    return round(self.new / (1 - _REPEATED) / (1 - _REJECTED))

  @property
  def _models(self) -> float:
    """That have answers on the development set."""
    sweeps = len(records.SWEEPS) * _ITERATIONS
    return self.new * (1 - _REUSED) * (2 * _ITERATIONS - 1 + sweeps)

  @property
  def block(self) -> int:
    """Items that every model answers."""
    return max(1, round(_FIRST * self.answers / self._models))

  @property
  def test_size(self) -> int:
    return min(1200, self.answers // 200)

  @property
  def whole(self) -> float:
    """Share of the models that answer all of the development set."""
    spare = self.answers - self._models * self.block - _TESTED * self.test_size
    return max(0.0, spare / self._models / (_BLOCKS - 1) / self.block)

  def config(self) -> config_lib.Config:
    return config_lib.Config(
        name="synthetic",
        seed_model="tiny:seed",
        experts=_EXPERTS,
        iterations=_ITERATIONS,
        sampler="jax",
        propose=config_lib.Propose(prompt="tiny", samples=self.samples),
        evaluate=config_lib.Evaluate(
            dev_size=_BLOCKS * self.block,
            test_size=self.test_size,
            racing_block=self.block,
        ),
        tiny=config_lib.World(),
    )


class Texts:
  """Made-up texts of the sizes that a run has."""

  def __init__(self, rng: random.Random):
    self._rng = rng
    self._answers = [self._draw_answer() for _ in range(1000)]

  def body(self) -> str:
    """A completion of about 600 bytes, no two alike."""
    draw = self._rng.random
    return "".join(
        [
            "  tvs = task_vectors\n",
            *self._rng.choices(_LINES, k=10),
            f"  d = {draw():.12f} * tvs[0] + {draw():.12f} * m\n",
            "  return base + d\n",
        ]
    )

  def program(self) -> str:
    """JSON of about 3 kB, as the verifier writes it."""
    draw = lambda: ["float32", round(self._rng.random(), 9)]
    leaf = lambda shape: {
        "block": {
            "equations": [
                ["abs", [1], {}, 1],
                ["reduce_sum", [4], {"axes": list(range(len(shape)))}, 1],
                ["div", [5, draw()], {}, 1],
                ["abs", [2], {}, 1],
                ["reduce_sum", [7], {"axes": list(range(len(shape)))}, 1],
                ["div", [8, draw()], {}, 1],
                ["abs", [3], {}, 1],
                ["reduce_sum", [10], {"axes": list(range(len(shape)))}, 1],
                ["div", [11, draw()], {}, 1],
                ["mul", [6, 1], {}, 1],
                ["mul", [9, 2], {}, 1],
                ["mul", [12, 3], {}, 1],
                ["add", [13, 14], {}, 1],
                ["add", [15, 16], {}, 1],
                ["mul", [draw(), 17], {}, 1],
                ["add", [0, 18], {}, 1],
            ],
            "inputs": 4,
            "outputs": [19],
        },
        "shape": shape,
    }
    return json.dumps(
        {"leaves": list(map(leaf, _SHAPES)), "num_experts": 3, "version": 1},
        separators=(",", ":"),
    )

  def stats(self) -> str:
    equations = self._rng.randint(6, 60)
    return json.dumps(
        {
            "constants": 0,
            "equations": equations,
            "flops": 34909.0 * equations,
            "peak_bytes": 1344012.0,
            "peak_multiple": 1.75,
        }
    )

  def fingerprint(self) -> bytes:
    numbers = [self._rng.gauss(0.0, 1e-3) for _ in range(4 * 3)]
    return np.array(numbers, "<f8").tobytes()

  def answer(self) -> tuple[str, str]:
    """What a model says, and the number in it."""
    return self._rng.choice(self._answers)

  def _draw_answer(self):
    a, b = self._rng.randint(2, 20), self._rng.randint(2, 20)
    text = f" There were {a}, then {b} more came: {a}+{b}={a + b}\n#### {a + b}"
    return text, str(a + b)


class _Maker:
  """Writes a made-up run in the order in which a real one is written."""

  def __init__(self, database: sqlite3.Connection, plan: Plan):
    self._database = database
    self._plan = plan
    self._rng = random.Random(0)
    self._texts = Texts(self._rng)
    self._now = 1.8e9  # Unix time.
    self._activity = 0
    self._found = []  # (digest, item, completion) of the last iteration.
    self._whole = {}  # {model: right dev answers}, of those with all.

  def run(self):
    loop, size = records.LOOP, _BLOCKS * self._plan.block
    sizes = {records.DEV: size, records.TEST: self._plan.test_size}
    self._put(
        schema.QUESTIONS,
        [
            (split, i, f"Q: Ben has {i} pens and buys 7 more.\nA:", str(i + 7))
            for split, n in sizes.items()
            for i in range(n)
        ],
    )
    singles = ["seed", *(f"expert:{name}" for name in _EXPERTS)]
    self._begin(loop, 0, "single models", 4 * size, "answer", 60.0)
    self._score(singles, records.DEV, 0.4, 1.0)
    stages = 2 * _ITERATIONS - 1 + len(records.SWEEPS) + 1
    with progress.bar("Making the archive", stages, "stage") as bar:
      budget = 0
      for t in range(1, _ITERATIONS + 1):
        budget += self._iterate(loop, t)
        bar.update()
        if t < _ITERATIONS:
          self._refine(t)
        if t > 1:
          self._iterate(records.CONTROL, t)
          bar.update()
      for family in records.SWEEPS:
        names = [f"{family}:scale={i / budget:.7f}" for i in range(budget)]
        answers = budget * self._plan.block
        self._begin(loop, 0, family, answers, "answer", 4000.0)
        self._score(names, records.DEV, 0.5, self._plan.whole)
        bar.update()
      self._begin(loop, 0, store_lib.SEARCH, 0, "", 0.1)
      self._put(schema.DONE, [(loop, 0, store_lib.SEARCH, self._activity)])
      best = sorted(self._whole, key=self._whole.get, reverse=True)
      best = [*singles, *best[: _TESTED - len(singles)]]
      self._begin(
          loop, 0, "best", _TESTED * self._plan.test_size, "answer", 100.0
      )
      self._score(best, records.TEST, 0.5, 1.0)
      self._begin(loop, 0, "export", 0, "", 1.0)
      self._put(schema.DONE, [(loop, 0, "export", self._activity)])
      bar.update()

  def _put(self, table: sa.Table, rows: Sequence[Sequence[Any]]):
    """Rows in the order of `_COLUMNS`."""
    names = _COLUMNS[table.name].split()
    columns, marks = ", ".join(names), ", ".join("?" * len(names))
    self._database.executemany(
        f"INSERT INTO {table.name} ({columns}) VALUES ({marks})", rows
    )

  def _begin(self, arm, t, stage, done, unit, seconds):
    """An activity that has finished; the rows that follow belong to it."""
    self._activity += 1
    times = (self._now, seconds, 0.01 * seconds)
    row = (self._activity, 1, arm, t, stage, 0, *times, done, done, unit, True)
    self._put(schema.ACTIVITIES, [row])
    self._now += seconds

  def _iterate(self, arm, t) -> int:
    """Returns how many candidates it had."""
    samples = self._plan.samples
    self._begin(arm, t, "propose", samples, "program", 600.0)
    factory = t if arm == records.LOOP else 1
    if arm == records.LOOP:
      digest = hashlib.sha256(b"%d" % t).hexdigest() if t > 1 else ""
      self._put(schema.FACTORIES, [(t, digest, self._activity)])
    texts = [self._texts.body() for _ in range(samples)]
    self._put(
        schema.COMPLETIONS,
        [
            (arm, t, i, text, True, "jax 0.10.2", factory, self._activity)
            for i, text in enumerate(texts)
        ],
    )
    self._begin(arm, t, "admit", samples, "program", 900.0)
    self._admit(arm, t, texts)
    digests = [digest for digest, *_ in self._found]
    cut = round(_REUSED * len(digests))
    copies, candidates = digests[:cut], digests[cut:]
    self._begin(arm, t, "select", 0, "", 0.1)
    self._put(
        schema.CANDIDATES,
        [(arm, t, i, d, self._activity) for i, d in enumerate(candidates)],
    )
    self._put(schema.DONE, [(arm, t, "select", self._activity)])
    answers = len(candidates) * self._plan.block
    self._begin(arm, t, "evaluate", answers, "answer", 5000.0)
    # DPO helps the loop and leaves the control where it was.
    level = 0.3 + (0.03 * t if arm == records.LOOP else 0.0)
    names = [records.PROGRAM + digest for digest in candidates]
    self._score(names, records.DEV, level, self._plan.whole)
    self._begin(arm, t, "reuse", cut, "program", 1.0)
    for digest in copies:
      self._reuse(digest, self._rng.choice(names))
    return len(candidates)

  def _admit(self, arm, t, texts):
    """Verdicts, in an order that is drawn; the first one is a program."""
    new = self._plan.new
    repeats = round(new * _REPEATED / (1 - _REPEATED))
    kinds = ["repeat"] * repeats + ["new"] * (new - 1)
    kinds += ["rejected"] * (len(texts) - new - repeats)
    self._rng.shuffle(kinds)
    weights = [reason[-1] for reason in _REASONS]
    self._found, programs, verdicts = [], [], []
    for i, (kind, text) in enumerate(zip(["new", *kinds], texts, strict=True)):
      source = "def merge(base, task_vectors):\n" + text
      digest, reason = None, ("", "", "", 0)
      if kind == "rejected":
        (reason,) = self._rng.choices(_REASONS, weights)
      elif kind == "repeat":
        digest = self._rng.choice(self._found)[0]
      else:
        digest = hashlib.sha256(source.encode()).hexdigest()
        self._found.append((digest, i, text))
        about = self._texts.program(), self._texts.stats()
        about += (self._texts.fingerprint(), arm, t, i, self._activity)
        programs.append((digest, *about))
      verdicts.append((arm, t, i, source, digest, *reason[:3], self._activity))
    self._put(schema.PROGRAMS, programs)
    self._put(schema.VERDICTS, verdicts)

  def _score(self, names, split, level, whole):
    """Scores and answers; a share `whole` of the models answers everything."""
    rng, scores, responses = self._rng, [], []
    sizes = {
        records.DEV: _BLOCKS * self._plan.block,
        records.TEST: self._plan.test_size,
    }
    items = sizes[split]
    for name in names:
      is_program = name.startswith(records.PROGRAM)
      # There is always one to be the best.
      is_first = is_program and not self._whole
      is_whole = is_first or rng.random() < whole
      n = items if is_whole else self._plan.block
      chance, right = min(0.95, max(0.02, rng.gauss(level, 0.15))), 0
      has_failed = is_program and not is_whole and rng.random() < _FAILED
      for i in range(0 if has_failed else n):
        text, number = self._texts.answer()
        is_right = rng.random() < chance
        right += is_right
        responses.append(
            (name, split, i, text, number, is_right, False, "", self._activity)
        )
      if has_failed:
        n, outcome, failure = items, None, "non_finite"
      else:
        outcome, failure = right, ""
      if is_program and n == items and outcome and split == records.DEV:
        self._whole[name] = right
      about = (name, split, n, outcome, 0.02, 0.2, "jax 0.10.2", failure, None)
      digest = name.removeprefix(records.PROGRAM) if is_program else None
      weights = hashlib.sha256(name.encode()).hexdigest()
      scores.append((*about, items, digest, weights, self._now, self._activity))
    self._put(schema.SCORES, scores)
    self._put(schema.RESPONSES, responses)

  def _reuse(self, digest, model):
    self._database.execute(
        "INSERT INTO scores SELECT ?, split, n, correct, 0, 0, engine, failure,"
        " model, items, ?, '', at, ? FROM scores"
        " WHERE model = ? AND split = 'dev'",
        (records.PROGRAM + digest, digest, self._activity, model),
    )

  def _refine(self, t):
    """Pairs of the loop's iteration, which was the last to be made."""
    self._begin(records.LOOP, t, "refine", _STEPS, "step", 1200.0)
    pairs = []
    for item in range(min(_PAIRS, len(self._found) // 2)):
      (one, i, chosen), (two, j, rejected) = self._rng.sample(self._found, 2)
      parts = (_PROMPT, chosen, rejected, one, two, records.LOOP, t, i, j)
      pairs.append((t, item, *parts, self._activity))
    self._put(schema.PAIRS, pairs)
    metrics = {"loss": 0.69, "rewards/margins": 0.1, "grad_norm": 1.0}
    rows = [
        {key: value / (1 + step / 100) for key, value in metrics.items()}
        for step in range(1, _STEPS + 1)
    ]
    self._put(
        schema.STEPS,
        [
            (t, step, json.dumps(row), self._activity)
            for step, row in enumerate(rows, start=1)
        ],
    )


def make(workdir: pathlib.Path, plan: Plan):
  """A whole archive, or none: it is made beside and moved."""
  with tempfile.TemporaryDirectory(dir=workdir) as scratch:
    session = {
        "time": "2027-01-15T08:00:00Z",
        "command": "benchmark_archive",
        "device": "made up",
        "jax": "0.10.2",
        "git": "",
    }
    identity = {f"model {name}": "made up" for name in ("tiny:seed", *_EXPERTS)}
    store_lib.Store.create(scratch, plan.config(), identity, session).close()
    path = pathlib.Path(scratch) / store_lib.ARCHIVE
    with contextlib.closing(sqlite3.connect(path)) as database:
      # Whatever happens to this file, it can be made again.
      database.execute("PRAGMA journal_mode=OFF")
      database.execute("PRAGMA synchronous=OFF")
      database.execute("PRAGMA cache_size=-1000000")
      _Maker(database, plan).run()
      database.commit()
      database.execute("PRAGMA journal_mode=WAL")
    path.rename(workdir / store_lib.ARCHIVE)
