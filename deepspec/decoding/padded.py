"""Targets whose attention or state is their own: two ways of decoding that leave both to the model.

:class:`PaddedTarget`: rows side by side with padding, the model's own attention and masks. Keys and values lie in the
buffer of :mod:`deepspec.decoding.kv`; for a forward those of each row are laid out as ``generate`` has them, padded on
the left, so that windows, chunks and sinks see neighbouring tokens. Rolling back is a smaller length, as there.

:class:`ReplayTarget`: for layers that keep a state (linear attention, convolutions, Mamba), which no length takes back.
Each row has the model's own cache as of some committed token, and the tokens after it. A forward runs these and the new
tokens over a copy; where all of them are committed the copy is the cache from then on, otherwise it is dropped, and the
accepted ones come again with the next forward. Without a cache (``keeps_cache=False``) the complete text runs each
time: right for every causal model, and the slowest.

T packed tokens, R attending rows, Q the most tokens of a row, L the most committed positions of one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from deepspec.decoding.kv import PackedBatch, RaggedCache
from deepspec.nn.tree import Tree
from deepspec.targets.capture import TargetOutput
from deepspec.targets.load import Target
from deepspec.targets.positions import known_positions

MOST_REPLAYED = 32  # tokens of a row that come again; more are run once for all
APPENDED = ("keys", "values")  # tensors of a cache's layer that grow into new ones and are never written into


class RowCache(RaggedCache):
    """A :class:`RaggedCache` that keeps on the host which rows a forward has, and their committed positions."""

    attending: np.ndarray  # [R] rows
    past: np.ndarray  # [R] their committed positions

    def plan(self, counts: np.ndarray, rows: np.ndarray | None = None, tree: Tree | None = None) -> PackedBatch:
        """See :meth:`RaggedCache.plan`."""
        self.attending = np.arange(len(counts)) if rows is None else rows
        self.past = self.lengths[self.attending].copy()
        self.counts = counts
        return super().plan(counts, rows, tree)


class PaddedTarget:
    """A target that runs padded rows through its own attention; the arguments are those of ``PackedTarget``."""

    trees = False

    def __init__(self, target: Target, layers: Sequence[int], num_rows: int, capacity: int) -> None:
        self.target, self.layers = target, tuple(layers)
        self.cache = RowCache(num_rows, capacity, target.device)

    def forward(self, batch: PackedBatch, input_ids: Tensor) -> TargetOutput:
        """Run the packed tokens [T] of a planned batch: features [T, L*D] and last hidden states [T, D]."""
        past, counts, Q = self.cache.past, self.cache.counts, batch.queries
        L, device = int(past.max()), input_ids.device
        # padding of a row comes after its tokens: none of them sees it; its positions stay those of the last token
        steps = np.minimum(np.arange(Q), np.maximum(counts - 1, 0)[:, None])
        positions = known_positions(self.target.spec.config, torch.from_numpy(past[:, None] + steps).to(device))
        ids = input_ids.new_zeros(batch.num_rows * Q).index_copy_(0, batch.dense, input_ids).view(-1, Q)
        own = DynamicCache()
        mask = torch.from_numpy(np.arange(-L, Q) >= -past[:, None]).to(device).long()
        if L:
            self._fill(own, L)
        output = self.target.forward(ids, self.layers, positions, mask, past_key_values=own)
        filled: list[Any] = own.layers
        for number, layer in enumerate(filled):
            new = (part[:, :, L:].transpose(1, 2).flatten(0, 1)[batch.dense] for part in (layer.keys, layer.values))
            self.cache.write(number, *new)
        features, last = (part.flatten(0, 1)[batch.dense] for part in (output.features, output.last_hidden))
        return TargetOutput(features, last)

    def _fill(self, own: DynamicCache, L: int) -> None:
        """Put the committed keys and values of the attending rows into ``own``, L positions padded on the left."""
        slots = np.maximum(np.arange(L) - (L - self.cache.past[:, None]), 0)
        index = torch.from_numpy(self.cache.attending[:, None] * self.cache.capacity + slots).to(self.target.device)
        for number, pair in enumerate(self.cache.stored()):
            keys, values = (buffer.flatten(0, 1)[index].transpose(1, 2) for buffer in pair)  # [R, heads, L, E]
            own.update(keys, values, number)


@dataclass
class _Row:
    """One row of a :class:`ReplayTarget`. Replaced, never changed, so that rows may share it."""

    cache: Any = None  # the model's own, after the first ``base`` tokens of the row
    base: int = 0
    after: tuple[int, ...] = ()  # the tokens that were run after them, committed or not
    ahead: Any = None  # the cache with those tokens too


class ReplayCache(RowCache):
    """The rows of a :class:`ReplayTarget`: lengths as in a :class:`RaggedCache`, and each row's own state."""

    def __init__(self, num_rows: int, capacity: int, device: torch.device) -> None:
        super().__init__(num_rows, capacity, device)
        self.states = [_Row() for _ in range(num_rows)]

    def clear(self, row: int) -> None:
        """See :meth:`RaggedCache.clear`."""
        super().clear(row)
        self.states[row] = _Row()

    def move_rows(self, source: Sequence[int], target: Sequence[int], max_context_len: int) -> None:
        """See :meth:`RaggedCache.move_rows`."""
        super().move_rows(source, target, max_context_len)
        for old, new in zip(source, target, strict=True):
            self.states[new] = self.states[old]


