"""One writer at a time in a folder or of a file, on this machine's disks: the system's own lock (flock).

The system releases it however the process ends, so a killed job blocks no other. The lock file names its holder and is
removed with the job; one that a killed job left is ignored.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepspec.errors import DeepSpecError

log = logging.getLogger(__name__)
LOCK = ".deepspec.lock"  # inside the folder that it guards
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def me() -> str:
    """Who holds a lock, and since when."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


@contextmanager
def one_writer(folder: str | Path, work: str, error: type[DeepSpecError] = DeepSpecError) -> Iterator[None]:
    """Hold the folder for the block; folders that were made for it and stay empty are removed.

    Args:
        folder: made where missing.
        work: what the holder does, for the message: ``training``, ``evaluation``.
        error: the class of the refusal.

    Raises:
        error: another process holds it; it is named by pid, host and since when.
        OSError: the folder cannot be made or written.
    """
    folder = Path(folder)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / LOCK, folder, work, error):
            yield
    finally:
        with suppress(OSError):  # not empty: the usual end
            for one in made:
                one.rmdir()


def is_free(folder: Path) -> bool:
    """Whether the folder is missing or empty; a lock file does not count."""
    return not folder.exists() or all(one.name == LOCK for one in folder.iterdir())


@contextmanager
def lock_file(path: Path, guarded: Path, work: str, error: type[DeepSpecError] = DeepSpecError) -> Iterator[None]:
    """Hold the lock file ``path`` that guards the file or folder ``guarded``; see :func:`one_writer`."""
    handle = _take(path, guarded, work, error)
    try:
        with suppress(OSError):  # a full disk: the name of the holder is a help, not the lock
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{work}, {me()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _take(path: Path, guarded: Path, work: str, error: type[DeepSpecError]) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in _HELD:
                holder = _holder(handle)
                os.close(handle)
                raise error(
                    f"another process works here, this {work} does not start",
                    file=guarded,
                    found=holder,
                    remedy="wait until it has ended, or end it, or name another output",
                ) from None
            text = "%s: %s cannot be locked (%s); do not start a second one there"  # a file system without locks
            log.warning(text, work, guarded, problem.strerror)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its holder ended, and removed it, between our open and our lock


def _holder(handle: int) -> str:
    """What the holder wrote of itself, a moment after it took the lock."""
    for _ in range(20):
        if text := os.pread(handle, 500, 0).decode(errors="replace").strip():
            return text
        time.sleep(0.05)
    return "a process that did not write its name"
