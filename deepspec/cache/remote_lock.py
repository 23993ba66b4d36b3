"""The lock of a cache at a URL: an object that is created only where there is none, renewed by its holder.

Whether a holder lives is seen, not computed from two hosts' clocks: its object changes, or it does not for STALE
seconds. A dead one's object stays, and the next holder creates one of the next number: only one can. Object stores do
both in one step.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from deepspec.errors import CacheError
from deepspec.locks import LOCK, me
from deepspec.processes import alive, host, started_at

if TYPE_CHECKING:
    from deepspec.cache.store import RemoteStore

log = logging.getLogger(__name__)
RENEWED, STALE = 10.0, 60.0  # seconds between renewals; without one, until a holder counts as dead


class RemoteLock:
    """The build lock of one store.

    Args:
        store: the cache's.
    """

    def __init__(self, store: RemoteStore) -> None:
        self.store, self.number, self.beat = store, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="cache lock")

    def take(self) -> None:
        """Take the lock.

        Raises:
            CacheError: another process holds it, or the store cannot create an object only where there is none.
        """
        while True:
            before = self._newest()
            if before is not None:
                self._await_death(*before)
            self.number = 0 if before is None else before[0] + 1
            if self.store.create(self._name(self.number), self._mine()) and self._is_mine(before):
                break
            time.sleep(random.uniform(0.05, 0.5))  # another one was faster
        self._thread.start()

    def release(self) -> None:
        """Give it back; its own object goes last."""
        self._ended.set()
        self._thread.join()
        for number in sorted(self._numbers()):
            if number <= self.number:
                self.store.remove(self._name(number))

    def _name(self, number: int) -> str:
        return f"{LOCK}.{number}" if number else LOCK

    def _mine(self) -> bytes:
        pid = os.getpid()
        who = {"holder": me(), "pid": pid, "host": host(), "started": started_at(pid), "beat": self.beat}
        return json.dumps(who).encode()

    def _numbers(self) -> list[int]:
        ends = [name.removeprefix(LOCK).removeprefix(".") for name in self.store.names("") if name.startswith(LOCK)]
        return [int(end or 0) for end in ends if end.isdigit() or not end]

    def _newest(self) -> tuple[int, bytes] | None:
        """The number and the content of the lock that counts."""
        found = self._numbers()
        data = self._read(max(found)) if found else None
        return None if data is None else (max(found), data)

    def _read(self, number: int) -> bytes | None:
        try:
            return self.store.read(self._name(number))
        except CacheError:
            if self.store.size(self._name(number)) is None:
                return None
            raise

    def _is_mine(self, before: tuple[int, bytes] | None) -> bool:
        """Whether what this process has just created is the lock: the store obeys, and nobody came between."""
        if self.store.create(self._name(self.number), self._mine()):
            self.store.remove(self._name(self.number))
            raise CacheError("the store takes a second lock over the first", file=self.store.url, remedy=NO_LOCK)
        same = before is None or self._read(before[0]) == before[1]
        if same and max(self._numbers(), default=-1) == self.number:
            return True
        self.store.remove(self._name(self.number))
        return False

    def _await_death(self, number: int, data: bytes) -> None:
        """Wait until a holder counts as dead, or its lock is gone.

        Raises:
            CacheError: it lives.
        """
        try:
            who: dict[str, Any] = json.loads(data)
            here = who.get("host") == host()
        except (ValueError, AttributeError):
            who, here = {}, False
        until = time.monotonic() + STALE
        if not here:
            log.info("build: %s is locked; watching for up to %.0f s whether its holder lives", self.store.url, STALE)
        lives = here and alive(who["pid"], who["started"])
        while not here and not lives and time.monotonic() < until:
            time.sleep(min(1.0, STALE / 10))
            now = self._read(number)
            if now is None:
                return
            lives = now != data
        if lives:
            problem, remedy = "another process works here, this build does not start", "wait until it has ended"
            raise CacheError(
                problem, file=self.store.url, found=who.get("holder", "no name"), remedy=f"{remedy}, or end it"
            )

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(RENEWED):
            try:
                if max(self._numbers(), default=-1) != self.number:
                    break
                self.beat += 1
                self.store.write(self._name(self.number), self._mine())
                renewed = time.monotonic()
            except (OSError, CacheError) as problem:
                log.warning("build: the lock of %s was not renewed (%s)", self.store.url, problem)
                if time.monotonic() - renewed > STALE / 2:
                    break
        if not self._ended.is_set():
            log.error("the lock of %s is lost: this process stops", self.store.url)
            os.kill(os.getpid(), signal.SIGTERM)


NO_LOCK = "build into a local folder, and copy it"
