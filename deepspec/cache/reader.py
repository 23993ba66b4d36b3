"""Random access to a cache's samples, by whole samples, from many threads or worker processes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepspec.cache.format import PARTS, Manifest, PartManifest
from deepspec.cache.memory import empty
from deepspec.cache.shard import ShardReader
from deepspec.cache.store import Store, open_folder
from deepspec.errors import CacheError

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


@dataclass(frozen=True)
class Padded:
    """B samples padded to the longest."""

    sample_ids: tuple[int, ...]
    lengths: Tensor  # [B] int64
    input_ids: Tensor  # [B, S] int64
    loss_mask: Tensor  # [B, S] bool
    features: Tensor  # [B, S, L*D]
    last_hidden: Tensor | None  # [B, S, D]


class PartReader:
    """The arrays of one part, opened when first used."""

    def __init__(self, folder: Store, name: str, sha256: str) -> None:
        self.folder, self.name = folder, f"{PARTS}/{name}"
        self.manifest = PartManifest.load(folder, name, sha256)
        self._arrays: dict[str, ShardReader] = {}

    def array(self, name: str) -> ShardReader:
        """The reader of an array of the part."""
        if name not in self._arrays:
            if name not in self.manifest.arrays:
                raise CacheError("the cache has no such array", file=f"{self.folder.url}/{self.name}", key=name)
            self._arrays[name] = ShardReader(self.folder, f"{self.name}/{name}", self.manifest.arrays[name])
        return self._arrays[name]


class TargetCache:
    """A finished cache. It can be pickled and shared by threads; it holds no file open that it does not reopen.

    Sample numbers run from 0 to ``len(cache) - 1`` in the order of ``sample_ids``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.folder = open_folder(path)
        self.manifest = Manifest.load(self.folder)
        table = ShardReader(self.folder, self.manifest.table, self.manifest.table_info)
        self.table = np.empty(self.manifest.table_info.shape, np.int64)  # [N, 6] of SAMPLE_COLUMNS
        table.read(0, self.table)
        self.sample_ids: NDArray[np.int64] = self.table[:, _SAMPLE_ID].copy()
        self.lengths: NDArray[np.int64] = self.table[:, _LENGTH].copy()
        self._parts: OrderedDict[int, PartReader] = OrderedDict()
        self._lock = threading.Lock()

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
        """The reader of the part at that place of the manifest."""
        with self._lock:
            if number in self._parts:
                self._parts.move_to_end(number)
                return self._parts[number]
        entry = self.manifest.parts[number]
        reader = PartReader(self.folder, entry.name, entry.sha256)
        with self._lock:
            self._parts[number] = reader
            while len(self._parts) > OPEN_PARTS:
                self._parts.popitem(last=False)
        return reader

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
                self._read_last_hidden(number, part, last_hidden)
        except CacheError as problem:
            raise self._name_sample(problem, number) from None

    def _read_last_hidden(self, number: int, part: PartReader, out: Tensor) -> None:
        row = self.table[number]
        mask = np.empty(row[_LENGTH], np.uint8)
        part.array("loss_mask").read(int(row[_START]), mask)
        places = np.flatnonzero(mask[1:])
        first, count = (int(places[0]), len(places)) if len(places) else (0, 0)
        rows = stored_view(out)
        if count and places[-1] - first + 1 == count:  # one answer: its rows lie side by side
            part.array("last_hidden").read(int(row[_ROW_START]), rows[first : first + count])
            rows[:first] = 0
            rows[first + count :] = 0
            return
        packed = np.empty((int(row[_ROWS]), rows.shape[1]), rows.dtype)
        part.array("last_hidden").read(int(row[_ROW_START]), packed)
        rows[...] = 0
        rows[places] = packed

    def _name_sample(self, problem: CacheError, number: int) -> CacheError:
        row = self.table[number]
        place = f"sample {row[_SAMPLE_ID]} in part {self.manifest.parts[row[_PART]].name}"
        key = f"{problem.key}, {place}" if problem.key else place
        return CacheError(
            problem.problem,
            file=problem.file,
            key=key,
            found=problem.found,
            wanted=problem.wanted,
            remedy=problem.remedy,
        )

    def padded(self, numbers: Sequence[int], last_hidden: bool = True) -> Padded:
        """Samples side by side, decoded straight into the padded tensors; zeros behind each.

        Raises:
            CacheError: a broken or missing chunk, named by part, array, chunk and sample.
        """
        lengths = self.lengths[list(numbers)]
        hidden = int(self.fingerprint["target"]["hidden_size"])
        shape = (len(numbers), int(lengths.max()))
        features = empty((*shape, hidden * len(self.fingerprint["layers"])), self.dtype)
        last = empty((*shape, hidden), self.dtype) if last_hidden and self.has_last_hidden else None
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        for row, (number, length) in enumerate(zip(numbers, lengths.tolist(), strict=True)):
            tokens, supervised = self.tokens(number)
            ids[row, :length], mask[row, :length] = torch.from_numpy(tokens), torch.from_numpy(supervised)
            self.read_into(number, features[row, :length], None if last is None else last[row, :length])
            for tensor in (features, last):
                if tensor is not None:
                    tensor[row, length:] = 0
        samples = tuple(self.sample_ids[list(numbers)].tolist())
        return Padded(samples, torch.from_numpy(lengths), ids, mask, features, last)

    def sample(self, number: int) -> Sample:
        """A whole sample.

        Raises:
            CacheError: a broken or missing chunk, named by part, array, chunk and sample.
        """
        length = int(self.table[number, _LENGTH])
        try:
            ids, mask = self.tokens(number)
        except CacheError as problem:
            raise self._name_sample(problem, number) from None
        layout = self.fingerprint
        hidden = int(layout["target"]["hidden_size"])
        features = empty((length, hidden * len(layout["layers"])), self.dtype)
        last = empty((length, hidden), self.dtype) if self.has_last_hidden else None
        self.read_into(number, features, last)
        return Sample(int(self.sample_ids[number]), ids, mask, features, last)


def stored_view(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as the array holds it: bf16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
