"""The target's KV cache while decoding: one static buffer, a length per row, and packed queries.

A forward of the target sees its tokens *packed*: one sequence of T tokens of several rows, each with its own count.
Linear layers never compute padding, so verifying costs only the verified tokens. Attention unpacks to [rows, queries]
and back (:func:`_ragged_attention`, set through transformers' attention registry by :func:`ragged_attention`).

Rolling back is lowering a row's length: what comes after it is overwritten by the next tokens and never visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from deepspec.decoding.fused import FusedDecoder
from deepspec.errors import TargetError
from deepspec.nn.ragged import attend_ragged, grown, score_bias
from deepspec.nn.tree import Tree
from deepspec.targets.capture import TargetOutput
from deepspec.targets.load import Target
from deepspec.targets.positions import known_positions

NAME = "deepspec_ragged"
HARMLESS = {  # arguments of attention that change nothing here: no dropout in eval, positions are in queries and keys
    "dropout", "is_causal", "position_ids", "position_embeddings", "cache_position", "use_cache", "cache",
    "past_key_values", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
}  # fmt: skip


@dataclass
class PackedBatch:
    """Where the T packed tokens of a forward belong; R attending rows, Q the most queries of a row, L keys in view."""

    first_row: int  # the attending rows are `rows` where given, else first_row .. first_row + R
    num_rows: int
    rows: Tensor | None
    queries: int
    max_context_len: int  # L
    rectangular: bool  # every attending row has exactly Q queries: packed order is padded order
    positions: Tensor  # [T] position of each token in its row
    writes: Tensor  # [T] index of each token in the flattened buffer [B * capacity]
    dense: Tensor  # [T] index of each token in the padded queries [R * Q]
    query_positions: Tensor  # [R, Q]; 0 for padding, which then sees one key and is dropped
    index: Tensor  # [R, Q] packed index of each row's tokens; padding repeats the row's last
    counts: Tensor  # [R] tokens of each row
    tree: Tree | None = None  # of which the Q tokens of every row are the nodes; None: they follow each other
    attended: list[int | None] = field(default_factory=list)  # the window of each attention of a layer that was asked
    _folded: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _windows: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Which keys each query sees, [R, 1, Q, L] bool: no later one, and with ``window`` none that far back."""
        if self.tree is not None:  # the root is a row's first query; 0 for padding, which sees one key here too
            return self.tree.visible(self.query_positions[:, 0], slice(None), self.max_context_len, window)[:, None]
        keys = torch.arange(self.max_context_len, device=self.positions.device)
        own = self.query_positions[:, None, :, None]
        visible = keys <= own
        return visible if window is None else visible & (keys > own - window)

    def window_mask(self, window: int) -> Tensor:
        """:meth:`mask` of a window, made once for all layers."""
        if window not in self._windows:
            self._windows[window] = self.mask(window)
        return self._windows[window]

    def bias(self, mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """``mask`` as :func:`score_bias` for ``groups`` query heads a KV head, made once for all layers."""
        key = (id(mask), groups)
        if key not in self._folded:  # the mask is stored with it, so that no other object takes its id
            self._folded[key] = mask, score_bias(mask[:, 0], groups, dtype)
        return self._folded[key][1]

    def attend(self, packed: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor, scale: float | None) -> Tensor:
        """Attention of packed queries [T, heads, D] over each row's own keys, [R, L, kv heads, D]; [T, heads, D]."""
        R, Q = self.num_rows, self.queries
        bias = self.bias(mask, packed.shape[1] // kv[0].shape[2], packed.dtype)
        if not self.rectangular:
            packed = packed.new_zeros(R * Q, *packed.shape[1:]).index_copy_(0, self.dense, packed)
        mixed = attend_ragged(packed.reshape(R, Q, *packed.shape[1:]), kv, bias, scale).flatten(0, 1)
        return mixed if self.rectangular else mixed.index_select(0, self.dense)


@dataclass(frozen=True)
class _Layout:
    """What of a packed batch depends on its counts alone."""

    rows: np.ndarray  # [R] 0 .. R - 1
    slots: np.ndarray  # [Q] 0 .. Q - 1
    inside: np.ndarray  # [R, Q] which of the padded queries are tokens
    rectangular: bool
    fixed: np.ndarray  # the batch's dense, index and counts, concatenated


@lru_cache(maxsize=256)
def _layout(counts: tuple[int, ...]) -> _Layout:
    """The layout for ``counts`` [R] tokens; rounds repeat theirs, above all where everything is verified."""
    own = np.array(counts, dtype=np.int64)
    slots = np.arange(own.max())
    inside = slots < own[:, None]
    index = (own.cumsum() - own)[:, None] + np.minimum(slots, own[:, None] - 1)
    index = index.clip(0, own.sum() - 1)  # rows without tokens
    fixed = np.concatenate((np.flatnonzero(inside), index.ravel(), own))
    return _Layout(np.arange(len(own)), slots, inside, bool(inside.all()), fixed)


class RaggedCache(Cache):
    """Keys and values of B rows over a buffer of ``capacity`` positions each, growing when a row needs more.

    ``lengths`` (host, [B]) are the committed positions; :meth:`plan` lays out a forward after them, and :meth:`commit`
    keeps as many of the written positions as were accepted.

    """

    def __init__(self, num_rows: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.num_rows, self.capacity, self.device = num_rows, capacity, device
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self._keys: dict[int, Tensor] = {}  # layer -> [B, capacity, kv heads, head dim]
        self._values: dict[int, Tensor] = {}
        self.batch: PackedBatch | None = None

    def plan(self, counts: np.ndarray, rows: np.ndarray | None = None, tree: Tree | None = None) -> PackedBatch:
        """Lay out a forward in which row r brings ``counts[r]`` tokens ([R] int64, at least one positive).

        The rows are the first R, or ``rows`` [R] ascending. With ``tree`` a row brings all of its nodes, or nothing.
        """
        layout = _layout(tuple(counts.tolist()))
        own = layout.rows if rows is None else rows
        lengths = self.lengths[own]
        max_context_len = int((lengths + counts).max())
        self._reserve(max_context_len)
        writes = (lengths + own * self.capacity)[:, None] + layout.slots
        positions = lengths[:, None] + (layout.slots if tree is None else tree.depths)
        if layout.rectangular:
            parts = [positions.ravel(), writes.ravel(), layout.fixed, own]
        else:
            inside = layout.inside
            parts = [positions[inside], writes[inside], layout.fixed, own, (positions * inside).ravel()]
        moved = torch.from_numpy(np.concatenate(parts)).to(self.device, non_blocking=True)  # one copy for all of them
        total, padded = len(parts[0]), layout.inside.size
        pieces = moved.split([total, total, total, padded, len(counts), len(own), *map(len, parts[4:])])
        queries = layout.inside.shape[1]
        self.batch = PackedBatch(
            first_row=int(own[0]),
            num_rows=len(own),
            rows=None if own[-1] - own[0] == len(own) - 1 else pieces[5],  # neighbours are seen without a copy
            queries=queries,
            max_context_len=max_context_len,
            rectangular=layout.rectangular,
            positions=pieces[0],
            writes=pieces[1],
            dense=pieces[2],
            query_positions=(pieces[0] if layout.rectangular else pieces[6]).view(-1, queries),
            index=pieces[3].view(-1, queries),
            counts=pieces[4],
            tree=tree,
        )
        return self.batch

    def plan_static(self, lengths: Tensor, counts: Tensor, queries: int, max_context_len: int) -> PackedBatch:
        """Lay out Q tokens of each of the first R rows, of which ``counts`` [R] matter; nothing is read of the host.

        What is written for the others comes after a row's own tokens, where the next forward writes again.

        Args:
            lengths: [R] committed positions, int64 on the device.
            counts: [R] int64 on the device.
            queries: Q.
            max_context_len: L, at least Q more than any row's length; the buffers are that long already.
        """
        R, device = len(lengths), self.device
        positions = lengths[:, None] + torch.arange(queries, device=device)
        first = torch.arange(R, device=device)[:, None] * self.capacity
        dense = torch.arange(R * queries, device=device)
        self.batch = PackedBatch(
            first_row=0, num_rows=R, rows=None, queries=queries, max_context_len=max_context_len, rectangular=True,
            positions=positions.flatten(), writes=(positions + first).flatten(), dense=dense,
            query_positions=positions, index=dense.view(R, queries), counts=counts,
        )  # fmt: skip
        return self.batch

    def hold(self, max_context_len: int) -> tuple[Tensor, ...]:
        """Make room for ``max_context_len`` positions of every row; the buffers that forwards then use."""
        self._reserve(max_context_len)
        return (*self._keys.values(), *self._values.values())

    def commit(self, counts: np.ndarray) -> None:
        """Keep the first ``counts[r]`` positions that the last forward wrote for each of the first R rows."""
        self.lengths[: len(counts)] += counts

    def keep_path(self, path: Tensor) -> None:
        """Move what the last forward wrote for the nodes ``path`` [R, n] of each of the first R rows to the front."""
        if self.batch is None:
            raise RuntimeError("RaggedCache.plan comes before keep_path")
        row = torch.arange(len(path), device=path.device)[:, None]
        root = self.batch.query_positions[:, :1]
        target = root + torch.arange(path.shape[1], device=path.device)
        for buffers in (self._keys, self._values):
            for buffer in buffers.values():
                buffer[row, target] = buffer[row, root + path]

    def clear(self, row: int) -> None:
        """Forget a row: the next prompt starts at position 0."""
        self.lengths[row] = 0

    def move_rows(self, source: Sequence[int], target: Sequence[int], max_context_len: int) -> None:
        """Rows ``target`` take over the first ``max_context_len`` positions of rows ``source``."""
        self.lengths[list(target)] = self.lengths[list(source)]
        for buffers in (self._keys, self._values):
            for buffer in buffers.values():
                for old, new in zip(source, target, strict=True):
                    buffer[new, :max_context_len] = buffer[old, :max_context_len]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the packed keys and values [1, H, T, D] and return those of the attending rows, [R, H, L, D]."""
        keys, values = self.write(layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the packed keys and values [T, H, D] and return those of the attending rows, [R, L, H, D]."""
        return self._put(self._keys, layer, keys), self._put(self._values, layer, values)

    def stored(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The buffers of keys and values of each layer, in order; [B, capacity, heads, E] each."""
        for layer in sorted(self._keys):
            yield self._keys[layer], self._values[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row's committed positions."""
        return int(self.lengths.max())

    def _put(self, buffers: dict[int, Tensor], layer: int, states: Tensor) -> Tensor:
        batch = self.batch
        if batch is None:
            raise RuntimeError("RaggedCache.plan comes before the forward")
        if layer not in buffers:  # zeros: a masked key must be finite, or its zero weight still gives NaN
            buffers[layer] = states.new_zeros(self.num_rows, self.capacity, *states.shape[1:])
        buffer = buffers[layer]
        buffer.flatten(0, 1).index_copy_(0, batch.writes, states)
        if batch.rows is not None:
            return buffer[:, : batch.max_context_len].index_select(0, batch.rows)
        return buffer[batch.first_row : batch.first_row + batch.num_rows, : batch.max_context_len]

    def _reserve(self, max_context_len: int) -> None:
        for buffers in (self._keys, self._values):
            for layer, buffer in buffers.items():
                buffers[layer] = grown(buffer, max_context_len)
        self.capacity = next((buffer.shape[1] for buffer in self._keys.values()), max(max_context_len, self.capacity))


_CURRENT: list[PackedBatch] = []


def _ragged_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [R, kv heads, L, D]
    value: Tensor,
    attention_mask: Tensor,  # [R, 1, Q, L]
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of packed queries over each row's own keys; returns [1, T, heads, D].

    Raises:
        TargetError: the model hands over what is not honoured here (sinks, a softcap, a bias).
    """
    if unknown := {name for name, value in kwargs.items() if value is not None} - HARMLESS:
        names = ", ".join(sorted(unknown))
        raise TargetError(
            "its attention takes what packed decoding does not honour", key=names, found=type(module).__name__,
            wanted="queries, keys, values, a mask, a scale and a sliding window",
        )  # fmt: skip
    if value.shape[-1] != key.shape[-1]:
        found, wanted = f"{value.shape[-1]} beside {key.shape[-1]}", "values of the size of the keys"
        raise TargetError("its attention has values of another size than keys", found=found, wanted=wanted)
    batch = _CURRENT[-1]
    batch.attended.append(sliding_window)
    mask = attention_mask if sliding_window is None else batch.window_mask(sliding_window)
    kv = (key.transpose(1, 2), value.transpose(1, 2))
    return batch.attend(query[0].transpose(0, 1), kv, mask, scaling)[None], None


AttentionInterface.register(NAME, _ragged_attention)


@contextmanager
def ragged_attention(decoder: nn.Module, batch: PackedBatch) -> Iterator[None]:
    """Within the block, ``decoder`` attends by ``batch``; afterwards by its own attention again."""
    config: Any = decoder.config
    before = config._attn_implementation
    config._attn_implementation_internal = NAME
    _CURRENT.append(batch)
    try:
        yield
    finally:
        _CURRENT.pop()
        config._attn_implementation_internal = before


class PackedTarget:
    """A target that runs packed batches over a :class:`RaggedCache`.

    Args:
        target: the model.
        layers: the layer outputs that the draft reads; none for the baseline.
        num_rows: B.
        capacity: positions a row holds before the buffer grows.
    """

    trees = True  # whether the tokens of a row may be the nodes of a tree

    def __init__(self, target: Target, layers: Sequence[int], num_rows: int, capacity: int) -> None:
        self.target, self.layers = target, tuple(layers)
        self.cache = RaggedCache(num_rows, capacity, target.device)
        config = target.spec.config
        kinds = config.get("layer_types") or ()
        self._window = config.get("sliding_window") if "sliding_attention" in kinds else None
        self._kinds = kinds or ("full_attention",) * target.spec.num_layers
        self._fused = FusedDecoder.of(target)

    def forward(self, batch: PackedBatch, input_ids: Tensor) -> TargetOutput:
        """Run the packed tokens [T] of a planned batch: features [T, L*D] and last hidden states [T, D]."""
        masks = {"full_attention": batch.mask(None)}
        if self._window is not None:
            masks["sliding_attention"] = batch.window_mask(self._window)
        if self._fused is not None:
            return self._run_fused(self._fused, batch, input_ids, masks)
        mask = masks["full_attention"] if self._window is None else masks
        with ragged_attention(self.target.decoder, batch):
            positions = known_positions(self.target.spec.config, batch.positions[None])
            output = self.target.forward(input_ids[None], self.layers, positions, mask, past_key_values=self.cache)
        return TargetOutput(output.features[0], output.last_hidden[0])

    def hold(self, max_context_len: int) -> tuple[Tensor, ...]:
        """Make room for contexts of ``max_context_len``; the memory that forwards then use and that may move."""
        table = () if self._fused is None else self._fused.hold(max_context_len)
        return (*self.cache.hold(max_context_len), *table)

    def _run_fused(
        self, fused: FusedDecoder, batch: PackedBatch, input_ids: Tensor, masks: Mapping[str, Tensor]
    ) -> TargetOutput:
        def attend(queries: Tensor, keys: Tensor, values: Tensor, layer: int, scale: float) -> Tensor:
            kv = self.cache.write(layer, keys, values)
            return batch.attend(queries, kv, masks[self._kinds[layer]], scale)

        return fused.forward(input_ids, batch.positions, batch.max_context_len, self.layers, attend)
