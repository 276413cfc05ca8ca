"""Workdirs at URLs, such as gs://bucket/run: worked on in a mirror, and pushed.

SQLite needs a disk, so a run works in a directory of this machine's cache. What
stands at the URL is always one whole state of it:

  URL/MANIFEST.json                which files there are; written last
  URL/files/PATH.DIGEST            each under the digest of its content

A file that changes gets a new name, and the old one is kept for one state more.
So a push that is killed leaves the state before it. Whoever opens a
workdir to write puts his name into the manifest, and a run that finds another
name there stops.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from typing import Any
from typing import BinaryIO
import uuid

from fsspec import core as fsspec

from selfdev_jax import cache
from selfdev_jax import errors
from selfdev_jax import progress

# As in `store`, which is built on this.
_ARCHIVE = "archive.sqlite"
_LOCK = "lock"

_MANIFEST = "MANIFEST.json"
_VERSION = 1
_FILES = "files"
_DIGITS = 16  # Of a digest, in the name of a file.
_OURS = re.compile(rf"\.[0-9a-f]{{{_DIGITS}}}$")
_CHUNK = 1 << 22
_TRIES = 3

# What is not whole yet, or no longer: Orbax's, ours.
_TEMPORARY = re.compile(
    r"\.orbax-checkpoint-tmp|\.(partial|replaced|tmp)$|^discarded$"
)
# SQLite's own, beside the archive of which a copy is pushed.
_TOP = {_LOCK, _ARCHIVE} | {
    f"{_ARCHIVE}-{x}" for x in ("wal", "shm", "journal")
}

# Where SQLite's file format says how it is written. Without a log (1), or a
# reader would need to write one beside it; set here as a PRAGMA counts itself
# as a change, and a copy of a copy has to be the same bytes.
_JOURNAL = 18

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}


class _UnreachableError(errors.UserError):
  """It may be there again a minute later."""


class _TakenError(errors.UserError):
  """Another run has the workdir now."""


@dataclasses.dataclass(frozen=True)
class _File:
  """A file of a state.

  Attributes:
    size: in bytes.
    sha256: of its content, hexadecimal.
    mtime_ns: of the file that was pushed; spares the next push its digest.
  """

  size: int
  sha256: str
  mtime_ns: int

  @property
  def content(self) -> tuple[int, str]:
    return self.size, self.sha256


@dataclasses.dataclass(frozen=True)
class _Manifest:
  """A state of a workdir.

  Attributes:
    generation: counts the states, from 1.
    writer: an id of the session that wrote it.
    host: that this ran on.
    at: when, in seconds since 1970.
    files: by path.
  """

  generation: int
  writer: str
  host: str
  at: float
  files: Mapping[str, _File]

  def contents(self) -> dict[str, tuple[int, str]]:
    return {name: file.content for name, file in self.files.items()}

  def dumps(self) -> bytes:
    document = {"version": _VERSION, **dataclasses.asdict(self)}
    return json.dumps(document, indent=1, sort_keys=True).encode()


def _parse(text: bytes) -> _Manifest:
  """A manifest whose paths stay within the workdir.

  Raises:
    ValueError: saying what is wrong with it.
  """
  try:
    document = dict(json.loads(text))
    if document.pop("version") != _VERSION:
      raise ValueError("it is of another version of selfdev_jax")
    files = {
        str(name): _File(int(f["size"]), str(f["sha256"]), int(f["mtime_ns"]))
        for name, f in document.pop("files").items()
    }
    manifest = _Manifest(files=files, **document)
    _ = manifest.generation + 1, manifest.at + 1.0
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(f"{type(error).__name__}: {error}") from None
  for name, file in files.items():
    parts = name.split("/")
    above = {"/".join(parts[:n]) for n in range(1, len(parts))}
    if (
        set(parts) & {"", ".", ".."}
        or "\0" in name
        or name in _TOP - {_ARCHIVE}
        or any(map(_TEMPORARY.search, parts))
        or above & files.keys()
    ):
      raise ValueError(f"it names {name!r}")
    if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
      raise ValueError(f"{name} has no digest")
  return manifest


def is_remote(path: str | os.PathLike) -> bool:
  """Whether it is a URL."""
  return "://" in os.fspath(path)


@contextlib.contextmanager
def open_workdir(
    workdir: str | os.PathLike,
) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
  """Opens a workdir to write.

  Of a URL it gives the mirror on this machine, brought up to date where another
  machine was the last to push. At the end of the block it is pushed, also where
  that is left by an exception.

  Args:
    workdir: a directory, which is given as it is, or a URL.

  Yields:
    (the directory to work in, a function that pushes it). A push that does not
    get through says so, and the next one makes up for it.

  Raises:
    UserError: where the URL cannot be used, or the last push did not get
      through; naming the host of the run that has taken the workdir over.
  """
  if not is_remote(workdir):
    yield pathlib.Path(workdir), lambda: None
    return
  remote = _Remote(os.fspath(workdir))
  home = cache.directory() / "workdirs" / _name(remote.url)
  with _lock(home, remote.url):
    mirror = _Mirror(home, remote)
    mirror.open()
    try:
      yield mirror.local, mirror.push
    except _TakenError:
      raise
    except BaseException:
      try:
        mirror.push()
      except errors.UserError as error:
        progress.note(str(error))
      raise
    mirror.push_or_raise()


@contextlib.contextmanager
def fetch(
    workdir: str | os.PathLike,
    *,
    what: Collection[str] | None = None,
    every_s: float | None = None,
) -> Iterator[str | os.PathLike]:
  """Gives a directory that has the archive, to read.

  Args:
    workdir: a directory, which is given as it is, or a URL, of which it is a
      copy.
    what: names beside the archive's that are copied too, such as "factories".
    every_s: looks for a later state so often; None: never.

  Raises:
    UserError: where the URL cannot be used. In those that the block raises, the
      copy has the URL's name.
  """
  if not is_remote(workdir):
    yield workdir
    return
  remote = _Remote(os.fspath(workdir))
  with _scratch() as directory:
    copy = _Copy(remote, directory, {_ARCHIVE, *(what or ())})
    copy.update()
    if copy.manifest is not None:
      progress.note(f"{remote.url} is as {_pushed(copy.manifest)}")
    try:
      with copy.updated(every_s) if every_s else contextlib.nullcontext():
        yield copy.local
    except errors.UserError as error:
      text = str(error).replace(str(copy.local), remote.url)
      raise type(error)(text) from None


@contextlib.contextmanager
def _scratch() -> Iterator[pathlib.Path]:
  """An empty directory; those that killed processes had are removed."""
  top = cache.directory() / "workdirs"
  top.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    with open(top / "read.lock", "w") as all_of_them:
      fcntl.flock(all_of_them, fcntl.LOCK_EX)
      for left in top.glob("read-*"):
        with contextlib.suppress(OSError), open(left / _LOCK, "w") as lock:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
          shutil.rmtree(left)
      home = pathlib.Path(tempfile.mkdtemp(prefix="read-", dir=top))
      fcntl.flock(stack.enter_context(open(home / _LOCK, "w")), fcntl.LOCK_EX)
      stack.callback(shutil.rmtree, home)
    path = home / "run"
    path.mkdir()
    yield path


def _name(url: str) -> str:
  return hashlib.sha256(url.encode()).hexdigest()[:32]


def _pushed(manifest: _Manifest) -> str:
  at = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(manifest.at))
  return f"{manifest.host} pushed it at {at}"


@contextlib.contextmanager
def _lock(home: pathlib.Path, url: str) -> Iterator[None]:
  """One process of this machine has the mirror."""
  home.mkdir(parents=True, exist_ok=True)
  with open(home / _LOCK, "a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise errors.UserError(
          f"{url} is in use by process {file.read().strip() or '?'}; wait for"
          " it, stop it, or choose another --workdir"
      ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    yield


# Files and their digests.


def _paths(top: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
  """(name, path) of all that is pushed as it is, in order."""
  for directory, inner, names in os.walk(top):
    inner[:] = sorted(name for name in inner if not _TEMPORARY.search(name))
    for name in sorted(names):
      path = pathlib.Path(directory, name)
      relative = path.relative_to(top).as_posix()
      if relative in _TOP or _TEMPORARY.search(name) or path.is_symlink():
        continue
      yield relative, path


def _copied(source: BinaryIO, target: Any, size: int | None) -> _File:
  """Copies `size` bytes, or all; what was copied."""
  found, done = hashlib.sha256(), 0
  while size is None or done < size:
    chunk = source.read(_CHUNK if size is None else min(_CHUNK, size - done))
    if not chunk:
      break
    found.update(chunk)
    target.write(chunk)
    done += len(chunk)
  return _File(done, found.hexdigest(), 0)


class _Nowhere:

  def write(self, chunk: bytes):
    """Drops it."""


def _look(path: pathlib.Path, known: _File | None) -> _File:
  """What a file holds; as it was known, if it looks as it did then."""
  with open(path, "rb") as file:
    stat = os.fstat(file.fileno())
    if known and (known.size, known.mtime_ns) == (
        stat.st_size,
        stat.st_mtime_ns,
    ):
      return known
    # What is appended meanwhile is left to the next push.
    found = _copied(file, _Nowhere(), stat.st_size)
  return dataclasses.replace(found, mtime_ns=stat.st_mtime_ns)


@contextlib.contextmanager
def _snapshot(top: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """A copy of the archive as of its last commit; None where there is none."""
  archive = top / _ARCHIVE
  if not archive.is_file():
    yield None
    return
  # Beside the mirror: on a disk that has room for an archive.
  path = top.with_name("snapshot.sqlite")
  path.unlink(missing_ok=True)  # Of a push that was killed.
  try:
    with (
        contextlib.closing(
            sqlite3.connect(f"{archive.absolute().as_uri()}?mode=rw", uri=True)
        ) as source,
        contextlib.closing(sqlite3.connect(path)) as copy,
    ):
      try:
        source.backup(copy)
      except sqlite3.Error as error:
        raise errors.UserError(
            f"{archive} cannot be copied to be pushed: {error}"
        ) from None
    with open(path, "r+b") as file:
      file.seek(_JOURNAL)
      file.write(b"\1\1")
    yield path
  finally:
    path.unlink(missing_ok=True)


# The URL.


class _Remote:
  """What stands at a URL.

  Attributes:
    url: without a slash at its end.

  Raises:
    UserError: where nothing is installed that reads such URLs.
  """

  def __init__(self, url: str):
    self.url = url.rstrip("/")
    protocol = url.partition("://")[0]
    self._is_local = protocol in ("file", "local")
    options = {"auto_mkdir": True} if self._is_local else {}
    try:
      with self._reaching("opened"):
        self._fs, root = fsspec.url_to_fs(self.url, **options)
    except _UnreachableError as error:
      reason = " ".join(str(error.__cause__).split())
      if isinstance(error.__cause__, ImportError):
        extra = _EXTRAS.get(protocol)
        way = f"pip install -e .[{extra}]" if extra else reason
        line = f"{url} needs a package that is not installed: {way}"
      elif isinstance(error.__cause__, ValueError):
        line = f"{url} is no URL to work at ({reason}); gs:// and s3:// are"
      else:
        raise
      raise errors.UserError(line) from None
    self._root = root.rstrip("/")

  @contextlib.contextmanager
  def _reaching(self, doing: str) -> Iterator[None]:
    """Says in one line what a backend says; each has exceptions of its own."""
    try:
      yield
    except errors.UserError:
      raise
    except Exception as error:
      if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        raise
      reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
      raise _UnreachableError(
          f"{self.url} cannot be {doing} ({reason}); check that the bucket is"
          " there and that this machine has credentials for it"
      ) from error

  def _path(self, name: str, file: _File) -> str:
    return f"{self._root}/{_FILES}/{name}.{file.sha256[:_DIGITS]}"

  def read(self) -> _Manifest | None:
    """What there is; None for nothing.

    Raises:
      UserError: where it cannot be reached, or is no manifest.
    """
    with self._reaching("read"):
      try:
        text = self._fs.cat_file(f"{self._root}/{_MANIFEST}")
      except FileNotFoundError:
        return None
    try:
      return _parse(text)
    except ValueError as error:
      raise errors.UserError(
          f"{self.url}/{_MANIFEST} is damaged ({error}); name another --workdir"
      ) from None

  def write(self, manifest: _Manifest):
    """From now on this is what stands here."""
    path, text = f"{self._root}/{_MANIFEST}", manifest.dumps()
    with self._reaching("written"):
      if not self._is_local:
        self._fs.pipe_file(path, text)
        return
      # An object store replaces objects as a whole; a directory does not.
      draft = f"{path}.{manifest.writer}.tmp"
      self._fs.pipe_file(draft, text)
      self._fs.mv(draft, path)

  def upload(self, name: str, path: pathlib.Path, file: _File) -> bool:
    """Writes a file; false if it was replaced and no longer is what it was."""
    key = self._path(name, file)
    with (
        open(path, "rb") as source,
        self._reaching("written"),
        self._fs.open(key, "wb") as target,
    ):
      found = _copied(source, target, file.size)
    return found.content == file.content

  def download(self, name: str, file: _File, path: pathlib.Path):
    """Replaces `path` by the file.

    Raises:
      FileNotFoundError: if it is gone, or is not what the manifest says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with self._reaching("read"):
      try:
        source = self._fs.open(self._path(name, file), "rb")
        with source, open(partial, "wb") as target:
          found = _copied(source, target, None)
      except FileNotFoundError:
        found = None
    if found is None or found.content != file.content:
      raise FileNotFoundError(name)
    os.utime(partial, ns=(file.mtime_ns, file.mtime_ns))
    partial.replace(path)

  def damaged(self, name: object) -> errors.UserError:
    """For a file that cannot be downloaded."""
    return errors.UserError(
        f"{self.url} is damaged: {name} is not there, or is not what"
        f" {_MANIFEST} says"
    )

  def _found(self) -> list[str]:
    self._fs.invalidate_cache()
    top = f"{self._root}/{_FILES}/"
    return [path for path in self._fs.find(top) if path.startswith(top)]

  def gone(self, files: Mapping[str, _File]) -> set[str]:
    """The names of those that are not there."""
    with self._reaching("read"):
      found = set(self._found())
    return {n for n, file in files.items() if self._path(n, file) not in found}

  def clean(self, *manifests: _Manifest):
    """Removes files that none of them names, also those of killed pushes."""
    kept = {
        self._path(name, file)
        for manifest in manifests
        for name, file in manifest.files.items()
    }
    with self._reaching("written"):
      # Nothing but what a push has written.
      doomed = [p for p in self._found() if p not in kept and _OURS.search(p)]
      if doomed:
        self._fs.rm(doomed)


