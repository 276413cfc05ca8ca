"""Engines that fail: the same texts, or one line."""

import contextlib
import errno
from http import server as http_server
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import sampling
from selfdev_jax.sampling import vllm
from selfdev_jax.sampling.vllm import server

_PROMPTS = ["Q: Ann has 12 apples", "A", "Ben has 3 toys. How", "There"]
_NAMES = "model.layers.{}.mlp.{}_proj.weight"


def _keys(n):
  return jax.random.split(jax.random.key(0), n)


def _texts(sampler, prompts=_PROMPTS, keys=None, max_new_tokens=10, **settings):
  settings = {"batch_size": 2} | settings
  batches = sampler.generate(
      prompts, keys, max_new_tokens=max_new_tokens, **settings
  )
  return [g for batch in batches for g in batch]


def _greedy_and_seeded(sampler):
  seeded = {"keys": _keys(len(_PROMPTS)), "temperature": 1.0}
  return [
      (g.text, g.finished) for g in _texts(sampler) + _texts(sampler, **seeded)
  ]


@pytest.fixture(scope="module")
def calm(make_fake):
  """An engine that nothing happens to."""
  fake = make_fake()
  with pytest.MonkeyPatch.context() as patch:
    for key, value in fake.environment.items():
      patch.setenv(key, value)
    yield fake


@pytest.fixture(scope="module")
def shared(calm, open_sampler):
  with open_sampler(calm) as sampler:
    yield sampler


@pytest.fixture(scope="module")
def undisturbed(shared, other_params):
  shared.swap_weights(other_params, "undisturbed")
  return _greedy_and_seeded(shared)


@pytest.fixture(scope="module")
def embedded(decoder, tokenizer):
  return sampling.JaxSampler(decoder, tokenizer, (tokenizer.eos_token_id,))