class ReplayTarget:
    """A target whose rows run one by one over caches of their own; the arguments are those of ``PackedTarget``.

    ``keeps_cache`` False runs the complete text of a row in every forward.
    """

    trees = False

    def __init__(
        self, target: Target, layers: Sequence[int], num_rows: int, capacity: int, keeps_cache: bool = True
    ) -> None:
        self.target, self.layers, self.keeps_cache = target, tuple(layers), keeps_cache
        self.cache = ReplayCache(num_rows, capacity, target.device)

    def forward(self, batch: PackedBatch, input_ids: Tensor) -> TargetOutput:
        """Run the packed tokens [T] of a planned batch: features [T, L*D] and last hidden states [T, D]."""
        outputs = []
        pieces = iter(input_ids.split(self.cache.counts.tolist()))
        for row, past, new in zip(self.cache.attending, self.cache.past, pieces, strict=True):
            if len(new):
                state = self._settled(self.cache.states[row], int(past))
                output, self.cache.states[row] = self._run(state, new)
                outputs.append(output)
        features, last = (torch.cat([getattr(one, name) for one in outputs]) for name in ("features", "last_hidden"))
        return TargetOutput(features, last)

    def _settled(self, row: _Row, length: int) -> _Row:
        """The row as of its ``length`` committed tokens: what was run and rejected is forgotten."""
        kept = length - row.base
        if kept == len(row.after) and row.ahead is not None:
            return _Row(row.ahead, length)
        settled = _Row(row.cache, row.base, row.after[:kept])
        if self.keeps_cache and len(settled.after) > MOST_REPLAYED:
            _, ahead = self._run(settled, torch.empty(0, dtype=torch.long, device=self.target.device))
            settled = _Row(ahead.ahead, length)
        return settled

    def _run(self, row: _Row, new: Tensor) -> tuple[TargetOutput, _Row]:
        """The new tokens [n] of a row after its committed ones: their output, and the row with them."""
        ids = torch.cat((torch.tensor(row.after, dtype=torch.long, device=new.device), new))
        own = self._cache_after(row)
        positions = torch.arange(row.base, row.base + len(ids), device=new.device)[None]
        positions = known_positions(self.target.spec.config, positions)
        made = self.target.forward(ids[None], self.layers, positions, None, past_key_values=own)
        begin = len(row.after)
        output = TargetOutput(made.features[0, begin:], made.last_hidden[0, begin:])
        return output, _Row(row.cache, row.base, tuple(ids.tolist()), own)

    def _cache_after(self, row: _Row) -> Any:
        if not self.keeps_cache:
            return None
        config: Any = self.target.decoder.config
        return DynamicCache(config=config) if row.cache is None else snapshot(row.cache)


def snapshot(cache: Any) -> Any:
    """A copy of a cache that a forward may write into; what only grows into new tensors is shared."""
    copied = copy.copy(cache)
    copied.layers = [_copied_layer(layer) for layer in cache.layers]
    return copied


def _copied_layer(layer: Any) -> Any:
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if name not in APPENDED:
            setattr(copied, name, _copied(value))
    return copied


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value