class _Copy:
  """Files of the state at a URL, in a directory.

  Attributes:
    local: the directory.
    manifest: that of the state; None where there is none.
  """

  def __init__(
      self, remote: _Remote, local: pathlib.Path, what: Collection[str] | None
  ):
    self.local = local
    self.manifest: _Manifest | None = None
    self._remote = remote
    self._what = what

  def update(self):
    """Brings the directory to the state that stands there now.

    Raises:
      UserError: where files that it names are not there, or not for long.
    """
    for last in (False,) * (_TRIES - 1) + (True,):
      manifest = self._remote.read()
      if manifest is None:
        return
      try:
        self._bring(manifest)
      except FileNotFoundError as error:
        if last and self._remote.read() == manifest:
          raise self._remote.damaged(error) from None
        continue  # It was pushed meanwhile.
      self.manifest = manifest
      return
    raise _UnreachableError(
        f"{self._remote.url} is pushed faster than it can be read; try again"
    )

  def _bring(self, manifest):
    before = self.manifest.contents() if self.manifest else {}
    for name, file in manifest.files.items():
      top = name.partition("/")[0]
      if self._what is not None and top not in self._what:
        continue
      if before.get(name) != file.content:
        self._remote.download(name, file, self.local / name)

  @contextlib.contextmanager
  def updated(self, every_s: float) -> Iterator[None]:
    """Keeps it up to date in the background."""
    is_over = threading.Event()

    def keep():
      while not is_over.wait(every_s):
        try:
          self.update()
        except (errors.UserError, OSError) as error:
          progress.note(f"{error}; shown is what was there before")

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
      yield
    finally:
      is_over.set()
      thread.join()


