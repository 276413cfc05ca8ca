"""Stands in for vLLM's server, and fails as it is told.

Run in place of the interpreter that has vLLM:

  fake_vllm.py -c SCRIPT                  what asks for vLLM: exit status 0
  fake_vllm.py -m MODULE --model=DIR ...  serves, by a forward pass in NumPy

NumPy instead of JAX because it starts in a tenth of the time, and a third
implementation of the decoder cannot share a mistake with the other two.

FAKE_VLLM_FAULTS names a JSON file of {fault: [value, ...]}. A fault takes the
first value off its list when it strikes, so that the next engine is well.
FAKE_VLLM_RECORD names a file that gets a line of JSON for what happens.
"""

import sys

if __name__ == "__main__" and sys.argv[1] == "-c":
  sys.exit(0)

import argparse
from http import server
import json
import os
import pathlib
import re
import signal
import subprocess
import threading
import time

import numpy as np
import safetensors.numpy
import tokenizers

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_FOREVER_S = 3600
_LOCK = threading.RLock()


def strike(fault, due=lambda value: True):
  """The value of a fault whose time has come, taken off its list; or None."""
  with _LOCK:
    if "FAKE_VLLM_FAULTS" not in os.environ:
      return None
    path = pathlib.Path(os.environ["FAKE_VLLM_FAULTS"])
    faults = json.loads(path.read_text())
    values = faults.get(fault, [])
    if not values or not due(values[0]):
      return None
    value = values.pop(0)
    path.write_text(json.dumps(faults))
    return value


def record(event, **details):
  if "FAKE_VLLM_RECORD" in os.environ:
    line = json.dumps({"event": event, "pid": os.getpid(), **details})
    with _LOCK, open(os.environ["FAKE_VLLM_RECORD"], "a") as file:
      print(line, file=file)


def die():
  os.kill(os.getpid(), signal.SIGKILL)


class RefusedError(Exception):
  """What vLLM answers with 400."""


class Model:
  """A Mistral decoder, in float32, under the names of its files."""

  def __init__(self, directory):
    self.config = json.loads((directory / "config.json").read_text())
    self.tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    path = directory / "tokenizer.json"
    self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    self._cache = {}  # vLLM's is wrong too if it is not reset.

  def text(self, tokens):
    return self._tokenizer.decode(tokens, skip_special_tokens=True)

  def forget(self):
    self._cache = {}

  def log_probs(self, tokens):
    """[len(tokens), vocabulary]: of what follows each."""
    key = tuple(tokens)
    if key not in self._cache:
      self._cache[key] = self._forward(tokens)
    return self._cache[key]

  def _forward(self, tokens):
    config, tensors = self.config, self.tensors
    heads, kv_heads = (
        config[f"num_{kind}_heads"] for kind in ("attention", "key_value")
    )
    size, n = config["head_dim"], len(tokens)

    def norm(x, name):
      mean = np.mean(x**2, axis=-1, keepdims=True)
      return x / np.sqrt(mean + config["rms_norm_eps"]) * tensors[name]

    rope = config.get("rope_parameters") or config
    frequencies = rope["rope_theta"] ** (-np.arange(0, size, 2) / size)
    angles = np.outer(np.arange(n), frequencies)
    turn = np.exp(1j * angles)[:, None]

    def rotate(x):
      halves = x[..., : size // 2] + 1j * x[..., size // 2 :]
      halves = halves * turn
      return np.concatenate([halves.real, halves.imag], -1)

    x = tensors["model.embed_tokens.weight"][list(tokens)].astype(np.float64)
    for i in range(config["num_hidden_layers"]):
      layer = f"model.layers.{i}."
      apply = (
          lambda y, name, layer=layer: y @ tensors[f"{layer}{name}.weight"].T
      )
      y = norm(x, f"{layer}input_layernorm.weight")
      q, k, v = (
          apply(y, f"self_attn.{part}_proj").reshape(n, -1, size)
          for part in "qkv"
      )
      q, k = rotate(q), rotate(k)
      k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
      logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
      logits = np.where(np.tri(n, dtype=bool), logits, -np.inf)
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      y = np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1)
      x = x + apply(y, "self_attn.o_proj")
      y = norm(x, f"{layer}post_attention_layernorm.weight")
      gate = apply(y, "mlp.gate_proj")
      y = gate / (1 + np.exp(-gate)) * apply(y, "mlp.up_proj")
      x = x + apply(y, "mlp.down_proj")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    logits = norm(x, "model.norm.weight") @ tensors[f"{head}.weight"].T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  def complete(self, prompt, request):
    """(tokens, reason to end, what ended it)."""
    rng = np.random.default_rng(request.get("seed"))
    tokens = []
    while len(tokens) < request["max_tokens"]:
      following = self.log_probs([*prompt, *tokens])[-1]
      tokens.append(_draw(following, request, rng))
      if tokens[-1] in request.get("stop_token_ids", ()):
        return tokens, "stop", tokens[-1]
      for stop in request.get("stop", ()):
        if stop in self.text(tokens):
          return tokens, "stop", stop
    return tokens, "length", None


