"""The far side: what Ray starts on the hosts of a cluster.

Everything here runs in processes of their own, and talks to cluster.py in the
small messages of work.py. Only these two modules know Ray.
"""

from collections.abc import Hashable
from collections.abc import Sequence
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import os
import pathlib
import shutil
import socket
import threading
import time

import jax
import numpy as np
import ray

from selfdev_jax import cache
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import evaluation
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax import sandbox
from selfdev_jax.dpo import processes
from selfdev_jax.dpo import step as step_lib
from selfdev_jax.executors import versions as versions_lib
from selfdev_jax.executors import work as work_lib
from selfdev_jax.executors import worker as worker_lib
from selfdev_jax.sampling import jax_sampler

_CANARY_TOKENS = 16
CANARY_S = 60.0  # A worker shows that it computes rightly at least so often.
_SCHEDULERS = ("OMPI_", "SLURM_")
_PART = 1 << 28  # Bytes of a model's file in one object.
_SEEN_S = 10.0  # Shared file systems show what is new a little later.


def canary(loaded: worker_lib.Models) -> np.ndarray:
  """Log-probabilities of fixed tokens under the seed model, in nats."""
  vocabulary = loaded.decoder.vocab_size
  tokens = np.random.default_rng(0).integers(vocabulary, size=_CANARY_TOKENS)
  row = tokens[None].astype(np.int32)
  found = jax_sampler.token_logprobs(loaded.decoder, loaded.seed, row)
  return np.asarray(found)[0]


def _told(method):
  """The method with its `UserError` as a reply: one line crosses, no trace."""

  @functools.wraps(method)
  def wrapped(*args, **kwargs):
    start = time.monotonic()
    try:
      reply = method(*args, **kwargs)
    except errors.UserError as error:
      return work_lib.Reply(error=str(error))
    except worker_lib.StoppedError:
      return work_lib.Reply(is_stopped=True)
    return dataclasses.replace(reply, seconds=time.monotonic() - start)

  return wrapped


def pack(responses: Sequence[records.Response]) -> list[tuple]:
  """Without what the head has: number, question and gold answer."""
  return [
      (r.text, r.extracted, r.correct, r.truncated, r.trouble)
      for r in responses
  ]


def unpack(
    packed: Sequence[tuple], items: Sequence[evaluation.Item], first: int
) -> tuple[records.Response, ...]:
  """The responses that `pack` was given.

  Args:
    packed: answers to `items`, in their order.
    items: of the split, from `first` on.
    first: the number of the first.
  """
  return tuple(
      records.Response(
          first + i, item.prompt, text, item.gold, extracted, *rest
      )
      for i, (item, (text, extracted, *rest)) in enumerate(
          zip(items, packed, strict=True)
      )
  )


