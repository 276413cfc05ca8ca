"""Workdirs at URLs: what is pushed, what a kill leaves, who may write."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import fsspec
from fsspec.implementations import local as fsspec_local
from fsspec.implementations import memory as fsspec_memory
import pytest

from selfdev_jax import errors
from selfdev_jax import storage
from selfdev_jax import store as store_lib


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """machine(name): from now on this is that machine."""

  def machine(name):
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "caches" / name))
    monkeypatch.setattr(storage.socket, "gethostname", lambda: name)

  machine("one")
  return machine


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
  if request.param == "file":
    yield (tmp_path / "bucket" / "run").as_uri()
    return
  yield "memory://bucket/run"
  with contextlib.suppress(FileNotFoundError):
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def _write(workdir, name, text):
  path = workdir / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def _add(workdir, value):
  """A row more in the archive, whose log is left as a killed run leaves it."""
  db = sqlite3.connect(workdir / "archive.sqlite")
  db.execute("PRAGMA journal_mode=WAL")
  db.execute("CREATE TABLE IF NOT EXISTS t (x)")
  db.execute("INSERT INTO t VALUES (?)", [value])
  db.commit()
  return db


def _rows(workdir):
  path = pathlib.Path(workdir) / "archive.sqlite"
  with contextlib.closing(sqlite3.connect(path)) as db:
    return [x for (x,) in db.execute("SELECT x FROM t ORDER BY rowid")]


def _read(url):
  with storage.fetch(url) as workdir:
    return _rows(workdir)


def _tree(workdir):
  """Names and content, the archive and locks left out."""
  return {
      path.relative_to(workdir).as_posix(): path.read_bytes()
      for path in sorted(workdir.rglob("*"))
      if path.is_file() and not path.name.startswith(("archive", "lock"))
  }


def _objects(url):
  fs, root = fsspec.core.url_to_fs(url)
  fs.invalidate_cache()
  return [path[len(root) + 1 :] for path in fs.find(root)]


def test_names_are_those_of_the_store():
  assert storage._ARCHIVE == store_lib.ARCHIVE
  assert storage._LOCK == store_lib._LOCK


@pytest.mark.parametrize("given", ["runs/tiny", "./x", pathlib.Path("/x/y")])
def test_a_directory_is_itself(given, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert not storage.is_remote(given)
  with storage.open_workdir(given) as (workdir, push):
    assert workdir == pathlib.Path(given)
    push()
  with storage.fetch(given) as workdir:
    assert workdir == given
  assert not pathlib.Path(given).exists()


def test_another_machine_goes_on(machine, url, capsys):
  with storage.open_workdir(url) as (first, _):
    db = _add(first, 1)
    _write(first, "factories/iteration_2/adapter.json", "{}")
    _write(first, "dpo/1/checkpoints/20/d/data", "weights")
  expected = _tree(first)
  db.close()
  machine("two")
  capsys.readouterr()
  with storage.open_workdir(url) as (second, _):
    assert second != first
    assert _rows(second) == [1] and _tree(second) == expected
    _add(second, 2).close()
    _write(second, "dpo/1/checkpoints/20/d/data", "other")
    (second / "factories/iteration_2/adapter.json").unlink()
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  assert said.startswith(
      f"Note: {url} was fetched into {second}, as one pushed"
  )
  machine("one")
  with storage.open_workdir(url) as (first, _):
    assert _rows(first) == [1, 2] and _tree(first) == _tree(second)
  assert not list(first.parent.glob("aside-*"))
  assert _read(url) == [1, 2]


def test_a_push_between(machine, url):
  """What a kill -9 leaves there is the last push."""
  with storage.open_workdir(url) as (workdir, push):
    db = _add(workdir, 1)
    push()
    _add(workdir, 2).close()
    db.close()
    assert _read(url) == [1]


def test_the_same_machine_keeps_its_copy(machine, url, capsys):
  """Also what was not pushed; nothing comes from the URL."""
  with storage.open_workdir(url) as (workdir, _):
    _add(workdir, 1).close()
  _add(workdir, 2).close()  # And killed.
  capsys.readouterr()
  with storage.open_workdir(url + "/") as (again, _):
    assert again == workdir and _rows(again) == [1, 2]
  assert f"{url} goes on from this machine's copy" in capsys.readouterr().err
  assert _read(url) == [1, 2]


def test_a_copy_that_was_removed_is_fetched(machine, url):
  with storage.open_workdir(url) as (workdir, _):
    _add(workdir, 1).close()
    _write(workdir, "best/config.json", "{}")
  for name in ("archive.sqlite", "best/config.json"):
    (workdir / name).unlink()
  with storage.open_workdir(url) as (workdir, _):
    assert _rows(workdir) == [1] and (workdir / "best/config.json").is_file()


def test_a_part_of_a_copy_that_was_removed_is_fetched(machine, url):
  """It is not removed at the URL; what was not pushed stays."""
  with storage.open_workdir(url) as (workdir, _):
    _add(workdir, 1).close()
    _write(workdir, "dpo/1/metrics.jsonl", "{}")
    _write(workdir, "best/config.json", "{}")
  _add(workdir, 2).close()  # And killed.
  (workdir / "best/config.json").unlink()
  for name in ("one", "two"):
    machine(name)
    with storage.open_workdir(url) as (workdir, _):
      assert set(_tree(workdir)) == {"dpo/1/metrics.jsonl", "best/config.json"}
      assert _rows(workdir) == [1, 2]


def test_a_url_that_was_emptied_stays_so(machine, tmp_path, capsys):
  url = (tmp_path / "bucket").as_uri()
  with storage.open_workdir(url) as (workdir, _):
    _add(workdir, 1).close()
  shutil.rmtree(tmp_path / "bucket")
  capsys.readouterr()
  with storage.open_workdir(url) as (workdir, _):
    assert not list(workdir.iterdir())
  (aside,) = workdir.parent.glob("aside-*")
  assert _rows(aside) == [1]
  assert f"{url} was emptied; what this machine had of it is in {aside}" in (
      capsys.readouterr().err
  )
  assert _objects(url) == ["MANIFEST.json"]


def test_what_was_lost_there_is_pushed_again(machine, url):
  with storage.open_workdir(url) as (workdir, push):
    _write(workdir, "a", "x")
    push()
    fs, root = fsspec.core.url_to_fs(url)
    (path,) = fs.find(f"{root}/files")
    fs.rm(path)
    push()
    assert [f"{root}/{name}" for name in _objects(url) if "/a." in name] == [
        path
    ]


def test_only_what_changed_is_written(machine, url, monkeypatch):
  uploaded = []
  upload = storage._Remote.upload

  def spy(self, name, path, file):
    uploaded.append(name)
    return upload(self, name, path, file)

  monkeypatch.setattr(storage._Remote, "upload", spy)
  with storage.open_workdir(url) as (workdir, push):
    _add(workdir, 1).close()
    _write(workdir, "best/model", "x" * 1000)
    push()
    assert uploaded == ["archive.sqlite", "best/model"]
    before = _objects(url)
    push()
    assert len(uploaded) == 2
    _write(workdir, "best/model", "y" * 1000)
    push()
    assert uploaded[2:] == ["best/model"]
    after = _objects(url)
    assert len(before) == 3 and set(before) < set(after)
    assert len(after) == 4  # What the state before names is still there.
    _write(workdir, "best/model", "z" * 1000)
    push()
  last = _objects(url)
  assert len(last) == 4 and len(set(after) - set(last)) == 1


def test_temporary_files_stay(machine, url):
  with storage.open_workdir(url) as (workdir, _):
    for name in (
        "dpo/1/checkpoints/20.orbax-checkpoint-tmp-3/d/data",
        "dpo/1/discarded/20/data",
        ".best.partial/model",
        "report.1.tmp",
        "lock",
    ):
      _write(workdir, name, "x")
    (workdir / "link").symlink_to("/etc/passwd")
    _add(workdir, 1)
    _write(workdir, "report.html", "x")
  machine("two")
  with storage.open_workdir(url) as (workdir, _):
    assert set(_tree(workdir)) == {"report.html"}


def test_fetch_takes_what_is_asked_for(machine, url):
  with storage.open_workdir(url) as (workdir, _):
    _add(workdir, 1).close()
    _write(workdir, "best/config.json", "{}")
    _write(workdir, "factories/iteration_2/x", "{}")
  with storage.fetch(url) as copy:
    assert not _tree(copy)
  with storage.fetch(url, what=["best"]) as copy:
    assert set(_tree(copy)) == {"best/config.json"}
  assert not copy.exists()


def test_fetch_follows(machine, url):
  with storage.open_workdir(url) as (workdir, push):
    _add(workdir, 1).close()
    push()
    with storage.fetch(url, every_s=0.05) as copy:
      assert _rows(copy) == [1]
      _add(workdir, 2).close()
      push()
      deadline = time.monotonic() + 20
      while _rows(copy) != [1, 2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_copies_of_killed_readers_are_removed(machine, url, tmp_path):
  with storage.open_workdir(url) as (workdir, _):
    _add(workdir, 1).close()
  with storage.fetch(url) as other:
    other = pathlib.Path(other)
    left = other.parent.with_name("read-left")
    shutil.copytree(other.parent, left)  # Whose process is gone.
    assert _read(url) == [1]
    assert not left.exists()
    assert _rows(other) == [1]
  assert not list(left.parent.glob("*read-*"))


def test_pushed_faster_than_it_is_read(machine, url, monkeypatch):
  download = storage._Remote.download

  def slow(self, name, file, path):
    _write(workdir, "best/model", f"{time.monotonic_ns()}")
    push()
    _write(workdir, "best/model", f"{time.monotonic_ns()}")
    push()
    download(self, name, file, path)

  with storage.open_workdir(url) as (workdir, push):
    _add(workdir, 1).close()
    _write(workdir, "best/model", "x")
    push()
    monkeypatch.setattr(storage._Remote, "download", slow)
    with (
        pytest.raises(errors.UserError, match="faster than it can be read"),
        storage.fetch(url, what=["best"]),
    ):
      pass


def test_a_reader_needs_no_run(machine, url):
  """And what it says names the URL."""
  with pytest.raises(store_lib.StoreError) as error, storage.fetch(url) as copy:
    store_lib.Store.read(copy)
  assert str(error.value).startswith(f"{url} holds no run")
  assert _objects(url) == []


# Files that Orbax removes during a push.


def _checkpoints(workdir, *steps):
  """These are there, and no others."""
  top = workdir / "dpo/1/checkpoints"
  for step in steps:
    for name in "abz":
      _write(top / str(step), name, f"{step}{name}")
  for path in top.iterdir():
    if path.name not in map(str, steps):
      shutil.rmtree(path)


def _pushed(url):
  with storage.fetch(url, what=["dpo"]) as copy:
    return {f"{pathlib.Path(x).parent.name}{x[-1]}" for x in _tree(copy)}


@pytest.mark.parametrize("at", ["50/a", "100/b", "100/z"])
def test_a_checkpoint_is_pushed_whole(machine, url, monkeypatch, at):
  """Where it is removed in the middle, those that are there now are."""
  upload = storage._Remote.upload

  def replacing(self, name, path, file):
    found = upload(self, name, path, file)
    if name.endswith(at):
      _checkpoints(workdir, 150, 200)
    return found

  monkeypatch.setattr(storage._Remote, "upload", replacing)
  with storage.open_workdir(url) as (workdir, push):
    _checkpoints(workdir, 50, 100)
    push()
    assert _pushed(url) == {f"{s}{x}" for s in (150, 200) for x in "abz"}


def test_half_of_a_known_checkpoint_is_not_kept(machine, url, monkeypatch):
  """What is left of it when files are listed is gone when they are pushed."""
  upload = storage._Remote.upload

  def removing(*args):
    _checkpoints(workdir, 100)
    return upload(*args)

  with storage.open_workdir(url) as (workdir, push):
    _checkpoints(workdir, 50, 100)
    push()
    (workdir / "dpo/1/checkpoints/50/a").unlink()
    _write(workdir, "new", "x")
    monkeypatch.setattr(storage._Remote, "upload", removing)
    push()
    assert _pushed(url) == {"100a", "100b", "100z"}


def test_what_never_stays_is_not_pushed(machine, url, monkeypatch, capsys):
  upload = storage._Remote.upload
  step = 50

  def replacing(self, name, path, file):
    nonlocal step
    found = upload(self, name, path, file)
    if name.endswith("b"):
      step += 50
      _checkpoints(workdir, step)
    return found

  with storage.open_workdir(url) as (workdir, push):
    _checkpoints(workdir, step)
    push()
    before = _pushed(url)
    step = 100
    _checkpoints(workdir, step)
    with monkeypatch.context() as patched:
      patched.setattr(storage._Remote, "upload", replacing)
      push()
    assert f"Note: {url} stays as it was: files" in capsys.readouterr().err
    assert _pushed(url) == before == {"50a", "50b", "50z"}
    push()
    assert _pushed(url) == {f"{step}{x}" for x in "abz"}


# Faults.


class _LostError(OSError):
  pass


@pytest.fixture
def faults(url, monkeypatch):
  """faults.left: how many accesses to the store work before none does."""

  class Faults:
    left = 10**9

  def failing(method):
    def call(*args, **kwargs):
      Faults.left -= 1
      if Faults.left < 0:
        raise _LostError("the network is gone")
      return method(*args, **kwargs)

    return call

  cls = fsspec_memory.MemoryFileSystem
  if url.startswith("file"):
    cls = fsspec_local.LocalFileSystem
  for name in ("open", "pipe_file", "mv", "rm", "cat_file"):
    monkeypatch.setattr(cls, name, failing(getattr(cls, name)))
  return Faults


@pytest.mark.parametrize("works", range(14))
def test_a_push_that_fails_leaves_the_state_before(
    machine, url, faults, capsys, works
):
  """So many accesses work and none after, so that nothing mends it."""
  with storage.open_workdir(url) as (workdir, _):
    _add(workdir, 1).close()
    _write(workdir, "best/model", "old")
  old, new = ([1], {"best/model": b"old"}), ([1, 2], {"best/model": b"new"})
  is_lost = False
  try:
    with storage.open_workdir(url) as (workdir, push):
      _add(workdir, 2).close()
      _write(workdir, "best/model", "new")
      faults.left = works
      push()
      is_lost = faults.left < 0
      if not is_lost:
        faults.left = 10**9
  except errors.UserError as error:
    assert is_lost and "\n" not in str(error)
    assert f"{url} cannot be " in str(error) and "network is" in str(error)
    # The push in the middle does not end the run.
    assert f"Note: {url} cannot be" in capsys.readouterr().err
  faults.left = 10**9
  machine("two")
  with storage.open_workdir(url) as (copy, _):
    found = (_rows(copy), _tree(copy))
  assert found in (old, new)
  # The first accesses ask who wrote last; thirteen are enough for all.
  if works < 3:
    assert is_lost and found == old
  if works == 13:
    assert not is_lost
  assert is_lost or found == new


def test_what_was_cut_short_is_pushed_too(machine, url):
  with pytest.raises(KeyboardInterrupt), storage.open_workdir(url) as opened:
    _add(opened[0], 1).close()
    raise KeyboardInterrupt
  assert _read(url) == [1]


_RUN = """
import pathlib, sqlite3, sys
from selfdev_jax import storage
with storage.open_workdir(sys.argv[1]) as (workdir, push):
  db = sqlite3.connect(workdir / "archive.sqlite", isolation_level=None)
  db.execute("PRAGMA journal_mode=WAL")
  db.execute("CREATE TABLE IF NOT EXISTS t (x)")
  (n,) = db.execute("SELECT COUNT(*) FROM t").fetchone()
  for x in range(n, 1_000_000):
    (workdir / "of").write_text(str(x) * 100_000)
    db.execute("INSERT INTO t VALUES (?)", [x])
    push()
    print(x, flush=True)
