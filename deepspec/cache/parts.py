"""One part of a cache: what it holds, and how it is written under a temporary name and committed when complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from deepspec.cache.codecs.base import RawCodec
from deepspec.cache.format import (
    HIDDEN_CHUNK,
    PART_MANIFEST,
    PARTS,
    STORED_DTYPES,
    TOKEN_CHUNK,
    PartManifest,
    array_file,
)
from deepspec.cache.levels import codec_for
from deepspec.cache.shard import ShardWriter
from deepspec.cache.store import FolderStore, Store, local_folder
from deepspec.errors import CacheError
from deepspec.files import named
from deepspec.processes import temporary_name


@dataclass(frozen=True)
class Layout:
    """What a cache's parts hold."""

    channels: int  # L*D
    hidden_size: int  # D
    dtype: str  # bfloat16 or float32
    features_level: str
    last_hidden_level: str | None  # None: the array is left out

    @property
    def keeps_last(self) -> bool:
        """Whether last_hidden is kept."""
        return self.last_hidden_level is not None

    @property
    def value_bytes(self) -> int:
        """Bytes of a value of the hidden states before coding."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's hidden states before coding."""
        return self.value_bytes * (self.channels + self.hidden_size * self.keeps_last)


def layout_of(fingerprint: dict[str, Any]) -> Layout:
    """What the parts of a cache of this fingerprint hold."""
    hidden, levels = int(fingerprint["target"]["hidden_size"]), fingerprint["levels"]
    channels = hidden * len(fingerprint["layers"])
    return Layout(channels, hidden, fingerprint["dtype"], levels["features"], levels["last_hidden"])


@dataclass(frozen=True)
class Block:
    """Some samples' tokens, packed one after the other without padding."""

    sample_ids: list[int]
    conversations: list[str]
    lengths: list[int]
    input_ids: NDArray[np.int32]  # [N]
    loss_mask: NDArray[np.uint8]  # [N]
    features: NDArray[Any]  # [N, L*D] as stored
    last_hidden: NDArray[Any] | None  # [R, D] as stored: rows whose next token is supervised

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return int(self.features.nbytes + (0 if self.last_hidden is None else self.last_hidden.nbytes))

    def split(self) -> list[Block]:
        """A block of each sample."""
        found, start, row = [], 0, 0
        counts = rows_of(self.loss_mask, self.lengths)
        for number, (length, rows) in enumerate(zip(self.lengths, counts, strict=True)):
            own, one = slice(start, start + length), slice(number, number + 1)
            last = None if self.last_hidden is None else self.last_hidden[row : row + rows]
            arrays = (self.input_ids[own], self.loss_mask[own], self.features[own], last)
            found.append(Block(self.sample_ids[one], self.conversations[one], self.lengths[one], *arrays))
            start, row = start + length, row + rows
        return found


def joined(blocks: list[Block]) -> Block:
    """One block of the samples of several."""
    rows = [one.last_hidden for one in blocks if one.last_hidden is not None]
    return Block(
        [sample for one in blocks for sample in one.sample_ids],
        [name for one in blocks for name in one.conversations],
        [length for one in blocks for length in one.lengths],
        np.concatenate([one.input_ids for one in blocks]),
        np.concatenate([one.loss_mask for one in blocks]),
        np.concatenate([one.features for one in blocks]),
        np.concatenate(rows) if rows else None,
    )


def next_supervised(loss_mask: NDArray[Any], lengths: list[int]) -> NDArray[np.bool_]:
    """[N] whether the NEXT token of the same sample is supervised: the rows where a loss reads the target."""
    rows = np.zeros(len(loss_mask), bool)
    rows[:-1] = loss_mask[1:] != 0
    ends = np.cumsum(lengths) - 1
    rows[ends] = False
    return rows


def rows_of(loss_mask: NDArray[Any], lengths: list[int]) -> list[int]:
    """For each sample the number of its tokens whose next token is supervised."""
    starts = np.cumsum([0, *lengths[:-1]])
    rows: list[int] = np.add.reduceat(next_supervised(loss_mask, lengths).astype(np.int64), starts).tolist()
    return rows


