"""A cluster of three loopback hosts, whose workers are stand-ins."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import http.server
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time

import numpy as np
import pytest
import ray
from ray import cluster_utils
import safetensors.numpy

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import loop
from selfdev_jax import records
from selfdev_jax.executors import cluster as cluster_lib
from selfdev_jax.executors import remote
from selfdev_jax.executors import work as work_lib
from tests.executors import doubles

pytestmark = [
    pytest.mark.slow,
    # Hosts are started here, where another module's tests may have used JAX;
    # Ray forks for that, and at once becomes another program.
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]

_CONFIG = config_lib.Config(
    name="t",
    seed_model="seed",
    experts=("a",),
    executor="ray",
    propose=config_lib.Propose(batch_size=2),
    evaluate=config_lib.Evaluate(dev_size=8, test_size=8),
)
_HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")  # The first has Ray's head.

# They are not a package that Ray's processes could import.
ray.cloudpickle.register_pickle_by_value(doubles)


def _add(hosts, address, **resources):
  return hosts.add_node(node_ip_address=address, **{"num_cpus": 1, **resources})


@pytest.fixture(scope="module")
def hosts():
  # Short: a socket's path has 107 characters at most.
  directory = tempfile.mkdtemp(prefix="ray")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("RAY_TMPDIR", directory)
    started = cluster_utils.Cluster()
    _add(
        started,
        _HOSTS[0],
        include_dashboard=False,
        # Processes that no worker will be made of cost seconds here.
        _system_config={
            "prestart_worker_first_driver": False,
            "health_check_period_ms": 1000,
        },
    )
    try:
      for address in _HOSTS[1:]:
        _add(started, address)
      yield started
    finally:
      ray.shutdown()
      started.shutdown()
      shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def start(hosts, tmp_path):
  """start(plan, **options of config.ray): a cluster of stand-ins."""
  with contextlib.ExitStack() as stack:

    def make(plan=None, doer=doubles.Doer, vllm=None, setup=None, **options):
      (tmp_path / "plan.json").write_text(json.dumps(plan or {}))
      options = {"address": hosts.address, "start_timeout_s": 60.0, **options}
      config = dataclasses.replace(
          _CONFIG,
          ray=config_lib.Ray(**options),
          vllm=vllm or _CONFIG.vllm,
      )
      made = work_lib.Setup(
          config=config,
          models={"seed": str(tmp_path / "seed")},
          digests={"seed": "0"},
          items="",
          kind="jax",
          longest=16,
          vllm_python=None,
          allow_weak_sandbox=False,
          workdir=str(tmp_path),
          decoder=None,
      )
      made = dataclasses.replace(made, **(setup or {}))
      return stack.enter_context(
          cluster_lib.Cluster(made, doer, doubles.Trainer)
      )

    yield make
  hosts.wait_for_nodes()  # Ray sees late that a host was removed.


@pytest.fixture
def log(tmp_path):
  """log(event) -> (host, pid, what) of all that has been, in its order."""

  def read(event):
    path = tmp_path / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [line.split(" ", 3) for line in lines]
    return [tuple(row[1:]) for row in rows if row[0] == event]

  return read


def _none(model):
  """The IR behind a baseline's name."""
  del model
  return ""


def _work(model, first=0, script=(), before=None, is_known=False):
  program = json.dumps(list(script)) if script else ""
  before = first + 2 if before is None else before
  return work_lib.Answer(model, records.DEV, first, before, is_known, program)


def _blocks(models):
  return [
      _work(f"m{m}", first) for m in range(models) for first in range(0, 8, 2)
  ]


def _texts(work):
  return [
      doubles.text(work.model, work.split, i)
      for i in range(work.first, work.before)
  ]


