"""Logging of the commands: reports are bare text on rank 0's stdout, warnings of any rank are on stderr."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import warnings
from typing import TextIO

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
            show(f"{record.levelname.lower()}: {text}", sys.stderr)
        elif world_from_environment().is_main:
            show(text, sys.stdout)


class _Screen:
    """When this process printed last, and whether a passing line stands where the next one goes."""

    last, passing = 0.0, False


def show(text: str, stream: TextIO) -> None:
    """Print a line that stays."""
    clear()
    _Screen.last = time.monotonic()
    print(text, file=stream, flush=True)


def show_passing(text: str) -> None:
    """Print how far a job is, on stderr; on a terminal the next line takes its place."""
    passing = on_terminal()
    clear()
    if passing:
        text = text[: shutil.get_terminal_size().columns - 1]
    _Screen.last, _Screen.passing = time.monotonic(), passing
    print(text, end="" if passing else "\n", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether stderr is one; it may be closed."""
    return sys.stderr is not None and sys.stderr.isatty()


def clear() -> None:
    """Take a passing line away."""
    if _Screen.passing:
        _Screen.passing = False
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def silent_for() -> float:
    """Seconds since the last line."""
    return time.monotonic() - _Screen.last


def silence_libraries() -> None:
    """Keep warnings, notes and bars of the libraries off the terminal; call it before they are imported.

    What matters in them is checked, and named, by our own code. An environment that asks for more keeps it, and
    ``--log-level debug`` shows them all.
    """
    if logging.getLogger("deepspec").isEnabledFor(logging.DEBUG):
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars follow it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # a filter outlives the level that an import sets
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


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
