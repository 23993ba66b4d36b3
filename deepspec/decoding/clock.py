"""Where the time of decoding goes: wall seconds a phase on the CPU, event pairs (no extra synchronisation) on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

PHASES = ("prefill", "draft", "verify", "head")


class StepTiming(NamedTuple):
    """One round of the batch, prefill left out."""

    rows: int  # that decoded
    verified: int  # tokens sent to the target, one a row for the newest token included
    emitted: int  # tokens that outputs grew by
    seconds: float


class PhaseClock:
    """Sums the seconds of named phases and counts rounds.

    ``now`` may be replaced by another clock (the process's own time), ``timings`` by a list that is then filled.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.rounds = 0  # forwards that verified
        self.row_rounds = 0  # the same, a count a row
        self.verified = 0  # tokens sent to the target, one a row for the newest token included
        self.wall = 0.0
        self.now: Callable[[], float] = time.perf_counter
        self.timings: list[StepTiming] | None = None
        self._open = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside to ``name``, or to the phase that is open already: a captured piece is one."""
        if self._open:
            yield
            return
        self._open = True
        try:
            with self._counted(name):
                yield
        finally:
            self._open = False

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = self.now()
            yield
            self._seconds[name] += self.now() - start

    def collect(self) -> None:
        """After a synchronisation: turn finished event pairs into seconds, so that they do not pile up."""
        pending = []
        for name, begin, end in self._events:
            if end.query():
                self._seconds[name] += begin.elapsed_time(end) / 1000
            else:
                pending.append((name, begin, end))
        self._events = pending

    def seconds(self) -> dict[str, float]:
        """Seconds a phase; ``other`` is the rest of the wall-clock time, ``total`` all of it."""
        self.collect()
        spent = dict(self._seconds)
        return {**spent, "other": max(0.0, self.wall - sum(spent.values())), "total": self.wall}