class _Mirror:
  """The directory in which a run at a URL works.

  Args:
    home: keeps it, and what was pushed.
    remote: where it is pushed.

  Attributes:
    local: the run's workdir.
  """

  def __init__(self, home: pathlib.Path, remote: _Remote):
    self.local = home / "run"
    self._home = home
    self._remote = remote
    self._writer = uuid.uuid4().hex
    # What stands at the URL, as far as this session knows.
    self._last: _Manifest | None = None

  def open(self):
    """Takes the workdir over, then gets what is newer there."""
    url = self._remote.url
    there, claim = self._claim()
    # A push that was killed has written its manifest, or not.
    known = [self._kept(name) for name in ("pushed.json", "pushing.json")]
    same = [
        m for m in known if m and there and m.contents() == there.contents()
    ]
    has_archive = (self.local / _ARCHIVE).is_file()
    has_files = has_archive or any(_paths(self.local))
    if there is None or (
        same
        and self.local.is_dir()
        and (has_archive or _ARCHIVE not in there.files)
    ):
      # Of its own manifest it knows the files' times.
      self._last = dataclasses.replace(
          claim, files=same[0].files if same else {}
      )
      # What somebody removed here is not meant to go there.
      self._download(
          {
              name: file
              for name, file in self._last.files.items()
              if not (self.local / name).exists()
          },
          self.local,
      )
      state = "goes on from" if has_files else "begins in"
      progress.note(f"{url} {state} this machine's copy, {self.local}")
    else:
      self._last = claim
      self._bring(there, known[0], has_files)
    self.local.mkdir(parents=True, exist_ok=True)
    self._pushing(self._last).replace(self._home / "pushed.json")
    self._check()

  def _claim(self) -> tuple[_Manifest | None, _Manifest]:
    """Has what stands at the URL written by this session.

    Before anything is fetched: the run that had it stops at its next push, and
    removes no file that is still to be fetched.

    Returns:
      (what was there, the same as it is there now).

    Raises:
      UserError: if others write there all the time.
    """
    for _ in range(_TRIES):
      there = self._remote.read()
      if there is None:
        self._leave()
      claim = self._manifest(
          there.files if there else {}, 1 + (there.generation if there else 0)
      )
      self._remote.write(claim)
      # A push that had looked before this was written may have replaced it.
      if self._is_ours(self._remote.read()):
        return there, claim
    self._check()
    return there, claim

  def _leave(self):
    """Puts the mirror of a URL aside that was emptied since it was pushed."""
    pushed = self._kept("pushed.json")
    if pushed and pushed.files and any(self.local.glob("*")):
      progress.note(
          f"{self._remote.url} was emptied; what this machine had of it is in"
          f" {self._put_aside()}"
      )

  def _put_aside(self) -> pathlib.Path:
    path = self._home / f"aside-{time.time_ns()}"
    self.local.rename(path)
    return path

  def _download(self, files: Mapping[str, _File], top: pathlib.Path):
    try:
      for name, file in files.items():
        self._remote.download(name, file, top / name)
    except FileNotFoundError as error:
      self._check()  # Who has it now may have removed it.
      raise self._remote.damaged(error) from None

  def _bring(self, there, pushed, has_files):
    """Replaces the mirror; work in it that was not pushed is put aside."""
    fetched = self._home / "fetched"
    shutil.rmtree(fetched, ignore_errors=True)
    fetched.mkdir()
    self._download(there.files, fetched)
    # One that was killed here may have fetched it already.
    if has_files and not self._is_pushed(pushed, there):
      progress.note(
          "what this machine had not pushed of an earlier state is in"
          f" {self._put_aside()}"
      )
    shutil.rmtree(self.local, ignore_errors=True)
    fetched.rename(self.local)
    progress.note(
        f"{self._remote.url} was fetched into {self.local}, as {_pushed(there)}"
    )

  def _is_pushed(self, pushed: _Manifest | None, there: _Manifest) -> bool:
    """Whether the mirror is what was pushed last, or what stands there."""
    try:
      with self._state(pushed) as (files, _):
        held = {n: f.content for n, f in files.items()}
    except FileNotFoundError:
      return False
    return held in [m.contents() for m in (pushed, there) if m]

  def _kept(self, name: str) -> _Manifest | None:
    try:
      return _parse((self._home / name).read_bytes())
    except (FileNotFoundError, ValueError):
      return None

  @contextlib.contextmanager
  def _state(
      self, before: _Manifest | None
  ) -> Iterator[tuple[dict[str, _File], Callable[[str], pathlib.Path]]]:
    """(what the mirror holds, the path behind each name).

    Raises:
      FileNotFoundError: if files are removed meanwhile.
    """
    known = before.files if before else {}
    # First what is listed, then the archive: it knows of no file that is not
    # among these, unless that was written since.
    found = {}
    for name, path in _paths(self.local):
      found[name] = _look(path, known.get(name))
    with _snapshot(self.local) as snapshot:
      if snapshot is not None:
        found[_ARCHIVE] = _look(snapshot, None)
      yield found, lambda name: (
          snapshot if name == _ARCHIVE else self.local / name
      )

  def push(self):
    """Brings what has changed to the URL; says it where that fails.

    Raises:
      UserError: if another run has taken the workdir over.
    """
    try:
      self.push_or_raise()
    except _UnreachableError as error:
      progress.note(f"{error}. All is in {self.local}, and pushed later")

  def push_or_raise(self):
    """The same; raises where that fails.

    Raises:
      UserError: naming why.
    """
    gone = None
    for _ in range(_TRIES):
      try:
        self._push_once()
        return
      except FileNotFoundError as error:
        gone = error.filename
    raise _UnreachableError(
        f"{self._remote.url} stays as it was: files are removed while they are"
        f" pushed, such as {gone}"
    )

  def _push_once(self):
    """Pushes all, or raises FileNotFoundError where a part of it is removed.

    Orbax removes an old checkpoint when it likes, and half of one is none.
    """
    self._check()
    before = self._last
    there = before.contents()
    gone = self._remote.gone(before.files)
    with self._state(before) as (files, path_of):
      if _ARCHIVE in there and _ARCHIVE not in files:
        raise errors.UserError(
            f"{self.local / _ARCHIVE} was removed; {self._remote.url} stays as"
            " it was, and the same command goes on from there"
        )
      for name in sorted(files):
        if there.get(name) != files[name].content or name in gone:
          files[name] = self._upload(name, path_of(name), files[name])
      for name in files:
        path_of(name).stat()
      if {n: f.content for n, f in files.items()} == there:
        return
      self._check()
      self._write(files, before.generation + 1)
    found = self._remote.read()
    if not self._is_ours(found):
      # Whoever has taken it over may have put back what was there before.
      if found is None or found.contents() != self._last.contents():
        self._check()
      return
    try:
      # What was there before is what a claim after this look may name.
      self._remote.clean(self._last, before)
    except _UnreachableError as error:
      progress.note(f"{error}. Files of earlier states stay there")

  def _upload(self, name, path, file) -> _File:
    """Returns what was uploaded, which may have changed since it was listed."""
    for _ in range(_TRIES):
      if self._remote.upload(name, path, file):
        return file
      file = _look(path, None)
    raise _UnreachableError(
        f"{path} changes faster than it can be pushed to {self._remote.url}"
    )

  def _check(self):
    """Raises UserError if somebody else has written there."""
    there = self._remote.read()
    if not self._is_ours(there):
      who = f"{_pushed(there)} too" if there else "it was removed"
      raise _TakenError(
          f"{self._remote.url} is no longer this run's: {who}. What this one"
          f" has is in {self.local}; let one run alone write there"
      )

  def _is_ours(self, there: _Manifest | None) -> bool:
    return there is not None and there.writer == self._writer

  def _manifest(self, files: Mapping[str, _File], generation: int) -> _Manifest:
    return _Manifest(
        generation, self._writer, socket.gethostname(), time.time(), files
    )

  def _pushing(self, manifest: _Manifest) -> pathlib.Path:
    path = self._home / "pushing.json"
    path.write_bytes(manifest.dumps())
    return path

  def _write(self, files: Mapping[str, _File], generation: int):
    manifest = self._manifest(files, generation)
    pushing = self._pushing(manifest)
    self._remote.write(manifest)
    pushing.replace(self._home / "pushed.json")
    self._last = manifest
