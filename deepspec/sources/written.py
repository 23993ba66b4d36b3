"""The cache that a run writes of what its source computes: ``data.write_cache``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from torch import Tensor

from deepspec.batch import Batch
from deepspec.cache.levels import LEVELS
from deepspec.cache.plan import BuildJob, plan_build
from deepspec.cache.store import FolderStore, build_lock, open_store
from deepspec.cache.write_through import AGAIN, Forward, Samples, WriteThrough
from deepspec.data.chat import Renderer
from deepspec.distributed import world_from_environment
from deepspec.errors import RecipeError
from deepspec.recipe import Recipe
from deepspec.registry import algorithm
from deepspec.sources.base import FeatureSource, stacked
from deepspec.targets import Target, TargetEmbeddings

log = logging.getLogger(__name__)
KEY = "data.write_cache"


class WrittenCache:
    """Batches as of the cache, which is computed as far as it is not there.

    Args:
        recipe: with ``data.write_cache``.
        target: whose hidden states they are.
        renderer: of the recipe.
        files: of the conversations: one.
        samples: of that file.
        forward: one batch of the cache through the target.

    Rank 0 holds the lock of the cache and writes its plan, the one of a build.

    Raises:
        RecipeError: a level that is not exact, several files, or a URL.
        CacheError: the folder holds another cache, or another process works there.
    """

    def __init__(
        self, recipe: Recipe, target: TargetEmbeddings, renderer: Renderer, files: Sequence[Path], samples: Samples,
        forward: Forward,
    ) -> None:  # fmt: skip
        self.world, store = world_from_environment(), cache_folder(recipe, files)
        D, keeps_last = target.spec.hidden_size, algorithm(recipe.algorithm).needs_last_hidden(recipe.draft)
        self.widths, self.dtype = (D * len(recipe.target.layers), D if keeps_last else None), target.dtype
        self.cache = WriteThrough(store, samples, forward)
        self._finishing, self._finished = threading.Lock(), False
        if self.world.is_main:
            with ExitStack() as stack:
                stack.enter_context(build_lock(store))
                job = BuildJob(recipe, store, files[0], cast(Target, target), renderer)  # a plan reads only its spec
                plan_build(job, append=False)
                self.cache.hold(stack.pop_all())
            log.info("%s: %d of %d parts are there, this run writes the others", store.url, *self.cache.counts())

    def batch(self, source: FeatureSource, numbers: Sequence[int], seed: int, epoch: int) -> Batch:
        """See :meth:`FeatureSource.batch`; in the host's memory."""
        if epoch > 0:
            self.finish()  # with what the first epoch left out

        def read_into(row: int, features: Tensor, last: Tensor | None) -> None:
            self.cache.read_into(numbers[row], features, last)

        tokens = [source.tokens(number) for number in numbers]
        return stacked(source.supervision(numbers, seed, epoch), tokens, self.widths, self.dtype, read_into)

    def finish(self) -> None:
        """Compute what no step has asked for, and finish the cache; once."""
        with self._finishing:
            if not self._finished:
                self.cache.complete(self.world)
                self._finished = True

    def close(self) -> None:
        """Keep what is there, for the next run where the cache is not finished."""
        made, parts = self.cache.counts()
        self.cache.close()
        if made < parts and self.world.is_main:
            log.info("%s: %d of %d parts are there; %s", self.cache.store.url, made, parts, AGAIN)


def cache_folder(recipe: Recipe, files: Sequence[str | Path]) -> FolderStore:
    """The cache's folder.

    Raises:
        RecipeError: a level that is not exact, several files, or a URL.
    """
    store = open_store(str(recipe.data.write_cache))
    if len(files) > 1:
        remedy = "put the conversations into one file, or build a cache of each: deepspec cache build"
        raise RecipeError("a run writes the cache of one file", key=KEY, found=f"{len(files)} files", remedy=remedy)
    if not isinstance(store, FolderStore):
        remedy = "name a folder, or build it there: deepspec cache build"
        raise RecipeError("a run writes its cache to a folder", key=KEY, found=store.url, remedy=remedy)
    levels = {f"cache.{key}": getattr(recipe.cache, key) for key in ("level", "features_level", "last_hidden_level")}
    for key, level in (levels | {"data.server_level": recipe.data.server_level}).items():
        if level in LEVELS and not LEVELS[level].exact:
            problem = "later epochs would not read what the first one computed"
            remedy = "write it lossless, then deepspec cache recode"
            wanted = "raw or lossless"
            raise RecipeError(problem, key=key, found=level, wanted=wanted, remedy=remedy)
    return store