def _answers(executor, works, decide=lambda left, answered: left):
  """(model, first, texts or failure) in the order of the answers."""
  left, found = list(works), []
  for answered in executor.answer(lambda: iter(list(left)), _none):
    work = left.pop(0)
    said = [r.text for r in answered.responses] or answered.failure
    found.append((work.model, work.first, said))
    left[:] = decide(left, answered)
  return found


def _expected(works):
  return [(w.model, w.first, _texts(w)) for w in works]


def _kinds(executor):
  kinds = (i.kind for i in executor.incidents())
  return collections.Counter(kind for kind in kinds if kind != "started")


def _changes_its_mind(left, answered):
  """As a race: what an answer says decides what is dropped and what is next."""
  rng = random.Random(answered.responses[-1].text)
  if rng.random() < 0.3 and left:
    dropped = rng.choice(left).model
    left = [w for w in left if w.model != dropped]
  if left:
    first = rng.choice(left).model
    left = sorted(left, key=lambda w: w.model != first)
  return left


class _Here:
  """The same, in this process: what every cluster has to give."""

  def answer(self, upcoming, program_of):
    items = evaluation.load_items(_CONFIG.evaluate)[records.DEV]
    while (work := next(upcoming(), None)) is not None:
      packed = [(t, t[-4:], False, False, "") for t in _texts(work)]
      asked = items[work.first : work.before]
      responses = remote.unpack(packed, asked, work.first)
      yield work_lib.Answered(responses, "", work.model, 0.0, 0.0, "")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_values_and_order_do_not_depend_on_the_number_of_workers(
    start, workers
):
  executor = start(workers=workers, worker_cpus=0.25)
  works = _blocks(6)
  assert _answers(executor, works) == _expected(works)
  raced = _answers(executor, _blocks(9), _changes_its_mind)
  assert raced == _answers(_Here(), _blocks(9), _changes_its_mind)
  assert 4 < len(raced) < 36

  keys = np.arange(14, dtype=np.uint32).reshape(7, 2)
  sample = work_lib.Sample("f1", "", keys, 1.0)
  batches = list(executor.sample(sample, {"w": np.ones(3)}))
  assert [[g.text for g in batch] for batch in batches] == [
      [doubles.drawn("f1", key, 3.0) for key in keys[at : at + 2]]
      for at in range(0, 7, 2)
  ]
  # The seed model's weights are with the workers.
  batches = list(executor.sample(sample, None))
  assert batches[0][0].text == doubles.drawn("f1", keys[0], 0.0)

  sources = [f"program {i}" for i in range(70)]
  assert list(executor.admit(sources)) == [doubles.verdict(s) for s in sources]
  assert not list(executor.admit([]))
  assert not list(executor.answer(lambda: iter(()), _none))
  assert executor.engine == "stand-in 1"
  assert not _kinds(executor) - collections.Counter(duplicated=99)


def test_a_worker_that_dies_in_mid_piece(start):
  executor = start(workers=2)
  works = _blocks(4)
  works[0] = _work("m0", script=[{"sleep": 0.3, "dies": True}])
  begun = time.monotonic()
  assert _answers(executor, works) == _expected(works)
  assert time.monotonic() - begun < 10.0
  lost = [i for i in executor.incidents() if i.kind == "lost"]
  assert [i.host in _HOSTS for i in lost] == [True]


def test_the_only_worker_is_replaced(start, monkeypatch):
  monkeypatch.setattr(cluster_lib, "_GROW_S", 0.3)
  executor = start(workers=1)
  works = _blocks(2)
  works[0] = _work("m0", script=[{"dies": True}])
  assert _answers(executor, works) == _expected(works)
  assert _kinds(executor) >= collections.Counter(lost=1, joined=1)


