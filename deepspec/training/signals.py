"""When a run is to save and end early: it was sent a signal, or its launcher has ended."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import psutil

LAUNCHERS = {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Whether the run is asked to save and end; the step under way is finished first.

    SIGTERM, SIGUSR1 and Ctrl-C ask for it; a second Ctrl-C ends the process at once. So does the end of the `deepspeed`
    command that started this process: it ends on a SIGTERM without passing it on, and the training would run on.
    """

    def __init__(self) -> None:
        self._asked = False
        self._launchers = deepspeed_launchers()

    def __enter__(self) -> StopSignal:
        self._old = {number: signal.signal(number, self._ask) for number in ASKING}
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked or not all(map(alive, self._launchers))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def deepspeed_launchers() -> list[psutil.Process]:
    """The processes of the `deepspeed` command above this one: its launcher on this node, and the command itself."""
    return [process for process in psutil.Process().parents()[:2] if LAUNCHERS & set(first_words(process))]


def first_words(process: psutil.Process) -> list[str]:
    """The names of a process's program and script."""
    try:
        return [Path(word).name for word in process.cmdline()[:4]]
    except psutil.Error:  # ended meanwhile, or another user's
        return []


def alive(process: psutil.Process) -> bool:
    """Whether the process still runs; one that ended but was not waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
