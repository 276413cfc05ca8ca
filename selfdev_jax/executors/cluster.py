"""The head's side of a run over many hosts, on Ray.

The head asks, compares and keeps; workers (remote.py) do the work. What is
wanted is known in an order (see `Executor.answer`), of which a window is dealt
out: that bounds what is under way and what has come back too early. A worker
or host that dies gives its pieces back to the others at once; a piece that
takes long is given to a second worker, and the first answer counts. So results
depend on what was asked alone.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import os
import pathlib
import queue
import re
import secrets
import socket
import statistics
import time
from typing import Any
import warnings

import numpy as np
import ray
from ray.util import scheduling_strategies as strategies

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax import records
from selfdev_jax import sampling
from selfdev_jax import sandbox
from selfdev_jax.executors import executor as executor_lib
from selfdev_jax.executors import remote
from selfdev_jax.executors import schedule as schedule_lib
from selfdev_jax.executors import versions as versions_lib
from selfdev_jax.executors import work as work_lib
from selfdev_jax.executors import worker as worker_lib

_DEPTH = 2  # Pieces that a worker has: what it does, and what comes next.
_WINDOW = 2 * _DEPTH  # Pieces that are looked ahead, a worker.
_ADMITTED = 16  # Sources in a piece.
_SLACK_S = 600.0  # For answers, beside what has a limit of its own.
_TICK_S = 0.5  # Clocks are looked at so often.
_GROW_S = 5.0  # Hosts that have come are looked for so often.
_ANSWER_S = 5.0  # A cluster's head has to take a connection.
_TRAININGS = 10  # Times that a training is taken up after a host was lost.
_ATTEMPTS = 2  # Workers on which a merge fails before that is believed.
_CLOSE_S = 15.0  # Workers have so long to end what they have started.
_LOSSES = 5  # Workers lost on a host before it gets no more.
# HTTP/2, RFC 9113, sections 3.4 and 6.5: what a client says first, with no
# settings, and type and flags of the frame that a server says first.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)
_SETTINGS = bytes([4, 0])
# Nats, on average, between two hosts that compute the same in other orders.
_CANARY_NATS = 0.05
# A piece is late after so many times the usual one's seconds, and at least so
# many seconds.
_LATE, _LATE_S = 4.0, 2.0
# Failures of a merge that may be the host's.
_OF_HOSTS = ("crash", "memory", "timeout")


@dataclasses.dataclass
class _Worker:
  """A process on a host, as the head knows it."""

  name: str
  node: str
  host: str
  group: Any
  handle: Any
  hello: work_lib.Hello | None = None


class _LostError(Exception):
  """Processes that trained together are not all there any more."""


class Cluster:
  """An `Executor` whose work is done by the workers of a Ray cluster.

  A context manager, as it holds processes.
  """

  def __init__(
      self,
      setup: work_lib.Setup,
      doer: type = remote.Doer,
      trainer: type = remote.Trainer,
  ):
    """Meets the cluster, and starts workers as far as it has room.

    Args:
      setup: what workers are told.
      doer: what a worker is, see `remote.Doer`.
      trainer: see `remote.Trainer`.

    Raises:
      UserError: if nobody answers, the cluster has too little room, a host has
        other versions or does not see a path, or no worker could be started.
    """
    self._setup = dataclasses.replace(setup, token=secrets.token_hex(8))
    self._options = setup.config.ray
    self._doer, self._trainer = doer, trainer
    self._stack = contextlib.ExitStack()
    self._events: queue.SimpleQueue = queue.SimpleQueue()
    self._workers: dict[str, _Worker] = {}
    self._numbers = itertools.count(1)
    self._schedule = schedule_lib.Schedule(lambda p: p.about, _DEPTH)
    self._attempts: collections.Counter = collections.Counter()
    self._durations: collections.deque = collections.deque(maxlen=100)
    self._longest: dict[str, float] = {}  # Seconds, by kind of piece.
    self._admissions = itertools.count()
    self._incidents: list[records.Incident] = []
    self._drained: set[str] = set()  # Nodes.
    self._losses: collections.Counter = collections.Counter()  # By node.
    # (node, value) of what is done and was not asked for yet.
    self._results: dict[work_lib.Piece, tuple[str, Any]] = {}
    self._canary: np.ndarray | None = None
    self._program_of: Callable[[str], str] = lambda _: ""
    self._versions = versions_lib.here(setup.vllm_python, setup.kind)
    self._grown = 0.0
    config = setup.config
    # Whatever a piece may wait for, and its worker with it.
    self._hangs_s = _DEPTH * (
        2 * config.merge.timeout_s + config.vllm.stall_timeout_s + _SLACK_S
    )
    self._needs: dict[str, float] = {}  # Resources of a worker.
    self._is_open = False
    self._first: work_lib.Hello | None = None
    self._alone: float | None = None  # Since when there is no worker.
    self.decoder: models.DecoderConfig = setup.decoder
    self.engine = ""
    try:
      self._connect()
      self._stack.callback(self._end_workers)
      self._open()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "Cluster":
    return self

  def __exit__(self, *unused_exception):
    self.close()

  def close(self):
    """Ends the workers and leaves the cluster. May be called again."""
    self._stack.close()

  # The cluster.

  def _connect(self):
    address = self._options.address
    common = {"log_to_driver": False, "logging_level": "error"}
    self._stack.callback(ray.shutdown)
    try:
      if address == "local":
        with warnings.catch_warnings():
          # JAX warns of forks; Ray's become its own programs at once.
          warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
          ray.init(
              address="local",
              include_dashboard=False,
              _node_ip_address="127.0.0.1",
              **common,
          )
      else:
        if address != "auto":
          _check_answers(address)
        ray.init(address=address, **common)
        _note_open(address)
    except (
        ConnectionError,
        RuntimeError,
        ValueError,
        ray.exceptions.RayError,
    ) as error:
      raise errors.UserError(
          f"--config.ray.address={address}: {_line(error)}; `ray start --head"
          " --port=6379` starts a cluster's head, `ray start"
          " --address=HOST:6379` lets a host join it; with RAY_AUTH_MODE=token"
          " all need the same token"
      ) from None

  def _nodes(self) -> list[dict[str, Any]]:
    """The hosts that take part, by their addresses."""
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in self._drained
    ]
    return sorted(nodes, key=lambda node: node["NodeManagerAddress"])

  def _settle_needs(self):
    """Settles what a worker takes, for the whole run: GPUs if there are any.

    Otherwise the run would go on, with other last bits, on what has none.

    Raises:
      UserError: if the cluster is too small, before anything is begun.
    """
    needs, nodes = {"CPU": self._options.worker_cpus}, self._nodes()
    shared = self._setup.config.vllm.tensor_parallel
    if shared > 1 or any(node["Resources"].get("GPU") for node in nodes):
      needs["GPU"] = shared
    self._needs = needs
    room = sum(map(self._room, nodes))
    wanted = self._options.workers
    if room >= (wanted or 1):
      return
    what = " and ".join(f"{n:g} {name}" for name, n in needs.items())
    has = "; ".join(
        f"{node['NodeManagerAddress']}"
        f" {node['Resources'].get('CPU', 0):g} CPU"
        f" {node['Resources'].get('GPU', 0):g} GPU"
        for node in nodes
    )
    raise errors.UserError(
        f"the cluster has room for {room} workers of {what} on one host each,"
        f" {wanted or 1} are wanted; its hosts have: {has}. Lower"
        " ray.workers, ray.worker_cpus or vllm.tensor_parallel, or let more"
        " hosts join"
    )

  def _room(self, node) -> int:
    """How many workers a node has room for, those that it has among them."""
    return min(
        int(node["Resources"].get(name, 0.0) / wanted + 1e-6)
        for name, wanted in self._needs.items()
    )

  def _grow(self):
    """Starts workers where there is room, on hosts that came later too."""
    self._grown = time.monotonic()
    self._take_all()  # Who has answered meanwhile does not hang.
    alive = {node["NodeID"] for node in self._nodes()}
    for worker in list(self._workers.values()):
      if worker.name not in self._workers:
        continue  # It went with another of its host.
      since = self._schedule.oldest(worker.name)
      if worker.node not in alive:
        self._lose(worker, "its host is gone")
      elif since is not None and self._grown - since > self._hangs_s:
        self._lose(worker, f"it gave no answer for {self._hangs_s:.0f} s")
    there = collections.Counter(w.node for w in self._workers.values())
    for node in self._nodes():
      for _ in range(self._room(node) - there[node["NodeID"]]):
        if len(self._workers) >= (self._options.workers or float("inf")):
          return
        self._start(node)

  def _start(self, node):
    needs, setup = self._needs, self._setup
    # Programs are traced under a clock: not more at once than there are cores.
    cores = node["Resources"].get("CPU", 1.0)
    lanes = max(1, int(cores // max(self._room(node), 1)))
    setup = dataclasses.replace(setup, lanes=lanes)
    host = node["NodeManagerAddress"]
    name = f"worker-{next(self._numbers)}"
    # The host is settled here: what it has room for is counted by host.
    group = ray.util.placement_group(
        [needs], bundle_label_selector=[{"ray.io/node-id": node["NodeID"]}]
    )
    actor = ray.remote(concurrency_groups={"control": 1})(self._doer)
    handle = actor.options(
        num_cpus=needs["CPU"],
        num_gpus=needs.get("GPU", 0),
        scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(group),
        # Its work goes to the others at once instead.
        max_restarts=0,
        max_task_retries=0,
    ).remote(setup)
    self._workers[name] = _Worker(name, node["NodeID"], host, group, handle)
    self._ask(name, "versions", handle.versions.remote())

  def _ask(self, worker: str, what: str, ref, piece=None):
    """Has the answer come to `_events` when it is there."""
    ref.future().add_done_callback(
        lambda future: self._events.put((worker, what, piece, future))
    )

  def _open(self):
    """Starts the first workers and waits for all of them."""
    self._settle_needs()
    if self._options.models == "store":
      self._setup = dataclasses.replace(self._setup, files=self._put_models())
    path = self._setup.seen
    path.touch()
    self._stack.callback(path.unlink, missing_ok=True)
    self._grow()
    waiting = progress.Waiting("Starting workers")
    while not self._ready() or len(self._ready()) < len(self._workers):
      if waiting.seconds > self._options.start_timeout_s:
        if not self._ready():
          raise errors.UserError(
              f"no worker was ready within {self._options.start_timeout_s:g} s"
              " (ray.start_timeout_s); `ray status` shows what the cluster's"
              " resources are held by"
          )
        break
      if not any(map(self._room, self._nodes())):
        reasons = dict.fromkeys(i.detail for i in self._incidents)
        raise errors.UserError(
            "no worker could be started:"
            f" {'; '.join(reasons) or 'the cluster has lost its hosts'}"
        )
      if time.monotonic() - self._grown > _GROW_S:
        # A host may be gone before its worker is there, and still be named.
        self._grow()
      self._look()
      waiting.tell(f"{len(self._ready())} of {len(self._workers)} ready")
    self._agree()
    self._is_open = True
    self.engine = self._first.engine
    progress.note(
        f"{len(self._ready())} workers on"
        f" {len({w.node for w in self._ready()})} hosts, {self.engine}"
    )

  def _put_models(self) -> dict[str, work_lib.Files]:
    """See `work.Setup.files`.

    Raises:
      UserError: if a model cannot be read, or Ray has no room for it.
    """
    places, files = self._setup.models, {}
    with progress.bar(
        "Putting models into Ray's object store", len(places), "model"
    ) as bar:
      for name, where in places.items():
        try:
          files[name] = remote.put_files(convert.resolve(where))
        except (OSError, ray.exceptions.RayError) as error:
          raise errors.UserError(
              f"model {name} does not go into Ray's object store"
              f" ({_line(error)}); give Ray's temporary directory room for all"
              " models, or share them and leave ray.models at path"
          ) from None
        bar.update()
    return files

  def _ready(self) -> list[_Worker]:
    return [w for w in self._workers.values() if w.hello is not None]

  def _end_workers(self):
    self._end_all(list(self._workers.values()))

  def _end_all(self, workers: Sequence[_Worker]):
    """Ends workers, and first what they have started: it has memory."""
    with contextlib.suppress(ray.exceptions.RayError):
      refs = [w.handle.close.remote() for w in workers if w.hello is not None]
      if refs:
        ray.wait(refs, num_returns=len(refs), timeout=_CLOSE_S)
    for worker in workers:
      self._end(worker)

  def _end(self, worker: _Worker):
    self._workers.pop(worker.name, None)
    self._schedule.leave(worker.name)
    with contextlib.suppress(Exception):  # It may be gone, and so may Ray.
      ray.kill(worker.handle)
      ray.util.remove_placement_group(worker.group)

  # What workers say.

  def _look(self):
    """Takes what has come, or waits a moment for something."""
    with contextlib.suppress(queue.Empty):
      self._take(*self._events.get(timeout=_TICK_S))
    self._take_all()

  def _take_all(self):
    with contextlib.suppress(queue.Empty):
      while True:
        self._take(*self._events.get_nowait())

  def _take(self, name, what, piece, future):
    worker = self._workers.get(name)
    if worker is None:
      return
    try:
      value = future.result()
    except ray.exceptions.RayTaskError as error:
      if not self._is_open:
        raise errors.UserError(
            f"host {worker.host} failed: {_line(error.cause)}; mend it, or"
            " take it out of the cluster"
        ) from error
      self._drain(worker, _line(error.cause), error)
      return
    except ray.exceptions.RayError as error:
      if not self._is_open and "creation task" in str(error):
        raise errors.UserError(
            f"host {worker.host} could not start a worker ({_tail(error)});"
            " install the same selfdev_jax there"
        ) from None
      self._lose(worker, f"no answer ({type(error).__name__})")
      return
    if what == "versions":
      self._compare(worker, value)
    elif what == "open":
      self._welcome(worker, value)
    else:
      self._hear(worker, piece, value)

  def _lose(self, worker: _Worker, reason: str):
    """A worker is gone."""
    lost = self._schedule.leave(worker.name)
    self._end(worker)
    self._tell("lost", worker, f"{reason}; {len(lost)} pieces go on elsewhere")
    self._losses[worker.node] += 1
    if self._losses[worker.node] >= _LOSSES:
      self._drain(
          worker, f"{_LOSSES} of its workers were lost, the last: {reason}"
      )

  def _tell(self, kind: str, worker: _Worker, detail: str):
    self._incidents.append(
        records.Incident(kind, worker.name, worker.host, detail)
    )
    if kind != "duplicated":
      progress.note(f"{worker.name} on {worker.host}: {kind}, {detail}")

  def _refuse(self, worker: _Worker, reason: str):
    """A worker that cannot take part: at the start, nothing begins."""
    if not self._is_open:
      raise errors.UserError(reason)
    self._drain(worker, reason)

  def _drain(
      self, worker: _Worker, reason: str, error: Exception | None = None
  ):
    """Takes a host out of the run.

    Raises:
      UserError: if it was the last; or `error`, which is no user's.
    """
    self._drained.add(worker.node)
    for other in list(self._workers.values()):
      if other.node == worker.node:
        self._end(other)
    self._tell("drained", worker, reason)
    if not any(map(self._room, self._nodes())):
      raise error or errors.UserError(
          f"no host is left: {worker.host} was taken out ({reason}); the same"
          " command resumes"
      )

  def _compare(self, worker: _Worker, versions: Mapping[str, str]):
    differing = [
        f"{name} {versions.get(name, 'none')}, the head {ours}"
        for name, ours in self._versions.items()
        if versions.get(name) != ours
    ]
    if differing:
      self._refuse(
          worker,
          f"host {worker.host} has {'; '.join(differing)}: install the same"
          " everywhere",
      )
      return
    self._ask(worker.name, "open", worker.handle.open.remote())

  def _welcome(self, worker: _Worker, reply: work_lib.Reply):
    if reply.error:
      self._refuse(worker, reply.error)
      return
    worker.hello = reply.value
    if not self._is_open:
      return
    if self._is_off(reply.value.canary):
      self._drain(
          worker, "other log-probabilities than the others' at its start"
      )
      return
    if worker.hello.engine != self._first.engine:
      self._drain(
          worker, f"it has {worker.hello.engine}, others {self._first.engine}"
      )
      return
    self._join(worker)
    progress.note(f"{worker.name} on {worker.host} joined")

  def _agree(self):
    """Settles what the canary is, by majority, and lets in who agrees."""
    ready = self._ready()
    engines = {w.hello.engine: w.host for w in ready}
    if len(engines) > 1:
      raise errors.UserError(
          "hosts have different engines: "
          + "; ".join(
              f"{host} has {engine}" for engine, host in engines.items()
          )
      )
    for worker in ready:
      self._canary = worker.hello.canary
      off = [w for w in ready if self._is_off(w.hello.canary)]
      if 2 * len(off) < len(ready):
        break
    else:
      raise errors.UserError(
          "hosts compute different log-probabilities for the same model and"
          f" tokens, no majority agrees: {', '.join(w.host for w in ready)};"
          " look for the broken one with a cluster of three or more"
      )
    for worker in off:
      if worker.name in self._workers:
        self._drain(worker, "other log-probabilities than most others'")
    self._first = ready[0].hello
    for worker in self._ready():
      self._join(worker)
    if not self._ready():
      raise errors.UserError(
          "no host is left: most workers are on one that computes other"
          " log-probabilities than itself; take it out of the cluster"
      )

  def _join(self, worker: _Worker):
    self._schedule.join(worker.name)
    missing = [name for name, why in worker.hello.layers.items() if why]
    without = f", no {', no '.join(missing)}" if missing else ""
    self._incidents.append(
        records.Incident(
            "joined" if self._is_open else "started",
            worker.name,
            worker.host,
            f"{worker.hello.device}, {worker.hello.engine}{without}",
        )
    )

  def _is_off(self, canary: np.ndarray) -> bool:
    off = np.abs(canary - self._canary).mean()
    return not off <= _CANARY_NATS  # NaN is off.

  def _hear(
      self, worker: _Worker, piece: work_lib.Piece, reply: work_lib.Reply
  ):
    """A piece came back."""
    if reply.canary is not None and self._is_off(reply.canary):
      self._forget(worker.node)
      self._drain(
          worker,
          "other log-probabilities for the seed model than at the start; what"
          f" it gave in the last {remote.CANARY_S:g} s is in doubt",
      )
      return
    if reply.error:
      self._lose(worker, reply.error)
      return
    if reply.is_stopped:
      self._schedule.take_back(worker.name, piece)
      return
    if self._is_doubtful(worker, piece, reply):
      self._schedule.refuse(worker.name, piece)
      return
    self._durations.append(reply.seconds)
    longest = self._longest.get(piece.kind, 0.0)
    self._longest[piece.kind] = max(longest, reply.seconds)
    self._losses[worker.node] = 0  # It works.
    counts, vain = self._schedule.finish(worker.name, piece)
    self._stop(vain)
    if counts:
      self._results[piece] = worker.node, reply.value

  def _forget(self, node: str):
    """Drops what a host has given and nobody has used yet."""
    for piece, (giver, _) in list(self._results.items()):
      if giver == node:
        del self._results[piece]
        self._schedule.forget(piece)

  def _is_doubtful(self, worker, piece, reply) -> bool:
    """Whether a failed merge may be the host's fault, and another should try.

    Raises:
      UserError: where what was merged before fails on several.
    """
    if not self._schedule.is_open(piece):
      return False  # Nobody asks any more, or another has answered.
    if piece.kind == "admit":
      codes = {getattr(verdict, "code", "") for verdict in reply.value}
      self._attempts[piece] += 1
      again = self._attempts[piece] < _ATTEMPTS and bool(codes & {*_OF_HOSTS})
      return again and len(self._schedule.workers) > 1
    if piece.kind != "answer" or not reply.value.failure:
      return False
    work = piece.payload
    if not work.is_known and reply.value.failure not in _OF_HOSTS:
      return False
    self._attempts[piece] += 1
    last = self._attempts[piece] >= min(_ATTEMPTS, len(self._schedule.workers))
    if last and work.is_known:
      raise worker_lib.unrepeated(work.model, reply.value.failure)
    return not last

  # What the loop asks for.

  def _stream(
      self, upcoming: Callable[[], Iterator[work_lib.Piece]]
  ) -> Iterator[Any]:
    """The values of `upcoming()`'s first, one after the other, to its end."""
    self._durations.clear()
    self._attempts.clear()
    wanted = collections.deque()
    try:
      while True:
        first = next(upcoming(), None)
        if first is None:
          return
        window = max(len(self._schedule.workers), 1) * _WINDOW
        # As expected, mostly: then it need not be looked through each time.
        if len(wanted) <= window // 2 or wanted[0] != first:
          wanted = collections.deque(itertools.islice(upcoming(), window))
          self._stop(self._schedule.want(wanted))
          self._results = {
              p: self._results[p] for p in wanted if p in self._results
          }
        while first not in self._results:
          self._deal(first.kind)
          self._look()
        _, value = self._results.pop(wanted.popleft())
        yield value
    finally:
      self._stop(self._schedule.want([]))
      self._results = {}

  def _each(self, pieces: Sequence[work_lib.Piece]) -> Iterator[Any]:
    """The values of all, in their order."""
    left = collections.deque(pieces)
    for value in self._stream(lambda: iter(left)):
      left.popleft()
      yield value

  def _deal(self, kind: str):
    now = time.monotonic()
    if now - self._grown > _GROW_S:
      self._grow()
      self._check_alive(now)
    for name, piece in self._schedule.deal(now):
      self._send(name, piece)
    for name, piece, other in self._schedule.steal(now):
      self._stop([(other, piece)])
      self._send(name, piece)
    if self._durations:
      usual = statistics.median(self._durations)
    elif kind in self._longest:  # There may be but one, and that late.
      usual = self._longest[kind]
    else:
      return
    patience = max(_LATE_S, _LATE * usual)
    for name, piece in self._schedule.duplicate(now, patience):
      if piece.kind == "export":  # Two would write one directory.
        self._schedule.take_back(name, piece)
        continue
      others = [x for x in self._schedule.holders(piece) if x != name]
      self._tell(
          "duplicated",
          self._workers[name],
          f"{piece.kind} {piece.key}, late on {', '.join(others)}",
      )
      self._send(name, piece)

  def _check_alive(self, now: float):
    """Gives a cluster without workers time to have some.

    Raises:
      UserError: when that is over.
    """
    if self._ready():
      self._alone = None
      return
    self._alone = self._alone or now
    if now - self._alone > self._options.start_timeout_s:
      last = self._incidents[-1].detail if self._incidents else "unknown"
      raise errors.UserError(
          "no worker is left, and none came within"
          f" {self._options.start_timeout_s:g} s (the last: {last}); the same"
          " command resumes"
      )

  def _send(self, name: str, piece: work_lib.Piece):
    if piece.kind == "answer":  # Read where it is sent: the window is long.
      work = executor_lib.with_program(piece.payload, self._program_of)
      piece = dataclasses.replace(piece, payload=work)
    ref = self._workers[name].handle.do.remote(piece)
    self._ask(name, "do", ref, piece)

  def _stop(self, vain: Sequence[tuple[str, work_lib.Piece]]):
    for name, piece in vain:
      if name in self._workers:
        self._workers[name].handle.stop.remote(piece.kind, piece.key)

  def sample(
      self, work: work_lib.Sample, adapter: models.Params | None
  ) -> Iterator[list[sampling.Generation]]:
    """See `Executor.sample`."""
    size = self._setup.config.propose.batch_size
    # Once; from where it is put, every host takes it once.
    weights = None if adapter is None else ray.put(adapter)
    pieces = [
        work_lib.Piece(
            "sample",
            (work.factory, *map(int, work.keys[at])),
            work.factory,
            (
                dataclasses.replace(work, keys=work.keys[at : at + size]),
                weights,
            ),
        )
        for at in range(0, len(work.keys), size)
    ]
    for engine, texts in self._each(pieces):
      self.engine = engine
      yield [
          sampling.Generation(text, finished, truncated=truncated)
          for text, finished, truncated in texts
      ]

  def admit(
      self, sources: Sequence[str]
  ) -> Iterator[sandbox.Admitted | sandbox.Rejection]:
    """See `Executor.admit`."""
    # What is asked another time is other sources: no late verdict is of them.
    time_asked = next(self._admissions)
    pieces = [
        work_lib.Piece(
            "admit",
            (time_asked, at),
            None,
            list(sources[at : at + _ADMITTED]),
        )
        for at in range(0, len(sources), _ADMITTED)
    ]
    for verdicts in self._each(pieces):
      yield from verdicts

  def answer(
      self,
      upcoming: executor_lib.Upcoming,
      program_of: Callable[[str], str],
  ) -> Iterator[work_lib.Answered]:
    """See `Executor.answer`."""
    self._program_of = program_of
    items = evaluation.load_items(self._setup.config.evaluate)
    pieces = lambda: (
        work_lib.Piece(
            "answer", (w.model, w.split, w.first, w.before), w.model, w
        )
        for w in upcoming()
    )
    # The first of them now is the one that the next value is of.
    with contextlib.closing(self._stream(pieces)) as values:
      while (work := next(upcoming(), None)) is not None:
        answered = next(values)
        asked = items[work.split][work.first : work.before]
        responses = ()
        if not answered.failure:
          responses = remote.unpack(answered.responses, asked, work.first)
        self.engine = answered.engine
        yield dataclasses.replace(answered, responses=responses)

  def export(self, name: str, program: str, directory: pathlib.Path) -> None:
    """See `Executor.export`."""
    payload = name, program, str(directory.absolute())
    for _ in self._each([work_lib.Piece("export", name, name, payload)]):
      pass

  def incidents(self) -> list[records.Incident]:
    """See `Executor.incidents`."""
    told, self._incidents = self._incidents, []
    return told

  # Training.

  def train(
      self,
      training: work_lib.Training,
      on_step: Callable[[int, dict[str, float]], None],
  ) -> tuple[models.Params, list[dict[str, float]]]:
    """See `Executor.train`; where a host is lost, from the last checkpoint."""
    put, last = ray.put(training), 0

    def tell(step, metrics):
      """What is computed again was told before."""
      nonlocal last
      if step > last:
        bar.update(step - last)
        last = step
        on_step(step, metrics)

    for attempt in itertools.count(1):
      try:
        with progress.bar(
            training.label, self._setup.config.dpo.steps, done=last
        ) as bar:
          trained = self._train_once(put, tell)
        self._grow()
        return trained
      except _LostError as error:
        if attempt == _TRAININGS:
          raise errors.UserError(
              f"{training.label}: {error}, {attempt} times; the same command"
              " resumes"
          ) from None
        progress.note(
            f"{training.label}: {error}; it goes on from its last checkpoint"
        )
        time.sleep(_GROW_S)  # Ray knows a little later that a host is gone.
    raise AssertionError("unreachable")

  def _train_once(self, training, on_step):
    nodes = self._training_nodes()
    handles = []
    try:
      for node in nodes:
        gpus = node["Resources"].get("GPU", 0)
        actor = ray.remote(concurrency_groups={"control": 1})(self._trainer)
        handles.append(
            actor.options(
                num_cpus=0,
                num_gpus=gpus,
                max_restarts=0,
                scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(
                    node["NodeID"], soft=False
                ),
            ).remote(self._setup)
        )
      coordinator, *_ = ray.get(
          [handle.address.remote() for handle in handles],
          timeout=self._options.start_timeout_s,
      )
      refs = [
          handle.train.remote(training, coordinator, len(handles), i)
          for i, handle in enumerate(handles)
      ]
      return self._follow(handles[0], refs, on_step)
    except ray.exceptions.GetTimeoutError:
      raise errors.UserError(
          f"{', '.join(node['NodeManagerAddress'] for node in nodes)} had no"
          " room for a training within ray.start_timeout_s,"
          f" {self._options.start_timeout_s:g} s; see what holds their GPUs."
          " The same command resumes"
      ) from None
    except ray.exceptions.RayError as error:
      # Where one is lost, the others fail too, and that is no bug of theirs.
      is_bug = isinstance(error, ray.exceptions.RayTaskError)
      if is_bug and _are_there(handles):
        raise
      hosts = ", ".join(node["NodeManagerAddress"] for node in nodes)
      self._incidents.append(
          records.Incident("lost", "trainer", hosts, _line(error))
      )
      raise _LostError(f"a host that trains was lost ({hosts})") from None
    finally:
      for handle in handles:
        ray.kill(handle)

  def _training_nodes(self) -> list[dict[str, Any]]:
    """Hosts that train, those with most GPUs; their workers make room."""
    # One mesh: all with as many GPUs, or all without.
    gpus = lambda node: node["Resources"].get("GPU", 0)
    nodes = self._nodes()
    most = max(map(gpus, nodes), default=0)
    nodes = [node for node in nodes if gpus(node) == most]
    nodes = nodes[: self._options.train_hosts]
    if not nodes:
      raise errors.UserError(
          "no host is left to train on; the same command resumes"
      )
    taken = {n["NodeID"] for n in nodes if n["Resources"].get("GPU")}
    self._end_all([w for w in self._workers.values() if w.node in taken])
    return nodes

  def _follow(self, first, refs, on_step):
    """Waits for all, and tells the steps meanwhile."""
    told, waiting, trained = 0, list(refs), None
    while waiting:
      ready, waiting = ray.wait(waiting, timeout=2 * _TICK_S)
      for ref in ready:
        reply = ray.get(ref)
        if reply.error:
          raise errors.UserError(reply.error)
        trained = reply.value or trained
      for step, metrics in ray.get(first.steps.remote(told)):
        on_step(step, metrics)
        told += 1
    return trained


