"""Single stages of the loop on a random model of a few hundred weights."""

import contextlib
import dataclasses
import functools
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import loop
from selfdev_jax import merging
from selfdev_jax import models
from selfdev_jax import preferences
from selfdev_jax import programs
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import sandbox
from selfdev_jax import store as store_lib
from selfdev_jax.executors import executor as executor_lib
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.sandbox import runner

_DECODER = models.DecoderConfig(
    vocab_size=300, embed=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp=12
)
_CONFIG = config_lib.Config(
    name="t",
    seed_model="seed",
    experts=("a", "b"),
    propose=config_lib.Propose(prompt="tiny"),
    sandbox=config_lib.Sandbox(timeout_s=3.0),
)


class _Words:
  """A stand-in for a tokenizer: a byte a token."""

  eos_token_id = 1

  def encode(self, text):
    return [byte + 2 for byte in text.encode()]

  def decode(self, tokens):
    return bytes(int(t) - 2 for t in tokens if 2 <= t < 258).decode("latin1")


def _run(config, archive, loaded, box, sampler):
  executor = executor_lib.Local(config, loaded, box, sampler)
  return loop._Run(config, archive, executor, board=mock.Mock())


def _write(run, arm, t, texts, finished=None):
  """Completions of a factory, as it wrote them."""
  factory = t if arm == records.LOOP else 1
  with run._archive.activity(arm, t, "propose"):
    run._archive.add_factory(factory, "")
    run._archive.add_completions(
        [
            records.Completion(
                arm, t, i, x, finished is None or finished[i], "jax 0", factory
            )
            for i, x in enumerate(texts)
        ]
    )


def _select(run, arm, t):
  """Admits what was written and settles what is new; returns that."""
  run._admit(arm, t)
  new = run._new_programs(arm, t)
  with run._archive.activity(arm, t, "select"):
    run._archive.add_candidates(arm, t, new)
  return new


@pytest.fixture
def loaded():
  seed, a, b = (models.init_params(_DECODER, i) for i in range(3))
  merges = runner.Merges(seed, {"a": a, "b": b}, "mlp")
  return worker_lib.Models(
      _DECODER, seed, merges, _Words(), pathlib.Path("seed")
  )


@pytest.fixture
def begin(tmp_path, loaded):
  """begin(config=_CONFIG) -> a run as a new session begins it."""
  with (
      store_lib.Store.create(tmp_path, _CONFIG, {}, {}) as archive,
      sandbox.Sandbox(_CONFIG.sandbox, loaded.merges.shapes, 2) as box,
  ):

    def session(config=_CONFIG):
      sampler = sampling.JaxSampler(_DECODER, _Words(), (1,))
      return _run(config, archive, loaded, box, sampler)

    yield session


@pytest.fixture
def run(begin):
  return begin()


_PROGRAMS = [
    ("  return base + 0.1 * sum(task_vectors)\n", None),
    ("", ("extract", "empty")),
    ("   \n", ("extract", "empty")),
    ("  return base +\n", ("filter", "syntax")),
    ("  while True:\n    pass\n", ("filter", "endless_loop")),
    ("  for i in range(10**9):\n    base = base * 1\n  return base\n", "trace"),
    ("  print('x' * 5_000_000)\n  return base\n", None),
    ("  return base[0]\n", "trace"),
    ("  return jnp.load('archive.sqlite')\n", "filter"),
    ("  return jnp.zeros((10**6, 10**6)).sum() + base\n", "verify"),
]


def test_every_completion_gets_a_verdict(run):
  archive = run._archive
  _write(run, records.LOOP, 1, [text for text, _ in _PROGRAMS])
  run._admit(records.LOOP, 1)
  verdicts = archive.verdicts(records.LOOP, 1)
  assert len(verdicts) == len(_PROGRAMS)
  for verdict, (text, expected) in zip(verdicts, _PROGRAMS, strict=True):
    if expected is None:
      assert verdict.admitted, verdict
      assert archive.program(verdict.digest)
      continue
    assert not verdict.admitted, text
    assert verdict.message and "\n" not in verdict.message
    if isinstance(expected, tuple):
      assert (verdict.stage, verdict.code) == expected
    else:
      assert verdict.stage == expected, verdict


