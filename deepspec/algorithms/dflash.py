"""DFlash: a parallel block drafter trained with cross-entropy on the answer's tokens, or what ``loss`` names.

The target's features are injected as keys and values into every layer; one pass drafts K tokens. See
``deepspec.algorithms.block`` for the model, the anchors and decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from deepspec.algorithms.block import (
    BlockAlgorithm,
    BlockConfig,
    BlockDraft,
    acceptance_metrics,
    by_block,
)
from deepspec.algorithms.block_plan import BlockPlan, draw_anchors
from deepspec.batch import Batch, Supervision
from deepspec.metrics import LossTerms, WeightedSum
from deepspec.nn.chains import Chains, chained_rows
from deepspec.nn.heads import FrozenHead, MarkovHead
from deepspec.nn.loss_chunk import LossWeights
from deepspec.nn.losses import HeadLoss, HeadRows, head_loss
from deepspec.nn.selector import CandidateSelector, candidate_logits


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
    rows: HeadRows  # with labels, and weight 0 where the label is outside the draft's vocabulary
    chains: Chains  # the rows of each block
    previous_R: Tensor  # the token before each slot
    previous_RM: Tensor | None  # W1[x] of each slot's previous token


def block_loss(model: BlockDraft, batch: Batch, weights: LossWeights) -> SlotLoss:
    """Draft all blocks of a planned micro-batch and apply the fused head loss to their supervised slots."""
    plan = cast(BlockPlan, batch.plan)
    where = (plan.anchor_BN, plan.max_context_len, plan.everyone_BN)
    hidden_BNKD = model.train_slots(batch.features, batch.input_ids, *where)
    hidden_RD = hidden_BNKD.flatten(0, 2).index_select(0, plan.slot_R)
    tokens = batch.input_ids.flatten()
    label_R, in_vocab_R = model.draft_ids(tokens[plan.label_R])
    rows = plan.rows.with_tokens(label_R, in_vocab_R)
    target = batch.target_states(plan.position_P, model.dtype) if weights.needs_target else None
    latent = w2 = previous_RM = None
    if model.markov_head is not None:
        embedded_PM = model.markov_head.markov_w1(tokens[plan.position_P])
        previous_RM = embedded_PM[rows.position_R]
        latent, w2 = embedded_PM, model.markov_head.markov_w2(None)
        if model.markov_head.depends_on_hidden:
            latent = _latents(model.markov_head, batch, hidden_BNKD, plan.anchor_BN).flatten(0, 2)
            latent = latent.index_select(0, plan.slot_R)
    chains = Chains(plan.slot_R, plan.anchor_BN.numel(), model.config.max_draft, model.config.d_pace)
    count = 0 if model.candidate_selector is None else model.config.selector_top_k
    head = head_loss(hidden_RD, model.head, rows, weights, target, latent, w2, model.loss, chains, count)
    if in_vocab_R is not None:
        accept_R = None if head.accept_R is None else head.accept_R * in_vocab_R
        head = replace(head, accept_R=accept_R, hit_R=head.hit_R * in_vocab_R)
    return SlotLoss(head, plan, hidden_RD, rows, chains, tokens[plan.position_P][rows.position_R], previous_RM)


@dataclass(frozen=True)
class Selected:
    """What the candidate selector makes of the supervised slots, the text's own token before each of them."""

    ce_R: Tensor  # over the candidates; 0 where the label is none of them
    weight_R: Tensor  # the slots' own, times D-PACE's by the selector's own probabilities
    found_R: Tensor  # bool: the label is a candidate
    hit_R: Tensor  # 0/1: the label is the selector's choice


def select(selector: CandidateSelector, slots: SlotLoss, frozen: FrozenHead, candidates_RC: Tensor) -> Selected:
    """Score each slot's candidates. A label that is none of them leaves the loss; the slot's weight stays."""
    scores_RC = candidate_logits(slots.hidden_RD, frozen, candidates_RC)
    scores_RC = scores_RC + selector(slots.hidden_RD, slots.previous_R, candidates_RC)
    is_label_RC = candidates_RC == slots.rows.label_R[:, None]
    found_R, at_label_R = is_label_RC.any(-1), (scores_RC * is_label_RC).sum(-1)
    ce_R = (scores_RC.logsumexp(-1) - at_label_R) * found_R
    hit_R = (found_R & (at_label_R >= scores_RC.amax(-1))).float()
    weight_R = slots.rows.weight_R
    if slots.chains.d_pace is not None:
        known_R = ce_R.detach().masked_fill(~found_R, torch.inf)
        weight_R = chained_rows(slots.head.rows._replace(ce=known_R), weight_R, slots.chains, False).weight_R
    return Selected(ce_R, weight_R, found_R, hit_R * (weight_R > 0))


def with_selector(terms: LossTerms, model: BlockDraft, slots: SlotLoss, selected: Selected) -> LossTerms:
    """The terms and the weighted cross-entropy over the candidates; metric: how often the label is one of them."""
    term = WeightedSum((selected.weight_R * selected.ce_R).sum(), slots.plan.weight)
    inside_R = slots.rows.weight_R > 0
    recall = WeightedSum((selected.found_R & inside_R).sum(), inside_R.sum())
    factors = {**terms.coefficients, "selector": float(model.config.selector_weight)}
    return LossTerms({**terms.terms, "selector": term}, factors, {**terms.metrics, "candidate_recall": recall})


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
    shares_sequences = True

    def plan(self, config: Any, supervision: Supervision) -> BlockPlan:
        """Anchors drawn, and their supervised slots; the weight is the sum of the slots'."""
        anchors = draw_anchors(supervision, config.num_anchors)
        return BlockPlan.make(supervision, anchors, config.max_draft, config.slot_gamma)

    def objective(self, model: BlockDraft, batch: Batch) -> LossTerms:
        """The loss over the supervised slots; without a target's distribution a slot counts as accepted where the
        draft's most likely token is the answer's, or the selector's choice."""
        slots = block_loss(model, batch, model.config.loss_weights)
        selector, selected, measured_R = model.candidate_selector, None, slots.head.measured_R
        if selector is not None:
            selected = select(selector, slots, model.head, slots.head.candidates_RC)
            measured_R = selected.hit_R
        accept, mask = by_block(measured_R, slots.plan, model.config.max_draft)
        terms = slots.head.terms(slots.plan.weight, acceptance_metrics(accept, mask))
        return terms if selected is None else with_selector(terms, model, slots, selected)


DFLASH = DFlash()
