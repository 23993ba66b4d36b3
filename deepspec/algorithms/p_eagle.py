"""P-EAGLE: Eagle3's parallel sibling, which drafts all K tokens in one pass (arXiv 2602.01469).

An element (a, d) drafts from anchor a at depth d. At depth 0 it has the features of position a and the token x_{a+1},
as in Eagle3; deeper it has neither, and reads a learned state in place of the features, which passes fc like real
ones, and a learned row in place of the token's embedding (engines: ``mask_hidden``, and the mask token's row). It is at
position a + d, sees depth 0 up to its anchor and its own chain up to d, and predicts x_{a+d+2} by the target's
distribution at a + d + 1. The first layer is 2D wide as Eagle3's; the others read the hidden state alone.

Training every depth of every anchor would cost K passes, so chains are dropped conditionally (COD): of n supervised
positions a sample keeps about n * max(r^d, floor) chains that reach depth d, all of them among those that reach d - 1.

    loss = mean over the supervised elements of all depths of KL(target || draft), or what ``loss`` names

B batch, S sequence, T positions whose features are read (the first T of S), M active positions of a row (those that are
supervised at depth 0), N chains of a row, J = K - 1 depths below 0, C elements of all chains in the order of row,
anchor and depth, L target layers, D hidden size, R supervised elements, P distinct target positions of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from deepspec.algorithms.base import (
    Algorithm,
    Drafter,
    Proposal,
    Sampler,
    require,
    require_at_least,
)
from deepspec.algorithms.block import scattered
from deepspec.algorithms.eagle import NORM_FIELDS, EagleConfig, EagleDraft, WideInput, chain_loss, wide_input
from deepspec.algorithms.eagle3 import supervised_slots
from deepspec.algorithms.own_fields import OwnField
from deepspec.batch import Batch, LossPlan, Supervision
from deepspec.families.base import Family, Shape
from deepspec.metrics import LossTerms, WeightedSum
from deepspec.nn.attention import attend
from deepspec.nn.chains import Chains
from deepspec.nn.loss_table import LossWeights
from deepspec.nn.losses import HeadRows
from deepspec.nn.ragged import attend_ragged, score_bias
from deepspec.targets import TargetSpec


@dataclass(frozen=True, kw_only=True)
class PEagleConfig(EagleConfig):
    """The ``draft:`` section of a P-EAGLE recipe."""

    algorithm: ClassVar[str] = "p_eagle"
    mask_token_id: int  # a token of no text; engines read the learned row at its place in the embedding
    num_layers: int = 4
    num_depths: int = 8  # K: depths of a chain, and tokens drafted a round
    keep_ratio: float = 0.7  # r: so many of the chains of a depth reach the next one in training
    keep_floor: float = 0.2  # at every depth at least so many of a sample's supervised positions have a chain

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 2, "num_depths")
        require(self.mask_token_id >= 0, "mask_token_id", self.mask_token_id, "a token id")
        for key in ("keep_ratio", "keep_floor"):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "from 0 to 1")

    @property
    def published_loss(self) -> LossWeights:
        """KL to the target's distribution."""
        return LossWeights(kl=1.0)

    @property
    def max_draft(self) -> int:
        """K: every depth drafts one token."""
        return self.num_depths


def draw_chains(supervised: Tensor, config: PEagleConfig, generator: torch.Generator) -> Tensor:
    """The depth that the chain of every anchor of a sample reaches, [S] int64; 0: no chain.

    Args:
        supervised: [S] bool; position p is supervised where the token p + 2 is.
        config: states K, the share that is kept and the floor.
        generator: of the sample's draws.
    """
    reached, pool = torch.zeros(len(supervised), dtype=torch.int64), torch.arange(len(supervised))
    for depth in range(1, config.num_depths):
        pool = pool[pool + depth < len(supervised)]
        pool = pool[supervised[pool + depth]]  # anchors whose element of this depth is supervised
        size = int(int(supervised.sum()) * max(config.keep_ratio**depth, config.keep_floor))
        if len(pool) > size:
            pool = pool[torch.randperm(len(pool), generator=generator)[:size]]
        reached[pool] = depth
    return reached


