"""Check every byte of a cache: digests, sizes, checksums, shapes and counts. Broken parts are named, not skipped."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepspec.cache.assemble import sample_table
from deepspec.cache.format import MANIFEST, PARTS, Manifest, PartEntry, PartManifest
from deepspec.cache.lock import build_lock
from deepspec.cache.reader import PartReader, TargetCache
from deepspec.cache.shard import ShardReader
from deepspec.cache.store import Store, open_folder
from deepspec.cache.writer import next_supervised
from deepspec.errors import CacheError

ROWS = 4096  # decoded at a time


@dataclass(frozen=True)
class Problem:
    """What is wrong with a part."""

    part: str
    text: str


def verify_cache(
    path: str | Path, workers: int = 4, report: Callable[[int, int, int], None] | None = None
) -> list[Problem]:
    """Read and decode everything.

    Args:
        path: folder or URL of a finished cache.
        workers: threads.
        report: called with (parts done, parts, bytes read) after each part.

    Returns:
        One problem for each broken array or part; empty when the cache is whole.

    Raises:
        CacheError: no finished cache, or a broken manifest or sample table: nothing can be said of the parts then.
    """
    folder = open_folder(path)
    manifest = Manifest.load(folder)
    found: list[Problem] = []
    manifests: list[PartManifest | None] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        done = size = 0
        for entry, (part, problems) in zip(
            manifest.parts, pool.map(lambda entry: _verify_part(folder, entry), manifest.parts), strict=True
        ):
            manifests.append(part)
            found += problems
            done, size = done + 1, size + entry.bytes
            if report is not None:
                report(done, len(manifest.parts), size)
    if not found:
        found += _verify_table(path, [part for part in manifests if part is not None])
    known = {entry.name for entry in manifest.parts}
    found += [
        Problem(name, "is in no manifest (an unfinished append, or a stray folder)")
        for name in folder.names(PARTS)
        if name not in known and name != "zarr.json"
    ]
    return found


def _verify_part(folder: Store, entry: PartEntry) -> tuple[PartManifest | None, list[Problem]]:
    try:
        part = PartReader(folder, entry.name, entry.sha256)
    except CacheError as problem:
        return None, [Problem(entry.name, str(problem))]
    problems = []
    for name in part.manifest.arrays:
        try:
            _read_all(part.array(name))
        except CacheError as problem:
            problems.append(Problem(entry.name, str(problem)))
    if not problems:
        problems = [Problem(entry.name, text) for text in _wrong_counts(part)]
    return part.manifest, problems


def _read_all(array: ShardReader) -> None:
    rows = array.info.shape[0]
    for start in range(0, rows, ROWS):
        array.read(start, np.empty((min(ROWS, rows - start), *array.info.shape[1:]), array.dtype))


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
        lengths = np.array(manifest.lengths, np.int64)
        starts = np.cumsum(lengths) - lengths
        rows = np.add.reduceat(next_supervised(mask, list(manifest.lengths)).astype(np.int64), starts)
        if rows.tolist() != list(manifest.rows):
            texts.append("loss_mask: does not fit the numbers of supervised tokens in part.json")
    return texts


def _verify_table(path: str | Path, parts: list[PartManifest]) -> list[Problem]:
    cache = TargetCache.open(path)
    if not np.array_equal(cache.table, sample_table(parts)):
        return [Problem(MANIFEST, "the sample table does not fit the parts")]
    return []


def drop_parts(path: str | Path, names: list[str]) -> None:
    """Delete broken parts, and the manifest first: the cache is unfinished until they are built again.

    Raises:
        CacheError: another process builds here.
    """
    folder = open_folder(path)
    with build_lock(folder):
        folder.remove(MANIFEST)
        for name in names:
            folder.remove(f"{PARTS}/{name}")
