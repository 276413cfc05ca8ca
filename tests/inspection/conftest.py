"""A run small enough to answer every question by hand."""

import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import records
from selfdev_jax import store as store_lib

CONFIG = config_lib.Config(
    name="by hand",
    seed_model="seed",
    experts=("x",),
    iterations=2,
    evaluate=config_lib.Evaluate(dev_size=4, test_size=2),
)
LOOP, CONTROL = records.ARMS
# Displays in another order than it runs, and rings.
HOSTILE = "=1+1\u202e\x07evil"
_NAN = float("nan")
_FINGERPRINTS = {
    "a1": [2, 1, 0, 0],
    "a9": [1, 1, 0, 0],
    "b2": [_NAN] * 4,
    "c3": [2, 1, 0, 0],
    "d4": [2, -1, 0, 0],
}


INCIDENTS = [
    records.Incident("joined", "worker 2", "node-b", ""),
    records.Incident("lost", "worker 1", HOSTILE, f"it was killed {HOSTILE}"),
    records.Incident("lost", "worker 2", "node-b", "its node is gone"),
]


def _source(digest):
  return f"def merge(base, task_vectors):\n  return base  # {digest}, {HOSTILE}"


def _propose(store, arm, t, factory, n):
  with store.activity(arm, t, "propose", n, "program"):
    store.add_factory(factory, "" if factory == 1 else "f00d")
    store.add_completions(
        [
            records.Completion(arm, t, i, HOSTILE, i != 1, HOSTILE, factory)
            for i in range(n)
        ]
    )
    store.advance(n)


def _admit(store, arm, t, verdicts):
  """Each a digest, or stage, code and message."""
  with store.activity(arm, t, "admit", len(verdicts), "program"):
    for i, said in enumerate(verdicts):
      if isinstance(said, str):
        store.add_verdict(
            records.Verdict(arm, t, i, _source(said), said),
            f'{{"of": "{said}"}}',
            {"equations": ord(said[0])},
            _FINGERPRINTS[said],
        )
      else:
        store.add_verdict(records.Verdict(arm, t, i, "def f(", None, *said))
      store.advance(1)


def _select(store, arm, t, digests):
  with store.stage(arm, t, "select"):
    store.add_candidates(arm, t, digests)


def _score(store, model, split, right, n=None, **rest):
  """`right`: of the first `n` items, which go first; None: no merged model."""
  items = 4 if split == records.DEV else 2
  n = items if n is None else n
  store.add_score(
      records.Score(
          model, split, n, right, engine="jax 1", items=items, **rest
      ),
      []
      if right is None or "reused" in rest
      else [
          records.Response(
              i,
              f"{split} {i}?",
              HOSTILE,
              "7",
              "7" * (i < right),
              i < right,
              trouble="" if i < right else HOSTILE,
          )
          for i in range(n)
      ],
  )


def _begin(store):
  with store.activity(LOOP, 0, "single models", 8, "answer"):
    _score(store, "seed", records.DEV, 2)
    _score(store, "expert:x", records.DEV, 1)
    store.advance(8)


def _first(store):
  _propose(store, LOOP, 1, 1, 4)
  _admit(store, LOOP, 1, ["a1", ("filter", "syntax", HOSTILE), "b2", "a1"])
  _select(store, LOOP, 1, ["a1", "b2"])
  with store.activity(LOOP, 1, "evaluate", 8, "answer"):
    _score(store, "program:a1", records.DEV, 3)
    _score(store, "program:b2", records.DEV, None, failure="memory")
    for incident in INCIDENTS:
      store.add_incident(incident)
    store.advance(8)


def _refine(store):
  with store.stage(LOOP, 1, "refine"):
    texts = ("prompt", HOSTILE, "other", "a1")
    store.replace_pairs(
        1,
        [
            records.Pair(1, 0, *texts, None, 1, 0, 1),
            records.Pair(1, 1, *texts, "b2", 1, 3, 2),
        ],
    )


def _second(store):
  _propose(store, LOOP, 2, 2, 3)
  _admit(store, LOOP, 2, ["a9", "c3", ("trace", "shape", "rank 2, not 1")])
  _select(store, LOOP, 2, ["a9"])
  with store.activity(LOOP, 2, "evaluate", 4, "answer"):
    # Stopped by a race, and one that does what another does.
    _score(store, "program:a9", records.DEV, 2, 2)
    store.advance(2)
  with store.activity(LOOP, 2, "reuse", 1, "program"):
    _score(store, "program:c3", records.DEV, 3, reused="program:a1")
  _propose(store, CONTROL, 2, 1, 2)
  _admit(store, CONTROL, 2, ["d4", "a9"])
  # What the loop wrote too counts for either.
  _select(store, CONTROL, 2, ["d4", "a9"])
  with store.activity(CONTROL, 2, "evaluate", 4, "answer"):
    _score(store, "program:d4", records.DEV, 1)
    store.advance(4)


def _end(store):
  with store.activity(LOOP, 0, "weights", 8, "answer"):
    _score(store, "weights:0.1", records.DEV, 2)
    _score(store, "weights:0.2", records.DEV, 3, 3)
  with store.stage(LOOP, 0, store_lib.SEARCH):
    pass
  with store.activity(LOOP, 0, "best", 4, "answer"):
    _score(store, "program:a1", records.TEST, 1)
    _score(store, "seed", records.TEST, 2)
  with store.stage(LOOP, 0, "export"):
    pass


_STEPS = {
    "begun": _begin,
    "first": _first,
    "refined": _refine,
    "second": _second,
    "end": _end,
}


def build(workdir, until="end", config=CONFIG, **provenance):
  """Writes an archive up to a step; "": none."""
  session = {"jax": "1", "git": "abc"} | provenance
  with store_lib.Store.create(workdir, config, {}, session) as store:
    for name, step in _STEPS.items():
      if not until:
        break
      step(store)
      if name == until:
        break
  return workdir


@pytest.fixture
def config():
  return CONFIG


@pytest.fixture(name="build", scope="session")
def build_fixture():
  return build


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
  """Of a finished run, not to be written to."""
  return build(tmp_path_factory.mktemp("inspected"))


@pytest.fixture
def incidents():
  """Of `workdir`, without their times."""
  return INCIDENTS


@pytest.fixture
def store(workdir):
  with store_lib.Store.read(workdir) as store:
    yield store
