"""Training without a cache: the frozen target runs in the training process; only the layers that are read are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from deepspec.cache.fingerprint import fingerprint_of
from deepspec.cache.plan import read_rows, scan
from deepspec.cache.reader import Sample
from deepspec.data.chat import load_renderer, render_row
from deepspec.data.refusals import RenderCounts
from deepspec.distributed import world_from_environment
from deepspec.errors import DataError
from deepspec.recipe import Recipe
from deepspec.targets import Target


class OnlineSource:
    """Samples of one conversations file, rendered at the start; hidden states are computed when a step asks for them.

    Tokens and masks of all conversations stay in memory (5 bytes a token). Numbers, sample ids and rejections are those
    of the cache that would be built from the same file, so a run draws the same batches from either.

    Args:
        recipe: names layers and rendering.
        target: the frozen target, on this process's device.
        path: JSONL of prompts with the target's answers.

    Raises:
        DataError: no such file, or no usable conversation in it.
    """

    reads_ahead = False  # the target runs on the training's own device and thread

    def __init__(self, recipe: Recipe, target: Target, path: str | Path) -> None:
        self.target, self.layers = target, recipe.target.layers
        self.size = recipe.train.online_micro_batch
        self._announced: list[int] = []
        self._ready: dict[int, Sample] = {}
        renderer = load_renderer(recipe, target.spec)
        found = scan(path)
        self._ids: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._sample_ids: list[int] = []
        counts = RenderCounts()
        for number, row in read_rows(found.path, 0, 0, found.rows):
            rendered = render_row(renderer, row, recipe.data.min_supervised)
            if isinstance(rendered, str):
                counts.drop(rendered, row["id"] if isinstance(row, dict) else f"row {number + 1}")
                continue
            self._ids.append(np.array(rendered.input_ids, dtype=np.int32))
            self._masks.append(np.array(rendered.loss_mask, dtype=bool))
            self._sample_ids.append(number)
        if not self._ids:
            raise DataError("no usable conversation in the file", file=path, found=counts.dropped)
        self.rejected = counts.dropped
        if counts.dropped and world_from_environment().is_main:
            print("\n  ".join([f"{path}: {len(self._ids):,} samples", *counts.lines()]), flush=True)
        self.lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        self.group_sizes: tuple[int, ...] = (len(self._ids),)
        self._fingerprint = fingerprint_of(recipe, target.spec, renderer.tokenizer, [found.entry()])

    def sample_id(self, number: int) -> int:
        """The row's number in the file, as in a cache of it."""
        return self._sample_ids[number]

    def loss_mask(self, number: int) -> np.ndarray:
        """[S] bool."""
        return self._masks[number]

    def tokens(self, number: int) -> np.ndarray:
        """[S] int64."""
        return self._ids[number].astype(np.int64)

    def load(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples, whole; the target runs over ``train.online_micro_batch`` of the announced ones side by side."""
        while missing := [number for number in numbers if number not in self._ready]:
            chosen = list(dict.fromkeys([*missing, *self._announced]))[: self.size]
            self._announced = [number for number in self._announced if number not in chosen]
            self._ready |= dict(zip(chosen, self._forward(chosen), strict=True))
        loaded = [self._ready[number] for number in numbers]
        for number in set(numbers):
            del self._ready[number]
        return loaded

    def announce(self, numbers: Sequence[int]) -> None:
        """The samples of the step that begins; the target's batches are cut from them."""
        self._announced = list(numbers)
        self._ready.clear()

    def _forward(self, numbers: Sequence[int]) -> list[Sample]:
        lengths = torch.from_numpy(self.lengths[list(numbers)])
        valid = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, S]
        ids = torch.zeros(valid.shape, dtype=torch.int64)
        ids[valid] = torch.from_numpy(np.concatenate([self._ids[number] for number in numbers])).long()
        device = self.target.device
        made = self.target.forward(ids.to(device), self.layers, attention_mask=valid.long().to(device))
        return [
            Sample(
                self._sample_ids[number],
                self.tokens(number),
                self._masks[number],
                made.features[row, :length],
                made.last_hidden[row, :length],
            )
            for row, (number, length) in enumerate(zip(numbers, lengths.tolist(), strict=True))
        ]

    def fingerprint(self) -> dict[str, object]:
        """What the hidden states depend on: that of a lossless cache of the same file."""
        return {"source": "online", "caches": [self._fingerprint]}
