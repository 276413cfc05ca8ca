"""Recipes as mergekit merges them, programs, and one line for what is wrong."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as tokenizers_lib
import transformers

from selfdev_jax import config as config_lib
from selfdev_jax import convert
from selfdev_jax import errors
from selfdev_jax import merging
from selfdev_jax import models
from selfdev_jax import sandbox
from selfdev_jax.merging import calibration
from selfdev_jax.merging import stream
from selfdev_jax.sandbox import runner
from selfdev_jax.sandbox import trace
from selfdev_jax.sandbox import verify

_ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = _ROOT / "launch" / "merge.py"
_FIRST = ("<unk>", "</s>", "u", "v", "w")
_WORDS = {
    "base": (*_FIRST, "x"),
    "a": (*_FIRST, "x"),
    "b": (*_FIRST, "x"),
    # Another order, more of them, and one less.
    "more": ("<unk>", "</s>", "w", "v", "u", "y", "z"),
    "other": ("<unk>", "</s>", "z", "q", "u", "v", "w", "y"),
}
# Of three shapes of tensors only: each is compiled.
_DECODER = models.DecoderConfig(
    vocab_size=6,
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


def _save_family(root, random_params, config, dtype="float32"):
  """Directories of fine-tunes of one model, some with other vocabularies."""
  rng = np.random.default_rng(1)
  tune = lambda x: x + 0.1 * rng.normal(size=x.shape)
  params = random_params(dataclasses.replace(config, vocab_size=8))
  for name, words in _WORDS.items():
    tree = params if name == "base" else jax.tree.map(tune, params)
    tree = tree | {k: tree[k][: len(words)] for k in ("embed", "head")}
    tree = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree)
    theirs = dataclasses.replace(config, vocab_size=len(words))
    convert.save(root / name, theirs, tree)
    tokenizer = _tokenizer(words)
    if name != "base":
      tokenizer.chat_template = "{{ messages }}" + name[:1]
    tokenizer.save_pretrained(root / name)


def _tokenizer(words):
  backend = tokenizers_lib.Tokenizer(
      tokenizers_lib.models.WordLevel(
          {word: i for i, word in enumerate(words)}, unk_token="<unk>"
      )
  )
  backend.pre_tokenizer = tokenizers_lib.pre_tokenizers.Whitespace()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
  )


@pytest.fixture(scope="module")
def family(tmp_path_factory, random_params) -> pathlib.Path:
  root = tmp_path_factory.mktemp("family")
  _save_family(root, random_params, _DECODER)
  return root


@pytest.fixture
def place(family, tmp_path, monkeypatch) -> pathlib.Path:
  """Where outputs are written; recipes name the models without a path."""
  monkeypatch.chdir(family)
  (tmp_path / "place").mkdir()
  return tmp_path / "place"


@pytest.fixture
def merge(launch, tmp_path, place):
  """merge(recipe, flag=value, ...) -> what is printed."""

  def write_and_launch(text, **flags):
    (tmp_path / "recipe.yml").write_text(text)
    out = flags.pop("out", place / "out")
    return launch(recipe=tmp_path / "recipe.yml", out=out, **flags)

  return write_and_launch


@pytest.fixture
def refuses(launch, place):
  """refuses(message, flag=value, ...): one line, and nothing is written."""

  def check(message, **flags):
    before = sorted(place.rglob("*"))
    with pytest.raises(errors.UserError, match=message) as caught:
      launch(**{"out": place / "out"} | flags)
    assert "\n" not in str(caught.value)
    assert sorted(place.rglob("*")) == before

  return check


_SUM = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters: {weight: 0.75}
  - model: b
    parameters: {weight: -0.5}
"""


def _params(*names):
  return [convert.load(name)[1] for name in names]


def _assert_same_bits(found, expected):
  def check(x, y):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

  jax.tree.map(check, found, expected)


# ---- Recipes.


