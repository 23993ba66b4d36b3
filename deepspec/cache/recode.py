"""Rewrite an exact cache at another level: the same samples and parts, other bytes; no target is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepspec.cache.assemble import finish_cache, sweep, whole_part
from deepspec.cache.format import PART_MANIFEST, PARTS, PLAN, Manifest
from deepspec.cache.levels import LEVELS, level_of
from deepspec.cache.lock import build_lock
from deepspec.cache.plan import Plan
from deepspec.cache.reader import PartReader, TargetCache
from deepspec.cache.store import Store, open_folder
from deepspec.cache.writer import Block, Layout, PartWriter, layout_of, temporary_part
from deepspec.errors import CacheError
from deepspec.files import named

BLOCK_TOKENS = 4096


def recode_cache(
    source: str | Path,
    output: str | Path,
    features_level: str,
    last_hidden_level: str,
    report: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write the cache ``source`` at other levels to ``output``; a build at these levels gives the same bytes.

    Started again after a kill it continues.

    Args:
        source: folder or URL of a cache whose levels are exact.
        output: folder or URL of the new cache.
        features_level: level of the features.
        last_hidden_level: level of last_hidden, where the cache has it.
        report: called with (parts done, parts) after each part.

    Raises:
        CacheError: an unknown level, a source that is rounded already, or ``output`` holds another cache.
    """
    level_of(features_level), level_of(last_hidden_level)
    cache = TargetCache.open(source)
    levels = dict(cache.fingerprint["levels"])
    rounded = [level for level in levels.values() if level is not None and not LEVELS[level].exact]
    if rounded:
        raise CacheError("the cache is rounded already", file=source, found=rounded[0], wanted="raw or lossless")
    levels = {
        "features": features_level,
        "last_hidden": None if levels["last_hidden"] is None else last_hidden_level,
    }
    old = Plan.load(cache.folder)
    plan = replace(old, fingerprint={**old.fingerprint, "levels": levels})
    folder = open_folder(output)
    with build_lock(folder), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        claim_plan(folder, plan)
        layout = layout_of(plan.fingerprint)
        for number, part in enumerate(plan.parts):
            if not whole_part(folder, part.name):
                _recode_part(cache.part(number), folder, part.name, layout, pool)
            if report is not None:
                report(number + 1, len(plan.parts))
        return finish_cache(folder, plan)


def claim_plan(folder: Store, plan: Plan) -> None:
    """Write the plan, or see that the folder's is the same.

    Raises:
        CacheError: the folder holds another cache.
    """
    if folder.size(PLAN) is None:
        folder.write(PLAN, plan.to_bytes())
    elif folder.read(PLAN) != plan.to_bytes():
        raise CacheError("the folder holds another cache", file=folder.url, remedy="choose another output folder")
    sweep(folder)


def write_part(
    folder: Store,
    name: str,
    layout: Layout,
    pool: ThreadPoolExecutor,
    blocks: Iterator[Block],
    rejected: tuple[tuple[int, str, str], ...] = (),
) -> None:
    """One part from its blocks."""
    folder.remove(f"{PARTS}/{name}")
    writer = PartWriter(temporary_part(folder, name), name, layout, pool)
    try:
        with named(folder.url):
            for block in blocks:
                writer.append(block)
            writer.finish(rejected)
            folder.commit(writer.folder, f"{PARTS}/{name}", PART_MANIFEST)
    except BaseException:
        writer.abandon()
        raise


def _recode_part(part: PartReader, folder: Store, name: str, layout: Layout, pool: ThreadPoolExecutor) -> None:
    write_part(folder, name, layout, pool, _blocks(part), part.manifest.rejected)


def _blocks(part: PartReader) -> Iterator[Block]:
    """A part's samples in their order, about BLOCK_TOKENS at a time."""
    manifest = part.manifest
    first = token = row = 0
    while first < len(manifest.lengths):
        last, tokens = first, 0
        while last < len(manifest.lengths) and (last == first or tokens + manifest.lengths[last] <= BLOCK_TOKENS):
            tokens += manifest.lengths[last]
            last += 1
        rows = sum(manifest.rows[first:last])
        values = {}
        for name, (start, count) in {
            **dict.fromkeys(("input_ids", "loss_mask", "features"), (token, tokens)),
            "last_hidden": (row, rows),
        }.items():
            if name in manifest.arrays:
                array = part.array(name)
                values[name] = np.empty((count, *array.info.shape[1:]), array.dtype)
                array.read(start, values[name])
        chosen = slice(first, last)
        yield Block(
            list(manifest.sample_ids[chosen]),
            list(manifest.conversations[chosen]),
            list(manifest.lengths[chosen]),
            values["input_ids"],
            values["loss_mask"],
            values["features"],
            values.get("last_hidden"),
        )
        first, token, row = last, token + tokens, row + rows
