"""Streamed is as in memory, bit by bit; a directory is there whole or not."""

import builtins
import dataclasses
import errno
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import merging
from selfdev_jax import models
from selfdev_jax.merging import recipes
from selfdev_jax.merging import stream

_ROOT = pathlib.Path(__file__).parents[2]
# Of three shapes of tensors only: each is compiled.
_DECODER = models.DecoderConfig(
    vocab_size=37,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=4,
    mlp=16,
    max_positions=64,
)
_DIFFERENT = dataclasses.replace(
    _DECODER, embed=24, layers=3, heads=3, kv_heads=1, head_dim=8, mlp=40
)
_UP = "model.layers.1.mlp.up_proj.weight"
_SUM = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters: {weight: 0.75}
  - model: b
    parameters: {weight: -0.5}
"""


def _save_family(root, params, config, dtype="float32"):
  """Directories base, a and b: a model and fine-tunes of it."""
  rng = np.random.default_rng(1)
  tune = lambda x: x + 0.1 * rng.normal(size=x.shape)
  for name in ("base", "a", "b"):
    tree = params if name == "base" else jax.tree.map(tune, params)
    tree = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree)
    convert.save(root / name, config, tree)


@pytest.fixture(scope="module")
def family(tmp_path_factory, random_params) -> pathlib.Path:
  root = tmp_path_factory.mktemp("family")
  _save_family(root, random_params(_DECODER), _DECODER)
  return root


@pytest.fixture
def place(family, tmp_path, monkeypatch) -> pathlib.Path:
  """Where outputs are written; recipes name the models without a path."""
  monkeypatch.chdir(family)
  (tmp_path / "place").mkdir()
  return tmp_path / "place"


@pytest.fixture
def merge(tmp_path, place):
  """merge(recipe, **options) -> the parameters of place/out."""

  def write_and_merge(text, **options):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    stream.merge_recipe(recipes.read(path), place / "out", **options)
    return convert.load(place / "out")[1]

  return write_and_merge


@pytest.fixture
def refuses(merge, place):
  """refuses(message, recipe): one line, and nothing is written."""

  def check(message, text=_SUM, **options):
    before = sorted(place.iterdir())
    with pytest.raises(errors.UserError, match=message) as caught:
      merge(text, **options)
    assert "\n" not in str(caught.value)
    assert sorted(place.iterdir()) == before

  return check


@pytest.fixture
def assert_same_bits():
  """assert_same_bits(got, expected): structure, dtypes, shapes and bytes."""

  def check(x, y):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

  return lambda got, expected: jax.tree.map(check, got, expected)


def _params(*names):
  return [convert.load(name)[1] for name in names]


@pytest.fixture
def changed(tmp_path):
  """changed(name, edit) -> a copy of the model, its tensors edited."""

  def copy(name, edit):
    new = tmp_path / "changed" / name
    shutil.copytree(name, new)
    path = new / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    # As transformers writes them: not aligned, but for one file in eight.
    for pad in ("", "x" * 8):
      safetensors.numpy.save_file(tensors, path, {"format": "pt", "pad": pad})
      with open(path, "rb") as file:
        if (8 + int.from_bytes(file.read(8), "little")) % 64:
          return new
    raise AssertionError("aligned")

  return copy


def _recipe(method, parameters, extra="", models_=("a", "b")):
  listed = "".join(f"  - model: {name}\n" for name in models_)
  return (
      f"merge_method: {method}\nbase_model: base\nmodels:\n{listed}"
      f"parameters: {parameters}\n{extra}"
  )


# ---- The numbers.


def test_streamed_is_as_in_memory(merge, assert_same_bits):
  found = merge(_SUM)
  base, *experts = _params("base", "a", "b")
  expected = merging.merge(
      "task_arithmetic", base, experts, weight=[0.75, -0.5]
  )
  assert_same_bits(found, expected)
  up = lambda tree: np.asarray(tree["layers"]["mlp"]["up"])
  numpy = up(base) + 0.75 * (up(experts[0]) - up(base))
  numpy -= 0.5 * (up(experts[1]) - up(base))
  np.testing.assert_allclose(up(found), numpy, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_random_numbers_are_as_in_memory(merge, assert_same_bits):
  """A tensor's key depends on the seed and the tensor, not on the way."""
  recipe = _recipe("dare_linear", "{weight: 0.7, density: 0.5}")
  base, *experts = _params("base", "a", "b")
  found = merge(recipe, seed=3)
  expected = merging.merge(
      "dare_linear", base, experts, seed=3, weight=0.7, density=0.5
  )
  assert_same_bits(found, expected)
  other = merge(recipe, seed=4)
  differ = jax.tree.map(lambda x, y: (x != y).any(), found, other)
  assert all(jax.tree.leaves(differ))
  layers = np.asarray(
      found["layers"]["mlp"]["up"] - base["layers"]["mlp"]["up"]
  )
  assert not np.array_equal(layers[0] == 0, layers[1] == 0)


