"""The plan of a build: which rows of which conversation file make which part. Ranks only take parts from it."""

from __future__ import annotations

import hashlib
import logging
import shlex
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepspec.cache.fingerprint import fingerprint_of, mismatches, remedy_for
from deepspec.cache.format import (
    FORMAT,
    MANIFEST,
    PLAN,
    CacheManifest,
    check_part_name,
    digest,
    from_json,
    to_json,
)
from deepspec.cache.levels import warnings
from deepspec.cache.parts import is_complete, layout_of, sweep
from deepspec.cache.store import Store
from deepspec.data.chat import Rendered, Renderer, render_row
from deepspec.data.conversations import WANTED, checked_lines, note_id, usable_row
from deepspec.data.lines import is_blank, parse_line
from deepspec.errors import CacheError, DataError
from deepspec.files import RESTORE
from deepspec.recipe import Recipe
from deepspec.targets import Target
from deepspec.targets.served import ServedTarget

log = logging.getLogger(__name__)
PART_BYTES = 8 << 30  # of hidden states before coding: 1,200 parts for 10 TB
MIN_SAMPLES, MIN_PARTS = 64, 32  # of a small data set: parts for all ranks
PROBED_ROWS = 64  # rendered to estimate the mean length


@dataclass(frozen=True)
class PlannedPart:
    """A run of rows of one source."""

    name: str
    source: int
    first: int  # row
    rows: int
    offset: int  # byte of the first row
    first_sample: int  # sample id of the first row

    def __post_init__(self) -> None:
        check_part_name(self.name)


