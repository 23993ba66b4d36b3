"""One writer at a time in a folder or of a file, on this machine's disks: the system's own lock (flock).

The system releases it however the process ends, so a killed job blocks no other. The lock file names its holder and is
removed with the job; one that a killed job left is ignored. Where a file system knows no flock, a file that only one
process can create takes its place, and one that a killed job left has to be removed by hand.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from deepspec.errors import DeepSpecError
from deepspec.processes import sweep

log = logging.getLogger(__name__)
LOCK = ".deepspec.lock"  # inside the folder that it guards
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def me() -> str:
    """Who holds a lock, and since when."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


@contextmanager
def one_writer(folder: str | Path, work: str, error: type[DeepSpecError] = DeepSpecError) -> Iterator[None]:
    """Hold the folder for the block; folders that were made for it and stay empty are removed.

    What killed processes left there under temporary names is removed first; SIGTERM ends the block in order.

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
        with lock_file(folder / LOCK, folder, work, error), ends_in_order():
            sweep(folder)
            yield
    finally:
        with suppress(OSError):  # not empty: the usual end
            for one in made:
                one.rmdir()


def is_free(folder: Path) -> bool:
    """Whether the folder is missing or empty; a lock file does not count."""
    return not folder.exists() or all(one.name.startswith(LOCK) for one in folder.iterdir())


@contextmanager
def ends_in_order() -> Iterator[None]:
    """SIGTERM becomes SystemExit (143) for the block, so that what it wrote under temporary names is removed.

    Not among several ranks: one that waits for another would not hear it. C code that is under way may make an error
    of its own of the exit, or drop it: the block ends with the exit all the same.
    """
    asked: list[int] = []

    def end(number: int, _frame: object) -> None:
        asked.append(number)
        sys.exit(143)

    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Exception as problem:
        if asked:
            raise SystemExit(143) from problem
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if asked:
        sys.exit(143)


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
        for one in (path, _exclusive(path)):
            with suppress(OSError):
                one.unlink()
        os.close(handle)


def hold_in_turn(path: Path) -> Callable[[], None]:
    """Hold a lock file of threads and processes that work together, after its holder; any thread may release it.

    Returns:
        What releases it; the file stays.

    Raises:
        OSError: it cannot be made, or its file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        os.close(handle)
        raise
    return partial(os.close, handle)


def _take(path: Path, guarded: Path, work: str, error: type[DeepSpecError]) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in _HELD:
                holder = _holder(handle)
                os.close(handle)
                raise _refusal(guarded, work, holder, error, "name another output") from None
            os.close(handle)
            log.warning("%s: %s is on a file system without locks (%s)", work, guarded, problem.strerror)
            return _create(_exclusive(path), guarded, work, error)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its holder ended, and removed it, between our open and our lock


def _exclusive(path: Path) -> Path:
    """The file in place of the lock where there are no locks."""
    return path.with_name(f"{path.name}.held")


def _create(path: Path, guarded: Path, work: str, error: type[DeepSpecError]) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        holder = path.read_text(errors="replace").strip()
        raise _refusal(guarded, work, holder, error, f"remove {path} where it was killed") from None


def _refusal(guarded: Path, work: str, holder: str, error: type[DeepSpecError], last: str) -> DeepSpecError:
    problem = f"another process works here, this {work} does not start"
    return error(problem, file=guarded, found=holder, remedy=f"wait until it has ended, or end it, or {last}")


def _holder(handle: int) -> str:
    """What the holder wrote of itself, a moment after it took the lock."""
    for _ in range(20):
        if text := os.pread(handle, 500, 0).decode(errors="replace").strip():
            return text
        time.sleep(0.05)
    return "a process that did not write its name"
