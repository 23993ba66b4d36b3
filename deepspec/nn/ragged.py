"""Keys and values whose rows have their own lengths, and attention over them: what decoding uses.

Rollback is a smaller length: nothing is copied, what is after a row's length is overwritten and never visible.

B rows of the buffer, R rows of a call, C slots of a row, N new tokens or queries, S slots in view, G key/value heads,
H query heads, r = H / G, E head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RaggedKV:
    """Keys and values of one layer in a buffer that grows on demand; the owner keeps the rows' lengths.

    Args:
        rows: B.
        capacity: C to begin with.
        heads: G.
        head_dim: E.
        like: a tensor whose dtype and device the buffer takes.
    """

    def __init__(self, rows: int, capacity: int, heads: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_zeros(rows, capacity, heads, head_dim)  # a masked key must be finite: no empty memory
        self.values = like.new_zeros(rows, capacity, heads, head_dim)

    def hold(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """Make room for ``num_slots`` slots of every row; the buffers."""
        self.keys, self.values = grown(self.keys, num_slots), grown(self.values, num_slots)
        return self.keys, self.values

    def index(self, slots_RN: Tensor, rows_R: Tensor) -> Tensor:
        """Where :meth:`write` finds ``slots`` of ``rows``, [R*N]; the same for all buffers of this capacity."""
        return (slots_RN + rows_R[:, None] * self.keys.shape[1]).flatten()

    def write(self, kv_RNGE: tuple[Tensor, Tensor], index: Tensor) -> None:
        """Write (keys, values) where ``index`` says."""
        for buffer, new in zip((self.keys, self.values), kv_RNGE, strict=True):
            buffer.flatten(0, 1).index_copy_(0, index, new.flatten(0, 1))

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows ``source`` [n] over rows ``target`` [n]."""
        self.keys[target], self.values[target] = self.keys[source], self.values[source]

    def view(self, rows: int | Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values [R, S, G, E] of the first ``rows`` rows, or of those named (a copy)."""
        if isinstance(rows, int):
            return self.keys[:rows, :num_slots], self.values[:rows, :num_slots]
        return self.keys[:, :num_slots].index_select(0, rows), self.values[:, :num_slots].index_select(0, rows)


def grown(buffer: Tensor, num_slots: int) -> Tensor:
    """``buffer`` [B, C, ..], or a copy half as long again (at least ``num_slots``) where it is too short."""
    capacity = buffer.shape[1]
    if num_slots <= capacity:
        return buffer
    larger = buffer.new_zeros(buffer.shape[0], max(num_slots, capacity * 3 // 2), *buffer.shape[2:])
    larger[:, :capacity] = buffer
    return larger


def score_bias(visible_RNS: Tensor, heads_per_key: int, dtype: torch.dtype) -> Tensor:
    """What :func:`attend_ragged` adds to the scores, [R, 1, r*N, S]: 0 where visible, -inf elsewhere.

    Made once a pass: scaled_dot_product_attention would make it from a boolean mask in every layer.
    """
    R, N, S = visible_RNS.shape
    bias = torch.zeros((R, 1, N, S), dtype=dtype, device=visible_RNS.device)
    return bias.masked_fill_(~visible_RNS[:, None], -torch.inf).repeat(1, 1, heads_per_key, 1)


def attend_ragged(query_RNHE: Tensor, kv_RSGE: tuple[Tensor, Tensor], bias: Tensor, scale: float | None) -> Tensor:
    """Attention of N queries a row over that row's keys; [R, N, H, E].

    The query heads that share a key head are folded into the query axis, so that no key is repeated.
    """
    R, N, H, E = query_RNHE.shape
    keys, values = (part.transpose(1, 2) for part in kv_RSGE)  # [R, G, S, E]
    G = keys.shape[1]
    folded = query_RNHE.view(R, N, G, H // G, E).permute(0, 2, 3, 1, 4).reshape(R, G, -1, E)  # [R, G, r*N, E]
    mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=bias, scale=scale)
    return mixed.view(R, G, H // G, N, E).permute(0, 3, 1, 2, 4).reshape(R, N, H, E)
