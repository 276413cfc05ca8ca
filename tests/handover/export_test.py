"""The package: what is in it, what it says, and what is refused."""

import json

import numpy as np
import pytest
import yaml

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.handover import card
from selfdev_jax.handover import export
from selfdev_jax.handover import reapply
from selfdev_jax.sandbox import runner


@pytest.fixture(scope="module")
def package(finished, tmp_path_factory):
  """(its directory, what `run` returned) of the best program."""
  out = tmp_path_factory.mktemp("package") / "merged"
  return out, export.run(finished / "run", "best", out)


@pytest.fixture
def run(finished):
  with store_lib.Store.read(finished / "run") as store:
    yield store


def test_it_is_the_run_s_model(package, run, finished):
  out, provenance = package
  score = run.scores(records.DEV)[records.PROGRAM + provenance["program"]]
  config, params = convert.load(out)
  assert models.checksum(params) == provenance["weights"] == score.weights
  assert config == convert.read_config(finished / "seed")
  assert convert.load_tokenizer(out).encode("two") == convert.load_tokenizer(
      finished / "seed"
  ).encode("two")
  assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_it_has_the_program(package, run, digests, sources):
  out, provenance = package
  assert provenance["program"] == digests["best"]
  assert (out / "program.json").read_text() == run.program(digests["best"])
  assert (out / "program.py").read_text() == sources["best"]


def test_provenance(package, run, finished, sources):
  out, provenance = package
  assert json.loads((out / "provenance.json").read_text()) == json.loads(
      json.dumps(provenance)
  )
  for split, n in ((records.DEV, 8), (records.TEST, 6)):
    score = run.scores(split)[records.PROGRAM + provenance["program"]]
    found = provenance["scores"][split]
    assert found["correct"] == score.correct and found["n"] == n
    assert found["ci95"] == records.wilson(score.correct, n)
    assert found["session"]["device"] == "cpu"
  assert [s["activity"]["stage"] for s in provenance["scores"].values()] == [
      "evaluate",
      "best",
  ]
  found = provenance["found"]
  assert found["completion"]["text"] == sources["best"]
  assert found["activity"]["stage"] == "propose"
  assert provenance["written"] == [
      {"arm": "loop", "iteration": 1, "item": 0, "factory": 1}
  ]
  assert [model["digest"] for model in provenance["models"]] == [
      convert.digest(finished / name) for name in ("seed", "a", "b")
  ]
  assert provenance["config"] == config_lib.to_dict(run.config())
  assert provenance["config_digest"] == config_lib.digest(run.config())


def test_the_card(package, finished, sources):
  out, provenance = package
  text = (out / "README.md").read_text()
  front = yaml.safe_load(text.split("---")[1])
  assert front["tags"] == ["merge", "selfdev_jax"]
  assert "base_model" not in front  # The hub has none of these.
  assert f"```python\n{sources['best']}```" in text
  for model in provenance["models"]:
    assert f"| `{model['digest']}` |" in text
  assert provenance["weights"] in text and provenance["program"] in text
  rows = [line for line in text.splitlines() if line.startswith("| **this")]
  dev, test = provenance["scores"]["dev"], provenance["scores"]["test"]
  low, high = (f"{100 * x:.1f}" for x in dev["ci95"])
  start = f"| **this program** | {100 * dev['accuracy']:.1f} | {low} to {high}"
  assert rows[0].startswith(f"{start} | 8 | {100 * test['accuracy']:.1f} |")
  assert "| TIES |" in text and "| seed model |" in text
  assert "The run evaluated 4 programs and chose" in text
  merge = "--program=program.json --base=seed --experts=a,b --scope=mlp"
  assert f"python -m launch.merge {merge} --out=NEW" in text
  assert "python -m launch.self_develop --x=1" in text
  assert str(finished) not in text and "toy world" not in text


def test_what_the_card_says_of_others(package):
  _, provenance = package
  text = lambda **other: card.card({**provenance, **other}, "x", "name")
  assert "is not the one that it chose" not in text()
  assert "is not the one that it chose" in text(is_best=False)
  toy = text(is_toy=True)
  assert "model of a toy world" in toy and "~/.cache/selfdev_jax" in toy
  dev = provenance["scores"]["dev"]
  assert "This program has no test score." in text(scores={"dev": dev})
  stopped = text(scores={"dev": {**dev, "n": 6}})
  assert "It was asked 6 of 8 development items" in stopped
  reused = text(scores={"dev": {**dev, "reused": "program:abc"}})
  assert "is that of `program:abc`, which does the same" in reused
  completion = {**provenance["found"]["completion"], "factory": 3}
  found = {**provenance["found"], "completion": completion}
  assert "the seed model after 2 rounds of DPO, as" in text(found=found)
  hub = [{**m, "name": f"org/{i}"} for i, m in enumerate(provenance["models"])]
  front = yaml.safe_load(text(models=hub).split("---")[1])
  assert front["base_model"] == ["org/0", "org/1", "org/2"]


def test_one_whose_score_was_taken_from_another(finished, digests, tmp_path):
  out = tmp_path / "out"
  provenance = export.run(finished / "run", digests["alike"], out)
  assert not provenance["is_best"]
  assert provenance["scores"]["dev"]["weights"] == ""
  assert provenance["scores"]["test"]["weights"] == provenance["weights"]


