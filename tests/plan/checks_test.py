"""Each thing that can be missing is found, and named with a way out."""

import dataclasses
import os
import pathlib
import socket
import types

import pytest

from configs import smoke
from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import loop
from selfdev_jax import models
from selfdev_jax import sampling
from selfdev_jax import sandbox
from selfdev_jax import store
from selfdev_jax.plan import checks as checks_lib
from selfdev_jax.plan import cost
from selfdev_jax.plan import devices
from selfdev_jax.plan import estimate as estimate_lib
from selfdev_jax.plan import reading
from selfdev_jax.tiny import corpus

_SMOKE = config_lib.from_config_dict(smoke.get_config())
_DECODER = models.DecoderConfig(
    vocab_size=290, embed=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
  monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
  # Starting it costs seconds; tests/launch/self_develop_plan_test.py does.
  monkeypatch.setattr(sandbox.Sandbox, "layers", lambda self: {"seccomp": ""})
  reading.ask_hub.cache_clear()
  reading.hub_answers.cache_clear()


@pytest.fixture
def directories(tmp_path, random_params):
  """A seed model and an expert of it, with a tokenizer."""
  document = corpus.Document("", "one two three four five six seven")
  tokenizer = corpus.train_tokenizer([document] * 3, _DECODER.vocab_size)
  corpus.save_tokenizer(tokenizer, tmp_path / "tokenizer")
  for name in ("seed", "expert"):
    convert.save(
        tmp_path / name,
        _DECODER,
        random_params(_DECODER),
        like=tmp_path / "tokenizer",
    )
  return tmp_path / "seed", tmp_path / "expert"


def _of(*names, **changes):
  seed, *experts = map(str, names)
  return dataclasses.replace(
      _SMOKE, seed_model=seed, experts=tuple(experts), **changes
  )


def _run(config, tmp_path, device=None, sampler="jax"):
  """The checks by what they check."""
  places = reading.places(config)
  known = reading.shape(places[config.seed_model], config)
  items = reading.items(config)
  estimate = None
  if known is not None:
    model = cost.Model(*known[:2], config.merge.scope)
    lengths = reading.lengths(config, items, None)
    estimate = estimate_lib.estimate(config, model, lengths, sampler, device)
  found = checks_lib.run(
      config,
      tmp_path / "run",
      loop.Host(),
      places=places,
      items=items,
      sampler=sampler,
      device=device,
      estimate=estimate,
  )
  return {check.what: check for check in found}


def _missing(found):
  return {k for k, c in found.items() if c.status == checks_lib.MISSING}


def test_nothing_is_missing_for_the_toy_world(tmp_path):
  found = _run(_SMOKE, tmp_path)
  assert not _missing(found)
  assert "a run trains it" in found["model tiny:seed"].found
  assert found["workdir " + str(tmp_path / "run")].found == "new"
  assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_models_on_disk_are_opened(directories, tmp_path):
  found = _run(_of(*directories), tmp_path)
  for path in directories:
    assert found[f"model {path}"].status == checks_lib.OK
  assert found["lengths"].status == checks_lib.OK
  (directories[1] / "model.safetensors").unlink()
  found = _run(_of(*directories), tmp_path)
  broken = found[f"model {directories[1]}"]
  assert broken.status == checks_lib.MISSING and "lacks" in broken.found


def test_an_expert_has_the_seed_s_shapes(directories, tmp_path, random_params):
  wider = dataclasses.replace(_DECODER, mlp=32)
  convert.save(directories[1], wider, random_params(wider))
  found = _run(_of(*directories), tmp_path)
  assert "layers/mlp" in found[f"model {directories[1]}"].found
  # Another vocabulary is merged on the rows that both have.
  longer = dataclasses.replace(_DECODER, vocab_size=292)
  convert.save(directories[1], longer, random_params(longer))
  found = _run(_of(*directories), tmp_path)
  assert found[f"model {directories[1]}"].status == checks_lib.OK


def test_models_that_are_nowhere(tmp_path):
  found = _run(_of("/no/such", "org/name"), tmp_path)
  assert "no such directory" in found["model /no/such"].found
  assert "cannot be reached" in found["model org/name"].found
  assert found["lengths"].status == checks_lib.UNKNOWN
  assert {"model /no/such", "model org/name"} <= _missing(found)


@pytest.mark.parametrize(
    ("answer", "status", "says"),
    [
        (reading.OnHub("c0ffee", 2 * 10**9), "ok", "c0ffee, 2.0 GB to fetch"),
        (reading.OnHub("c0ffee", 1, gated=True), "missing", "gated"),
        (reading.OnHub("c0ffee", 0, has_weights=False), "missing", "no safet"),
        (reading.OnHub(error="404"), "missing", "the hub says 404"),
    ],
)
def test_what_the_hub_says_of_a_model(
    monkeypatch, tmp_path, answer, status, says
):
  monkeypatch.setattr(reading, "ask_hub", lambda *_: answer)
  check = _run(_of("org/name", "org/other"), tmp_path)["model org/name"]
  assert check.status == status and says in check.found


def test_a_gated_model_that_one_is_let_into(monkeypatch, tmp_path):
  answer = reading.OnHub("c0ffee", 1, gated=True)
  monkeypatch.setattr(reading, "ask_hub", lambda *_: answer)
  monkeypatch.setattr(reading, "may_fetch", lambda _: True)
  check = _run(_of("org/name", "org/other"), tmp_path)["model org/name"]
  assert check.status == checks_lib.OK


def test_data_that_is_not_there(monkeypatch, tmp_path):
  changed = dataclasses.replace(_SMOKE.evaluate, task="gsm8k")
  config = dataclasses.replace(_SMOKE, evaluate=changed)
  monkeypatch.setattr(
      reading, "items", lambda _: "could not be had from the hub or its cache"
  )
  check = _run(config, tmp_path)["data of gsm8k"]
  assert check.status == checks_lib.MISSING and "train_file" in check.way_out
  monkeypatch.setattr(reading, "hub_answers", lambda: True)
  check = _run(config, tmp_path)["data of gsm8k"]
  assert check.status == checks_lib.UNKNOWN


def test_math_needs_its_extra(monkeypatch, tmp_path):
  changed = dataclasses.replace(_SMOKE.evaluate, task="math500")
  config = dataclasses.replace(_SMOKE, evaluate=changed)
  monkeypatch.setattr(reading, "items", lambda _: "not here")
  assert "math_verify" in _run(config, tmp_path)
  monkeypatch.setattr(checks_lib.importlib.util, "find_spec", lambda name: None)
  check = _run(config, tmp_path)["math_verify"]
  assert (check.status, check.way_out) == ("missing", "pip install -e .[eval]")


def test_what_the_loop_refuses(tmp_path):
  config = dataclasses.replace(_SMOKE, experts=("tiny:add", "tiny:add"))
  check = _run(config, tmp_path)["config"]
  assert check.status == checks_lib.MISSING and "twice" in check.found


def test_lengths_that_do_not_fit(directories, tmp_path):
  longer = dataclasses.replace(_SMOKE.propose, max_new_tokens=5000)
  check = _run(_of(*directories, propose=longer), tmp_path)["lengths"]
  assert check.status == checks_lib.MISSING
  assert check.way_out == "lower propose.max_new_tokens"
  answers = dataclasses.replace(_SMOKE.evaluate, max_new_tokens=4090)
  check = _run(_of(*directories, evaluate=answers), tmp_path)["lengths"]
  assert check.status == checks_lib.OK and "lose" in check.found


def test_samplers(monkeypatch, tmp_path):
  def absent(_):
    raise sampling.SamplerError("vLLM is not installed; install it")

  monkeypatch.setattr(sampling, "find_python", absent)
  check = _run(_SMOKE, tmp_path, sampler="vllm")["sampler vllm"]
  assert check.status == checks_lib.MISSING and "install it" in check.found
  monkeypatch.setattr(sampling, "find_python", lambda _: "/a/python")
  check = _run(_SMOKE, tmp_path, sampler="vllm")["sampler vllm"]
  assert check.status == checks_lib.OK and "/a/python" in check.found
  replay = dataclasses.replace(_SMOKE, sampler="replay")
  assert "sampler jax" in _missing(_run(replay, tmp_path))


def test_a_sandbox_that_is_too_weak(monkeypatch, tmp_path):
  def weak(_):
    raise checks_lib.errors.UserError("neither seccomp nor bubblewrap")

  monkeypatch.setattr(sandbox.Sandbox, "layers", weak)
  assert "sandbox" in _missing(_run(_SMOKE, tmp_path))


def test_real_models_need_an_accelerator_and_its_memory(directories, tmp_path):
  config = _of(*directories, tiny=None)
  assert "accelerator" in _missing(_run(config, tmp_path))
  elsewhere = config_lib.Ray(address="127.0.0.1:9")
  config = dataclasses.replace(config, executor="ray", ray=elsewhere)
  found = _run(config, tmp_path)
  assert found["accelerator"].status == checks_lib.UNKNOWN
  h200 = devices.DEVICES["H200"]
  check = _run(_SMOKE, tmp_path, h200)["device memory"]
  assert check.status == checks_lib.OK
  small = dataclasses.replace(h200, memory_bytes=1e9)
  check = _run(_SMOKE, tmp_path, small)["device memory"]
  assert check.status == checks_lib.MISSING and "1.0 GB" in check.found
  found = _run(_SMOKE, tmp_path, small, sampler="vllm")
  assert "vLLM's memory" in _missing(found)


def test_who_shares_a_model_needs_so_many_devices(monkeypatch):
  device = types.SimpleNamespace(platform="gpu", device_kind="H200")
  monkeypatch.setattr(checks_lib.jax, "devices", lambda: [device])
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  ask = lambda **changes: checks_lib._accelerator(
      dataclasses.replace(_SMOKE, **changes), None
  )
  assert ask().status == checks_lib.OK
  check = ask(dpo=dataclasses.replace(_SMOKE.dpo, fsdp=2))
  assert check.status == checks_lib.MISSING and "is 2" in check.found
  two = dataclasses.replace(_SMOKE.vllm, tensor_parallel=2)
  assert ask(vllm=two).status == checks_lib.OK  # JAX samples.
  check = ask(vllm=two, sampler="vllm")
  assert check.status == checks_lib.MISSING
  assert "vllm.tensor_parallel is 2" in check.found


def _cluster(address, **changes):
  ray = config_lib.Ray(address=address)
  return dataclasses.replace(_SMOKE, executor="ray", ray=ray, **changes)


def test_one_process_is_asked_nothing_about_clusters(tmp_path):
  found = set(_run(_SMOKE, tmp_path))
  more = set(_run(_cluster("local"), tmp_path)) - found
  assert more == {"ray", "cluster local", "paths on all hosts"}


def test_ray_has_to_be_installed(monkeypatch, tmp_path):
  assert "ray" not in _missing(_run(_cluster("local"), tmp_path))
  monkeypatch.setattr(checks_lib.importlib.util, "find_spec", lambda name: None)
  check = _run(_cluster("local"), tmp_path)["ray"]
  assert (check.status, check.way_out) == ("missing", "pip install -e .[ray]")


def test_a_cluster_that_answers_and_one_that_does_not():
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    assert checks_lib._ray_address(address).status == checks_lib.OK
  check = checks_lib._ray_address(address)
  assert check.status == checks_lib.MISSING and "refused" in check.found
  assert checks_lib._ray_address("local").status == checks_lib.OK
  assert checks_lib._ray_address("auto").status == checks_lib.UNKNOWN


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:", ":6379", "host:ray", "host:0", "host:99999"],
)
def test_what_is_no_address(address):
  check = checks_lib._ray_address(address)
  assert check.status == checks_lib.MISSING and "HOST:PORT" in check.way_out
  check = checks_lib._ray_address("host:" + "9" * 5000)  # No int for Python.
  assert check.status == checks_lib.MISSING