"""


def test_killed_at_any_time(machine, tmp_path):
  """kill -9 in the middle of pushes; then the other machine, and so on."""
  url = (tmp_path / "bucket").as_uri()
  last = -1
  for i in range(4):
    environment = dict(
        os.environ, SELFDEV_CACHE=str(tmp_path / "caches" / str(i % 2))
    )
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, url],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
      said = [int(process.stdout.readline()) for _ in range(3)]
      time.sleep(0.003 * i)
      process.send_signal(signal.SIGKILL)
      said += [int(line) for line in process.stdout if line.endswith("\n")]
    assert said[0] == last + 1
    with storage.fetch(url, what=["of"]) as copy:
      rows = _rows(copy)
      # The two are of one push.
      assert (copy / "of").read_text() == str(rows[-1]) * 100_000
    assert rows == list(range(len(rows)))
    assert len(rows) - 1 >= said[-1]
    last = rows[-1]


# Two writers.


def test_who_came_later_has_it(machine, url, capsys):
  with (
      pytest.raises(errors.UserError) as error,
      storage.open_workdir(url) as (first, push),
  ):
    _add(first, 1).close()
    push()
    machine("two")
    with storage.open_workdir(url) as (second, push_there):
      _add(second, 2).close()
      push_there()
      _add(first, 3).close()
      push()
  line = str(error.value)
  assert "\n" not in line
  assert f"{url} is no longer this run's: two pushed it at" in line
  assert _read(url) == [1, 2]
  assert _rows(first) == [1, 3]
  # What it had is not lost when it takes the workdir up again.
  machine("one")
  capsys.readouterr()
  with storage.open_workdir(url) as (first, _):
    assert _rows(first) == [1, 2]
  (aside,) = first.parent.glob("aside-*")
  assert _rows(aside) == [1, 3]
  assert str(aside) in capsys.readouterr().err


def _is_whole(url):
  """All that the manifest names is there, as it says."""
  remote = storage._Remote(url)
  return not remote.gone(remote.read().files)


def test_a_push_while_another_fetches(machine, url, monkeypatch):
  """It is refused, and removes nothing that is fetched."""
  download = storage._Remote.download
  lines = []

  def slow(*args):
    if not lines:
      _write(first, "dpo/ck", "100")
      with pytest.raises(errors.UserError, match="no longer this") as error:
        push()
      lines.append(str(error.value))
    download(*args)

  with (
      pytest.raises(errors.UserError, match="no longer this run's: two pushed"),
      storage.open_workdir(url) as (first, push),
  ):
    _add(first, 1).close()
    _write(first, "dpo/ck", "50")
    push()
    machine("two")
    monkeypatch.setattr(storage._Remote, "download", slow)
    with storage.open_workdir(url) as (second, _):
      assert lines
      assert _rows(second) == [1] and _tree(second) == {"dpo/ck": b"50"}
  assert _is_whole(url)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_push_at_the_time_of_a_claim(machine, url, monkeypatch, when):
  """Its last look came before; whose manifest is there then is whole."""
  write = storage._Remote.write
  opened = contextlib.ExitStack()

  def at_once(self, manifest):
    monkeypatch.setattr(storage._Remote, "write", write)
    if when == "before":
      write(self, manifest)
    machine("two")

    def claim(remote, claimed):
      """The old run's push goes on after it."""
      monkeypatch.setattr(storage._Remote, "write", write)
      write(remote, claimed)
      if when == "after":
        write(self, manifest)

    monkeypatch.setattr(storage._Remote, "write", claim)
    found.append(opened.enter_context(storage.open_workdir(url))[0])

  found = []
  with (
      opened,
      pytest.raises(errors.UserError, match="no longer this run's: two pushed"),
      storage.open_workdir(url) as (first, push),
  ):
    _add(first, 1).close()
    _write(first, "dpo/ck", "50")
    push()
    _write(first, "dpo/ck", "100")
    monkeypatch.setattr(storage._Remote, "write", at_once)
    push()
  assert _tree(found[0]) == {"dpo/ck": b"100"}
  assert _is_whole(url)
  machine("three")
  with storage.open_workdir(url) as (third, _):
    assert _rows(third) == [1] and _tree(third) == {"dpo/ck": b"100"}


