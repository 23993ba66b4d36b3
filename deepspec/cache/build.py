"""Build a target cache: run the target over conversations and keep what training needs.

The plan (plan.json) is cut once and names the parts; ranks take parts from it. A part's content depends on the plan
alone, so a build that was killed and goes on with any number of ranks ends in the same bytes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from deepspec.cache.assemble import finish_cache, sweep, whole_part
from deepspec.cache.fingerprint import fingerprint_of, mismatches, remedy_for
from deepspec.cache.format import MANIFEST, PART_MANIFEST, PARTS, PLAN, Manifest
from deepspec.cache.forward import DTYPES, Conversation, forward_batch
from deepspec.cache.levels import warnings
from deepspec.cache.lock import build_lock
from deepspec.cache.pipeline import ByteQueue
from deepspec.cache.plan import Plan, PlannedPart, Source, cut, mean_tokens, read_rows, samples_per_part, scan
from deepspec.cache.plan import batches as cut_batches
from deepspec.cache.progress import BuildProgress
from deepspec.cache.store import Store, open_folder
from deepspec.cache.writer import Block, PartWriter, layout_of, temporary_part
from deepspec.data.chat import Renderer, load_renderer, render_row
from deepspec.distributed import World, barrier, on_rank0, pick_device
from deepspec.errors import CacheError, DeepSpecError, system_error
from deepspec.recipe import Recipe
from deepspec.targets import Target, load_target
from deepspec.targets.served import ServedTarget

QUEUE_BYTES = 1 << 30  # of hidden states between the forward and the encoders


class BuildStopped(CacheError):
    """The build was asked to stop (SIGTERM or SIGINT) and did; started again it continues."""


@dataclass(frozen=True)
class _Usable:
    """A part's conversations as the target sees them."""

    rows: list[Conversation]
    rejected: tuple[tuple[int, str, str], ...]


def build_cache(
    recipe: Recipe,
    conversations: str | Path,
    output: str | Path,
    world: World | None = None,
    append: bool = False,
    server: str | None = None,
) -> Manifest:
    """Build the cache of ``recipe``, or go on with it where a build ended.

    Args:
        recipe: names target, layers, rendering, level and batch size.
        conversations: JSONL file.
        output: folder or URL of the cache.
        world: this process among several; they need :func:`deepspec.distributed.process_group`.
        append: add ``conversations`` to the cache that is there.
        server: URL of a server of the target that hands out hidden states; None runs the target in this process.

    Returns:
        The finished cache's manifest, on every rank.

    Raises:
        CacheError: another build in the folder, a folder that holds another cache, a full disk, no usable sample.
        DataError: conversations that cannot be read.
        BuildStopped: SIGTERM or SIGINT came; finished parts stay.
    """
    world = world or World()
    folder = open_folder(output)
    device = pick_device(world.local_rank)
    with ExitStack() as stack:
        on_rank0(world, lambda: stack.enter_context(build_lock(folder)), CacheError)
        target = _open_target(recipe, device, server)
        recipe = recipe.for_target(target.spec)
        renderer = load_renderer(recipe, target.spec)
        maker = Planner(recipe, folder, Path(conversations), target, renderer, append)
        plan, todo = on_rank0(world, maker.begin, CacheError)
        builder = _Builder(recipe, folder, Path(conversations), target, renderer, plan, world)
        builder.build(todo[world.rank :: world.size])
        barrier(world)
        return on_rank0(world, lambda: finish_cache(folder, plan), CacheError)


def _open_target(recipe: Recipe, device: torch.device, server: str | None) -> Target | ServedTarget:
    section, dtype = recipe.target, DTYPES[recipe.target.dtype]
    if server is None:
        return load_target(section.path, dtype, device, section.revision)
    return ServedTarget(server, section.path, section.layers, dtype, section.revision)


@dataclass
class Planner:
    """What rank 0 does before the others begin."""

    recipe: Recipe
    folder: Store
    conversations: Path
    target: Target | ServedTarget
    renderer: Renderer
    append: bool

    def begin(self) -> tuple[Plan, list[PlannedPart]]:
        """The plan and the parts that are still to be made."""
        source = scan(self.conversations)
        wanted = fingerprint_of(self.recipe, self.target.spec, self.renderer.tokenizer, [source.entry()])
        if self.folder.size(PLAN) is None:
            if self.folder.size(MANIFEST) is not None:
                raise CacheError("a cache without its plan cannot be built further", file=self.folder.url, key=PLAN)
            plan = self._new_plan(source, wanted)
        else:
            plan = self._known_plan(source, wanted)
        sweep(self.folder)
        todo = [part for part in plan.parts if not whole_part(self.folder, part.name)]
        mine = next(i for i, entry in enumerate(plan.fingerprint["sources"]) if entry["sha256"] == source.sha256)
        for part in todo:
            if part.source != mine:
                name = plan.fingerprint["sources"][part.source]["name"]
                raise CacheError(
                    "a part of another source is missing",
                    file=self.folder.url,
                    key=part.name,
                    remedy=f"build it with --data {name}",
                )
            self.folder.remove(f"{PARTS}/{part.name}")
        return plan, todo

    def _new_plan(self, source: Source, wanted: dict[str, Any]) -> Plan:
        for line in warnings(wanted["levels"]):
            print(f"build: {line}", file=sys.stderr, flush=True)
        plan = Plan(wanted, self.recipe.cache.tokens_per_batch, 0.0, ())
        return self._add(plan, source, 0, 0)

    def _add(self, plan: Plan, source: Source, number: int, first_sample: int) -> Plan:
        mean = mean_tokens(source, self.renderer, self.recipe.data.min_supervised)
        token_bytes = token_bytes_of(plan.fingerprint)
        size = samples_per_part(source.rows, self.recipe.cache.samples_per_part, mean, token_bytes)
        parts = plan.parts + cut(source, number, len(plan.parts), first_sample, size)
        plan = replace(plan, parts=parts, mean_tokens=mean)
        self.folder.write(PLAN, plan.to_bytes())
        return plan

    def _known_plan(self, source: Source, wanted: dict[str, Any]) -> Plan:
        plan = Plan.load(self.folder)
        known = plan.fingerprint["sources"]
        is_new = source.sha256 not in {entry["sha256"] for entry in known}
        compared = {**wanted, "sources": []} if self.append and is_new else wanted
        lines = mismatches(plan.fingerprint, compared, self.folder.url)
        if plan.fingerprint["levels"] != wanted["levels"]:
            lines.append(f"levels: cache {plan.fingerprint['levels']}, recipe {wanted['levels']}")
        if lines:
            raise CacheError(
                f"the folder holds another cache: {'; '.join(lines)}",
                file=self.folder.url,
                remedy=remedy_for(lines, "choose another output folder, mend the recipe, or delete the folder"),
            )
        if not is_new:
            return plan
        first_sample = sum(entry["rows"] for entry in known)
        grown = replace(plan, fingerprint={**plan.fingerprint, "sources": [*known, source.entry()]})
        return self._add(grown, source, len(known), first_sample)


