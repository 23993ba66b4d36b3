"""Training without a cache: the frozen target runs in the training process and returns only the layers read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from deepspec import registry
from deepspec.batch import Batch
from deepspec.cache.fingerprint import fingerprint_of
from deepspec.cache.forward import RenderedConversation, forward_batch
from deepspec.cache.parts import Block
from deepspec.cache.plan import Source, read_rows, scan
from deepspec.cache.write_through import Samples
from deepspec.data.chat import Renderer, load_renderer, render_row
from deepspec.data.refusals import RenderCounts
from deepspec.errors import DataError
from deepspec.recipe import Recipe
from deepspec.sources.base import FeatureSource, pad
from deepspec.sources.written import WrittenCache
from deepspec.targets import Target, TargetEmbeddings

log = logging.getLogger(__name__)


class OnlineSource(FeatureSource):
    """Samples of conversation files, rendered at the start; hidden states are computed when a step needs them.

    Tokens and masks of all conversations stay in memory (5 bytes a token). Each file is a group. Numbers, sample ids
    and rejections are those of the caches that would be built from the same files, so a run draws the same batches from
    either.

    Args:
        recipe: names layers and rendering.
        target: the frozen target, complete (``needs_model``), on this process's device.
        files: JSONL of prompts with the target's answers.

    Raises:
        DataError: no such file, or no usable conversation in one.
    """

    name = "online"
    required: ClassVar[tuple[str, ...]] = ("conversations",)
    needs_model = True
    computes = True
    reads_ahead = False  # the target runs on the training's own device and thread

    def __init__(self, recipe: Recipe, target: TargetEmbeddings, *files: str | Path) -> None:
        self.target, self.layers, self.size = target, recipe.target.layers, recipe.train.online_micro_batch
        self.last_hidden = registry.algorithm(recipe.algorithm).needs_last_hidden(recipe.draft)
        self._announced: list[int] = []
        self._ready: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._renderer = renderer = load_renderer(recipe, target.spec)
        self._ids: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._sample_ids: list[int] = []
        self._names: list[str] = []
        self._rejected: list[tuple[int, str, str]] = []  # row, the conversation's own id, reason
        self.written: WrittenCache | None = None
        self.rejected: Counter[str] = Counter()  # reason -> conversations of all files
        self._files = [scan(path) for path in files]
        self.group_sizes = tuple(self._read(group, one, renderer, recipe) for group, one in enumerate(self._files))
        self.lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        self._fingerprints = [
            fingerprint_of(recipe, target.spec, renderer.tokenizer, [one.entry()]) for one in self._files
        ]

    def _read(self, group: int, found: Source, renderer: Renderer, recipe: Recipe) -> int:
        """Render the rows of one file; returns how many samples they are."""
        counts, before = RenderCounts(), len(self._ids)
        for number, row in read_rows(found.path, 0, 0, found.rows):
            rendered = render_row(renderer, row, recipe.data.min_supervised)
            name = row["id"] if isinstance(row, dict) else f"row {number + 1}"
            if isinstance(rendered, str):
                counts.drop(rendered, name)
                self._rejected.append((number, name, rendered))
                continue
            self._names.append(name)
            self._ids.append(np.array(rendered.input_ids, dtype=np.int32))
            self._masks.append(np.array(rendered.loss_mask, dtype=bool))
            self._sample_ids.append(number + (group << 40))
        made = len(self._ids) - before
        if not made:
            raise DataError("no usable conversation in the file", file=found.path, found=counts.dropped)
        self.rejected.update(counts.dropped)
        if counts.dropped:
            log.info("\n  ".join([f"{found.path}: {made:,} samples", *counts.lines()]))
        return made

    @classmethod
    def open(cls, recipe: Recipe, target: TargetEmbeddings, held_out: bool = False) -> OnlineSource:
        """See :meth:`FeatureSource.open`."""
        validation = recipe.train.validation
        if held_out and validation is not None:
            return cls(recipe, target, str(validation.path))
        source = cls(recipe, target, *recipe.data.files)
        source.group_weights = recipe.data.conversation_weights
        if recipe.data.write_cache is not None:
            source.written = source._write_cache(recipe)
        return source

    def _write_cache(self, recipe: Recipe) -> WrittenCache:
        rows, paths = np.array(self._sample_ids, np.int64), [one.path for one in self._files]
        samples = Samples(self._files[0].sha256, rows, self._names, self._ids, self._masks, self._rejected)
        return WrittenCache(recipe, self.target, self._renderer, paths, samples, self.forward_block)

    def sample_id(self, number: int) -> int:
        """The row's number in its file, as in a cache of it, made distinct over several files."""
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
        """See :meth:`FeatureSource.batch`; on the target's device, or on the host where a cache is written."""
        if self.written is not None:
            return self.written.batch(self, numbers, seed, epoch)
        states = self.hidden_states(numbers)
        ids = pad([torch.from_numpy(self.tokens(number)) for number in numbers])
        last = pad([one for _, one in states if one is not None]) if self.last_hidden else None
        return Batch(self.supervision(numbers, seed, epoch), ids, pad([one for one, _ in states]), last)

    def finish(self) -> None:
        """See :meth:`FeatureSource.finish`."""
        if self.written is not None:
            self.written.finish()

    def close(self) -> None:
        """See :meth:`FeatureSource.close`."""
        if self.written is not None:
            self.written.close()

    def forward_block(self, rows: Sequence[RenderedConversation]) -> tuple[int, Callable[[], Block]]:
        """One batch of a cache through the target; see :func:`deepspec.cache.forward.forward_batch`."""
        return forward_batch(cast(Target, self.target), self.layers, self.last_hidden, rows)

    def hidden_states(self, numbers: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
        """Features [s, L*D] and last hidden states [s, D] of each; announced ones are computed in larger batches.

        A step's samples pass here once each, unpadded.
        """
        while missing := [number for number in numbers if number not in self._ready]:
            chosen = list(dict.fromkeys([*missing, *self._announced]))[: self.size]
            self._announced = [number for number in self._announced if number not in chosen]
            self._ready |= dict(zip(chosen, self.forward(chosen), strict=True))
        states = [self._ready[number] for number in numbers]
        for number in set(numbers):
            del self._ready[number]
        return states

    def forward(self, numbers: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
        """One pass of the target over these samples side by side."""
        lengths = torch.from_numpy(self.lengths[list(numbers)])
        ids = pad([torch.from_numpy(self.tokens(number)) for number in numbers])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        device = self.target.device
        made = cast(Target, self.target).forward(ids.to(device), self.layers, attention_mask=mask.to(device))
        return [(made.features[row, :s], made.last_hidden[row, :s]) for row, s in enumerate(lengths.tolist())]

    def fingerprint(self) -> dict[str, object]:
        """What the hidden states depend on: those of lossless caches of the same files, in order."""
        return {"source": self.name, "caches": self._fingerprints}
