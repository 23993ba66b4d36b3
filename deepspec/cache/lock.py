"""One build at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspec.cache.folders import Folder, LocalFolder
from deepspec.errors import CacheError

LOCK = ".build.lock"


@contextmanager
def build_lock(folder: Folder) -> Iterator[None]:
    """Hold the folder's build lock; the system lets go of it however the process ends.

    Raises:
        CacheError: another process builds here, or the folder cannot be written.
    """
    if not isinstance(folder, LocalFolder):
        yield
        return
    path = folder.path / LOCK
    handle = _open(path)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            raise CacheError(
                "another process is building this cache", file=folder.url, found=holder, remedy="wait for it, or end it"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        raise CacheError(f"cannot write here ({problem.strerror})", file=path.parent) from None