@dataclass(frozen=True)
class DepthSpan:
    """Some depths of the chains that reach the first of them, attended together: 1, 2 to 3, 4 to 7, ...

    One group of all depths would hold a query for every depth of a chain that ended long before.
    """

    anchor_BN: Tensor  # int64 anchors, 0 where a row has fewer chains
    element_BNM: Tensor  # index of the chain's element of depths 1..M among the C, any where there is none
    num_queries: int  # the last so many of the M depths are the span's

    @staticmethod
    def make(reached_BS: Tensor, number_BSJ: Tensor, first: int, last: int) -> tuple[DepthSpan, Tensor]:
        """The span of depths ``first``..``last``, and which of its queries are elements, [B, N, K]."""
        anchor_BN, real_BN = _columns(reached_BS >= first)
        row_B1 = torch.arange(len(reached_BS))[:, None]
        element_BNM = number_BSJ[row_B1, anchor_BN, :last] * real_BN[..., None]
        own_BNK = torch.arange(first, last + 1) <= reached_BS[row_B1, anchor_BN, None]
        return DepthSpan(anchor_BN, element_BNM, last + 1 - first), own_BNK & real_BN[..., None]


@dataclass(frozen=True)
class ChainPlan(LossPlan):
    """The elements of a micro-batch; the weight is the number of those that are supervised."""

    active_BM: Tensor  # int64 positions supervised at depth 0, 0 where a row has fewer
    position_C: Tensor  # the position a + d of each chain element
    spans: tuple[DepthSpan, ...]
    cell_C: Tensor  # index of each chain element among the queries of all spans, flattened one after the other
    element_R: Tensor  # index of each supervised element among [B * M active | C of chains]
    grid_R: Tensor  # its index in [B, T, K] flattened: by anchor and depth
    position_P: Tensor  # index of each distinct target position a + d + 1 in [B, S] flattened
    rows: HeadRows  # without labels
    num_depths: int
    max_context_len: int  # T

    @staticmethod
    def make(supervised_BS: Tensor, reached_BS: Tensor, num_depths: int) -> ChainPlan:
        """The plan for positions supervised at depth 0, and the depth that each anchor's chain reaches."""
        S = supervised_BS.shape[1]
        active_BM, is_active_BM = _columns(supervised_BS)
        chain_BSJ = torch.arange(1, num_depths) <= reached_BS[..., None]
        row_C, anchor_C, depth_C = chain_BSJ.nonzero(as_tuple=True)
        spans, cell_C = _spans(reached_BS, chain_BSJ, len(row_C))
        row_A, column_A = is_active_BM.nonzero(as_tuple=True)
        row_R, anchor_R = torch.cat((row_A, row_C)), torch.cat((active_BM[row_A, column_A], anchor_C))
        depth_R = torch.cat((torch.zeros_like(row_A), depth_C + 1))
        context = int(anchor_R.max()) + 1 if len(anchor_R) else 1
        chained_C = active_BM.numel() + torch.arange(len(row_C))
        element_R = torch.cat((row_A * active_BM.shape[1] + column_A, chained_C))
        position, order = (row_R * S + anchor_R + depth_R + 1).sort(stable=True)
        position_P, position_R = torch.unique_consecutive(position, return_inverse=True)
        rows = HeadRows.plan(position_R, torch.ones(len(order)))
        grid_R = (row_R * context + anchor_R) * num_depths + depth_R
        return ChainPlan(
            rows.weight_R.sum(), active_BM, anchor_C + depth_C + 1, spans, cell_C, element_R[order], grid_R[order],
            position_P, rows, num_depths, context,
        )  # fmt: skip


def _spans(reached_BS: Tensor, chain_BSJ: Tensor, count: int) -> tuple[tuple[DepthSpan, ...], Tensor]:
    """The spans of all depths, and the index of each of the ``count`` elements among their queries."""
    number_BSJ = (chain_BSJ.flatten().cumsum(0) - 1).clamp_min(0).view_as(chain_BSJ)
    spans, cell_C, first, before = [], torch.zeros(count, dtype=torch.int64), 1, 0
    while first <= chain_BSJ.shape[2]:
        last = min(2 * first - 1, chain_BSJ.shape[2])
        span, own_BNK = DepthSpan.make(reached_BS, number_BSJ, first, last)
        query = own_BNK.flatten().nonzero()[:, 0]
        cell_C[span.element_BNM[..., first - 1 :].flatten()[query]] = before + query
        spans.append(span)
        first, before = last + 1, before + own_BNK.numel()
    return tuple(spans), cell_C