# What strikes, engines that are started in all, what is said.
_FAULTS = {
    "killed at start": ({"die at start": [1]}, 2, "ended with status 137"),
    "killed twice": ({"die at start": [1, 1]}, 3, "ended with status 137"),
    "port taken": ({"port taken": [1]}, 2, "address already in use"),
    "never well": ({"never answer": [1]}, 2, "did not answer within 4 s"),
    "killed": ({"die in completion": [1]}, 2, "/v1/completions: "),
    "killed later": ({"die in completion": [4]}, 2, "/v1/completions: "),
    "killed twice later": (
        {"die in completion": [2, 3]},
        3,
        "/v1/completions: ",
    ),
    "killed in an update": ({"die in update": [1]}, 2, "/update_weights: "),
    "fails": (
        {"500 in completion": [1]},
        2,
        "/v1/completions: 500 EngineCore encountered an issue",
    ),
    "fails in an update": (
        {"500 in update": [1]},
        2,
        "/update_weights: 500 shapes do not match",
    ),
    "keeps old weights": (
        {"keep old weights": [1]},
        2,
        "its log-probabilities are off by",
    ),
    "another version": (
        {"wrong version": ["7"]},
        2,
        "it has the weights '7' after 'v' were sent",
    ),
    "keeps its cache": ({"keep cache": [1]}, 2, "what the old weights comp"),
    "hangs": ({"hang in completion": [1]}, 2, "it gave no answer for 8 s"),
    "slow": ({"slow": [1.5, 1.5, 1.5]}, 1, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", _FAULTS)
def test_an_engine_that_fails_changes_no_text(
    fake, open_sampler, other_params, undisturbed, capsys, fault
):
  faults, starts, said = _FAULTS[fault]
  fake.fail(faults)
  # Short only where it is waited for: a machine under load is slow.
  patience = {}
  if "never answer" in faults:
    patience["start_timeout_s"] = 4.0
  if "hang in completion" in faults:
    patience["stall_timeout_s"] = 8.0
  with open_sampler(fake, **patience) as sampler:
    sampler.swap_weights(other_params, "v")
    assert _greedy_and_seeded(sampler) == undisturbed
  assert fake.starts == starts
  notes = [
      line
      for line in capsys.readouterr().err.splitlines()
      if not line.startswith("Waiting for vLLM:")
  ]
  assert len(notes) == starts - 1
  for note in notes:
    assert note.startswith("Note: vLLM failed (") and said in note
    assert "a new engine is started" in note
    assert re.search(r"its log (is )?\S+/vllm-\d\.log", note)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die at start", "500 in update"])
def test_engines_that_keep_failing_end_in_one_line(
    fake, open_sampler, other_params, await_end, fault
):
  fake.fail({fault: [1] * 9})
  with (
      pytest.raises(sampling.SamplerError) as error,
      open_sampler(fake) as sampler,
  ):
    sampler.swap_weights(other_params, "v")
  said = str(error.value)
  assert said.startswith("vLLM failed, try 3: ")
  assert "\n" not in said and str(fake.logs / "vllm-3.log") in said
  assert fake.starts == 3
  await_end(fake.pids())


@pytest.mark.slow
def test_a_model_that_cannot_be_served_is_told_at_once(
    fake, open_sampler, model
):
  fake.fail({"fail at start": ["the architecture is not supported"] * 9})
  with pytest.raises(sampling.SamplerError) as error, open_sampler(fake):
    pass
  assert str(error.value) == (
      f"vLLM cannot serve {model}; its log {fake.logs}/vllm-1.log says:"
      " ValueError: the architecture is not supported"
  )
  assert fake.starts == 1


@pytest.mark.slow
def test_an_engine_that_dies_between_batches_is_replaced(
    fake, open_sampler, other_params, embedded
):
  embedded.swap_weights(other_params, "v")
  with open_sampler(fake) as sampler:
    sampler.swap_weights(other_params, "v")
    batches = sampler.generate(_PROMPTS, max_new_tokens=10, batch_size=2)
    texts = [g.text for g in next(batches)]
    os.kill(fake.events("start")[0]["pid"], signal.SIGKILL)
    texts += [g.text for batch in batches for g in batch]
  assert texts == [g.text for g in _texts(embedded)]
  assert fake.starts == 2


@pytest.mark.slow
def test_logprobs_survive_an_engine(fake, open_sampler, other_params, embedded):
  rows = [[5, 6, 7], [250, 3, 4, 9, 11]]
  embedded.swap_weights(other_params, "v")
  with open_sampler(fake) as sampler:
    sampler.swap_weights(other_params, "v")
    sampler.health()
    os.kill(fake.events("start")[0]["pid"], signal.SIGKILL)
    for got, expected in zip(
        sampler.logprobs(rows), embedded.logprobs(rows), strict=True
    ):
      np.testing.assert_allclose(got, expected, atol=1e-4)
    sampler.health()
    sampler.close()
    sampler.close()
    with pytest.raises(sampling.SamplerError, match="not running"):
      sampler.health()


@pytest.mark.slow
def test_no_room_in_shared_memory_is_one_line(
    fake, open_sampler, monkeypatch, shared_memory, await_end
):
  before = shared_memory()

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(sampling.SamplerError) as error, open_sampler(fake):
    pass
  said = str(error.value)
  assert "/dev/shm has no room" in said and "--shm-size" in said
  assert "\n" not in said
  assert fake.starts == 1 and shared_memory() == before
  await_end(fake.pids())


@pytest.mark.slow
def test_another_server_at_the_port_is_not_taken_for_ours(
    fake, model, open_sampler, monkeypatch, capsys
):
  free_port = server.free_port
  with _foreign(fake, model) as address:
    ports = [int(address.rpartition(":")[2])]
    monkeypatch.setattr(
        server, "free_port", lambda: ports.pop() if ports else free_port()
    )
    with open_sampler(fake, max_length=48) as sampler:
      assert sampler._server.client._http.base_url != address
  assert "a new engine is started" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "starts", "said"),
    [
        (1e13, 1, "the log-probabilities of huge are not finite"),
        (1e10, 2, "as another engine's were: huge is kept"),
    ],
)
def test_weights_that_compute_nothing_sensible_end_no_run(
    fake, open_sampler, params, capsys, scale, starts, said
):
  mlp = {k: v * scale for k, v in params["layers"]["mlp"].items()}
  huge = {**params, "layers": {**params["layers"], "mlp": mlp}}
  with open_sampler(fake) as sampler:
    sampler.swap_weights(huge, "huge")
    assert len(_texts(sampler)) > 0
    assert fake.starts == starts
  assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_an_address_that_never_answers_is_told(fake, open_sampler):
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    address = f"http://127.0.0.1:{silent.getsockname()[1]}"
    with (
        pytest.raises(sampling.SamplerError, match="there is no vLLM server"),
        open_sampler(fake, address=address, start_timeout_s=2.0),
    ):
      pass


