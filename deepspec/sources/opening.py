"""Open the data that a recipe names, compared with the recipe before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from deepspec.cache.fingerprint import fingerprint_of, require_fingerprint
from deepspec.cache.reader import TargetCache
from deepspec.recipe import Recipe
from deepspec.sources.base import CacheSource, FeatureSource
from deepspec.sources.online import OnlineSource
from deepspec.targets import Target, TargetEmbeddings, load_tokenizer


def open_source(recipe: Recipe, target: TargetEmbeddings) -> FeatureSource:
    """The training data; ``target`` is the whole one where the source is online.

    Raises:
        CacheError: no cache, a broken one, or one of other data or of another target than the recipe's.
        DataError: conversations that cannot be used.
    """
    if recipe.data.source == "online":
        return OnlineSource(recipe, cast(Target, target), str(recipe.data.conversations))
    return open_caches(recipe.data.cache, recipe, target)


def open_validation(recipe: Recipe, target: TargetEmbeddings) -> FeatureSource | None:
    """The held-out data of ``train.validation``; None without that section.

    Raises:
        DeepSpecError: as :func:`open_source`.
    """
    if recipe.train.validation is None:
        return None
    path = recipe.train.validation.path
    if recipe.data.source == "online":
        return OnlineSource(recipe, cast(Target, target), path)
    anything = replace(recipe, data=replace(recipe.data, conversations=None))  # other conversations than in training
    return open_caches([path], anything, target)


def open_caches(paths: Sequence[str], recipe: Recipe, target: TargetEmbeddings) -> CacheSource:
    """Caches that fit the recipe."""
    tokenizer = load_tokenizer(recipe.target.path, recipe.target.revision)
    caches = [TargetCache.open(path) for path in paths]
    fingerprint = fingerprint_of(recipe, target.spec, tokenizer, [])
    for cache in caches:
        require_fingerprint(cache, recipe, fingerprint)
    return CacheSource(caches)
