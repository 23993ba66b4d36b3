"""Signs of life between the ranks of a job: a dead rank is named, a slow one is waited for, and all end together.

A thread of every rank counts a number up in a store that rank 0 (under torchrun its agent) hosts. A rank whose number
stands still for DEEPSPEC_PATIENCE seconds, whose process is gone, or that says that it fails, ends the job: the first
to notice writes it into the store, and every rank ends with exit code 1, one of them with a line that names the rank.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from deepspec.errors import DeepSpecError
from deepspec.processes import alive, host, started_at

if TYPE_CHECKING:
    import torch.distributed as dist

PATIENCE = "DEEPSPEC_PATIENCE"  # seconds
DEFAULT_PATIENCE = 45.0
STARTING = 10  # times as long for a rank that has not connected yet
BEAT = 1.0  # seconds between two signs of life
SUSPECT = 6.0  # seconds of silence that suffice once a collective has failed
GRACE = 10.0  # seconds that a rank has to end in order once another is lost
NUDGE = signal.SIGUSR2  # interrupts the main thread, which may wait in Python


class RankLost(DeepSpecError):
    """Another rank is dead or failed: this one cannot go on."""


@dataclass(frozen=True)
class End:
    """Why the job ends before its time."""

    rank: int  # the one that is lost
    line: str
    by: int | None  # the rank that noticed; None: every one by itself, since the store is lost
    asked: bool = False  # a signal asked that rank to stop: the others are asked too


def patience(error: type[DeepSpecError] = DeepSpecError) -> float:
    """Seconds of silence after which a rank counts as dead.

    Raises:
        error: DEEPSPEC_PATIENCE is no number of seconds.
    """
    text = os.environ.get(PATIENCE, "")
    try:
        seconds = float(text or DEFAULT_PATIENCE)
    except ValueError:
        seconds = 0.0
    if not 2 * BEAT <= seconds < 1e7:
        raise error("not a number of seconds", key=PATIENCE, found=text, wanted=f"{2 * BEAT:g} or more")
    return seconds


class Watch:
    """One rank's signs of life and its look at the others'.

    Args:
        rank: this one.
        size: of the job.
        error: the class of what :meth:`failed` makes.

    Raises:
        error: the other ranks do not connect in time; the missing ones are named.
    """

    def __init__(self, rank: int, size: int, error: type[DeepSpecError]) -> None:
        self.rank, self.size, self.error = rank, size, error
        self.patience = patience(error)
        self.end: End | None = None
        self._left, self._known = threading.Event(), threading.Event()  # main has left; why the job ends is known
        self._nudged: BaseException | None = None  # what this rank ends with because of another one
        self._problem: BaseException | None = None  # of its own
        self._who: dict[int, dict[str, Any]] = {}
        self._beats: dict[int, tuple[bytes, float]] = {}  # rank -> its number, and when it was seen to change
        self._main = threading.main_thread().ident if threading.current_thread() is threading.main_thread() else None
        self._handlers = self._install()
        try:
            self._store = self._open()
            self._connect()
        except BaseException:
            self._restore()
            raise
        self._answered = time.monotonic()  # by the store
        self._threads = [
            threading.Thread(target=work, name="heartbeat", daemon=True) for work in (self._run, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def _open(self) -> dist.Store:
        from torch.distributed import PrefixStore, TCPStore

        self._hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=STARTING * self.patience)
        try:
            store = TCPStore(
                address, port, is_master=self._hosts, timeout=wait, wait_for_workers=False, multi_tenant=self._hosts
            )
        except RuntimeError as problem:
            line = str(problem).strip().splitlines()[0]
            raise self.error(f"rank 0 does not answer at {address}:{port} ({line})", remedy=_REMEDY) from None
        store.set_timeout(timedelta(seconds=self.patience))
        return PrefixStore(f"deepspec/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_groups)}", store)

    def _connect(self) -> None:
        """Say who this rank is, and wait until all have."""
        me = {"pid": os.getpid(), "host": host(), "name": socket.gethostname(), "started": started_at(os.getpid())}
        waited_until = time.monotonic() + STARTING * self.patience
        try:
            self._store.set(f"beat/{self.rank}", "0")
            self._store.set(f"who/{self.rank}", json.dumps(me))
            while missing := [one for one in range(self.size) if not self._seen(one)]:
                if (end := self._read_end()) is not None:
                    raise self._lost(end)
                dead = next((one for one in self._who if self._is_dead(one)), None)
                if dead is not None:
                    raise self._lost(self._tell(End(dead, f"{self.name(dead)} {_GONE}", self.rank)))
                if time.monotonic() > waited_until:
                    names, seconds = ", ".join(map(str, missing)), STARTING * self.patience
                    line = f"rank {names} did not connect within {seconds:.0f} s ({STARTING} x {PATIENCE})"
                    raise self._lost(self._tell(End(missing[0], line, self.rank)))
                time.sleep(0.1)
        except RuntimeError:
            raise self._lost(self._host_lost()) from None

    def _seen(self, rank: int) -> bool:
        if rank not in self._who and self._store.check([f"who/{rank}"]):
            self._who[rank] = json.loads(self._store.get(f"who/{rank}"))
        return rank in self._who

    def name(self, rank: int) -> str:
        """A rank as messages name it."""
        who = self._who.get(rank)
        return f"rank {rank}" if who is None else f"rank {rank} (process {who['pid']} on {who['name']})"

    def _install(self) -> dict[int, Any]:
        """The nudge's handler; SIGTERM ends a rank at once, also one that waits for another outside of Python."""
        if self._main is None:
            return {}
        before: dict[int, Any] = {NUDGE: signal.signal(NUDGE, self._interrupt)}
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return before

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self._nudged is None and self.end is not None and not self._left.is_set():
            self._nudged = self._lost(self.end)
            raise self._nudged

    def _lost(self, end: End) -> BaseException:
        """What this rank ends with: one rank says the line, the others end without a word."""
        if end.asked:
            return SystemExit(143)
        speaker = end.by
        if end.by is None:  # the lowest of this host that lives
            here = (one for one, who in self._who.items() if one != end.rank and who["host"] == host())
            speaker = min((one for one in here if not self._is_dead(one)), default=self.rank)
        elif end.by == end.rank:
            speaker = int(end.rank == 0)
        return RankLost(end.line, remedy=_REMEDY) if speaker == self.rank else SystemExit(1)

    def _run(self) -> None:
        number = 0
        try:
            while self.end is None:
                number += 1
                self._store.set(f"beat/{self.rank}", str(number))
                self.end = self._read_end() or self._look()
                self._answered = time.monotonic()
                if self._left.wait(0 if self.end else BEAT):
                    return
        except RuntimeError:  # no connection to the store
            self.end = self.end or self._host_lost()
        self._known.set()
        self._finish(self.end)

    def _guard(self) -> None:
        """End the job where the store does not answer: a call of it waits for ever where rank 0 is frozen."""
        while not self._left.wait(BEAT) and not self._known.is_set():
            if time.monotonic() - self._answered > self.patience:
                line = f"{self.name(0)} gave no sign of life for {self.patience:g} s ({PATIENCE})"
                self.end = End(0, line, None)
                self._known.set()
                self._finish(self.end)

    def _look(self) -> End | None:
        """A rank that is dead, if there is one; it is told to the others."""
        for rank in self._who:
            if rank != self.rank and self._is_dead(rank) and not self._has_left(rank):
                return self._tell(End(rank, f"{self.name(rank)} {_GONE}", self.rank))
        for rank in range(1, self.size) if self.rank == 0 else (0,):  # rank 0 watches all, all watch rank 0
            if self._silence(rank) > self.patience and not self._has_left(rank):
                line = f"{self.name(rank)} gave no sign of life for {self.patience:g} s ({PATIENCE})"
                return self._tell(End(rank, line, self.rank))
        return None

    def _is_dead(self, rank: int) -> bool:
        who = self._who[rank]
        return who["host"] == host() and not alive(who["pid"], who["started"])

    def _has_left(self, rank: int) -> bool:
        return bool(self._store.check([f"left/{rank}"]))

    def _silence(self, rank: int) -> float:
        """Seconds, by this rank's own clock, since a rank's number was seen to change."""
        number, now = self._store.get(f"beat/{rank}"), time.monotonic()
        if rank not in self._beats or self._beats[rank][0] != number:
            self._beats[rank] = (number, now)
        return now - self._beats[rank][1]

    def _read_end(self) -> End | None:
        return End(**json.loads(self._store.get("end"))) if self._store.check(["end"]) else None

    def _tell(self, end: End) -> End:
        """Write why the job ends, unless somebody has; returns what the store holds then."""
        told = self._store.compare_set("end", "", json.dumps(asdict(end)))
        return End(**json.loads(told))

    def _host_lost(self) -> End:
        return End(0, f"{self.name(0)}, or the launcher that holds the ranks together, does not answer", None)

    def _finish(self, end: End) -> None:
        """Have the main thread end; where it does not (it waits for a dead rank outside of Python), end the process."""
        stops = end.asked and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # it knows how to stop in order
        if self._main is not None and self._problem is None:
            signal.pthread_kill(self._main, signal.SIGTERM if stops else NUDGE)
        if not self._left.wait(self.patience if stops else GRACE):
            lost = self._problem or self._lost(end)
            if isinstance(lost, DeepSpecError):
                print(f"error: {' '.join(str(lost).splitlines())}", file=sys.stderr, flush=True)
            os._exit(143 if end.asked else 1)

    def failed(self, problem: BaseException) -> BaseException:
        """Tell the others that this rank fails of ``problem``; returns what it is to raise.

        That is another exception where the problem is only that another rank is lost. A problem whose attribute
        ``asked`` is true is a signal's: the others are sent SIGTERM.
        """
        if problem is self._nudged or isinstance(problem, SystemExit):  # the latter is agreed with the others
            return problem
        if isinstance(problem, RuntimeError | RankLost):
            end = self.end or self._suspect()
            if end is not None and end.rank != self.rank:
                self._nudged = self._nudged or self._lost(end)
                return self._nudged
        self._problem = problem
        asked = isinstance(problem, KeyboardInterrupt) or getattr(problem, "asked", False)
        text = " ".join(str(problem).split()) or type(problem).__name__
        with suppress(RuntimeError):  # no connection to the store: the others notice that too
            self._tell(End(self.rank, f"{self.name(self.rank)} failed: {text}", self.rank, asked))
        return problem

    def _suspect(self) -> End | None:
        """Why the job ends, a few seconds after a collective failed; None where no rank is lost."""
        begun = {rank: self._beat_of(rank) for rank in range(self.size) if rank != self.rank}
        if self._known.wait(SUSPECT):
            return self.end
        for rank, number in begun.items():
            if number is None:
                return self._host_lost()
            if self._beat_of(rank) == number and not self._has_left(rank):
                return self._tell(End(rank, f"{self.name(rank)} does not answer", self.rank))
        return None

    def _beat_of(self, rank: int) -> bytes | None:
        try:
            return bytes(self._store.get(f"beat/{rank}"))
        except RuntimeError:
            return None

    def close(self, in_order: bool) -> None:
        """Leave: rank 0, which hosts the store, waits for the others, a moment only when the job fails.

        Args:
            in_order: whether the work is done.

        Raises:
            RankLost: another rank is lost meanwhile.
        """
        with suppress(RuntimeError):  # the store is gone
            until = time.monotonic() + 3 * BEAT
            if self.end is None or self.end.by is not None:
                self._store.set(f"left/{self.rank}", "1")
            while self._hosts and (time.monotonic() < until or (in_order and self.end is None)):
                if self._store.check([f"left/{rank}" for rank in range(self.size)]):
                    break
                time.sleep(0.05)
        self._left.set()
        for thread in self._threads:
            thread.join(2 * BEAT)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


_groups = itertools.count()  # a job may connect its ranks several times, over one store
_GONE = "ended without a word"
_REMEDY = "see what it printed, then run the same command again"