def test_a_recipe_is_merged(merge, place):
  line = merge(_SUM)
  assert re.fullmatch(
      rf"{place}/out: mistral, 2 layers, 0 MB, [\d.]+ s\n", line
  )
  base, *experts = _params("base", "a", "b")
  expected = merging.merge(
      "task_arithmetic", base, experts, weight=[0.75, -0.5]
  )
  _assert_same_bits(_params(place / "out")[0], expected)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    theirs = pathlib.Path("base", name).read_bytes()
    assert (place / "out" / name).read_bytes() == theirs
  assert not (place / "out" / "chat_template.jinja").exists()
  card = (place / "out" / "README.md").read_text()
  assert f"```yaml\n{_SUM}```" in card
  assert "# out" in card and "`base` (base)" in card


@pytest.mark.slow
def test_random_methods_have_a_seed(merge, place):
  recipe = """\
merge_method: dare_linear
base_model: base
models: [{model: a}]
parameters: {weight: 1, density: 0.5}
"""
  found = {}
  for name, seed in (("one", 1), ("two", 2), ("again", 1)):
    merge(recipe, out=place / name, seed=seed)
    found[name] = (place / name / "model.safetensors").read_bytes()
  assert found["one"] == found["again"] != found["two"]


def test_the_chat_template_of_a_recipe(merge, place):
  for setting, expected in (
      ("auto", "{{ messages }}a"),
      ("'{{ 1 }}'", "{{ 1 }}"),
  ):
    merge(_SUM + f"chat_template: {setting}\n", overwrite=True)
    assert (place / "out" / "chat_template.jinja").read_text() == expected
    tokenizer = convert.load_tokenizer(place / "out")
    assert tokenizer.chat_template == expected
    assert tokenizer.get_vocab() == {w: i for i, w in enumerate(_WORDS["base"])}


_UNION = """\
merge_method: task_arithmetic
base_model: base
models: [{model: more}, {model: other}]
parameters: {weight: 0.5}
tokenizer_source: union
"""


def test_vocabularies_are_brought_together(merge, place):
  merge(_UNION)
  config, found = convert.load(place / "out")
  vocab = convert.load_tokenizer(place / "out").get_vocab()
  tokens = [*_WORDS["base"], "y", "z", "q"]
  assert vocab == {token: i for i, token in enumerate(tokens)}
  assert config.vocab_size == len(found["embed"]) == len(tokens)
  rows = {
      name: dict(zip(_WORDS[name], np.asarray(tree["embed"]), strict=True))
      for name in ("base", "more", "other")
      for tree in _params(name)
  }
  # What the base has, others have as well, and what it lacks it takes on.
  means = {
      token: np.mean([own[token] for own in rows.values() if token in own], 0)
      for token in tokens
  }
  for token in tokens:
    base = rows["base"].get(token, means[token])
    deltas = [rows[name].get(token, base) - base for name in ("more", "other")]
    np.testing.assert_allclose(
        found["embed"][vocab[token]], base + 0.5 * sum(deltas), atol=1e-6
    )


def test_files_of_another_tokenizer_are_not_left(
    merge, place, family, tmp_path
):
  """What goes with a tokenizer is that one's, its end of text as well."""
  for name, ids in (("base", 1), ("other", 7)):
    shutil.copytree(name, tmp_path / name)
    settings = {"eos_token_id": ids}
    (tmp_path / name / "generation_config.json").write_text(
        json.dumps(settings)
    )
  for name in ("added_tokens.json", "chat_template.json", "tokenizer.model"):
    (tmp_path / "base" / name).write_text("{}")
  (tmp_path / "other" / "chat_template.jinja").unlink()
  (tmp_path / "base" / "chat_template.jinja").write_text("{{ stale }}")
  recipe = _UNION.replace("base_model: base", f"base_model: {tmp_path}/base")
  recipe = recipe.replace("model: other", f"model: {tmp_path}/other")
  merge(recipe.replace("union", f"{tmp_path}/other"))
  out = place / "out"
  assert sorted(p.name for p in out.iterdir()) == [
      "README.md",
      "config.json",
      "generation_config.json",
      "model.safetensors",
      "tokenizer.json",
      "tokenizer_config.json",
  ]
  tokenizer = convert.load_tokenizer(out)
  assert tokenizer.get_vocab() == {w: i for i, w in enumerate(_WORDS["other"])}
  assert convert.end_tokens(out, tokenizer) == (1, 7)