def _are_there(handles: Sequence[Any]) -> bool:
  """Whether all trainers answer."""
  try:
    refs = [handle.steps.remote(0) for handle in handles]
    ray.get(refs, timeout=_ANSWER_S)
  except ray.exceptions.RayError:
    return False
  return True


def _check_answers(address: str):
  """Looks whether a cluster's head may be at HOST:PORT.

  Ray itself would wait for minutes.

  Raises:
    UserError: if it is no address.
    ConnectionError: if nobody answers, or not as gRPC does.
  """
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit():
    raise errors.UserError(
        f"--config.ray.address={address} is not HOST:PORT, auto or local"
    )
  try:
    with socket.create_connection((host, int(port)), _ANSWER_S) as link:
      if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
        return  # It speaks behind a handshake.
      link.settimeout(_ANSWER_S)
      link.sendall(_HELLO)
      answer = link.recv(9)
  except OSError as error:
    raise ConnectionError(f"nobody answers ({error})") from None
  if answer[3:5] != _SETTINGS:
    raise ConnectionError("what answers is no cluster's head")


def _note_open(address: str):
  """Says so where a cluster is open to whoever reaches it."""
  is_open = os.environ.get("RAY_AUTH_MODE", "disabled") != "token"
  if is_open and not address.startswith(("127.", "localhost")):
    progress.note(
        "this Ray cluster takes commands from whoever reaches its ports: start"
        " it with RAY_AUTH_MODE=token on every host, or keep it in a network"
        " of its own"
    )


def _tail(error: BaseException) -> str:
  """The last words of an error: of a trace they say what it was."""
  return " ".join(str(error).split())[-200:]


def _line(error: BaseException) -> str:
  """What an error says, in one line without its trace."""
  text = " ".join(str(error).split())
  return re.sub(r"\x1b\[[0-9;]*m", "", text)[:300]
