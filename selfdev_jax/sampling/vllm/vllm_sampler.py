"""The sampler behind which a vLLM server stands, fed with weights from JAX."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import concurrent.futures
import functools
import pathlib
import shlex
import time
from typing import Any
from typing import TypeVar

import jax
import numpy as np
import transformers

from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax.sampling import jax_sampler
from selfdev_jax.sampling import sampler
from selfdev_jax.sampling.vllm import background
from selfdev_jax.sampling.vllm import client as client_lib
from selfdev_jax.sampling.vllm import server as server_lib
from selfdev_jax.sampling.vllm import transport as transport_lib
from selfdev_jax.sampling.vllm.error import EngineError

_ATTEMPTS = 3
_BACK_OFF_S = 1.0
_SECONDS_BETWEEN_LOOKS = 1.0
_GREEDY_CALLS = 16  # A batch's, so that a slow engine is heard of.
_CANARY_TOKENS = 16
_MAX_SEED = np.uint64(2**63 - 1)  # vLLM takes a signed number.
# Largest difference of a log-probability between vLLM and JAX on the same
# weights, by 1 + the largest itself: what rounding gives. Other weights differ
# by nats.
_CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03, "float16": 4e-3}
# What vLLM gives for minus infinity.
_LEAST_LOGPROB = -9999.0

T = TypeVar("T")


class VllmSampler:
  """A `Sampler`; an engine that fails is replaced, and its work repeated."""

  def __init__(
      self,
      decoder: models.DecoderConfig,
      tokenizer: transformers.PreTrainedTokenizerBase,
      eos: tuple[int, ...],
      *,
      directory: pathlib.Path,
      dtype: Any,
      max_length: int,
      log_dir: pathlib.Path,
      python: pathlib.Path | None = None,
      address: str | None = None,
      transport: str = "shm",
      workers: int = 1,
      arguments: Sequence[str] = (),
      start_timeout_s: float = 600.0,
      stall_timeout_s: float = 1800.0,
  ):
    """Starts a server, or meets the one at `address`.

    Args:
      decoder: the model's shape.
      tokenizer: its tokenizer.
      eos: the tokens that end a text.
      directory: Hugging Face directory of a model of that shape, which a server
        of our own begins with.
      dtype: of the weights.
      max_length: positions that prompt and completion need at most.
      log_dir: gets the logs of servers of our own.
      python: see `server.find_python`.
      address: of a server of the user's, http://127.0.0.1:8000.
      transport: shm, cuda_ipc or nccl.
      workers: GPUs that share a model.
      arguments: more for vLLM's command line.
      start_timeout_s: seconds until a server has to answer.
      stall_timeout_s: seconds without any answer after which an engine is
        given up.

    Raises:
      SamplerError: if vLLM is not installed or the address is of no such
        server.
    """
    self._decoder = decoder
    self._tokenizer = tokenizer
    self._eos = eos
    self._directory = directory
    self._dtype = np.dtype(dtype)
    self._expected = models.abstract_params(decoder)
    self._positions = min(max_length, decoder.max_positions)
    self._address = address
    self._transport_kind, self._workers = transport, workers
    self._stall_s = stall_timeout_s
    self._start_s = start_timeout_s
    self._options = None
    if address is None:
      self._options = server_lib.Options(
          python=server_lib.find_python(python),
          log_dir=log_dir,
          backend="nccl" if transport == "nccl" else "selfdev",
          max_length=self._positions,
          dtype=str(self._dtype),
          start_timeout_s=start_timeout_s,
          arguments=tuple(arguments),
      )
    self._server: server_lib.Server | None = None
    self._client: client_lib.Client | None = None
    self._transport: transport_lib.Transport | None = None
    self._held: dict[str, Any] = {}  # Leaves by path, as the engine has them.
    self._params = self._lora = self._applied = None
    self._version = self._held_version = ""
    self._is_closed = False
    self._is_whole = False  # No start and no update was cut short.
    self._doubted = ("", 0.0)  # Version, difference of the last canary.
    self._engine = "vllm"
    canary = np.random.default_rng(0).integers(
        decoder.vocab_size, size=min(_CANARY_TOKENS, self._positions - 1)
    )
    self._canary = canary.astype(np.int32)
    self._survive(self._ready)

  @property
  def engine(self) -> str:
    """Vllm and its version."""
    return self._engine

  # The engine's life.

  def _survive(self, work: Callable[[], T]) -> T:
    """Does `work`; with another engine, again, where this one fails."""
    for attempt in range(_ATTEMPTS):
      try:
        self._ready()
        return work()
      except EngineError as error:
        reason = f"{error}"
        if self._server is not None and str(self._server.log) not in reason:
          reason += self._server.cause()
        self._discard()
        if self._address is not None or attempt == _ATTEMPTS - 1:
          raise sampler.SamplerError(
              f"vLLM failed, try {attempt + 1}: {reason}"
          ) from None
        progress.note(
            f"vLLM failed ({reason}); a new engine is started, and what was"
            " under way is repeated"
        )
        time.sleep(_BACK_OFF_S * 2**attempt)
      except BaseException:
        if not self._is_whole:
          self._discard()
        raise
    raise AssertionError("unreachable")

  def _ready(self):
    """Has an engine, with the weights that were swapped in last."""
    if self._is_closed:
      raise sampler.SamplerError("this sampler was closed")
    if self._client is not None:
      if self._server is not None:
        self._server.mark()
      return
    self._is_whole = False
    if self._address is None:
      self._server = server_lib.Server(self._options, self._directory)
      self._client = self._server.client
    else:
      self._client = client_lib.Client(self._address)
    self._meet()
    # The first forward pass of an engine takes seconds more than others.
    self._logprobs([self._canary.tolist()])
    self._is_whole = True
    if self._params is not None:
      self._push()

  def _call(self, call: Callable[..., T], *arguments: Any) -> T:
    """One short call, within the time that a start may take."""
    calls = [functools.partial(call, *arguments)]
    return self._together(calls, self._start_s)[0]

  def _meet(self):
    """Asks the server who it is, and opens the way for weights."""
    client = self._client
    try:
      version = self._call(client.version)
      length = self._call(client.max_model_len)
    except (
        EngineError,
        sampler.SamplerError,
        LookupError,
        TypeError,
    ) as error:
      if self._address is None:
        raise
      raise sampler.SamplerError(
          f"there is no vLLM server at {self._address}: {error}"
      ) from None
    self._engine = f"vllm {version}"
    if length is not None and length < self._positions:
      raise sampler.SamplerError(
          f"the vLLM server has {length} positions, {self._positions} are"
          " needed; start it with a larger --max-model-len"
      )
    self._transport = transport_lib.make(
        self._transport_kind, self._decoder, self._dtype, self._workers
    )
    try:
      self._call(client.resume)  # Its last user may have been cut short.
      self._call(self._transport.connect, client, self._identity())
    except (EngineError, sampler.SamplerError) as error:
      if self._address is None:
        raise
      raise sampler.SamplerError(
          f"the vLLM server at {self._address} does not take our weights"
          f" ({error}); start it like this: {self._own_command()}"
      ) from None

  def _own_command(self) -> str:
    """How a user starts a server that we can use."""
    options = server_lib.Options(
        python=pathlib.Path("python"),
        log_dir=pathlib.Path(),
        backend=self._transport.backend,
        max_length=self._positions,
        dtype=str(self._dtype),
    )
    line = server_lib.command(options, self._directory, "selfdev", 8000, True)
    return (
        "VLLM_SERVER_DEV_MODE=1"
        f" PYTHONPATH={server_lib.ENGINE_SIDE} {shlex.join(line)}"
    )

  def _identity(self) -> dict[str, Any]:
    """What both sides' config.json have to agree on."""
    config = self._decoder
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp,
        "tie_word_embeddings": config.tied_head,
        "dtype": str(self._dtype),
    }

  def _discard(self):
    self._held = {}
    if self._transport is not None:
      self._transport.close()
    if self._server is not None:
      self._server.stop()
    elif self._client is not None:
      self._client.close()
    self._transport = self._server = self._client = None

  def health(self):
    """See `Sampler.health`."""
    if self._client is None:
      raise sampler.SamplerError("vLLM is not running")
    try:
      self._client.health()
    except EngineError as error:
      raise sampler.SamplerError(f"vLLM is not well: {error}") from None

  def close(self):
    """See `Sampler.close`."""
    self._is_closed = True
    self._params = self._lora = self._applied = None
    self._discard()

  # Weights.

  def swap_weights(
      self,
      params: models.Params,
      version: str,
      lora: models.Params | None = None,
  ):
    """See `Sampler.swap_weights`; only leaves that are other arrays are sent.

    An adapter is added to the weights in their own dtype, where JAX keeps it
    apart: in bfloat16 small updates are rounded. Arrays may be donated if the
    next call is a swap.
    """
    self._check(params, lora)
    self._params, self._lora, self._version = params, lora, version
    self._applied = params
    if lora is not None:
      self._applied = convert.apply_adapter(params, convert.Adapter(lora, 1.0))
    self._survive(self._push)

  def _check(self, params: models.Params, lora: models.Params | None):
    expected = self._expected
    if jax.tree.structure(params) != jax.tree.structure(expected):
      raise sampler.SamplerError(
          "these weights have other tensors than the model"
      )
    for path, leaf, _ in convert.named_leaves(self._decoder, params):
      shape = convert.get_path(expected, path).shape
      if leaf.shape != shape or np.dtype(leaf.dtype) != self._dtype:
        raise sampler.SamplerError(
            f"{path} is {leaf.dtype}{list(leaf.shape)}; vLLM serves"
            f" {self._dtype}{list(shape)}"
        )
      try:
        a, b = (convert.get_path(lora or {}, f"{path}/{x}") for x in "ab")
      except (KeyError, TypeError):
        continue
      rank = a.shape[1]
      wanted = (shape[0], rank, shape[-1]), (*shape[:2], rank)
      if (a.shape, b.shape) != wanted:
        raise sampler.SamplerError(
            f"the adapter of {path} is {list(a.shape)} and {list(b.shape)}; its"
            f" matrices are {list(shape)}"
        )

  def _push(self):
    leaves = {
        path: leaf
        for path, leaf, _ in convert.named_leaves(self._decoder, self._applied)
    }
    other = {p for p, leaf in leaves.items() if self._held.get(p) is not leaf}
    if not other:
      if self._held_version != self._version:
        self._call(self._client.update_weight_version, self._version)
        self._held_version = self._version
      return
    paths = transport_lib.whole_groups(other) & leaves.keys()
    # JAX computes it while the weights are on their way.
    canary = jax_sampler.token_logprobs(
        self._decoder, self._params, self._canary[None], self._lora
    )
    self._is_whole = False
    (found,) = self._together([lambda: self._transfer(paths)])
    if found != self._version:
      raise EngineError(
          f"it has the weights {found!r} after {self._version!r} were sent"
      )
    self._check_canary(np.asarray(canary)[0])
    self._held, self._held_version = leaves, self._version
    self._is_whole = True

  def _transfer(self, paths: set[str]) -> str | None:
    """Sends leaves; returns the version that the engine says it has then."""
    client, transport = self._client, self._transport
    client.pause()
    client.start_weight_update()
    transport.send(
        client, transport_lib.groups(self._decoder, self._applied, paths)
    )
    client.finish_weight_update(self._version)
    client.reset_prefix_cache()
    client.resume()
    return client.weight_version()

  def _check_canary(self, expected: np.ndarray):
    """Asserts that vLLM computes with these weights what JAX computes.

    Some weights compute nothing sensible anywhere, as rounding decides: those
    whose difference is the same in a second engine, or not finite in JAX.
    """
    if not np.isfinite(expected).all():
      progress.note(f"the log-probabilities of {self._version} are not finite")
      return
    expected = np.maximum(expected, _LEAST_LOGPROB)
    (got,) = self._logprobs([self._canary.tolist()])
    worst = float(np.abs(got - expected).max())
    tolerance = _CANARY_TOLERANCE[str(self._dtype)]
    if worst <= tolerance * (1 + np.abs(expected).max()):
      return
    version, before = self._doubted
    self._doubted = (self._version, worst)
    said = f"after a swap its log-probabilities are off by {worst:.3g} nats"
    if version == self._version and np.isclose(worst, before, rtol=1e-3):
      progress.note(f"{said}, as another engine's were: {version} is kept")
      return
    raise EngineError(said)

  # Texts.

  def generate(
      self,
      prompts: Sequence[str | list[int]],
      keys: jax.Array | None = None,
      *,
      max_new_tokens: int,
      batch_size: int,
      n: int = 1,
      temperature: float = 0.0,
      top_p: float = 1.0,
      stop: Sequence[str] = (),
  ) -> Iterator[list[sampler.Generation]]:
    """See `Sampler.generate`."""
    asked = sampler.requests(
        self._tokenizer, prompts, keys, n, self._positions, max_new_tokens
    )
    settings = {
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop_token_ids": list(self._eos),
        "stop": list(stop),
    }
    for start in range(0, len(asked), batch_size):
      batch = asked[start : start + batch_size]
      choices = self._survive(lambda batch=batch: self._ask(batch, settings))
      yield [
          sampler.generation(
              self._tokenizer, choice["token_ids"], r, self._eos, stop
          )
          for choice, r in zip(choices, batch, strict=True)
      ]

  def _ask(
      self, batch: list[sampler.Request], settings: Mapping[str, Any]
  ) -> list[dict[str, Any]]:
    """The choices of a batch, of a few calls if greedy, else of one each."""
    if settings["temperature"] == 0:
      size = -(-len(batch) // _GREEDY_CALLS)
      calls = [
          functools.partial(
              self._client.complete,
              [request.tokens for request in batch[i : i + size]],
              **settings,
          )
          for i in range(0, len(batch), size)
      ]
      return [choice for some in self._together(calls) for choice in some]
    seeds = np.asarray(
        jax.random.key_data(jax.numpy.stack([r.key for r in batch]))
    ).astype(np.uint64)
    seeds = ((seeds[:, 0] << np.uint64(32)) | seeds[:, 1]) & _MAX_SEED
    calls = [
        lambda r=r, s=int(seed): self._client.complete(
            [r.tokens], seed=s, **settings
        )
        for r, seed in zip(batch, seeds, strict=True)
    ]
    return [choice for (choice,) in self._together(calls)]

  def _together(
      self, calls: Sequence[Callable[[], T]], limit_s: float | None = None
  ) -> list[T]:
    """Results of calls to the server, which is watched meanwhile."""
    futures = background.submit(calls, client_lib.CONNECTIONS)
    try:
      waiting = progress.Waiting("Waiting for vLLM")
      pending, last_answer = set(futures), time.monotonic()
      while pending:
        done, pending = concurrent.futures.wait(
            pending,
            _SECONDS_BETWEEN_LOOKS,
            concurrent.futures.FIRST_COMPLETED,
        )
        for future in done:
          future.result()
          last_answer = time.monotonic()
        silent = time.monotonic() - last_answer
        if pending and not done:
          self._look(silent, limit_s or self._stall_s)
          waiting.tell(f"{len(pending)} of {len(calls)} answers to come")
      return [future.result() for future in futures]
    finally:
      for future in futures:
        future.cancel()

  def _look(self, silent_s: float, limit_s: float):
    if self._server is not None:
      self._server.check()
    if silent_s > limit_s:
      raise EngineError(f"it gave no answer for {silent_s:.0f} s")

  def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """See `Sampler.logprobs`."""
    return self._survive(lambda: self._logprobs(rows))

  def _logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    (choices,) = self._together(
        [
            lambda: self._client.complete(
                rows, max_tokens=1, temperature=0.0, prompt_logprobs=0
            )
        ]
    )
    return [
        np.array(
            [
                given[str(token)]["logprob"]
                for given, token in zip(
                    choice["prompt_logprobs"][1:], row[1:], strict=True
                )
            ],
            np.float32,
        )
        for choice, row in zip(choices, rows, strict=True)
    ]