_METHODS = {
    "linear": ({"weight": 0.5}, ("a", "b")),
    "slerp": ({"t": 0.3}, ("a",)),
    "ties": ({"weight": 0.7, "density": 0.4}, ("a", "b")),
    "dare_ties": ({"weight": 0.7, "density": 0.4}, ("a", "b")),
    "sce": ({"select_topk": 0.4}, ("a", "b")),
    "model_stock": ({}, ("a", "b")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aligned", "dtype"), [(True, "float32"), (False, "bfloat16")]
)
@pytest.mark.parametrize("name", _METHODS)
def test_methods_are_as_in_memory(
    merge,
    tmp_path,
    monkeypatch,
    random_params,
    assert_same_bits,
    changed,
    name,
    aligned,
    dtype,
):
  """Whatever the shapes of tensors, their dtype and where they lie."""
  _save_family(tmp_path, random_params(_DIFFERENT), _DIFFERENT, dtype)
  monkeypatch.chdir(tmp_path)
  if not aligned:
    for model in ("base", "a", "b"):
      changed(model, lambda tensors: None)
    monkeypatch.chdir(tmp_path / "changed")
    leaves = jax.tree.leaves(convert.open_leaves("a")[1])
    assert any(x.mapped() is None for leaf in leaves for x in leaf.parts)
  parameters, models_ = _METHODS[name]
  if name == "linear":  # It has no base: this is one more model.
    models_ = ("base", *models_)
  found = merge(_recipe(name, parameters, models_=models_), seed=1)
  base, *experts = _params("base", *(m for m in models_ if m != "base"))
  if name == "linear":
    base, experts = None, [base, *experts]
  expected = merging.merge(name, base, experts, seed=1, **parameters)
  assert_same_bits(found, expected)


@pytest.mark.slow
def test_in_bfloat16_as_in_memory(merge, assert_same_bits):
  """Arithmetic in a dtype, the output in another."""
  parameters = {"weight": 0.7}
  extra = "dtype: bfloat16\nout_dtype: float16\n"
  found = merge(_recipe("task_arithmetic", parameters, extra))
  base, *experts = _params("base", "a", "b")
  expected = merging.merge(
      "task_arithmetic",
      base,
      experts,
      dtype="bfloat16",
      out_dtype="float16",
      **parameters,
  )
  assert_same_bits(found, expected)
  assert found["embed"].dtype == np.float16


_STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 2]}]
  - sources: [{model: a, layer_range: [0, 1]}]
