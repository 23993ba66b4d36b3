"""Rewrite an exact cache at another level: the same samples and parts, other bytes; no target is needed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from deepspec.cache.assemble import finish_cache
from deepspec.cache.format import CacheManifest
from deepspec.cache.levels import LEVELS, codec_for
from deepspec.cache.parts import is_complete, layout_of, write_part
from deepspec.cache.plan import CachePlan
from deepspec.cache.reader import TargetCache
from deepspec.cache.store import build_lock, open_store
from deepspec.errors import CacheError
from deepspec.progress import Progress


def recode_cache(source: str | Path, output: str | Path, features_level: str, last_hidden_level: str) -> CacheManifest:
    """Write the cache ``source`` at other levels to ``output``; a build at these levels gives the same bytes.

    Started again after a kill it continues.

    Args:
        source: folder or URL of a cache whose levels are exact.
        output: folder or URL of the new cache.
        features_level: level of the features.
        last_hidden_level: level of last_hidden, where the cache has it.

    Raises:
        CacheError: an unknown level, a source that is rounded already, or ``output`` holds another cache.
    """
    codec_for("features", features_level), codec_for("last_hidden", last_hidden_level)
    cache = TargetCache.open(source)
    levels = dict(cache.fingerprint["levels"])
    rounded = [level for level in levels.values() if level is not None and not LEVELS[level].exact]
    if rounded:
        raise CacheError("the cache is rounded already", file=source, found=rounded[0], wanted="raw or lossless")
    levels = {"features": features_level, "last_hidden": levels["last_hidden"] and last_hidden_level}
    old = CachePlan.load(cache.store, cache.manifest)
    plan = replace(old, fingerprint={**old.fingerprint, "levels": levels})
    store, layout = open_store(output), layout_of(plan.fingerprint)
    progress = Progress("recode", len(plan.parts), noun="parts")
    with build_lock(store), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        plan.claim(store)
        for number, planned in enumerate(plan.parts):
            part = cache.part(number)
            if not is_complete(store, planned.name):
                write_part(store, planned.name, layout, pool, part.blocks(), part.manifest.rejected)
            progress.add(1, sum(part.manifest.lengths))
        return finish_cache(store, plan)
