"""A cache that a training run writes while it reads: batches of a build's plan, computed in any order.

A part's bytes depend on all its batches in their order. So a batch that is computed before the others of its part waits
in the folder ``spool`` of the cache, as a part of its own; the last one is written with them as the part. The folder
never takes more than the finished cache and one part a process; a killed run loses the batches that were under way; and
the end has the bytes of a build, whoever computed what and when.

Threads and ranks share the work: who computes a batch holds the lock of its part until it is on the disk.

N samples, n tokens of one.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepspec.cache.assemble import finish_cache
from deepspec.cache.build import QUEUE_BYTES, ByteQueue
from deepspec.cache.format import SPOOL
from deepspec.cache.forward import RenderedConversation
from deepspec.cache.parts import Block, is_complete, layout_of, sweep, write_part
from deepspec.cache.plan import CachePlan, PlannedPart, batches
from deepspec.cache.reader import OPEN_PARTS, PartReader, read_supervised, stored_view
from deepspec.cache.store import FolderStore
from deepspec.data.chat import Rendered
from deepspec.distributed import World
from deepspec.errors import CacheError
from deepspec.locks import hold_in_turn
from deepspec.progress import Progress, waiting

_PART, _BATCH, _START, _ROW_START, _PART_START, _PART_ROW_START = range(6)
AGAIN = "run the training again, or deepspec cache build: both continue"
Forward = Callable[
    [Sequence[RenderedConversation]], tuple[int, Callable[[], Block]]
]  # bytes, and what waits for the block


@dataclass(frozen=True)
class Samples:
    """The usable rows of one file of conversations, in their order, and the others."""

    sha256: str  # of the file
    rows: NDArray[np.int64]  # [N] row in the file
    names: Sequence[str]  # [N] the conversations' own ids
    input_ids: Sequence[NDArray[np.int32]]  # [N] of [n]
    loss_masks: Sequence[NDArray[np.bool_]]  # [N] of [n]
    rejected: Sequence[tuple[int, str, str]]  # (row, id, reason), by row


class Positions:
    """Which batch of which part holds each sample, and where.

    Args:
        plan: of the cache.
        samples: of one of its sources.

    Attributes:
        parts: of that source.
        batches: sample numbers of each batch of each part.
        table: [N, 6] int64: part and batch, first token and first row of last_hidden in the batch, those in the part.
    """

    def __init__(self, plan: CachePlan, samples: Samples) -> None:
        digests = [source["sha256"] for source in plan.fingerprint["sources"]]
        self.parts = [part for part in plan.parts if digests[part.source] == samples.sha256]
        self.batches: list[list[list[int]]] = []
        self.table = np.zeros((len(samples.rows), 6), np.int64)
        lengths = np.array([len(ids) for ids in samples.input_ids], np.int64)
        rows = np.array([np.count_nonzero(mask[1:]) for mask in samples.loss_masks], np.int64)
        for number, part in enumerate(self.parts):
            first, end = np.searchsorted(samples.rows, [part.first, part.first + part.rows]).tolist()
            cut = batches(lengths[first:end].tolist(), plan.tokens_per_batch)
            self.batches.append([[first + index for index in batch] for batch in cut])
            start = row_start = 0
            for i, chosen in enumerate(self.batches[-1]):
                starts = np.cumsum(lengths[chosen]) - lengths[chosen]
                row_starts = np.cumsum(rows[chosen]) - rows[chosen]
                columns = (number, i, starts, row_starts, start + starts, row_start + row_starts)
                self.table[chosen] = np.stack(np.broadcast_arrays(*columns), axis=1)
                start, row_start = start + int(lengths[chosen].sum()), row_start + int(rows[chosen].sum())


class WriteThrough:
    """The hidden states of a source's samples, read where they are, else computed and kept.

    Args:
        store: the cache's folder.
        samples: of the file whose cache it becomes.
        forward: one batch through the target.

    The plan is read when a sample is first asked for: rank 0 may write it after this was made. Threads may share it.
    """

    def __init__(self, store: FolderStore, samples: Samples, forward: Forward) -> None:
        self.store, self.samples, self.forward = store, samples, forward
        self.spool = FolderStore(store.path / SPOOL)
        self._stack, self._opening, self._putting = ExitStack(), threading.Lock(), threading.Lock()
        self._positions: Positions | None = None
        self._fresh: dict[tuple[int, int], Block] = {}  # computed, and not yet on the disk
        self._held: dict[tuple[int, int], Callable[[], None]] = {}  # what releases the locks of those
        self._whole: set[int] = set()  # parts known to be complete
        self._part = lru_cache(OPEN_PARTS)(lambda name: PartReader(store, name))
        self._spooled = lru_cache(OPEN_PARTS)(lambda name: PartReader(self.spool, name))

    def hold(self, stack: ExitStack) -> None:
        """Keep what ``stack`` holds, the cache's lock, until :meth:`close`; remove what killed runs left unfinished."""
        self._stack.push(stack)
        sweep(self.spool)

    def _open(self) -> Positions:
        """Read the plan and start the thread that writes, once."""
        if self._positions is not None:
            return self._positions
        with self._opening:
            if self._positions is None:
                self.plan = CachePlan.load(self.store)
                self.layout = layout_of(self.plan.fingerprint)
                self._encoders = self._stack.enter_context(ThreadPoolExecutor(min(4, os.cpu_count() or 1), "encoder"))
                self._queue = ByteQueue(QUEUE_BYTES)
                self._stack.callback(self._queue.close)
                self._positions = Positions(self.plan, self.samples)
            return self._positions

    def read_into(self, number: int, features: Tensor, last_hidden: Tensor | None) -> None:
        """A sample's hidden states, as a finished cache gives them; see :meth:`TargetCache.read_into`.

        Args:
            number: of the sample.
            features: [n, L*D].
            last_hidden: [n, D], or None.

        Raises:
            CacheError: a broken chunk.
            OSError: the cache cannot be written.
        """
        table = self._open().table[number].tolist()
        while not self._read(number, table, features, last_hidden):
            self._compute(table[_PART], table[_BATCH])

    def _read(self, number: int, table: list[int], features: Tensor, last: Tensor | None) -> bool:
        """Read the sample where it is; False where it has to be computed."""
        part, batch = table[_PART], table[_BATCH]
        block, mask = self._fresh.get((part, batch)), self.samples.loss_masks[number]
        if block is not None:
            stored_view(features)[...] = block.features[table[_START] :][: len(mask)]
            if last is not None and block.last_hidden is not None:
                rows = block.last_hidden[table[_ROW_START] :]
                read_supervised(mask[1:], last, lambda out: np.copyto(out, rows[: len(out)]))
            return True
        if self.is_whole(part):
            reader = self._part(self._name(part))
            _read_part(reader, table[_PART_START], table[_PART_ROW_START], mask, features, last)
            return True
        if not is_complete(self.spool, self._name(part, batch)):
            return False
        try:
            reader = self._spooled(self._name(part, batch))
            _read_part(reader, table[_START], table[_ROW_START], mask, features, last)
        except CacheError as problem:
            if self.is_whole(part):  # the batch was taken into its part meanwhile
                return self._read(number, table, features, last)
            raise self._spool_error(problem) from None
        return True

    def _name(self, part: int, batch: int | None = None) -> str:
        name = self._open().parts[part].name
        return name if batch is None else f"{name}-{batch:05d}"

    def is_whole(self, part: int) -> bool:
        """Whether the part of that number is complete."""
        if part not in self._whole and is_complete(self.store, self._name(part)):
            self._whole.add(part)
        return part in self._whole

    def _is_there(self, part: int, batch: int) -> bool:
        return self.is_whole(part) or is_complete(self.spool, self._name(part, batch))

    def _compute(self, part: int, batch: int) -> None:
        """Compute a batch, unless somebody has done so, and have it written."""
        release = hold_in_turn(self.spool.path / f"{self._name(part)}.lock")
        with ExitStack() as stack:
            self._held[part, batch] = release
            stack.callback(self._release, part, batch)
            if self._is_there(part, batch):
                return
            with waiting(f"hidden states for part {self._name(part)} of {self.store.url}"):
                size, made = self.forward(self._conversations(part, batch))
                block = made()
            self._fresh[part, batch] = block
            with self._putting:
                self._queue.put(partial(self._keep, part, batch), size)
            stack.pop_all()  # the writing thread releases it

    def _release(self, part: int, batch: int) -> None:
        release = self._held.pop((part, batch), None)
        if release is not None:
            release()

    def _conversations(self, part: int, batch: int) -> list[RenderedConversation]:
        """The batch as a build gives it to the target."""
        positions, samples = self._open(), self.samples
        rows: list[RenderedConversation] = []
        for number in positions.batches[part][batch]:
            ids, mask = samples.input_ids[number].tolist(), samples.loss_masks[number].astype(int).tolist()
            sample = _sample_id(positions.parts[part], int(samples.rows[number]))
            rows.append((sample, samples.names[number], Rendered(ids, mask)))
        return rows

    def _keep(self, part: int, batch: int) -> None:
        """On the writing thread: the batch to the spool, or with the others of its part to the part."""
        try:
            others = (i for i in range(len(self._open().batches[part])) if i != batch)
            if all(is_complete(self.spool, self._name(part, other)) for other in others):
                self._assemble(part)
            else:
                block = iter([self._fresh[part, batch]])
                write_part(self.spool, self._name(part, batch), self.layout, self._encoders, block)
            del self._fresh[part, batch]
            self._release(part, batch)
        except BaseException:
            for key in list(self._held):  # nothing is written from now on: who waits for a lock must learn it
                self._release(*key)
            raise

    def _assemble(self, part: int) -> None:
        """Write the part of its batches, which are all there; its lock is held."""
        positions = self._open()
        planned, numbers = positions.parts[part], range(len(positions.batches[part]))
        edges = (planned.first, planned.first + planned.rows)
        first, end = (bisect_left(self.samples.rejected, row, key=lambda one: one[0]) for row in edges)
        rejected = self.samples.rejected[first:end]
        listed = tuple((_sample_id(planned, row), name, reason) for row, name, reason in rejected)
        write_part(self.store, planned.name, self.layout, self._encoders, self._blocks(part), listed)
        for batch in numbers:
            self.spool.remove(f"parts/{self._name(part, batch)}")

    def _blocks(self, part: int) -> Iterator[Block]:
        for batch in range(len(self._open().batches[part])):
            if (part, batch) in self._fresh:
                yield self._fresh[part, batch]
                continue
            try:
                yield from self._spooled(self._name(part, batch)).blocks()
            except CacheError as problem:
                raise self._spool_error(problem) from None

    def _spool_error(self, problem: CacheError) -> CacheError:
        remedy = f"end the run, delete {self.spool.url} and run it again: it is computed anew"
        return CacheError(problem.problem, file=problem.file, key=problem.key, remedy=remedy)

    def complete(self, world: World) -> None:
        """Compute what no step has asked for, and finish the cache; each rank begins elsewhere.

        Raises:
            CacheError: no usable sample, or a part that another rank did not finish.
            OSError: the cache cannot be written.
        """
        cut = self._open().batches
        todo = [part for part in range(len(cut)) if not self.is_whole(part)]
        first = len(todo) * world.rank // world.size
        progress = Progress(f"completing {self.store.url}", len(todo), noun="parts", unit="samples")
        for part in (*todo[first:], *todo[:first]):
            for batch, numbers in enumerate(cut[part]):
                self._compute(part, batch)
                progress.add(0, len(numbers))
            with self._putting:
                self._queue.drain()
            self._finish_part(part)
            progress.add(1)
        progress.close()
        release = hold_in_turn(self.spool.path / "finish.lock")
        try:
            finish_cache(self.store, self.plan)
        finally:
            release()

    def _finish_part(self, part: int) -> None:
        """See that the part is complete: one without samples has no batch, and another rank may be at its last."""
        release = hold_in_turn(self.spool.path / f"{self._name(part)}.lock")
        try:
            if not self.is_whole(part):
                self._assemble(part)
        finally:
            release()

    def counts(self) -> tuple[int, int]:
        """Complete parts, and all."""
        parts = range(len(self._open().parts))
        return sum(map(self.is_whole, parts)), len(parts)

    def close(self) -> None:
        """Wait until what was computed is on the disk; let go of the cache."""
        with self._stack:
            if self._positions is not None:
                self._queue.drain()


def _read_part(
    reader: PartReader, start: int, row: int, mask: NDArray[np.bool_], features: Tensor, last: Tensor | None
) -> None:
    """A sample from its first token and row of last_hidden in a part on."""
    reader.array("features").read(start, stored_view(features))
    if last is not None:
        read_supervised(mask[1:], last, lambda out: reader.array("last_hidden").read(row, out))


def _sample_id(part: PlannedPart, row: int) -> int:
    return part.first_sample + row - part.first
