import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfdev_jax import sampling


class _Echo:
  """Says its prompt, the weights' version and the key."""

  engine = "echo 1"

  def swap_weights(self, params, version, lora=None):
    self._version = version

  def generate(self, prompts, keys=None, *, batch_size, n=1, **settings):
    said = []
    for i, prompt in enumerate(prompts):
      key = None if keys is None else np.asarray(jax.random.key_data(keys))[i]
      for j in range(n):
        text = f"{prompt} {self._version} {key} {j} {sorted(settings.items())}"
        said.append(sampling.Generation(text, True, (1, 2)))
    for start in range(0, len(said), batch_size):
      yield said[start : start + batch_size]

  def logprobs(self, rows):
    return [np.arange(len(row) - 1, dtype=np.float32) / 3 for row in rows]

  def health(self):
    pass

  def close(self):
    self.closed = True


_PROMPTS = ["one", "two", [3, 4, 5]]


def _keys(n):
  return jax.vmap(jax.random.key)(jnp.arange(n))


def _all(sampler, *args, **settings):
  settings = {"max_new_tokens": 4, "batch_size": 2} | settings
  return [g for b in sampler.generate(*args, **settings) for g in b]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "said.jsonl"


def test_it_says_again_what_was_said(path):
  recorder = sampling.Recorder(_Echo(), path, "a run")
  assert recorder.engine == "echo 1"
  said = []
  for version in ("a", "b"):
    recorder.swap_weights(None, version)
    said += _all(recorder, _PROMPTS, _keys(3), n=2, temperature=0.5)
    said += _all(recorder, _PROMPTS)
  rows = [[1, 2, 3], [4, 5]]
  logprobs = recorder.logprobs(rows)
  recorder.health()
  recorder.close()

  replay = sampling.ReplaySampler(path, "a run")
  assert replay.engine == "replay"
  again = []
  for version in ("a", "b"):
    replay.swap_weights(None, version)
    again += _all(
        replay, _PROMPTS, _keys(3), n=2, temperature=0.5, batch_size=4
    )
    again += _all(replay, _PROMPTS, top_p=1.0, stop=())
  assert again == said and len({g.text for g in said}) == len(said)
  np.testing.assert_array_equal(replay.logprobs(rows)[0], logprobs[0])
  replay.health()
  replay.close()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.5}, {"max_new_tokens": 5}, {"stop": ["x"]}]
)
def test_another_request_has_no_answer(path, settings):
  recorder = sampling.Recorder(_Echo(), path, "a run")
  recorder.swap_weights(None, "a")
  _all(recorder, _PROMPTS)
  replay = sampling.ReplaySampler(path, "a run")
  replay.swap_weights(None, "a")
  assert len(_all(replay, _PROMPTS)) == 3
  with pytest.raises(sampling.SamplerError, match="recorded with other"):
    _all(replay, _PROMPTS, **settings)
  replay.swap_weights(None, "b")
  with pytest.raises(sampling.SamplerError, match="weights 'b'"):
    _all(replay, _PROMPTS)


def test_a_file_that_is_no_recording_is_told_by_line(path):
  path.write_text('{"request": "a", "logprobs": []}\n{"reques\n')
  with pytest.raises(sampling.SamplerError, match="line 2"):
    sampling.ReplaySampler(path, "a run")
  with pytest.raises(sampling.SamplerError, match="no recording"):
    sampling.ReplaySampler(path.with_name("none"), "a run")


def test_half_a_line_of_a_killed_process_is_no_answer(path):
  for _ in range(2):
    recorder = sampling.Recorder(_Echo(), path, "a run")
    recorder.swap_weights(None, "a")
    _all(recorder, _PROMPTS)
    with path.open("a") as file:
      file.write('{"request": "')
    replay = sampling.ReplaySampler(path, "a run")
    replay.swap_weights(None, "a")
    assert len(_all(replay, _PROMPTS)) == 3
  assert len(path.read_text().splitlines()) == 7


def test_another_run_has_no_answer(path):
  recorder = sampling.Recorder(_Echo(), path, "a run")
  recorder.swap_weights(None, "a")
  _all(recorder, _PROMPTS)
  replay = sampling.ReplaySampler(path, "another")
  replay.swap_weights(None, "a")
  with pytest.raises(sampling.SamplerError, match="recorded with other"):
    _all(replay, _PROMPTS)
