"""DFlash: a parallel block drafter trained with cross-entropy on the answer's tokens.

The target's features are injected as keys and values into every layer; one pass drafts K tokens. See
``deepspec.algorithms.block`` for the model, the anchors and decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from deepspec.algorithms.base import Algorithm, Drafter, check_vocabulary, require, target_states
from deepspec.algorithms.block import (
    BlockDraft,
    BlockDrafter,
    BlockPlan,
    acceptance_metrics,
    by_block,
    draw_anchors,
)
from deepspec.batch import Batch, Supervision
from deepspec.errors import RecipeError
from deepspec.families.base import Family, Shape
from deepspec.metrics import LossTerms, WeightedSum
from deepspec.nn.chunk import LossWeights
from deepspec.nn.heads import MarkovHead
from deepspec.nn.losses import HeadLoss, head_loss
from deepspec.sections import parse_section
from deepspec.targets import TargetSpec


@dataclass(frozen=True)
class DFlashConfig:
    """The ``draft:`` section of a DFlash recipe."""

    target_layers: tuple[int, ...]
    mask_token_id: int
    num_layers: int = 5
    block_size: int = 7
    num_anchors: int = 512
    loss_decay_gamma: float | None = 4.0  # draft k of a block weighs exp(-k / gamma); None: all weigh the same
    sample_from_anchor: bool = True  # False (z-lab, speculators): the anchor's slot drafts nothing
    draft_vocab_size: int | None = None  # V', the most frequent answer tokens; None: the target's whole vocabulary

    def __post_init__(self) -> None:
        for key in ("num_layers", "block_size", "num_anchors"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        gamma = self.loss_decay_gamma
        require(gamma is None or gamma > 0, "loss_decay_gamma", gamma, "above 0, or null for no decay")
        require(self.mask_token_id >= 0, "mask_token_id", self.mask_token_id, "a token id")
        require(self.max_draft >= 1, "block_size", self.block_size, "at least 2 where sample_from_anchor is false")

    @property
    def algorithm(self) -> str:
        """Registry name."""
        return "dflash"

    @property
    def max_draft(self) -> int:
        """K: every slot drafts one token, the anchor's too unless ``sample_from_anchor`` is false."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1


def check_mask_token(config: Any, target: TargetSpec | None) -> None:
    """Check that the mask token lies in the target's vocabulary.

    Raises:
        RecipeError: it does not.
    """
    if target is not None and config.mask_token_id >= target.vocab_size:
        wanted = f"below {target.vocab_size}, the vocabulary of {target.path}"
        raise RecipeError("no such token", key="draft.mask_token_id", found=config.mask_token_id, wanted=wanted)


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
    label_R, sayable_R = model.draft_ids(tokens[plan.label_R])
    rows = plan.rows.with_labels(label_R)
    if sayable_R is not None:  # a token outside the draft's vocabulary teaches nothing, and no draft of it is accepted
        rows = replace(rows, weight_R=rows.weight_R * sayable_R)
    target = target_states(batch, plan.position_P, model.dtype) if weights.needs_target else None
    latent = w2 = previous_RM = None
    if model.markov_head is not None:
        embedded_PM = model.markov_head.markov_w1(tokens[plan.position_P])
        previous_RM = embedded_PM[rows.position_R]
        latent, w2 = embedded_PM, model.markov_head.markov_w2(None)
        if model.markov_head.depends_on_hidden:
            latent = _latents(model.markov_head, batch, hidden_BNKD, plan.anchor_BN).flatten(0, 2)
            latent = latent.index_select(0, plan.slot_R)
    head = head_loss(hidden_RD, model.head, rows, weights, target, latent, w2, model.loss)
    if sayable_R is not None:
        accept_R = None if head.accept_R is None else head.accept_R * sayable_R
        head = replace(head, accept_R=accept_R, hit_R=head.hit_R * sayable_R)
    return SlotLoss(head, plan, hidden_RD, previous_RM)


def _latents(head: MarkovHead, batch: Batch, hidden_BNKD: Tensor, anchor_BN: Tensor) -> Tensor:
    """Sequential latents [B, N, K, M] of all slots, teacher-forced (the rnn's state runs over whole blocks)."""
    B, N, K = hidden_BNKD.shape[:3]
    positions = anchor_BN[..., None] + torch.arange(K, device=anchor_BN.device)
    positions = positions.clamp_max(batch.input_ids.shape[1] - 1)
    tokens = batch.input_ids.gather(1, positions.view(B, N * K)).view(B, N, K)
    return head.latents(head.markov_w1(tokens), hidden_BNKD)


class DFlash(Algorithm):
    """The published recipe: five layers, block 7, cross-entropy only."""

    name = "dflash"
    config_class: type[DFlashConfig] = DFlashConfig

    def parse(self, section: Mapping[str, Any], target: TargetSpec | None) -> Any:
        """See :meth:`Algorithm.parse`."""
        config = parse_section(self.config_class, section, "draft")
        check_mask_token(config, target)
        check_vocabulary(config, target)
        return config

    def build_model(self, config: Any, shape: Shape, family: Family) -> BlockDraft:
        """See :meth:`Algorithm.build_model`."""
        return BlockDraft(self, config, shape, family)

    def published_fields(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """Config fields by their names here, from a config.json."""
        return {
            "target_layers": tuple(published["target_layer_ids"]),
            "mask_token_id": published["mask_token_id"],
            "num_layers": published["num_hidden_layers"],
            "block_size": published["block_size"],
            "num_anchors": published["num_anchors"],
            "sample_from_anchor": published.get("sample_from_anchor", True),  # released drafts do not say: they do
            "draft_vocab_size": published.get("draft_vocab_size"),
        }

    def read_config(self, published: Mapping[str, Any]) -> Any:
        """See :meth:`Algorithm.read_config`."""
        return self.config_class(**self.published_fields(published))

    def write_config(self, config: Any, published: dict[str, Any]) -> None:
        """See :meth:`Algorithm.write_config`; DFlash is written as DSpark without heads, as published."""
        published.update(
            block_size=config.block_size,
            num_anchors=config.num_anchors,
            mask_token_id=config.mask_token_id,
            sample_from_anchor=config.sample_from_anchor,
            markov_rank=0,
            enable_confidence_head=False,
        )
        if config.draft_vocab_size is not None:
            published["draft_vocab_size"] = config.draft_vocab_size

    def needs_last_hidden(self, config: Any) -> bool:
        """Cross-entropy needs only the tokens."""
        return False

    def plan(self, config: Any, supervision: Supervision) -> BlockPlan:
        """Anchors drawn, and their supervised slots; the weight is the sum of the slots'."""
        anchors = draw_anchors(supervision, config.num_anchors)
        return BlockPlan.make(supervision, anchors, config.max_draft, config.loss_decay_gamma)

    def objective(self, model: BlockDraft, batch: Batch) -> LossTerms:
        """CE over the supervised slots; a slot is accepted where the draft's most likely token is the answer's."""
        slots = block_loss(model, batch, LossWeights(ce=1.0))
        accept, mask = by_block(slots.head.hit_R, slots.plan, model.config.max_draft)
        ce = WeightedSum(slots.head.combined, slots.plan.weight)
        return LossTerms({"ce": ce}, {"ce": 1.0}, acceptance_metrics(accept, mask))

    def drafter(self, model: BlockDraft, batch_size: int, max_length: int) -> Drafter:
        """See :meth:`Algorithm.drafter`."""
        return BlockDrafter(model, batch_size, max_length)


DFLASH = DFlash()
