"""A finished run of random models, and its programs on other experts."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import sqlite3

import jax
import numpy as np
import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import sandbox
from selfdev_jax import store as store_lib
from selfdev_jax import transfer
from selfdev_jax.evaluation import run as run_lib
from selfdev_jax.evaluation import tasks
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.report import intervals
from selfdev_jax.sandbox import runner
from selfdev_jax.tiny import corpus

_DECODER = models.DecoderConfig(
    vocab_size=280,
    embed=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp=24,
    max_positions=80,
)
_EXPERTS = ("a", "b", "c", "d", "e")
# What the run's programs do, and what they had right of 6 there.
_BODIES = {
    "  a, b = task_vectors\n  return base + 0.9 * a - 0.5 * b\n": 5,
    "  return base + 0.5 * sum(task_vectors)\n": 4,
    "  return base - 0.7 * task_vectors[-1]\n": 3,
    "  return base + 0.2 * task_vectors[0]\n": 1,
}
_DEV, _TEST = 6, 10


def _source(body):
  return f"def merge(base, task_vectors):\n{body}"


@pytest.fixture(scope="module")
def world(tmp_path_factory, random_params) -> pathlib.Path:
  """Directories seed, a, b, c, d, e, and run, with a finished archive."""
  root = tmp_path_factory.mktemp("transfer")
  documents = [corpus.Document("two and two is", "four")]
  tokenizer = corpus.train_tokenizer(documents, _DECODER.vocab_size)
  corpus.save_tokenizer(tokenizer, root / "tokenizer")
  seed = random_params(_DECODER)
  rng = np.random.default_rng(1)
  convert.save(root / "seed", _DECODER, seed, root / "tokenizer")
  for name in _EXPERTS:
    expert = jax.tree.map(
        lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), seed
    )
    convert.save(root / name, _DECODER, expert, root / "tokenizer")
  config = config_lib.Config(
      name="t",
      seed_model=str(root / "seed"),
      experts=(str(root / "a"), str(root / "b")),
      iterations=1,
      top_k=3,
      sampler="jax",
      evaluate=config_lib.Evaluate(
          dev_size=_DEV, test_size=_TEST, batch_size=4, max_new_tokens=8
      ),
  )
  _archive(root / "run", config)
  return root


def _archive(workdir, config):
  identity = {
      f"model {name}": convert.digest(name)
      for name in (config.seed_model, *config.experts)
  }
  shapes = [(_DECODER.embed, _DECODER.mlp), (_DECODER.mlp, _DECODER.embed)]
  with (
      store_lib.Store.create(workdir, config, identity, {}) as archive,
      sandbox.Sandbox(config.sandbox, shapes, len(config.experts)) as box,
  ):
    texts = list(map(_source, _BODIES))
    found = []
    with archive.activity(records.LOOP, 1, "propose"):
      archive.add_factory(1, "")
      archive.add_completions(
          [
              records.Completion(records.LOOP, 1, i, text, True, "jax 0")
              for i, text in enumerate(texts)
          ]
      )
    with archive.activity(records.LOOP, 1, "admit"):
      for i, text in enumerate(texts):
        answer = box.admit(text)
        assert isinstance(answer, sandbox.Admitted), answer
        verdict = records.Verdict(records.LOOP, 1, i, text, answer.digest)
        about = answer.program, answer.stats, answer.fingerprint
        archive.add_verdict(verdict, *about)
        found.append(answer.digest)
      archive.add_candidates(records.LOOP, 1, found)
    with archive.activity(records.LOOP, 1, "evaluate"):
      for digest, correct in zip(found, _BODIES.values(), strict=True):
        model = f"program:{digest}"
        archive.add_score(records.Score(model, records.DEV, _DEV, correct))
    with archive.stage(records.LOOP, 0, store_lib.SEARCH):
      pass
    with archive.stage(records.LOOP, 0, "export"):
      pass


@pytest.fixture(autouse=True, scope="module")
def merges_here(merging_here):
  with merging_here():
    yield


def _names(world, experts):
  return [str(world / name) for name in experts]


def _run(world, out, experts="cd", names=("arithmetic",), changes=(), **more):
  config = transfer.read_config(world / "run")
  return transfer.run(
      world / "run",
      _names(world, experts),
      transfer.task_settings(config, names, changes),
      out=out,
      **more,
  )


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
  """(out, result) of a transfer that nothing interrupted."""
  out = tmp_path_factory.mktemp("done") / "out"
  return out, _run(world, out)


def _files(out):
  return {
      str(path.relative_to(out)): path.read_bytes()
      for path in sorted(out.rglob("*.jsonl"))
  }


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def _program(result, body):
  """The model of the program with that body."""
  return result["candidates"][list(_BODIES).index(body)]["model"]


def _right(path):
  return [row["marks"]["exact_match"]["correct"] for row in _rows(path)]


def test_the_same_budget_and_then_one_look_at_the_test_set(done):
  out, result = done
  assert result["budget"] == {"programs": 4, "task_arithmetic": 4}
  assert [c["dev_in_run"] for c in result["candidates"]] == [
      correct / _DEV for correct in _BODIES.values()
  ]
  assert all(c["applies"] for c in result["candidates"])
  task = result["tasks"]["arithmetic"]
  assert task["n_dev"] == _DEV and task["n_test"] == _TEST
  dev, models_ = task["dev"], task["models"]
  scales = [m for m in dev if m.startswith("task_arithmetic:")]
  programs = [m for m in dev if m.startswith("program:")]
  assert [float(m.split("=")[1]) for m in scales] == list(
      np.geomspace(0.02, 2.0, 4).round(5)
  )
  assert len(list((out / "arithmetic" / "dev").iterdir())) == 8
  # By the run's own score, whatever it does with these experts.
  first = result["candidates"][0]["model"]
  assert models_["unchanged"]["model"] == first
  best = max(programs, key=dev.get)
  assert models_["best_of_top"]["model"] == best
  assert models_["task_arithmetic"]["model"] == max(scales, key=dev.get)
  chosen = {entry["model"] for entry in models_.values()}
  assert {"seed"} < chosen and len([m for m in chosen if "expert" in m]) == 2
  assert len(list((out / "arithmetic" / "test").iterdir())) == len(chosen)


def test_scores_and_differences_are_those_of_the_files(done):
  out, result = done
  task = result["tasks"]["arithmetic"]
  right = {}
  for role, entry in task["models"].items():
    kind, _, rest = entry["model"].partition(":")
    if kind == "expert":
      rest = f"{'cd'.index(rest[-1])}-{rest[-1]}"
    path = out / "arithmetic" / "test" / f"{kind}{rest and '-'}{rest}.jsonl"
    right[role] = _right(path)
    assert entry["correct"] == sum(right[role]) and entry["n"] == _TEST
    assert entry["ci95"] == list(records.wilson(sum(right[role]), _TEST))
  for ours in ("unchanged", "best_of_top"):
    others = set(right) - {"unchanged", "best_of_top"}
    assert set(task["paired"][ours]) == others
    for role, pair in task["paired"][ours].items():
      pairs = list(zip(right[ours], right[role], strict=True))
      better, worse = pairs.count((True, False)), pairs.count((False, True))
      assert pair["better"] == better and pair["worse"] == worse
      assert pair["difference"] == (better - worse) / _TEST
      assert pair["ci95"] == list(intervals.paired(better, worse, _TEST))
  table = transfer.table(result)
  assert "unchanged" in table and "expert d" in table and "seed" in table
  json.dumps(result)
  assert json.loads((out / "results.json").read_text()) == result


def test_answers_are_those_of_the_merged_models(done, world):
  out, result = done
  decoder, seed = convert.load(world / "seed")
  c, d = (convert.load(world / name)[1] for name in "cd")
  tokenizer = convert.load_tokenizer(world / "seed")
  eos = convert.end_tokens(world / "seed", tokenizer)
  sampler = sampling.JaxSampler(decoder, tokenizer, eos)
  settings = transfer.read_config(world / "run").evaluate
  items = evaluation.load(settings).items(records.DEV, _DEV)

  def merged(function):
    mlps = [tree["layers"]["mlp"] for tree in (seed, c, d)]
    mlp = jax.tree.map(lambda s, x, y: function(s, x - s, y - s), *mlps)
    return {**seed, "layers": {**seed["layers"], "mlp": mlp}}

  bodies = list(_BODIES)
  expected = {
      _program(result, bodies[0]): lambda s, x, y: s + 0.9 * x - 0.5 * y,
      _program(result, bodies[2]): lambda s, x, y: s - 0.7 * y,
      "task_arithmetic:scale=2.0": lambda s, x, y: s + 2 * (x + y),
  }
  said = set()
  for model, function in expected.items():
    sampler.swap_weights(merged(function), model)
    texts = [
        g.text
        for batch in sampler.generate(
            [item.prompt for item in items], max_new_tokens=8, batch_size=4
        )
        for g in batch
    ]
    name = model.replace(":", "-")
    rows = _rows(out / "arithmetic" / "dev" / f"{name}.jsonl")
    assert [row["response"] for row in rows] == texts
    said.add(tuple(texts))
  assert len(said) == len(expected)


def test_the_archive_is_only_read(world, tmp_path):
  files = lambda: {
      path.name: hashlib.sha256(path.read_bytes()).hexdigest()
      for path in (world / "run").iterdir()
      if path.is_file() and path.suffix == ".sqlite"
  }
  before = files()
  assert before
  result = _run(world, None, top=2)
  assert files() == before
  assert pathlib.Path(result["out"]) == world / "run" / "transfer" / "c_d"
  assert result["budget"]["programs"] == 2


def test_a_finished_transfer_returns_at_once(done, world, monkeypatch):
  out, result = done
  monkeypatch.setattr(worker_lib, "load", None)
  assert _run(world, out) == result


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_cut_short_it_ends_the_same(done, world, tmp_path, share):
  out, result = done
  files = _files(out)
  names = sorted(files, key=lambda name: ("test" in name, name))
  there = int(share * len(names))
  for i, name in enumerate(names[: there + 1]):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = files[name]
    path.write_bytes(text if i < there else text[: len(text) * 4 // 5])
  about = (out / "about.json").read_bytes()
  (tmp_path / "out" / "about.json").write_bytes(about)
  again = _run(world, tmp_path / "out")
  assert _files(tmp_path / "out") == files
  assert again.pop("out") != result["out"]
  assert again == {k: v for k, v in result.items() if k != "out"}


def test_another_transfer_is_refused_there(done, world):
  out, _ = done
  with pytest.raises(errors.UserError, match=r"experts \(.*Choose another --o"):
    _run(world, out, experts="dc")
  with pytest.raises(errors.UserError, match=r"arithmetic.dev_size \(6 there"):
    _run(world, out, changes=["arithmetic.dev_size=5"])
  with pytest.raises(errors.UserError, match=r"top \(15 there, 2 here\)"):
    _run(world, out, top=2)


@pytest.mark.slow  # Starts a sandbox.
def test_another_number_of_experts(world, tmp_path):
  result = _run(world, tmp_path / "out", experts="cde")
  first, *others = result["candidates"]
  assert not first["applies"]
  assert first["rejection"]["stage"] == "trace"
  assert "unpack" in first["rejection"]["message"]
  assert all(c["applies"] for c in others)
  assert result["budget"] == {"programs": 3, "task_arithmetic": 3}
  task = result["tasks"]["arithmetic"]
  assert task["models"]["unchanged"]["model"] == others[0]["model"]
  assert first["model"] not in task["dev"]
  table = transfer.table(result)
  assert "1 not applicable" in table and "unpack" in table


@pytest.mark.slow  # Starts a sandbox.
def test_no_program_takes_so_many(world, tmp_path):
  with pytest.raises(
      errors.UserError, match="none of the run's 1 top programs"
  ):
    _run(world, tmp_path / "out", experts="cde", top=1)


def test_the_test_split_chooses_nothing(done, world, tmp_path, monkeypatch):
  """With other gold answers on the test split the same models are chosen."""
  make = tasks._arithmetic

  def lying(settings):
    task = make(settings)

    def items(split, n):
      found = task.items(split, n)
      if split == records.DEV:
        return found
      return [dataclasses.replace(item, gold="7") for item in found]

    return dataclasses.replace(task, items=items)

  seen = []
  answer = run_lib.respond

  def respond(answers, *rest):
    split = answers.path.parent.name
    seen.append(split)
    if split == "test":
      dev = answers.path.parents[1] / "dev"
      assert [len(_rows(path)) for path in dev.iterdir()] == [_DEV] * 8
    return answer(answers, *rest)

  monkeypatch.setitem(tasks.TASKS, "arithmetic", lying)
  monkeypatch.setattr(run_lib, "respond", respond)
  result = _run(world, tmp_path / "out")
  assert seen[:8] == ["dev"] * 8 and set(seen[8:]) == {"test"}
  ours, theirs = (
      {k: v["model"] for k, v in r["tasks"]["arithmetic"]["models"].items()}
      for r in (result, done[1])
  )
  assert ours == theirs


def test_a_merge_that_fails_is_a_result(done, world, tmp_path, monkeypatch):
  _, whole = done
  dev = whole["tasks"]["arithmetic"]["dev"]
  merge, programs = runner.Merges.program, []

  def fail(self, program):
    if program not in programs:
      programs.append(program)
    if programs.index(program) < 1:
      return runner.Merged(None, "non_finite")
    return merge(self, program)

  monkeypatch.setattr(runner.Merges, "program", fail)
  result = _run(world, tmp_path / "out")
  task = result["tasks"]["arithmetic"]
  first = result["candidates"][0]["model"]
  assert task["dev"] == dev | {first: None}
  assert task["models"]["best_of_top"]["model"] != first
  unchanged = task["models"]["unchanged"]
  assert unchanged["model"] == first and unchanged["failure"] == "non_finite"
  assert set(task["paired"]) == {"best_of_top"}
  assert "no merge: non_finite" in transfer.table(result)


def test_several_tasks(world, tmp_path, monkeypatch):
  def other(settings):
    del settings
    items = lambda split, n: [
        evaluation.Item(f"{split} {i}:", str(i)) for i in range(n)
    ]
    score = lambda texts, golds: [
        {"right": evaluation.Mark(text, len(text) % 2 == 0)}
        for text, _ in zip(texts, golds, strict=True)
    ]
    return evaluation.Task(items, ("right",), score)

  monkeypatch.setitem(tasks.TASKS, "other", other)
  result = _run(
      world,
      tmp_path / "out",
      names=("arithmetic", "other"),
      changes=["other.max_new_tokens=4", "other.test_size=3"],
      top=2,
  )
  assert set(result["tasks"]) == {"arithmetic", "other"}
  assert result["tasks"]["other"]["n_test"] == 3
  assert result["other.max_new_tokens"] == 4
  rows = _rows(tmp_path / "out" / "other" / "test" / "seed.jsonl")
  assert [row["prompt"] for row in rows] == ["test 0:", "test 1:", "test 2:"]
  assert max(row["tokens"] for row in rows) == 4


def test_a_run_that_is_not_finished(world, tmp_path):
  path = shutil.copy(world / "run" / "archive.sqlite", tmp_path)
  with contextlib.closing(sqlite3.connect(path)) as db:
    db.execute("DELETE FROM done WHERE stage = 'export'")
    db.commit()
  with pytest.raises(errors.UserError, match="is not finished; the command"):
    transfer.read_config(tmp_path)
  with pytest.raises(errors.UserError, match="holds no run"):
    transfer.read_config(tmp_path / "nowhere")


def test_another_seed_model_is_refused(world, tmp_path):
  directories = {str(world / "seed"): world / "a"}
  with pytest.raises(errors.UserError, match="other weights than in the run"):
    _run(world, tmp_path, directories=directories)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts": "cc"}, "each once"),
        ({"experts": ""}, "one or more models"),
        ({"names": ()}, "one or more tasks"),
        ({"names": ("arithmetic",) * 2}, "each once"),
        ({"names": ("gms8k",)}, "known tasks"),
        ({"changes": ["dev_size=3"]}, "write TASK.KEY=VALUE"),
        ({"changes": ["math.dev_size=3"]}, "TASK one of arithmetic"),
        ({"changes": ["arithmetic.dev=3"]}, "did you mean 'dev_size'"),
        ({"changes": ["arithmetic.dev_size=x"]}, "takes int, not 'x'"),
        ({"changes": ["arithmetic.test_size=9001"]}, "9000 problems"),
        ({"changes": ["arithmetic.max_new_tokens=80"]}, "80 positions"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(given, message, world, tmp_path):
  with pytest.raises(errors.UserError, match=message) as error:
    _run(world, tmp_path / "out", **given)
  assert "\n" not in str(error.value)
