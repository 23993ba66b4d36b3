"""The data of a plan: a cache, a conversations file, or numbers."""

from __future__ import annotations

import math
import os
from pathlib import Path

from deepspec.cache.estimate import Totals, count
from deepspec.cache.format import MANIFEST
from deepspec.cache.plan import scan
from deepspec.data.chat import load_renderer
from deepspec.errors import DataError
from deepspec.planning.plan import DataSize
from deepspec.recipe import Recipe
from deepspec.targets import TargetSpec

PROBED = 2000  # conversations rendered, spread over the file
CHARACTERS = 4.0  # bytes of a conversation's line a token, where there is no tokenizer: assumed


def work_of_numbers(samples: int, tokens: float, supervised: float, longest: int) -> DataSize:
    """A data set of ``samples`` conversations of ``tokens`` tokens on average."""
    total = round(samples * tokens)
    totals = Totals(samples, samples, total, round(total * supervised))
    return DataSize(totals, max(longest, math.ceil(tokens)), "numbers given")


def is_cache(path: str) -> bool:
    """Whether ``path`` is a URL, or the folder of a finished cache."""
    return "://" in path or (Path(path) / MANIFEST).exists()


def work_of_data(recipe: Recipe, spec: TargetSpec, path: str, supervised: float) -> DataSize:
    """Totals of a cache or of a conversations file.

    Args:
        recipe: names the target, whose tokenizer renders conversations; without one their bytes are divided.
        spec: of the target.
        path: a cache (a folder or URL) or JSONL.
        supervised: share of tokens that are answers, where no tokenizer tells.

    Raises:
        DataError: neither is there.
    """
    if is_cache(path):
        from deepspec.cache.reader import TargetCache

        cache = TargetCache.open(path)
        manifest = cache.manifest
        totals = Totals(manifest.samples, manifest.samples, manifest.tokens, manifest.rows)
        return DataSize(totals, int(max(cache.lengths)), f"cache {path}")
    if not os.path.isfile(path):
        remedy = "name a cache or a file of conversations, or give --samples and --tokens"
        raise DataError("no data there", file=path, key="--data", remedy=remedy)
    source, longest = scan(path), recipe.data.max_length
    if Path(recipe.target.path).is_dir():
        renderer = load_renderer(recipe, spec)
        return DataSize(count(source, renderer, recipe.data.min_supervised, PROBED), longest, f"{path}, rendered")
    mean = min(longest, os.path.getsize(path) / max(source.rows, 1) / CHARACTERS)
    found = work_of_numbers(source.rows, mean, supervised, longest)
    return DataSize(found.totals, longest, f"{path}: no tokenizer at hand, {CHARACTERS:g} bytes a token assumed")