def test_new_programs_are_new_to_their_arm(run):
  archive = run._archive
  texts = {
      (records.LOOP, 1): [0.1, 0.2, 0.1],
      (records.LOOP, 2): [0.2, 0.3],
      (records.CONTROL, 2): [0.3, 0.1, 0.4],
  }
  for (arm, t), scales in texts.items():
    _write(
        run,
        arm,
        t,
        [f"  return base + {s} * task_vectors[0]\n" for s in scales],
    )
    run._admit(arm, t)
  names = {
      v.source.split("+ ")[1].split(" ")[0]: v.digest
      for v in archive.verdicts()
  }
  new = lambda arm, t: run._new_programs(arm, t)
  assert new("loop", 1) == new("control", 1) == [names["0.1"], names["0.2"]]
  assert new("loop", 2) == [names["0.3"]]
  assert new("control", 2) == [names["0.3"], names["0.4"]]


def test_the_control_evaluates_as_many_as_the_loop(run):
  bodies = "  return base + {} * task_vectors[0]\n"
  for arm, t, scales in (
      (records.LOOP, 1, [0.1, 0.2]),
      (records.LOOP, 2, [0.2, 0.3]),
      (records.CONTROL, 2, [0.3, 0.1, 0.4]),
  ):
    _write(run, arm, t, [bodies.format(s) for s in scales])
  run._config = dataclasses.replace(
      _CONFIG,
      iterations=2,
      propose=dataclasses.replace(_CONFIG.propose, samples=2),
  )
  run._evaluate = mock.Mock()
  for arm, t in ((records.LOOP, 1), (records.LOOP, 2), (records.CONTROL, 2)):
    run._iterate(arm, t)
  settled = [run._archive.candidates(records.LOOP, t) for t in (1, 2)]
  assert [len(digests) for digests in settled] == [2, 1]
  # 0.3 is new to the control, and 0.4 is one too many.
  assert run._archive.candidates(records.CONTROL, 2) == settled[1]
  assert run._evaluated("control") == settled[0] + settled[1]


def test_a_program_that_does_the_same_is_not_scored_again(run, monkeypatch):
  archive = run._archive
  bodies = (
      "  return base + 0.1 * sum(task_vectors)\n",
      "  return base + 0.1 * jnp.stack(task_vectors).sum(0)\n",
      "  return base + 0.2 * sum(task_vectors)\n",
      "  return base + 0.2 * jnp.stack(task_vectors).sum(0)\n",
  )
  for arm, t, texts in (
      (records.LOOP, 1, bodies[:2]),
      (records.LOOP, 2, bodies[1:3]),
      (records.CONTROL, 2, bodies[3:]),
  ):
    _write(run, arm, t, texts)
    _select(run, arm, t)
  digest = {
      v.source.split("return ")[1].strip(): v.digest for v in archive.verdicts()
  }
  names = [digest[body.split("return ")[1].strip()] for body in bodies]
  assert len(set(names)) == 4
  # Not one hash is another's, and yet there are two functions.
  assert run._new_programs(records.LOOP, 1) == names[:1]
  assert run._new_programs(records.LOOP, 2) == names[2:3]
  assert run._new_programs(records.CONTROL, 2) == names[3:]

  scored = _answer(monkeypatch, lambda name, item: item < 9)
  run._score_all(records.LOOP, 0, "seed", records.DEV, ["seed"])
  scored.clear()
  for arm, t in ((records.LOOP, 1), (records.LOOP, 2), (records.CONTROL, 2)):
    run._evaluate(arm, t, archive.candidates(arm, t))
  assert scored == [f"program:{names[0]}", f"program:{names[2]}"]
  known = archive.scores(records.DEV)
  engine = run._executor.engine
  assert known[f"program:{names[1]}"] == records.Score(
      f"program:{names[1]}", "dev", 300, 9, 0, 0, engine, "", scored[0], 300
  )
  # Of the other arm: it is new there, and costs nothing.
  assert known[f"program:{names[3]}"].reused == scored[1]
  run._evaluate(records.LOOP, 2, run._new_programs(records.LOOP, 2))
  assert len(scored) == 2


