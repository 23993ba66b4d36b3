"""DFlash: a parallel block drafter trained with cross-entropy on the answer's tokens, or what ``loss`` names.

The target's features are injected as keys and values into every layer; one pass drafts K tokens. See
``deepspec.algorithms.block`` for the model, the anchors and decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from deepspec.algorithms.base import target_states
from deepspec.algorithms.block import (
    BlockAlgorithm,
    BlockConfig,
    BlockDraft,
    BlockPlan,
    acceptance_metrics,
    by_block,
    draw_anchors,
)
from deepspec.batch import Batch, Supervision
from deepspec.metrics import LossTerms
from deepspec.nn.chains import Chains
from deepspec.nn.heads import MarkovHead
from deepspec.nn.loss_chunk import LossWeights
from deepspec.nn.losses import HeadLoss, head_loss


@dataclass(frozen=True, kw_only=True)
class DFlashConfig(BlockConfig):
    """The ``draft:`` section of a DFlash recipe."""

    algorithm: ClassVar[str] = "dflash"


@dataclass(frozen=True)
class SlotLoss:
    """The head loss of a micro-batch's supervised slots and what it was computed from."""

    head: HeadLoss
    plan: BlockPlan
    hidden_RD: Tensor
    previous_RM: Tensor | None  # W1[x] of each slot's previous token


def block_loss(model: BlockDraft, batch: Batch, weights: LossWeights) -> SlotLoss:
    """Draft all blocks of a planned micro-batch and apply the fused head loss to their supervised slots."""
    plan = cast(BlockPlan, batch.plan)
    hidden_BNKD = model.train_slots(batch.features, batch.input_ids, plan.anchor_BN, plan.max_context_len)
    hidden_RD = hidden_BNKD.flatten(0, 2).index_select(0, plan.slot_R)
    tokens = batch.input_ids.flatten()
    label_R, in_vocab_R = model.draft_ids(tokens[plan.label_R])
    rows = plan.rows.with_tokens(label_R, in_vocab_R)
    target = target_states(batch, plan.position_P, model.dtype) if weights.needs_target else None
    latent = w2 = previous_RM = None
    if model.markov_head is not None:
        embedded_PM = model.markov_head.markov_w1(tokens[plan.position_P])
        previous_RM = embedded_PM[rows.position_R]
        latent, w2 = embedded_PM, model.markov_head.markov_w2(None)
        if model.markov_head.depends_on_hidden:
            latent = _latents(model.markov_head, batch, hidden_BNKD, plan.anchor_BN).flatten(0, 2)
            latent = latent.index_select(0, plan.slot_R)
    chains = Chains(plan.slot_R, plan.anchor_BN.numel(), model.config.max_draft, model.config.d_pace)
    head = head_loss(hidden_RD, model.head, rows, weights, target, latent, w2, model.loss, chains)
    if in_vocab_R is not None:
        accept_R = None if head.accept_R is None else head.accept_R * in_vocab_R
        head = replace(head, accept_R=accept_R, hit_R=head.hit_R * in_vocab_R)
    return SlotLoss(head, plan, hidden_RD, previous_RM)


def _latents(head: MarkovHead, batch: Batch, hidden_BNKD: Tensor, anchor_BN: Tensor) -> Tensor:
    """Sequential latents [B, N, K, M] of all slots, teacher-forced (the rnn's state runs over complete blocks)."""
    B, N, K = hidden_BNKD.shape[:3]
    positions = anchor_BN[..., None] + torch.arange(K, device=anchor_BN.device)
    positions = positions.clamp_max(batch.input_ids.shape[1] - 1)
    tokens = batch.input_ids.gather(1, positions.view(B, N * K)).view(B, N, K)
    return head.latents(head.markov_w1(tokens), hidden_BNKD)


class DFlash(BlockAlgorithm):
    """The published recipe: five layers, block 7, cross-entropy only; written as DSpark without heads."""

    name = "dflash"
    config_class: ClassVar[type[BlockConfig]] = DFlashConfig

    def needs_last_hidden(self, config: Any) -> bool:
        """Cross-entropy needs only the tokens."""
        return config.loss_weights.needs_target

    def plan(self, config: Any, supervision: Supervision) -> BlockPlan:
        """Anchors drawn, and their supervised slots; the weight is the sum of the slots'."""
        anchors = draw_anchors(supervision, config.num_anchors)
        return BlockPlan.make(supervision, anchors, config.max_draft, config.slot_gamma)

    def objective(self, model: BlockDraft, batch: Batch) -> LossTerms:
        """The loss over the supervised slots; without a target's distribution a slot counts as accepted where the
        draft's most likely token is the answer's."""
        slots = block_loss(model, batch, model.config.loss_weights)
        accept, mask = by_block(slots.head.measured_R, slots.plan, model.config.max_draft)
        return slots.head.terms(slots.plan.weight, acceptance_metrics(accept, mask))


DFLASH = DFlash()
