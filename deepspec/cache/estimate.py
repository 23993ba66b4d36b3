"""Before a build: how many tokens, bytes, files and hours; from the conversations, or from known totals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from deepspec import registry
from deepspec.cache.format import HIDDEN_CHUNK, ArrayInfo
from deepspec.cache.forward import forward_batch
from deepspec.cache.levels import LEVELS
from deepspec.cache.parts import Block, Layout, PartWriter
from deepspec.cache.plan import Source, samples_per_part, scan, usable_rows
from deepspec.cache.store import FolderStore
from deepspec.data.chat import Renderer, load_renderer
from deepspec.distributed import pick_device
from deepspec.processes import temporary_prefix
from deepspec.recipe import Recipe
from deepspec.targets import load_spec, load_target

FILES_PER_ARRAY, FILES_PER_PART, FILES_PER_CACHE = 2, 2, 7
TOKEN_BYTES = 5  # input_ids and loss_mask
SAMPLE_BYTES = 100  # of a sample in part.json and in the table
PART_BYTES_FIXED = 13_000  # of a part's metadata, and of the padding of its last chunks
TABLE_BYTES = {"raw": 0.0, "lossless": 4 / 3} | dict.fromkeys(("near", "compact", "smallest"), 16 / 3)  # of a channel


@dataclass(frozen=True)
class Totals:
    """Totals of a data set."""

    rows: int  # conversations
    samples: int  # usable ones
    tokens: int
    last_rows: int  # tokens whose next token is supervised

    @property
    def mean_tokens(self) -> float:
        """Tokens of a usable sample."""
        return self.tokens / max(self.samples, 1)


@dataclass(frozen=True)
class Estimate:
    """Size and time of a build at one level."""

    level: str
    coded_bytes: int
    parts: int
    files: int


def estimate_recipe(
    recipe: Recipe, conversations: str | Path, probed: int, measured: int
) -> tuple[Totals, list[Estimate]]:
    """Totals of a conversation file under a recipe, and the size of a build of it at each level.

    Args:
        recipe: names target, layers, rendering.
        conversations: JSONL file.
        probed: rows rendered, spread over the file; as many as it has for exact totals.
        measured: conversations run through the target, to measure the ratios instead of taking the table's; 0: none.
    """
    spec = load_spec(recipe.target.path, recipe.target.revision)
    recipe = recipe.for_target(spec)
    renderer = load_renderer(recipe, spec)
    source = scan(conversations)
    minimum = recipe.data.min_supervised
    totals = count(source, renderer, minimum, probed)
    keeps_last = registry.algorithm(recipe.algorithm).needs_last_hidden(recipe.draft)
    channels = spec.hidden_size * len(recipe.target.layers)
    layout = Layout(channels, spec.hidden_size, recipe.target.dtype, "raw", "raw" if keeps_last else None)
    ratios = None
    if measured:
        dtype = getattr(torch, recipe.target.dtype)
        target = load_target(recipe.target.path, dtype, pick_device(), recipe.target.revision)
        rows = usable_rows(source, renderer, minimum, measured)
        blocks = [forward_batch(target, recipe.target.layers, keeps_last, [(i, str(i), one)])[1]() for i, one in rows]
        ratios = measure_ratios(blocks, layout)
    return totals, estimate(totals, layout, recipe.cache.samples_per_part, ratios)


def count(source: Source, renderer: Renderer, min_supervised: int, probed: int) -> Totals:
    """Totals of a conversation file from at most ``probed`` rows spread evenly over it."""
    rows = usable_rows(source, renderer, min_supervised, probed)
    scale = source.rows / len(range(0, source.rows, max(1, source.rows // probed)))
    tokens = sum(len(rendered.input_ids) for _, rendered in rows)
    last_rows = sum(sum(rendered.loss_mask[1:]) for _, rendered in rows)
    return Totals(source.rows, round(len(rows) * scale), round(tokens * scale), round(last_rows * scale))


def estimate(
    totals: Totals, layout: Layout, limit: int, ratios: dict[str, tuple[float, float]] | None = None
) -> list[Estimate]:
    """Bytes and files at each level.

    Args:
        totals: of the data.
        layout: widths and dtype; its levels do not count, but whether last_hidden is kept.
        limit: the recipe's cache.samples_per_part.
        ratios: measured coded bytes / raw bytes of (features, last_hidden) by level; else the table's.
    """
    width, keeps_last = layout.value_bytes, layout.keeps_last
    size = samples_per_part(totals.rows, limit, totals.mean_tokens, layout.token_bytes)
    parts = math.ceil(totals.rows / size)
    files = FILES_PER_CACHE + parts * (FILES_PER_PART + FILES_PER_ARRAY * (3 + keeps_last))
    found = []
    for level in LEVELS:
        features, last = (ratios or {}).get(level, LEVELS[level].ratios)
        coded = totals.tokens * (features * width * layout.channels + TOKEN_BYTES)
        if keeps_last:
            coded += totals.last_rows * last * width * layout.hidden_size
        coded += totals.samples * SAMPLE_BYTES
        coded += 20 * (totals.tokens + totals.last_rows) / HIDDEN_CHUNK  # index entries and checksums
        coded += parts * (PART_BYTES_FIXED + TABLE_BYTES[level] * layout.token_bytes // width)
        found.append(Estimate(level, round(coded), parts, files))
    return found


def measure_ratios(blocks: Sequence[Block], layout: Layout) -> dict[str, tuple[float, float]]:
    """Coded / raw bytes of (features, last_hidden) at each level, on real hidden states."""
    ratios = {}
    with ThreadPoolExecutor(1) as pool, TemporaryDirectory(prefix=temporary_prefix("estimate")) as folder:
        for level in LEVELS:
            coded = replace(layout, features_level=level, last_hidden_level=level if layout.keeps_last else None)
            writer = PartWriter(FolderStore(folder), level, coded, pool)
            for block in blocks:
                writer.append(block)
            arrays = writer.finish().arrays
            ratios[level] = (_ratio(arrays["features"]), _ratio(arrays.get("last_hidden")))
    return ratios


def _ratio(info: ArrayInfo | None) -> float:
    if info is None or not info.raw_bytes:
        return 1.0
    return (info.bytes - 20 * math.ceil(info.shape[0] / HIDDEN_CHUNK) - 4) / info.raw_bytes