def _again(package, finished, out, program=None, **other):
  asked = {
      "program": program or package[0] / "program.json",
      "base": str(finished / "seed"),
      "experts": [str(finished / "a"), str(finished / "b")],
      "scope": "mlp",
  }
  return reapply.run(out=out, **asked | other)


def test_applied_again_it_is_the_same(package, finished, tmp_path):
  out = tmp_path / "out"
  config, weights = _again(package, finished, out)
  assert config == convert.read_config(finished / "seed")
  assert weights == package[1]["weights"]
  name = "model.safetensors"
  assert (out / name).read_bytes() == (package[0] / name).read_bytes()
  assert package[1]["program"] in (out / "README.md").read_text()
  experts = [str(finished / "b"), str(finished / "a")]
  _, other = _again(package, finished, tmp_path / "o", experts=experts)
  assert other != weights


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: "{", "is not admitted .verify, malformed."),
        (lambda text: "[]", "is not admitted .verify, malformed."),
        (lambda text: text.replace('"mul"', '"custom_call"'), "not admitted"),
        (lambda text: text.replace("8", "9"), "not admitted"),
        (lambda text: "x" * (1 << 23), "not admitted .verify, ir_bytes."),
    ],
)
def test_nothing_in_a_program_is_trusted(
    package, finished, tmp_path, change, match
):
  path = tmp_path / "p.json"
  original = (package[0] / "program.json").read_text()
  assert change(original) != original
  path.write_text(change(original))
  with pytest.raises(errors.UserError, match=match) as caught:
    _again(package, finished, tmp_path / "out", path)
  assert "\n" not in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_programs_that_do_not_fit(package, finished, tmp_path, digests, run):
  def refused(match, **other):
    with pytest.raises(errors.UserError, match=match):
      _again(package, finished, tmp_path / "out", **other)
    assert not (tmp_path / "out").exists()

  refused("^--program=nowhere cannot be read: ", program="nowhere")
  refused("for other shapes. A program in JSON is", scope="all")
  refused("for other shapes", experts=[str(finished / "a")])
  twice = [str(finished / "a")] * 2
  refused("/a is given twice among --base and --experts", experts=twice)
  refused("model directory /nowhere/x does not exist", base="/nowhere/x")
  path = tmp_path / "broken.json"
  path.write_text(run.program(digests["broken"]))
  refused("broken.json gives no model of .*: non_finite", program=path)


@pytest.fixture
def refused(tmp_path):
  """refused(match, workdir, program): one line, and nothing is left."""

  def check(match, workdir, program="best"):
    (tmp_path / "place").mkdir(exist_ok=True)
    with pytest.raises(errors.UserError, match=match) as caught:
      export.run(workdir, program, tmp_path / "place" / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "place").iterdir())

  return check


def test_programs_that_are_refused(refused, finished, digests, tmp_path):
  run = finished / "run"
  refused("holds no run", tmp_path)
  refused("has no program 'xyz'", run, "xyz")
  broken, waiting = digests["broken"], digests["waiting"]
  refused("no merged model: its merge failed .non_finite.", run, broken)
  refused(f"^program {waiting[:12]} of .* has not been scored$", run, waiting)


def test_an_ambiguous_name(refused, changed, digests):
  shared = next(
      d[0]
      for d in digests.values()
      if sum(e[0] == d[0] for e in digests.values()) == 1
  )
  workdir = changed(
      "INSERT INTO programs SELECT substr(digest, 1, 1) || 'x', program, stats,"
      " fingerprint, arm, iteration, item, activity FROM programs"
  )
  refused("several programs begin with", workdir, shared)


def test_other_weights_are_not_handed_on(refused, changed):
  workdir = changed("UPDATE scores SET weights = 'abc' WHERE split = 'test'")
  refused(
      "gives other weights here .* than in the run .abc., where jax 0, device",
      workdir,
  )


def test_what_exists_is_not_overwritten(finished, tmp_path):
  (tmp_path / "mine").touch()
  with pytest.raises(errors.UserError, match="exists; name a new directory"):
    export.run(finished / "run", "best", tmp_path / "mine")
  assert not (tmp_path / "mine").read_bytes()


def test_a_merge_that_fails_now(refused, finished, monkeypatch):
  lost = runner.Merged(None, "timeout")
  monkeypatch.setattr(worker_lib, "merge", lambda *unused: lost)
  refused("was merged in the run and now is not .timeout.", finished / "run")


def test_a_disk_that_loses_bits(refused, finished, monkeypatch):
  real = convert.open_leaves

  def lossy(directory):
    config, leaves = real(directory)
    if ".out.partial" in str(directory):
      leaves["final_norm"] = np.array(leaves["final_norm"]) + 1e-6
    return config, leaves

  monkeypatch.setattr(convert, "open_leaves", lossy)
  refused("is not what was merged; is the disk sound", finished / "run")


def test_models_that_are_gone(refused, changed, finished):
  old = str(finished / "b")
  workdir = changed(
      f"UPDATE meta SET value = replace(value, '{old}', '/nowhere/b')"
  )
  refused("^model directory /nowhere/b does not exist$", workdir)
