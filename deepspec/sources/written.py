"""The cache that a run writes of what its source computes: ``data.write_cache``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from deepspec.batch import Batch
from deepspec.cache.forward import forward_batch
from deepspec.cache.levels import LEVELS
from deepspec.cache.plan import BuildJob, plan_build
from deepspec.cache.store import FolderStore, build_lock, open_store
from deepspec.cache.write_through import AGAIN, Samples, WriteThrough
from deepspec.data.chat import Renderer
from deepspec.distributed import world_from_environment
from deepspec.errors import RecipeError
from deepspec.recipe import Recipe
from deepspec.sources.base import FeatureSource, stacked
from deepspec.targets import Target
from deepspec.targets.served import ServedTarget

log = logging.getLogger(__name__)
KEY = "data.write_cache"


class WrittenCache:
    """Batches as of the cache, which is computed as far as it is not there.

    Args:
        recipe: with ``data.write_cache``.
        target: what computes.
        renderer: of the recipe.
        files: of the conversations: one.
        samples: of that file.
        last_hidden: whether batches hold the target's last hidden states.

    Rank 0 holds the lock of the cache and writes its plan, the one of a build.

    Raises:
        RecipeError: a level that is not exact, several files, or a URL.
        CacheError: the folder holds another cache, or another process works there.
    """

    def __init__(
        self, recipe: Recipe, target: Target | ServedTarget, renderer: Renderer, files: Sequence[Path],
        samples: Samples, last_hidden: bool,
    ) -> None:  # fmt: skip
        self.world, store = world_from_environment(), _folder(recipe, files)
        layers, D = recipe.target.layers, target.spec.hidden_size
        self.widths, self.dtype = (D * len(layers), D if last_hidden else None), target.dtype
        self.cache = WriteThrough(store, samples, partial(forward_batch, target, layers, last_hidden))
        self._completing, self._complete = threading.Lock(), False
        if self.world.is_main:
            with ExitStack() as stack:
                stack.enter_context(build_lock(store))
                plan_build(BuildJob(recipe, store, files[0], target, renderer), append=False)
                self.cache.hold(stack.pop_all())
            log.info("%s: %d of %d parts are there, this run writes the others", store.url, *self.cache.counts())

    def batch(self, source: FeatureSource, numbers: Sequence[int], seed: int, epoch: int) -> Batch:
        """See :meth:`FeatureSource.batch`; in the host's memory."""
        if epoch > 0:
            self._finish()  # with what the first epoch left out

        def read_into(row: int, features: Tensor, last: Tensor | None) -> None:
            self.cache.read_into(numbers[row], features, last)

        tokens = [source.tokens(number) for number in numbers]
        return stacked(source.supervision(numbers, seed, epoch), tokens, self.widths, self.dtype, read_into)

    def close(self, whole: bool) -> None:
        """Finish the cache after an epoch or more; else what is there stays, for the next run."""
        if whole:
            self._finish()
        made, parts = self.cache.counts()
        self.cache.close()
        if made < parts and self.world.is_main:
            log.info("%s: %d of %d parts are there; %s", self.cache.store.url, made, parts, AGAIN)

    def _finish(self) -> None:
        with self._completing:
            if not self._complete:
                self.cache.complete(self.world)
                self._complete = True


def _folder(recipe: Recipe, files: Sequence[Path]) -> FolderStore:
    """The cache's folder, where the recipe can have one."""
    store = open_store(str(recipe.data.write_cache))
    if len(files) > 1:
        remedy = "put the conversations into one file, or build a cache of each: deepspec cache build"
        raise RecipeError("a run writes the cache of one file", key=KEY, found=f"{len(files)} files", remedy=remedy)
    if not isinstance(store, FolderStore):
        remedy = "name a folder, or build it there: deepspec cache build"
        raise RecipeError("a run writes its cache to a folder", key=KEY, found=store.url, remedy=remedy)
    for key in ("level", "features_level", "last_hidden_level"):
        level = getattr(recipe.cache, key)
        if level in LEVELS and not LEVELS[level].exact:
            problem = "later epochs would not read what the first one computed"
            remedy = "write it lossless, then deepspec cache recode"
            wanted = "raw or lossless"
            raise RecipeError(problem, key=f"cache.{key}", found=level, wanted=wanted, remedy=remedy)
    return store
