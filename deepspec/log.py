"""Logging of the commands: reports are bare text on rank 0's stdout, warnings of any rank are on stderr."""

from __future__ import annotations

import logging
import os
import sys

from deepspec.distributed import world_from_environment
from deepspec.errors import printable

LEVELS = ("debug", "info", "warning", "error")


class _Streams(logging.Handler):
    """Writes to the stdout and stderr of the moment: a test, or a caller, may have replaced them.

    A write that fails is the caller's error, as that of a print is: the command ends with one line.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(self.format(record))
        if record.levelno >= logging.WARNING:
            print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)
        elif world_from_environment().is_main:
            print(text, flush=True)


def start_logging(level: str = "info", quiet: bool = False) -> None:
    """Show what the package logs; a second call only changes the level.

    Args:
        level: one of LEVELS, the least that is shown.
        quiet: show only warnings and errors, whatever the level.
    """
    log = logging.getLogger("deepspec")
    log.setLevel(max(getattr(logging, level.upper()), logging.WARNING if quiet else logging.NOTSET))
    log.propagate = False  # a library's own handler at the root would show every line twice
    if not any(isinstance(handler, _Streams) for handler in log.handlers):
        log.addHandler(_Streams())


def say(text: object) -> None:
    """Print what a command was asked for; names and values of files cannot take over the terminal."""
    print(printable(str(text)))


def reports() -> bool:
    """Whether this process shows reports: it is rank 0, without ``--quiet``."""
    return logging.getLogger("deepspec").isEnabledFor(logging.INFO) and world_from_environment().is_main


def in_colour() -> bool:
    """Whether standard output is a terminal that shows colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
