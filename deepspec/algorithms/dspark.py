"""DSpark: the block drafter with a sequential (Markov) head and a confidence head.

    loss = ce * CE + l1 * ||p_draft - p_target||_1 + confidence * BCE(confidence, c*),   c* = 1 - L1 / 2

each a mean over the supervised slots with weights exp(-k / gamma), or 1 without a gamma; ``loss`` replaces the first
two terms, and D-PACE weighs those alone, not the confidence head's. The sequential head makes the
parallel slots agree with one another; the confidence head predicts each slot's acceptance, which the prefix scheduler
uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.algorithms.base import require, require_at_least
from deepspec.algorithms.block import BlockConfig, BlockDraft, acceptance_metrics, by_block
from deepspec.algorithms.dflash import DFlash, SlotLoss, block_loss, select, with_selector
from deepspec.algorithms.own_fields import OwnField
from deepspec.batch import Batch
from deepspec.metrics import LossTerms, WeightedSum
from deepspec.nn.loss_chunk import LossWeights


@dataclass(frozen=True, kw_only=True)
class DSparkConfig(BlockConfig):
    """The ``draft:`` section of a DSpark recipe; without heads its draft is saved, and loaded, as DFlash."""

    algorithm: ClassVar[str] = "dspark"
    markov_rank: int = 256
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence_head: bool = True
    confidence_with_markov: bool = True
    ce_weight: float = 0.1  # of cross-entropy in the loss, where `loss` is null
    l1_weight: float = 0.9  # of the L1 distance to the target's distribution, where `loss` is null
    confidence_weight: float = 1.0  # of the confidence head's cross-entropy

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "markov_rank", "ce_weight", "l1_weight", "confidence_weight")
        for key in ("ce_weight", "l1_weight"):
            given, usual = getattr(self, key), getattr(DSparkConfig, key)
            require(self.loss is None or given == usual, key, given, "left out where loss is given: name it there")
        if self.confidence_head and self.confidence_with_markov:
            require(self.markov_rank > 0, "confidence_with_markov", True, "false where markov_rank is 0")

    @property
    def published_loss(self) -> LossWeights:
        """Cross-entropy and L1, by their own keys."""
        return LossWeights(ce=self.ce_weight, l1=self.l1_weight)


def confidence_terms(
    model: BlockDraft, slots: SlotLoss, accept_NK: Tensor, mask_NK: Tensor
) -> tuple[WeightedSum, dict[str, WeightedSum]]:
    """Weighted BCE of the confidence head against the analytic acceptance rate, and its mean error.

    Metrics: mean |sigmoid - c*|, mean signed error, and the signed error of the prefix products (survival).
    """
    config: Any = model.config
    label_R = slots.head.accept_R
    if model.confidence_head is None or label_R is None:
        raise TypeError("confidence terms need a confidence head and a target distribution")
    logit_R = model.confidence_head(slots.hidden_RD, slots.previous_RM if config.confidence_with_markov else None)
    weight_R = slots.plan.rows.weight_R
    bce = (weight_R * F.binary_cross_entropy_with_logits(logit_R, label_R, reduction="none")).sum()
    with torch.no_grad():
        error_R = logit_R.sigmoid() - label_R
        predicted_NK, _ = by_block(logit_R.sigmoid(), slots.plan, config.max_draft)
        survival = (predicted_NK * mask_NK).cumprod(dim=-1) - (accept_NK * mask_NK).cumprod(dim=-1)
        count = mask_NK.sum()
        metrics = {
            "confidence_error": WeightedSum(error_R.abs().sum(), count),
            "confidence_bias": WeightedSum(error_R.sum(), count),
            "confidence_prefix_bias": WeightedSum((survival * mask_NK).sum(), count),
        }
    return WeightedSum(bce, slots.plan.weight), metrics


class DSpark(DFlash):
    """The published recipe: 0.1 CE + 0.9 L1 + 1.0 confidence, a vanilla head of rank 256."""

    name = "dspark"
    config_class = DSparkConfig
    own_fields = (
        *DFlash.own_fields,
        OwnField("markov_head_type", "markov_head", "vanilla"),
        OwnField("confidence_head_with_markov", "confidence_with_markov", False),
    )
    has_heads = True
    starts_from = (DFlash.name,)
    tiny_section: ClassVar[dict[str, Any]] = {**DFlash.tiny_section, "markov_rank": 6}

    def needs_last_hidden(self, config: Any) -> bool:
        """See :meth:`Algorithm.needs_last_hidden`; the confidence head's label compares too."""
        return super().needs_last_hidden(config) or config.confidence_head

    def objective(self, model: BlockDraft, batch: Batch) -> LossTerms:
        """The three terms over the supervised slots (teacher-forced), with acceptance by position and tau."""
        config: DSparkConfig = model.config
        weights = replace(config.loss_weights, report_l1=config.confidence_head)
        slots = block_loss(model, batch, weights)
        accept, mask = by_block(slots.head.measured_R, slots.plan, config.max_draft)
        terms, factors = {"head": WeightedSum(slots.head.combined, slots.plan.weight)}, {"head": 1.0}
        metrics = acceptance_metrics(accept, mask)
        ce = (slots.head.weight_R * slots.head.rows.ce).sum()
        metrics |= {
            name: WeightedSum(total, slots.plan.weight) for name, total in ({"ce": ce} | slots.head.sums).items()
        }
        if config.confidence_head:
            terms["confidence"], extra = confidence_terms(model, slots, accept, mask)
            factors["confidence"] = config.confidence_weight
            metrics |= extra
        complete = LossTerms(terms, factors, metrics)
        if model.candidate_selector is None:
            return complete
        selected = select(model.candidate_selector, slots, model.head, slots.head.candidates_RC)
        return with_selector(complete, model, slots, selected)


DSPARK = DSpark()