def _answer(monkeypatch, is_right):
  """Lets models answer as `is_right(name, item)` says; who was merged."""
  merged = []

  def merge(loaded, name, program):
    merged.append(name)
    return runner.Merged({}, "crash" if "broken" in name else "")

  def respond(sampler, task, settings, items, first, is_stopped):
    return [
        records.Response(
            first + i, item.prompt, "", item.gold, "", is_right(merged[-1], i)
        )
        for i, item in enumerate(items, first)
    ]

  monkeypatch.setattr(worker_lib, "merge", merge)
  monkeypatch.setattr(worker_lib, "respond", respond)
  monkeypatch.setattr(sampling.JaxSampler, "swap_weights", lambda *_: None)
  return merged


def _know(archive, names):
  """Admits programs of these names."""
  texts = [name.removeprefix("program:") for name in names]
  with archive.activity(records.LOOP, 1, "admit"):
    archive.add_factory(1, "")
    for i, digest in enumerate(texts):
      archive.add_completions(
          [records.Completion(records.LOOP, 1, i, digest, True)]
      )
      archive.add_verdict(records.Verdict(records.LOOP, 1, i, "", digest))


def test_a_race_asks_less_and_finds_the_same(begin, monkeypatch):
  evaluate = config_lib.Evaluate(dev_size=400, racing_block=25)
  config = dataclasses.replace(_CONFIG, evaluate=evaluate)
  run = begin(config)
  rng = np.random.default_rng(0)
  skill = {f"program:{i}": i / 50 for i in range(40)} | {"seed": 0.5}
  right = {name: rng.uniform(size=400) < p for name, p in skill.items()}
  right["program:20 broken"] = None
  names = [name for name in right if name != "seed"]
  _know(run._archive, names)
  merged = _answer(monkeypatch, lambda name, item: bool(right[name][item]))
  score = lambda: run._score_all(
      records.LOOP, 1, "evaluate", records.DEV, names, top=3, bottom=4
  )
  run._score_all(records.LOOP, 0, "seed", records.DEV, ["seed"])

  # Killed twice on the way, which changes nothing.
  add_score, left = run._archive.add_score, [60]

  def killed(*args):
    add_score(*args)
    left[0] -= 1
    if not left[0]:
      raise KeyboardInterrupt

  monkeypatch.setattr(run._archive, "add_score", killed)
  for again in (90, 10**6):
    with pytest.raises(KeyboardInterrupt):
      score()
    left[0] = again
  score()
  scores = run._archive.scores(records.DEV)
  total = {n: sum(right[n]) for n in names if right[n] is not None}
  for name in total:
    seen = scores[name].n
    assert scores[name].correct == sum(right[name][:seen])
    assert scores[name].items == 400 and seen >= 25
  assert scores["program:20 broken"].failure == "crash"
  ranked = sorted(total, key=lambda name: -total[name])
  for name in (*ranked[:3], *ranked[-3:]):  # And the broken one is the worst.
    assert scores[name].complete
  assert sum(scores[name].n for name in total) < 0.6 * 400 * len(total)
  # A model is there while its blocks follow each other.
  assert len(merged) <= 2 * len(names) + 3

  asked = len(merged)
  score()
  assert len(merged) == asked
  interrupted = scores
  for table in ("responses", "scores"):
    run._archive._db.exec_driver_sql(
        f"DELETE FROM {table} WHERE model != 'seed'"
    )
  score()
  counted = lambda scores: {n: (s.n, s.correct) for n, s in scores.items()}
  assert counted(run._archive.scores(records.DEV)) == counted(interrupted)


