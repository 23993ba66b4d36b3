"""From finished parts to a finished cache: the sample table, the list of rejects and, last, the manifest."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from deepspec import __version__
from deepspec.cache.codecs.base import RawCodec
from deepspec.cache.format import (
    MANIFEST,
    PART_MANIFEST,
    PARTS,
    PLAN,
    REJECTED,
    SAMPLE_COLUMNS,
    SPOOL,
    ArrayInfo,
    CacheManifest,
    PartEntry,
    PartManifest,
    array_file,
    digest,
)
from deepspec.cache.plan import CachePlan
from deepspec.cache.shard import ShardWriter
from deepspec.cache.store import Store, local_folder
from deepspec.errors import CacheError

TABLE_CHUNK = 256
GROUPS, GROUP = ("zarr.json", f"{PARTS}/zarr.json"), b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}\n'


def sample_table(manifests: list[PartManifest]) -> NDArray[np.int64]:
    """[N, 6] of SAMPLE_COLUMNS, by ascending sample id."""
    tables = []
    for number, part in enumerate(manifests):
        lengths, rows = np.array(part.lengths, np.int64), np.array(part.rows, np.int64)
        starts, row_starts = np.cumsum(lengths) - lengths, np.cumsum(rows) - rows
        ids = np.array(part.sample_ids, np.int64)
        tables.append(np.stack([ids, np.full_like(ids, number), starts, lengths, row_starts, rows], axis=1))
    table = np.concatenate(tables)
    return np.ascontiguousarray(table[np.argsort(table[:, 0], kind="stable")])


def rejected_lines(manifests: list[PartManifest]) -> bytes:
    """The content of rejected.jsonl."""
    rejects = (reject for part in manifests for reject in part.rejected)
    lines = [json.dumps({"sample_id": i, "id": c, "reason": r}, ensure_ascii=False) + "\n" for i, c, r in rejects]
    return "".join(lines).encode()


def finish_cache(store: Store, plan: CachePlan) -> CacheManifest:
    """Write the table and manifest of the parts of ``plan``; a cache that is already finished stays as it is.

    Raises:
        CacheError: no usable sample in any part.
    """
    manifests = [PartManifest.load(store, part.name) for part in plan.parts]
    reasons = dict(sorted(Counter(reason for part in manifests for _, _, reason in part.rejected).items()))
    if not any(part.sample_ids for part in manifests):
        raise CacheError("no sample can be used", file=store.url, found=reasons, wanted="at least one usable sample")
    _write_changed(store, REJECTED, rejected_lines(manifests))
    table = sample_table(manifests)
    name = f"samples-{digest(table.tobytes())[:12]}"
    info = _write_table(store, name, table)
    for group in GROUPS:
        _write_changed(store, group, GROUP)
    entries = tuple(_entry(store, part) for part in manifests)
    manifest = CacheManifest(
        fingerprint=plan.fingerprint,
        samples=len(table),
        tokens=int(table[:, SAMPLE_COLUMNS.index("length")].sum()),
        rows=int(table[:, SAMPLE_COLUMNS.index("rows")].sum()),
        rejected=reasons,
        coded_bytes=sum(part.coded_bytes for part in manifests),
        raw_bytes=sum(part.raw_bytes for part in manifests),
        table=name,
        table_info=info,
        parts=entries,
        plan_sha256=digest(store.read(PLAN)),
        versions={"deepspec": __version__, **{name: version(name) for name in ("torch", "transformers", "zarr")}},
    )
    _write_changed(store, MANIFEST, manifest.to_bytes())
    for old in store.names(""):
        if old == SPOOL or (old.startswith("samples-") and old != name):
            store.remove(old)
    return manifest


def _entry(store: Store, part: PartManifest) -> PartEntry:
    sizes = (len(part.sample_ids), sum(part.lengths), sum(part.rows), part.coded_bytes)
    return PartEntry(part.name, *sizes, sha256=digest(store.read(f"{PARTS}/{part.name}/{PART_MANIFEST}")))


def _write_changed(store: Store, name: str, data: bytes) -> None:
    if store.size(name) != len(data) or store.read(name) != data:
        store.write(name, data)


def _write_table(store: Store, name: str, table: NDArray[np.int64]) -> ArrayInfo:
    """The sample table as a Zarr array of the store."""
    for old in store.names(""):
        if old.startswith("samples-"):
            store.sweep(old)
    folder = local_folder("table")
    try:
        with ThreadPoolExecutor(1) as pool:
            zarr.create_group(LocalStore(folder), zarr_format=3)
            writer = ShardWriter(folder, name, table.shape[1:], "int64", TABLE_CHUNK, RawCodec.calibrate, pool)
            writer.append(table)
            info = writer.finish("raw")
        for file in (array_file(name, 2), f"{name}/zarr.json"):
            _write_changed(store, file, (folder / file).read_bytes())
    finally:
        shutil.rmtree(folder)
    return info
