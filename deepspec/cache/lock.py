"""One build at a time in a folder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from deepspec.cache.store import FolderStore, Store
from deepspec.errors import CacheError
from deepspec.locks import LOCK, me, one_writer

RENEWED, STALE = 30.0, 120.0  # seconds: an object store has no locks, so its holder signs again and again


@contextmanager
def build_lock(folder: Store) -> Iterator[None]:
    """Hold the folder's build lock.

    On a local disk the system lets go of it however the process ends; behind a URL a killed builder's lock is free
    after two minutes.

    Raises:
        CacheError: another process builds here, or the folder cannot be written.
    """
    with one_writer(folder.path, "build", CacheError) if isinstance(folder, FolderStore) else _remote_lock(folder):
        yield


def _refuse(folder: Store, holder: str) -> CacheError:
    problem, remedy = "another process works here, this build does not start", "wait until it has ended, or end it"
    return CacheError(problem, file=folder.url, found=holder, remedy=remedy)


@contextmanager
def _remote_lock(folder: Store) -> Iterator[None]:
    mine = f"{me()} ({time.time_ns()})"

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
