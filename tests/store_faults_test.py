"""Whatever happens to disk and process, the archive opens or says why not."""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import runpy
import shutil
import sqlite3
import subprocess
import sys

import pytest

from selfdev_jax import config as config_lib
from selfdev_jax import records
from selfdev_jax import schema
from selfdev_jax import store as store_lib

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = config_lib.Config(name="t", seed_model="s", experts=("a",))
_PAGE = 4096


def _open(workdir):
  return store_lib.Store.create(workdir, _CONFIG, {}, {})


def _completions(start, n):
  return [
      records.Completion("loop", 1, i, "x" * 500, True)
      for i in range(start, start + n)
  ]


@pytest.fixture
def workdir(tmp_path):
  """With an archive of some hundred pages."""
  with _open(tmp_path) as archive, archive.activity("loop", 1, "propose"):
    archive.add_factory(1, "")
    archive.add_completions(_completions(0, 1000))
  return tmp_path


@pytest.fixture
def killed(workdir, tmp_path_factory):
  """The same with 10 more completions in the log of a killed run."""
  copy = tmp_path_factory.mktemp("killed")
  with _open(workdir) as archive, archive.activity("loop", 1, "propose"):
    archive.add_completions(_completions(1000, 10))
    for name in ("archive.sqlite", "archive.sqlite-wal"):
      shutil.copyfile(workdir / name, copy / name)
  return copy


def _files(workdir):
  """What may not change: the archive and its log."""
  return {
      path.name: hashlib.sha256(path.read_bytes()).hexdigest()
      for path in workdir.glob("archive.sqlite*")
      # Made by any reader, and made again; an empty log says nothing.
      if not path.name.endswith("-shm") and path.stat().st_size
  }


def _read_all(workdir):
  with store_lib.Store.read(workdir) as archive:
    for table in schema.METADATA.tables:
      archive.rows(f"SELECT * FROM {table}")


def _check_refused(workdir, match):
  """Reader and writer each say so in one line and change nothing."""
  before = _files(workdir)
  for use in (_read_all, _open):
    with pytest.raises(store_lib.StoreError, match=match) as error:
      use(workdir)
    assert "\n" not in str(error.value)
    assert str(workdir) in str(error.value)
    assert _files(workdir) == before


# Files that are no archive, or no more.


@pytest.mark.parametrize("version", ["7", "99", "2ac4f1"])
def test_an_archive_of_a_future_version(killed, version):
  with contextlib.closing(sqlite3.connect(killed / "archive.sqlite")) as db:
    db.execute("PRAGMA wal_autocheckpoint=0")
    db.execute("UPDATE alembic_version SET version_num = ?", [version])
    db.commit()
    _copy_over_itself(killed)
  _check_refused(killed, f"schema {version}, of a later version")


def _copy_over_itself(workdir):
  """Keeps the log, which the last to close would write into the file."""
  for path in list(workdir.glob("archive.sqlite*")):
    content = path.read_bytes()
    path.unlink()
    if not path.name.endswith("-shm"):
      path.write_bytes(content)


@pytest.mark.parametrize("where", ["workdir", "killed"])
def test_a_corrupt_page(where, request):
  workdir = request.getfixturevalue(where)
  path = workdir / "archive.sqlite"
  content = bytearray(path.read_bytes())
  middle = len(content) // _PAGE // 2 * _PAGE
  for i in range(middle, middle + 100):
    content[i] ^= 0xFF
  path.write_bytes(content)
  _check_refused(workdir, "is damaged .*; nothing was changed")


def test_a_file_that_lost_its_end(workdir):
  path = workdir / "archive.sqlite"
  path.write_bytes(path.read_bytes()[: 10 * _PAGE + 7])
  _check_refused(workdir, "is damaged")


@pytest.mark.parametrize("content", [b"not a database" * 100, b"\0" * 9000])
def test_what_is_no_database(tmp_path, content):
  (tmp_path / "archive.sqlite").write_bytes(content)
  _check_refused(tmp_path, "is no archive")


def test_another_programs_database(tmp_path):
  with contextlib.closing(sqlite3.connect(tmp_path / "archive.sqlite")) as db:
    db.execute("CREATE TABLE bookmarks (url)")
    db.execute("INSERT INTO bookmarks VALUES ('x')")
    db.commit()
  _check_refused(tmp_path, "is no archive: it has other tables")


def test_another_program_holds_the_file(workdir, monkeypatch):
  monkeypatch.setattr(store_lib, "_BUSY_S", 0.01)
  with contextlib.closing(sqlite3.connect(workdir / "archive.sqlite")) as db:
    db.execute("BEGIN IMMEDIATE")
    with pytest.raises(store_lib.StoreError, match="another program holds"):
      _open(workdir)
    _read_all(workdir)


