"""The raw-binary cache of the paper's release (its version 2): read it into ours, write ours as it.

A folder with ``manifest.json``, ``samples.idx`` (one little-endian record a sample: sample id, shard, tokens, then the
offsets of five tensors in the shard) and ``shard-00000.bin`` ...: input_ids int32, attention_mask and loss_mask uint8,
target_hidden_states [n, L*D] and target_last_hidden_states [n, D] bfloat16.
"""

from __future__ import annotations

import io
import json
import mmap
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from deepspec.cache.assemble import finish_cache
from deepspec.cache.format import CacheManifest
from deepspec.cache.parts import Block, is_complete, layout_of, next_supervised, write_part
from deepspec.cache.plan import CachePlan, PlannedPart, samples_per_part
from deepspec.cache.reader import TargetCache
from deepspec.cache.store import build_lock, open_store
from deepspec.errors import CacheError
from deepspec.files import named, safe_join, sha256_file, write_bytes, write_json
from deepspec.outputs import whole_folder
from deepspec.progress import Progress

RECORD = np.dtype(
    [("sample", "<u8"), ("shard", "<u4"), ("tokens", "<u4")]
    + [(name, "<u8") for name in ("input_ids", "attention_mask", "loss_mask", "features", "last_hidden")]
)
INDEX = "samples.idx"
SAMPLE_IDS = "deepspec_sample_ids.npy"  # [N] int64, ours beside it: the release's reader needs ids without gaps
EXPORT_CAUTION = (  # of every export: a cache keeps only the rows that our losses read
    "the release's draft that goes token by token compares with the target at the last token of every answer and at the"
    " one after it too (its mask is off by two); this cache does not keep those two rows, they are written as zeros,"
    " and its loss differs (13.417 for 13.403 on one batch); the release's block drafters do not read them"
)
FACTS = {"version": 2, "hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8"}


