"""MTP: a next-token head of the kind that targets bring with them, trained over several steps (FastMTP).

One head is applied again and again. At step k slot t reads the token x_{t+1+k} and a state h, at step 0 the target's
last one at t, later the head's own output of step k - 1:

    x  = fc([pre_fc_norm_embedding(embed(x_{t+1+k})) | pre_fc_norm_hidden(h)])
    h' = norm(layers(x))                  logits = lm_head(h'), of the token x_{t+2+k}

h' is fed back. Slot t is supervised at step k exactly when token t + 2 + k is, and weighs step_weight_decay^k:

    loss = sum over supervised (k, t) of w_k CE / sum of their w_k

With as many supervised slots in every step this is the published sum_k w_k / sum(w) * mean CE of step k; a denominator
of its own for each step would change with the way a step is cut into micro-batches only in the few slots at an end.

Which state h is, ``target.layers`` says: ``[num_layers]``, the state after the target's final norm, which engines hand
to such heads; or ``[num_layers - 1]``, the state before it, on which published heads were fine-tuned. It is a feature
as every other, at all positions of a cache and in decoding.

Which keys a step sees (``step_keys``):

- ``committed``: those of step 0 up to t, and the slot's own of steps 1..k at positions t + 1 .. t + k. This is what a
  draft sees while decoding, whose context is committed positions, in engines as here: one computation for both.
- ``own``: those of its own step at positions 0..t, as the published fine-tuning has it. Decoding has no such keys (a
  context of drafted states, one for each step), so a head trained with them drafts by the rule above all the same.

B batch, S sequence, N active slots of a row (those that any step supervises), T steps, D hidden size, R supervised
(step, slot) pairs, P distinct target positions of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.algorithms.base import (
    Algorithm,
    DraftConfig,
    Drafter,
    DraftModel,
    OwnField,
    Proposal,
    Sampler,
    require,
    require_at_least,
)
from deepspec.algorithms.block import acceptance_metrics, scattered
from deepspec.algorithms.eagle3 import TTTPlan, supervised_slots
from deepspec.batch import Batch, Supervision
from deepspec.families.base import Family, Shape
from deepspec.metrics import LossTerms, WeightedSum
from deepspec.nn.attention import attend
from deepspec.nn.cpu.matmul import Linear
from deepspec.nn.fused import norm_of
from deepspec.nn.layer import DraftLayer, RMSNorm
from deepspec.nn.loss_chunk import LossWeights
from deepspec.nn.losses import head_loss
from deepspec.nn.ragged import attend_ragged, score_bias
from deepspec.nn.tree import Tree
from deepspec.targets import TargetSpec

KV = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class MTPConfig(DraftConfig):
    """The ``draft:`` section of an MTP recipe."""

    algorithm: ClassVar[str] = "mtp"
    steps: int = 3  # that the head is unrolled in training, and tokens drafted a round
    step_weight_decay: float = 0.6  # each step's loss weighs so much of the one before
    step_keys: Literal["committed", "own"] = "committed"  # that later steps see in training; own: each its own step's

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "steps")
        require(0 < self.step_weight_decay <= 1, "step_weight_decay", self.step_weight_decay, "above 0, at most 1")
        layers = list(self.target_layers)
        require(len(layers) == 1, "target_layers", layers, "one: the target's state that the head continues")

    @property
    def max_draft(self) -> int:
        """K: as many tokens as steps were trained."""
        return self.steps


class MTPDraft(DraftModel):
    """Norms of both inputs, ``fc`` over [embedding | state], layers, and a final norm whose output is fed back."""

    def __init__(self, algorithm: Algorithm, config: MTPConfig, shape: Shape, family: Family) -> None:
        super().__init__(algorithm, config, shape, family)
        size = shape.hidden_size
        self.fc = Linear(2 * size, size, bias=False)
        if family.gated:  # a head of the target's own kind has its attention; other drafts are as they are everywhere
            layers = (DraftLayer(shape, family, size, gated=True) for _ in range(config.num_layers))
            self.layers = nn.ModuleList(layers)
        self.pre_fc_norm_embedding = RMSNorm(size, shape.norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(size, shape.norm_eps)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [.., V] of the head's outputs; -inf outside the reduced vocabulary."""
        return self.expand_to_target_vocab(self.head.logits(hidden).float())

    def joined(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """x [.., D] of tokens [..] and states [.., D]."""
        embedded = self.pre_fc_norm_embedding(self.frozen.embed(tokens))
        return self.fc(torch.cat((embedded, self.pre_fc_norm_hidden(hidden.to(self.dtype))), dim=-1))

    def train_hidden(
        self, states: Tensor, input_ids: Tensor, active_BN: Tensor, steps: int, max_context_len: int
    ) -> Tensor:
        """The head's outputs [T, B, N, D] at the active slots of every step.

        Args:
            states: [B, S, D], the target's.
            input_ids: [B, S].
            active_BN: the slots to compute, on the same device.
            steps: T.
            max_context_len: one more than the last active slot: no position after it is seen by any.
        """
        next_ids = F.pad(input_ids[:, 1:], (0, steps))
        if self.config.step_keys == "own":
            return self._own_steps(states, next_ids, active_BN, steps, max_context_len)
        hidden, context = self._dense(states[:, :max_context_len], next_ids[:, :max_context_len], active_BN)
        outputs = [hidden]
        own: list[list[KV]] = [[] for _ in self.layers]
        for k in range(1, steps):
            hidden = self.joined(next_ids.gather(1, active_BN + k), outputs[-1])
            table = self.rotary(active_BN + k)
            for layer, seen, mine in zip(self.layers, context, own, strict=True):
                arguments = (layer, hidden, table, seen, tuple(mine), active_BN + 1, self.attention)
                hidden, kv = self.run(_slot_layer, *arguments)
                mine.append(kv)
            outputs.append(self.norm(hidden))
        return torch.stack(outputs)

    def _own_steps(
        self, states: Tensor, next_ids: Tensor, active_BN: Tensor, steps: int, max_context_len: int
    ) -> Tensor:
        hidden, outputs = states[:, :max_context_len], []
        every = torch.arange(max_context_len, device=states.device).expand(len(states), -1)
        for k in range(steps):
            hidden, _ = self._dense(hidden, next_ids[:, k : k + max_context_len], every)
            outputs.append(hidden.gather(1, active_BN[..., None].expand(-1, -1, hidden.shape[-1])))
        return torch.stack(outputs)

    def _dense(self, states: Tensor, tokens: Tensor, rows: Tensor) -> tuple[Tensor, list[KV]]:
        """One step over all positions: its outputs at ``rows`` [B, n], and every layer's keys and values."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        hidden, context, table = self.joined(tokens, states), [], self.rotary(positions)
        for depth, layer in enumerate(self.layers):
            # beyond the last layer's keys only the rows that are asked for matter
            wanted = rows if depth == len(self.layers) - 1 else positions
            arguments = (layer, hidden, table, wanted, self.rotary(wanted), self.attention)
            hidden, kv = self.run(_dense_layer, *arguments)
            context.append(kv)
        return self.norm(hidden), context


def _dense_layer(
    layer: Any, hidden: Tensor, table: Any, rows: Tensor, rows_table: Any, backend: str
) -> tuple[Tensor, KV]:
    kv = layer.self_attn.keys_values(layer.input_layernorm(hidden), table)
    hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
    queries, gate = layer.self_attn.queries_gate(layer.input_layernorm(hidden), rows_table)
    mixed = attend(queries[:, :, None], kv, None, rows + 1, layer.self_attn.scale, backend)
    return layer.finish(hidden, mixed[:, :, 0], gate), kv


def _slot_layer(
    layer: Any, hidden: Tensor, table: Any, context: KV, mine: tuple[KV, ...], limit: Tensor, backend: str
) -> tuple[Tensor, KV]:
    normed = layer.input_layernorm(hidden)
    kv = layer.self_attn.keys_values(normed, table)
    queries, gate = layer.self_attn.queries_gate(normed, table)
    keys, values = (torch.stack(parts, dim=2) for parts in zip(*mine, kv, strict=True))
    mixed = attend(queries[:, :, None], context, (keys, values), limit, layer.self_attn.scale, backend)
    return layer.finish(hidden, mixed[:, :, 0], gate), kv


class MTPDrafter(Drafter):
    """Keys and values of committed positions, and the head's output at the newest one."""

    model: MTPDraft

    def __init__(self, model: MTPDraft, batch_size: int, max_length: int) -> None:
        super().__init__(model, batch_size, max_length)
        self.max_children = model.config.draft_vocab_size or model.shape.vocab_size
        self._token_norm: Callable[[Tensor], Tensor] = norm_of(model.pre_fc_norm_embedding)
        self._state_norm: Callable[[Tensor], Tensor] = norm_of(model.pre_fc_norm_hidden)
        self._newest_BD = model.fc.weight.detach().new_zeros(batch_size, model.shape.hidden_size)

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """See :meth:`Drafter.move_rows`."""
        super().move_rows(source, target)
        self._newest_BD[target] = self._newest_BD[source]

    @torch.no_grad()
    def extend(
        self, features: Tensor, tokens: Tensor, counts: Tensor, max_context_len: int, rows: Tensor | None = None
    ) -> None:
        """Append (state at position i, token i + 1): step 0 for the new positions."""
        R, N = tokens.shape
        row_R = self._row_B[:R] if rows is None else rows
        slots = self._length_B[row_R, None] + torch.arange(N, device=tokens.device)
        last = (counts - 1).clamp_min(0)[:, None]  # [R, 1], the newest of the new positions
        self._max_context_len = max_context_len
        self._reserve(max_context_len + self.max_draft, slots, row_R)
        visible = torch.arange(max_context_len, device=tokens.device) <= slots[..., None]
        hidden = self._step(features.to(self.model.dtype), tokens, slots, slots, visible, rows, last)
        newest = torch.where((counts > 0)[:, None], hidden[:, 0], self._newest_BD[row_R])
        self._newest_BD[row_R] = newest
        self._length_B[row_R] += counts

    @torch.no_grad()
    def propose(self, last_token: Tensor, sample: Sampler, max_draft: int | None = None) -> Proposal:
        """K tokens one by one, each from the output of the one before (:meth:`extend` read ``last_token``)."""
        R = len(last_token)
        hidden = self._newest_BD[:R, None]
        keys = torch.arange(self._max_context_len + self.max_draft, device=last_token.device)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for k in range(min(max_draft or self.max_draft, self.max_draft)):
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
        """All nodes of a depth in one step, each from the output of its parent; node i is i slots after the newest."""
        root_R = self._length_B[: len(last_token)] - 1
        hidden = self._newest_BD[: len(last_token), None]
        tokens: list[Tensor] = []
        for depth, children in enumerate(tree.children, 1):
            if tokens:
                nodes = tree.level(depth - 1)
                slots = root_R[:, None] + torch.arange(nodes.start, nodes.stop, device=root_R.device)
                positions = (root_R + (depth - 1))[:, None].expand_as(slots)
                visible = tree.visible(root_R, nodes, self._max_context_len + len(tree))
                hidden = self._step(hidden, tokens[-1], positions, slots, visible)
            tokens.append(self.model.draft_logits(hidden).topk(children).indices.flatten(1))
            hidden = hidden.repeat_interleave(children, dim=1)
        return Proposal(torch.cat(tokens, dim=1), None, None)

    def _step(
        self, states: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor,
        rows: Tensor | None = None, last: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The head's outputs [R, N, D]; writes the keys of all layers to ``slots`` [R, N].

        Args:
            states: [R, N, D].
            tokens: [R, N].
            positions: [R, N].
            slots: [R, N].
            visible: [R, N, S] bool, which slots each sees.
            rows: which rows; None: the first R.
            last: [R, 1], the only output that is wanted of each row; None: all.
        """
        R, S = len(tokens), visible.shape[-1]
        own = self._row_B[:R] if rows is None else rows
        table = self._rotary.at(positions, self._max_context_len + max(slots.shape[1], S))
        index = self._reserve(S, slots, own)
        embedded = self._token_norm(self.model.frozen.embed(tokens))
        hidden = self.model.fc.forward(torch.cat((embedded, self._state_norm(states)), dim=-1))
        for depth, (layer, cache) in enumerate(zip(self._layers, self._cache, strict=True)):
            normed = layer.input_norm(hidden)
            queries, keys, values = layer.queries_keys_values(normed, table)
            cache.write((keys, values), index)
            if last is not None and depth == len(self._layers) - 1:  # beyond the keys only the newest matters
                at = self._row_B[:R, None], last
                queries, hidden, normed, visible = queries[at], hidden[at], normed[at], visible[at]
            bias = score_bias(visible, self._groups, hidden.dtype)
            mixed = attend_ragged(queries, cache.view(R if rows is None else rows, S), bias, layer.scale)
            hidden = layer.finish(hidden, mixed, layer.gate(normed))
        return self._norm(hidden)


class MTP(Algorithm):
    """The published recipe: one layer, three steps, weights .6^k."""

    name = "mtp"
    config_class = MTPConfig
    model_class = MTPDraft
    drafter_class = MTPDrafter
    architecture = "MTPModel"
    own_fields = (
        OwnField("mtp_steps", "steps"),
        OwnField("step_weight_decay", "step_weight_decay", training_only=True),
        OwnField("step_keys", "step_keys", training_only=True),
    )
    tiny_section: ClassVar[dict[str, Any]] = {"target_layers": [4], "num_layers": 1, "steps": 3}

    def check_target(self, config: MTPConfig, target: TargetSpec) -> None:
        """The head continues the target's last state: after its final norm, or before."""
        super().check_target(config, target)
        depth = int(target.config.get("num_target_layers") or target.num_layers)  # a draft's config states both
        wanted = f"[{depth}], the state after the target's final norm, or [{depth - 1}], before it"
        layers = list(config.target_layers)
        require(depth - 1 <= layers[0] <= depth, "target_layers", layers, wanted)

    def needs_last_hidden(self, config: MTPConfig) -> bool:
        """Cross-entropy needs only the tokens; the state that the head continues is a feature."""
        return False

    def plan(self, config: MTPConfig, supervision: Supervision) -> TTTPlan:
        """The supervised (step, slot) pairs; the weight is the sum of theirs."""
        slots_TBS = supervised_slots(supervision, config.steps)
        plan = TTTPlan.make(slots_TBS, torch.ones(len(supervision.lengths)), config.step_weight_decay)
        return replace(plan, weight=plan.rows.weight_R.sum())

    def objective(self, model: MTPDraft, batch: Batch) -> LossTerms:
        """CE of every step; a step is accepted where the draft's most likely token is the answer's."""
        plan = cast(TTTPlan, batch.plan)
        where = (plan.active_BN, plan.num_steps, plan.max_context_len)
        hidden = model.train_hidden(batch.features, batch.input_ids, *where)
        hidden_RD = hidden.flatten(0, 2).index_select(0, plan.pair_R)
        label_R = batch.input_ids.flatten()[plan.position_P + 1][plan.rows.position_R]
        label_R, in_vocab_R = model.draft_ids(label_R)
        rows = plan.rows.with_labels(label_R)
        if in_vocab_R is not None:  # a token outside the draft's vocabulary teaches nothing; no draft of it is accepted
            rows = replace(rows, weight_R=rows.weight_R * in_vocab_R)
        head = head_loss(hidden_RD, model.head, rows, LossWeights(ce=1.0), backend=model.loss)
        hit_R = head.hit_R if in_vocab_R is None else head.hit_R * in_vocab_R
        hit_TN, mask_TN = scattered(hit_R, plan.pair_R, plan.num_steps, plan.active_BN.numel())
        metrics = acceptance_metrics(hit_TN.T, mask_TN.T)
        return LossTerms({"ce": WeightedSum(head.combined, plan.weight)}, {"ce": 1.0}, metrics)


MTP_ALGORITHM = MTP()