def _columns(mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The true positions of every row, ascending, [B, n], 0 where a row has fewer; and which of them are real."""
    count_B1 = mask_BS.sum(dim=1, keepdim=True)
    width = int(count_B1.max()) if len(mask_BS) else 0
    real_Bn = torch.arange(width) < count_B1
    order = mask_BS.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return order * real_Bn, real_Bn


class MaskInputs(nn.Module):
    """What an element below depth 0 reads; a module of its own, whose ``forward`` ZeRO-3's hooks see and gather."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.zeros(1, 1, features))  # in place of the target's features
        self.embedding = nn.Parameter(torch.zeros(size))  # in place of a token's row, not yet scaled as embeddings are

    def forward(self) -> tuple[Tensor, Tensor]:
        """(hidden, embedding), copies: ZeRO-3 frees the originals."""
        return self.hidden.clone(), self.embedding.clone()


class PEagleDraft(EagleDraft):
    """Eagle3's wide layer, then plain ones; and what is read where token and features are unknown."""

    def __init__(self, algorithm: Algorithm, config: PEagleConfig, shape: Shape, family: Family) -> None:
        super().__init__(algorithm, config, shape, family, wide_layers=1)
        self.mask = MaskInputs(len(config.target_layers) * shape.hidden_size, shape.hidden_size)

    def mask_inputs(self) -> tuple[Tensor, Tensor]:
        """(embedding, g), [D] each, of an element below depth 0."""
        hidden, embedding = self.mask()
        return embedding * self.frozen.embed_scale, self.start(hidden)[0, 0]

    def train_hidden(self, features: Tensor, input_ids: Tensor, plan: ChainPlan) -> Tensor:
        """Hidden states before the final norm, [B * M + C, D], of the active positions and the chains' elements.

        Args:
            features: [B, S, L*D].
            input_ids: [B, S].
            plan: on the same device.
        """
        B, T = len(features), plan.max_context_len
        position_BT = torch.arange(T, device=features.device).expand(B, -1)
        next_ids = nn.functional.pad(input_ids[:, 1:], (0, 1))[:, :T]
        mask_embedded, mask_hidden = self.mask_inputs()
        # below depth 0 all elements read the same: the first layer projects one row for all of them
        hidden, deeper = self.start(features[:, :T]), mask_hidden[None]
        read: tuple[Tensor, Tensor] | None = self.frozen.embed(next_ids), mask_embedded[None]
        table, deep_table = self.rotary(position_BT), self.rotary(plan.position_C)
        queried, tables = None, (table, table, deep_table)
        for depth, layer in enumerate(self.layers):
            if depth == len(self.layers) - 1:  # beyond the last layer's keys only supervised elements matter
                queried, tables = plan.active_BM, (table, self.rotary(plan.active_BM), deep_table)
            arguments = (layer, read, hidden, deeper, tables, queried, plan, self.attention)
            hidden, deeper = self.run(_chain_layer, *arguments)
            read = None
        return torch.cat((hidden.flatten(0, 1), deeper))


def _chain_layer(
    layer: Any, embedded: tuple[Tensor, Tensor] | None, hidden: Tensor, deeper: Tensor, tables: Any,
    queried_BM: Tensor | None, plan: ChainPlan, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One layer over positions [B, T, D] and chains [C, D], or [1, D] where all read the same.

    ``embedded`` of both for a wide layer; tables of positions, of queried positions (None: of all) and of chains.
    """
    if embedded is None:
        (first, residual), (deep, deep_residual) = ((layer.input_layernorm(x), x) for x in (hidden, deeper))
    else:
        (first, residual), (deep, deep_residual) = map(partial(wide_input, layer), embedded, (hidden, deeper))
    attention, C, T = layer.self_attn, len(plan.position_C), plan.max_context_len
    context = attention.keys_values(first, tables[0])
    own = [part.expand(C, -1, -1) for part in attention.keys_values(deep, tables[2])]
    queried = torch.arange(T, device=first.device).expand(len(first), -1) if queried_BM is None else queried_BM
    if queried_BM is not None:
        index = queried_BM[..., None]
        first, residual = (x.gather(1, index.expand(-1, -1, x.shape[-1])) for x in (first, residual))
    queries = attention.queries(first, tables[1])[:, :, None]
    mixed = attend(queries, context, None, queried + 1, attention.scale, backend)[:, :, 0]
    deep_queries, chains = attention.queries(deep, tables[2]).expand(C, -1, -1), []
    for span in plan.spans:
        span_queries = _take(deep_queries, span.element_BNM[..., -span.num_queries :])
        keys, values = (_take(part, span.element_BNM) for part in own)
        where = (span.anchor_BN + 1, attention.scale, backend)
        chains.append(attend(span_queries, context, (keys, values), *where, causal=True).flatten(0, 2))
    deep_mixed = torch.cat(chains).index_select(0, plan.cell_C)
    return layer.finish(residual, mixed), layer.finish(deep_residual.expand(C, -1), deep_mixed)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]``, whose gradient is added row by row."""
    return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:])