def test_who_was_merged_before_is_not_given_up(begin, monkeypatch):
  run = begin()
  _answer(monkeypatch, lambda name, item: item % 2 == 0)
  score = lambda split: run._score_all(records.LOOP, 0, "best", split, ["seed"])
  score(records.DEV)
  with run._archive.stage(records.LOOP, 0, store_lib.SEARCH):
    pass
  run = begin()  # The sampler does not have it any more.
  merge, failures = worker_lib.merge, ["crash"] * 2
  again = lambda *about: (
      runner.Merged(None, failures.pop()) if failures else merge(*about)
  )
  monkeypatch.setattr(worker_lib, "merge", again)
  with pytest.raises(errors.UserError, match=r"merged before.* \(crash\)"):
    score(records.TEST)
  assert not run._archive.scores(records.TEST)
  failures.append("timeout")  # Once is no verdict.
  score(records.TEST)
  assert run._archive.scores(records.TEST)["seed"].correct == 600


def test_other_weights_are_told_once_a_merge(begin, monkeypatch, capsys):
  evaluate = config_lib.Evaluate(dev_size=100, racing_block=25)
  run = begin(dataclasses.replace(_CONFIG, evaluate=evaluate))
  _answer(monkeypatch, lambda name, item: True)
  run._score_all(records.LOOP, 0, "seed", records.DEV, ["seed"])
  answers = run._archive.responses("seed", records.DEV)[:25]
  begun = records.Score(
      "ties:x", records.DEV, 25, 25, items=100, weights="others"
  )
  with run._archive.activity(records.LOOP, 0, "ties"):
    run._archive.add_score(begun, answers)
  run._score_all(records.LOOP, 0, "ties", records.DEV, ["ties:x"], top=1)
  assert run._archive.scores(records.DEV)["ties:x"].complete
  said = capsys.readouterr().err
  assert said.count("Note: ties:x has other weights than when it was") == 1


def test_sweeps_have_the_budget_and_their_names_give_the_merge_back(
    run, loaded
):
  seed, a, b = (models.init_params(_DECODER, i) for i in range(3))
  for family in records.SWEEPS:
    names = run._sweep(family, 30)
    assert names == run._sweep(family, 30) and len(set(names)) == 30
  key = lambda tree: np.asarray(tree["layers"]["mlp"]["up"])
  taus = [key(expert) - key(seed) for expert in (a, b)]
  for name, expected in (
      ("task_arithmetic:scale=0.5", 0.5 * (taus[0] + taus[1])),
      ("weights:0.5,-0.25", 0.5 * taus[0] - 0.25 * taus[1]),
      # All is kept: the mean of those that have the sign of the sum.
      (
          "ties:density=1.0,scale=2.0",
          np.where(taus[0] * taus[1] > 0, taus[0] + taus[1], 0)
          + 2
          * np.where(
              taus[0] * taus[1] > 0,
              0,
              np.where(abs(taus[0]) > abs(taus[1]), taus[0], taus[1]),
          ),
      ),
  ):
    merged, failure = worker_lib.merge(loaded, name)
    assert not failure
    np.testing.assert_allclose(key(merged), key(seed) + expected, atol=1e-5)


def test_the_seed_and_the_experts_are_merges_too(loaded):
  for name, expected in (
      ("seed", loaded.seed),
      ("expert:b", models.init_params(_DECODER, 2)),
  ):
    merged, failure = worker_lib.merge(loaded, name)
    assert not failure
    for key in ("gate", "up", "down"):
      np.testing.assert_array_equal(
          merged["layers"]["mlp"][key], expected["layers"]["mlp"][key]
      )
    # Whatever the scope is: an expert is the whole expert.
    np.testing.assert_array_equal(merged["embed"], expected["embed"])


def test_keys_differ_by_seed_iteration_and_stage(run):
  keys = set()
  for seed in (0, 1):
    run._config = dataclasses.replace(_CONFIG, seed=seed)
    for t in (1, 2):
      for stage in ("propose", "dpo"):
        keys.add(tuple(jax.random.key_data(run._key(t, stage)).tolist()))
  assert len(keys) == 8


def test_a_cut_completion_teaches_nothing(run):
  archive = run._archive
  texts = [f"  return base + {s} * task_vectors[0]\n" for s in (0.1, 0.2, 0.1)]
  _write(run, records.LOOP, 1, texts, (False, False, True))
  names = [f"program:{digest}" for digest in _select(run, records.LOOP, 1)]
  with archive.activity(records.LOOP, 1, "evaluate"):
    for name in names:
      archive.add_score(records.Score(name, records.DEV, 300, 9))
  # The first text was cut; the same program was written whole later on.
  (candidate,) = run._candidates(1)
  assert candidate.writing == preferences.Writing(1, 2, texts[2])


