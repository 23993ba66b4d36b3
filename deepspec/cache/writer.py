"""Writes one part: blocks of tokens go in, in the order of the token axis; the finished folder is handed over whole."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from deepspec.cache.codecs.raw import RawCodec
from deepspec.cache.format import HIDDEN_CHUNK, PART_MANIFEST, PARTS, TOKEN_CHUNK, PartManifest
from deepspec.cache.levels import codec_for
from deepspec.cache.shard import ShardWriter, stored_dtype
from deepspec.cache.store import FolderStore, Store


@dataclass(frozen=True)
class Layout:
    """What a cache's parts hold."""

    channels: int  # L*D
    hidden_size: int  # D
    dtype: str  # bfloat16 or float32
    features_level: str
    last_hidden_level: str | None  # None: the array is left out


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
        """Bytes of hidden states."""
        return self.features.nbytes + (0 if self.last_hidden is None else self.last_hidden.nbytes)


def next_supervised(loss_mask: NDArray[Any], lengths: list[int]) -> NDArray[np.bool_]:
    """[N] whether the NEXT token of the same sample is supervised: the rows at which a loss needs the target's word."""
    rows = np.zeros(len(loss_mask), bool)
    rows[:-1] = loss_mask[1:] != 0
    ends = np.cumsum(lengths) - 1
    rows[ends] = False
    return rows


def temporary_part(folder: Store, name: str) -> Path:
    """Where a part is written before the folder takes it over."""
    if isinstance(folder, FolderStore):
        return folder.path / PARTS / f".{name}.{os.getpid()}.tmp"
    return Path(tempfile.gettempdir()) / f"deepspec-cache-{name}-{secrets.token_hex(8)}"


class PartWriter:
    """One part under a temporary name.

    Args:
        folder: the temporary folder; made here.
        name: the part's name.
        layout: of the cache.
        pool: threads that encode.
    """

    def __init__(self, folder: Path, name: str, layout: Layout, pool: ThreadPoolExecutor) -> None:
        self.folder, self.name, self.layout = folder, name, layout
        folder.mkdir(parents=True)
        self._levels = {"input_ids": "raw", "loss_mask": "raw", "features": layout.features_level}
        if layout.last_hidden_level is not None:
            self._levels["last_hidden"] = layout.last_hidden_level
        self._arrays: dict[str, ShardWriter] = {}
        try:
            zarr.create_group(LocalStore(folder), zarr_format=3)
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
        codec, dtype = codec_for(array, self._levels[array]), stored_dtype(self.layout.dtype)
        return ShardWriter(self.folder, array, (width,), dtype, HIDDEN_CHUNK, codec, pool)

    def append(self, block: Block) -> None:
        """Add samples."""
        rows = next_supervised(block.loss_mask, block.lengths)
        starts = np.cumsum([0, *block.lengths[:-1]])
        self._samples["sample_ids"] += block.sample_ids
        self._samples["conversations"] += block.conversations
        self._samples["lengths"] += block.lengths
        self._samples["rows"] += np.add.reduceat(rows.astype(np.int64), starts).tolist()
        self._arrays["input_ids"].append(block.input_ids)
        self._arrays["loss_mask"].append(block.loss_mask)
        self._arrays["features"].append(block.features)
        if "last_hidden" in self._arrays:
            _check_rows(block, int(rows.sum()))
            self._arrays["last_hidden"].append(block.last_hidden)  # type: ignore[arg-type]

    def finish(self, rejected: tuple[tuple[int, str, str], ...] = ()) -> PartManifest:
        """Complete all files; part.json is the last."""
        arrays = {name: writer.finish(self._levels[name]) for name, writer in self._arrays.items()}
        lists = {name: tuple(values) for name, values in self._samples.items()}
        manifest = PartManifest(self.name, arrays=arrays, rejected=rejected, **lists)
        (self.folder / PART_MANIFEST).write_bytes(manifest.to_bytes())
        return manifest

    def abandon(self) -> None:
        """Give the part up and delete what was written of it."""
        for writer in self._arrays.values():
            writer.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)


def _check_rows(block: Block, wanted: int) -> None:
    """A defect of the caller, not of the data: the block's rows of last_hidden do not fit its mask."""
    found = None if block.last_hidden is None else len(block.last_hidden)
    if found != wanted:
        raise ValueError(f"{found} rows of last_hidden for {wanted} supervised next tokens")
