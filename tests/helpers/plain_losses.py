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


def plain_rows(logits: Tensor, target_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Every loss of the table that is one of rows, [R] each, differentiable."""
    log_p, log_q = logits.float().log_softmax(dim=-1), target_logits.float().log_softmax(dim=-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (0.5 * (p + q)).log()
    kl = (q * (log_q - log_p)).sum(dim=-1)
    tv = 0.5 * (p - q).abs().sum(dim=-1)
    share = torch.exp(-3 * (1 - tv.detach()))
    return {
        "ce": -log_p.gather(1, labels[:, None])[:, 0],
        "soft_ce": -(q * log_p).sum(dim=-1),
        "kl": kl,
        "reverse_kl": (p * (log_p - log_q)).sum(dim=-1),
        "jsd": 0.5 * (p * (log_p - log_m)).sum(dim=-1) + 0.5 * (q * (log_q - log_m)).sum(dim=-1),
        "l1": 2 * tv,
        "tv": tv,
        "nla": -torch.log((1 - tv).clamp_min(1e-5)),
        "lk_hybrid": share * kl + (1 - share) * tv,
    }


def plain_d_pace(label_K: list[float], supervised_K: list[bool], alpha: float) -> list[float]:
    """The weight of each slot of one chain, by its definition."""
    reach, product = [], 1.0
    for probability, supervised in zip(label_K, supervised_K, strict=True):
        product *= (1 - alpha) * probability + alpha if supervised else 1.0
        reach.append(product if supervised else 0.0)
    return [sum(reach[k:]) if supervised else 0.0 for k, supervised in enumerate(supervised_K)]


def plain_end_to_end(accept_n: list[Tensor]) -> Tensor:
    """1 - mean_k a_1 .. a_k of one chain's supervised slots."""
    product, reach = accept_n[0].new_ones(()), []
    for accept in accept_n:
        product = product * accept
        reach.append(product)
    return 1 - torch.stack(reach).mean()


def supervised_slots_NK(loss_mask_S: Tensor, length: int, anchor_N: Tensor, block_size: int) -> Tensor:
    """[N, K] bool by the definition, one slot at a time: a + k + 1 < S and the mask is 1 on the run a+1..a+k+1."""
    out = torch.zeros(len(anchor_N), block_size, dtype=torch.bool)
    for n, anchor in enumerate(anchor_N.tolist()):
        for k in range(block_size):
            stop = anchor + k + 1
            out[n, k] = stop < length and bool(loss_mask_S[anchor + 1 : stop + 1].all())
    return out
