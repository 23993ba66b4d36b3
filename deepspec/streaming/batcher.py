"""The target's side of a feature server: conversations that wait become batches by a budget of tokens.

One thread runs the target; whenever it is free the conversations that wait longest, as many as the budget of padded
tokens takes, are its next batch. The queue is bounded in tokens, what is computed and not sent yet in bytes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import numpy as np

from deepspec.cache.forward import forward_batch
from deepspec.cache.parts import rows_of
from deepspec.data.chat import Rendered
from deepspec.streaming.sampling import Answering, StateSampler, answer_states
from deepspec.streaming.wire import Arrays, Sampled
from deepspec.targets import Target


class Full(Exception):
    """The queue is full: the request must come again."""


@dataclass(frozen=True)
class Limits:
    """What a server holds at most."""

    batch_tokens: int = 16384  # of one forward, padding included; a longer conversation runs alone
    queue_tokens: int = 1 << 20  # of conversations that wait
    unsent_bytes: int = 4 << 30  # of hidden states that are computed and not sent; a single batch is always allowed
    answers: int = 32  # prompts that are answered side by side


@dataclass(eq=False)
class QueuedRequest:
    """One conversation that is to be computed."""

    tokens: list[int]
    loss_mask: list[int]
    layers: tuple[int, ...]
    last_hidden: bool
    lengths: tuple[int, ...] | None = None  # of several conversations that are one batch of their own
    answering: Answering | None = None  # the conversations are prompts
    answers: tuple[Sampled, ...] | None = None  # once computed; then ``tokens`` has them too
    result: Future[Arrays] = field(default_factory=Future)
    done: Callable[[], None] = lambda: None  # to be called when the result is no longer needed

    def rows(self) -> list[Rendered]:
        """Its conversations."""
        ends = list(accumulate(self.lengths or [len(self.tokens)]))
        return [Rendered(self.tokens[a:b], self.loss_mask[a:b]) for a, b in pairwise([0, *ends])]


@dataclass
class Counts:
    """What a server has done, by the names of its metrics."""

    conversations: int = 0
    tokens: int = 0
    batches: int = 0
    forward_seconds: float = 0.0
    raw_bytes: int = 0
    sent_bytes: int = 0
    refused: int = 0
    failed: int = 0
    answers: int = 0


class Batcher:
    """Runs the target over what is submitted.

    Args:
        target: the model.
        limits: of batch and queues.
    """

    def __init__(self, target: Target, limits: Limits) -> None:
        self.target, self.limits, self.counts = target, limits, Counts()
        self.queued = self.unsent = 0  # tokens, bytes
        self._queue: deque[QueuedRequest] = deque()
        self._sampler: tuple[object, StateSampler] | None = None  # of the last answers, and what it was made for
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="target", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the target's thread runs."""
        return self._thread.is_alive()

    def submit(self, work: QueuedRequest) -> None:
        """Queue a conversation.

        Raises:
            Full: too many tokens wait.
        """
        with self._change:
            if self._queue and self.queued + len(work.tokens) > self.limits.queue_tokens:
                self.counts.refused += 1
                raise Full
            self.queued += len(work.tokens)
            self._queue.append(work)
            self._change.notify_all()

    def give_up(self, work: QueuedRequest) -> None:
        """Whoever wanted it is gone, or has it."""
        with self._change:
            if work in self._queue:
                self._queue.remove(work)
                self.queued -= len(work.tokens)
        work.result.cancel()
        work.done()

    def close(self) -> None:
        """End the thread after its batch."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._closed and not (self._queue and self.unsent < self.limits.unsent_bytes):
                    self._change.wait()
                if self._closed:
                    return
                chosen = self._choose()
            self._compute([work for work in chosen if work.result.set_running_or_notify_cancel()])

    def _choose(self) -> list[QueuedRequest]:
        """The next batch: those that wait longest and ask for the same, within the budget of padded tokens."""
        first = self._queue[0]
        if first.lengths is not None:
            self._queue.popleft()
            self.queued -= len(first.tokens)
            return [first]
        chosen, longest = list[QueuedRequest](), 0
        for work in self._queue:
            if (work.layers, work.last_hidden, work.lengths) != (first.layers, first.last_hidden, None):
                continue
            most = max(longest, len(work.tokens))
            if chosen and most * (len(chosen) + 1) > self.limits.batch_tokens:
                break
            chosen.append(work)
            longest = most
        for work in chosen:
            self._queue.remove(work)
            self.queued -= len(work.tokens)
        return chosen

    def _compute(self, batch: list[QueuedRequest]) -> None:
        if not batch:
            return
        if batch[0].answering is not None:
            self._answer(batch[0], batch[0].answering)
            return
        begun = time.perf_counter()
        rows = [(number, "", one) for number, work in enumerate(batch) for one in work.rows()]
        try:
            size, wait = forward_batch(self.target, batch[0].layers, batch[0].last_hidden, rows)
            block = wait()
            if not _is_finite(block.features):
                raise ValueError("the target's hidden states are not finite")
        except Exception as problem:  # no memory, a model that cannot take it: the requests are told
            self._failed(batch, problem)
            return
        self._count(batch, size, time.perf_counter() - begun)
        ends = np.cumsum([len(work.tokens) for work in batch])
        owners = [number for number, _, _ in rows]
        kept = np.cumsum(np.bincount(owners, rows_of(block.loss_mask, block.lengths)).astype(np.int64))
        release = _Release(len(batch), lambda: self._sent(size))
        for work, end, last_end, rows_here in zip(batch, ends, kept, np.diff(kept, prepend=0), strict=True):
            last = None if block.last_hidden is None else block.last_hidden[last_end - rows_here : last_end]
            work.done = release.one()
            work.result.set_result(Arrays(block.features[end - len(work.tokens) : end], last))

    def _answer(self, work: QueuedRequest, answering: Answering) -> None:
        """Sample the answers of a request's prompts, and keep what the target computes meanwhile."""
        begun = time.perf_counter()
        try:
            asked = (work.layers, replace(answering, keys=()))
            if self._sampler is None or self._sampler[0] != asked:  # else it is known how the target keeps its text
                self._sampler = asked, StateSampler(self.target, work.layers, answering)
            prompts = [row.input_ids for row in work.rows()]
            tokens, answers, arrays = answer_states(self._sampler[1], prompts, answering, work.last_hidden)
            if not _is_finite(arrays.features):
                raise ValueError("the target's hidden states are not finite")
        except Exception as problem:
            self._failed([work], problem)
            return
        work.tokens, work.answers = tokens, answers
        size = arrays.features.nbytes + (0 if arrays.last_hidden is None else arrays.last_hidden.nbytes)
        self._count([work], size, time.perf_counter() - begun)
        self.counts.answers += len(answers)
        work.done = _Release(1, lambda: self._sent(size)).one()
        work.result.set_result(arrays)

    def _failed(self, batch: list[QueuedRequest], problem: Exception) -> None:
        self.counts.failed += len(batch)
        for work in batch:
            work.result.set_exception(problem)

    def _count(self, batch: list[QueuedRequest], size: int, seconds: float) -> None:
        with self._change:
            self.unsent += size
            self.counts.batches += 1
            self.counts.conversations += sum(len(work.lengths or (1,)) for work in batch)
            self.counts.tokens += sum(len(work.tokens) for work in batch)
            self.counts.raw_bytes += size
            self.counts.forward_seconds += seconds

    def _sent(self, size: int) -> None:
        with self._change:
            self.unsent -= size
            self._change.notify_all()


class _Release:
    """Calls ``finish`` once each of ``count`` users is done: they share the memory of one batch."""

    def __init__(self, count: int, finish: Callable[[], None]) -> None:
        self._left, self._finish, self._lock = count, finish, threading.Lock()

    def one(self) -> Callable[[], None]:
        """What one user calls, once or several times."""
        called = list[bool]()

        def done() -> None:
            with self._lock:
                self._left -= not called
                last = not called and self._left == 0
                called.append(True)
            if last:
                self._finish()

        return done


def _is_finite(stored: np.ndarray) -> bool:
    """Whether no value, in bf16 bits or float32, is NaN or infinite."""
    if stored.dtype == np.uint16:
        return not bool(((stored & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(stored).all())
