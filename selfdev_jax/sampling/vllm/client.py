"""vLLM's HTTP interface, the calls that we make of it."""

from collections.abc import Sequence
from typing import Any

import httpx2 as httpx

from selfdev_jax.sampling import sampler
from selfdev_jax.sampling.vllm.error import EngineError

_CONNECT_S = 10.0
CONNECTIONS = 128


class Client:
  """One server. Methods may be called from several threads.

  All raise EngineError where the server is gone or fails, and SamplerError
  where it refuses what it was asked.
  """

  def __init__(self, address: str):
    try:
      url = httpx.URL(address)
    except httpx.InvalidURL as error:
      raise sampler.SamplerError(
          f"there is no vLLM server at {address}: {error}; an address looks"
          " like http://127.0.0.1:8000"
      ) from None
    self._http = httpx.Client(
        base_url=url,
        # A slow engine is not a lost one: who waits watches the process.
        timeout=httpx.Timeout(None, connect=_CONNECT_S),
        limits=httpx.Limits(
            max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS
        ),
        # Proxies are for other hosts.
        trust_env=False,
    )
    self._model = ""

  def close(self):
    self._http.close()

  def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
    try:
      response = self._http.request(method, path, **options)
    except (httpx.HTTPError, RuntimeError) as error:  # Closed meanwhile.
      raise EngineError(f"{path}: {error or type(error).__name__}") from None
    if response.is_server_error:
      raise EngineError(f"{path}: {_reason(response)}")
    if response.is_error:
      raise sampler.SamplerError(
          f"the vLLM server refused {path}: {_reason(response)}"
      )
    return response

  def health(self, timeout_s: float = 30.0):
    self._send("GET", "/health", timeout=timeout_s)

  def version(self) -> str:
    """VLLM's own."""
    return _json(self._send("GET", "/version"), "/version")["version"]

  def max_model_len(self) -> int | None:
    """Positions that the server has; also finds the name that it serves."""
    model = self._served()
    self._model = model["id"]
    return model.get("max_model_len")

  def serves(self, name: str) -> bool:
    """Whether it is the server of that model name."""
    return self._served()["id"] == name

  def _served(self) -> dict[str, Any]:
    return _json(self._send("GET", "/v1/models"), "/v1/models")["data"][0]

  def complete(
      self, rows: Sequence[Sequence[int]], **sampling: Any
  ) -> list[dict[str, Any]]:
    """The choices of /v1/completions, in the order of `rows`."""
    body = {
        "model": self._model,
        "prompt": [list(row) for row in rows],
        "return_token_ids": True,
        **sampling,
    }
    answer = _json(
        self._send("POST", "/v1/completions", json=body), "/v1/completions"
    )
    try:
      choices = sorted(answer["choices"], key=lambda choice: choice["index"])
      for choice in choices:
        len(choice["token_ids"])
    except (LookupError, TypeError) as error:
      raise EngineError(
          f"/v1/completions: no answer that vLLM gives: {error!r}"
      ) from None
    if len(choices) != len(rows):
      raise EngineError(
          f"/v1/completions: {len(choices)} answers to {len(rows)} prompts"
      )
    return choices

  # Weight transfer, as in vLLM's entrypoints/rl/online/api_router.py.

  def pause(self):
    """Waits for requests in flight, and holds those that come."""
    self._send("POST", "/pause", params={"mode": "wait"})

  def resume(self):
    self._send("POST", "/resume")

  def reset_prefix_cache(self):
    path = "/reset_prefix_cache"
    if not _json(self._send("POST", path), path).get("success"):
      raise EngineError(f"{path}: it still holds what the old weights computed")

  def init_weight_transfer_engine(self, init_info: dict[str, Any]):
    self._send(
        "POST", "/init_weight_transfer_engine", json={"init_info": init_info}
    )

  def start_weight_update(self):
    self._send("POST", "/start_weight_update")

  def update_weights(self, update_info: dict[str, Any]):
    self._send("POST", "/update_weights", json={"update_info": update_info})

  def finish_weight_update(self, version: str):
    self._send(
        "POST", "/finish_weight_update", json={"weight_version": version}
    )

  def update_weight_version(self, version: str):
    self._send("POST", "/update_weight_version", json={"new_version": version})

  def weight_version(self) -> str | None:
    answer = self._send("GET", "/weight_info")
    return _json(answer, "/weight_info")["weight_version"]


def _json(response: httpx.Response, path: str) -> Any:
  try:
    return response.json()
  except ValueError:
    raise EngineError(f"{path}: the answer is no JSON") from None


def _reason(response: httpx.Response) -> str:
  """The server's own words, in one line."""
  text = response.text
  try:
    answer = response.json()
    error = answer.get("error", answer)
    text = error.get("message", error) if isinstance(error, dict) else error
  except (ValueError, AttributeError):
    pass
  return f"{response.status_code} {' '.join(str(text).split())[:500]}"
