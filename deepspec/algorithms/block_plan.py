"""The loss plan of a block drafter: which anchors begin blocks, and which of their slots are supervised.

B batch, S sequence, N blocks (anchors) of a row, K drafting slots of a block, R supervised slots of the micro-batch, P
distinct target positions of those slots; of ranks that share conversations: of their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.batch import LossPlan, Part, Supervision
from deepspec.nn.losses import HeadRows


def draw_anchors(supervision: Supervision, num_anchors: int) -> list[Tensor]:
    """Anchors of every row: positions a with loss_mask[a] = loss_mask[a+1] = 1, at most ``num_anchors``, ascending.

    Drawn without replacement from (seed, epoch, sample id), so that resume and world size never change a draw.
    """
    mask = supervision.loss_mask.bool()
    drawn = []
    for row in range(len(mask)):
        length = int(supervision.lengths[row])
        valid = (mask[row, : length - 1] & mask[row, 1:length]).nonzero()[:, 0]
        if len(valid) > num_anchors:
            chosen = torch.randperm(len(valid), generator=supervision.generator(row))[:num_anchors]
            valid = valid[chosen].sort().values
        drawn.append(valid)
    return drawn


@dataclass(frozen=True)
class BlockPlan(LossPlan):
    """Which slots of which blocks are supervised, sorted by the target position they are compared with."""

    anchor_BN: Tensor  # int64, 0 where a row has fewer blocks
    slot_R: Tensor  # index of each supervised slot in [B, N, K] flattened
    position_P: Tensor  # index of each distinct target position a + k in [B, S] flattened
    label_R: Tensor  # index of each slot's label (position a + k + 1) in [B, S] flattened
    rows: HeadRows  # without labels yet: they need the tokens
    max_context_len: int  # one more than the last anchor: the context that any block sees
    num_slots: int  # K
    everyone_BN: Tensor  # the anchors of all ranks that share the conversations

    def shared(self, part: Part) -> BlockPlan:
        """See :meth:`LossPlan.shared`; a rank has every P-th block."""
        (B, N), K = self.anchor_BN.shape, self.num_slots
        n, block_R = part.rows(N), self.slot_R // K
        row_R, column_R = block_R // max(N, 1), block_R % max(N, 1)
        keep_R = column_R % part.of == part.number
        slot_R = ((row_R * n + column_R // part.of) * K + self.slot_R % K)[keep_R]
        rows, distinct = self.rows.kept(keep_R)
        anchor_BnP = F.pad(self.anchor_BN, (0, n * part.of - N)).view(B, n, part.of)
        return replace(
            self, weight=rows.weight_R.sum(), anchor_BN=anchor_BnP[..., part.number].contiguous(), slot_R=slot_R,
            position_P=self.position_P[distinct], label_R=self.label_R[keep_R], rows=rows,
            everyone_BN=anchor_BnP.transpose(1, 2).flatten(1),
        )  # fmt: skip

    @staticmethod
    def make(supervision: Supervision, anchors: list[Tensor], block_size: int, gamma: float | None) -> BlockPlan:
        """Supervised are the slots k with a + k + 1 < S and loss_mask 1 on the complete run a+1..a+k+1 (a prefix).

        Slot k weighs exp(-k / gamma); every slot 1 where ``gamma`` is None.
        """
        mask = supervision.loss_mask.bool()
        B, S = mask.shape
        N = max((len(a) for a in anchors), default=0)
        anchor_BN = torch.zeros(B, N, dtype=torch.int64)
        kept_BN = torch.zeros(B, N, dtype=torch.bool)
        for row, drawn in enumerate(anchors):
            anchor_BN[row, : len(drawn)], kept_BN[row, : len(drawn)] = drawn, True
        label_BNK = anchor_BN[..., None] + torch.arange(1, block_size + 1)
        inside = label_BNK < supervision.lengths[:, None, None]
        supervised = mask.gather(1, label_BNK.clamp_max(S - 1).flatten(1)).view_as(label_BNK) & inside
        supervised = supervised.cumprod(dim=-1).bool() & kept_BN[..., None]
        return BlockPlan.of_slots(anchor_BN, supervised, S, gamma)

    @staticmethod
    def of_slots(anchor_BN: Tensor, supervised_BNK: Tensor, length: int, gamma: float | None) -> BlockPlan:
        """The plan for the slots ``supervised``, in rows of ``length`` tokens."""
        B, _N, block_size = supervised_BNK.shape
        S, label_BNK = length, anchor_BN[..., None] + torch.arange(1, block_size + 1)
        slot_R = supervised_BNK.flatten().nonzero()[:, 0]
        label = (label_BNK + S * torch.arange(B)[:, None, None]).flatten()[slot_R]
        label, order = label.sort(stable=True)
        slot_R = slot_R[order]
        position_P, position_R = torch.unique_consecutive(label - 1, return_inverse=True)
        weight_R = torch.exp(-(slot_R % block_size).double() / (math.inf if gamma is None else gamma)).float()
        rows = HeadRows.plan(position_R, weight_R)
        context = int(anchor_BN.max()) + 1 if anchor_BN.numel() else 1
        weight = rows.weight_R.sum()
        return BlockPlan(weight, anchor_BN, slot_R, position_P, label, rows, context, block_size, anchor_BN)
