"""Signs of life of a command on stderr: what it is about to do, how far it is, what it made, how long that took."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from deepspec.errors import at_end, printable, without_logins
from deepspec.log import clear, on_terminal, reports, show, show_passing, silence_libraries, silent_for

PATIENCE = 5.0  # seconds without a line, after which a command says what it is at
LOOKING = 0.3  # seconds that the size of a folder may take
LONGEST, MOST = 120, 3  # characters of a value that are shown, values of a list


def clock(seconds: float) -> str:
    """``1:02:03``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def duration(seconds: float) -> str:
    """``1.3 ms``, ``41 s``, ``1:02:03``, ``11.6 days``."""
    if seconds >= 60:
        return clock(seconds) if seconds < 2 * 86400 else f"{seconds / 86400:,.1f} days"
    return f"{seconds * 1000:.2g} ms" if seconds < 0.1 else f"{seconds:.{1 if seconds < 10 else 0}f} s"


def byte_size(count: float) -> str:
    """``312 MB``, ``29.2 TB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def bytes_in(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, or of all files in a folder, as far as they are seen."""
    return bytes_of(path)[0]


def bytes_of(path: str | os.PathLike[str]) -> tuple[int, bool]:
    """Bytes of a file, or of all files in a folder, and whether all were seen: for very many there is no time."""
    total, end = 0, time.monotonic() + LOOKING
    walk = os.walk(path) if os.path.isdir(path) else [(os.curdir, [], [os.path.abspath(path)])]
    for folder, _, names in walk:
        for name in names:
            with suppress(OSError):  # gone meanwhile, or never there
                total += os.stat(os.path.join(folder, name)).st_size
        if time.monotonic() > end:
            return total, False
    return total, True


