"""One build at a time in a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepspec.cache.folders import Folder, LocalFolder
from deepspec.errors import CacheError

LOCK = ".build.lock"
RENEWED, STALE = 30.0, 120.0  # seconds: an object store has no locks, so its holder signs again and again


@contextmanager
def build_lock(folder: Folder) -> Iterator[None]:
    """Hold the folder's build lock.

    On a local disk the system lets go of it however the process ends; behind a URL a killed builder's lock is free
    after two minutes.

    Raises:
        CacheError: another process builds here, or the folder cannot be written.
    """
    with _local_lock(folder.path) if isinstance(folder, LocalFolder) else _remote_lock(folder):
        yield


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _refuse(folder: Folder | Path, holder: str) -> CacheError:
    where = folder if isinstance(folder, Path) else folder.url
    return CacheError(
        "another process is building this cache", file=where, found=holder, remedy="wait for it, or end it"
    )


@contextmanager
def _local_lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        raise CacheError(f"cannot write here ({problem.strerror})", file=folder) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _refuse(folder, os.pread(handle, 200, 0).decode(errors="replace").strip()) from None
        with suppress(OSError):  # a full disk: the name of the holder is a help, not the lock
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{_me()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


@contextmanager
def _remote_lock(folder: Folder) -> Iterator[None]:
    mine = f"{_me()} {time.time_ns()}"

    def sign() -> None:
        folder.write(LOCK, json.dumps({"holder": mine, "time": time.time()}).encode())

    if folder.size(LOCK) is not None:
        held = json.loads(folder.read(LOCK))
        if time.time() - held["time"] < STALE:
            raise _refuse(folder, held["holder"])
    sign()
    time.sleep(1.0)  # of two that start at once, the one that signed last holds it
    if json.loads(folder.read(LOCK))["holder"] != mine:
        raise _refuse(folder, json.loads(folder.read(LOCK))["holder"])
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWED):
            sign()

    thread = threading.Thread(target=renew, daemon=True, name="cache lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        folder.remove(LOCK)