# Directories that are no workdirs.


def test_there_is_nothing_to_read(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
    with pytest.raises(store_lib.StoreError, match="holds no run"):
      store_lib.Store.read(path)
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["best", "factories", "report.html"])
def test_what_a_run_would_overwrite(tmp_path, name):
  (tmp_path / name).write_text("mine")
  with pytest.raises(store_lib.StoreError, match=f"but {name}, which a run"):
    _open(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / "file").write_text("mine")
  with (
      pytest.raises(store_lib.StoreError, match="cannot be used"),
      store_lib.lock(tmp_path / "file"),
  ):
    pass
  assert (tmp_path / "file").read_text() == "mine"


# Disks. `unshare` gives a process mounts of its own.


def _mounted(mount, code, workdir, *args):
  """Runs `code` where `workdir` is mounted otherwise; its lines."""
  unshare = ["unshare", "-Urm", "sh", "-ec"]
  try:
    subprocess.run([*unshare, "true"], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"no mount namespace: {error}")
  script = f'{mount}\nexec "$PYTHON" -c "$CODE" "$@"'
  ended = subprocess.run(
      [*unshare, script, "sh", workdir, *args],
      env={"PYTHON": sys.executable, "CODE": _HEAD + code, "PATH": _PATH},
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  assert not ended.returncode, ended.stderr
  return ended.stdout.splitlines()


_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_HEAD = """
import os, sys
from selfdev_jax import config, records, store
c = config.Config(name="t", seed_model="s", experts=("a",))
workdir = sys.argv[1]

def attempt(work):
  try:
    print(work())
  except store.StoreError as error:
    print(error)

def look():
  with store.Store.read(workdir) as archive:
    return len(archive.completions("loop", 1))

def completions(n):
  return [records.Completion("loop", 1, i, "x" * 500, True) for i in range(n)]
"""
_READ_ONLY = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"'
_LOOK_AND_WRITE = """
def lock():
  with store.lock(workdir):
    pass

attempt(look)
attempt(lambda: store.Store.create(workdir, c, {}, {}))
attempt(lock)
"""


@pytest.mark.parametrize(
    ("where", "index", "n"),
    [
        ("workdir", None, "1000"),
        ("killed", None, "1010"),
        # As a reader leaves it, and after a power cut.
        pytest.param("killed", b"", "1010", marks=pytest.mark.slow),
        pytest.param(
            "killed", b"\0" * (1 << 15), "1010", marks=pytest.mark.slow
        ),
    ],
    ids=["clean", "log", "log, empty index", "log, index of zeros"],
)
def test_a_read_only_disk(where, index, n, request):
  workdir = request.getfixturevalue(where)
  if index is not None:
    (workdir / "archive.sqlite-shm").write_bytes(index)
  before = _files(workdir)
  read, written, locked = _mounted(_READ_ONLY, _LOOK_AND_WRITE, workdir)
  assert read == n
  assert "cannot be written" in written and str(workdir) in written
  assert "cannot be used: " in locked and "Read-only file system" in locked
  assert _files(workdir) == before


_SMALL = 'mount -t tmpfs -o size=2m tmpfs "$1"'
_FILL = """
ballast = os.path.join(workdir, "ballast")
with open(ballast, "wb") as file:
  file.write(bytes(1 << 20))
with store.Store.create(workdir, c, {}, {}) as archive:
  def write(n):
    archive.add_completions(completions(n))
    return "written"

  with archive.activity("loop", 1, "propose"):
    archive.add_factory(1, "")
    attempt(lambda: write(5000))
    attempt(look)
    os.unlink(ballast)
    attempt(lambda: write(500))
attempt(look)
"""


def test_a_full_disk(tmp_path):
  full, none, written, all_ = _mounted(_SMALL, _FILL, tmp_path)
  assert "the disk is full" in full and "the same command resumes" in full
  assert (none, written, all_) == ("0", "written", "500")


def test_a_full_disk_leaves_the_archive_intact(workdir):
  with _open(workdir) as archive:
    # SQLite's own limit raises what a full disk raises.
    ((pages,),) = archive.rows("PRAGMA page_count")
    archive.rows(f"PRAGMA max_page_count={pages}")
    more = _completions(1000, 1000)
    with (
        pytest.raises(store_lib.StoreError, match="disk is full"),
        archive.activity("loop", 1, "propose"),
    ):
      archive.add_completions(more)
    assert len(archive.completions("loop", 1)) == 1000
    archive.rows("PRAGMA max_page_count=100000")
    with archive.activity("loop", 1, "propose"):
      archive.add_completions(more)
  with store_lib.Store.read(workdir) as archive:
    assert archive.completions("loop", 1)[1000:] == more
    assert archive.rows("PRAGMA integrity_check") == [("ok",)]


# Processes.


def test_ctrl_c_within_a_statement_stays_ctrl_c(workdir, monkeypatch):
  with _open(workdir) as archive:
    with monkeypatch.context() as patch:
      patch.setattr(archive._db.dialect, "do_executemany", _interrupt)
      with (
          pytest.raises(KeyboardInterrupt),
          archive.activity("loop", 1, "propose"),
      ):
        archive.add_completions(_completions(1000, 2))
    assert len(archive.completions("loop", 1)) == 1000
    assert not archive.activities()[-1].finished
    with archive.activity("loop", 1, "propose"):
      archive.add_completions(_completions(1000, 2))


def _interrupt(cursor, statement, parameters, context=None):
  cursor.executemany(statement, parameters)
  raise KeyboardInterrupt


_WRITER = _ROOT / "tests" / "store_writer.py"
_ENVIRONMENT = dict(os.environ, PYTHONPATH=str(_ROOT))


def _start(*args):
  return subprocess.Popen(
      [sys.executable, _WRITER, *map(str, args)],
      env=_ENVIRONMENT,
      stdout=subprocess.PIPE,
      text=True,
  )


@pytest.mark.slow
def test_readers_during_writes_see_one_moment(tmp_path):
  """Each of eight readers checks all rows against each other, twice a look."""
  writer = _start("write", tmp_path)
  with writer:
    writer.stdout.readline()
    readers = [_start("read", tmp_path, 6) for _ in range(8)]
    ended = [reader.communicate()[0] for reader in readers]
    writer.kill()
  assert [reader.returncode for reader in readers] == [0] * 8
  for result in map(json.loads, ended):
    assert result["looks"] >= 10
    assert result["last"] > result["first"] > 0


@pytest.mark.slow
def test_a_writer_that_is_killed_loses_nothing_that_it_said(tmp_path):
  killer = _start("kill", tmp_path, 300)
  result = json.loads(killer.communicate()[0])
  assert not killer.returncode
  assert result["lost"] == 0
  assert result["made"] >= 200 and result["commits"] >= 1000


_CUTS = 40


@pytest.fixture
def writer(monkeypatch):
  # `write` sets it, and later tests shall not have it.
  monkeypatch.setattr(store_lib, "_BEAT_S", store_lib._BEAT_S)
  return runpy.run_path(str(_WRITER))


def test_a_power_cut_leaves_what_was_written_until_some_moment(
    tmp_path, writer
):
  """The log loses its end, anywhere; what is left is a state that was."""
  for name in ("whole", "cut"):
    (tmp_path / name).mkdir()
  live, whole, cut = tmp_path, tmp_path / "whole", tmp_path / "cut"
  out = os.open(os.devnull, os.O_WRONLY)
  writer["write"](live, out, 7)
  archive = writer["create"](live)
  with archive, archive.activity("loop", 1, "propose"):
    for k in range(7, 30):
      writer["commit"](archive, k)
    for name in ("archive.sqlite", "archive.sqlite-wal", "archive.sqlite-shm"):
      shutil.copyfile(live / name, whole / name)
  os.close(out)
  size = (whole / "archive.sqlite-wal").stat().st_size
  rng = random.Random(0)
  frames = range(32, size, 24 + _PAGE)
  cuts = {0, 1, 31, size, *rng.sample(frames, 8)}
  cuts |= {rng.randrange(size) for _ in range(_CUTS - len(cuts))}
  seen = []
  for end in sorted(cuts):
    for path in whole.iterdir():
      shutil.copyfile(path, cut / path.name)
    os.truncate(cut / "archive.sqlite-wal", end)
    # Its index is no part of what has to survive.
    index = cut / "archive.sqlite-shm"
    match end % 3:
      case 0:
        index.unlink()
      case 1:
        index.write_bytes(rng.randbytes(1 << 15))
    with store_lib.Store.read(cut) as reader:
      seen.append(writer["check"](reader))
    with writer["create"](cut) as again:
      assert writer["check"](again) == seen[-1]
      with again.activity("loop", 1, "propose"):
        writer["commit"](again, seen[-1])
      assert writer["check"](again) == seen[-1] + 1
  assert seen == sorted(seen)
  assert (seen[0], seen[-1]) == (7, 30) and len(set(seen)) > 15
