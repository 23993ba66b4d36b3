"""A line on stderr for every long job: done, speed, time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from deepspec.errors import printable
from deepspec.log import reports


def clock(seconds: float) -> str:
    """``1:02:03``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Counts items, and tokens or another unit within them; rank 0 prints a line at most every ``every`` seconds.

    Any thread may count.

    Args:
        what: the job, such as ``build``.
        total: items to do; None where that is unknown.
        unit: of what :meth:`add` counts beside the items.
        noun: what the items are called; empty where ``what`` names them.
        expected: units in all: time left then goes by them instead of by the items.
        more: gives further words for the line when it is printed.
        every: seconds between lines.
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
        every: float = 5.0,
    ) -> None:
        self.what, self.total, self.unit, self.noun, self.expected = what, total, unit, noun, expected
        self.more, self.every = more, every
        self.done = self.units = 0
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def add(self, items: int = 1, units: int = 0) -> None:
        """Count ``items`` done, worth ``units``; prints when it is time."""
        with self._lock:
            self.done += items
            self.units += units
            due = time.monotonic() - self._last >= self.every
            if due:
                self._last = time.monotonic()
        if due:
            self._print(self.line())

    def line(self) -> str:
        """The line as it would be printed now."""
        of = "" if self.total is None else f"/{self.total}"
        text = f"{self.what}: {self.done}{of}{self._noun()}, {self.units / self.seconds:,.0f} {self.unit}/s"
        done, total = (self.done, self.total) if self.expected is None else (self.units, self.expected)
        if total is not None and 0 < done < total and self.done != self.total:
            text += f", {clock(self.seconds / done * (total - done))} left"
        return text + self._more()

    def finish(self) -> None:
        """Print the totals and the time it took."""
        text = f"{self.what}: {self.done}{self._noun()} in {clock(self.seconds)}, {self.units:,} {self.unit}"
        self._print(f"{text}, {self.units / self.seconds:,.0f} {self.unit}/s{self._more()}")

    def _noun(self) -> str:
        return self.noun and f" {self.noun}"

    def _more(self) -> str:
        text = self.more()
        return text and f", {text}"

    def _print(self, text: str) -> None:
        if reports():
            print(printable(text), file=sys.stderr, flush=True)