def test_rows_are_averaged_in_the_recipes_dtype(
    merge, place, tmp_path, random_params
):
  """In bfloat16 models: the average itself is not rounded to it."""
  _save_family(tmp_path, random_params, _DECODER, "bfloat16")
  recipe = _UNION
  for name in ("base", "more", "other"):
    recipe = recipe.replace(f"model: {name}", f"model: {tmp_path / name}")
  merge(recipe + "dtype: float32\n")
  (found,) = _params(place / "out")
  assert found["embed"].dtype == np.float32
  y = [
      np.float32(tree["embed"][_WORDS[name].index("y")])
      for name in ("more", "other")
      for tree in _params(tmp_path / name)
  ]
  row = found["embed"][convert.load_tokenizer(place / "out").get_vocab()["y"]]
  np.testing.assert_allclose(row, (y[0] + y[1]) / 2, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_methods_that_use_data(merge, place, tmp_path, name):
  (tmp_path / "texts.txt").write_text("u v w x\nx w x v\nu u\n")
  recipe = f"merge_method: {name}\nmodels: [{{model: a}}, {{model: b}}]\n"
  merge(recipe, calibration=tmp_path / "texts.txt")
  trees, statistics = _params("a", "b"), []
  compute = {"fisher": calibration.fisher, "regmean": calibration.gram}[name]
  rows = [[2, 3, 4, 5], [5, 4, 5, 3], [2, 2]]
  for tree in trees:
    statistics.append(compute(_DECODER, tree, rows))
  expected = merging.merge(name, None, trees, statistics=statistics)
  # Solved one by one or in a batch.
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5),
      _params(place / "out")[0],
      expected,
  )
  average = jax.tree.map(lambda x, y: (x + y) / 2, *trees)
  up = lambda tree: np.asarray(tree["layers"]["mlp"]["up"])
  assert np.abs(up(expected) - up(average)).max() > 1e-3


# ---- Programs.

_PROGRAM = """\
def merge(base, task_vectors):
  mean = sum(task_vectors) / len(task_vectors)
  return base + 0.5 * jnp.sign(mean) * jnp.abs(mean)
"""


@pytest.fixture
def trusted(monkeypatch):
  """Programs are traced and verified in this process, and not probed."""

  def admit(box, source):
    shapes, experts = box._shapes, box._num_experts
    text = trace.trace(source, shapes, experts, 5000)
    try:
      found = verify.verify(text, box._limits, shapes, experts)
    except verify.VerifyError as error:
      return sandbox.Rejection("verify", error.code, error.message)
    return sandbox.Admitted(found.program, found.digest, found.stats, ())

  monkeypatch.setattr(sandbox.Sandbox, "admit", admit)


def _assert_merged(place, of_scope):
  base, a, b = _params("base", "a", "b")

  def merged(path, x, y, z):
    if not of_scope(path):
      return x
    x, y, z = (np.asarray(leaf, np.float64) for leaf in (x, y, z))
    return x + 0.5 * ((y - x) + (z - x)) / 2

  expected = jax.tree_util.tree_map_with_path(merged, base, a, b)
  (found,) = _params(place / "out")

  def check(path, x, y):
    assert x.dtype == np.float32
    if of_scope(path):
      np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    else:
      assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

  jax.tree_util.tree_map_with_path(check, found, expected)


def _in_mlp(path):
  return any(key.key == "mlp" for key in path)


def test_a_program_is_applied(launch, trusted, place, tmp_path):
  (tmp_path / "p.py").write_text(_PROGRAM)
  flags = {
      "program": tmp_path / "p.py",
      "base": "base",
      "experts": "a,b",
      "out": place / "out",
  }
  assert "mistral, 2 layers" in launch(**flags)
  _assert_merged(place, _in_mlp)
  card = (place / "out" / "README.md").read_text()
  assert f"```python\n{_PROGRAM}```" in card
  assert "`base` (base)" in card and "- `b`" in card
  assert (place / "out" / "tokenizer.json").exists()
  launch(**flags, scope="all", overwrite=True)
  _assert_merged(place, lambda path: True)


