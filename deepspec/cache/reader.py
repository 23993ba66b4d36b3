"""Random access to the samples of a cache, from many threads or worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepspec.cache.format import PARTS, CacheManifest, PartManifest
from deepspec.cache.memory import empty
from deepspec.cache.parts import Block
from deepspec.cache.shard import ShardReader
from deepspec.cache.store import Store, open_store
from deepspec.errors import CacheError

BLOCK_TOKENS = 4096  # of a block, at most
OPEN_PARTS = 256  # whose indexes and calibration tables are kept in memory
_SAMPLE_ID, _PART, _START, _LENGTH, _ROW_START, _ROWS = range(6)


@dataclass(frozen=True)
class Sample:
    """One conversation with what the target computed for it; n tokens."""

    sample_id: int
    input_ids: NDArray[np.int64]  # [n]
    loss_mask: NDArray[np.bool_]  # [n]
    features: Tensor  # [n, L*D]
    last_hidden: Tensor | None  # [n, D]; zeros where the next token is not supervised


class PartReader:
    """The arrays of one part, opened when first used."""

    def __init__(self, store: Store, name: str, sha256: str | None = None) -> None:
        self.store, self.name = store, f"{PARTS}/{name}"
        self.manifest = PartManifest.load(store, name, sha256)
        self._arrays: dict[str, ShardReader] = {}

    def array(self, name: str) -> ShardReader:
        """The reader of an array of the part."""
        if name not in self._arrays:
            if name not in self.manifest.arrays:
                raise CacheError("the cache has no such array", file=f"{self.store.url}/{self.name}", key=name)
            self._arrays[name] = ShardReader(self.store, f"{self.name}/{name}", self.manifest.arrays[name])
        return self._arrays[name]

    def blocks(self) -> Iterator[Block]:
        """Its samples in their order, about BLOCK_TOKENS at a time."""
        manifest = self.manifest
        first = token = row = 0
        while first < len(manifest.lengths):
            last, tokens = first, 0
            while last < len(manifest.lengths) and (last == first or tokens + manifest.lengths[last] <= BLOCK_TOKENS):
                tokens += manifest.lengths[last]
                last += 1
            rows = sum(manifest.rows[first:last])
            values: dict[str, Any] = {}
            for name in manifest.arrays:
                array = self.array(name)
                start, count = (row, rows) if name == "last_hidden" else (token, tokens)
                values[name] = np.empty((count, *array.info.shape[1:]), array.dtype)
                array.read(start, values[name])
            chosen = slice(first, last)
            samples, lengths = list(manifest.sample_ids[chosen]), list(manifest.lengths[chosen])
            names = list(manifest.conversations[chosen])
            yield Block(samples, names, lengths, **({"last_hidden": None} | values))
            first, token, row = last, token + tokens, row + rows


class TargetCache:
    """A finished cache. It can be pickled and shared by threads; it holds no file open that it does not reopen.

    Sample numbers run from 0 to ``len(cache) - 1`` in the order of ``sample_ids``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.store = open_store(path)
        self.manifest = CacheManifest.load(self.store)
        table = ShardReader(self.store, self.manifest.table, self.manifest.table_info)
        self.table = np.empty(self.manifest.table_info.shape, np.int64)  # [N, 6] of SAMPLE_COLUMNS
        table.read(0, self.table)
        self.sample_ids: NDArray[np.int64] = self.table[:, _SAMPLE_ID].copy()
        self.lengths: NDArray[np.int64] = self.table[:, _LENGTH].copy()
        store, parts = self.store, self.manifest.parts
        self._part = lru_cache(OPEN_PARTS)(lambda number: PartReader(store, parts[number].name, parts[number].sha256))

    @classmethod
    def open(cls, path: str | Path) -> TargetCache:
        """Open a cache folder or URL.

        Raises:
            CacheError: no cache there, an unfinished one, or a damaged manifest.
        """
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return TargetCache, (self.path,)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the hidden states depend on, see ``fingerprint.py``."""
        return self.manifest.fingerprint

    @property
    def dtype(self) -> torch.dtype:
        """Of features and last_hidden."""
        return torch.bfloat16 if self.fingerprint["dtype"] == "bfloat16" else torch.float32

    @property
    def has_last_hidden(self) -> bool:
        """Whether last_hidden was kept."""
        return self.fingerprint["levels"]["last_hidden"] is not None

    def part(self, number: int) -> PartReader:
        """The reader of the manifest's part of that number."""
        return self._part(number)

    def masks(self, number: int) -> tuple[NDArray[np.bool_], int]:
        """(loss_mask [n], n) of a sample; reads no hidden states."""
        row = self.table[number]
        mask = np.empty(row[_LENGTH], np.uint8)
        self.part(int(row[_PART])).array("loss_mask").read(int(row[_START]), mask)
        return mask.view(np.bool_), int(row[_LENGTH])

    def tokens(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(input_ids [n], loss_mask [n]) of a sample."""
        row = self.table[number]
        ids = np.empty(row[_LENGTH], np.int32)
        self.part(int(row[_PART])).array("input_ids").read(int(row[_START]), ids)
        return ids.astype(np.int64), self.masks(number)[0]

    def read_into(self, number: int, features: Tensor, last_hidden: Tensor | None = None) -> None:
        """Decode a sample's hidden states into given rows, such as those of a padded batch.

        Args:
            number: of the sample, n tokens long.
            features: [n, L*D], contiguous, of the cache's dtype.
            last_hidden: [n, D] likewise, or None; rows whose next token is not supervised become zeros.

        Raises:
            CacheError: a broken chunk, named with its samples.
        """
        row = self.table[number]
        part = self.part(int(row[_PART]))
        try:
            part.array("features").read(int(row[_START]), stored_view(features))
            if last_hidden is not None:
                start, array = int(row[_ROW_START]), part.array("last_hidden")
                read_supervised(self.masks(number)[0][1:], last_hidden, lambda out: array.read(start, out))
        except CacheError as problem:
            raise self._name_sample(problem, number) from None

    def _name_sample(self, problem: CacheError, number: int) -> CacheError:
        row = self.table[number]
        sample = f"sample {row[_SAMPLE_ID]} in part {self.manifest.parts[row[_PART]].name}"
        facts = {name: getattr(problem, name) for name in ("file", "found", "wanted", "remedy")}
        return CacheError(problem.problem, key=f"{problem.key}, {sample}" if problem.key else sample, **facts)

    def sample(self, number: int) -> Sample:
        """A sample with its hidden states.

        Raises:
            CacheError: a broken or missing chunk, named by part, array, chunk and sample.
        """
        length = int(self.table[number, _LENGTH])
        try:
            ids, mask = self.tokens(number)
        except CacheError as problem:
            raise self._name_sample(problem, number) from None
        hidden = int(self.fingerprint["target"]["hidden_size"])
        features = empty((length, hidden * len(self.fingerprint["layers"])), self.dtype)
        last = empty((length, hidden), self.dtype) if self.has_last_hidden else None
        self.read_into(number, features, last)
        return Sample(int(self.sample_ids[number]), ids, mask, features, last)


def read_supervised(next_supervised: NDArray[Any], out: Tensor, read: Callable[[NDArray[Any]], object]) -> None:
    """Rows of last_hidden, which are kept packed, to their places in ``out`` [n, D]; zeros elsewhere.

    Args:
        next_supervised: [n] or [n - 1]; whether the token after the row is supervised. After the last there is none.
        out: contiguous.
        read: fills [R, D], the rows whose next token is supervised.
    """
    kept = np.flatnonzero(next_supervised)
    first, count = (int(kept[0]), len(kept)) if len(kept) else (0, 0)
    rows = stored_view(out)
    if count and kept[-1] - first + 1 == count:  # one answer: its rows lie side by side
        read(rows[first : first + count])
        rows[:first] = 0
        rows[first + count :] = 0
        return
    packed = np.empty((count, rows.shape[1]), rows.dtype)
    read(packed)
    rows[...] = 0
    rows[kept] = packed


def stored_view(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as the array holds it: bf16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