def _claimed_meanwhile(url, patch):
  """Pushes twice, and then is told that two has the workdir.

  Args:
    url: of the workdir.
    patch: called before the second push with two's claim, which names the files
      of the first.
  """
  with (
      pytest.raises(errors.UserError, match="no longer this run's: two pushed"),
      storage.open_workdir(url) as (first, push),
  ):
    _write(first, "dpo/ck", "50")
    push()
    there = storage._Remote(url).read()
    _write(first, "dpo/ck", "100")
    patch(dataclasses.replace(there, writer="x", host="two"))
    push()


def test_a_claim_that_replaces_a_push(machine, url, monkeypatch):
  """It had read the state before, of which nothing is removed then."""
  read = storage._Remote.read
  is_over = False

  def patch(claim):
    def stale(self):
      """Another claims while this push is written."""
      nonlocal is_over
      found = read(self)
      if not is_over and found.files["dpo/ck"].size == 3:
        is_over = True
        self.write(claim)
        return claim
      return found

    monkeypatch.setattr(storage._Remote, "read", stale)

  _claimed_meanwhile(url, patch)
  assert is_over
  assert _is_whole(url)


def test_a_claim_between_the_look_and_the_removal(machine, url, monkeypatch):
  """It names the state before the one that has just been pushed."""
  clean = storage._Remote.clean

  def patch(claim):
    def late(self, *manifests):
      self.write(claim)
      clean(self, *manifests)

    monkeypatch.setattr(storage._Remote, "clean", late)

  _claimed_meanwhile(url, patch)
  monkeypatch.undo()
  machine("three")
  with storage.open_workdir(url) as (there, _):
    assert (there / "dpo/ck").read_text() == "50"