def test_programs_that_are_refused(refuses, trusted, tmp_path):
  path = tmp_path / "p.py"
  flags = {"program": path, "base": "base", "experts": "a,b"}
  refuses(f"^--program={path} cannot be read: .*No such file", **flags)
  loop = "lax.fori_loop(0, 10**9, lambda i, x: x, base)"
  path.write_text(f"def merge(base, task_vectors):\n  return {loop}\n")
  refuses(rf"^{path} is not admitted \(verify, loop_trips\): ", **flags)
  path.write_text("def merge(base, task_vectors):\n  return base / 0.0\n")
  refuses(
      "numbers in model.layers.0.mlp.gate_proj.weight that are not", **flags
  )
  refuses("needs --base, the seed model", program=path, experts="a")
  refuses("needs --base, .* and --experts", program=path, base="base")
  refuses("directory /nowhere/x does not", **flags | {"base": "/nowhere/x"})
  refuses("directory /nowhere/x does", **flags | {"experts": "a,/nowhere/x"})
  path.write_text(_PROGRAM)
  refuses("^a is given twice among", **flags | {"experts": "a,a"})


@pytest.fixture
def merges_here(monkeypatch):
  """A program in JSON is merged in this process: another costs seconds."""

  def start(seed, directory, experts, scope, timeout_s):
    del directory, timeout_s
    trees = {name: convert.load(path)[1] for name, path in experts.items()}
    return contextlib.nullcontext(runner.Merges(seed, trees, scope))

  monkeypatch.setattr(runner, "Runner", start)


def _in_json(path, scope, source=_PROGRAM):
  shapes = stream.program_shapes("base", scope)
  traced = trace.trace(source, shapes, 2, 5000)
  limits = config_lib.Sandbox()
  path.write_text(verify.verify(traced, limits, shapes, 2).program)
  return path


def test_a_program_in_json_is_applied(launch, merges_here, place, tmp_path):
  flags = {"base": "base", "experts": "a,b", "out": place / "out"}
  path = _in_json(tmp_path / "p.json", "mlp")
  said = launch(program=path, **flags)
  _assert_merged(place, _in_mlp)
  (found,) = _params(place / "out")
  assert said.startswith(f"weights {models.checksum(found)}\n")
  assert "mistral, 2 layers" in said
  assert "# Program IR of p.json" in (place / "out" / "README.md").read_text()
  assert (place / "out" / "tokenizer.json").exists()
  path = _in_json(tmp_path / "p.json", "all")
  launch(program=path, **flags, scope="all", overwrite=True)
  _assert_merged(place, lambda path: True)


def test_programs_in_json_that_are_refused(refuses, merges_here, tmp_path):
  path = tmp_path / "p.json"
  flags = {"program": path, "base": "base", "experts": "a,b"}
  refuses(f"^--program={path} cannot be read: .*No such file", **flags)
  _in_json(path, "mlp")
  refuses("needs --base, .* and --experts", program=path, base="base")
  refuses("^--seed goes with --recipe$", **flags, seed=1)
  refuses("p.json is not admitted .verify, malformed.", **flags, scope="all")
  refuses("p.json is not admitted .verify", **flags | {"experts": "a"})
  refuses("^a is given twice among", **flags | {"experts": "a,a"})


@pytest.mark.slow
def test_a_program_in_json_has_the_bits_of_a_run(launch, place, tmp_path):
  """Also where it sums over tensors, which XLA does in an order of its own."""
  mean = "sum(t * jnp.mean(jnp.abs(t)) for t in task_vectors)"
  source = f"def merge(base, task_vectors):\n  return base + {mean}\n"
  path = _in_json(tmp_path / "p.json", "mlp", source)
  said = launch(program=path, base="base", experts="a,b", out=place / "out")
  directories = {name: pathlib.Path(name) for name in ("a", "b")}
  base, found = _params("base", place / "out")
  with runner.Runner(
      base, pathlib.Path("base"), directories, "mlp", 300
  ) as merges:
    merged = merges.program(path.read_text()).params
  assert said.split()[1] == models.checksum(merged) == models.checksum(found)


