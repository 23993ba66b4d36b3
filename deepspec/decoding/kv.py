"""The target's KV cache while decoding: one static buffer, a length per row, and packed queries.

A forward of the target sees its tokens *packed*: one sequence of T tokens that belong to several rows, each row
bringing as many as it likes. Linear layers therefore never compute padding, and the price of verifying is the number of
tokens verified. Only the attention itself is unpacked to [rows, queries] and back, by :func:`_ragged_attention`, which
:func:`ragged_attention` installs through transformers' own attention registry.

Rolling back is lowering a row's length: what lies behind it is overwritten by the next tokens and never visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from deepspec.targets.capture import TargetOutput
from deepspec.targets.load import Target

NAME = "deepspec_ragged"


@dataclass
class Step:
    """Where the T packed tokens of a forward belong; R attending rows, Q the most queries of a row, L keys in view."""

    first_row: int  # the attending rows are `rows` where given, else first_row .. first_row + R
    num_rows: int
    rows: Tensor | None
    queries: int
    longest: int
    rectangular: bool  # every attending row has exactly Q queries: packed order is padded order
    positions: Tensor  # [T] position of each token in its row
    writes: Tensor  # [T] index of each token in the flattened buffer [B * capacity]
    dense: Tensor  # [T] index of each token in the padded queries [R * Q] of the attending rows
    grid: Tensor  # [T] index of each token in the padded grid [B * Q] of all rows
    query_positions: Tensor  # [R, Q]; 0 for padding, which then sees one key and is dropped
    starts: Tensor  # [B] index in the packed order of each row's first token; 0 for rows without tokens
    counts: Tensor  # [B] tokens of each row
    _folded: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Which keys each query sees, [R, 1, Q, L] bool: no later one, and with ``window`` none that far back."""
        keys = torch.arange(self.longest, device=self.positions.device)
        own = self.query_positions[:, None, :, None]
        visible = keys <= own
        return visible if window is None else visible & (keys > own - window)

    def folded(self, mask: Tensor, groups: int) -> Tensor:
        """``mask`` for queries with ``groups`` heads per KV head folded into the query axis: [R, 1, groups * Q, L]."""
        key = (id(mask), groups)
        if key not in self._folded:
            self._folded[key] = mask.repeat(1, 1, groups, 1)
        return self._folded[key]


