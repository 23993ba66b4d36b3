"""What block drafters share, DFlash, DFlash 2 and DSpark: context injection, parallel slots, anchors, identity.

A block of K slots, [token a, MASK, MASK, ...] at positions a..a+K-1, reads the target's features before its anchor a
and its own slots in both directions (``causal``: up to its own); slot k predicts token a+k+1 ("sample from anchor": the
anchor slot already predicts). With ``sample_from_anchor: false`` slot k predicts token a+k, the anchor's slot nothing:
its K slots draft K - 1 tokens. Below, only the drafting slots are counted, so the first of them always predicts token
a+1.

B batch, S sequence, N blocks (anchors), K slots, L target layers, D hidden size, R supervised slots of the micro-batch,
P distinct target positions of those slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.algorithms.base import (
    Algorithm,
    DraftConfig,
    Drafter,
    DraftModel,
    Proposal,
    Sampler,
    require,
    require_at_least,
)
from deepspec.algorithms.block_plan import BlockPlan
from deepspec.algorithms.own_fields import OwnField
from deepspec.families.base import Family, Shape
from deepspec.metrics import WeightedSum
from deepspec.nn.fused import norm_of
from deepspec.nn.heads import ConfidenceHead, MarkovHead
from deepspec.nn.layer import RMSNorm
from deepspec.nn.ragged import attend_ragged, score_bias
from deepspec.nn.selector import CandidateSelector
from deepspec.nn.sequence import SequenceGroup
from deepspec.nn.short_conv import ShortConvolution
from deepspec.targets import TargetSpec


@dataclass(frozen=True, kw_only=True)
class BlockConfig(DraftConfig):
    """The ``draft:`` section of a block drafter; the fields with ``init=False`` are of those with more heads."""

    mask_token_id: int  # a token of no text, read in the slots to draft
    num_layers: int = 5
    block_size: int = 7  # slots that are drafted together, the anchor's included
    num_anchors: int = 512  # of a sample in training, at most: each begins a block
    loss_decay_gamma: float | None = 4.0  # draft k of a block weighs exp(-k / gamma); None: all weigh the same
    sample_from_anchor: bool = True  # False (z-lab, speculators): the anchor's slot drafts nothing
    causal: bool = False  # True (JetSpec): a slot sees its block's slots up to its own, not those after it
    sliding_window: int | None = None  # a slot sees so many positions up to its own; None: the whole context
    full_layers: tuple[int, ...] = ()  # 0-based layers of the draft that no sliding_window narrows
    conv_kernel_size: int = 0  # taps of the short convolutions around attention and MLP; 0: there are none
    conv_group_size: int = 16  # channels whose taps are corrected together
    selector_rank: int = 0  # of the candidate selector; 0: there is none
    selector_top_k: int = 16  # candidates of a slot that it chooses among
    selector_weight: float = 1.0  # of its cross-entropy in the loss
    markov_rank: int = field(default=0, init=False)  # of the sequential head; 0: there is none
    markov_head: Literal["vanilla", "gated", "rnn"] = field(default="vanilla", init=False)  # kind of that head
    confidence_with_markov: bool = field(default=False, init=False)  # it reads W1[x] of the previous token too

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "block_size", "num_anchors")
        gamma = self.loss_decay_gamma
        require(gamma is None or gamma > 0, "loss_decay_gamma", gamma, "above 0, or null for no decay")
        require(self.mask_token_id >= 0, "mask_token_id", self.mask_token_id, "a token id")
        window, layers = self.sliding_window, range(self.num_layers)
        require(window is None or window >= self.block_size, "sliding_window", window, "at least block_size, or null")
        require(set(self.full_layers) <= set(layers), "full_layers", list(self.full_layers), f"of {[*layers]}")
        require_at_least(self, 0, "conv_kernel_size", "selector_rank", "selector_weight")
        require_at_least(self, 1, "conv_group_size", "selector_top_k")
        alone = not (self.selector_rank and self.markov_rank)
        require(alone, "selector_rank", self.selector_rank, "0 where markov_rank is above 0: one of them chooses")
        require(self.max_draft >= 1, "block_size", self.block_size, "at least 2 where sample_from_anchor is false")

    @property
    def slot_gamma(self) -> float | None:
        """The decay's gamma; None where D-PACE replaces it."""
        return self.loss_decay_gamma if self.d_pace is None else None

    @property
    def max_draft(self) -> int:
        """K: every slot drafts one token, the anchor's too unless ``sample_from_anchor`` is false."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1


class BlockDraft(DraftModel):
    """Layers that read the target's features as context, with the heads of the config."""

    hidden_norm: RMSNorm

    def __init__(self, algorithm: Algorithm, config: BlockConfig, shape: Shape, family: Family) -> None:
        super().__init__(algorithm, config, shape, family)
        size, rank, draft_vocab = shape.hidden_size, config.markov_rank, config.draft_vocab_size or shape.vocab_size
        self.hidden_norm = RMSNorm(size, shape.norm_eps)
        self.markov_head: MarkovHead | None = None
        self.confidence_head: ConfidenceHead | None = None
        if rank:
            self.markov_head = MarkovHead(config.markov_head, shape.vocab_size, rank, size, draft_vocab)
        if config.confidence_head:
            self.confidence_head = ConfidenceHead(size, rank if config.confidence_with_markov else 0)
        self.candidate_selector: CandidateSelector | None = None
        if config.selector_rank:
            self.candidate_selector = CandidateSelector(shape.vocab_size, draft_vocab, config.selector_rank, size)
        if config.conv_kernel_size:
            for layer in self.layers:
                parts = (ShortConvolution(size, config.conv_kernel_size, config.conv_group_size) for _ in range(2))
                layer.attention_conv, layer.mlp_conv = parts

    def context(self, features: Tensor) -> Tensor:
        """H_ctx [.., D] = RMSNorm(fc(features [.., L*D]))."""
        return self.hidden_norm(self.fc(features))

    def block_inputs(self, anchor_token_BN: Tensor) -> Tensor:
        """Embeddings [B, N, K, D] of [anchor, MASK, MASK, ...]."""
        tokens = anchor_token_BN[..., None].repeat_interleave(self.config.block_size, dim=-1)
        tokens[..., 1:] = self.config.mask_token_id
        return self.frozen.embed(tokens)

    def slots(
        self, anchor_token_BN: Tensor, anchor_BN: Tensor, context_BSD: Tensor, context_S: Tensor, everyone_BN: Tensor
    ) -> Tensor:
        """Normed hidden states [B, N, K, D] of the drafting slots.

        Args:
            anchor_token_BN: the anchors' tokens.
            anchor_BN: the anchors.
            context_BSD: what :meth:`context` makes of this rank's features.
            context_S: their positions.
            everyone_BN: the anchors of all ranks that share the context.
        """
        steps = torch.arange(self.config.block_size, device=anchor_BN.device)
        table, context_table = self.rotary(anchor_BN[..., None] + steps), self.rotary(context_S)
        hidden, start_BNK = self.block_inputs(anchor_token_BN), self.window_start(everyone_BN)
        fixed = (self.sequence, self.attention, self.config.causal)
        for number, layer in enumerate(self.layers):
            start = None if number in self.config.full_layers else start_BNK
            inputs = (layer, hidden, table, context_BSD, context_table, everyone_BN, start)
            hidden = self.run(_block_layer, *inputs, *fixed)
        return self.norm(hidden[..., self.config.block_size - self.config.max_draft :, :])

    def window_start(self, anchor_BN: Tensor) -> Tensor | None:
        """The first position [B, N, K] that each slot sees in a layer with a sliding window; None: there is none."""
        if self.config.sliding_window is None:
            return None
        steps = torch.arange(self.config.block_size, device=anchor_BN.device)
        return anchor_BN[..., None] + steps - (self.config.sliding_window - 1)

    def train_slots(
        self, features: Tensor, input_ids: Tensor, anchor_BN: Tensor, max_context_len: int,
        everyone_BN: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Normed hidden states [B, N, K, D] with the context taken from ``features`` [B, S, L*D].

        Args:
            features: the target's features; of this rank's positions where several share the conversations.
            input_ids: [B, S].
            anchor_BN: anchors on the same device.
            max_context_len: one more than the last anchor: the context that any block can see.
            everyone_BN: the anchors of all ranks that share the conversations, rank by rank; None: this one alone.
        """
        positions = self.sequence.positions(max_context_len, features.device)
        context_BSD = self.context(features[:, : len(positions)])
        everyone_BN = anchor_BN if everyone_BN is None else everyone_BN
        return self.slots(input_ids.gather(1, anchor_BN), anchor_BN, context_BSD, positions, everyone_BN)


def _block_layer(
    layer: Any, hidden: Tensor, table: Any, context_BSD: Tensor, context_table: Any, limit: Tensor,
    start: Tensor | None, sequence: SequenceGroup, backend: str, causal: bool,
) -> Tensor:  # fmt: skip
    entered, delta = layer.enter(hidden)
    queries = layer.self_attn.queries(entered, table)
    context = sequence.context(layer.self_attn.keys_values(context_BSD, context_table), queries.shape[3])
    own = sequence.own_keys(layer.self_attn.keys_values(entered, table), queries.shape[3])
    mixed = sequence.attend(queries, context, own, limit, layer.self_attn.scale, backend, causal, start)
    return layer.finish(hidden, mixed, delta=delta)


def scattered(values_R: Tensor, index_R: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """[rows, columns] with ``values_R`` at ``index_R`` of the flattened, zeros elsewhere; and the mask of them."""
    empty = torch.zeros(rows * columns, device=values_R.device)
    values, mask = empty.index_copy(0, index_R, values_R.float()), empty.index_fill(0, index_R, 1.0)
    return values.view(rows, columns), mask.view(rows, columns)


def by_block(values_R: Tensor, plan: BlockPlan, block_size: int) -> tuple[Tensor, Tensor]:
    """One value per supervised slot as [blocks, K]; (values, mask)."""
    return scattered(values_R, plan.slot_R, plan.anchor_BN.numel(), block_size)


def acceptance_metrics(accept_NK: Tensor, mask_NK: Tensor) -> dict[str, WeightedSum]:
    """accept_rate by position, and tau = mean over blocks of 1 + sum_k prod_{j <= k} c*_j."""
    blocks = mask_NK[:, 0].sum() if mask_NK.shape[0] else mask_NK.sum()
    prefix = (accept_NK * mask_NK).cumprod(dim=-1)
    return {
        "accept_rate": WeightedSum((accept_NK * mask_NK).sum(dim=0), mask_NK.sum(dim=0)),
        "tau": WeightedSum(prefix.sum() + blocks, blocks),
    }


class BlockDrafter(Drafter):
    """The context's keys and values per layer; a block's own follow them until the next :meth:`extend`."""

    model: BlockDraft

    def __init__(self, model: BlockDraft, batch_size: int, max_length: int) -> None:
        super().__init__(model, batch_size, max_length)
        self._context_norm = norm_of(model.hidden_norm)
        markov = model.markov_head
        self._markov: tuple[Tensor, ...] = ()
        if markov is not None:
            self._markov = markov.markov_w1.weight.detach(), markov.markov_w2.weight.detach()
        self._slot_K = torch.arange(model.config.block_size, device=model.device)

    @torch.no_grad()
    def extend(
        self, features: Tensor, tokens: Tensor, counts: Tensor, max_context_len: int, rows: Tensor | None = None
    ) -> None:
        """Append the features of committed positions (the tokens after them are not used)."""
        row_R = self._row_B[: len(features)] if rows is None else rows
        slots = self._length_B[row_R, None] + torch.arange(features.shape[1], device=features.device)
        self._max_context_len = max_context_len
        context = self._context_norm(self.model.fc.forward(features))
        table = self._rotary.at(slots, max_context_len + features.shape[1])
        index = self._reserve(max_context_len + len(self._slot_K), slots, row_R)
        for layer, cache in zip(self._layers, self._cache, strict=True):
            cache.write(layer.keys_values(context, table), index)
        self._length_B[row_R] += counts

    @torch.no_grad()
    def propose(self, last_token: Tensor, sample: Sampler, max_draft: int | None = None) -> Proposal:
        """One parallel pass over the block, then the slots left to right: the sequential head or the selector."""
        count = min(max_draft or self.max_draft, self.max_draft)
        model, markov, selector = self.model, self.model.markov_head, self.model.candidate_selector
        hidden = self._slots(last_token, count)
        logits = model.head.logits(hidden).float()  # [R, K, V']
        reduced = model.config.draft_vocab_size is not None
        unary, candidates = logits.topk(model.config.selector_top_k, dim=-1) if selector is not None else (logits, None)
        tokens, probs, embeddings = [], [], []
        previous, state = last_token, None
        for k in range(count):
            slot_logits = logits[:, k]
            if markov is not None:
                embedded = F.embedding(previous, self._markov[0])
                latent, state = markov.step(embedded, hidden[:, k], state)
                slot_logits = slot_logits + F.linear(latent, self._markov[1]).float()
                embeddings.append(embedded)
            if selector is not None and candidates is not None:
                scores = unary[:, k] + selector.forward(hidden[:, k], previous, candidates[:, k])
                slot_logits = torch.full_like(slot_logits, -torch.inf).scatter_(1, candidates[:, k], scores)
            previous, prob = sample(model.expand_to_target_vocab(slot_logits) if reduced else slot_logits, k)
            tokens.append(previous)
            if prob is not None:
                probs.append(prob)
        confidence = None
        if model.confidence_head is not None:
            with_markov = model.config.confidence_with_markov
            confidence = model.confidence_head(hidden, torch.stack(embeddings, dim=1) if with_markov else None)
        return Proposal(torch.stack(tokens, dim=1), torch.stack(probs, dim=1) if probs else None, confidence)

    def _slots(self, last_token: Tensor, count: int) -> Tensor:
        """Normed hidden states [R, count, D] of the first ``count`` drafting slots after ``last_token`` [R]."""
        model, rows, block = self.model, len(last_token), len(self._slot_K)
        first = block - self.max_draft
        length_R1 = self._length_B[:rows, None]
        slots, seen = length_R1 + self._slot_K, self._max_context_len + block
        table = self._rotary.at(slots, seen)
        position, window = torch.arange(seen, device=slots.device), model.config.sliding_window
        last = slots if model.config.causal else (length_R1 + (block - 1)).expand_as(slots)
        visible = position <= last[..., None]  # [R, K, S]
        full = narrow = score_bias(visible, self._groups, model.dtype)
        if window is not None:
            narrow = score_bias(visible & (position > slots[..., None] - window), self._groups, model.dtype)
        hidden, index = model.block_inputs(last_token[:, None])[:, 0], self._reserve(seen, slots, self._row_B[:rows])
        for number, (layer, cache) in enumerate(zip(self._layers, self._cache, strict=True)):
            entered, delta = layer.enter(hidden)
            queries, keys, values = layer.queries_keys_values(entered, table)
            cache.write((keys, values), index)
            bias = full if number in model.config.full_layers else narrow
            mixed = attend_ragged(queries, cache.view(rows, seen), bias, layer.scale)
            hidden = layer.finish(hidden, mixed, delta=delta)
        return self._norm(hidden[:, first : first + count])


SLIDING = "sliding_attention"
CONVOLUTIONS = ("layers.*.attention_conv.", "layers.*.mlp_conv.")


class BlockAlgorithm(Algorithm):
    """The identity of a block drafter. One without further heads is written as one whose heads are off."""

    has_heads: ClassVar[bool] = False  # a sequential or a confidence head
    model_class = BlockDraft
    drafter_class = BlockDrafter
    architecture = "DSparkModel"
    own_fields: ClassVar[tuple[OwnField, ...]] = (
        OwnField("block_size", "block_size"),
        OwnField("num_anchors", "num_anchors", training_only=True),
        OwnField("mask_token_id", "mask_token_id", learned=True),
        OwnField("sample_from_anchor", "sample_from_anchor", True, learned=True),  # not in released drafts, which do
        OwnField("markov_rank", "markov_rank"),
        OwnField("enable_confidence_head", "confidence_head"),
        OwnField("causal", "causal", False, optional=True),
        OwnField("conv_kernel_size", "conv_kernel_size", 0, optional=True),
        OwnField("conv_group_size", "conv_group_size", 16, optional=True),
        OwnField("selector_rank", "selector_rank", 0, optional=True),
        OwnField("selector_top_k", "selector_top_k", 16, optional=True),
    )
    heads = ("markov_head.", "confidence_head.", "candidate_selector.", *CONVOLUTIONS)
    neutral = ("markov_head.markov_w2.weight", "confidence_head.proj.weight", "confidence_head.proj.bias")
    vocabulary_rows = ("markov_head.markov_w2.weight", "candidate_selector.successor_codebook")
    tiny_section: ClassVar[dict[str, Any]] = {
        "num_layers": 2, "block_size": 4, "num_anchors": 5, "mask_token_id": 3,
    }  # fmt: skip

    def matches(self, published: Mapping[str, Any]) -> bool:
        """See :meth:`Algorithm.matches`."""
        heads = bool(published.get("markov_rank") or published.get("enable_confidence_head"))
        return super().matches(published) and heads == self.has_heads

    def check_target(self, config: BlockConfig, target: TargetSpec) -> None:
        """See :meth:`Algorithm.check_target`."""
        super().check_target(config, target)
        target.check_token(config.mask_token_id, "draft.mask_token_id")
        group, tokens = config.conv_group_size, config.draft_vocab_size or target.vocab_size
        fits = not config.conv_kernel_size or target.hidden_size % group == 0
        require(fits, "draft.conv_group_size", group, f"a divisor of {target.hidden_size}, the hidden size")
        fits = not config.selector_rank or config.selector_top_k <= tokens
        require(fits, "draft.selector_top_k", config.selector_top_k, f"at most {tokens}, the draft's vocabulary")

    def read_config(self, published: Mapping[str, Any]) -> Any:
        """See :meth:`Algorithm.read_config`; a sliding window is stated as transformers states one."""
        config, kinds = super().read_config(published), published.get("layer_types") or ()
        if SLIDING not in kinds:
            return config
        full = tuple(number for number, kind in enumerate(kinds) if kind != SLIDING)
        return replace(config, sliding_window=published["sliding_window"], full_layers=full)

    def own_config(self, config: Any) -> dict[str, Any]:
        """See :meth:`Algorithm.own_config`."""
        own = super().own_config(config)
        if config.sliding_window is None:
            return own
        kinds = ["full_attention" if number in config.full_layers else SLIDING for number in range(config.num_layers)]
        return own | {"layer_types": kinds, "sliding_window": config.sliding_window, "use_sliding_window": True}

    def card_rows(self, config: BlockConfig, shape: Shape) -> list[tuple[str, object]]:
        """See :meth:`Algorithm.card_rows`."""
        meaning = "the anchor's slot drafts too" if config.sample_from_anchor else "the anchor's slot drafts nothing"
        return [
            *super().card_rows(config, shape),
            ("block size", config.block_size),
            ("sample_from_anchor", f"{str(config.sample_from_anchor).lower()}: {meaning}"),
            ("mask token", config.mask_token_id),
            ("sequential head", f"{config.markov_head}, rank {config.markov_rank}" if config.markov_rank else "none"),
            ("confidence head", "yes" if config.confidence_head else "none"),
            *(row for row in _optional_rows(config) if row[1]),
        ]


def _optional_rows(config: BlockConfig) -> list[tuple[str, str]]:
    """The rows of what most drafts lack; "" where it does."""
    taps, rank, window = config.conv_kernel_size, config.selector_rank, config.sliding_window
    narrow = f"{window} positions, all of them in layers {list(config.full_layers)}"
    return [
        ("causal", "a slot sees its block's slots up to its own" if config.causal else ""),
        ("sliding window", narrow if window else ""),
        ("short convolutions", f"{taps} taps, groups of {config.conv_group_size} channels" if taps else ""),
        ("candidate selector", f"rank {rank}, {config.selector_top_k} candidates" if rank else ""),
    ]