def test_a_host_that_is_killed(hosts, start, log):
  node = _add(hosts, "127.0.0.5")
  executor = start(workers=4)
  works = [_work(f"m{m}", script=[{"sleep": 0.3}]) for m in range(400)]
  told = []

  def decide(left, _):
    told.append(time.monotonic())
    if len(told) == 8:
      hosts.remove_node(node, allow_graceful=False)
    is_known = any(i.kind == "lost" for i in executor._incidents)
    return left[:2] if is_known else left

  found = _answers(executor, works, decide)
  assert found == _expected(works)[: len(found)]
  assert any(host == "127.0.0.5" for host, *_ in log("begin"))
  lost = [i for i in executor.incidents() if i.kind == "lost"]
  assert [i.host for i in lost] == ["127.0.0.5"]
  # Until Ray knows, which takes it some seconds, its pieces are late ones.
  pauses = np.diff(told)
  assert pauses.max() < 8.0


@pytest.mark.slow  # Ray takes its time to see it.
def test_a_host_that_is_gone_before_its_worker_is_there(hosts, start):
  node = _add(hosts, "127.0.0.9")
  hosts.remove_node(node, allow_graceful=False)
  begun = time.monotonic()
  executor = start()  # Ray takes it for alive.
  assert time.monotonic() - begun < 55.0
  works = _blocks(2)
  assert _answers(executor, works) == _expected(works)


def test_a_straggler_s_piece_is_given_to_another(start):
  executor = start(workers=2)
  works = _blocks(4)
  works[3] = _work("m0", 6, script=[{"sleep": 60.0}])
  begun = time.monotonic()
  assert _answers(executor, works) == _expected(works)
  assert time.monotonic() - begun < 15.0
  late = [i.detail for i in executor.incidents() if i.kind == "duplicated"]
  # On a busy machine others may be late, too.
  assert sum("('m0', 'dev', 6, 8)" in detail for detail in late) == 1


def test_the_only_piece_left_is_a_straggler(start):
  executor = start(workers=2)
  works = _blocks(2)
  assert _answers(executor, works) == _expected(works)
  late = [_work("m9", script=[{"sleep": 60.0}])]
  begun = time.monotonic()
  assert _answers(executor, late) == _expected(late)
  assert time.monotonic() - begun < 15.0


def test_a_late_answer_to_an_earlier_question_is_not_taken(start, monkeypatch):
  """A deaf straggler's verdicts come while others are asked for."""
  monkeypatch.setattr(cluster_lib, "_LATE_S", 0.3)
  executor = start(workers=2)
  slow = json.dumps([{"sleep": 10.0, "is_deaf": True}])
  first = [slow] + [f"first {i}" for i in range(100)]
  begun = time.monotonic()
  assert list(executor.admit(first)) == [doubles.verdict(s) for s in first]
  assert time.monotonic() - begun < 10.0, "it was not duplicated"
  # This one has the same number, and waits until the straggler has answered.
  waits = json.dumps([{"sleep": 12.0, "times": 9}])
  second = [waits] + [f"second {i}" for i in range(40)]
  assert list(executor.admit(second)) == [doubles.verdict(s) for s in second]


def test_what_is_not_wanted_any_more_is_stopped(start, log):
  executor = start(workers=2)
  drops = _work("m0", script=[{"sleep": 0.5}])
  long = _work("m1", script=[{"sleep": 60.0, "times": 9}])
  last = _work("m2")
  begun = time.monotonic()
  found = _answers(
      executor,
      [drops, long, last],
      lambda left, _: [w for w in left if w != long],
  )
  assert found == _expected([drops, last])
  # The next finds the worker free.
  works = _blocks(2)
  assert _answers(executor, works) == _expected(works)
  assert time.monotonic() - begun < 10.0
  # The other may have answered all before that one looked.
  while not log("stopped") and time.monotonic() - begun < 20.0:
    time.sleep(0.1)
  assert [what for *_, what in log("stopped")][:1] == [
      "answer ('m1', 'dev', 0, 2)"
  ]