def bytes_read() -> int:
    """Bytes that this process has read; 0 where the system does not tell."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return int(file.readline().split()[1])
    except (OSError, ValueError, IndexError):
        return 0


class _Command:
    """The command that runs: see :func:`opening`."""

    def __init__(self, program: str, facts: Mapping[str, Any], following: str) -> None:
        self.program, self.facts, self.following = program, dict(facts), following
        self.begun, self.over = time.monotonic(), threading.Event()
        self.thread: threading.Thread | None = None

    def watch(self) -> None:
        """Say where the command is whenever nothing was printed for a while."""
        while not self.over.wait(1.0):
            if silent_for() >= PATIENCE:
                job = next(reversed(_jobs), None)
                text = job.status() if job else f"{self.program}: {clock(time.monotonic() - self.begun)}"
                show_passing(printable(text))

    def end(self, went_well: bool) -> None:
        """Say what was made, how long it took and what comes next."""
        self.over.set()
        if self.thread is not None:  # one that still runs when the interpreter ends can bring it down, out of C++ code
            self.thread.join()
        if self not in _commands:  # it does not report
            return
        _commands.remove(self)
        _jobs.clear()
        clear()
        if went_well:
            output = str(self.facts.get("output") or "")
            there = os.path.exists(output) or "://" in output
            what = f"made {_with_size(output)}" if there else f"{self.program}: done"
            known = {key: str(value) for key, value in self.facts.items() if value}
            following = self.following and f"; next: {self.following.format_map(_Names(known))}"
            _say(f"{what} in {duration(time.monotonic() - self.begun)}{following}")


class _Names(dict[str, str]):
    """Words of a command line; what is not known is a name in capitals."""

    def __missing__(self, key: str) -> str:
        return key.upper()


_commands: list[_Command] = []  # that report, one inside the other
_jobs: dict[Progress, None] = {}  # that are not finished, the newest last


def opening(program: str, what: str, facts: Mapping[str, Any], given: Mapping[str, Any], following: str) -> None:
    """Say what the command is about to do, and show signs of life until it ends; nothing where no ``run_main`` runs.

    Args:
        program: what was started.
        what: it does, in a sentence.
        facts: all its options.
        given: those worth showing.
        following: the next command, with ``{options}``.
    """
    command = _Command(program, facts, following)
    if not at_end(command.end):
        return
    silence_libraries()
    if reports():
        _commands.append(command)
        _say(f"{program}: {what}")
        about(**given)
        command.thread = threading.Thread(target=command.watch, name="signs of life", daemon=True)
        command.thread.start()


def about(**facts: Any) -> None:
    """Say what else the command is about: its inputs with their sizes, and its ``output``."""
    if not _commands:
        return
    _commands[-1].facts |= facts
    output = facts.pop("output", None)
    parts = [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in facts.items() if value]
    text = ", ".join(parts) + (f" -> {output}" if output else "")
    if text:
        _say(f"  {text}")


def made(path: str | os.PathLike[str]) -> None:
    """Name what the command has made, for its last line; needed where that is not its ``output``."""
    if _commands:
        _commands[-1].facts["output"] = path


def comes_next(command: str) -> None:
    """Name the next command, for the last line; needed where it depends on what was found.

    Args:
        command: with ``{options}``.
    """
    if _commands:
        _commands[-1].following = command


def interactive() -> None:
    """From here on the user types: no line comes by itself."""
    if _commands:
        _commands[-1].over.set()


def _say(text: str) -> None:
    """One line, whatever the values in it are."""
    show(printable(without_logins(text.replace("\n", " "))), sys.stderr)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        more = f" and {len(value) - MOST} more" if len(value) > MOST else ""
        return " ".join(_shown(one) for one in value[:MOST]) + more
    return _with_size(value) if isinstance(value, str | os.PathLike) else str(value)


def _with_size(path: str | os.PathLike[str]) -> str:
    text = str(path) if len(str(path)) <= LONGEST else f"{str(path)[:LONGEST]}..."
    if not (os.path.isfile(path) or os.path.isdir(path)):
        return text
    count, complete = bytes_of(path)
    return f"{text} ({'' if complete else 'more than '}{byte_size(count)})"


class Progress:
    """Counts items, and tokens or another unit within them; rank 0 prints a line at most every ``every`` seconds.

    Any thread may count.

    Args:
        what: the job, such as ``build``.
        total: items to do; None where that is unknown.
        unit: of what :meth:`add` counts beside the items; ``bytes`` are shown as ``312 MB``.
        noun: what the items are called; empty where ``what`` names them.
        expected: units in all: time left then goes by them instead of by the items.
        more: gives further words for the line when it is printed.
        every: seconds between lines; on a terminal, where a line replaces the one before, at most one.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "tokens",
        *,
        noun: str = "",
        expected: int | None = None,
        more: Callable[[], str] = lambda: "",
        every: float = PATIENCE,
    ) -> None:
        self.what, self.total, self.unit, self.noun, self.expected = what, total, unit, noun, expected
        self.more, self.every = more, every
        self.done = self.units = 0
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()
        if _commands:
            _jobs[self] = None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def add(self, items: int = 1, units: int = 0) -> None:
        """Count ``items`` done, worth ``units``; prints when it is time."""
        with self._lock:
            self.done += items
            self.units += units
            every = min(self.every, 1.0) if _commands and on_terminal() else self.every
            due = time.monotonic() - self._last >= every
            if due:
                self._last = time.monotonic()
        if due and reports():
            show_passing(printable(self.status()))

    def line(self) -> str:
        """The line as it would be printed now."""
        of = "" if self.total is None else f"/{self.total}"
        text = f"{self.what}: {self.done}{of}{self._noun()}, {self._rate()}"
        done, total = self._share()
        if 0 < done < total and self.done != self.total:
            text += f", {clock(self.seconds / done * (total - done))} left"
        return text + self._more()

    def status(self) -> str:
        """The line; on a terminal with a bar in front."""
        done, total = self._share()
        if not (total and on_terminal()):
            return self.line()
        return f"[{'#' * min(20, round(20 * done / total)):20s}] {self.line()}"

    def finish(self) -> None:
        """Print the totals and the time it took."""
        text = f"{self.what}: {self.done}{self._noun()} in {clock(self.seconds)}"
        units = byte_size(self.units) if self.unit == "bytes" else f"{self.units:,} {self.unit}"
        self.close()
        if reports():
            show(printable(f"{text}, {units}, {self._rate()}{self._more()}"), sys.stderr)

    def close(self) -> None:
        """The job is over; nothing is printed."""
        _jobs.pop(self, None)
        clear()

    def _share(self) -> tuple[int, int]:
        """What is done, and all, in units where they are expected, else in items; all is 0 where it is unknown."""
        return (self.done, self.total or 0) if self.expected is None else (self.units, self.expected)

    def _rate(self) -> str:
        rate = self.units / self.seconds
        return f"{byte_size(rate)}/s" if self.unit == "bytes" else f"{rate:,.0f} {self.unit}/s"

    def _noun(self) -> str:
        return self.noun and f" {self.noun}"

    def _more(self) -> str:
        text = self.more() if self.done or self.units else ""  # what it tells of may not be there before the first item
        return text and f", {text}"


class _Wait(Progress):
    """A job that does not count itself: what it has done is looked up when a line is wanted."""

    def __init__(self, what: str, expected: int, done: Callable[[], int] | None) -> None:
        super().__init__(what, unit="bytes", expected=expected)
        self.look, self.before = done, done() if done is not None and expected else 0

    def line(self) -> str:
        """Size, time, and where both sides are known rate and time left."""
        if self.look is not None:
            self.units = min(self.look() - self.before, self.expected or 0)
        if not self.units:
            about = f" ({byte_size(self.expected)})" if self.expected else ""
            return f"{self.what}{about}: {clock(self.seconds)}"
        left = self.seconds / self.units * ((self.expected or 0) - self.units)
        done = f"{byte_size(self.units)} of {byte_size(self.expected or 0)}"
        return f"{self.what}: {done}, {self._rate()}, {clock(left)} left"


@contextmanager
def waiting(
    what: str, size: int | str | os.PathLike[str] = 0, done: Callable[[], int] | None = None
) -> Iterator[Progress]:
    """Within it the signs of life name this job.

    Args:
        what: such as ``loading the target T``.
        size: its bytes, or the file or folder whose bytes they are.
        done: gives a number that rises by them; None where only the yielded job's ``units`` tell.
    """
    if not _commands:  # nobody is told
        size = 0
    job = _Wait(what, size if isinstance(size, int) else bytes_in(size), done)
    try:
        yield job
    finally:
        job.close()