@pytest.mark.slow
def test_programs_pass_the_sandbox(launch, refuses, place, tmp_path):
  path = tmp_path / "p.py"
  flags = {"program": path, "base": "base", "experts": "a,b"}
  path.write_text(
      "import os\n\ndef merge(base, task_vectors):\n  return base\n"
  )
  refuses(rf"^{path} is not admitted \(filter, ", **flags)
  path.write_text(_PROGRAM)
  launch(**flags, out=place / "out")
  _assert_merged(place, _in_mlp)


# ---- Bad input.


def test_either_of_the_two(refuses, tmp_path):
  refuses("^give either --recipe or --program$")
  refuses("^give either --recipe or --program$", recipe="r", program="p")
  for name in ("base", "experts"):
    refuses(f"^--{name} goes with --program$", recipe="r", **{name: "a"})
  refuses("^--scope goes with --program$", recipe="r", scope="all")
  refuses("^--seed goes with --recipe$", program="p", seed=1)
  refuses("^--calibration goes with --recipe$", program="p", calibration="c")


def test_nothing_is_overwritten(merge, refuses, place, tmp_path):
  (place / "out").mkdir()
  (place / "out" / "mine").touch()
  path = tmp_path / "recipe.yml"
  path.write_text(_SUM)
  refuses(f"--out={place}/out exists; .* --overwrite", recipe=path)
  # A directory of the user's that is no model is not taken for one.
  refuses("is no model directory", recipe=path, overwrite=True)
  (place / "out" / "config.json").touch()
  merge(_SUM, overwrite=True)
  assert not (place / "out" / "mine").exists()
  assert [p.name for p in place.iterdir()] == ["out"]
  (place / "file").touch()
  out = place / "file"
  refuses("is no model directory", recipe=path, out=out, overwrite=True)


def test_recipes_that_are_wrong(refuses, tmp_path):
  path = tmp_path / "recipe.yml"
  refuses(f"^recipe {path} cannot be read", recipe=path)
  path.write_text(_SUM + "dtyp: float32\n")
  refuses(rf"^{path}:8: unknown key 'dtyp'.* 'dtype'", recipe=path)
  path.write_text(_SUM.replace("- model: b", "- model: /nowhere/x"))
  refuses("^model directory /nowhere/x does not exist", recipe=path)
  path.write_text("merge_method: fisher\nmodels: [{model: a}]\n")
  refuses("^fisher needs a calibration set: give --calibration", recipe=path)
  refuses(
      "texts.txt cannot be read",
      recipe=path,
      calibration=tmp_path / "texts.txt",
  )
  path.write_text(_UNION + "chat_template: x")
  refuses("chat_template 'x' is no template", recipe=path)
  path.write_text(_UNION.replace("tokenizer_source: union\n", ""))
  refuses("differ, set tokenizer_source: base or union", recipe=path)


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["--recipe=r.yml"], 1, "Flag --out must have a value"),
        (["--out=/tmp/never"], 2, "error: give either --recipe or --program\n"),
        (
            ["--recipe=/nowhere/r.yml", "--out=/tmp/never"],
            2,
            "error: recipe /nowhere/r.yml cannot be read",
        ),
    ],
)
@pytest.mark.slow
def test_command_line(arguments, status, line):
  done = subprocess.run(
      [sys.executable, "-m", "launch.merge", *arguments],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
  )
  assert done.returncode == status
  assert line in done.stderr, done.stderr
  assert "Traceback" not in done.stderr


# ---- mergekit beside it.

_TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.3]
      weight:
        - {filter: mlp, value: [0.5, 1.5]}
        - {filter: lm_head, value: 0.9}
        - value: 0.2
  - model: b
    parameters: {density: 0.5}
parameters:
  weight: [0.3, 0.1, 0.6]
  normalize: true
"""
_RECIPES = {
    "task_arithmetic": _SUM,
    "ties": _TIES,
    "slerp": """\
merge_method: slerp
base_model: base
models: [{model: base}, {model: a}]
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - {filter: mlp, value: [1, 0.2]}
    - value: 0.5
""",
    "linear": """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.7}}
  - {model: b, parameters: {weight: [0.2, 0.9]}}
out_dtype: bfloat16
""",
    "passthrough": """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
  - sources:
      - model: a
        layer_range: [0, 3]
        parameters:
          scale: [{filter: down_proj, value: 0.5}, {value: 1}]