def test_a_program_whose_merge_fails_is_no_crash(loaded, monkeypatch):
  def fail(*_, **__):
    raise NotImplementedError("Unsupported dtype float16")

  monkeypatch.setattr(runner, "kernels", lambda program: fail)
  merge = functools.partial(worker_lib.merge, loaded)
  assert merge("program:x") == (None, "exception")
  monkeypatch.setattr(merging.Merger, "merge", fail)
  with pytest.raises(NotImplementedError):
    merge("ties:density=0.5,scale=1.0")


def test_nothing_to_prefer_is_told(run):
  with pytest.raises(errors.UserError, match="left nothing to prefer"):
    run._refine(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": ()}, "'experts' is empty"),
        ({"experts": ("a", "a")}, "names a model twice"),
        ({"evaluate": config_lib.Evaluate(task="gms8k")}, "known tasks"),
        ({"propose": config_lib.Propose(prompt="tyni")}, "tiny"),
        ({"evaluate": config_lib.Evaluate(test_size=9001)}, "9000 problems"),
        ({"executor": "ray", "sampler": "replay"}, "'replay'; .*=local$"),
    ],
)
def test_a_config_that_cannot_run_is_told_before_anything_is_loaded(
    changes, message, tmp_path
):
  config = dataclasses.replace(_CONFIG, **changes)
  with pytest.raises(errors.UserError, match=message):
    loop.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_ray_that_is_not_installed_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: None)
  config = dataclasses.replace(_CONFIG, executor="ray")
  with pytest.raises(errors.UserError, match=r"pip install .*\[ray\]") as error:
    loop.run(config, tmp_path / "run")
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
  loop.check(_CONFIG)  # Who stays here needs none.


@pytest.mark.slow
def test_prompts_that_do_not_fit_are_counted(loaded, capsys):
  shapes = dataclasses.replace(_DECODER, max_positions=64)
  config = dataclasses.replace(
      _CONFIG,
      propose=dataclasses.replace(_CONFIG.propose, max_new_tokens=8),
      evaluate=config_lib.Evaluate(dev_size=20, test_size=30, max_new_tokens=8),
  )
  with pytest.raises(errors.UserError, match=r"lower propose\.max_new_tokens"):
    loop._check_lengths(config, shapes, _Words())
  task = evaluation.load(config_lib.Evaluate())
  prompts = [item.prompt for item in task.items(records.DEV, 20)]
  limit = sorted(map(len, prompts))[5] + 8
  long = programs.load_prompt("tiny")
  monkey = pytest.MonkeyPatch()
  with monkey.context() as patch:
    patch.setattr(programs, "load_prompt", lambda name: long[:9])
    shapes = dataclasses.replace(_DECODER, max_positions=limit)
    assert loop._check_lengths(config, shapes, _Words()) == limit
  cut = sum(len(prompt) + 8 > limit for prompt in prompts)
  said = capsys.readouterr().err
  assert 0 < cut < 20 and f"{cut} of 20 dev prompts and 8 new" in said
  sampler = sampling.JaxSampler(shapes, _Words(), (1,))
  sampler.swap_weights(loaded.seed, "seed")
  items = evaluation.load_items(config.evaluate)[records.DEV]
  responses = worker_lib.respond(sampler, task, config.evaluate, items, 0)
  assert sum(response.truncated for response in responses) == cut


@pytest.mark.parametrize(
    ("kind", "host", "message"),
    [
        ("replay", loop.Host(), "needs --recording"),
        ("replay", loop.Host(recording="none"), "no recording to replay"),
        ("vllm", loop.Host(vllm_python="nowhere"), "no such file"),
        ("vllm", loop.Host(vllm_python="false"), "make vllm-env"),
        ("vllm", loop.Host(vllm_address="http://127.0.0.1:9"), "no vLLM serv"),
    ],
)
def test_a_sampler_that_cannot_be_had(kind, host, message, run, loaded):
  config = dataclasses.replace(_CONFIG, sampler=kind)
  with pytest.raises(errors.UserError, match=message) as error:
    loop._sampler(config, loaded, 64, host, run._archive)
  assert "\n" not in str(error.value)