# Servers of the user's.


@contextlib.contextmanager
def _foreign(fake, model):
  """A server that the user started, at 48 positions; yields its address."""
  port = server.free_port()
  options = server.Options(
      fake.python, fake.logs, "selfdev", max_length=48, dtype="float32"
  )
  client = server.client_lib.Client(f"http://127.0.0.1:{port}")
  with subprocess.Popen(
      server.command(options, model, "theirs", port, on_cpu=False),
      env=os.environ | fake.environment,
  ) as process:
    try:
      for _ in range(200):
        with contextlib.suppress(vllm.EngineError):
          client.health()
          break
        time.sleep(0.05)
      yield f"http://127.0.0.1:{port}"
    finally:
      process.kill()
      client.close()


@pytest.fixture(scope="module")
def foreign(make_fake, model):
  fake = make_fake()
  with _foreign(fake, model) as address:
    yield fake, address


@pytest.mark.slow
def test_a_server_of_the_user_is_used_and_left_running(
    foreign, open_sampler, other_params, embedded, shared_memory
):
  fake, address = foreign
  embedded.swap_weights(other_params, "v")
  before = shared_memory()
  for _ in range(2):
    with open_sampler(fake, address=address, max_length=48) as sampler:
      assert sampler.engine == "vllm 0.0-fake"
      sampler.swap_weights(other_params, "v")
      assert shared_memory() == before
      assert [g.text for g in _texts(sampler)] == [
          g.text for g in _texts(embedded)
      ]
  assert fake.starts == 1 and not fake.logs.exists()


@pytest.mark.slow
def test_a_server_of_the_user_works_on_after_an_update_that_failed(
    fake, model, open_sampler, other_params, embedded
):
  fake.fail({"500 in update": [1]})
  settings = {"max_length": 48, "stall_timeout_s": 8.0}
  embedded.swap_weights(other_params, "v")
  with (
      _foreign(fake, model) as address,
      open_sampler(fake, address=address, **settings) as sampler,
  ):
    with pytest.raises(sampling.SamplerError, match="shapes do not match"):
      sampler.swap_weights(other_params, "v")
    sampler.swap_weights(other_params, "v")
    assert [g.text for g in _texts(sampler)] == [
        g.text for g in _texts(embedded)
    ]


@pytest.mark.slow
def test_too_few_positions_are_told(fake, foreign, open_sampler):
  with (
      pytest.raises(
          sampling.SamplerError, match="has 48 positions, 64 are needed"
      ),
      open_sampler(fake, address=foreign[1]),
  ):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": jnp.bfloat16}, "dtype 'float32', the weights are of one"),
        ({"decoder": {"mlp": 32}}, "intermediate_size 24, the weights are of"),
        ({"decoder": {"tied_head": True}}, "tie_word_embeddings False"),
        ({"decoder": {"layers": 3}}, "num_hidden_layers 2"),
    ],
)
def test_another_model_at_an_address_is_told(
    fake, foreign, open_sampler, decoder, shared_memory, settings, said
):
  if "decoder" in settings:
    fields = vars(decoder) | settings["decoder"]
    settings = {"decoder": type(decoder)(**fields)}
  before = shared_memory()
  with (
      pytest.raises(sampling.SamplerError) as error,
      open_sampler(fake, address=foreign[1], max_length=48, **settings),
  ):
    pass
  assert said in str(error.value) and "\n" not in str(error.value)
  assert "--worker-extension-cls selfdev_weights.Extension" in str(error.value)
  assert shared_memory() == before


