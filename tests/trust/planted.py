"""Stages with a fault each, which the harness must find, and one without; every one writes into its first argument."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from deepspec.files import write_text
from deepspec.processes import sweep

PAUSE = 0.15  # seconds that a start without a kill takes
LONG = 5.0  # of one that is killed meanwhile; not for ever, as a kill before it was counted makes the next one wait


def _wait_for_the_kill() -> None:
    """Stay long at a start that is killed: the fourth, and every other one after it (three measure the time)."""
    starts = Path(sys.argv[1]).parents[1] / "starts"
    with open(starts, "ab") as handle:
        handle.write(b".")
    number = starts.stat().st_size
    time.sleep(LONG if number > 3 and number % 2 == 0 else PAUSE)


def whole() -> None:
    """Atomic, and nothing stays: as every command it first removes what a dead one left."""
    sweep(Path(sys.argv[1]))
    time.sleep(PAUSE)
    write_text(Path(sys.argv[1]) / "result", "complete")


def torn() -> None:
    """Writes in place, and takes what is there for complete."""
    path = Path(sys.argv[1]) / "result"
    there = path.exists()
    if not there:
        path.write_text("half")
    _wait_for_the_kill()
    if not there:
        path.write_text("half and half")


def leaves() -> None:
    """Leaves its temporary file where it is killed."""
    path = Path(sys.argv[1]) / f".result.{os.getpid()}.tmp"
    path.write_text("complete")
    _wait_for_the_kill()
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