def test_a_run_goes_on_with_the_sampler_it_began_with(run, loaded):
  archive, host = run._archive, loop.Host(vllm_python="false")
  assert run._config.sampler == "auto"
  _write(run, records.LOOP, 1, [""])
  sampler = loop._sampler(run._config, loaded, 64, host, archive)
  assert isinstance(sampler, sampling.JaxSampler)


def test_a_run_that_began_with_vllm_asks_for_it(run, loaded):
  archive, host = run._archive, loop.Host(vllm_python="false")
  with archive.activity(records.LOOP, 0, "single models"):
    archive.add_score(
        records.Score("seed", records.DEV, 2, 1, engine="vllm 0.32.0")
    )
  with pytest.raises(errors.UserError, match="make vllm-env"):
    loop._sampler(run._config, loaded, 64, host, archive)


def test_vllm_serves_one_dtype(run, loaded):
  seed = loaded.seed
  mixed = {**seed, "final_norm": seed["final_norm"].astype("bfloat16")}
  loaded = dataclasses.replace(loaded, seed=mixed)
  config = dataclasses.replace(_CONFIG, sampler="vllm")
  with pytest.raises(errors.UserError, match="bfloat16 and float32, vLLM"):
    loop._sampler(config, loaded, 64, loop.Host(), run._archive)


@pytest.mark.parametrize("rows", [298, 302])
def test_an_expert_answers_with_the_seeds_rows(loaded, rows):
  other = models.init_params(dataclasses.replace(_DECODER, vocab_size=rows), 5)
  merges = runner.Merges(loaded.seed, {"a": other}, "mlp")
  params, _ = merges.expert("a")
  shared = min(rows, 300)
  for name in ("embed", "head"):
    assert params[name].shape == loaded.seed[name].shape
    np.testing.assert_array_equal(params[name][:shared], other[name][:shared])
    np.testing.assert_array_equal(
        params[name][shared:], loaded.seed[name][shared:]
    )
  assert params["layers"] is other["layers"]


def test_an_expert_of_another_vocabulary_is_told(tmp_path, monkeypatch, capsys):
  small = dataclasses.replace(_DECODER, vocab_size=298)
  for name, decoder in (("seed", _DECODER), ("a", small), ("b", _DECODER)):
    convert.save(tmp_path / name, decoder, models.init_params(decoder, 0))
  monkeypatch.setattr(convert, "load_tokenizer", lambda directory: _Words())
  config = dataclasses.replace(_CONFIG, merge=config_lib.Merge(scope="all"))
  with contextlib.ExitStack() as stack:
    paths = {name: tmp_path / name for name in ("seed", "a", "b")}
    loaded = worker_lib.load(config, paths, stack)
    expert, failure = loaded.merges.expert("a")
  assert not failure and expert["embed"].shape == (300, 8)
  said = capsys.readouterr().err
  assert (
      "Note: expert a has 298 rows of vocabulary, the base 300: the first"
      " 298 are merged" in said
  )
  assert "expert b" not in said


def test_an_expert_of_another_rope_is_told(tmp_path, monkeypatch, capsys):
  longer = dataclasses.replace(_DECODER, rope=models.Rope(1e6))
  for name, decoder in (("seed", _DECODER), ("a", _DECODER), ("b", longer)):
    convert.save(tmp_path / name, decoder, models.init_params(decoder, 0))
  monkeypatch.setattr(convert, "load_tokenizer", lambda directory: _Words())
  with contextlib.ExitStack() as stack:
    paths = {name: tmp_path / name for name in ("seed", "a", "b")}
    worker_lib.load(_CONFIG, paths, stack)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("Note: expert b has rope Rope(theta=1000000")
  assert "merged and run with the seed model's" in line
