"""Eagle3: an autoregressive drafter trained with training-time test (TTT).

Slot t starts from g = fc(features[t]) and the token x_{t+1} and predicts x_{t+2}; at TTT step j it continues from its
own output of step j - 1 and the token x_{t+1+j}, as it will when decoding, and predicts x_{t+2+j}. A query at step j
sees the step-0 keys of positions <= t and its own slot's keys of steps 1..j. Each step is compared with the target's
distribution at t + 1 + j by soft cross-entropy, or by what ``loss`` names:

    loss = sum_j decay^j * mean over sequences of (sum over supervised slots of soft CE / length of the sequence)

EAGLE-3.1 is four options: a norm of every target layer's features before fc (``fc_norm``), one norm of all of them
(``norm_before_fc``), the normed g as the first layer's residual (``norm_before_residual``), and the normed output as
what is fed back (``norm_output``). Without them: Eagle3 as released.

B batch, S sequence, N active slots of a row (those that any step supervises), T TTT steps, L target layers, D hidden
size, R supervised (step, slot) pairs, P distinct target positions of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from deepspec.algorithms.base import (
    Algorithm,
    Drafter,
    DraftModel,
    Proposal,
    Sampler,
    require,
    require_at_least,
)
from deepspec.algorithms.block import acceptance_metrics, scattered
from deepspec.algorithms.eagle import NORM_FIELDS, EagleConfig, EagleDraft, WideInput, chain_loss, wide_input
from deepspec.algorithms.own_fields import OwnField
from deepspec.batch import Batch, LossPlan, Part, Supervision
from deepspec.families.base import Family, Shape
from deepspec.metrics import LossTerms
from deepspec.nn.chains import Chains
from deepspec.nn.fused import FusedLayer
from deepspec.nn.loss_chunk import LossWeights
from deepspec.nn.losses import HeadRows
from deepspec.nn.ragged import RaggedKV, attend_ragged, score_bias
from deepspec.nn.sequence import SequenceGroup
from deepspec.nn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(EagleConfig):
    """The ``draft:`` section of an Eagle3 recipe."""

    algorithm: ClassVar[str] = "eagle3"
    norm_output: bool = False  # the normed output is fed back and goes to the head, not the output before the norm
    ttt_length: int = 7  # steps unrolled in training, and tokens drafted a round
    step_loss_decay: float = 0.8  # each step's loss weighs so much of the one before

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "ttt_length")
        require(0 < self.step_loss_decay <= 1, "step_loss_decay", self.step_loss_decay, "above 0, at most 1")

    @property
    def published_loss(self) -> LossWeights:
        """Soft cross-entropy."""
        return LossWeights(soft_ce=1.0)

    @property
    def max_draft(self) -> int:
        """K: as many tokens as TTT steps were trained."""
        return self.ttt_length


def supervised_slots(supervision: Supervision, steps: int) -> Tensor:
    """[T, B, S] bool: slot t is supervised at step j exactly when token t + 2 + j is."""
    mask = supervision.loss_mask.bool()
    inside = torch.arange(mask.shape[1]) < supervision.lengths[:, None]
    shifted = torch.zeros(steps, *mask.shape, dtype=torch.bool)
    for j in range(steps):
        shifted[j, :, : -(2 + j)] = (mask & inside)[:, 2 + j :]
    return shifted


@dataclass(frozen=True)
class TTTPlan(LossPlan):
    """Which (step, slot) pairs are supervised, sorted by target position; the weight is the number of sequences."""

    active_BN: Tensor  # int64 slots t that some step supervises, 0 where a row has fewer
    pair_R: Tensor  # index of each supervised pair in [T, B, N] flattened
    position_P: Tensor  # index of each distinct target position t + 1 + j in [B, S] flattened
    rows: HeadRows  # without labels, which soft cross-entropy does not read
    num_steps: int
    max_context_len: int  # one more than the last active slot: the step-0 keys that any slot sees
    everyone_BN: Tensor  # the active slots of all ranks that share the conversations, rank by rank

    @staticmethod
    def make(slots_TBS: Tensor, lengths_B: Tensor, decay: float) -> TTTPlan:
        """The plan for the supervised slots ``slots_TBS``; a pair weighs decay^j / length."""
        T, B, S = slots_TBS.shape
        active = slots_TBS.any(dim=0)
        N = int(active.sum(dim=1).max()) if B else 0
        active_BN = torch.zeros(B, N, dtype=torch.int64)
        kept_BN = torch.zeros(B, N, dtype=torch.bool)
        for row in range(B):
            slots = active[row].nonzero()[:, 0]
            active_BN[row, : len(slots)], kept_BN[row, : len(slots)] = slots, True
        pairs_TBN = slots_TBS.gather(2, active_BN.expand(T, B, N)) & kept_BN
        step_R, row_R, column_R = pairs_TBN.nonzero(as_tuple=True)
        position = active_BN[row_R, column_R] + 1 + step_R + S * row_R
        position, order = position.sort(stable=True)
        step_R, row_R, column_R = step_R[order], row_R[order], column_R[order]
        position_P, position_R = torch.unique_consecutive(position, return_inverse=True)
        weight_R = decay ** step_R.double() / lengths_B[row_R].double()
        pair_R = (step_R * B + row_R) * N + column_R
        rows = HeadRows.plan(position_R, weight_R.float())
        context = int(active_BN.max()) + 1 if active_BN.numel() else 1
        return TTTPlan(torch.tensor(float(B)), active_BN, pair_R, position_P, rows, T, context, active_BN)

    def shared(self, part: Part) -> TTTPlan:
        """See :meth:`LossPlan.shared`; a rank has the slots whose positions it has."""
        (B, N), every = self.active_BN.shape, self.active_BN.numel()
        slot_R = self.pair_R % max(every, 1)
        kept_BN = torch.zeros(every, dtype=torch.bool).index_fill(0, slot_R, True).view(B, N)
        owner_BN = torch.where(kept_BN, self.active_BN % part.of, -1)
        of_ranks = [owner_BN == rank for rank in range(part.of)]
        n = max((int(mine.sum(dim=1).max()) for mine in of_ranks), default=0) if N else 0
        everyone_BPn = torch.arange(part.of)[:, None].repeat(B, 1, n)  # a rank's own first position where it has fewer
        for rank, mine in enumerate(of_ranks):
            row, column = mine.nonzero(as_tuple=True)
            everyone_BPn[row, rank, (mine.cumsum(dim=1) - 1)[row, column]] = self.active_BN[row, column]
        mine = of_ranks[part.number]
        keep_R = mine.flatten()[slot_R]
        column_R = (mine.cumsum(dim=1) - 1).flatten()[slot_R]
        step_R, row_R = self.pair_R // max(every, 1), slot_R // max(N, 1)
        rows, distinct = self.rows.kept(keep_R)
        return replace(
            self, weight=self.weight / part.of, active_BN=everyone_BPn[:, part.number].contiguous(),
            pair_R=((step_R * B + row_R) * n + column_R)[keep_R], position_P=self.position_P[distinct], rows=rows,
            everyone_BN=everyone_BPn.flatten(1),
        )  # fmt: skip


class Eagle3Draft(EagleDraft):
    """All layers are wide; a layer's residual is the hidden state."""

    def __init__(self, algorithm: Algorithm, config: Eagle3Config, shape: Shape, family: Family) -> None:
        super().__init__(algorithm, config, shape, family, config.num_layers)

    def fed_back(self, hidden: Tensor) -> Tensor:
        """What the next step starts from, of the last layer's output [.., D]."""
        return self.norm(hidden) if self.config.norm_output else hidden

    def to_head(self, hidden: Tensor) -> Tensor:
        """What the head reads, of what is fed back [.., D]: normed once in either case."""
        return hidden if self.config.norm_output else self.norm(hidden)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [.., V] of what is fed back; -inf outside the reduced vocabulary."""
        return self.expand_to_target_vocab(self.head.logits(self.to_head(hidden)).float())

    def train_hidden(
        self, features: Tensor, input_ids: Tensor, active_BN: Tensor, steps: int, max_context_len: int,
        everyone_BN: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What the active slots feed back at every TTT step, [T, B, N, D].

        Args:
            features: [B, S, L*D]; of this rank's positions where several share the conversations.
            input_ids: [B, S].
            active_BN: the slots to compute, on the same device.
            steps: T.
            max_context_len: one more than the last active slot; only those positions' step-0 keys are ever seen.
            everyone_BN: the active slots of all ranks that share the conversations; None: this one alone.
        """
        everyone_BN = active_BN if everyone_BN is None else everyone_BN
        B, device = len(active_BN), features.device
        position_S = self.sequence.positions(max_context_len, device)
        hidden_BSD = self.start(features[:, : len(position_S)])
        next_ids = torch.nn.functional.pad(input_ids[:, 1:], (0, steps + self.sequence.part.of))
        embedded, table = self.frozen.embed(next_ids[:, position_S]), self.rotary(position_S.expand(B, -1))
        every_S = self.sequence.all_positions(max_context_len, device).expand(B, -1)
        context: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers[:-1]:
            kv = self._step_0_keys(layer, embedded, hidden_BSD, table)
            context.append(kv)
            hidden_BSD = self.run(_first_step, layer, embedded, hidden_BSD, table, kv, every_S, *self._how)
        context.append(self._step_0_keys(self.layers[-1], embedded, hidden_BSD, table))
        index = (active_BN // self.sequence.part.of)[..., None]  # beyond the last layer's keys only these matter
        embedded, hidden = (x.gather(1, index.expand(-1, -1, x.shape[-1])) for x in (embedded, hidden_BSD))
        first = (self.layers[-1], embedded, hidden, self.rotary(active_BN), context[-1], everyone_BN)
        outputs = [self.fed_back(self.run(_first_step, *first, *self._how))]
        own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        for j in range(1, steps):
            tokens = next_ids.gather(1, active_BN + j)
            outputs.append(self.step(outputs[-1], tokens, active_BN + j, everyone_BN + 1, context, own))
        return torch.stack(outputs)

    @property
    def _how(self) -> tuple[SequenceGroup, str]:
        return self.sequence, self.attention

    def _step_0_keys(self, layer: Any, embedded: Tensor, hidden: Tensor, table: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions in one layer."""
        return self.sequence.context(self.run(_layer_keys, layer, embedded, hidden, table), self.shape.num_heads)

    def step(
        self, hidden: Tensor, tokens: Tensor, positions: Tensor, limit: Tensor,
        context: list[tuple[Tensor, Tensor]], own: list[list[tuple[Tensor, Tensor]]],
    ) -> Tensor:  # fmt: skip
        """One TTT step j >= 1 (or one drafted token) of slots [B, N]; appends the slots' keys and values to ``own``.

        Args:
            hidden: [B, N, D], what the previous step feeds back.
            tokens: [B, N], x_{t+1+j}.
            positions: [B, N], t + j.
            limit: t + 1 of the slots of all ranks: the step-0 keys that are seen.
            context: step-0 keys and values of every layer.
            own: per layer the keys and values of earlier steps >= 1 of the slots of all ranks.
        """
        embedded, table = self.frozen.embed(tokens), self.rotary(positions)
        for layer, seen, mine in zip(self.layers, context, own, strict=True):
            arguments = (layer, embedded, hidden, table, seen, tuple(mine), limit, *self._how)
            hidden, kv = self.run(_step_layer, *arguments)
            mine.append(kv)
        return self.fed_back(hidden)


def _layer_keys(layer: Any, embedded: Tensor, hidden: Tensor, table: Any) -> tuple[Tensor, Tensor]:
    keys_values: tuple[Tensor, Tensor] = layer.self_attn.keys_values(wide_input(layer, embedded, hidden)[0], table)
    return keys_values


def _first_step(
    layer: Any, embedded: Tensor, hidden: Tensor, table: Any, context: tuple[Tensor, Tensor], everyone: Tensor,
    sequence: SequenceGroup, backend: str,
) -> Tensor:  # fmt: skip
    joined, residual = wide_input(layer, embedded, hidden)
    queries = layer.self_attn.queries(joined, table)[:, :, None]
    mixed = sequence.attend(queries, context, None, everyone + 1, layer.self_attn.scale, backend)
    output: Tensor = layer.finish(residual, mixed[:, :, 0])
    return output


def _step_layer(
    layer: Any, embedded: Tensor, hidden: Tensor, table: Any, context: tuple[Tensor, Tensor],
    mine: tuple[tuple[Tensor, Tensor], ...], limit: Tensor, sequence: SequenceGroup, backend: str,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    joined, residual = wide_input(layer, embedded, hidden)
    queries = layer.self_attn.queries(joined, table)[:, :, None]
    keys, values = layer.self_attn.keys_values(joined, table)
    kv = sequence.own_keys((keys[:, :, None], values[:, :, None]), queries.shape[3])
    earlier = [torch.cat(parts, dim=2) for parts in zip(*mine, kv, strict=True)]
    mixed = sequence.attend(queries, context, (earlier[0], earlier[1]), limit, layer.self_attn.scale, backend)
    return layer.finish(residual, mixed[:, :, 0]), kv


class Eagle3Drafter(Drafter):
    """Keys and values of committed positions, and what the newest one feeds back."""

    model: Eagle3Draft

    def __init__(self, model: Eagle3Draft, batch_size: int, max_length: int) -> None:
        super().__init__(model, batch_size, max_length)
        self.max_children = model.config.draft_vocab_size or model.shape.vocab_size
        self._inputs = [self._input_of(depth) for depth in range(len(self._layers))]
        self._newest_BD = model.fc.weight.detach().new_zeros(batch_size, model.shape.hidden_size)

    def _input_of(self, depth: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(embedding, hidden state) -> what a layer reads, and what it adds to."""
        return WideInput(self.model.layers[depth], self._layers[depth])

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """See :meth:`Drafter.move_rows`."""
        super().move_rows(source, target)
        self._newest_BD[target] = self._newest_BD[source]

    @torch.no_grad()
    def extend(
        self, features: Tensor, tokens: Tensor, counts: Tensor, max_context_len: int, rows: Tensor | None = None
    ) -> None:
        """Append (features of position i, token i + 1): step 0 for the new positions."""
        model = self.model
        R, N = tokens.shape
        row_R = self._row_B[:R] if rows is None else rows
        slots = self._length_B[row_R, None] + torch.arange(N, device=tokens.device)
        last = (counts - 1).clamp_min(0)[:, None]  # [R, 1], the newest of the new positions
        self._max_context_len = max_context_len
        hidden, embedded = model.start(features), model.frozen.embed(tokens)
        table = self._rotary.at(slots, max_context_len + N)
        index = self._reserve(max_context_len + self.max_draft, slots, row_R)
        for depth, (layer, wide, cache) in enumerate(zip(self._layers, self._inputs, self._cache, strict=True)):
            joined, residual = wide(embedded, hidden)
            queries, keys, values = layer.queries_keys_values(joined, table)
            cache.write((keys, values), index)
            own = slots
            if depth == len(self._layers) - 1:  # beyond the last layer's keys only the newest position matters
                row_R1, own = self._row_B[:R, None], slots.gather(1, last)
                queries, residual = queries[row_R1, last], residual[row_R1, last]
            visible = torch.arange(max_context_len, device=own.device) <= own[..., None]
            hidden = self._attend(layer, cache, residual, queries, visible, R if rows is None else rows)
        newest = torch.where((counts > 0)[:, None], model.fed_back(hidden[:, 0]), self._newest_BD[row_R])
        self._newest_BD[row_R] = newest
        self._length_B[row_R] += counts

    @torch.no_grad()
    def propose(self, last_token: Tensor, sample: Sampler, max_draft: int | None = None) -> Proposal:
        """K tokens one by one, each from the output of the one before (:meth:`extend` read ``last_token``)."""
        count = min(max_draft or self.max_draft, self.max_draft)
        R = len(last_token)
        hidden = self._newest_BD[:R, None]
        keys = torch.arange(self._max_context_len + self.max_draft, device=last_token.device)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for k in range(count):
            if k:
                slots = self._length_B[:R, None] + (k - 1)
                hidden = self._step(hidden, tokens[-1][:, None], slots, slots, keys <= slots[..., None])
            token, prob = sample(self.model.draft_logits(hidden)[:, 0], k)
            tokens.append(token)
            if prob is not None:
                probs.append(prob)
        return Proposal(torch.stack(tokens, dim=1), torch.stack(probs, dim=1) if probs else None, None)

    @torch.no_grad()
    def propose_tree(self, last_token: Tensor, tree: Tree) -> Proposal:
        """All nodes of a depth in one step, each from the output of its parent; its children are its likeliest tokens.

        The root is at the newest position, so node i is written i positions after it.
        """
        R = len(last_token)
        root_R = self._length_B[:R] - 1
        seen = self._max_context_len + len(tree)
        hidden = self._newest_BD[:R, None]
        tokens: list[Tensor] = []
        for depth, children in enumerate(tree.children, 1):
            if tokens:
                nodes = tree.level(depth - 1)
                slots = root_R[:, None] + torch.arange(nodes.start, nodes.stop, device=root_R.device)
                positions = (root_R + (depth - 1))[:, None].expand_as(slots)
                hidden = self._step(hidden, tokens[-1], positions, slots, tree.visible(root_R, nodes, seen))
            tokens.append(self.model.draft_logits(hidden).topk(children).indices.flatten(1))
            hidden = hidden.repeat_interleave(children, dim=1)
        return Proposal(torch.cat(tokens, dim=1), None, None)

    def _step(self, hidden: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        """The output [R, N, D] for drafted ``tokens`` [R, N] at ``positions``; writes their keys to ``slots`` [R, N].

        ``visible`` [R, N, S]: which slots each of them sees.
        """
        R = len(tokens)
        embedded, table = self.model.frozen.embed(tokens), self._rotary.at(positions, visible.shape[-1])
        index = self._reserve(visible.shape[-1], slots, self._row_B[:R])
        for layer, wide, cache in zip(self._layers, self._inputs, self._cache, strict=True):
            joined, residual = wide(embedded, hidden)
            queries, keys, values = layer.queries_keys_values(joined, table)
            cache.write((keys, values), index)
            hidden = self._attend(layer, cache, residual, queries, visible, R)
        return self.model.fed_back(hidden)

    def _attend(
        self, layer: FusedLayer, cache: RaggedKV, residual: Tensor, queries: Tensor, visible: Tensor, rows: int | Tensor
    ) -> Tensor:
        bias = score_bias(visible, self._groups, residual.dtype)
        queries, gate = layer.parted(queries)
        mixed = attend_ragged(queries, cache.view(rows, visible.shape[-1]), bias, layer.scale)
        return layer.finish(residual, mixed, gate)


class Eagle3(Algorithm):
    """The published recipe: one layer, seven TTT steps."""

    name = "eagle3"
    config_class = Eagle3Config
    model_class = Eagle3Draft
    drafter_class = Eagle3Drafter
    architecture = "Eagle3Model"
    own_fields = (
        OwnField("draft_num_hidden_layers", "num_layers"),
        OwnField("ttt_length", "ttt_length", training_only=True),
        OwnField("step_loss_decay", "step_loss_decay", training_only=True),
        *NORM_FIELDS,
        OwnField("norm_output", "norm_output", False),
    )
    heads = ("fc_norm.", "input_norm.")
    shares_sequences = True
    tiny_section: ClassVar[dict[str, Any]] = {"num_layers": 1, "ttt_length": 3}

    def plan(self, config: Eagle3Config, supervision: Supervision) -> TTTPlan:
        """See :meth:`Algorithm.plan`; the loss is a mean of per-sequence means."""
        slots_TBS = supervised_slots(supervision, config.ttt_length)
        decay = config.step_loss_decay if config.d_pace is None else 1.0
        return TTTPlan.make(slots_TBS, supervision.lengths, decay)

    def objective(self, model: Eagle3Draft, batch: Batch) -> LossTerms:
        """The loss of every step; the slots of a chain are the steps of a position."""
        plan = cast(TTTPlan, batch.plan)
        where = (plan.active_BN, plan.num_steps, plan.max_context_len, plan.everyone_BN)
        hidden = model.train_hidden(batch.features, batch.input_ids, *where)
        hidden_RD = model.to_head(hidden.flatten(0, 2).index_select(0, plan.pair_R))
        return step_loss(model, batch, hidden_RD)


def step_loss(model: DraftModel, batch: Batch, hidden_RD: Tensor) -> LossTerms:
    """The loss of the supervised pairs of a :class:`TTTPlan`, by what the head reads of each."""
    plan = cast(TTTPlan, batch.plan)
    slots = plan.active_BN.numel()
    chain_R = plan.pair_R % max(slots, 1) * plan.num_steps + plan.pair_R // max(slots, 1)
    chains = Chains(chain_R, slots, plan.num_steps, model.config.d_pace)
    head = chain_loss(model, batch, plan.rows, plan.position_P, hidden_RD, chains)
    accept_TN, mask_TN = scattered(head.measured_R, plan.pair_R, plan.num_steps, slots)
    return head.terms(plan.weight, acceptance_metrics(accept_TN.T, mask_TN.T))


EAGLE3 = Eagle3()
