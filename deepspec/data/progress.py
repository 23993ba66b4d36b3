"""A line on stderr for every long job: how far, how fast, how long still."""

from __future__ import annotations

import sys
import time


def clock(seconds: float) -> str:
    """``1:02:03``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Counts items and tokens (or another unit) and prints at most every ``every`` seconds.

    Args:
        label: what the job does.
        total: items to do; None where that is unknown.
        unit: of what :meth:`add` counts beside the items.
        every: seconds between lines.
    """

    def __init__(self, label: str, total: int | None, unit: str = "tokens", every: float = 5.0) -> None:
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.items, self.units = 0, 0
        self._start = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def add(self, items: int = 1, units: int = 0) -> None:
        """Count ``items`` done, worth ``units``; prints when it is time."""
        self.items += items
        self.units += units
        now = time.monotonic()
        if now - self._last >= self.every:
            self._last = now
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """The line as it would be printed now."""
        of = "" if self.total is None else f"/{self.total}"
        text = f"{self.label}: {self.items}{of}, {self.units / self.seconds:,.0f} {self.unit}/s"
        if self.total is not None and 0 < self.items < self.total:
            text += f", {clock(self.seconds / self.items * (self.total - self.items))} left"
        return text

    def finish(self) -> None:
        """Print the total and the time it took."""
        print(
            f"{self.label}: {self.items} in {clock(self.seconds)}, {self.units:,} {self.unit}, "
            f"{self.units / self.seconds:,.0f} {self.unit}/s",
            file=sys.stderr,
            flush=True,
        )