def token_bytes_of(fingerprint: dict[str, Any]) -> int:
    """Bytes of one token's hidden states before coding."""
    width = len(fingerprint["layers"]) + (fingerprint["levels"]["last_hidden"] is not None)
    return int(fingerprint["target"]["hidden_size"]) * width * (2 if fingerprint["dtype"] == "bfloat16" else 4)


class _Builder:
    """One rank's work: forward here, copies, encoding and writing on other threads."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Store,
        conversations: Path,
        target: Target | ServedTarget,
        renderer: Renderer,
        plan: Plan,
        world: World,
    ) -> None:
        self.recipe, self.folder, self.conversations = recipe, folder, conversations
        self.target, self.renderer, self.plan, self.world = target, renderer, plan, world
        self.layers = tuple(plan.fingerprint["layers"])
        self.layout = layout_of(plan.fingerprint)
        self.stop = threading.Event()
        self._writer: PartWriter | None = None  # of the part that the queue's thread is writing; see _open

    def build(self, parts: list[PlannedPart]) -> None:
        """Make ``parts``."""
        cores = max(1, (os.cpu_count() or 1) // self.world.local_size)
        expected = self.plan.mean_tokens * sum(part.rows for part in parts)
        progress = BuildProgress(len(parts), int(expected), self.world, token_bytes_of(self.plan.fingerprint))
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
                raise _disk_error(problem, self.folder) from None
            finally:
                queue.close(cancel=True)
                if self._writer is not None:
                    self._writer.abandon()
        progress.finish()

    def _render(self, part: PlannedPart) -> _Usable:
        rows, rejected = [], []
        for number, row in read_rows(self.conversations, part.offset, part.first, part.rows):
            sample = part.first_sample + number - part.first
            name = row["id"] if isinstance(row, dict) else f"row {number + 1}"
            rendered = render_row(self.renderer, row, self.recipe.data.min_supervised)
            if isinstance(rendered, str):
                rejected.append((sample, name, rendered))
            else:
                rows.append((sample, name, rendered))
        return _Usable(rows, tuple(rejected))

    def _build_part(
        self,
        part: PlannedPart,
        usable: _Usable,
        queue: ByteQueue,
        encoders: ThreadPoolExecutor,
        progress: BuildProgress,
    ) -> None:
        keeps_last = self.layout.last_hidden_level is not None
        lengths = [len(rendered.input_ids) for _, _, rendered in usable.rows]
        queue.put(lambda: self._open(part, encoders), 0)
        for batch in cut_batches(lengths, self.plan.tokens_per_batch):
            if self.stop.is_set():
                raise BuildStopped(
                    "stopped when asked to; finished parts stay",
                    file=self.folder.url,
                    remedy="start the same command again, it continues",
                )
            rows = [usable.rows[i] for i in batch]
            size, block = forward_batch(self.target, self.layers, keeps_last, rows)
            queue.put(partial(self._append, block), size)
            progress.add(sum(lengths[i] for i in batch))
        queue.put(partial(self._finish, usable, progress), 0)

    def _open(self, part: PlannedPart, encoders: ThreadPoolExecutor) -> None:
        self._writer = PartWriter(temporary_part(self.folder, part.name), part.name, self.layout, encoders)

    def _append(self, block: Callable[[], Block]) -> None:
        self._current.append(block())

    def _finish(self, usable: _Usable, progress: BuildProgress) -> None:
        writer = self._current
        manifest = writer.finish(usable.rejected)
        self.folder.commit(writer.folder, f"{PARTS}/{writer.name}", PART_MANIFEST)
        self._writer = None
        progress.part_done(manifest)

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
        print("build: stopping after this batch", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _disk_error(problem: OSError, folder: Store) -> DeepSpecError:
    with_remedy = cast(DeepSpecError, system_error(problem, folder.url))
    text = f"cannot write the cache; finished parts stay ({with_remedy.problem})"
    return CacheError(text, file=with_remedy.file, remedy=with_remedy.remedy)
