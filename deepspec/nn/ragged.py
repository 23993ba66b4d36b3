"""A key/value buffer whose rows have their own lengths: rollback is a smaller length, nothing is copied.

B rows, C capacity in positions, N new positions, G key/value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RaggedKV:
    """Keys and values of one layer in a buffer of fixed capacity; the owner keeps the rows' lengths.

    Args:
        rows: B.
        capacity: C.
        heads: G.
        head_dim: E.
        like: a tensor whose dtype and device the buffer takes.
    """

    def __init__(self, rows: int, capacity: int, heads: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_zeros(rows, capacity, heads, head_dim)
        self.values = like.new_zeros(rows, capacity, heads, head_dim)

    def write(self, kv_BNGE: tuple[Tensor, Tensor], start_B: Tensor) -> None:
        """Write (keys, values) of N positions of every row from its ``start`` on."""
        slots = start_B[:, None] + torch.arange(kv_BNGE[0].shape[1], device=start_B.device)
        slots = slots.clamp_max_(self.keys.shape[1] - 1)
        rows = torch.arange(len(start_B), device=start_B.device)[:, None]
        self.keys[rows, slots], self.values[rows, slots] = kv_BNGE

    def view(self, reach: int) -> tuple[Tensor, Tensor]:
        """The first ``reach`` positions: (keys, values), each [B, reach, G, E]."""
        return self.keys[:, :reach], self.values[:, :reach]