def test_a_stream_that_is_left_stops_its_work(start, log):
  executor = start(workers=1)
  works = [_work("m0"), _work("m1", script=[{"sleep": 60.0}])]
  with contextlib.closing(
      executor.answer(lambda: iter(works), _none)
  ) as answers:
    next(answers)
  works = _blocks(1)
  begun = time.monotonic()
  assert _answers(executor, works) == _expected(works)
  assert time.monotonic() - begun < 10.0


def test_a_host_that_computes_wrongly_from_the_start(start, log):
  executor = start({"canary": {_HOSTS[1]: 1.0}})
  works = _blocks(5)
  assert _answers(executor, works) == _expected(works)
  drained = [i for i in executor.incidents() if i.kind == "drained"]
  assert [i.host for i in drained] == [_HOSTS[1]]
  assert {host for host, *_ in log("begin")} == {_HOSTS[0], _HOSTS[2]}


def test_a_host_that_computes_nan(start):
  executor = start({"canary": {_HOSTS[2]: float("nan")}})
  drained = [i for i in executor.incidents() if i.kind == "drained"]
  assert [i.host for i in drained] == [_HOSTS[2]]


def test_a_host_that_computes_wrongly_later(start, log, monkeypatch):
  monkeypatch.setattr(cluster_lib, "_GROW_S", 0.3)
  executor = start({"canary later": {_HOSTS[1]: 1.0}})
  works = _blocks(5)
  assert _answers(executor, works) == _expected(works)
  drained = [i for i in executor.incidents() if i.kind == "drained"]
  assert [i.host for i in drained] == [_HOSTS[1]]
  # What it was to do others have done, and it came back no more.
  ends = [what for host, _, what in log("end") if host == _HOSTS[1]]
  assert ends
  others = {what for host, _, what in log("end") if host != _HOSTS[1]}
  assert set(ends) <= others


def test_a_host_that_joins_gets_work(hosts, start, log, monkeypatch):
  monkeypatch.setattr(cluster_lib, "_GROW_S", 0.3)
  executor = start(workers=None)
  nodes = []

  def decide(left, _):
    if not nodes:
      nodes.append(_add(hosts, "127.0.0.6"))
    has_answered = any(host == "127.0.0.6" for host, *_ in log("end"))
    return left[:2] if has_answered else left

  works = [_work(f"m{m}", script=[{"sleep": 0.3}]) for m in range(1000)]
  try:
    found = _answers(executor, works, decide)
    assert found == _expected(works)[: len(found)]
    assert len(found) < 1000
    joined = [i for i in executor.incidents() if i.kind == "joined"]
    assert [i.host for i in joined] == ["127.0.0.6"]
  finally:
    executor.close()
    hosts.remove_node(nodes[0], allow_graceful=False)


def test_no_host_is_left(start, tmp_path, monkeypatch):
  monkeypatch.setattr(cluster_lib, "_GROW_S", 0.3)
  executor = start(workers=1, start_timeout_s=30.0)
  plan = {"versions": {"all": {"jax": "0.0.1"}}}
  (tmp_path / "plan.json").write_text(json.dumps(plan))
  with pytest.raises(errors.UserError, match=r"no \w+ is left") as caught:
    _answers(executor, [_work("m0", script=[{"dies": True}])])
  assert "0.0.1" in str(caught.value) and "\n" not in str(caught.value)


def test_no_worker_is_left_and_none_comes(start, tmp_path, monkeypatch):
  monkeypatch.setattr(cluster_lib, "_GROW_S", 0.3)
  executor = start(workers=1)
  executor._options = dataclasses.replace(
      executor._options, start_timeout_s=6.0
  )
  (tmp_path / "plan.json").write_text('{"open_s": {"all": 60}}')
  with pytest.raises(errors.UserError, match="no worker is left") as caught:
    _answers(executor, [_work("m0", script=[{"dies": True}])])
  assert "6 s" in str(caught.value) and "\n" not in str(caught.value)


