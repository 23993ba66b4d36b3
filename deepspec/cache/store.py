"""Where a cache is: a local folder, or any URL that fsspec opens (``s3://bucket/prefix``, ``memory://``, ...)."""

from __future__ import annotations

import errno
import inspect
import itertools
import os
import resource
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspec import files
from deepspec.cache.remote_lock import NO_LOCK, RemoteLock
from deepspec.errors import CacheError
from deepspec.locks import ends_in_order, one_writer
from deepspec.processes import sweep, temporary_prefix

OPEN_FILES = 256  # kept open by all stores together, and no more than a quarter of what the system allows
SCRATCH = "DEEPSPEC_SCRATCH"  # the environment variable that names a folder for parts of remote builds
_VECTORS = 512  # buffers of one preadv call; the kernel takes 1024


class _File:
    """A file descriptor that closes when its last user releases it."""

    def __init__(self, path: Path) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class _FilePool:
    """The files of all stores that are open, the least recently read of them closed first. Threads may share it."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[int, str], _File] = OrderedDict()
        self._lock = threading.RLock()  # re-entrant: garbage collection may end a store while a file is taken

    def take(self, owner: int, folder: Path, name: str) -> _File:
        """The file, open; it stays so while the caller holds it."""
        with self._lock:
            if (owner, name) in self._files:
                self._files.move_to_end((owner, name))
                return self._files[owner, name]
        try:
            file = _File(folder / name)
        except OSError as problem:
            if problem.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self.shrink(0)  # what else the process opened leaves less room than expected
            file = _File(folder / name)
        with self._lock:
            self._files[owner, name] = file
        self.shrink(max(1, min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)))
        return file

    def shrink(self, kept: int) -> None:
        """Let go of all but the ``kept`` files that were read last."""
        with self._lock:
            while len(self._files) > kept:
                self._files.popitem(last=False)

    def forget(self, owner: int) -> None:
        """Let go of a store's files."""
        with self._lock:
            for key in [key for key in self._files if key[0] == owner]:
                self._files.pop(key, None)


_pool, _owners = _FilePool(), itertools.count()


def _after_fork() -> None:
    """A child process starts with its own pool: another thread may have held the parent's lock."""
    global _pool
    _pool = _FilePool()


os.register_at_fork(after_in_child=_after_fork)