class Doer:
  """A worker: one process with its device group, models and sampler."""

  def __init__(self, setup: work_lib.Setup):
    """Only keeps what it is told; `open` does the rest."""
    # Merging and vLLM have processes of their own on the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    self._setup = setup
    self._stack = contextlib.ExitStack()
    self._loaded: worker_lib.Models | None = None
    self._worker: worker_lib.Worker | None = None
    self._box: sandbox.Sandbox | None = None
    self._factory = ""
    self._shown = 0.0
    self._stopped: set[tuple[str, Hashable]] = set()
    self._lock = threading.Lock()

  def versions(self) -> dict[str, str]:
    """See `versions.here`."""
    return versions_lib.here(self._setup.vllm_python, self._setup.kind)

  @_told
  def open(self) -> work_lib.Reply:
    """Reads the models and starts the sampler; the value is a `Hello`."""
    setup = self._setup
    config = setup.config
    _check_seen(setup)
    paths = _resolve(setup)
    _check_items(setup)
    self._loaded = worker_lib.load(config, paths, self._stack)
    self._box = self._stack.enter_context(
        sandbox.Sandbox(
            config.sandbox,
            self._loaded.merges.shapes,
            len(config.experts),
            setup.allow_weak_sandbox,
            setup.lanes,
        )
    )
    log_dir = cache.directory() / "workers" / f"{setup.token}-{os.getpid()}"
    sampler = self._stack.enter_context(
        contextlib.closing(
            worker_lib.open_sampler(
                setup.kind,
                config.vllm,
                self._loaded,
                setup.longest,
                log_dir,
                setup.vllm_python,
            )
        )
    )
    self._worker = worker_lib.Worker(self._loaded, sampler, config.evaluate)
    self._shown = time.monotonic()
    return work_lib.Reply(
        work_lib.Hello(
            sampler.engine,
            self._box.layers(),
            jax.devices()[0].device_kind,
            self.show(),
        )
    )

  def show(self) -> np.ndarray:
    """See `canary`."""
    return canary(self._loaded)

  @_told
  def do(self, piece: work_lib.Piece) -> work_lib.Reply:
    """Does a piece, unless it was stopped before."""
    work = getattr(self, f"_{piece.kind}")
    name = piece.kind, piece.key
    try:
      if self._is_stopped(name):
        raise worker_lib.StoppedError
      value = work(piece.payload, functools.partial(self._is_stopped, name))
    finally:
      with self._lock:
        self._stopped.discard(name)
    shown = None
    if time.monotonic() - self._shown > CANARY_S:
      shown, self._shown = self.show(), time.monotonic()
    return work_lib.Reply(value, canary=shown)

  @ray.method(concurrency_group="control")
  def stop(self, kind: str, key: Hashable):
    """Has a piece left between two batches, or not begun."""
    with self._lock:
      self._stopped.add((kind, key))

  def close(self):
    """Ends the sampler, the merging process and the sandbox."""
    self._stack.close()

  def _is_stopped(self, name) -> bool:
    with self._lock:
      return name in self._stopped

  def _sample(self, payload, is_stopped):
    """A batch of (text, finished, truncated)."""
    work, adapter = payload
    if self._factory != work.factory:
      # By reference: it comes to a host once, whoever asks there.
      weights = None if adapter is None else ray.get(adapter)
      self._worker.hold_factory(work.factory, weights)
      self._factory = work.factory
    batches = self._worker.sample(
        work.prompt,
        jax.random.wrap_key_data(work.keys),
        self._setup.config.propose,
        temperature=work.temperature,
    )
    with contextlib.closing(batches):
      texts = []
      for batch in batches:
        if is_stopped():
          raise worker_lib.StoppedError
        texts += [(g.text, g.finished, g.truncated) for g in batch]
    return self._worker.engine, texts

  def _admit(self, sources, is_stopped):
    verdicts = []
    with contextlib.closing(self._box.admit_all(sources)) as found:
      for verdict in found:
        if is_stopped():
          raise worker_lib.StoppedError
        verdicts.append(verdict)
    return verdicts

  def _answer(self, work, is_stopped):
    self._factory = ""
    answered = self._worker.answer(work, is_stopped)
    return dataclasses.replace(answered, responses=pack(answered.responses))

  def _export(self, payload, is_stopped):
    del is_stopped  # It is short, and wanted.
    name, program, directory = payload
    self._factory = ""
    self._worker.export(name, program, pathlib.Path(directory))


def _check_seen(setup: work_lib.Setup):
  """Looks whether this host sees the workdir.

  Raises:
    UserError: naming host and path.
  """
  end = time.monotonic() + _SEEN_S
  while not setup.seen.exists():
    if time.monotonic() > end:
      raise errors.UserError(
          f"host {socket.gethostname()} does not see the workdir"
          f" {setup.workdir}; put it on storage that all hosts share, under"
          " one path"
      )
    # What is listed anew is not from a cache.
    with contextlib.suppress(OSError):
      os.listdir(setup.workdir)
    time.sleep(0.2)


def _check_items(setup: work_lib.Setup):
  """Looks whether this host asks the same questions as the head.

  Raises:
    UserError: naming the host.
  """
  if evaluation.digest_items(setup.config.evaluate) != setup.items:
    raise errors.UserError(
        f"host {socket.gethostname()} has other questions of"
        f" {setup.config.evaluate.task} than the head; its data files, or its"
        " copy of the hub's, are others: copy them anew"
    )


