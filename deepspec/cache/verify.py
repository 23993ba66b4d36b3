"""Check every byte of a cache: digests, sizes, checksums, shapes and counts. Broken parts are named, not skipped."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepspec.cache.assemble import GROUPS, rejected_lines, sample_table
from deepspec.cache.format import (
    MANIFEST,
    PARTS,
    PLAN,
    REBUILD,
    REJECTED,
    CacheManifest,
    PartEntry,
    PartManifest,
    from_json,
)
from deepspec.cache.parts import rows_of
from deepspec.cache.plan import CachePlan
from deepspec.cache.reader import PartReader, TargetCache
from deepspec.cache.shard import ShardReader
from deepspec.cache.store import Store, build_lock, open_store
from deepspec.errors import CacheError
from deepspec.progress import Progress

ROWS = 4096  # decoded at a time


@dataclass(frozen=True)
class Problem:
    """What is wrong with a part."""

    part: str
    text: str


def verify_cache(path: str | Path, workers: int = 4) -> list[Problem]:
    """Read and decode everything.

    Args:
        path: folder or URL of a finished cache.
        workers: threads.

    Returns:
        One problem for each broken array or part; empty when nothing is broken.

    Raises:
        CacheError: no finished cache, or a broken manifest or sample table: then no part can be checked.
    """
    store = open_store(path)
    manifest = CacheManifest.load(store)
    found: list[Problem] = []
    manifests: list[PartManifest | None] = []
    progress = Progress("verify", len(manifest.parts), unit="bytes", noun="parts")
    with ThreadPoolExecutor(max(1, workers)) as pool:
        checked = pool.map(lambda entry: _verify_part(store, entry), manifest.parts)
        for entry, (part, problems) in zip(manifest.parts, checked, strict=True):
            manifests.append(part)
            found += problems
            progress.add(1, entry.bytes)
    progress.finish()
    if not found:
        whole = [one for one in manifests if one]
        if not np.array_equal(TargetCache.open(path).table, sample_table(whole)):
            found.append(Problem(MANIFEST, "the sample table does not fit the parts"))
        if store.size(REJECTED) is None or store.read(REJECTED) != rejected_lines(whole):
            found.append(Problem(REJECTED, "does not fit the parts"))
        found += _wrong_plan(store, manifest, whole)
    found += [Problem(name, "not a Zarr group") for name in GROUPS if not _is_group(store, name)]
    known = {entry.name for entry in manifest.parts}
    found += [
        Problem(name, "is in no manifest (an unfinished append, or a stray folder)")
        for name in store.names(PARTS)
        if name not in known and name != "zarr.json"
    ]
    return found


def _verify_part(store: Store, entry: PartEntry) -> tuple[PartManifest | None, list[Problem]]:
    try:
        part = PartReader(store, entry.name, entry.sha256)
    except CacheError as problem:
        return None, [Problem(entry.name, str(problem))]
    group = f"{PARTS}/{entry.name}/zarr.json"
    problems = [] if _is_group(store, group) else [Problem(entry.name, f"{group}: not a Zarr group")]
    for name in part.manifest.arrays:
        try:
            _read_all(part.array(name))
        except CacheError as problem:
            problems.append(Problem(entry.name, str(problem)))
    if not problems:
        problems = [Problem(entry.name, text) for text in _wrong_counts(part)]
    return part.manifest, problems


def _wrong_plan(store: Store, manifest: CacheManifest, parts: list[PartManifest]) -> list[Problem]:
    """What is wrong with plan.json; a cache of before may have none."""
    if store.size(PLAN) is None and manifest.plan_sha256 is None:
        return []
    try:
        plan = CachePlan.load(store, manifest)
    except CacheError as problem:
        return [Problem(PLAN, str(problem))]
    for planned, part in zip(plan.parts, parts, strict=True):
        ids = sorted([*part.sample_ids, *(reject[0] for reject in part.rejected)])
        if ids != list(range(planned.first_sample, planned.first_sample + planned.rows)):
            return [Problem(PLAN, f"the samples of part {part.name} are not those planned")]
    return []


def _is_group(store: Store, name: str) -> bool:
    """Whether a file is a Zarr group's metadata: other readers need it, ours does not."""
    try:
        values = from_json(store, name)
    except CacheError:
        return False
    return isinstance(values, dict) and (values.get("zarr_format"), values.get("node_type")) == (3, "group")


def _read_all(array: ShardReader) -> None:
    rows = array.info.shape[0]
    for start in range(0, rows, ROWS):
        array.read(start, np.empty((min(ROWS, rows - start), *array.info.shape[1:]), array.dtype))
    if array.info.sha256 not in (None, array.sha256()):
        raise CacheError("shard differs from its digest in part.json", file=array.file, remedy=REBUILD)


def _wrong_counts(part: PartReader) -> list[str]:
    manifest, texts = part.manifest, []
    tokens = sum(manifest.lengths)
    for name, info in manifest.arrays.items():
        wanted = sum(manifest.rows) if name == "last_hidden" else tokens
        if info.shape[0] != wanted:
            texts.append(f"{name}: {info.shape[0]} rows, the samples have {wanted}")
    if not texts and tokens:
        mask = np.empty(tokens, np.uint8)
        part.array("loss_mask").read(0, mask)
        if rows_of(mask, list(manifest.lengths)) != list(manifest.rows):
            texts.append("loss_mask: does not fit the numbers of supervised tokens in part.json")
    return texts


def drop_parts(path: str | Path, names: list[str]) -> None:
    """Delete broken parts, and the manifest first: the cache is unfinished until they are built again.

    Raises:
        CacheError: another process builds here, or the parts cannot be built again: the plan is not the cache's.
    """
    store = open_store(path)
    with build_lock(store):
        CachePlan.load(store, CacheManifest.load(store))
        store.remove(MANIFEST)
        for name in names:
            store.remove(f"{PARTS}/{name}")