@pytest.fixture
def web_server():
  """web_server(body): the address of one that answers nothing else."""
  started = []

  def start(body: bytes, status: int = 200):
    class Handler(http_server.BaseHTTPRequestHandler):

      def do_GET(self):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

      def log_message(self, *_):
        pass

    started.append(http_server.HTTPServer(("127.0.0.1", 0), Handler))
    threading.Thread(target=started[-1].serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{started[-1].server_port}"

  yield start
  for each in started:
    each.shutdown()
    each.server_close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"<html>Welcome</html>", 200),
        (b"<html>Not here</html>", 404),
        (b"Bad gateway", 502),
        (b'{"name": "another service"}', 200),
        (b'{"version": "1", "data": []}', 200),
        pytest.param(
            b'["1.0"]',
            200,
        ),
        pytest.param(
            b'{"version": "1", "data": null}',
            200,
        ),
    ],
)
def test_another_web_server_is_told(
    fake, open_sampler, web_server, body, status
):
  address = web_server(body, status)
  with (
      pytest.raises(sampling.SamplerError) as error,
      open_sampler(fake, address=address),
  ):
    pass
  said = str(error.value)
  assert said.startswith(f"there is no vLLM server at {address}: ")
  assert "\n" not in said


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9",
        "localhost:8000",
        "nonsense",
        "http://[nonsense",
        "http://127.0.0.1:port",
    ],
)
def test_an_address_without_a_server_is_told(fake, open_sampler, address):
  with (
      pytest.raises(
          sampling.SamplerError, match="there is no vLLM server at"
      ) as error,
      open_sampler(fake, address=address),
  ):
    pass
  assert "\n" not in str(error.value)


# Ends.


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_no_file(
    fake, open_sampler, other_params, shared_memory, await_end
):
  before = shared_memory()
  fake.fail({"child": [1], "hang in completion": [1]})
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
  try:
    with pytest.raises(KeyboardInterrupt), open_sampler(fake) as sampler:
      sampler.swap_weights(other_params, "v")
      timer.start()
      _texts(sampler)
  finally:
    timer.cancel()
    signal.signal(signal.SIGINT, previous)
  assert len(fake.pids()) == 3
  await_end(fake.pids(), seconds=1.0)
  assert shared_memory() == before


@pytest.mark.slow
def test_an_engine_works_on_after_ctrl_c(
    fake, open_sampler, other_params, undisturbed
):
  fake.fail({"hang in completion": [1]})
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
  try:
    with open_sampler(fake) as sampler:
      sampler.swap_weights(other_params, "v")
      timer.start()
      with pytest.raises(KeyboardInterrupt):
        _texts(sampler)
      assert _greedy_and_seeded(sampler) == undisturbed
  finally:
    timer.cancel()
    signal.signal(signal.SIGINT, previous)


@pytest.mark.slow
def test_an_update_that_ctrl_c_cuts_short_is_repeated(
    fake, open_sampler, other_params, undisturbed, capsys
):
  fake.fail({"slow in update": [2.0]})
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
  try:
    with open_sampler(fake) as sampler:
      timer.start()
      with pytest.raises(KeyboardInterrupt):
        sampler.swap_weights(other_params, "v")
      assert _greedy_and_seeded(sampler) == undisturbed
  finally:
    timer.cancel()
    signal.signal(signal.SIGINT, previous)
  assert fake.starts == 2
  assert "vLLM failed" not in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_while_an_engine_starts_leaves_no_process(
    fake, open_sampler, await_end
):
  fake.fail({"never answer": [1]})
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
  timer.start()
  try:
    with pytest.raises(KeyboardInterrupt), open_sampler(fake):
      pass
  finally:
    timer.cancel()
    signal.signal(signal.SIGINT, previous)
  assert fake.starts == 1
  await_end(fake.pids(), seconds=1.0)


