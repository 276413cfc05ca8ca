"""What a sampler said, kept in a file, and said again from it."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from selfdev_jax import models
from selfdev_jax.sampling import sampler


def _digest(**request: Any) -> str:
  text = json.dumps(request, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _requests(
    run: str,
    version: str,
    prompts: Sequence[Any],
    keys: jax.Array | None,
    n: int,
    given: dict[str, Any],
) -> list[str]:
  """A digest of each prompt's request; its batch does not matter."""
  seeds = [None] * len(prompts)
  if keys is not None:
    seeds = np.asarray(jax.random.key_data(keys)).tolist()
  settings = {"temperature": 0.0, "top_p": 1.0, "stop": ()} | given
  settings |= {"n": n, "stop": list(settings["stop"])}
  return [
      _digest(run=run, version=version, prompt=prompt, seed=seed, **settings)
      for prompt, seed in zip(prompts, seeds, strict=True)
  ]


def _row(run: str, version: str, row: Sequence[int]) -> str:
  """A digest of the request for a row's log-probabilities."""
  return _digest(run=run, version=version, row=list(map(int, row)))


class Recorder:
  """A `Sampler` that keeps in a file what another one says.

  A line is {"request": SHA-256, "generations" or "logprobs": [...]}, in JSON.
  """

  def __init__(
      self, recorded: sampler.Sampler, path: str | os.PathLike, run: str
  ):
    """Appends to a file.

    Args:
      recorded: what is listened to.
      path: of the file.
      run: names the models and settings behind the versions; what was said in
        one run is no answer in another.
    """
    self._sampler = recorded
    self._run, self._version = run, ""
    self._path = pathlib.Path(path)
    if self._path.exists():  # A process that was killed left half a line.
      whole = self._path.read_bytes().rfind(b"\n") + 1
      os.truncate(self._path, whole)

  @property
  def engine(self) -> str:
    """The engine of the sampler that is recorded."""
    return self._sampler.engine

  def swap_weights(
      self,
      params: models.Params,
      version: str,
      lora: models.Params | None = None,
  ):
    """See `Sampler.swap_weights`."""
    self._version = version
    self._sampler.swap_weights(params, version, lora)

  def generate(
      self,
      prompts: Sequence[str | list[int]],
      keys: jax.Array | None = None,
      *,
      batch_size: int,
      n: int = 1,
      **settings: Any,
  ) -> Iterator[list[sampler.Generation]]:
    """See `Sampler.generate`."""
    digests = _requests(self._run, self._version, prompts, keys, n, settings)
    said = []
    for batch in self._sampler.generate(
        prompts, keys, batch_size=batch_size, n=n, **settings
    ):
      said += batch
      while len(said) >= n and digests:
        generations = [dataclasses.asdict(g) for g in said[:n]]
        self._write(digests.pop(0), generations=generations)
        said = said[n:]
      yield batch

  def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """See `Sampler.logprobs`."""
    found = self._sampler.logprobs(rows)
    for row, logprobs in zip(rows, found, strict=True):
      digest = _row(self._run, self._version, row)
      self._write(digest, logprobs=list(map(float, logprobs)))
    return found

  def _write(self, digest: str, **said: Any):
    with open(self._path, "a", encoding="utf-8") as file:
      print(json.dumps({"request": digest, **said}), file=file)

  def health(self):
    """See `Sampler.health`."""
    self._sampler.health()

  def close(self):
    """See `Sampler.close`."""
    self._sampler.close()


class ReplaySampler:
  """A `Sampler` without a model: it says what a `Recorder` kept."""

  engine = "replay"

  def __init__(self, path: str | os.PathLike, run: str):
    """Reads the recording of a run, see `Recorder`.

    Raises:
      SamplerError: if there is none, or a line of it does not parse.
    """
    self._run, self._version = run, ""
    self._said: dict[str, dict[str, Any]] = {}
    self._path = pathlib.Path(path)
    try:
      text = self._path.read_text(encoding="utf-8")
    except OSError as error:
      raise sampler.SamplerError(f"no recording to replay: {error}") from None
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
      lines.pop()  # Half a line, of a process that was killed.
    for number, line in enumerate(lines, start=1):
      try:
        entry = json.loads(line)
        self._said[entry["request"]] = entry
      except (ValueError, KeyError, TypeError):
        raise sampler.SamplerError(
            f"{path}, line {number}: not a line of a recording"
        ) from None

  def swap_weights(
      self,
      params: models.Params,
      version: str,
      lora: models.Params | None = None,
  ):
    """See `Sampler.swap_weights`; only the version matters."""
    del params, lora
    self._version = version

  def generate(
      self,
      prompts: Sequence[str | list[int]],
      keys: jax.Array | None = None,
      *,
      batch_size: int,
      n: int = 1,
      **settings: Any,
  ) -> Iterator[list[sampler.Generation]]:
    """See `Sampler.generate`.

    Raises:
      SamplerError: if the recording has no such request.
    """
    digests = _requests(self._run, self._version, prompts, keys, n, settings)
    said = [
        sampler.Generation(**{**kept, "tokens": tuple(kept["tokens"])})
        for digest in digests
        for kept in self._look_up(digest)["generations"]
    ]
    for start in range(0, len(said), batch_size):
      yield said[start : start + batch_size]

  def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """See `Sampler.logprobs`."""
    digests = [_row(self._run, self._version, row) for row in rows]
    return [np.float32(self._look_up(digest)["logprobs"]) for digest in digests]

  def _look_up(self, digest: str) -> dict[str, Any]:
    if digest not in self._said:
      raise sampler.SamplerError(
          f"{self._path} has no answer to this request (weights"
          f" {self._version!r}); it was recorded with other settings"
      )
    return self._said[digest]

  def health(self):
    """See `Sampler.health`."""

  def close(self):
    """See `Sampler.close`."""