def test_the_head_holds_a_bounded_part(start, log):
  executor = start(workers=2)
  works = [_work("m0", script=[{"sleep": 3.0, "times": 9}])]
  works += [_work(f"m{m}") for m in range(1, 200)]
  asked = 0

  def upcoming():
    nonlocal asked
    for work in works[len(found) :]:
      asked += 1
      yield work

  found = []
  for answered in executor.answer(upcoming, _none):
    if not found:
      # The slow first kept the others from going on.
      begun = {what for *_, what in log("begin")}
      assert 2 < len(begun) <= 2 * cluster_lib._WINDOW
      assert asked <= 2 * (2 * cluster_lib._WINDOW + 1)
    found.append(answered)
  assert len(found) == 200


@pytest.mark.parametrize("kind", ["crash", "memory", "timeout"])
def test_a_failed_merge_is_believed_when_two_say_so(
    start, log, monkeypatch, kind
):
  monkeypatch.setattr(cluster_lib, "_LATE_S", 60.0)  # Nothing is given twice,
  monkeypatch.setattr(cluster_lib, "_DEPTH", 1)  # and nothing taken away.
  executor = start(workers=2)
  once = _work("m0", script=[{"failure": kind}])
  ever = _work("m1", script=[{"failure": kind, "times": 99}])
  rule = _work("m2", script=[{"failure": "NaN", "times": 99}])
  assert _answers(executor, [once, ever, rule]) == [
      *_expected([once]),
      ("m1", 0, kind),
      ("m2", 0, "NaN"),
  ]
  ended = collections.Counter(what for *_, what in log("end"))
  assert ended["answer ('m1', 'dev', 0, 2)"] == 2
  assert ended["answer ('m2', 'dev', 0, 2)"] == 1
  assert len({pid for _, pid, what in log("end") if "m1" in what}) == 2


def test_a_merge_that_was_made_before_and_fails_on_two(start):
  executor = start(workers=2)
  once = _work("m0", script=[{"failure": "NaN"}], is_known=True)
  assert _answers(executor, [once]) == _expected([once])
  ever = _work("m1", script=[{"failure": "NaN", "times": 9}], is_known=True)
  with pytest.raises(errors.UserError, match="m1 was merged before") as caught:
    _answers(executor, [ever])
  assert "\n" not in str(caught.value)


def test_a_host_whose_worker_has_an_error(start, log):
  executor = start(workers=2)
  works = _blocks(2)
  works[0] = _work("m0", script=[{"error": "vLLM has died"}])
  assert _answers(executor, works) == _expected(works)
  (lost,) = [i for i in executor.incidents() if i.kind == "lost"]
  assert lost.detail.startswith("vLLM has died; ")


def test_workers_are_closed_at_the_end(start, log):
  executor = start()
  executor.close()
  assert sorted(host for host, *_ in log("close")) == list(_HOSTS)
  assert not ray.is_initialized()
  executor.close()


# Training.


def _training(tmp_path, **script):
  label = json.dumps({"steps": 8, **script})
  return work_lib.Training(
      [], {}, np.zeros(2, np.uint32), str(tmp_path), "w", label
  )


@pytest.mark.parametrize("train_hosts", [1, 2])
@pytest.mark.parametrize("waits", [0.0, 5.0])
def test_a_training_is_taken_up_again(
    start, log, tmp_path, monkeypatch, train_hosts, waits
):
  monkeypatch.setattr(cluster_lib, "_GROW_S", 0.3)
  executor = start(workers=1, train_hosts=train_hosts)
  told = []
  training = _training(tmp_path, **{"dies at": 5, "waits": waits})
  trained, history = executor.train(
      training, lambda step, metrics: told.append((step, metrics["loss"]))
  )
  np.testing.assert_array_equal(trained["w"], np.ones(2))
  assert len(history) == 8
  assert told == sorted(set(told))
  # Those before it died are lost where nobody asked in time; the history has
  # them.
  first = 1 if waits else 5
  assert set(told) >= {(step, 1 / step) for step in range(first, 9)}
  assert _kinds(executor) == collections.Counter(lost=1)
  starts = [what for *_, what in log("train") if what.startswith("0/")]
  assert starts == [f"0/{train_hosts} from 1", f"0/{train_hosts} from 5"]
  # The workers are there as before.
  works = _blocks(1)
  assert _answers(executor, works) == _expected(works)