class FolderStore:
    """A folder on this machine's disks: byte strings by relative paths with ``/``.

    What cannot be read, or is shorter than asked, is a CacheError; an entry that is not there has size None.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.url = str(path)
        self._owner = next(_owners)
        weakref.finalize(self, lambda owner: _pool.forget(owner), self._owner)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        try:
            return (self.path / name).read_bytes()
        except OSError as problem:
            raise CacheError(f"cannot read ({problem.strerror})", file=self.path / name) from None

    def size(self, name: str) -> int | None:
        """Bytes of a file, None when it is missing."""
        try:
            return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers`` from ``offset`` on: one system call for up to 512 of them, no copy in between."""
        try:
            file = _pool.take(self._owner, self.path, name)
            for first in range(0, len(buffers), _VECTORS):
                offset = self._fill(file, name, offset, list(buffers[first : first + _VECTORS]))
        except OSError as problem:
            raise CacheError(f"cannot read ({problem.strerror})", file=self.path / name) from None

    def _fill(self, file: _File, name: str, offset: int, group: list[memoryview]) -> int:
        while group:
            got = os.preadv(file.handle, group, offset)
            if got == 0:
                raise CacheError("file too short", file=self.path / name, found=f"{offset} bytes", wanted="more")
            offset += got
            while group and got >= len(group[0]):
                got -= len(group.pop(0))
            if got:
                group[0] = group[0][got:]
        return offset

    def names(self, name: str) -> list[str]:
        """Entries of a folder, sorted; empty when there is none."""
        folder = self.path / name
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def write(self, name: str, data: bytes) -> None:
        """Write completely or not at all."""
        files.write_bytes(self.path / name, data)

    def sweep(self, name: str) -> None:
        """Remove what killed processes left in a folder, and in those in it, under temporary names."""
        for folder, _, _ in os.walk(self.path / name):
            sweep(Path(folder))

    def commit(self, local: Path, name: str, marker: str) -> None:
        """Take over the finished folder ``local`` as ``name``, by a rename in the same file system, synced to disk."""
        for folder, _, found in os.walk(local, topdown=False):
            for one in (*(Path(folder) / name for name in found), Path(folder)):
                files.sync(one)
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(local, path)
        except OSError as problem:
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (path / marker).exists():
                raise
            shutil.rmtree(local)  # a process of an earlier run that outlived it finished the same part
        files.sync(path.parent)

    def remove(self, name: str) -> None:
        """Delete a file or a folder with all in it; nothing happens when it is missing."""
        path = self.path / name
        _pool.forget(self._owner)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class RemoteStore:
    """A folder at an fsspec URL, with the methods of :class:`FolderStore`.

    The protocols themselves write an object completely or not at all.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._pid = -1
        self._filesystem: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]

    @property
    def _fs(self) -> Any:
        if self._pid != os.getpid():  # connections and event loops do not survive a fork
            import fsspec

            try:
                fresh = self._pid >= 0
                self._filesystem, self._root = fsspec.core.url_to_fs(self.url, skip_instance_cache=fresh)
            except Exception as problem:
                raise self._failed("", problem, "open the URL") from None
            self._pid = os.getpid()
        return self._filesystem

    def _path(self, name: str) -> str:
        self._fs  # noqa: B018 (sets _root)
        return f"{self._root}/{name}" if name else str(self._root)

    def _failed(self, name: str, problem: Exception, verb: str) -> CacheError:
        """The error of an operation; each protocol has classes of its own for no network, credentials or permission."""
        line = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        remedy = "check the address, the network and the credentials"
        return CacheError(f"cannot {verb} ({line})", file=f"{self.url}/{name}".rstrip("/"), remedy=remedy)

    @contextmanager
    def _doing(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except CacheError:
            raise
        except Exception as problem:
            raise self._failed(name, problem, verb) from None

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        with self._doing("read", name):
            data: bytes = self._fs.cat_file(self._path(name))
        return data

    def size(self, name: str) -> int | None:
        """Bytes of an object, None when it is missing."""
        with self._doing("read", name):
            try:
                return int(self._fs.size(self._path(name)))
            except FileNotFoundError:
                return None

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers`` by one range request."""
        total = sum(len(buffer) for buffer in buffers)
        with self._doing("read", name):
            data = memoryview(self._fs.cat_file(self._path(name), start=offset, end=offset + total))
        if len(data) != total:
            raise CacheError("object too short", file=f"{self.url}/{name}", found=offset + len(data), wanted="more")
        start = 0
        for buffer in buffers:
            buffer[:] = data[start : start + len(buffer)]
            start += len(buffer)

    def names(self, name: str) -> list[str]:
        """Entries of a folder, sorted."""
        self._fs.invalidate_cache()
        with self._doing("read", name):
            try:
                found = self._fs.ls(self._path(name), detail=False)
            except FileNotFoundError:
                return []
        return sorted(one.rstrip("/").rsplit("/", 1)[1] for one in found)

    def write(self, name: str, data: bytes) -> None:
        """Write an object."""
        with self._doing("write", name):
            self._fs.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object only where there is none, in one step of the store; returns whether it was written.

        Raises:
            CacheError: the store cannot do that.
        """
        from fsspec import AbstractFileSystem
        from fsspec.asyn import AsyncFileSystem

        kind = type(self._fs)
        write = getattr(kind, "_pipe_file", kind.pipe_file)
        inherited = write in (AbstractFileSystem.pipe_file, AsyncFileSystem._pipe_file)  # these look, then write
        if inherited or "mode" not in inspect.signature(write).parameters:
            problem = "the store cannot create an object only where there is none, so it cannot be locked"
            raise CacheError(problem, file=self.url, found=kind.__name__, remedy=NO_LOCK)
        try:
            self._fs.pipe_file(self._path(name), data, mode="create")
        except OSError:
            if self.size(name) is None:
                raise
            return False
        return True

    def sweep(self, name: str) -> None:
        """An object is there whole or not at all: there is nothing to remove."""

    def commit(self, local: Path, name: str, marker: str) -> None:
        """Upload a finished local folder, the marker last, and delete the local one."""
        found = sorted(path for path in local.rglob("*") if path.is_file())
        for path in sorted(found, key=lambda path: path == local / marker):
            with self._doing("write", name):
                self._fs.put_file(str(path), self._path(f"{name}/{path.relative_to(local)}"))
        shutil.rmtree(local)

    def remove(self, name: str) -> None:
        """Delete an object or all below a prefix."""
        with self._doing("remove", name):
            if self._fs.exists(self._path(name)):
                self._fs.rm(self._path(name), recursive=True)


Store = FolderStore | RemoteStore


def open_store(path: str | Path) -> Store:
    """The store at a path or a URL (``file://`` counts as a path)."""
    text = str(path)
    if text.startswith("file://"):
        return FolderStore(text[len("file://") :])
    return RemoteStore(text) if "://" in text else FolderStore(text)


@contextmanager
def build_lock(store: Store) -> Iterator[None]:
    """Hold the build lock of a cache.

    On a local disk the system releases it however the process ends; at a URL the next builder sees that a killed one
    no longer renews it (:mod:`deepspec.cache.remote_lock`).

    Raises:
        CacheError: another process builds here, the folder cannot be written, or the store knows no locks.
    """
    if isinstance(store, FolderStore):
        with one_writer(store.path, "build", CacheError):
            yield
        return
    lock = RemoteLock(store)
    lock.take()
    try:
        with ends_in_order():
            yield
    finally:
        lock.release()


def scratch() -> Path:
    """Where a remote build keeps a part until it is complete: DEEPSPEC_SCRATCH, else the system's temporary folder."""
    folder = Path(os.environ.get(SCRATCH) or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def local_folder(name: str) -> Path:
    """A new folder in :func:`scratch`; those that killed processes left there go."""
    sweep(scratch(), "deepspec-")
    return Path(tempfile.mkdtemp(prefix=temporary_prefix(name), dir=scratch()))