def _draw(log_probs, request, rng):
  temperature = request["temperature"]
  if temperature == 0:
    return int(np.argmax(log_probs))
  probs = np.exp((log_probs - log_probs.max()) / temperature)
  probs /= probs.sum()
  order = np.argsort(-probs)
  before = np.cumsum(probs[order]) - probs[order]
  probs[order[before >= request.get("top_p", 1.0)]] = 0
  return int(rng.choice(len(probs), p=probs / probs.sum()))


class Engine:
  """The methods that change weights are those of selfdev_weights.Engine."""

  def __init__(self, options):
    self.options = options
    self.model = Model(options.model)
    self.version = "default"
    self._buffers = []
    self._incoming = {}
    self._completions = self._in_flight = 0
    self._paused = False
    self._changed = threading.Condition()

  def models(self):
    name, length = self.options.served_model_name, self.options.max_model_len
    return {"data": [{"id": name, "max_model_len": length}]}

  def complete(self, request):
    with self._changed:
      self._changed.wait_for(lambda: not self._paused)
      self._in_flight += 1
    try:
      return self._complete(request)
    finally:
      with self._changed:
        self._in_flight -= 1
        self._changed.notify_all()

  def _complete(self, request):
    if request["model"] != self.options.served_model_name:
      raise RefusedError(f"The model `{request['model']}` does not exist.")
    if "prompt_logprobs" not in request:  # Not the canary.
      with _LOCK:
        self._completions += 1
        number = self._completions
      if strike("die in completion", lambda k: number >= k):
        die()
      if strike("hang in completion"):
        time.sleep(_FOREVER_S)
      if strike("500 in completion"):
        raise RuntimeError("EngineCore encountered an issue")
      time.sleep(strike("slow") or 0)
    choices = []
    for i, prompt in enumerate(request["prompt"]):
      asked = len(prompt) + request["max_tokens"]
      if asked > self.options.max_model_len or not prompt:
        raise RefusedError(
            "This model's maximum context length is"
            f" {self.options.max_model_len} tokens. However, you requested"
            f" {asked} tokens."
        )
      tokens, reason, by = self.model.complete(prompt, request)
      choice = {
          "index": i,
          "text": self.model.text(tokens),
          "logprobs": None,
          "finish_reason": reason,
          "stop_reason": by,
          "prompt_logprobs": None,
      }
      if request.get("return_token_ids"):
        choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
      if request.get("prompt_logprobs") is not None:
        log_probs = self.model.log_probs(prompt)
        choice["prompt_logprobs"] = [None] + [
            {str(token): {"logprob": float(row[token])}}
            for row, token in zip(log_probs[:-1], prompt[1:], strict=True)
        ]
      choices.append(choice)
    # The order is not promised.
    return {"object": "text_completion", "choices": choices[::-1]}

  def pause(self):
    with self._changed:
      self._paused = True
      self._changed.wait_for(lambda: not self._in_flight)

  def resume(self):
    with self._changed:
      self._paused = False
      self._changed.notify_all()

  def init_transfer_engine(self, info):
    ours = self.model.config | {"dtype": self.options.dtype}
    for key, value in info["model"].items():
      if ours.get(key) != value:
        raise ValueError(
            f"this engine serves a model with {key} {ours.get(key)!r}, the"
            f" weights are of one with {value!r}"
        )
    self._buffers = [
        np.memmap(path, np.uint8, "r", shape=info["nbytes"])
        for path in info["buffers"]
    ]
    record("init", buffers=info["buffers"])

  def start_weight_update(self):
    if not self._paused:
      raise RuntimeError("weights are updated while texts are generated")
    self._incoming = {}

  def update_weights(self, info):
    if strike("die in update"):
      die()
    time.sleep(strike("slow in update") or 0)
    if strike("hang in update"):
      time.sleep(_FOREVER_S)
    if strike("500 in update"):
      raise RuntimeError("shapes do not match")
    tensors = info["tensors"]
    names = {name for name, *_ in tensors}
    for name in names:
      for group in _FUSED:
        part = re.search(rf"\.({'|'.join(group)})\.", name)
        whole = part and {
            name.replace(f".{part[1]}.", f".{other}.") for other in group
        }
        if whole and not whole <= names:
          raise ValueError(f"{name} came without {whole - names}")
    if names & self._incoming.keys():
      raise ValueError(f"{min(names & self._incoming.keys())} came twice")
    for name, dtype, shape, offset in tensors:
      dtype = np.dtype(dtype)
      nbytes = dtype.itemsize * int(np.prod(shape))
      data = self._buffers[info["buffer"]][offset : offset + nbytes]
      old = self.model.tensors[name]
      new = np.array(data).view(dtype).reshape(shape)
      assert (new.shape, new.dtype) == (old.shape, old.dtype), name
      self._incoming[name] = new
    record("update", names=sorted(names), buffer=info["buffer"])

  def finish_weight_update(self, version):
    if not strike("keep old weights"):
      self.model.tensors = self.model.tensors | self._incoming
    self.version = strike("wrong version") or version