class PEagleDrafter(Drafter):
    """Depth-0 keys and values of committed positions, and the hidden states of the chain at the newest one.

    What a chain reads is known as soon as its anchor is committed, so :meth:`extend` runs new positions and the chain
    after them in one pass. The chain's keys follow the new positions until the next pass.
    """

    model: PEagleDraft

    def __init__(self, model: PEagleDraft, batch_size: int, max_length: int) -> None:
        super().__init__(model, batch_size, max_length)
        self._wide = WideInput(model.layers[0], self._layers[0])
        with torch.no_grad():
            self._mask_embedded_D, self._mask_hidden_D = model.mask_inputs()
        self._chain_J = torch.arange(1, self.max_draft, device=model.device)
        self._drafted_BKD = self._mask_hidden_D.new_zeros(batch_size, self.max_draft, model.shape.hidden_size)

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """See :meth:`Drafter.move_rows`."""
        super().move_rows(source, target)
        self._drafted_BKD[target] = self._drafted_BKD[source]

    @torch.no_grad()
    def extend(
        self, features: Tensor, tokens: Tensor, counts: Tensor, max_context_len: int, rows: Tensor | None = None
    ) -> None:
        """Append (features of position i, token i + 1), and draft after the newest of them."""
        model, J = self.model, len(self._chain_J)
        R, N = tokens.shape
        row_R = self._row_B[:R] if rows is None else rows
        start_R1, last_R1 = self._length_B[row_R, None], (counts - 1).clamp_min(0)[:, None]
        newest_R1 = start_R1 + last_R1
        own_RN, chain_RJ = start_R1 + torch.arange(N, device=tokens.device), start_R1 + (N - 1) + self._chain_J
        slots, positions = torch.cat((own_RN, chain_RJ), 1), torch.cat((own_RN, newest_R1 + self._chain_J), 1)
        embedded = torch.cat((model.frozen.embed(tokens), self._mask_embedded_D.expand(R, J, -1)), dim=1)
        hidden = torch.cat((model.start(features), self._mask_hidden_D.expand(R, J, -1)), dim=1)
        seen = max_context_len + J
        table, index = self._rotary.at(positions, seen), self._reserve(seen, slots, row_R)
        slot_S = torch.arange(seen, device=tokens.device)
        own_chain = (slot_S >= start_R1[..., None] + N) & (slot_S <= chain_RJ[..., None])
        visible = torch.cat((slot_S <= own_RN[..., None], (slot_S <= newest_R1[..., None]) | own_chain), dim=1)
        row_R1, kept_RK = self._row_B[:R, None], torch.cat((last_R1, (N - 1 + self._chain_J).expand(R, -1)), dim=1)
        bias = score_bias(visible, self._groups, hidden.dtype)
        for depth, (layer, cache) in enumerate(zip(self._layers, self._cache, strict=True)):
            read, residual = (layer.input_norm(hidden), hidden) if depth else self._wide(embedded, hidden)
            queries, keys, values = layer.queries_keys_values(read, table)
            cache.write((keys, values), index)
            if depth == len(self._layers) - 1:  # beyond the last layer's keys only the chain matters
                queries, residual = queries[row_R1, kept_RK], residual[row_R1, kept_RK]
                bias = score_bias(visible[row_R1, kept_RK], self._groups, hidden.dtype)
            mixed = attend_ragged(queries, cache.view(R if rows is None else rows, seen), bias, layer.scale)
            hidden = layer.finish(residual, mixed)
        self._drafted_BKD[row_R] = torch.where((counts > 0)[:, None, None], hidden, self._drafted_BKD[row_R])
        self._length_B[row_R] += counts

    @torch.no_grad()
    def propose(self, last_token: Tensor, sample: Sampler, max_draft: int | None = None) -> Proposal:
        """K tokens from the states that :meth:`extend` left (it read ``last_token``)."""
        count = min(max_draft or self.max_draft, self.max_draft)
        hidden = self._norm(self._drafted_BKD[: len(last_token), :count])
        logits = self.model.expand_to_target_vocab(self.model.head.logits(hidden).float())
        tokens, probs = zip(*(sample(logits[:, k], k) for k in range(count)), strict=True)
        known = [prob for prob in probs if prob is not None]
        return Proposal(torch.stack(tokens, dim=1), torch.stack(known, dim=1) if known else None, None)