_PARENT = """
import pathlib, sys, time
import numpy as np
import transformers
from selfdev_jax import convert
from selfdev_jax.sampling import vllm
model, python, logs, address, seconds = sys.argv[1:]
config, params = convert.load(model)
tokenizer = convert.load_tokenizer(model)
sampler = vllm.VllmSampler(
    config, tokenizer, (tokenizer.eos_token_id,),
    directory=pathlib.Path(model), dtype=np.float32, max_length=48,
    log_dir=pathlib.Path(logs), python=python, address=address or None,
    stall_timeout_s=float(seconds),
)
sampler.swap_weights(params, "v")
print("ready", flush=True)
list(sampler.generate(["A"], max_new_tokens=4, batch_size=1))
"""


def _parent(fake, model, address="", stall_timeout_s=100.0):
  """A process that generates, once it has an engine and weights."""
  parent = subprocess.Popen(
      [
          *(sys.executable, "-c", _PARENT, str(model), str(fake.python)),
          *(str(fake.logs), address, str(stall_timeout_s)),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
  )
  assert parent.stdout.readline() == b"ready\n"
  return parent


@pytest.mark.slow
def test_a_killed_parent_leaves_no_process_and_no_file(
    fake, model, shared_memory, await_end
):
  before = shared_memory()
  fake.fail({"child": [1], "hang in completion": [1]})
  with _parent(fake, model) as parent:
    pids = fake.pids()
    assert len(pids) == 3
    parent.kill()
  await_end(pids)
  assert shared_memory() == before


@pytest.mark.slow
def test_a_server_of_the_user_that_hangs_is_told_and_left(make_fake, model):
  fake = make_fake()
  fake.fail({"hang in completion": [1]})
  with _foreign(fake, model) as address:
    parent = _parent(fake, model, address, stall_timeout_s=5.0)
    try:
      _, said = parent.communicate(timeout=60.0)
    finally:
      parent.kill()
      parent.communicate()
  assert b"it gave no answer for 5 s" in said


@pytest.mark.slow
def test_an_engine_that_hangs_in_an_update_is_replaced(
    fake, open_sampler, other_params, capsys
):
  fake.fail({"hang in update": [1]})
  with open_sampler(fake, stall_timeout_s=5.0) as sampler:
    engine = fake.events("start")[0]["pid"]
    timer = threading.Timer(60.0, os.kill, (engine, signal.SIGKILL))
    timer.start()
    try:
      sampler.swap_weights(other_params, "v")
    finally:
      timer.cancel()
  assert "it gave no answer for 5 s" in capsys.readouterr().err
  assert fake.starts == 2


# Weights.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p | {"embed": p["embed"][:-1]}, r"embed is float32\[299"),
        (
            lambda p: p | {"embed": p["embed"].astype(np.float16)},
            r"embed is float16\[300, 16\]; vLLM serves float32\[300, 16\]",
        ),
        (lambda p: p | {"extra": p["embed"]}, "have other tensors"),
        (
            lambda p: {key: p[key] for key in p if key != "final_norm"},
            "have other tensors",
        ),
    ],
    ids=["shape", "dtype", "another leaf", "a leaf fewer"],
)
def test_weights_that_do_not_fit_are_told_and_harm_nothing(
    shared, calm, other_params, undisturbed, spoil, said
):
  shared.swap_weights(other_params, "v")
  starts = calm.starts
  with pytest.raises(sampling.SamplerError, match=said):
    shared.swap_weights(spoil(other_params), "w")
  assert _greedy_and_seeded(shared) == undisturbed
  assert calm.starts == starts


def _sent(fake):
  return {name for e in fake.events("update") for name in e["names"]}


@pytest.mark.slow
def test_only_leaves_that_changed_are_sent(
    shared, calm, params, other_params, embedded
):
  shared.swap_weights(params, "before")
  calm.forget()
  mixed = params | {"layers": params["layers"] | {}}
  mixed["layers"]["mlp"] = other_params["layers"]["mlp"]
  shared.swap_weights(mixed, "mlp")
  parts = ("gate", "up", "down")
  assert _sent(calm) == {_NAMES.format(i, p) for i in (0, 1) for p in parts}
  embedded.swap_weights(mixed, "mlp")
  assert [g.text for g in _texts(shared)] == [g.text for g in _texts(embedded)]