def _serve(options):
  engine = Engine(options)

  class Handler(server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
      pass

    def _answer(self, work):
      try:
        status, answer = 200, work()
      except RefusedError as error:
        status, answer = 400, {"error": {"message": str(error), "code": 400}}
      except Exception as error:
        status, answer = 500, {"error": {"message": str(error), "code": 500}}
      body = json.dumps(answer or {}).encode()
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def do_GET(self):
      if self.path == "/health" and strike("never answer"):
        time.sleep(_FOREVER_S)
      answers = {
          "/health": dict,
          "/version": lambda: {"version": "0.0-fake"},
          "/v1/models": engine.models,
          "/weight_info": lambda: {"weight_version": engine.version},
      }
      self._answer(answers[self.path])

    def do_POST(self):
      length = int(self.headers.get("Content-Length", 0))
      body = json.loads(self.rfile.read(length) or "{}")
      path = self.path.partition("?")[0]

      def rename():
        engine.version = body["new_version"]

      def reset():
        if strike("keep cache"):
          return {"success": False}
        engine.model.forget()
        return {"success": True}

      answers = {
          "/v1/completions": lambda: engine.complete(body),
          "/pause": engine.pause,
          "/resume": engine.resume,
          "/reset_prefix_cache": reset,
          "/init_weight_transfer_engine": lambda: engine.init_transfer_engine(
              body["init_info"]
          ),
          "/start_weight_update": engine.start_weight_update,
          "/update_weights": lambda: engine.update_weights(body["update_info"]),
          "/finish_weight_update": lambda: engine.finish_weight_update(
              body["weight_version"]
          ),
          "/update_weight_version": rename,
      }
      if path != "/v1/completions":
        record("post", path=path)
      self._answer(answers[path])

  class Server(server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
      pass

  Server((options.host, options.port), Handler).serve_forever()


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("-m")
  parser.add_argument("--host")
  parser.add_argument("--port", type=int)
  parser.add_argument("--model", type=pathlib.Path)
  parser.add_argument("--served-model-name")
  parser.add_argument("--dtype")
  parser.add_argument("--max-model-len", type=int)
  options, _ = parser.parse_known_args()
  record("start", guard=os.getppid())
  if strike("die at start"):
    die()
  if strike("port taken"):
    sys.exit(
        "[Errno 98] error while attempting to bind: address already in use"
    )
  reason = strike("fail at start")
  if reason:
    print(f"ValueError: {reason}\nRuntimeError: Engine core failed", flush=True)
    sys.exit(1)
  if strike("child"):
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(flush=True); time.sleep(3600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()  # It ignores SIGTERM by now.
    record("child", child=child.pid)
  _serve(options)


if __name__ == "__main__":
  main()
