"""What a feature source hands to an algorithm's objective.

B sequences of the batch, S their padded length, L target layers read, D the target's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Supervision:
    """Which tokens are supervised, and the key of every random draw: (seed, epoch, sample id).

    The part of a batch that is known before any hidden state is read; it suffices to compute the batch's loss weight.
    Its tensors stay on the CPU: what to compute is planned there, so that no plan ever waits for the GPU.
    """

    loss_mask: Tensor  # [B, S] bool, 1 where the token itself is part of an answer; 0 on padding
    lengths: Tensor  # [B] int64, real tokens of each row
    sample_ids: tuple[int, ...]  # B of them
    seed: int
    epoch: int

    def generator(self, row: int) -> torch.Generator:
        """The CPU generator of one row's draws, independent of batch, rank and worker."""
        key = (self.seed * 1_000_003 + self.epoch) * 1_000_000_007 + self.sample_ids[row]
        return torch.Generator().manual_seed(key % (2**63 - 1))


@dataclass(frozen=True)
class Batch:
    """A padded batch of conversations with what the target computed for them."""

    supervision: Supervision
    input_ids: Tensor  # [B, S] int64
    features: Tensor  # [B, S, L*D], the outputs of the target layers, concatenated
    last_hidden: Tensor | None  # [B, S, D], the input of lm_head; None where the loss does not use it

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy on ``device``, hidden states cast to ``dtype``; the supervision stays on the CPU."""
        last = None if self.last_hidden is None else self.last_hidden.to(device, dtype, non_blocking=True)
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            features=self.features.to(device, dtype, non_blocking=True),
            last_hidden=last,
        )
