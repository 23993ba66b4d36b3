"""Servers that come and go: which one to ask next, and when to ask one that failed again."""

from __future__ import annotations

import random
import sys
import threading
import time

from deepspec.errors import DataError
from deepspec.http import check_url, without_password

FIRST_REST, LONGEST_REST = 0.25, 15.0  # seconds that a server rests after a failure; doubled with each in a row


class Server:
    """One server: its address and how it fares. Changed under its pool's lock only."""

    def __init__(self, url: str) -> None:
        url = url.rstrip("/")
        self.url = url if url.endswith("/v1") else f"{url}/v1"
        check_url(self.url, "--server", DataError)
        self.name = without_password(self.url)  # in messages
        self.in_flight, self.failures, self.answered = 0, 0, 0
        self.rests_until = 0.0
        self.plain_fields = False  # refuses fields beyond OpenAI's (see ServerEngine)


class Pool:
    """Hands out the least busy server that is not resting."""

    def __init__(self, servers: list[Server], concurrency: int, patience: float) -> None:
        if not servers:
            raise DataError("no server given", wanted="at least one --server URL")
        self.servers, self.concurrency, self.patience = servers, concurrency, patience
        self._changed = threading.Condition()
        self._last_good = time.monotonic()
        self._closed = False

    def acquire(self) -> Server:
        """A server with room, waiting for one.

        Raises:
            DataError: none has answered for ``patience`` seconds, or the pool is closed.
        """
        with self._changed:
            while True:
                now = time.monotonic()
                if self._closed:
                    raise DataError("the job has ended")
                if all(server.failures for server in self.servers) and now - self._last_good > self.patience:
                    raise DataError(
                        f"no server has answered for {self.patience:.0f} s",
                        file=", ".join(server.name for server in self.servers),
                        remedy="start the servers, then run the same command again: what is answered is kept",
                    )
                ready = [server for server in self.servers if self._has_room(server, now)]
                if ready:
                    server = min(ready, key=lambda one: (one.in_flight, one.answered))
                    server.in_flight += 1
                    return server
                self._changed.wait(0.05 + 0.05 * random.random())

    def _has_room(self, server: Server, now: float) -> bool:
        """A server that failed is tried with one request before it gets its share again."""
        room = 1 if server.failures else self.concurrency
        return server.rests_until <= now and server.in_flight < room

    def release(self, server: Server, problem: str | None = None, rest: float | None = None) -> None:
        """Give a server back; with a problem it rests, longer each time (or for ``rest`` seconds)."""
        with self._changed:
            server.in_flight -= 1
            if problem is None:
                server.failures, server.rests_until = 0, 0.0
                server.answered += 1
                self._last_good = time.monotonic()
            elif rest != 0:
                server.failures += 1
                pause = min(FIRST_REST * 2 ** min(server.failures - 1, 10), LONGEST_REST) if rest is None else rest
                now = time.monotonic()
                if server.rests_until <= now:  # the first of many that fail together
                    server.rests_until = now + pause * (0.75 + 0.5 * random.random())
                    print(f"{problem}; resting it {pause:.1f} s", file=sys.stderr, flush=True)
            self._changed.notify()

    def close(self) -> None:
        """Wake and end whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