def _resolve(setup: work_lib.Setup) -> dict[str, pathlib.Path]:
  """The models' directories on this host.

  Raises:
    UserError: naming host and path, where it has none or another.
  """
  paths, host = {}, socket.gethostname()
  if setup.files is None:
    anew = "copy it anew"
    hint = (
        "put it where all hosts see it under one path, name it on the hub, or"
        " give --config.ray.models=store"
    )
  else:
    hint = anew = "delete it there: then it is copied anew"
  for name, where in setup.models.items():
    if setup.files is not None:
      where = _fetch(name, setup.files[name])
    try:
      paths[name] = convert.resolve(where)
      found = convert.digest(paths[name])
    except (errors.UserError, OSError) as error:
      raise errors.UserError(
          f"host {host} does not see model {name} at {where} ({error}); {hint}"
      ) from None
    if found != setup.digests[name]:
      raise errors.UserError(
          f"model {name} at {where} on host {host} is another than the head's"
          f" (digest {found[:12]}, there {setup.digests[name][:12]}); {anew}"
      )
  return paths


def put_files(directory: pathlib.Path) -> work_lib.Files:
  """Puts what a model needs into the object store."""
  parts, whole = {}, hashlib.sha256()
  for name in convert.file_names(directory):
    path, found, parts[name] = directory / name, hashlib.sha256(), []
    for at in range(0, path.stat().st_size, _PART):
      part = np.fromfile(path, np.uint8, _PART, offset=at)
      found.update(part)
      parts[name].append(ray.put(part))
    whole.update(f"{name} {found.hexdigest()}\n".encode())
  return work_lib.Files(whole.hexdigest(), parts)


def _fetch(name: str, files: work_lib.Files) -> pathlib.Path:
  """This host's copy of a model, which all its workers and later runs read.

  Raises:
    UserError: naming host and path, where it cannot be written.
  """
  home = cache.directory() / "models"
  whole, partial = home / files.digest, home / f"{files.digest}.tmp"
  try:
    home.mkdir(parents=True, exist_ok=True)
    with open(home / f"{files.digest}.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # Waits while another fetches it.
      if not whole.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for file_name, parts in files.parts.items():
          with open(partial / file_name, "wb") as file:
            for part in parts:
              file.write(ray.get(part))
        partial.rename(whole)
  except (OSError, ray.exceptions.RayError) as error:
    reason = " ".join(str(error).split())[:300]
    raise errors.UserError(
        f"host {socket.gethostname()} cannot keep model {name} in {home}"
        f" ({reason}); make room there and in Ray's temporary directory, or"
        " name another place by SELFDEV_CACHE"
    ) from None
  return whole


class Trainer:
  """One process of a training, with all GPUs of its host."""

  def __init__(self, setup: work_lib.Setup):
    # Ray has started this process, and given it its devices: no scheduler of
    # the cluster's is to be asked for them.
    for name in list(os.environ):
      if name.startswith(_SCHEDULERS):
        del os.environ[name]
    self._setup = setup
    self._steps: list[tuple[int, dict[str, float]]] = []

  def address(self) -> str:
    """A HOST:PORT that is free here, for the processes to meet at."""
    host = ray.util.get_node_ip_address()
    with socket.socket() as free:
      free.bind((host, 0))
      return f"{host}:{free.getsockname()[1]}"

  @_told
  def train(
      self,
      training: work_lib.Training,
      coordinator: str,
      count: int,
      index: int,
  ) -> work_lib.Reply:
    """Trains with the others; see `worker.train`. The first has the result."""
    if count > 1:
      processes.join(coordinator, count, index)
    setup = self._setup
    directory = _resolve(setup)[setup.config.seed_model]
    decoder = convert.read_config(directory)
    shardings = models.shardings(decoder, step_lib.make_mesh(setup.config.dpo))
    trained = worker_lib.train(
        setup.config.dpo,
        decoder,
        convert.load(directory, shardings)[1],
        convert.load_tokenizer(directory),
        training,
        lambda step, metrics: self._steps.append((step, metrics)),
    )
    return work_lib.Reply(trained if index == 0 else None)

  @ray.method(concurrency_group="control")
  def steps(self, done: int) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of the steps taken here, but for the first `done`."""
    return list(itertools.islice(self._steps, done, None))