"""


def test_layers_are_stacked(merge, place, assert_same_bits):
  found = merge(_STACK)
  a, b = _params("a", "b")
  expected = {
      "layers": jax.tree.map(
          lambda x, y: jnp.concatenate([x, y[1:], x[:1]]),
          a["layers"],
          b["layers"],
      ),
      "embed": a["embed"],
      "final_norm": a["final_norm"],
      "head": a["head"],
  }
  assert_same_bits(found, expected)
  assert convert.read_config(place / "out").layers == 4


def test_kernels_are_compiled_ahead_and_once(merge):
  compiled = []
  listen = lambda event, *unused, **kwargs: compiled.append(event)
  merge(_SUM)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    merge(_SUM.replace("0.75", "0.25"))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert not [event for event in compiled if "backend_compile" in event]


# ---- A directory is replaced whole.


def test_an_output_is_replaced_whole(merge, place):
  merge(_SUM)
  (place / "out" / "stale").touch()
  merge(_SUM.replace("0.75", "0.25"))
  assert sorted(p.name for p in place.rglob("*")) == [
      "README.md",
      "config.json",
      "model.safetensors",
      "out",
  ]


def test_an_input_may_be_the_output(merge, family, place, assert_same_bits):
  expected = merge(_SUM)
  for aligned in (True, False):
    shutil.rmtree(place / "out")
    shutil.copytree(family / "a", place / "out")
    if not aligned:
      path = place / "out" / "model.safetensors"
      tensors = safetensors.numpy.load_file(path)
      safetensors.numpy.save_file(tensors, path)
    found = merge(_SUM.replace("- model: a", f"- model: {place / 'out'}"))
    assert_same_bits(found, expected)


# ---- What cannot be merged.


def test_what_is_not_finite_is_named(refuses, changed):
  for value in (np.nan, -np.inf):

    def edit(tensors, value=value):
      tensors[_UP][3, 2] = value

    bad = changed("b", edit)
    refuses(
        f"^{bad} holds numbers in {_UP} that are not finite",
        _SUM.replace("- model: b", f"- model: {bad}"),
    )
    shutil.rmtree(bad)


def test_a_sum_that_overflows_is_told(refuses):
  big = _SUM.replace("0.75", "1e7") + "out_dtype: float16\n"
  refuses("^the merge gives numbers in model.* not finite", big)


def test_models_of_other_shapes(refuses, place, tmp_path, random_params):
  def other(message, **changes):
    config = dataclasses.replace(_DECODER, **changes)
    path = tmp_path / "other"
    convert.save(path, config, random_params(config))
    refuses(message, _SUM.replace("- model: b", f"- model: {path}"))

  other(
      r"embed_tokens.weight is \(41, 16\) in .*/other and \(37, 16\) in base;"
      " if their vocabularies differ, set tokenizer_source: base or union",
      vocab_size=41,
  )
  fine_tunes = "; models have to be fine-tunes of one model"
  other(rf"embed.* is \(37, 24\) in .*{fine_tunes}", embed=24)
  other(rf"mlp.gate_proj.weight is \(24, 16\) .*{fine_tunes}", mlp=24)
  other(r"recipe.yml:6: .*/other has 3 layers, a 2", layers=3)
  other("/other ties its head to the embedding", tied_head=True)
  other(
      "other is of family qwen2, base of mistral",
      family="qwen2",
      qkv_bias=True,
  )


def test_slices_of_other_shapes(refuses, tmp_path, random_params):
  """Each merge is of one model alone, and fits itself."""
  for config, message in (
      (
          dataclasses.replace(_DECODER, mlp=24),
          r"layers.1.mlp.gate_proj.weight is \(24, 16\) in .*/other, and the"
          r" output has \(16, 16\) there; models have to be fine-tunes",
      ),
      (
          dataclasses.replace(_DECODER, vocab_size=41),
          r"lm_head.weight is \(41, 16\) in .*/other, and the output has"
          r" \(37, 16\) there; if their vocabularies differ",
      ),
  ):
    convert.save(tmp_path / "other", config, random_params(config))
    stack = _STACK.replace("model: b", f"model: {tmp_path / 'other'}")
    if config.mlp == _DECODER.mlp:
      stack = "".join(stack.splitlines(keepends=True)[:-1])
    refuses(message, stack)


def test_models_of_other_dtypes(
    refuses, merge, tmp_path, random_params, assert_same_bits
):
  params = jax.tree.map(lambda x: x.astype(np.float16), random_params(_DECODER))
  convert.save(tmp_path / "half", _DECODER, params)
  half = f"- model: {tmp_path / 'half'}"
  way_out = "say in which dtype to merge them, as in dtype: bfloat16"
  refuses(
      f"embed_tokens.weight is F16 in .*/half and F32 in base; {way_out}",
      _SUM.replace("- model: b", half),
  )
  refuses(
      f"layers.1.input_layernorm.weight is F16 in .*/half, .* F32; {way_out}",
      _STACK.replace("model: b", half[2:]),
  )
  found = merge(_STACK.replace("model: b", half[2:]) + "dtype: float32\n")
  assert found["embed"].dtype == np.float32
  np.testing.assert_array_equal(
      found["layers"]["mlp"]["up"][2],
      params["layers"]["mlp"]["up"][1].astype(np.float32),
  )


def test_tensors_that_are_missing_or_unknown(refuses, changed):
  bad = changed("a", lambda tensors: tensors.pop(_UP))
  recipe = _SUM.replace("- model: a", f"- model: {bad}")
  refuses(f"{bad} lacks tensor {_UP}", recipe)
  shutil.rmtree(bad)
  changed("a", lambda tensors: tensors.update(more=tensors[_UP]))
  refuses(f"{bad} holds unknown tensor more", recipe)


def test_a_model_that_is_not_there(refuses):
  refuses(
      "^model directory /nowhere/there does not exist",
      _SUM.replace("- model: b", "- model: /nowhere/there"),
  )


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_calibration_is_asked_for(refuses, name):
  refuses(
      f"^{name} needs a calibration set: give --calibration=FILE",
      f"merge_method: {name}\nmodels: [{{model: a}}, {{model: b}}]\n",
  )


def test_a_disk_without_room(refuses, monkeypatch):
  usage = lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**3)
  monkeypatch.setattr(shutil, "disk_usage", usage)
  refuses("out needs 0 MB, and its disk has 0 MB left; make room")


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_fills(
    refuses, merge, place, monkeypatch, exists, assert_same_bits
):
  """Midway through the tensors; what was there before stays."""
  if exists:
    before = merge(_SUM)

  class Filling:

    def __init__(self, file):
      self._file, self._writes = file, 0

    def __enter__(self):
      return self

    def __exit__(self, *unused_exception):
      self._file.close()

    def write(self, data):
      self._writes += 1
      if self._writes > 8:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      return self._file.write(data)

  whole = builtins.open

  def open_(path, mode="r", **options):
    file = whole(path, mode, **options)
    return Filling(file) if mode == "wb" else file

  with monkeypatch.context() as patch:
    patch.setattr(convert.files, "open", open_, raising=False)
    refuses("out cannot be written .*No space left on device.*; make room")
  if exists:
    (after,) = _params(place / "out")
    assert_same_bits(after, before)
  merge(_SUM)  # As soon as there is room.


# ---- Programs.


def _program(fn, literals=()):
  return lambda shape: (fn, np.asarray(literals, np.float32))


def _scaled(base, task_vectors, literals):
  return base + literals[0] * task_vectors[0] - task_vectors[1]


@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_a_program_merges_what_is_in_scope(place, scope, assert_same_bits):
  of_shape = _program(_scaled, [0.5])
  config = stream.merge_program(
      of_shape, "SOURCE", "base", ["a", "b"], place / "out", scope
  )
  assert config == _DECODER
  base, a, b = map(convert.load, ("base", "a", "b"))
  _, found = convert.load(place / "out")

  def merged(path, x, y, z):
    if scope == "mlp" and path[1:2] != (jax.tree_util.DictKey("mlp"),):
      return x
    x, y, z = map(np.asarray, (x, y, z))
    return x + np.float32(0.5) * (y - x) - (z - x)

  expected = jax.tree_util.tree_map_with_path(merged, base[1], a[1], b[1])
  # XLA may round a product and a sum in one.
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-7),
      found,
      expected,
  )
  if scope == "mlp":
    others = lambda tree: tree | {"layers": tree["layers"]["attention"]}
    assert_same_bits(others(found), others(base[1]))
  card = (place / "out" / "README.md").read_text()
  assert "```python\nSOURCE\n```" in card


def test_programs_see_these_shapes(family):
  square, vector, rows = (16, 16), (16,), (37, 16)
  assert stream.program_shapes(family / "base", "mlp") == [square]
  assert stream.program_shapes(family / "base", "all") == sorted(
      [square, vector, rows]
  )


def test_programs_that_cannot_be_applied(place, tmp_path, random_params):
  def refuses(message, of_shape, experts):
    with pytest.raises(errors.UserError, match=message) as caught:
      stream.merge_program(of_shape, "", "base", experts, place / "out", "mlp")
    assert "\n" not in str(caught.value)
    assert not list(place.iterdir())

  name = "model.layers.0.mlp.gate_proj.weight"
  refuses(
      f"the merge gives numbers in {name} that are not finite",
      _program(lambda base, taus, literals: base / (taus[0] - taus[0])),
      ["a", "b"],
  )
  of_shape = _program(_scaled, [0.5])
  refuses("^a is given twice", of_shape, ["a", "a"])
  refuses("^base is given twice", of_shape, ["a", "base"])
  for changes, message in (
      ({"layers": 3}, "other has 3 layers, base 2; models have to be"),
      ({"mlp": 24}, r"gate_proj.weight is \(24, 16\) in .*/other and \(16, 16"),
      (
          {"family": "qwen2", "qkv_bias": True},
          "other is of family qwen2, base of mistral: their tensors differ",
      ),
  ):
    config = dataclasses.replace(_DECODER, **changes)
    convert.save(tmp_path / "other", config, random_params(config))
    refuses(message, of_shape, ["a", str(tmp_path / "other")])


# ---- Processes.


@pytest.mark.slow
def test_a_killed_merge_leaves_no_model(
    merge, place, family, tmp_path, assert_same_bits
):
  """Neither where there was none, nor instead of the one that was there."""
  expected = merge(_SUM)
  code = """
      import sys, time
      from selfdev_jax.merging import recipes, stream
      whole = stream.MergedLeaf.tensors
      def stuck(self):
        for i, tensor in enumerate(whole(self)):
          yield tensor
          print("midway", flush=True)
          time.sleep(600)
      stream.MergedLeaf.tensors = stuck
      stream.merge_recipe(recipes.read(sys.argv[1]), sys.argv[2])
  """

  def kill(path):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), path, place / "out"],
        cwd=family,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
      assert child.stdout.readline() == "midway\n"
      child.send_signal(signal.SIGKILL)
    assert (place / ".out.partial" / "model.safetensors").stat().st_size > 0

  recipe = tmp_path / "another.yml"
  recipe.write_text(_SUM.replace("0.75", "0.25"))
  kill(recipe)
  assert_same_bits(_params(place / "out")[0], expected)
  shutil.rmtree(place / "out")
  kill(recipe)
  assert not (place / "out").exists()
  assert_same_bits(merge(_SUM), expected)
  assert [p.name for p in place.iterdir()] == ["out"]


_LIMITED = """
    import re, resource, sys
    import jax
    import numpy as np
    from selfdev_jax import convert, merging
    from selfdev_jax.merging import recipes, stream
    out, whole, limit = sys.argv[1:]
    recipe = recipes.read("recipe.yml")
    # Threads and what else is started once are there before the limit.
    stream.merge_recipe(recipes.read("warm.yml"), out + "-warm")
    status = open("/proc/self/status").read()
    data = 1024 * int(re.search(r"VmData:\\s+(\\d+)", status)[1])
    limit = data + int(limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if whole == "whole":
      trees = [convert.load(name)[1] for name in recipe.models]
      merging.merge("task_arithmetic", trees[0], trees[1:], weight=0.5)
    else:
      stream.merge_recipe(recipe, out)
"""


@pytest.mark.slow
def test_models_larger_than_the_memory(
    tmp_path, monkeypatch, changed, assert_same_bits
):
  """Room for one model is enough for a merge of three into a fourth."""
  config = dataclasses.replace(
      _DECODER, embed=512, layers=10, heads=8, kv_heads=8, head_dim=64, mlp=2048
  )
  abstract = models.abstract_params(config)
  noise = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
  monkeypatch.chdir(tmp_path)
  for i, name in enumerate(("base", "a", "b")):
    params = jax.tree.map(
        lambda x, i=i: np.resize(noise[i:], x.shape), abstract
    )
    convert.save(name, config, params)
    changed(name, lambda tensors: None)  # Not aligned: nothing is mapped.
    del params
    shutil.rmtree(name)
  monkeypatch.chdir(tmp_path / "changed")
  size = sum(4 * np.prod(x.shape) for x in jax.tree.leaves(abstract))
  small = dataclasses.replace(config, layers=1)
  zeros = jax.tree.map(
      lambda x: np.zeros(x.shape, np.float32), models.abstract_params(small)
  )
  for name in ("base", "a", "b"):
    convert.save(pathlib.Path("small", name), small, zeros)
  recipe = _recipe("task_arithmetic", "{weight: 0.5}")
  pathlib.Path("recipe.yml").write_text(recipe)
  for name in ("base", "a", "b"):
    recipe = recipe.replace(f"model: {name}\n", f"model: small/{name}\n")
  pathlib.Path("warm.yml").write_text(recipe)

  def run(whole):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(_LIMITED),
            *("out", whole, str(size)),
        ],
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

  done = run("streamed")
  assert done.returncode == 0, done.stderr[-2000:]
  done = run("whole")
  assert done.returncode != 0
  lacks = "Unable to allocate|RESOURCE_EXHAUSTED|bad_alloc|start new thread"
  assert re.search(lacks, done.stderr), done.stderr
  _, found = convert.load("out")
  base, a, b = (convert.load(name)[1] for name in ("base", "a", "b"))
  for path, leaf, _ in convert.named_leaves(config, found):
    x, y, z = (
        np.asarray(convert.get_path(tree, path)[-1:]) for tree in (base, a, b)
    )
    np.testing.assert_allclose(
        leaf[-1:], x + 0.5 * (y - x) + 0.5 * (z - x), rtol=0, atol=2e-6
    )