@dataclass(frozen=True)
class CachePlan:
    """All that decides a cache's bytes."""

    fingerprint: dict[str, Any]
    tokens_per_batch: int
    mean_tokens: float  # of the probed rows
    parts: tuple[PlannedPart, ...]

    def to_bytes(self) -> bytes:
        """The content of plan.json."""
        return to_json({"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, store: Store, manifest: CacheManifest | None = None) -> CachePlan:
        """Read a plan; with the manifest of the finished cache it is compared with that one's.

        Raises:
            CacheError: missing, unreadable, changed since it was written, or not the plan that the cache was made by.
        """
        values, file = from_json(store, PLAN), f"{store.url}/{PLAN}"
        try:
            values.pop("format")
            plan = cls(**{**values, "parts": tuple(PlannedPart(**part) for part in values["parts"])})
        except (TypeError, KeyError, AttributeError) as problem:
            raise CacheError(f"damaged plan ({problem!r})", file=file, remedy=RESTORE) from None
        if manifest is not None and not plan.made(store, manifest):
            remedy = f"finish an append that was begun, or {RESTORE.split(',')[0]}"
            raise CacheError("not the plan that the cache was made by", file=file, remedy=remedy)
        return plan

    def made(self, store: Store, manifest: CacheManifest) -> bool:
        """Whether the cache of ``manifest`` was made by this plan of its store; older caches hold no digest of it."""
        if manifest.plan_sha256 not in (None, digest(store.read(PLAN))):
            return False
        names = [part.name for part in self.parts], [part.name for part in manifest.parts]
        return self.fingerprint == manifest.fingerprint and names[0] == names[1]

    def claim(self, store: Store) -> None:
        """Write the plan to a store, or see that the store's is the same.

        Raises:
            CacheError: the folder holds another cache.
        """
        if store.size(PLAN) is None:
            store.write(PLAN, self.to_bytes())
        elif CachePlan.load(store).to_bytes() != self.to_bytes():
            raise CacheError("the folder holds another cache", file=store.url, remedy="choose another output folder")
        sweep(store)


@dataclass(frozen=True)
class Source:
    """A conversation file, scanned once."""

    path: Path
    sha256: str
    offsets: array[int]  # byte of each row

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.offsets)

    def entry(self) -> dict[str, Any]:
        """Its entry in the fingerprint."""
        return {"name": self.path.name, "rows": self.rows, "sha256": self.sha256}


def scan(path: str | Path) -> Source:
    """Digest a conversation file, note where its rows begin, and compare it with its manifest where it has one.

    Raises:
        DataError: missing or empty, a line that is not JSON, an id that comes twice, or a file that differs from its
            manifest (before anything is computed).
    """
    path, digest, offsets, seen = Path(path), hashlib.sha256(), array("Q"), set[str]()
    for number, offset, line in checked_lines(path, digest):
        note_id(seen, parse_line(line, path, number, DataError, WANTED), path, number)
        offsets.append(offset)
    if not offsets:
        raise DataError("no conversation in the file", file=path)
    return Source(path, digest.hexdigest(), offsets)


def read_rows(path: Path, offset: int, first: int, rows: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(row number, row or what is wrong with it) of a run of rows."""
    with open(path, "rb") as handle:
        handle.seek(offset)
        lines = (line for line in handle if not is_blank(line))
        for number, line in zip(range(first, first + rows), lines, strict=False):
            yield number, usable_row(line)


def usable_rows(source: Source, renderer: Renderer, min_supervised: int, wanted: int) -> list[tuple[int, Rendered]]:
    """The usable ones, by row number, among about ``wanted`` rows spread over the file."""
    rows = []
    for row in range(0, source.rows, max(1, source.rows // wanted)):
        ((_, content),) = read_rows(source.path, source.offsets[row], row, 1)
        rendered = render_row(renderer, content, min_supervised)
        if not isinstance(rendered, str):
            rows.append((row, rendered))
    return rows


def samples_per_part(rows: int, limit: int, mean: float, token_bytes: int) -> int:
    """Rows of one part: at most ``limit``, about PART_BYTES, and at least MIN_PARTS parts of MIN_SAMPLES rows."""
    by_bytes = int(PART_BYTES / max(1.0, mean * token_bytes))
    return max(1, min(limit, by_bytes, max(MIN_SAMPLES, -(-rows // MIN_PARTS))))


def cut(source: Source, number: int, first_part: int, first_sample: int, size: int) -> tuple[PlannedPart, ...]:
    """The parts of one source, ``size`` rows each."""
    parts = []
    for i, first in enumerate(range(0, source.rows, size)):
        rows, offset = min(size, source.rows - first), source.offsets[first]
        parts.append(PlannedPart(f"{first_part + i:05d}", number, first, rows, offset, first_sample + first))
    return tuple(parts)


def batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Samples (indices of ``lengths``) in batches of at most ``budget`` padded tokens, like lengths together."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    found: list[list[int]] = []
    for index in order:
        if found and (len(found[-1]) + 1) * lengths[index] <= budget:
            found[-1].append(index)
        else:
            found.append([index])
    return found


@dataclass(frozen=True)
class BuildJob:
    """What a build works on: the same on every rank."""

    recipe: Recipe
    store: Store
    conversations: Path
    target: Target | ServedTarget
    renderer: Renderer


def plan_build(job: BuildJob, append: bool) -> tuple[CachePlan, list[PlannedPart]]:
    """The plan, written where it is new or grows, and the parts that are still to be made.

    Raises:
        CacheError: the folder holds another cache, or a part of another source is missing.
        DataError: see :func:`scan`.
    """
    store, source = job.store, scan(job.conversations)
    wanted = fingerprint_of(job.recipe, job.target.spec, job.renderer.tokenizer, [source.entry()])
    if store.size(PLAN) is not None:
        plan = _known_plan(job, source, wanted, append)
    elif store.size(MANIFEST) is not None:
        raise CacheError("a cache without its plan cannot be built further", file=store.url, key=PLAN)
    else:
        for line in warnings(wanted["levels"]):
            log.warning(line)
        plan = _add_source(job, CachePlan(wanted, job.recipe.cache.tokens_per_batch, 0.0, ()), source, 0, 0)
    sweep(store)
    todo = [part for part in plan.parts if not is_complete(store, part.name)]
    _check_cut(plan, source, store)
    sources = plan.fingerprint["sources"]
    for part in todo:
        name, sha256 = (sources[part.source][key] for key in ("name", "sha256"))
        if sha256 != source.sha256:
            problem, remedy = "a part of another source is missing", f"build it with --data {shlex.quote(name)}"
            raise CacheError(problem, file=store.url, key=part.name, remedy=remedy)
    return plan, todo


def _check_cut(plan: CachePlan, source: Source, store: Store) -> None:
    """The plan's parts of a source are those that it is cut into: a plan of before has no digest of its own.

    Raises:
        CacheError: they are not.
    """
    sources = plan.fingerprint["sources"]
    number = [entry["sha256"] for entry in sources].index(source.sha256)
    own = tuple(part for part in plan.parts if part.source == number)
    before, samples = sum(part.source < number for part in plan.parts), sum(one["rows"] for one in sources[:number])
    known = all(0 <= part.source < len(sources) for part in plan.parts)
    if not known or not own or own != cut(source, number, before, samples, own[0].rows):
        problem = "the plan's parts are not those of the conversations"
        raise CacheError(problem, file=f"{store.url}/{PLAN}", key=sources[number]["name"], remedy=RESTORE)


def _add_source(job: BuildJob, plan: CachePlan, source: Source, number: int, first_sample: int) -> CachePlan:
    usable = usable_rows(source, job.renderer, job.recipe.data.min_supervised, PROBED_ROWS)
    mean = sum(len(rendered.input_ids) for _, rendered in usable) / len(usable) if usable else 0.0
    token_bytes = layout_of(plan.fingerprint).token_bytes
    size = samples_per_part(source.rows, job.recipe.cache.samples_per_part, mean, token_bytes)
    parts = plan.parts + cut(source, number, len(plan.parts), first_sample, size)
    plan = replace(plan, parts=parts, mean_tokens=mean)
    job.store.write(PLAN, plan.to_bytes())
    return plan


def _known_plan(job: BuildJob, source: Source, wanted: dict[str, Any], append: bool) -> CachePlan:
    plan = CachePlan.load(job.store)
    known = plan.fingerprint["sources"]
    finished = CacheManifest.load(job.store) if job.store.size(MANIFEST) is not None else None
    if finished is not None and len(finished.fingerprint["sources"]) == len(known):  # else an append was begun
        CachePlan.load(job.store, finished)
    is_new = source.sha256 not in {entry["sha256"] for entry in known}
    compared = {**wanted, "sources": []} if append and is_new else wanted
    lines = mismatches(plan.fingerprint, compared, job.store.url)
    if plan.fingerprint["levels"] != wanted["levels"]:
        lines.append(f"levels: cache {plan.fingerprint['levels']}, recipe {wanted['levels']}")
    if lines:
        remedy = remedy_for(lines, "choose another output folder, fix the recipe, or delete the folder")
        raise CacheError(f"the folder holds another cache: {'; '.join(lines)}", file=job.store.url, remedy=remedy)
    if not is_new:
        return plan
    first_sample = sum(entry["rows"] for entry in known)
    grown = replace(plan, fingerprint={**plan.fingerprint, "sources": [*known, source.entry()]})
    return _add_source(job, grown, source, len(known), first_sample)
