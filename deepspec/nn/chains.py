"""Losses and weights that couple the slots of a chain: tokens that are verified in order (a block, the steps of a TTT).

    D-PACE (arXiv 2605.18810): s_k = (1 - alpha) p_k(label) + alpha,  w_k = sum_{m >= k} s_1 .. s_m  (no gradient)
    end-to-end TV:             1 - mean_k a_1 .. a_k,  a_k the probability that slot k is accepted

The sums and the mean run over supervised slots; a slot that is not supervised counts as s = a = 1. Both need every
slot of the chain, and rows come in chunks by target position, so a chain's rows are in several chunks; but D-PACE only
scales a row's gradient, and end-to-end TV adds a factor of the row's TV gradient (:mod:`deepspec.nn.losses`).

C chains, K slots of a chain, R supervised rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepspec.nn.loss_table import RowValues


@dataclass(frozen=True)
class Chains:
    """Which rows are the slots of a chain, in the order in which they are verified."""

    index_R: Tensor  # of each row in [C, K] flattened
    count: int  # C
    length: int  # K
    d_pace: float | None = None  # alpha; None: rows keep their weights

    def spread(self, values_R: Tensor, elsewhere: float) -> Tensor:
        """[C, K] with the rows' values, ``elsewhere`` in slots that are not supervised."""
        empty = torch.full((self.count * self.length,), elsewhere, device=values_R.device)
        return empty.index_copy(0, self.index_R, values_R.float()).view(self.count, self.length)

    def gather(self, values_CK: Tensor) -> Tensor:
        """[R]: the rows' values."""
        return values_CK.flatten()[self.index_R]


@dataclass(frozen=True)
class ChainedRows:
    """The rows' part in a loss whose slots depend on one another."""

    weight_R: Tensor  # of the losses of rows
    tv_R: Tensor  # d(end-to-end TV) / d(TV) of each row
    e2e_tv: Tensor  # scalar


def chained_rows(rows: RowValues, weight_R: Tensor, chains: Chains, compared: bool) -> ChainedRows:
    """Weights and end-to-end TV of rows whose own weights are ``weight_R``.

    A chain's end-to-end TV weighs as much as its rows together, so that one weight divides every term of a step. A row
    of weight 0 (its label is outside the draft's vocabulary) is never accepted.
    """
    inside_R = (weight_R > 0).float()
    mask_CK = chains.spread(torch.ones_like(weight_R), 0.0)
    weights_R, tv_R, total = weight_R, torch.zeros_like(weight_R), weight_R.new_zeros(())
    if chains.d_pace is not None:
        label_CK = chains.spread(torch.exp(-rows.ce) * inside_R, 1.0)
        weights_R = weight_R * chains.gather(d_pace_weights(label_CK, mask_CK, chains.d_pace))
    if compared:
        loss_C, slope_CK = end_to_end_tv(chains.spread(rows.accept * inside_R, 1.0), mask_CK)
        weight_C = chains.spread(weight_R, 0.0).sum(dim=1)
        total = (weight_C * loss_C).sum()
        tv_R = chains.gather(weight_C[:, None] * slope_CK) * inside_R
    return ChainedRows(weights_R, tv_R, total)


def d_pace_weights(label_CK: Tensor, mask_CK: Tensor, alpha: float) -> Tensor:
    """w [C, K] from the draft's probability of each label and the supervised slots; 0 in the others."""
    reach_CK = torch.where(mask_CK > 0, (1.0 - alpha) * label_CK + alpha, 1.0).cumprod(dim=1)
    return mask_CK * (reach_CK * mask_CK).flip(1).cumsum(dim=1).flip(1)


def end_to_end_tv(accept_CK: Tensor, mask_CK: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - mean_k a_1 .. a_k of each chain [C], 0 where nothing is supervised; its derivative by each slot's TV)."""
    accept_CK = torch.where(mask_CK > 0, accept_CK, 1.0)
    reach_CK = accept_CK.cumprod(dim=1)
    count_C = mask_CK.sum(dim=1).clamp_min(1.0)
    loss_C = mask_CK.amax(dim=1) - (reach_CK * mask_CK).sum(dim=1) / count_C
    onward = torch.zeros_like(count_C)
    rest: list[Tensor] = []  # sum_{m >= k, supervised} a_{k+1} .. a_m, from the last slot back
    for k in reversed(range(accept_CK.shape[1])):
        onward = mask_CK[:, k] + onward
        rest.append(onward)
        onward = accept_CK[:, k] * onward
    before_CK = torch.cat((torch.ones_like(reach_CK[:, :1]), reach_CK[:, :-1]), dim=1)
    return loss_C, mask_CK * before_CK * torch.stack(rest[::-1], dim=1) / count_C[:, None]
