"""Where a step's features come from: the target cache, or the target itself (``online.py``).

The loop sees only :class:`FeatureSource`. Sample numbers run over all groups (caches) of a source, one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deepspec.batch import Batch, Supervision
from deepspec.cache.reader import Sample, TargetCache
from deepspec.errors import CacheError


class FeatureSource(Protocol):
    """Samples with the target's hidden states."""

    lengths: np.ndarray  # [N] int64, tokens of each sample
    group_sizes: tuple[int, ...]  # samples of each group; sums to N
    reads_ahead: bool  # whether worker threads may call `load`

    def sample_id(self, number: int) -> int:
        """The key of the sample's random draws; the same in a cache and online."""

    def loss_mask(self, number: int) -> np.ndarray:
        """[S] bool of one sample, without its hidden states."""

    def tokens(self, number: int) -> np.ndarray:
        """[S] int64, the sample's token ids."""

    def load(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples, whole."""

    def announce(self, numbers: Sequence[int]) -> None:
        """The samples that the next micro-batches will ask for, in order."""

    def fingerprint(self) -> dict[str, object]:
        """What identifies the data, for comparison when a run is resumed."""


class CacheSource:
    """Samples of one or several target caches.

    Args:
        caches: opened readers.

    Raises:
        CacheError: no cache, or one without samples.
    """

    reads_ahead = True

    def __init__(self, caches: Sequence[TargetCache]) -> None:
        if not caches:
            raise CacheError("no cache is named", key="data.cache", remedy="build one with tools/build_cache.py")
        for cache in caches:
            if len(cache.lengths) == 0:
                raise CacheError("cache without samples", file=cache.path)
        self.caches = list(caches)
        self.group_sizes = tuple(len(cache.lengths) for cache in caches)
        self.lengths = np.concatenate([np.asarray(cache.lengths, dtype=np.int64) for cache in caches])
        self._starts = np.cumsum((0, *self.group_sizes))
        self._masks: dict[int, np.ndarray] = {}  # packed to bits: a gigatoken takes 125 MB
        self._lock = threading.Lock()

    def _locate(self, number: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        return group, int(number - self._starts[group])

    def sample_id(self, number: int) -> int:
        """The cache's own sample id, made distinct over several caches."""
        group, inside = self._locate(number)
        return int(self.caches[group].sample_ids[inside]) + (group << 40)

    def loss_mask(self, number: int) -> np.ndarray:
        """[S] bool; read once, then kept as bits."""
        packed = self._masks.get(number)
        if packed is None:
            group, inside = self._locate(number)
            packed = np.packbits(self.caches[group].masks(inside)[0])
            with self._lock:
                self._masks[number] = packed
        return np.unpackbits(packed, count=int(self.lengths[number])).astype(bool)

    def tokens(self, number: int) -> np.ndarray:
        """[S] int64, read from the cache each time."""
        group, inside = self._locate(number)
        return self.caches[group].tokens(inside)[0]

    def load(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples, whole.

        Raises:
            CacheError: a broken chunk, named by part, array and samples.
        """
        places = [self._locate(number) for number in numbers]
        return [self.caches[group].sample(inside) for group, inside in places]

    def announce(self, numbers: Sequence[int]) -> None:
        """Nothing: a cache reads any sample at once."""

    def fingerprint(self) -> dict[str, object]:
        """The caches' own fingerprints, in order."""
        return {"source": "cache", "caches": [cache.fingerprint for cache in self.caches]}


def supervision(source: FeatureSource, numbers: Sequence[int], seed: int, epoch: int) -> Supervision:
    """The masks of a micro-batch, padded: all that its loss weight depends on."""
    masks = [torch.from_numpy(source.loss_mask(number)) for number in numbers]
    ids = tuple(source.sample_id(number) for number in numbers)
    return _supervision(masks, ids, seed, epoch)


def _supervision(masks: list[Tensor], ids: tuple[int, ...], seed: int, epoch: int) -> Supervision:
    lengths = torch.tensor([len(mask) for mask in masks])
    return Supervision(pad(masks), lengths, ids, seed, epoch)


def collate(samples: Sequence[Sample], ids: Sequence[int], seed: int, epoch: int, last_hidden: bool) -> Batch:
    """Pad samples into one batch; padding is 0 everywhere and not supervised."""
    masks = [torch.as_tensor(sample.loss_mask).bool() for sample in samples]
    hidden = [sample.last_hidden for sample in samples if sample.last_hidden is not None]
    return Batch(
        supervision=_supervision(masks, tuple(ids), seed, epoch),
        input_ids=pad([torch.as_tensor(sample.input_ids).long() for sample in samples]),
        features=pad([sample.features for sample in samples]),
        last_hidden=pad(hidden) if last_hidden else None,
    )


def pad(rows: Sequence[Tensor]) -> Tensor:
    """[B, S, ...] from B tensors [s_b, ...], zeros behind each."""
    if len(rows) == 1:
        return rows[0].unsqueeze(0)
    padded = rows[0].new_zeros((len(rows), max(len(row) for row in rows), *rows[0].shape[1:]))
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded
