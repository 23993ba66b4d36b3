"""Hidden states of conversations from any number of servers, in the order in which training reads them.

Threads ask; what is announced comes first, as far as its bytes fit the limit. A server that fails at anything rests, a
little longer each time, and gets no conversation before it has passed its handshake again; the conversation goes to
another one. Where no server is left for a while, every reader gets a :class:`~deepspec.errors.SourceLost`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from deepspec.errors import SourceLost, TargetError
from deepspec.http import without_password
from deepspec.streaming.client import FeatureClient, ServerFault, Wanted, open_client

T = TypeVar("T", covariant=True)
log = logging.getLogger(__name__)
REST, LONGEST_REST = 0.5, 30.0  # seconds that a server rests after a fault; doubled each time
ATTEMPTS = 8  # at one conversation
CLOSING = 2.0  # seconds that a thread has to end
LOOK = 0.1  # seconds between two looks at resting servers
MOST_THREADS = 64


class Request(Protocol[T]):
    """Something that a server is asked for."""

    @property
    def number(self) -> int:
        """By which what was announced is taken."""

    @property
    def name(self) -> str:
        """In messages."""

    @property
    def tokens(self) -> Sized:
        """That it is about."""

    def ask(self, client: FeatureClient) -> T:
        """What ``client`` gives for it."""


@dataclass
class _Server:
    """One of the servers, as the pool knows it."""

    url: str
    client: FeatureClient | None = None  # once its kind is known
    ready: bool = False
    in_flight: int = 0
    rests: int = 0  # in a row
    until: float = 0.0  # when it is asked again
    problem: str = "not asked yet"

    def rest(self, problem: str) -> float:
        """Ask it nothing for a while; returns the seconds."""
        pause = min(REST * 2**self.rests, LONGEST_REST)
        self.ready, self.problem, self.until, self.rests = False, problem, time.monotonic() + pause, self.rests + 1
        return pause


@dataclass
class _Job:
    """A conversation that is wanted."""

    conversation: Request[Any]
    size: int
    future: Future[Any] = field(default_factory=Future)
    begun: bool = False  # its bytes are counted
    attempts: int = 0
    refusals: set[str] = field(default_factory=set)  # URLs of servers that say that the request is wrong


class ServerPool:
    """The servers of a run.

    Args:
        urls: of the servers.
        wanted: of every conversation.
        limit: bytes of hidden states that are on their way or not taken yet.
        patience: seconds without any server that are waited.
        first: the server that is asked first where several are free; ranks begin with different ones.

    Raises:
        TargetError: no server answers, or one serves something else.
    """

    def __init__(self, urls: Sequence[str], wanted: Wanted, *, limit: int, patience: float, first: int = 0) -> None:
        self.wanted, self.limit, self.patience = wanted, limit, patience
        self.held = self.peak = 0  # bytes
        self._servers = [_Server(url) for url in (*urls[first % len(urls) :], *urls[: first % len(urls)])]
        self._jobs: dict[int, deque[_Job]] = defaultdict(deque)
        self._queue: deque[_Job] = deque()  # announced and not begun, in order
        self._urgent: deque[_Job] = deque()  # whose bytes are counted: a reader waits, or a server has failed
        self._change = threading.Condition()
        self._lost: str | None = None
        self._closed = False
        self._connect()
        self._since = time.monotonic()  # that no server is ready
        count = min(MOST_THREADS, sum((one.client or FeatureClient).concurrency for one in self._servers))
        works: list[Callable[[], None]] = [self._watch, *[self._work] * count]
        self._threads = [threading.Thread(target=work, name="served", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    @property
    def size(self) -> int:
        """Number of servers."""
        return len(self._servers)

    # -- for readers -----------------------------------------------------------------------------------------------

    def announce(self, conversations: Sequence[Request[Any]]) -> None:
        """Ask for these next; each must be taken once."""
        with self._change:
            for one in conversations:
                self._queue.append(self._job(one))
            self._change.notify_all()

    def take(self, conversations: Sequence[Request[T]]) -> Iterator[T]:
        """What a server gives for each, announced or not, in order; their bytes are the caller's from then on.

        Raises:
            SourceLost: no server is left, or all fail at one of these.
        """
        with self._change:
            jobs = [self._claim(one) for one in conversations]
            self._change.notify_all()
        for job in jobs:
            try:
                yield job.future.result()
            finally:
                with self._change:
                    self.held -= job.size if job.begun else 0
                    self._change.notify_all()

    def _claim(self, conversation: Request[Any]) -> _Job:
        """The job of a conversation that a reader waits for."""
        waiting = self._jobs.get(conversation.number)
        job = waiting.popleft() if waiting else self._job(conversation, kept=False)
        if not waiting:
            self._jobs.pop(conversation.number, None)
        if not job.begun and not job.future.done():  # whatever was announced before it may never be taken
            self._begin(job)
            self._urgent.append(job)
        return job

    def close(self) -> None:
        """End the threads; one that waits for a server is left to its timeout."""
        with self._change:
            self._closed = True
            self._fail_all("closed")
            self._change.notify_all()
        for thread in self._threads:  # one that decodes while the interpreter ends can bring it down
            thread.join(CLOSING)

    def faults(self) -> list[str]:
        """A line for each server that is not ready."""
        return [f"{without_password(one.url)}: {one.problem}" for one in self._servers if not one.ready]

    # -- servers ---------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """The first handshake with every server."""
        with ThreadPoolExecutor(len(self._servers)) as pool:
            found = list(pool.map(self._handshake, self._servers))
        settled = [one for one, fault in zip(self._servers, found, strict=True) if fault and fault.settled]
        if settled:
            name = without_password(settled[0].url)
            raise TargetError(settled[0].problem, file=name, key="data.servers", remedy="docs/streaming.md")
        if not any(one.ready for one in self._servers):
            raise TargetError(
                "no server answers", key="data.servers", found="; ".join(self.faults()),
                remedy="start one: deepspec serve-features, or an engine (docs/streaming.md)",
            )  # fmt: skip
        for line in self.faults():
            log.warning("server %s; the others do its work until it answers", line)

    def _handshake(self, server: _Server) -> ServerFault | None:
        """Let a server in, or let it rest."""
        try:
            server.client = server.client or open_client(server.url, self.wanted)
            server.client.check()
        except ServerFault as fault:
            server.rest(str(fault))
            return fault
        server.ready = True
        return None

    def _watch(self) -> None:
        """Ask resting servers again; give up where none came back."""
        while True:
            with self._change:
                self._change.wait(LOOK)
                if self._closed or self._lost is not None:
                    return
                resting = [one for one in self._servers if not one.ready and time.monotonic() >= one.until]
                if any(one.ready for one in self._servers):
                    self._since = time.monotonic()
                elif time.monotonic() - self._since > self.patience:
                    self._fail_all(f"no server is left ({'; '.join(self.faults())})")
                    return
            for one in resting:
                before, name = one.problem, without_password(one.url)
                fault = self._handshake(one)
                if fault is None:
                    log.warning("server %s answers again", name)
                elif str(fault) != before:
                    log.warning("server %s: %s", name, fault)
            if resting:
                with self._change:
                    self._change.notify_all()

    def _rest(self, server: _Server, fault: ServerFault) -> None:
        """Take a server out until it has passed its handshake again."""
        if server.ready:
            pause = server.rest(str(fault))
            log.warning("server %s: %s; asked again in %.3g s", without_password(server.url), fault, pause)

    # -- conversations ---------------------------------------------------------------------------------------------

    def _job(self, conversation: Request[Any], kept: bool = True) -> _Job:
        job = _Job(conversation, len(conversation.tokens) * self.wanted.token_bytes)
        if kept:
            self._jobs[conversation.number].append(job)
        if self._lost is not None:
            job.future.set_exception(self._error(self._lost))
        return job

    def _begin(self, job: _Job) -> None:
        job.begun = True
        self.held += job.size
        self.peak = max(self.peak, self.held)

    def _next(self) -> tuple[_Job, _Server] | None:
        """A conversation and a server for it; None: not now."""
        while self._queue and (self._queue[0].begun or self._queue[0].future.done()):
            self._queue.popleft()  # a reader was faster
        fits = self._queue and (self.held == 0 or self.held + self._queue[0].size <= self.limit)
        if not (self._urgent or fits):
            return None
        free = [one for one in self._servers if one.ready and one.client and one.in_flight < one.client.concurrency]
        if not free:
            return None
        server = min(free, key=lambda one: one.in_flight)
        if self._urgent:
            return self._urgent.popleft(), server
        job = self._queue.popleft()
        self._begin(job)
        return job, server

    def _work(self) -> None:
        """Fetch one conversation after the other."""
        while True:
            with self._change:
                while (found := self._next()) is None:
                    if self._closed:
                        return
                    self._change.wait()
                if self._closed:
                    return
                job, server = found
                server.in_flight += 1
            self._fetch(job, server)

    def _fetch(self, job: _Job, server: _Server) -> None:
        states, problem = None, None
        try:
            states = job.conversation.ask(server.client)  # type: ignore[arg-type]  # ready: it has one
        except Exception as found:
            problem = found
        with self._change:
            server.in_flight -= 1
            if isinstance(problem, ServerFault):
                if problem.refuses:
                    job.refusals.add(server.url)
                self._rest(server, problem)
                self._again(job, problem)
            elif not job.future.done():
                if states is not None:
                    server.rests = 0
                    job.future.set_result(states)
                else:  # a defect, or no memory: the reader must learn it
                    job.future.set_exception(problem)
            self._change.notify_all()

    def _again(self, job: _Job, fault: ServerFault) -> None:
        """Have a conversation fetched elsewhere, as long as that makes sense."""
        job.attempts += 1
        if job.future.done():
            return
        refused = job.refusals.issuperset(one.url for one in self._servers)  # none will take it, however long one waits
        if self._lost is None and job.attempts < ATTEMPTS and not refused:
            self._urgent.appendleft(job)
            return
        problem = f"{job.attempts} attempts failed at {job.conversation.name}, the last with: {fault}"
        job.future.set_exception(self._error(self._lost or problem))

    def _fail_all(self, problem: str) -> None:
        self._lost = problem
        for job in (*self._urgent, *self._queue, *(job for jobs in self._jobs.values() for job in jobs)):
            if not job.future.done():
                job.future.set_exception(self._error(problem))

    def _error(self, problem: str) -> SourceLost:
        remedy = "start the servers, then run the same command again"
        return SourceLost(problem, key="data.servers", remedy=remedy)