class RawCache:
    """A cache of the release, opened by memory map.

    Raises:
        CacheError: not such a cache, a missing shard, or an index that does not fit the manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        self.layers = [int(layer) for layer in self.manifest["target_layer_ids"]]
        self.hidden_size = int(self.manifest["hidden_size"])
        try:
            self.index = np.fromfile(self.folder / INDEX, RECORD)
            self.shards = [
                self._map(safe_join(self.folder, shard["file_name"], CacheError, "file_name"))
                for shard in self.manifest["shards"]
            ]
        except OSError as problem:
            raise CacheError(f"cannot read ({problem.strerror})", file=problem.filename or self.folder) from None
        self.sample_ids = self._read_sample_ids()
        if len(self.index) != int(self.manifest["num_samples"]):
            records, samples = f"{len(self.index)} records", self.manifest["num_samples"]
            raise CacheError("index does not fit the manifest", file=self.folder / INDEX, found=records, wanted=samples)

    def _read_sample_ids(self) -> NDArray[np.int64]:
        """[N] ids of our samples where we exported the cache, else the index's own."""
        path = self.folder / SAMPLE_IDS
        if not path.exists():
            return self.index["sample"].astype(np.int64)
        try:
            ids: NDArray[np.int64] = np.load(path)
        except (OSError, ValueError) as problem:
            raise CacheError(f"cannot read ({problem})", file=path, remedy="export the cache again") from None
        if ids.shape != self.index.shape:
            raise CacheError("does not fit the index", file=path, found=ids.shape, wanted=self.index.shape)
        return ids

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text())
            wrong = [key for key, value in FACTS.items() if manifest[key] != value]
            manifest["target_layer_ids"], manifest["hidden_size"], manifest["shards"], manifest["num_samples"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise CacheError(f"not a raw cache of the release ({problem!r})", file=path) from None
        if wrong:
            found = {key: manifest[key] for key in wrong}
            raise CacheError("a raw cache of another kind", file=path, found=found, wanted=str(FACTS))
        result: dict[str, Any] = manifest
        return result

    @staticmethod
    def _map(path: Path) -> Any:
        with open(path, "rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.index)

    def _tensor(self, number: int, name: str, dtype: str, columns: int | None) -> NDArray[Any]:
        record = self.index[number]
        tokens, offset, shard = int(record["tokens"]), int(record[name]), int(record["shard"])
        count = tokens * (columns or 1)
        try:
            flat = np.frombuffer(self.shards[shard], dtype, count, offset)
        except (ValueError, IndexError):
            raise CacheError("shard too short", file=self.folder, key=f"shard {shard}, record {number}") from None
        return flat if columns is None else flat.reshape(tokens, columns)

    def block(self, numbers: range, last_hidden: bool) -> Block:
        """Samples, without padding; their ids are their positions in the index."""
        width = self.hidden_size * len(self.layers)
        parts: dict[str, Any] = {}
        for name, dtype, columns in (("input_ids", "<i4", None), ("loss_mask", "u1", None), ("features", "<u2", width)):
            parts[name] = np.concatenate([self._tensor(n, name, dtype, columns) for n in numbers])
        lengths = [int(self.index[n]["tokens"]) for n in numbers]
        last = None
        if last_hidden:
            chosen = next_supervised(parts["loss_mask"], lengths)
            rows = [self._tensor(n, "last_hidden", "<u2", self.hidden_size) for n in numbers]
            last = np.concatenate(rows)[chosen]
        names = [str(int(self.sample_ids[n])) for n in numbers]
        return Block(list(numbers), names, lengths, parts["input_ids"], parts["loss_mask"], parts["features"], last)


def import_raw_cache(source: str | Path, output: str | Path, fingerprint: dict[str, Any], limit: int) -> CacheManifest:
    """Read a cache of the release into ours. Started again after a kill it continues.

    Args:
        source: its folder.
        output: folder or URL of the new cache.
        fingerprint: of the recipe that the release's cache was made for; its layers and size are checked, target,
            tokenizer and template are the user's word. ``sources`` is replaced.
        limit: samples of a part at most.

    Raises:
        CacheError: another target's cache, broken files, or ``output`` holds another cache.
    """
    raw = RawCache(source)
    for key, found, wanted in (
        ("target_layer_ids", raw.layers, fingerprint["layers"]),
        ("hidden_size", raw.hidden_size, fingerprint["target"]["hidden_size"]),
        ("hidden_dtype", "bfloat16", fingerprint["dtype"]),
    ):
        if found != wanted:
            raise CacheError("not the recipe's cache", file=source, key=key, found=found, wanted=str(wanted))
    entry = {"name": Path(source).name, "rows": len(raw), "sha256": sha256_file(Path(source) / INDEX)}
    layout = layout_of(fingerprint)
    mean = float(raw.index["tokens"].mean()) if len(raw) else 0.0
    size = samples_per_part(len(raw), limit, mean, 2 * (layout.channels + layout.hidden_size))
    parts = tuple(
        PlannedPart(f"{i:05d}", 0, first, min(size, len(raw) - first), 0, first)
        for i, first in enumerate(range(0, len(raw), size))
    )
    plan, store = CachePlan({**fingerprint, "sources": [entry]}, 0, mean, parts), open_store(output)
    progress = Progress("import", len(parts), unit="samples", noun="parts")
    with build_lock(store), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        plan.claim(store)
        for part in parts:
            if not is_complete(store, part.name):
                samples = range(part.first, part.first + part.rows)
                blocks = (raw.block(range(n, n + 1), layout.keeps_last) for n in samples)
                write_part(store, part.name, layout, pool, blocks)
            progress.add(1, part.rows)
        progress.finish()
        return finish_cache(store, plan)


def export_raw_cache(source: str | Path, output: str | Path, shard_bytes: int = 64 << 30) -> int:
    """Write a cache in the release's form, for its training code; returns the number of samples.

    Samples are numbered from 0 without gaps, as its reader asserts; our ids are in a file beside the index.
    ``target_last_hidden_states`` is zero where the next token is not supervised: see EXPORT_CAUTION.

    Raises:
        CacheError: a cache without last_hidden or of another dtype, layers that do not ascend, or ``output`` is not
            empty.
    """
    cache = TargetCache.open(source)
    layers = list(cache.fingerprint["layers"])
    if not cache.has_last_hidden or cache.dtype != torch.bfloat16 or layers != sorted(layers):
        wanted = "last_hidden, bfloat16 and ascending layers"
        raise CacheError("the release's form cannot hold this cache", file=source, wanted=wanted)
    with whole_folder(output, "export", CacheError) as folder, named(output):
        records, progress = np.zeros(len(cache), RECORD), Progress("export", len(cache), noun="samples")
        shards: list[dict[str, Any]] = []
        with closing(_shards(cache, folder, shard_bytes, shards)) as samples:  # on a full disk its file fails here
            for number, shard, file in samples:
                records[number] = _export_sample(cache, number, shard, file)
                progress.add(1, int(records[number]["tokens"]))
        progress.finish()
        write_bytes(folder / INDEX, records.tobytes())
        sample_ids = io.BytesIO()
        np.save(sample_ids, cache.sample_ids)
        write_bytes(folder / SAMPLE_IDS, sample_ids.getvalue())
        write_json(folder / "manifest.json", _raw_manifest(cache, shards))
    return len(cache)


def _shards(
    cache: TargetCache, folder: Path, limit: int, shards: list[dict[str, Any]]
) -> Generator[tuple[int, int, BinaryIO]]:
    """(sample, shard, open file) of each sample; a shard ends before it would grow beyond ``limit`` bytes."""
    hidden = int(cache.fingerprint["target"]["hidden_size"])
    token = 6 + 2 * hidden * (len(cache.fingerprint["layers"]) + 1)
    number = 0
    while number < len(cache):
        name = f"shard-{len(shards):05d}.bin"
        shards.append({"shard_id": len(shards), "file_name": name})
        with open(folder / name, "wb") as file:
            first = number
            while number < len(cache) and (number == first or file.tell() + token * cache.lengths[number] <= limit):
                yield number, len(shards) - 1, file
                number += 1
            file.flush()
            os.fsync(file.fileno())


def _export_sample(cache: TargetCache, number: int, shard: int, file: BinaryIO) -> tuple[int, ...]:
    sample = cache.sample(number)
    last = sample.last_hidden
    if last is None:
        raise CacheError("the cache has no last_hidden", file=cache.path)
    tensors = (
        sample.input_ids.astype("<i4"),
        np.ones(len(sample.input_ids), np.uint8),
        sample.loss_mask.astype(np.uint8),
        sample.features.view(torch.uint16).numpy(),
        last.view(torch.uint16).numpy(),
    )
    offsets = []
    for tensor in tensors:
        offsets.append(file.tell())
        file.write(np.ascontiguousarray(tensor).data)
    return (number, shard, len(sample.input_ids), *offsets)


def _raw_manifest(cache: TargetCache, shards: list[dict[str, Any]]) -> dict[str, Any]:
    mark = cache.fingerprint
    return {
        **FACTS,
        "num_samples": len(cache),
        "num_shards": len(shards),
        "target_layer_ids": mark["layers"],
        "index_record_size": RECORD.itemsize,
        "hidden_size": mark["target"]["hidden_size"],
        "shards": shards,
        "target_model_name_or_path": mark["target"]["path"],
        "source_jsonl_paths": [source["name"] for source in mark["sources"]],
        "max_length": mark["max_length"],
        "min_loss_tokens": mark["min_supervised"],
        "deepspec_levels": mark["levels"],
        "deepspec_caution": EXPORT_CAUTION,
    }
