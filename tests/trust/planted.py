"""Stages with a fault each, which the harness must find, and one without; every one writes into its first argument."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from deepspec.files import write_text

PAUSE = 0.15  # seconds between the two halves of a write


def whole() -> None:
    """Atomic, and nothing stays."""
    time.sleep(PAUSE)
    write_text(Path(sys.argv[1]) / "result", "complete")


def torn() -> None:
    """Writes in place, and takes what is there for complete."""
    path = Path(sys.argv[1]) / "result"
    if path.exists():
        return
    with open(path, "w", buffering=1) as handle:
        handle.write("half\n")
        time.sleep(PAUSE)
        handle.write("whole\n")


def leaves() -> None:
    """Leaves its temporary file where it is killed."""
    path = Path(sys.argv[1]) / f".result.{os.getpid()}.tmp"
    path.write_text("complete")
    time.sleep(PAUSE)
    path.rename(path.with_name("result"))


def deaf() -> None:
    """Does not hear SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(sys.argv[1]) / "deaf").touch()
    time.sleep(60)


def forgets() -> None:
    """Ends with a traceback on a full disk."""
    try:
        (Path(sys.argv[1]) / "result").write_bytes(bytes(1 << 20))
    except OSError:
        raise KeyError("nobody thought of it") from None