class PartWriter:
    """One part under a temporary name.

    Args:
        store: the cache's; what it holds under the part's name is removed.
        name: the part's name.
        layout: of the cache.
        pool: threads that encode.
    """

    def __init__(self, store: Store, name: str, layout: Layout, pool: ThreadPoolExecutor) -> None:
        self.store, self.name, self.layout = store, name, layout
        store.remove(f"{PARTS}/{name}")
        if isinstance(store, FolderStore):
            self.folder = temporary_name(store.path / PARTS / name)
            self.folder.mkdir(parents=True)
        else:
            self.folder = local_folder(f"cache-{name}")
        self._levels = {"input_ids": "raw", "loss_mask": "raw", "features": layout.features_level}
        if layout.last_hidden_level is not None:
            self._levels["last_hidden"] = layout.last_hidden_level
        self._arrays: dict[str, ShardWriter] = {}
        try:
            zarr.create_group(LocalStore(self.folder), zarr_format=3)
            for array in self._levels:
                self._arrays[array] = self._open(array, pool)
        except OSError:
            self.abandon()
            raise
        self._samples: dict[str, list[Any]] = {"sample_ids": [], "conversations": [], "lengths": [], "rows": []}

    def _open(self, array: str, pool: ThreadPoolExecutor) -> ShardWriter:
        if array in ("input_ids", "loss_mask"):
            dtype = "int32" if array == "input_ids" else "uint8"
            return ShardWriter(self.folder, array, (), dtype, TOKEN_CHUNK, RawCodec.calibrate, pool)
        width = self.layout.channels if array == "features" else self.layout.hidden_size
        codec, dtype = codec_for(array, self._levels[array]), STORED_DTYPES[self.layout.dtype]
        return ShardWriter(self.folder, array, (width,), dtype, HIDDEN_CHUNK, codec, pool)

    def append(self, block: Block) -> None:
        """Add samples."""
        rows = rows_of(block.loss_mask, block.lengths)
        self._samples["sample_ids"] += block.sample_ids
        self._samples["conversations"] += block.conversations
        self._samples["lengths"] += block.lengths
        self._samples["rows"] += rows
        self._arrays["input_ids"].append(block.input_ids)
        self._arrays["loss_mask"].append(block.loss_mask)
        self._arrays["features"].append(block.features)
        if "last_hidden" in self._arrays:
            if block.last_hidden is None or len(block.last_hidden) != sum(rows):
                raise ValueError(f"rows of last_hidden other than the {sum(rows)} supervised next tokens")
            self._arrays["last_hidden"].append(block.last_hidden)

    def finish(self, rejected: tuple[tuple[int, str, str], ...] = ()) -> PartManifest:
        """Complete all files, part.json last, and commit the part to the store."""
        arrays = {name: writer.finish(self._levels[name]) for name, writer in self._arrays.items()}
        lists = {name: tuple(values) for name, values in self._samples.items()}
        manifest = PartManifest(self.name, arrays=arrays, rejected=rejected, **lists)
        (self.folder / PART_MANIFEST).write_bytes(manifest.to_bytes())
        self.store.commit(self.folder, f"{PARTS}/{self.name}", PART_MANIFEST)
        return manifest

    def abandon(self) -> None:
        """Give the part up and delete what was written of it."""
        for writer in self._arrays.values():
            writer.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)


def write_part(
    store: Store,
    name: str,
    layout: Layout,
    pool: ThreadPoolExecutor,
    blocks: Iterator[Block],
    rejected: tuple[tuple[int, str, str], ...] = (),
) -> None:
    """Write one part from its blocks."""
    writer = PartWriter(store, name, layout, pool)
    try:
        with named(store.url):
            for block in blocks:
                writer.append(block)
            writer.finish(rejected)
    except BaseException:
        writer.abandon()
        raise


def is_complete(store: Store, name: str) -> bool:
    """Whether a part is there with all its files in their right sizes."""
    try:
        manifest = PartManifest.load(store, name)
    except CacheError:
        return False
    path = f"{PARTS}/{name}"
    return all(
        store.size(f"{path}/{array}/zarr.json") is not None
        and store.size(f"{path}/{array_file(array, len(info.shape))}") == info.bytes
        for array, info in manifest.arrays.items()
    )


def sweep(store: Store) -> None:
    """Delete a killed build's files under temporary names."""
    for name in store.names(PARTS):
        if name.startswith("."):
            store.remove(f"{PARTS}/{name}")
