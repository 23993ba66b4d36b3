"""Build a target cache: run the target over conversations and store what training needs.

The plan (plan.json) is cut once and names the parts; ranks take parts from it. A part's content depends on the plan
alone, so a build that was killed and continued with any number of ranks ends in the same bytes.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from deepspec.cache.assemble import finish_cache
from deepspec.cache.format import CacheManifest
from deepspec.cache.forward import RenderedConversation, forward_batch
from deepspec.cache.parts import Block, PartWriter, layout_of
from deepspec.cache.plan import BuildJob, CachePlan, PlannedPart, batches, plan_build, read_rows
from deepspec.cache.store import Store, build_lock, open_store
from deepspec.data.chat import load_renderer, render_row
from deepspec.distributed import World, barrier, on_rank0, pick_device
from deepspec.errors import CacheError, DeepSpecError, system_error
from deepspec.progress import Progress, byte_size
from deepspec.recipe import Recipe
from deepspec.targets import Target, load_target
from deepspec.targets.served import ServedTarget

log = logging.getLogger(__name__)
Rejected = tuple[tuple[int, str, str], ...]  # sample id, conversation id, reason
_Usable = tuple[list[RenderedConversation], Rejected]  # of a part
QUEUE_BYTES = 1 << 30  # of hidden states between the forward and the encoders


class BuildStopped(CacheError):
    """The build was asked to stop (SIGTERM or SIGINT) and did; started again it continues."""

    asked = True  # so the other ranks stop in order too


def build_cache(
    recipe: Recipe,
    conversations: str | Path,
    output: str | Path,
    world: World | None = None,
    append: bool = False,
    server: str | None = None,
    server_storage: str | Path | None = None,
) -> CacheManifest:
    """Build the cache of ``recipe``, or continue an unfinished build of it.

    Args:
        recipe: names target, layers, rendering, level and batch size.
        conversations: JSONL file.
        output: folder or URL of the cache.
        world: this process among several; they need :func:`deepspec.distributed.process_group`.
        append: add ``conversations`` to the cache that is there.
        server: URL of a server of the target that returns hidden states; None runs the target in this process.
        server_storage: the folder that it writes to; default: the recipe's ``data.server_storage``.

    Returns:
        The finished cache's manifest, on every rank.

    Raises:
        CacheError: another build in the folder, a folder that holds another cache, a full disk, no usable sample.
        DataError: conversations that cannot be read.
        BuildStopped: SIGTERM or SIGINT came; finished parts stay.
    """
    world, store = world or World(), open_store(output)
    with ExitStack() as stack:
        on_rank0(world, lambda: stack.enter_context(build_lock(store)), CacheError)
        storage = server_storage or recipe.data.server_storage
        target = _open_target(recipe, pick_device(world.local_rank), server, storage)
        recipe = recipe.for_target(target.spec)
        job = BuildJob(recipe, store, Path(conversations), target, load_renderer(recipe, target.spec))
        plan, todo = on_rank0(world, lambda: plan_build(job, append), CacheError)
        _Builder(job, plan, world).build(todo[world.rank :: world.size])
        barrier(world)
        return on_rank0(world, lambda: finish_cache(store, plan), CacheError)


def _open_target(
    recipe: Recipe, device: torch.device, server: str | None, storage: str | Path | None
) -> Target | ServedTarget:
    section, dtype = recipe.target, getattr(torch, recipe.target.dtype)
    if server is None:
        return load_target(section.path, dtype, device, section.revision)
    return ServedTarget(server, section.path, section.layers, dtype, section.revision, storage=storage)


class ByteQueue:
    """One thread that runs tasks in order; at most ``limit`` bytes of them wait.

    Args:
        limit: bytes; a single larger task is let in when nothing else waits.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.peak, self._bytes = limit, 0, 0
        self._tasks: deque[tuple[Future[None], int]] = deque()
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, "cache writer")

    def put(self, task: Callable[[], None], size: int) -> None:
        """Queue a task that holds ``size`` bytes; waits for room. Raises what an earlier task raised."""
        while self._tasks and (self._tasks[0][0].done() or self._bytes + size > self.limit):
            self._await_oldest()
        if self._error is not None:
            raise self._error
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        self._tasks.append((self._thread.submit(self._run, task), size))

    def drain(self) -> None:
        """Wait until all tasks are done. Raises what a task raised."""
        while self._tasks:
            self._await_oldest()

    def close(self, cancel: bool = False) -> None:
        """End the thread; with ``cancel`` tasks that have not begun are dropped."""
        self._thread.shutdown(cancel_futures=cancel)

    def _await_oldest(self) -> None:
        future, size = self._tasks.popleft()
        self._bytes -= size
        future.result()

    def _run(self, task: Callable[[], None]) -> None:
        if self._error is None:  # after a failure nothing else runs
            try:
                task()
            except BaseException as problem:
                self._error = problem
                raise