@pytest.mark.parametrize("what", ["run", "run/archive.sqlite"])
def test_a_copy_that_is_removed_meanwhile(machine, url, what):
  with (
      pytest.raises(errors.UserError, match="was removed") as caught,
      storage.open_workdir(url) as (workdir, push),
  ):
    _add(workdir, 1).close()
    push()
    gone = workdir.parent / what
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    push()
  assert url in str(caught.value) and "\n" not in str(caught.value)
  with storage.open_workdir(url) as (workdir, _):
    assert _rows(workdir) == [1]


def test_what_cannot_be_removed_there(machine, url, monkeypatch, capsys):
  def clean(self, *manifests):
    raise storage._UnreachableError("no right to delete")

  monkeypatch.setattr(storage._Remote, "clean", clean)
  with storage.open_workdir(url) as (workdir, _):
    _add(workdir, 1).close()
  assert "no right to delete" in capsys.readouterr().err
  assert _read(url) == [1]


def test_a_fetch_that_was_killed_before_it_was_noted(machine, url, monkeypatch):
  with storage.open_workdir(url) as (workdir, _):
    _add(workdir, 1).close()
  machine("two")

  def killed(self, manifest):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(storage._Mirror, "_pushing", killed)
    with pytest.raises(KeyboardInterrupt), storage.open_workdir(url):
      pass
  with storage.open_workdir(url) as (workdir, _):
    assert _rows(workdir) == [1]
    assert not list(workdir.parent.glob("aside-*"))


