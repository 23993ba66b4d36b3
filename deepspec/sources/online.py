"""Training without a cache: the frozen target runs in the training process and returns only the layers read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from deepspec import registry
from deepspec.batch import Batch
from deepspec.cache.fingerprint import fingerprint_of
from deepspec.cache.plan import read_rows, scan
from deepspec.data.chat import load_renderer, render_row
from deepspec.data.refusals import RenderCounts
from deepspec.errors import DataError
from deepspec.recipe import Recipe
from deepspec.sources.base import FeatureSource, pad
from deepspec.targets import Target, TargetEmbeddings
from deepspec.targets.served import ServedTarget

log = logging.getLogger(__name__)


class OnlineSource(FeatureSource):
    """Samples of one conversations file, rendered at the start; hidden states are computed when a step needs them.

    Tokens and masks of all conversations stay in memory (5 bytes a token). Numbers, sample ids and rejections are those
    of the cache that would be built from the same file, so a run draws the same batches from either.

    Args:
        recipe: names layers and rendering.
        target: the frozen target, on this process's device.
        path: JSONL of prompts with the target's answers.

    Raises:
        DataError: no such file, or no usable conversation in it.
    """

    name = "online"
    required: ClassVar[tuple[str, ...]] = ("conversations",)
    needs_model = True
    reads_ahead = False  # the target runs on the training's own device and thread

    def __init__(self, recipe: Recipe, target: Target | ServedTarget, path: str | Path) -> None:
        self.target, self.layers, self.size = target, recipe.target.layers, recipe.train.online_micro_batch
        self.last_hidden = registry.algorithm(recipe.algorithm).needs_last_hidden(recipe.draft)
        self._announced: list[int] = []
        self._ready: dict[int, tuple[Tensor, Tensor]] = {}
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
        if counts.dropped:
            log.info("\n  ".join([f"{path}: {len(self._ids):,} samples", *counts.lines()]))
        self.lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        self.group_sizes = (len(self._ids),)
        self._fingerprint = fingerprint_of(recipe, target.spec, renderer.tokenizer, [found.entry()])

    @classmethod
    def open(cls, recipe: Recipe, target: TargetEmbeddings, held_out: bool = False) -> OnlineSource:
        """See :meth:`FeatureSource.open`."""
        validation = recipe.train.validation
        path = validation.path if held_out and validation is not None else recipe.data.conversations
        return cls(recipe, target, str(path))  # type: ignore[arg-type]  # complete: needs_model is set

    def sample_id(self, number: int) -> int:
        """The row's number in the file, as in a cache of it."""
        return self._sample_ids[number]

    def loss_mask(self, number: int) -> np.ndarray:
        """[S] bool."""
        return self._masks[number]

    def tokens(self, number: int) -> np.ndarray:
        """[S] int64."""
        return self._ids[number].astype(np.int64)

    def announce(self, numbers: Sequence[int]) -> None:
        """The samples of the step that begins; the target's batches are cut from them."""
        self._announced = list(numbers)
        self._ready.clear()

    def batch(self, numbers: Sequence[int], seed: int, epoch: int) -> Batch:
        """See :meth:`FeatureSource.batch`; on the target's device."""
        features, last = zip(*self.hidden_states(numbers), strict=True)
        ids = pad([torch.from_numpy(self.tokens(number)) for number in numbers])
        supervision = self.supervision(numbers, seed, epoch)
        return Batch(supervision, ids, pad(features), pad(last) if self.last_hidden else None)

    def hidden_states(self, numbers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Features [s, L*D] and last hidden states [s, D] of each; announced ones are computed in larger batches."""
        while missing := [number for number in numbers if number not in self._ready]:
            chosen = list(dict.fromkeys([*missing, *self._announced]))[: self.size]
            self._announced = [number for number in self._announced if number not in chosen]
            self._ready |= dict(zip(chosen, self.forward(chosen), strict=True))
        states = [self._ready[number] for number in numbers]
        for number in set(numbers):
            del self._ready[number]
        return states

    def forward(self, numbers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """One pass of the target over these samples side by side."""
        lengths = torch.from_numpy(self.lengths[list(numbers)])
        ids = pad([torch.from_numpy(self.tokens(number)) for number in numbers])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        device = self.target.device
        made = self.target.forward(ids.to(device), self.layers, attention_mask=mask.to(device))
        return [(made.features[row, :s], made.last_hidden[row, :s]) for row, s in enumerate(lengths.tolist())]

    def fingerprint(self) -> dict[str, object]:
        """What the hidden states depend on: that of a lossless cache of the same file."""
        return {"source": self.name, "caches": [self._fingerprint]}
