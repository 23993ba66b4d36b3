"""Processes forked from a test, and killed where the test says: a kill costs no import."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

CHANGES = ("rename", "replace", "unlink", "mkdir", "rmdir")  # what changes names: between two of them a kill shows


def start(work: Callable[[], object], said: Path | None = None) -> int:
    """Run ``work`` in a fork; its stdout and stderr go to ``said``. Returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if said is not None:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1), os.dup2(handle, 2)
            sys.stdout = sys.stderr = open(handle, "w", buffering=1, closefd=False)  # noqa: SIM115
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a fork: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before(number: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a fork that is killed before its ``number``-th change of a name; whether it came that far."""

    def run() -> None:
        left = number

        def counted(change: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*arguments, **options)

            return call

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        work()

    code = exit_code(start(run))
    assert code in (0, -signal.SIGKILL)
    return code != 0
