"""Forward, copy, encoding and writing at the same time, with memory bounded by bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class ByteQueue:
    """One worker thread that runs tasks in order; at most ``limit`` bytes of them wait.

    Args:
        limit: bytes; a single larger task is let in when nothing else waits.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.peak = 0
        self._waiting = 0
        self._tasks: deque[tuple[Callable[[], None], int]] = deque()
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="cache writer", daemon=True)
        self._thread.start()

    def put(self, task: Callable[[], None], size: int) -> None:
        """Queue a task that holds ``size`` bytes; waits for room. Raises what an earlier task raised."""
        size = max(size, 1)
        with self._changed:
            while self._waiting and self._waiting + size > self.limit and self._error is None:
                self._changed.wait()
            self._raise()
            self._waiting += size
            self.peak = max(self.peak, self._waiting)
            self._tasks.append((task, size))
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until all tasks are done. Raises what a task raised."""
        with self._changed:
            while self._waiting and self._error is None:
                self._changed.wait()
            self._raise()

    def close(self, cancel: bool = False) -> None:
        """End the thread; with ``cancel`` tasks that have not begun are dropped."""
        with self._changed:
            self._closed = True
            if cancel:
                self._tasks.clear()
            self._changed.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._tasks and not self._closed:
                    self._changed.wait()
                if not self._tasks or self._error is not None:
                    return
                task, size = self._tasks.popleft()
            try:
                task()
            except BaseException as problem:
                with self._changed:
                    self._error = problem
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting -= size
                self._changed.notify_all()