def test_a_training_one_of_whose_hosts_hangs(start, log, tmp_path, monkeypatch):
  """The other fails first, and Ray sees nothing."""
  monkeypatch.setattr(cluster_lib, "_GROW_S", 0.3)
  executor = start(workers=1, train_hosts=2)
  monkeypatch.setattr(cluster_lib, "_ANSWER_S", 1.0)
  training = _training(tmp_path, **{"freezes at": 3})
  try:
    _, history = executor.train(training, lambda *_: None)
  finally:
    frozen = int((tmp_path / "frozen").read_text())
    with contextlib.suppress(ProcessLookupError):
      os.kill(frozen, signal.SIGKILL)
  assert len(history) == 8
  assert _kinds(executor) == collections.Counter(lost=1)


def test_a_training_with_a_bug(start, tmp_path):
  executor = start(workers=1)
  with pytest.raises(RuntimeError, match="a bug"):
    executor.train(_training(tmp_path, raises="a bug"), lambda *_: None)


def test_a_training_that_the_user_has_to_mend(start, tmp_path):
  executor = start(workers=1)
  training = _training(tmp_path, error="dpo.x is too large")
  with pytest.raises(errors.UserError, match=r"^dpo\.x is too large$"):
    executor.train(training, lambda *_: None)


# Bad input, before anything is asked of a worker.


def _refused(start, log, match, **arguments):
  begun = time.monotonic()
  with pytest.raises(errors.UserError, match=match) as caught:
    start(**arguments)
  assert "\n" not in str(caught.value)
  assert not log("begin")
  assert not ray.is_initialized()
  return str(caught.value), time.monotonic() - begun


def test_an_address_that_nobody_answers(start, log):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  text, seconds = _refused(start, log, "nobody answers", address=address)
  assert address in text and "ray start" in text
  assert seconds < 8.0