def chain_metrics(accept_NK: Tensor, mask_NK: Tensor) -> dict[str, WeightedSum]:
    """accept_rate by depth; tau = 1 + sum over depths of the mean of prod_{j <= d} c*_j over the chains that reach d.

    Chains are dropped at random: those that are left at a depth stand for all.
    """
    alive_NK = mask_NK.cumprod(dim=-1)
    count_K = alive_NK.sum(dim=0)
    survived_K = (accept_NK * alive_NK).cumprod(dim=-1).sum(dim=0) / count_K.clamp_min(1.0)
    return {
        "accept_rate": WeightedSum((accept_NK * mask_NK).sum(dim=0), mask_NK.sum(dim=0)),
        "tau": WeightedSum(count_K[0] * (1.0 + survived_K.sum()), count_K[0]),
    }


class PEagle(Algorithm):
    """The published recipe: four layers, K 8, r .7 with floor .2."""

    name = "p_eagle"
    config_class = PEagleConfig
    model_class = PEagleDraft
    drafter_class = PEagleDrafter
    architecture = "PEagleModel"
    own_fields = (
        OwnField("mask_token_id", "mask_token_id", learned=True),
        OwnField("num_depths", "num_depths", training_only=True),
        OwnField("keep_ratio", "keep_ratio", training_only=True),
        OwnField("keep_floor", "keep_floor", training_only=True),
        *NORM_FIELDS,
    )
    starts_from = ("eagle3",)
    heads = ("fc_norm.", "input_norm.", "mask.")
    tiny_section: ClassVar[dict[str, Any]] = {"num_layers": 2, "num_depths": 4, "mask_token_id": 3}

    def check_target(self, config: PEagleConfig, target: TargetSpec) -> None:
        """See :meth:`Algorithm.check_target`."""
        super().check_target(config, target)
        target.check_token(config.mask_token_id, "draft.mask_token_id")

    def card_rows(self, config: PEagleConfig, shape: Shape) -> list[tuple[str, object]]:
        """See :meth:`Algorithm.card_rows`."""
        return [*super().card_rows(config, shape), ("mask token", config.mask_token_id)]

    def build(self, config: PEagleConfig, target: TargetSpec, seed: int = 0) -> PEagleDraft:
        """See :meth:`Algorithm.build`; what stands for unknown features and tokens starts as an embedding does."""
        model = cast(PEagleDraft, super().build(config, target, seed))
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in model.mask.parameters():
            nn.init.normal_(parameter, 0.0, float(target.config.get("initializer_range", 0.02)), generator)
        return model

    def plan(self, config: PEagleConfig, supervision: Supervision) -> ChainPlan:
        """See :meth:`Algorithm.plan`; chains are drawn from the key of their sample."""
        supervised = supervised_slots(supervision, 1)[0]
        drawn = [draw_chains(row, config, supervision.generator(number)) for number, row in enumerate(supervised)]
        return ChainPlan.make(supervised, torch.stack(drawn), config.num_depths)

    def objective(self, model: PEagleDraft, batch: Batch) -> LossTerms:
        """The loss over all supervised elements; the slots of a chain are the depths of an anchor."""
        plan = cast(ChainPlan, batch.plan)
        hidden = model.train_hidden(batch.features, batch.input_ids, plan)
        hidden_RD = model.norm(hidden.index_select(0, plan.element_R))
        anchors = len(batch.input_ids) * plan.max_context_len
        chains = Chains(plan.grid_R, anchors, plan.num_depths, model.config.d_pace)
        head = chain_loss(model, batch, plan.rows, plan.position_P, hidden_RD, chains)
        metrics = chain_metrics(*scattered(head.measured_R, plan.grid_R, anchors, plan.num_depths))
        return head.terms(plan.weight, metrics)


P_EAGLE = PEagle()
