"""Reference of the fused losses: every row, every logit, softmaxes materialised, gradients by autograd.

The tests compare results with it, ``benchmarks/bench_train_step.py`` time and memory.

S sequence, N blocks, K slots, V vocabulary; [..] any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PlainTerms:
    """Weighted sums of the terms over all rows, differentiable."""

    ce: Tensor
    soft_ce: Tensor
    l1: Tensor
    accept: Tensor  # [..], c* of every row, detached


def plain_head_terms(logits: Tensor, target_logits: Tensor | None, labels: Tensor, weights: Tensor) -> PlainTerms:
    """Weighted CE, soft CE and L1 sums of rows [.., V] against target logits [.., V].

    Args:
        logits: the draft's.
        target_logits: the target's, or None.
        labels: [..] int64.
        weights: [..], 0 on rows that are not supervised.
    """
    logits = logits.float()
    ce = (weights * F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(weights)).sum()
    zero = logits.new_zeros(())
    if target_logits is None:
        return PlainTerms(ce, zero, zero, torch.zeros_like(weights))
    q = target_logits.float().softmax(dim=-1)
    soft_ce = -(weights * (q * logits.log_softmax(dim=-1)).sum(dim=-1)).sum()
    distance = (logits.softmax(dim=-1) - q).abs().sum(dim=-1)
    return PlainTerms(ce, soft_ce, (weights * distance).sum(), 1.0 - 0.5 * distance.detach())


def supervised_slots_NK(loss_mask_S: Tensor, length: int, anchor_N: Tensor, block_size: int) -> Tensor:
    """[N, K] bool by the definition, one slot at a time: a + k + 1 < S and the mask is 1 on the run a+1..a+k+1."""
    out = torch.zeros(len(anchor_N), block_size, dtype=torch.bool)
    for n, anchor in enumerate(anchor_N.tolist()):
        for k in range(block_size):
            stop = anchor + k + 1
            out[n, k] = stop < length and bool(loss_mask_S[anchor + 1 : stop + 1].all())
    return out