def test_a_host_s_name_that_is_none():
  check = checks_lib._ray_address("x" * 70 + ":6379")
  assert check.status == checks_lib.MISSING and "nobody" in check.found


def test_the_paths_that_all_hosts_have_to_see_are_named(directories, tmp_path):
  what = "paths on all hosts"
  config = _cluster(
      "auto", seed_model=str(directories[0]), experts=(str(directories[1]),)
  )
  check = _run(config, tmp_path)[what]
  assert check.status == checks_lib.UNKNOWN
  for path in (tmp_path / "run", *directories):
    assert str(path) in check.found
  check = _run(_cluster("auto"), tmp_path)[what]  # The world's cache.
  assert check.found.count(str(tmp_path / "cache")) == 1
  assert _run(_cluster("local"), tmp_path)[what].status == checks_lib.OK


def test_memory_and_disk(monkeypatch, tmp_path):
  found = _run(_SMOKE, tmp_path)
  assert {"host memory", "disk of the workdir"} <= set(found)
  monkeypatch.setattr(checks_lib, "_available_bytes", lambda: 10**6)
  usage = type("Usage", (), {"free": 10})
  monkeypatch.setattr(checks_lib.shutil, "disk_usage", lambda _: usage)
  missing = _missing(_run(_SMOKE, tmp_path))
  assert {"host memory", "disk of the workdir"} <= missing


def test_a_workdir_that_holds_this_run_or_another(tmp_path):
  workdir = tmp_path / "run"
  what = f"workdir {workdir}"
  with store.Store.create(workdir, _SMOKE, {}, {}):
    pass
  check = _run(_SMOKE, tmp_path)[what]
  assert check.status == checks_lib.OK and "would go on" in check.found
  # It may go on elsewhere.
  assert _run(_cluster("auto"), tmp_path)[what].status == checks_lib.OK
  other = dataclasses.replace(_SMOKE, seed=1)
  check = _run(other, tmp_path)[what]
  assert check.status == checks_lib.MISSING and "seed" in check.found
  (workdir / "archive.sqlite").write_bytes(b"no archive" * 100)
  assert what in _missing(_run(_SMOKE, tmp_path))


def test_a_workdir_that_cannot_be_written(monkeypatch, tmp_path):
  monkeypatch.setattr(
      os, "access", lambda path, _: pathlib.Path(path) != tmp_path
  )
  assert f"workdir {tmp_path / 'run'}" in _missing(_run(_SMOKE, tmp_path))