def test_an_address_at_which_is_something_else(start, log):
  with socket.create_server(("127.0.0.1", 0)) as silent:
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    text, seconds = _refused(start, log, "nobody answers", address=address)
    assert address in text and seconds < 20.0
  server = http.server.HTTPServer(
      ("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler
  )
  with server, concurrent.futures.ThreadPoolExecutor() as pool:
    pool.submit(server.handle_request)
    address = f"127.0.0.1:{server.server_port}"
    text, seconds = _refused(start, log, "no cluster's head", address=address)
    assert address in text and seconds < 20.0


@pytest.mark.parametrize("address", ["127.0.0.1", "here:", ":1", "a:b"])
def test_an_address_that_is_none(start, log, address):
  _refused(start, log, "is not HOST:PORT", address=address)


def test_a_host_with_other_versions(start, log):
  plan = {"versions": {_HOSTS[1]: {"jax": "0.0.1"}}}
  text, _ = _refused(start, log, "jax 0.0.1", plan=plan)
  ours = cluster_lib.versions_lib.here(None, "jax")["jax"]
  assert ours in text and _HOSTS[1] in text


def test_two_hosts_that_compute_differently(start, log):
  plan = {"canary": {_HOSTS[0]: 1.0}}
  text, _ = _refused(
      start, log, "different log-probabilities", plan=plan, workers=2
  )
  assert sum(host in text for host in _HOSTS) == 2


def test_hosts_with_different_engines(start, log):
  plan = {"engine": {_HOSTS[0]: "stand-in 2"}}
  text, _ = _refused(start, log, "different engines", plan=plan)
  assert "stand-in 1" in text and "stand-in 2" in text


def test_a_worker_that_cannot_open(start, log):
  plan = {"error": {_HOSTS[2]: "host h does not see"}}
  _refused(start, log, "^host h does not see", plan=plan)


def test_more_workers_than_there_is_room_for(start, log):
  _refused(start, log, "room for 3 workers of 1 CPU .* 4 are", workers=4)
  _refused(start, log, "room for 0 workers of 2 CPU", worker_cpus=2.0)


def test_too_few_gpus_on_one_host(hosts, start, log):
  nodes = [_add(hosts, f"127.0.0.{n}", num_gpus=1) for n in (7, 8)]
  vllm = config_lib.Vllm(tensor_parallel=2)
  try:
    text, _ = _refused(start, log, "workers of 1 CPU and 2 GPU", vllm=vllm)
    assert "127.0.0.7 1 CPU 1 GPU" in text
    # One GPU a worker does.
    executor = start()
    assert {w.host for w in executor._ready()} == {"127.0.0.7", "127.0.0.8"}
    executor.close()
  finally:
    for node in nodes:
      hosts.remove_node(node, allow_graceful=False)


@pytest.mark.slow  # The real worker loads JAX.
def test_paths_that_a_worker_does_not_see(start, log, tmp_path, monkeypatch):
  # Here it is this directory, in a worker another.
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(cluster_lib, "_LATE_S", 60.0)
  arguments = {
      "doer": remote.Doer,
      "workers": 1,
      "start_timeout_s": 300.0,
  }
  there = {"workdir": "/proc/self/cwd"}
  text, _ = _refused(
      start, log, "does not see the workdir", setup=there, **arguments
  )
  assert "/proc/self/cwd" in text
  (tmp_path / "seed").mkdir()
  text, _ = _refused(
      start,
      log,
      "does not see model seed at /proc/self/cwd/seed",
      setup={"models": {"seed": "/proc/self/cwd/seed"}},
      **arguments,
  )


def test_models_come_through_the_object_store(
    start, log, tmp_path, monkeypatch
):
  monkeypatch.setattr(remote, "_PART", 1 << 10)
  model = tmp_path / "model"
  model.mkdir()
  (model / "config.json").write_text("{}")
  weights = {"x": np.arange(1000.0)}
  safetensors.numpy.save_file(weights, model / "model.safetensors")
  setup = {
      "models": {"seed": str(model)},
      "digests": {"seed": convert.digest(model)},
  }
  reads = functools.partial(
      start,
      {"cache": str(tmp_path)},
      doubles.Reader,
      None,
      setup,
      models="store",
      start_timeout_s=300.0,  # They load JAX, all at once.
  )
  executor = reads()
  (copy,) = (p for p in (tmp_path / "models").iterdir() if p.is_dir())
  assert [what for *_, what in log("read")] == [str(copy)] * 3
  assert convert.digest(copy) == convert.digest(model)
  # What was fetched once is there for the next run.
  before = copy.stat().st_ino
  executor.close()
  reads()
  assert len(log("read")) == 6 and copy.stat().st_ino == before


def test_models_that_do_not_go_into_the_object_store(
    start, log, tmp_path, monkeypatch
):
  _refused(start, log, "seed does not exist", models="store")

  def put_files(directory):
    raise ray.exceptions.OutOfDiskError("no space left")

  (tmp_path / "seed").mkdir()
  monkeypatch.setattr(remote, "put_files", put_files)
  text, _ = _refused(start, log, "no space left", models="store")
  assert "model seed" in text and "temporary directory" in text


def test_ray_is_not_installed(monkeypatch):
  find = importlib.util.find_spec
  missing = lambda name, *args: None if name == "ray" else find(name, *args)
  monkeypatch.setattr(importlib.util, "find_spec", missing)
  with pytest.raises(errors.UserError, match="pip install") as caught:
    loop.check(_CONFIG)
  assert "\n" not in str(caught.value)
