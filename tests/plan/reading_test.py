"""What a plan learns without fetching or loading."""

import dataclasses

import huggingface_hub
import pytest

from configs import paper_gsm8k
from configs import smoke
from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import evaluation
from selfdev_jax import models
from selfdev_jax import records
from selfdev_jax.plan import reading
from selfdev_jax.plan import shapes

_SMOKE = config_lib.from_config_dict(smoke.get_config())
_DECODER = models.DecoderConfig(
    vocab_size=40, embed=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
  """No answer of another test, no cache of this machine."""
  monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
  reading.ask_hub.cache_clear()
  reading.hub_answers.cache_clear()


def test_where_models_are(tmp_path, random_params):
  convert.save(tmp_path / "model", _DECODER, random_params(_DECODER))
  names = (str(tmp_path / "model"), "org/name@v1", "nowhere")
  config = dataclasses.replace(_SMOKE, seed_model="tiny:seed", experts=names)
  seed, here, hub, nowhere = reading.places(config).values()
  assert (seed.path, seed.hub) == (None, None)  # Not trained yet.
  assert here.path == tmp_path / "model" and here.hub is None
  assert (hub.hub, hub.revision, hub.path) == ("org/name", "v1", None)
  assert (nowhere.hub, nowhere.path) == (None, None)


def test_a_shape_is_read_where_it_can_be(tmp_path, random_params):
  convert.save(tmp_path / "model", _DECODER, random_params(_DECODER))
  place = reading.Place("x", tmp_path / "model")
  decoder, itemsize, how = reading.shape(place, _SMOKE)
  assert (decoder, itemsize) == (_DECODER, 4) and how.startswith("read in")
  (tmp_path / "model" / "model.safetensors").unlink()
  decoder, itemsize, how = reading.shape(place, _SMOKE)
  assert (decoder, itemsize) == (_DECODER, 2) and "config.json" in how


def test_else_it_is_the_table_s_or_not_known():
  name = "openchat/openchat-3.5-1210"
  decoder, _, how = reading.shape(reading.Place(name, None, name), _SMOKE)
  assert decoder == shapes.SHAPES[name] and "table" in how
  assert reading.shape(reading.Place("a/b", None, "a/b"), _SMOKE) is None
  tiny, itemsize, _ = reading.shape(reading.Place("tiny:seed", None), _SMOKE)
  assert (tiny.embed, tiny.layers, itemsize) == (64, 2, 4)


def test_the_hub_is_asked_for_commit_sizes_and_gate(monkeypatch):
  files = [
      huggingface_hub.hf_api.RepoSibling(rfilename=name, size=size)
      for name, size in (
          ("model-00001-of-00002.safetensors", 5),
          ("model-00002-of-00002.safetensors", 7),
          ("pytorch_model.bin", 100),
      )
  ]
  info = huggingface_hub.ModelInfo(id="a/b", sha="c0ffee", gated="manual")
  info.siblings = files
  monkeypatch.setattr(
      huggingface_hub.HfApi, "model_info", lambda *_, **__: info
  )
  found = reading.ask_hub("a/b", None)
  assert found == reading.OnHub("c0ffee", 12, True, True)


def test_a_hub_out_of_reach_is_no_answer():
  # The tests are offline (conftest.py).
  found = reading.ask_hub("a/b", None)
  assert found.error and not found.answered
  assert not reading.hub_answers()
  assert not reading.may_fetch("a/b")


def test_items_or_why_not():
  found = reading.items(_SMOKE)
  assert [len(found[split]) for split in (records.DEV, records.TEST)] == [
      60,
      120,
  ]
  settings = dataclasses.replace(_SMOKE.evaluate, task="chess")
  why = reading.items(dataclasses.replace(_SMOKE, evaluate=settings))
  assert "chess" in why


def test_items_of_the_hub_are_not_fetched(monkeypatch):
  seen = []

  def load(settings):
    seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)
    return evaluation.Task(lambda split, n: [], (), lambda *_: [])

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(evaluation, "load", load)
  reading.items(_SMOKE)
  assert seen == [True]
  assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_lengths_count_shots_and_what_prompts_share():
  shots = "Question: a\nAnswer: b\n\n" * 28
  items = [evaluation.Item(f"{shots}{x}", "c" * 28) for x in ("12", "34")]
  found = {records.DEV: items, records.TEST: items}
  got = reading.lengths(_SMOKE, found, None)
  assert got.question == round((len(shots) + 2) / 2.8)
  assert got.shared == round(len(shots) / 2.8)
  gsm8k = paper_gsm8k.CONFIG
  assert reading.lengths(gsm8k, found, None).answer == 10
  # Without items, those of the published files.
  assert 900 < reading.lengths(gsm8k, "none", None).question < 1100