class _Builder:
    """One rank's work: forward here, copies, encoding and writing on other threads."""

    def __init__(self, job: BuildJob, plan: CachePlan, world: World) -> None:
        self.job, self.plan, self.world = job, plan, world
        self.layout = layout_of(plan.fingerprint)
        self.stop = threading.Event()
        self.written = self.raw = self.rejected = 0
        self._writer: PartWriter | None = None  # of the part that the queue's thread is writing

    def build(self, parts: list[PlannedPart]) -> None:
        """Make ``parts``; rank 0 shows its progress, assuming the others as fast as itself."""
        cores = max(1, (os.cpu_count() or 1) // self.world.local_size)
        expected = int(self.plan.mean_tokens * sum(part.rows for part in parts))
        noun = "parts" if self.world.size == 1 else f"parts on rank 0 of {self.world.size}"
        progress = Progress("build", len(parts), noun=noun, expected=expected, more=self._more)
        queue = ByteQueue(QUEUE_BYTES)
        with (
            ThreadPoolExecutor(min(4, cores), "cache encoder") as encoders,
            ThreadPoolExecutor(1, "cache renderer") as reader,
            _stoppable(self.stop),
        ):
            try:
                renders = _ahead(reader, self._render, parts)
                for part in parts:
                    self._build_part(part, next(renders), queue, encoders, progress)
                queue.drain()
            except BuildStopped:
                queue.drain()  # parts that are through the target are still written
                raise
            except OSError as problem:
                raise _disk_error(problem, self.job.store) from None
            finally:
                queue.close(cancel=True)
                if self._writer is not None:
                    self._writer.abandon()
        progress.finish()

    def _more(self) -> str:
        text = f"{byte_size(self.written)} written"
        text += f" ({self.written / self.raw:.3f} of raw)" if self.raw else ""
        return text + (f", {self.rejected} samples rejected" if self.rejected else "")

    def _render(self, part: PlannedPart) -> _Usable:
        """A part's conversations as the target sees them, and those that it cannot use."""
        rows, rejected = [], []
        for number, row in read_rows(self.job.conversations, part.offset, part.first, part.rows):
            sample = part.first_sample + number - part.first
            name = row["id"] if isinstance(row, dict) else f"row {number + 1}"
            rendered = render_row(self.job.renderer, row, self.job.recipe.data.min_supervised)
            if isinstance(rendered, str):
                rejected.append((sample, name, rendered))
            else:
                rows.append((sample, name, rendered))
        return rows, tuple(rejected)

    def _build_part(
        self, part: PlannedPart, usable: _Usable, queue: ByteQueue, encoders: ThreadPoolExecutor, progress: Progress
    ) -> None:
        conversations, rejected = usable
        lengths = [len(rendered.input_ids) for _, _, rendered in conversations]
        queue.put(lambda: self._open(part, encoders), 0)
        for batch in batches(lengths, self.plan.tokens_per_batch):
            if self.stop.is_set():
                problem = "stopped when asked to; finished parts stay"
                remedy = "start the same command again, it continues"
                raise BuildStopped(problem, file=self.job.store.url, remedy=remedy)
            rows, layers = [conversations[i] for i in batch], self.plan.fingerprint["layers"]
            size, block = forward_batch(self.job.target, layers, self.layout.keeps_last, rows)
            queue.put(partial(self._append, block), size)
            progress.add(0, sum(lengths[i] for i in batch))
        queue.put(lambda: self._finish(rejected, progress), 0)

    def _open(self, part: PlannedPart, encoders: ThreadPoolExecutor) -> None:
        self._writer = PartWriter(self.job.store, part.name, self.layout, encoders)

    def _append(self, block: Callable[[], Block]) -> None:
        self._current.append(block())

    def _finish(self, rejected: Rejected, progress: Progress) -> None:
        manifest = self._current.finish(rejected)
        self._writer = None
        self.written += manifest.coded_bytes
        self.raw += manifest.raw_bytes
        self.rejected += len(rejected)
        progress.add(1)

    @property
    def _current(self) -> PartWriter:
        if self._writer is None:
            raise RuntimeError("no part is open")
        return self._writer


def _ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """``work`` of each item, one item ahead."""
    waiting: Future[Any] | None = None
    for item in items:
        coming = pool.submit(work, item)
        if waiting is not None:
            yield waiting.result()
        waiting = coming
    if waiting is not None:
        yield waiting.result()


@contextmanager
def _stoppable(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set ``stop`` (in the main thread; elsewhere Python allows no handler)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(_number: int, _frame: Any) -> None:
        stop.set()
        log.warning("build: stopping after this batch")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _disk_error(problem: OSError, store: Store) -> CacheError:
    known = cast(DeepSpecError, system_error(problem, store.url))
    text = f"cannot write the cache; finished parts stay ({known.problem})"
    return CacheError(text, file=known.file, remedy=known.remedy)
