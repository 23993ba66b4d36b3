"""Training from target caches: samples are decoded straight into the batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from deepspec import registry
from deepspec.batch import Batch
from deepspec.cache.fingerprint import fingerprint_of, require_fingerprint
from deepspec.cache.reader import TargetCache
from deepspec.errors import CacheError
from deepspec.recipe import Recipe
from deepspec.sources.base import FeatureSource, stacked
from deepspec.targets import TargetEmbeddings, load_tokenizer


class CacheSource(FeatureSource):
    """Samples of one or several target caches.

    Args:
        caches: opened readers, alike in layers and dtype.
        last_hidden: whether batches hold the target's last hidden states.

    Raises:
        CacheError: no cache, or one without samples.
    """

    def __init__(self, caches: Sequence[TargetCache], last_hidden: bool = True) -> None:
        if not caches:
            raise CacheError("no cache is named", key="data.cache", remedy="build one with deepspec cache build")
        for cache in caches:
            if len(cache.lengths) == 0:
                raise CacheError("cache without samples", file=cache.path)
        self.caches, self.last_hidden = list(caches), last_hidden
        self.group_sizes = tuple(len(cache.lengths) for cache in caches)
        self.lengths = np.concatenate([np.asarray(cache.lengths, dtype=np.int64) for cache in caches])
        self._starts = np.cumsum((0, *self.group_sizes))
        self._masks: dict[int, np.ndarray] = {}  # packed to bits: a gigatoken takes 125 MB
        self._lock = threading.Lock()

    @classmethod
    def open(cls, recipe: Recipe, target: TargetEmbeddings, held_out: bool = False) -> CacheSource:
        """See :meth:`FeatureSource.open`."""
        paths: Sequence[str] = recipe.data.cache
        if held_out and recipe.train.validation is not None:
            paths = [recipe.train.validation.path or ""]  # each set has one
            recipe = replace(recipe, data=replace(recipe.data, conversations=None))  # it holds others than in training
        caches = [TargetCache.open(path) for path in paths]
        tokenizer = load_tokenizer(recipe.target.path, recipe.target.revision)
        fingerprint = fingerprint_of(recipe, target.spec, tokenizer, [])
        for cache in caches:
            require_fingerprint(cache, recipe, fingerprint)
        source = cls(caches, registry.algorithm(recipe.algorithm).needs_last_hidden(recipe.draft))
        source.group_weights = None if held_out else recipe.data.cache_weights
        return source

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

    def batch(self, numbers: Sequence[int], seed: int, epoch: int) -> Batch:
        """See :meth:`FeatureSource.batch`.

        Raises:
            CacheError: a broken chunk, named by part, array and samples.
        """
        cache = self.caches[0]
        width = int(cache.fingerprint["target"]["hidden_size"])
        widths = width * len(cache.fingerprint["layers"]), width if self.last_hidden else None

        def read_into(row: int, features: Tensor, last: Tensor | None) -> None:
            group, inside = self._locate(numbers[row])
            self.caches[group].read_into(inside, features, last)

        tokens = [self.tokens(number) for number in numbers]
        return stacked(self.supervision(numbers, seed, epoch), tokens, widths, cache.dtype, read_into)

    def fingerprint(self) -> dict[str, object]:
        """The caches' own fingerprints, in order."""
        return {"source": "cache", "caches": [cache.fingerprint for cache in self.caches]}