@pytest.mark.slow
def test_a_part_of_a_fused_matrix_takes_the_rest_along(
    shared, calm, params, other_params
):
  shared.swap_weights(params, "before")
  calm.forget()
  layers = params["layers"]
  attention = layers["attention"] | {
      "k": other_params["layers"]["attention"]["k"]
  }
  mixed = params | {"layers": layers | {"attention": attention}}
  mixed["final_norm"] = other_params["final_norm"]
  shared.swap_weights(mixed, "k")
  assert _sent(calm) == {"model.norm.weight"} | {
      f"model.layers.{i}.self_attn.{part}_proj.weight"
      for i in (0, 1)
      for part in "qkv"
  }


@pytest.mark.slow
def test_what_the_engine_has_is_not_sent_again(shared, calm, params):
  shared.swap_weights(params, "before")
  calm.forget()
  shared.swap_weights(params, "before")
  assert not calm.events()
  shared.swap_weights({**params, "layers": {**params["layers"]}}, "after")
  assert [e["path"] for e in calm.events("post")] == ["/update_weight_version"]


@pytest.fixture(scope="module")
def lora(decoder):
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
  layers, rank = decoder.layers, 3
  factors = lambda o, i: {
      "a": draw(layers, rank, i),
      "b": draw(layers, o, rank),
  }
  attention = {"q": factors(16, 16), "v": factors(8, 16)}
  return {"layers": {"attention": attention, "mlp": {"down": factors(16, 24)}}}


@pytest.mark.slow
def test_a_lora_adapter_is_merged(shared, calm, embedded, params, lora):
  rows = [list(range(40)), [7, 7, 290]]
  expected = []
  for adapter in (lora, None):
    embedded.swap_weights(params, "v", adapter)
    expected.append((embedded.logprobs(rows), _texts(embedded)))
  assert np.abs(expected[0][0][0] - expected[1][0][0]).max() > 0.1
  shared.swap_weights(params, "before")
  for adapter, (logprobs, texts) in zip((lora, None), expected, strict=True):
    calm.forget()
    shared.swap_weights(params, f"adapter: {adapter is not None}", adapter)
    for got, row in zip(shared.logprobs(rows), logprobs, strict=True):
      np.testing.assert_allclose(got, row, atol=1e-4)
    assert [g.text for g in _texts(shared)] == [g.text for g in texts]
    assert {name.split(".")[-2] for name in _sent(calm)} == {
        *("q_proj", "k_proj", "v_proj", "down_proj")
    }


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_is_told(
    shared, params, other_params, lora
):
  shared.swap_weights(params, "before")
  matrix = {"a": np.ones((2, 3, 17), np.float32)}
  matrix["b"] = np.ones((2, 16, 3), np.float32)
  try:
    with pytest.raises(sampling.SamplerError):
      shared.swap_weights(params, "v", {"layers": {"attention": {"q": matrix}}})
  finally:
    shared.swap_weights(params, "after")


@pytest.mark.slow
def test_weights_on_a_device_arrive(shared, embedded, other_params):
  shared.swap_weights(jax.device_put(other_params), "device")
  embedded.swap_weights(other_params, "device")
  assert [g.text for g in _texts(shared)] == [g.text for g in _texts(embedded)]


# Texts, beside those of JAX.


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"n": 3, "batch_size": 4},
        {"n": 2, "batch_size": 1},
        {"batch_size": 64},
        {"stop": ["never", "4"]},
        {"max_new_tokens": 40},
        {"prompts": [" ".join(_PROMPTS) * 4, "A"]},
        {"prompts": [[9, 8, 7], "A", "A"]},
        {"prompts": [list(range(63))], "max_new_tokens": 1},
    ],
    ids=str,
)
def test_greedy_texts_are_those_of_jax(shared, embedded, params, settings):
  shared.swap_weights(params, "greedy")
  embedded.swap_weights(params, "greedy")
  got, expected = _texts(shared, **settings), _texts(embedded, **settings)
  fields = lambda g: (g.text, g.finished, g.truncated)
  assert list(map(fields, got)) == list(map(fields, expected))
  if "stop" not in settings:
    assert [g.tokens for g in got] == [g.tokens for g in expected]