class RaggedCache(Cache):
    """Keys and values of B rows over a buffer of ``capacity`` positions each, growing when a row needs more.

    ``lengths`` (host, [B]) are the committed positions; :meth:`plan` lays out a forward behind them, and :meth:`commit`
    keeps as many of the written positions as were accepted.
    """

    def __init__(self, num_rows: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.num_rows, self.capacity, self.device = num_rows, capacity, device
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self._keys: dict[int, Tensor] = {}  # layer -> [B, capacity, kv heads, head dim]
        self._values: dict[int, Tensor] = {}
        self.step: Step | None = None

    def plan(self, counts: np.ndarray) -> Step:
        """Lay out a forward in which row b brings ``counts[b]`` tokens ([B] int64, at least one positive)."""
        active = np.flatnonzero(counts)
        first, span = int(active[0]), int(active[-1] - active[0] + 1)
        gather = span > 2 * len(active)  # a contiguous view costs no copy; take it unless it is mostly idle rows
        attending = active if gather else np.arange(first, first + span)
        longest, queries = int((self.lengths + counts)[attending].max()), int(counts.max())
        self._reserve(longest)
        own = counts[attending]
        rows = np.repeat(attending, own)
        starts = np.concatenate(([0], np.cumsum(own)[:-1]))
        slots = np.arange(len(rows)) - np.repeat(starts, own)
        positions = self.lengths[rows] + slots
        dense = np.repeat(np.arange(len(attending)), own) * queries + slots
        grid = rows * queries + slots
        padded = np.zeros(len(attending) * queries, dtype=np.int64)
        padded[dense] = positions
        row_starts = np.zeros(self.num_rows, dtype=np.int64)
        row_starts[attending] = np.where(own > 0, starts, 0)
        parts = (positions, rows * self.capacity + positions, dense, grid, padded, row_starts, counts, attending)
        moved = torch.from_numpy(np.concatenate(parts)).to(self.device, non_blocking=True)  # one copy for all of them
        pieces = moved.split([len(part) for part in parts])
        self.step = Step(
            first_row=first,
            num_rows=len(attending),
            rows=pieces[7] if gather else None,
            queries=queries,
            longest=longest,
            rectangular=len(rows) == len(attending) * queries,
            positions=pieces[0],
            writes=pieces[1],
            dense=pieces[2],
            grid=pieces[3],
            query_positions=pieces[4].view(-1, queries),
            starts=pieces[5],
            counts=pieces[6],
        )
        return self.step

    def commit(self, counts: np.ndarray) -> None:
        """Keep the first ``counts[b]`` positions that the last forward wrote for row b ([B])."""
        self.lengths += counts

    def clear(self, row: int) -> None:
        """Forget a row: the next prompt starts at position 0."""
        self.lengths[row] = 0

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy positions of the flattened buffer [B * capacity], in every layer: what a verified tree leaves behind."""
        for buffers in (self._keys, self._values):
            for buffer in buffers.values():
                flat = buffer.flatten(0, 1)
                flat.index_copy_(0, target, flat.index_select(0, source))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the packed keys and values [1, H, T, D] and return those of the attending rows, [R, H, L, D]."""
        return self._put(self._keys, layer_idx, key_states), self._put(self._values, layer_idx, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row's committed positions."""
        return int(self.lengths.max())

    def _put(self, buffers: dict[int, Tensor], layer: int, states: Tensor) -> Tensor:
        step = self.step
        if step is None:
            raise RuntimeError("RaggedCache.plan comes before the forward")
        if layer not in buffers:  # zeros: a masked key must be finite, or its zero weight still gives NaN
            heads, width = states.shape[1], states.shape[3]
            buffers[layer] = states.new_zeros(self.num_rows, self.capacity, heads, width)
        buffer = buffers[layer]
        buffer.flatten(0, 1).index_copy_(0, step.writes, states[0].transpose(0, 1))
        if step.rows is not None:
            return buffer[:, : step.longest].index_select(0, step.rows).transpose(1, 2)
        return buffer[step.first_row : step.first_row + step.num_rows, : step.longest].transpose(1, 2)

    def _reserve(self, longest: int) -> None:
        if longest <= self.capacity:
            return
        grown = max(longest, self.capacity * 3 // 2)
        for buffers in (self._keys, self._values):
            for layer, buffer in buffers.items():
                larger = buffer.new_zeros(self.num_rows, grown, *buffer.shape[2:])
                larger[:, : self.capacity] = buffer
                buffers[layer] = larger
        self.capacity = grown


_CURRENT: list[Step] = []


def _ragged_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [R, kv heads, L, D]
    value: Tensor,
    attention_mask: Tensor,  # [R, 1, Q, L]
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of packed queries over each row's own keys; returns [1, T, heads, D]."""
    step = _CURRENT[-1]
    heads, width = query.shape[1], query.shape[3]
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    packed = query[0].transpose(0, 1)  # [T, heads, D]
    shape = (step.num_rows, step.queries, kv_heads, groups, width)
    if not step.rectangular:
        packed = packed.new_zeros(step.num_rows * step.queries, heads, width).index_copy_(0, step.dense, packed)
    folded = packed.reshape(shape).permute(0, 2, 3, 1, 4).reshape(step.num_rows, kv_heads, groups * step.queries, width)
    mask = step.folded(attention_mask, groups)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    output = output.view(step.num_rows, kv_heads, groups, step.queries, width).permute(0, 3, 1, 2, 4)
    flat = output.reshape(step.num_rows * step.queries, heads, width)
    if not step.rectangular:
        flat = flat.index_select(0, step.dense)
    return flat[None], None


AttentionInterface.register(NAME, _ragged_attention)


@contextmanager
def ragged_attention(decoder: nn.Module, step: Step) -> Iterator[None]:
    """Within the block, ``decoder`` attends by ``step``; its own attention comes back afterwards."""
    config: Any = decoder.config
    before = config._attn_implementation
    config._attn_implementation_internal = NAME
    _CURRENT.append(step)
    try:
        yield
    finally:
        _CURRENT.pop()
        config._attn_implementation_internal = before


class PackedTarget:
    """A target that runs packed steps over a :class:`RaggedCache`.

    Args:
        target: the model.
        layers: the layer outputs that the draft reads; none for plain decoding.
        num_rows: B.
        capacity: positions a row holds before the buffer grows.
    """

    def __init__(self, target: Target, layers: Sequence[int], num_rows: int, capacity: int) -> None:
        self.target, self.layers = target, tuple(layers)
        self.cache = RaggedCache(num_rows, capacity, target.device)
        config = target.spec.config
        kinds = config.get("layer_types") or ()
        self._window = config.get("sliding_window") if "sliding_attention" in kinds else None

    def forward(self, step: Step, input_ids: Tensor, tree: Tensor | None = None) -> TargetOutput:
        """Run the packed tokens [T] of a planned step: features [T, L*D] and last hidden states [T, D].

        ``tree`` [R, 1, Q, L] bool further restricts what a query sees (siblings of a token tree).
        """
        full = step.mask(None) if tree is None else step.mask(None) & tree
        masks: Tensor | dict[str, Tensor] = full
        if self._window is not None:
            masks = {"full_attention": full, "sliding_attention": full & step.mask(self._window)}
        with ragged_attention(self.target.decoder, step):
            output = self.target.forward(
                input_ids[None], self.layers, step.positions[None], masks, past_key_values=self.cache
            )
        return TargetOutput(output.features[0], output.last_hidden[0])