""",
    "slices": """\
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [1, 3], parameters: {weight: [0.2, 0.8]}}
  - sources:
      - {model: base, layer_range: [2, 3]}
      - {model: b, layer_range: [0, 1]}
    parameters: {weight: 1.5}
""",
    "union": _UNION,
    "base": _UNION.replace("union", "base"),
    "other": _UNION.replace("union", "other"),
}
_STEP = {"float32": 2.0**-22, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def _tied(path, base, *experts):
  """Entries whose delta has the magnitude of another one of their tensor."""
  found = False
  for expert in experts:
    x, y = base, expert
    for key in path:
      x, y = x[key.key], y[key.key]
    sizes = np.abs(np.asarray(y - x, np.float32))
    tensors = sizes if path[0].key == "layers" else sizes[None]
    counts = []
    for tensor in tensors:
      _, inverse, count = np.unique(
          tensor, return_inverse=True, return_counts=True
      )
      counts.append(count[inverse].reshape(tensor.shape))
    found |= np.reshape(counts, sizes.shape) > 1
  return found


@pytest.fixture
def mergekit(tmp_path):
  """mergekit(recipe) -> directory that mergekit writes."""
  pytest.importorskip("mergekit")
  from mergekit import config as config_lib
  from mergekit import merge as merge_lib
  import yaml

  def run(text):
    out = tmp_path / "theirs"
    merge_lib.run_merge(
        config_lib.MergeConfiguration.model_validate(yaml.safe_load(text)),
        str(out),
        # A card is made of what the hub says.
        options=merge_lib.MergeOptions(write_model_card=False, quiet=True),
    )
    return out

  return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _RECIPES)
def test_is_what_mergekit_writes(
    merge, mergekit, monkeypatch, tmp_path, place, random_params, name, dtype
):
  """The same recipe on the same directories; then transformers loads it."""
  _save_family(tmp_path, random_params, _DIFFERENT, dtype)
  monkeypatch.chdir(tmp_path)
  recipe = _RECIPES[name] + f"dtype: {dtype}\n"
  merge(recipe)
  theirs = mergekit(recipe)
  config, found = convert.load(place / "out")
  config_theirs, expected = convert.load(theirs)
  assert config == config_theirs
  out_dtype = "bfloat16" if name == "linear" else dtype
  if "tokenizer_source" in recipe:  # A union's rows are in another order there.
    ours, others = map(convert.load_tokenizer, (place / "out", theirs))
    vocab, other = ours.get_vocab(), others.get_vocab()
    assert vocab.keys() == other.keys()
    tokens = sorted(vocab, key=vocab.get)
    order = np.array([other[token] for token in tokens])
    for leaf in ("embed", "head"):
      expected[leaf] = np.asarray(expected[leaf])[order]

  def check(path, x, y):
    assert x.dtype == y.dtype == jnp.dtype(out_dtype)
    x, y = (np.asarray(leaf, np.float32) for leaf in (x, y))
    assert x.shape == y.shape
    size = np.maximum(np.maximum(np.abs(x), np.abs(y)), 0.05)
    far = np.abs(x - y) > 2 * _STEP[out_dtype] * size
    if name == "ties":
      # Of those that tie at a threshold mergekit's sort keeps any.
      assert far.mean() < 0.05
      far &= ~_tied(path, *_params("base", "a", "b"))
    assert not far.any(), (path, np.abs(x - y).max())

  jax.tree_util.tree_map_with_path(check, found, expected)
  loaded = transformers.AutoModelForCausalLM.from_pretrained(
      place / "out", dtype="auto"
  )
  assert str(loaded.dtype) == f"torch.{out_dtype}"
  assert loaded.config.num_hidden_layers == config.layers
  assert len(loaded.model.layers) == {"passthrough": 7}.get(name, 3)
  assert loaded.config.vocab_size == len(found["embed"])
  np.testing.assert_array_equal(
      loaded.model.layers[-1].mlp.up_proj.weight.detach().float().numpy(),
      np.asarray(found["layers"]["mlp"]["up"][-1], np.float32),
  )
  assert convert.load_tokenizer(place / "out").eos_token == "</s>"