@pytest.mark.slow
def test_a_stop_text_ends_a_text(shared, embedded, params):
  shared.swap_weights(params, "stop")
  embedded.swap_weights(params, "stop")
  (whole,) = _texts(shared, _PROMPTS[:1], max_new_tokens=16)
  for sampler in (shared, embedded):
    (cut,) = _texts(
        sampler,
        _PROMPTS[:1],
        max_new_tokens=16,
        stop=["never", whole.text[3:5]],
    )
    assert (cut.text, cut.finished) == (whole.text[:3], True)


@pytest.mark.slow
def test_eos_ends_a_text_and_is_no_part_of_it(
    shared, embedded, params, tokenizer
):
  shared.swap_weights(params, "without")
  whole = _texts(shared)
  head = params["head"].copy()
  # What one text had in its middle is EOS now.
  head[tokenizer.eos_token_id] = 1.02 * head[whole[0].tokens[5]]
  ending = params | {"head": head}
  shared.swap_weights(ending, "with")
  embedded.swap_weights(ending, "with")
  got = _texts(shared, stop=["never"])
  assert got == _texts(embedded)
  assert got[0].finished and 0 < len(got[0].tokens) <= 5
  assert got[0].tokens == whole[0].tokens[: len(got[0].tokens)]


@pytest.mark.slow
def test_a_tiny_nucleus_is_greedy(shared, params):
  shared.swap_weights(params, "nucleus")
  drawn = _texts(shared, keys=_keys(4), temperature=1.0, top_p=1e-6)
  assert drawn == _texts(shared)


@pytest.mark.slow
def test_draws_depend_on_keys_and_not_on_batches(shared, params):
  shared.swap_weights(params, "draws")
  draw = lambda size, keys: _texts(
      shared,
      _PROMPTS[:1] * 8,
      keys,
      batch_size=size,
      temperature=1.0,
      max_new_tokens=4,
  )
  one, three = draw(1, _keys(8)), draw(3, _keys(8))
  assert one == three
  assert len({g.tokens for g in one}) == 8
  assert draw(8, _keys(9)[1:]) != one


@pytest.mark.slow
def test_keys_that_count_give_other_texts(shared, params):
  shared.swap_weights(params, "keys")
  keys = jax.vmap(jax.random.key)(jnp.arange(4))
  drawn = _texts(
      shared, _PROMPTS[:1] * 4, keys, temperature=1.0, max_new_tokens=8
  )
  assert len({g.tokens for g in drawn}) == 4


@pytest.mark.slow
def test_a_row_may_fill_the_context_but_for_one(shared, embedded, params):
  rows = [list(range(63))]
  shared.swap_weights(params, "rows")
  embedded.swap_weights(params, "rows")
  (got,), (expected,) = shared.logprobs(rows), embedded.logprobs(rows)
  np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.slow
def test_a_request_that_is_refused_costs_no_engine(shared, calm):
  shared.logprobs([[1, 2]])
  starts = calm.starts
  with pytest.raises(sampling.SamplerError, match="refused /v1/completions"):
    shared.logprobs([list(range(65))])
  shared.logprobs([[1, 2]])
  assert calm.starts == starts


@pytest.mark.slow
def test_no_room_for_any_prompt_is_told(shared):
  with pytest.raises(sampling.SamplerError, match="leave no room"):
    _texts(shared, max_new_tokens=64)


@pytest.mark.slow
def test_a_closed_sampler_gave_back_its_process(
    fake, open_sampler, await_end, shared_memory
):
  before = shared_memory()
  with open_sampler(fake):
    assert shared_memory() == before
    (start,) = fake.events("start")
    assert pathlib.Path(f"/proc/{start['pid']}").exists()
    (opened,) = fake.events("init")
    assert not any(pathlib.Path(p).exists() for p in opened["buffers"])
  await_end(fake.pids(), seconds=1.0)
