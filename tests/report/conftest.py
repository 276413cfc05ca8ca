"""A run small enough to compute its report by hand."""

import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import records
from selfdev_jax import store as store_lib

CONFIG = config_lib.Config(
    name="t",
    seed_model="tiny:seed",
    experts=("a", "b", "c"),
    iterations=2,
    top_k=2,
    tiny=config_lib.World(),
)
DEV_N, TEST_N = 10, 20
HOSTILE = "</script><img src=x onerror=alert(1)>"
HOSTILE_EXPERT = "expert:<b onclick='x'>$a$</b>"
# Displays in another order than it runs.
BIDI = "\u202eevil"

# What each archive holds beyond the one before.
STAGES = ("empty", "sampled", "admitted", "first", "dev", "test")


def _source(digest):
  return f"def merge(base, task_vectors):\n  return base  # {digest}\n"


def _propose(store, arm, iteration, verdicts):
  factory = iteration if arm == records.LOOP else 1
  with store.activity(arm, iteration, "propose", len(verdicts), "program"):
    store.add_factory(factory, "" if factory == 1 else "abc")
    store.add_completions(
        [
            records.Completion(arm, iteration, i, "text", True, "", factory)
            for i in range(len(verdicts))
        ]
    )
    store.advance(len(verdicts))
  return [
      records.Verdict(arm, iteration, i, _source(v), v)
      if isinstance(v, str)
      else records.Verdict(arm, iteration, i, "", None, *v)
      for i, v in enumerate(verdicts)
  ]


def _admit(store, verdicts, new):
  arm, iteration = verdicts[0].arm, verdicts[0].iteration
  with store.activity(arm, iteration, "admit", len(verdicts), "program"):
    for verdict in verdicts:
      store.add_verdict(verdict, "{}", {"equations": 3}, _fingerprint(verdict))
      store.advance(1)
  with store.activity(arm, iteration, "select"):
    store.add_candidates(arm, iteration, new)


def _fingerprint(verdict):
  """Of two probes; no two programs do the same."""
  if not verdict.admitted:
    return ()
  return [float(i * int(verdict.digest[1:])) for i in range(1, 9)]


def score(store, *scores, arm=records.LOOP, t=1, **responses):
  """Adds scores as the loop does: within an activity."""
  with store.activity(arm, t, "evaluate"):
    for each in scores:
      store.add_score(each, **responses)


def _score(store, model, split, correct):
  """`correct`: how many of the first items, which items, or None."""
  n = DEV_N if split == records.DEV else TEST_N
  if correct is None:
    score(store, records.Score(model, split, n, None, failure="non_finite"))
    return
  right = set(range(correct) if isinstance(correct, int) else correct)
  score(
      store,
      records.Score(model, split, n, len(right), weights=32 * "a"),
      responses=[
          records.Response(i, f"{split} {i}", "1", "1", "1", i in right)
          for i in range(n)
      ],
  )


def build(workdir, until="test"):
  """Writes an archive that stops after the stage `until`; returns it open."""
  store = store_lib.Store.create(
      workdir, CONFIG, {}, {"versions": {"jax": "0.10.2"}, "host": HOSTILE}
  )
  stop = STAGES.index(until)
  loop, control = records.LOOP, records.CONTROL
  if stop >= 1:
    first = _propose(
        store, loop, 1, ["d1", ("filter", "syntax", "line 1"), "d2", "d1"]
    )
  if stop >= 2:
    _admit(store, first, ["d1", "d2"])
  if stop >= 3:
    _score(store, "seed", records.DEV, 3)
    _score(store, "program:d1", records.DEV, 4)
    _score(store, "program:d2", records.DEV, 6)
  if stop >= 4:
    pair = records.Pair(1, 0, "p", "text", "text", "d2", "d1", 1, 2, 0)
    with store.stage(loop, 1, "refine", 12, "step"):
      store.replace_pairs(1, [pair])
      store.put_steps(
          [
              records.Step(
                  1, i, {"loss": 0.7 - 0.01 * i, "rewards/margins": 0.1 * i}
              )
              for i in range(12)
          ]
      )
      store.advance(12)
    second = _propose(
        store, loop, 2, ["d3", "d1", "d4", ("trace", "shape", HOSTILE)]
    )
    second[0] = records.Verdict(
        loop, 2, 0, f"{_source('d3')}x = '{HOSTILE}'  # {BIDI}\n", "d3"
    )
    _admit(store, second, ["d3", "d4"])
    # d3 is beyond the control's budget of two: the loop evaluated d3 and d4.
    _admit(
        store,
        _propose(store, control, 2, ["d5", "d6", "d3", "d1"]),
        ["d5", "d6"],
    )
    dev = {
        "program:d3": 7,
        "program:d4": None,
        "program:d5": 5,
        "program:d6": 3,
        HOSTILE_EXPERT: 0,
        "expert:b": 2,
        "task_arithmetic:scale=0.4": 5,
        "task_arithmetic:scale=0.5": 5,
        "ties:density=0.5,scale=0.7": 2,
        "weights:0.1,0.2,0.3": None,
        "weights:0.31,0.7,-0.1": 6,
    }
    for model, correct in dev.items():
      _score(store, model, records.DEV, correct)
  if stop >= 5:
    with store.stage(records.LOOP, 0, store_lib.SEARCH):
      pass
    test = {
        "program:d3": 15,
        "program:d2": 14,
        "seed": range(10, 18),
        HOSTILE_EXPERT: 0,
        "expert:b": 5,
        "task_arithmetic:scale=0.4": 15,
        "ties:density=0.5,scale=0.7": 4,
        "weights:0.31,0.7,-0.1": 20,
    }
    for model, correct in test.items():
      _score(store, model, records.TEST, correct)
  return store


@pytest.fixture(name="build", scope="session")
def build_fixture():
  return build


@pytest.fixture(name="score", scope="session")
def score_fixture():
  return score


@pytest.fixture
def archive(tmp_path):
  with build(tmp_path) as store:
    yield store
