"""What `open_sampler` opens; vLLM's own errors are tested where it is."""

import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import models
from selfdev_jax import progress
from selfdev_jax import sampling
from selfdev_jax.sampling import engine
from selfdev_jax.sampling import vllm
from selfdev_jax.tiny import corpus

_DECODER = models.DecoderConfig(
    vocab_size=280, embed=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=12
)
_SETTINGS = config_lib.Vllm()


@pytest.fixture(scope="module")
def opened(tmp_path_factory, random_params):
  """opened(kind, params=None, **more) of a random model; and its parameters."""
  directory = tmp_path_factory.mktemp("engine")
  documents = [corpus.Document("two and two is", "four")]
  tokenizer = corpus.train_tokenizer(documents, _DECODER.vocab_size)
  corpus.save_tokenizer(tokenizer, directory)
  params = random_params(_DECODER)

  def open_one(kind, params=params, settings=_SETTINGS, **more):
    return engine.open_sampler(
        kind,
        _DECODER,
        params,
        convert.load_tokenizer(directory),
        directory,
        longest=32,
        log_dir=directory / "logs",
        settings=settings,
        **more,
    )

  open_one.params, open_one.directory = params, directory
  return open_one


def test_jax(opened):
  sampler = opened("jax")
  assert isinstance(sampler, sampling.JaxSampler)
  sampler.swap_weights(opened.params, "seed")
  sampler.health()
  assert not (opened.directory / "logs").exists()


def test_vllm_gets_what_it_needs(opened, monkeypatch):
  given = {}
  monkeypatch.setattr(
      vllm, "VllmSampler", lambda *args, **more: given.update(more, args=args)
  )
  settings = config_lib.Vllm(
      transport="nccl", tensor_parallel=2, gpu_memory_utilization=0.7
  )
  opened("vllm", settings=settings, python="py", address="http://x")
  decoder, _, eos = given.pop("args")
  assert decoder == _DECODER and eos == (1,)
  assert given == {
      "directory": opened.directory,
      "dtype": "float32",
      "max_length": 32,
      "log_dir": opened.directory / "logs",
      "python": "py",
      "address": "http://x",
      "transport": "nccl",
      "workers": 2,
      "arguments": [
          "--gpu-memory-utilization=0.7",
          "--tensor-parallel-size=2",
      ],
      "start_timeout_s": settings.start_timeout_s,
      "stall_timeout_s": settings.stall_timeout_s,
  }


def test_vllm_serves_one_dtype(opened):
  norm = opened.params["final_norm"].astype("float16")
  mixed = {**opened.params, "final_norm": norm}
  with pytest.raises(sampling.SamplerError, match="float16 and float32, vLLM"):
    opened("vllm", mixed)


def test_no_other_sampler(opened):
  with pytest.raises(ValueError, match="'tgi'"):
    opened("tgi")


@pytest.mark.parametrize(
    ("backend", "preallocate", "said"),
    [("gpu", None, 1), ("gpu", "false", 0), ("cpu", None, 0)],
)
def test_a_gpu_that_is_shared_is_told_of(
    backend, preallocate, said, monkeypatch
):
  notes = []
  monkeypatch.setattr(progress, "note", notes.append)
  monkeypatch.setattr(engine.jax, "default_backend", lambda: backend)
  name = "XLA_PYTHON_CLIENT_PREALLOCATE"
  monkeypatch.delenv(name, raising=False)
  if preallocate:
    monkeypatch.setenv(name, preallocate)
  engine.check_shared_device("vLLM")
  assert len(notes) == said
  assert all("ahead of vLLM" in note and name in note for note in notes)