def test_opened_elsewhere_for_nothing(machine, url):
  """What this machine has not pushed is ahead of that, not beside it."""
  with storage.open_workdir(url) as (first, _):
    _add(first, 1).close()
  _add(first, 2).close()  # And killed.
  machine("two")
  with storage.open_workdir(url):
    pass
  machine("one")
  with storage.open_workdir(url) as (again, _):
    assert _rows(again) == [1, 2]


def test_one_process_of_a_machine(machine, url):
  with (
      storage.open_workdir(url),
      pytest.raises(errors.UserError, match="is in use by process") as error,
      storage.open_workdir(url),
  ):
    pytest.fail("it has two")
  assert str(os.getpid()) in str(error.value) and url in str(error.value)


# Nonsense.


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("gs://bucket/run", r"installed: pip install -e .\[gcs\]$"),
        ("s3://bucket/run", r"installed: pip install -e .\[s3\]$"),
        ("nothing://x/y", "^nothing://x/y is no URL to work at .*gs:// and"),
    ],
)
@pytest.mark.parametrize("use", [storage.open_workdir, storage.fetch])
def test_what_is_not_installed(machine, monkeypatch, use, url, line):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  monkeypatch.setitem(sys.modules, "s3fs", None)
  with pytest.raises(errors.UserError, match=line) as error, use(url):
    pass
  assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written(machine, tmp_path):
  (tmp_path / "file").write_text("x")
  url = f"file://{tmp_path}/file/run"
  with (
      pytest.raises(
          errors.UserError, match=r"cannot be .*credentials"
      ) as error,
      storage.open_workdir(url),
  ):
    pytest.fail("nothing is run where it cannot be kept")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: m | {"version": 2}, "of another version"),
        (lambda m: m | {"generation": None}, "damaged"),
        (lambda m: {"version": 1}, "damaged"),
        (lambda m: [m], "damaged"),
        (lambda m: m | {"files": {"../x": m["files"]["a"]}}, "'../x'"),
        (lambda m: m | {"files": {"/x": m["files"]["a"]}}, "'/x'"),
        *(
            (lambda m, n=n: m | {"files": {n: m["files"]["a"]}}, f"'{n}'")
            for n in ("lock", "archive.sqlite-journal", "a/x.partial/y")
        ),
        (
            lambda m: m
            | {"files": dict.fromkeys(("a", "a/b"), m["files"]["a"])},
            "'a/b'",
        ),
        (
            lambda m: m | {"files": {"a": m["files"]["a"] | {"sha256": "/.."}}},
            "a has no digest",
        ),
        (
            lambda m: m | {"files": {"a": m["files"]["a"] | {"size": 5}}},
            "a is not there, or is not what",
        ),
        (lambda m: m | {"files": {"b": m["files"]["a"]}}, "b is not there"),
    ],
)
def test_a_damaged_manifest(machine, tmp_path, change, line):
  url = (tmp_path / "bucket").as_uri()
  with storage.open_workdir(url) as (workdir, _):
    _write(workdir, "a", "x")
  path = tmp_path / "bucket" / "MANIFEST.json"
  path.write_text(json.dumps(change(json.loads(path.read_text()))))
  machine("two")
  with (
      pytest.raises(errors.UserError, match=line) as error,
      storage.open_workdir(url),
  ):
    pytest.fail("it was taken for whole")
  assert "\n" not in str(error.value) and url in str(error.value)


def test_other_files_there_stay(machine, tmp_path):
  bucket = tmp_path / "bucket"
  for name in ("mine.txt", "files/mine.txt"):
    _write(bucket, name, "x")
  with storage.open_workdir(bucket.as_uri()) as (workdir, push):
    _write(workdir, "a", "x")
    push()
    _write(workdir, "a", "y")
  for name in ("mine.txt", "files/mine.txt"):
    assert (bucket / name).read_text() == "x"
