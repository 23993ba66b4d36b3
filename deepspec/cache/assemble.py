"""From finished parts to a finished cache: the sample table, the list of rejects and, last, the manifest."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from deepspec import __version__
from deepspec.cache.codecs.raw import RawCodec
from deepspec.cache.format import (
    MANIFEST,
    PARTS,
    REJECTED,
    SAMPLE_COLUMNS,
    ArrayInfo,
    Manifest,
    PartEntry,
    PartManifest,
    array_file,
    digest,
)
from deepspec.cache.plan import Plan
from deepspec.cache.progress import raw_bytes
from deepspec.cache.shard import ShardWriter
from deepspec.cache.store import Store
from deepspec.errors import CacheError

TABLE_CHUNK = 256


def whole_part(folder: Store, name: str) -> bool:
    """Whether a part is there with all its files in their right sizes."""
    try:
        manifest = PartManifest.load(folder, name)
    except CacheError:
        return False
    place = f"{PARTS}/{name}"
    return all(
        folder.size(f"{place}/{array}/zarr.json") is not None
        and folder.size(f"{place}/{array_file(array, len(info.shape))}") == info.bytes
        for array, info in manifest.arrays.items()
    )


def sweep(folder: Store) -> None:
    """Delete what a killed build left under temporary names."""
    for name in folder.names(PARTS):
        if name.startswith("."):
            folder.remove(f"{PARTS}/{name}")


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


def finish_cache(folder: Store, plan: Plan) -> Manifest:
    """Write what makes the parts of ``plan`` a cache; a cache that is already finished stays as it is.

    Raises:
        CacheError: no usable sample in any part.
    """
    manifests = [PartManifest.load(folder, part.name) for part in plan.parts]
    rejected = [reject for part in manifests for reject in part.rejected]
    reasons = dict(sorted(Counter(reason for _, _, reason in rejected).items()))
    if not any(part.sample_ids for part in manifests):
        raise CacheError("no sample can be used", file=folder.url, found=reasons, wanted="at least one usable sample")
    lines = [json.dumps({"sample_id": i, "id": c, "reason": r}, ensure_ascii=False) + "\n" for i, c, r in rejected]
    _write_changed(folder, REJECTED, "".join(lines).encode())
    table = sample_table(manifests)
    name = f"samples-{digest(table.tobytes())[:12]}"
    info = _write_table(folder, name, table)
    for group in ("zarr.json", f"{PARTS}/zarr.json"):
        _write_changed(folder, group, b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}\n')
    entries = tuple(_entry(part) for part in manifests)
    manifest = Manifest(
        fingerprint=plan.fingerprint,
        samples=len(table),
        tokens=int(table[:, SAMPLE_COLUMNS.index("length")].sum()),
        rows=int(table[:, SAMPLE_COLUMNS.index("rows")].sum()),
        rejected=reasons,
        coded_bytes=sum(entry.bytes for entry in entries),
        raw_bytes=sum(raw_bytes(part) for part in manifests),
        table=name,
        table_info=info,
        parts=entries,
        versions={"deepspec": __version__, **{name: version(name) for name in ("torch", "transformers", "zarr")}},
    )
    _write_changed(folder, MANIFEST, manifest.to_bytes())
    for old in folder.names(""):
        if old.startswith("samples-") and old != name:
            folder.remove(old)
    return manifest


def _entry(part: PartManifest) -> PartEntry:
    size = sum(info.bytes for info in part.arrays.values())
    sha256 = digest(part.to_bytes())
    return PartEntry(part.name, len(part.sample_ids), sum(part.lengths), sum(part.rows), size, sha256)


def _write_changed(folder: Store, name: str, data: bytes) -> None:
    if folder.size(name) != len(data) or folder.read(name) != data:
        folder.write(name, data)


def _write_table(folder: Store, name: str, table: NDArray[np.int64]) -> ArrayInfo:
    """The sample table as a Zarr array of the folder."""
    place = Path(tempfile.mkdtemp(prefix="deepspec-cache-"))
    try:
        zarr.create_group(LocalStore(place), zarr_format=3)
        with ThreadPoolExecutor(1) as pool:
            writer = ShardWriter(place, name, table.shape[1:], "int64", TABLE_CHUNK, RawCodec.calibrate, pool)
            writer.append(table)
            info = writer.finish("raw")
        for file in (array_file(name, 2), f"{name}/zarr.json"):
            _write_changed(folder, file, (place / file).read_bytes())
    finally:
        shutil.rmtree(place)
    return info
