"""The processes of this host: what names this one, whether another still lives, the temporary names that one leaves.

A temporary name says which process of which host writes it, so that what a killed one left is told from what a living
one writes, on file systems that several hosts share too.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

_TEMPORARY = re.compile(r"(?:\..*\.|deepspec-.*-)(?P<pid>\d+)-(?P<host>[0-9a-f]{8})(?:-[0-9a-z_]+)?(?:\.tmp)?")


@cache
def host() -> str:
    """Eight hex digits of this host and, as containers share a host, its space of process numbers."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def alive(pid: int, started: float | None = None) -> bool:
    """Whether a process of this host still runs; one that ended but was not waited for does not.

    Args:
        pid: its number.
        started: :func:`started_at` of it, where known: numbers are given out again.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and started in (None, process.create_time())
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def started_at(pid: int) -> float:
    """When a process started, seconds since 1970."""
    return float(psutil.Process(pid).create_time())


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that this process writes to before the content is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}-{host()}.tmp")


def temporary_prefix(name: str) -> str:
    """The beginning of a temporary folder's name, for ``tempfile.mkdtemp``."""
    return f"deepspec-{name}-{os.getpid()}-{host()}-"


def sweep(folder: Path, beginning: str = "") -> None:
    """Remove what processes of this host that no longer live left in ``folder`` under temporary names.

    Args:
        folder: a missing one is swept.
        beginning: only names with this beginning.
    """
    with suppress(OSError):
        for one in os.scandir(folder):
            match = _TEMPORARY.fullmatch(one.name) if one.name.startswith(beginning) else None
            if match is None or match["host"] != host() or alive(int(match["pid"])):
                continue
            with suppress(OSError):
                if one.is_dir(follow_symlinks=False):
                    shutil.rmtree(one.path)
                else:
                    os.unlink(one.path)
