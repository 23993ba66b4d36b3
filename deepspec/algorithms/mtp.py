"""MTP: a next-token head of the kind that targets bring with them, trained over several steps (FastMTP).

One head is applied again and again. At step k slot t reads the token x_{t+1+k} and a state h, at step 0 the target's
last one at t, later the head's own output of step k - 1:

    x  = fc([pre_fc_norm_embedding(embed(x_{t+1+k})) | pre_fc_norm_hidden(h)])
    h' = norm(layers(x))                  logits = lm_head(h'), of the token x_{t+2+k}

h' is fed back. Slot t is supervised at step k exactly when token t + 2 + k is, and weighs step_weight_decay^k:

    loss = sum over supervised (k, t) of w_k CE / sum of their w_k        (or what ``loss`` names in CE's place)

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

The layer's MLP is dense; with ``experts`` it is a mixture of experts of the target's sizes, as the heads of such
targets have it. A checkpoint holds the experts one by one or stacked; ours are stacked.

B batch, S sequence, N active slots of a row (those that any step supervises), T steps, D hidden size, R supervised
(step, slot) pairs, P distinct target positions of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.algorithms.base import (
    Algorithm,
    DraftConfig,
    DraftModel,
    require,
    require_at_least,
)
from deepspec.algorithms.eagle3 import Eagle3Drafter, TTTPlan, step_loss, supervised_slots
from deepspec.algorithms.own_fields import OwnField
from deepspec.batch import Batch, Supervision
from deepspec.errors import TargetError
from deepspec.families.base import DRAFT_EXPERTS, EXPERT_KEYS, Family, Shape
from deepspec.families.plain import DraftLayers
from deepspec.metrics import LossTerms
from deepspec.nn.attention import attend
from deepspec.nn.cpu.matmul import Linear
from deepspec.nn.fused import norm_of
from deepspec.nn.layer import DraftLayer, RMSNorm
from deepspec.targets import TargetSpec
from deepspec.targets.stored import StackedTensor, StoredTensor

PREFIX = "mtp."  # of such a head's names in a target's checkpoint
SINGLE = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")
KV = tuple[Tensor, Tensor]
Rows = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, kw_only=True)
class MTPConfig(DraftConfig):
    """The ``draft:`` section of an MTP recipe."""

    algorithm: ClassVar[str] = "mtp"
    steps: int = 3  # that the head is unrolled in training, and tokens drafted a round
    step_weight_decay: float = 0.6  # each step's loss weighs so much of the one before
    step_keys: Literal["committed", "own"] = "committed"  # that later steps see in training; own: each its own step's
    experts: bool = False  # the layer has the target's mixture of experts in place of a dense MLP

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

    def start(self, features: Tensor) -> Tensor:
        """h of step 0, [.., D]."""
        return features.to(self.dtype)

    def fed_back(self, hidden: Tensor) -> Tensor:
        """h' [.., D] of the last layer's output."""
        return self.norm(hidden)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [.., V] of h'; -inf outside the reduced vocabulary."""
        return self.expand_to_target_vocab(self.head.logits(hidden).float())

    def joined(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """x [.., D] of tokens [..] and states [.., D]."""
        embedded = self.pre_fc_norm_embedding(self.frozen.embed(tokens))
        return self.fc(torch.cat((embedded, self.pre_fc_norm_hidden(hidden)), dim=-1))

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
        states, next_ids = self.start(states), F.pad(input_ids[:, 1:], (0, steps))
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
            outputs.append(self.fed_back(hidden))
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
        return self.fed_back(hidden), context


def _dense_layer(
    layer: Any, hidden: Tensor, table: Any, rows: Tensor, rows_table: Any, backend: str
) -> tuple[Tensor, KV]:
    normed = layer.input_layernorm(hidden)
    kv = layer.self_attn.keys_values(normed, table)
    index = rows[..., None].expand(-1, -1, hidden.shape[-1])
    normed, hidden = normed.gather(1, index), hidden.gather(1, index)
    queries, gate = layer.self_attn.queries_gate(normed, rows_table)
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


def stacked(head: Mapping[str, Any], join: Callable[[Rows], Any]) -> dict[str, Any]:
    """A head's tensors with experts that are stored one by one joined into our two: [E, 2I, D] and [E, D, I].

    Args:
        head: by our names, those of single experts as checkpoints have them.
        join: one tensor of rows, each of tensors that follow each other in it.
    """
    joined: dict[str, Any] = {}
    single: dict[str, dict[int, dict[str, Any]]] = {}
    for name, tensor in head.items():
        if (match := SINGLE.fullmatch(name)) is None:
            joined[name] = tensor
        else:
            single.setdefault(match["experts"], {}).setdefault(int(match["number"]), {})[match["part"]] = tensor
    for experts, by_number in single.items():
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            rows = (tuple(by_number[number][part] for part in parts) for number in sorted(by_number))
            joined[f"{experts}.{name}"] = join(tuple(rows))
    return joined


def apart(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`stacked`: a head's tensors with the experts one by one."""
    found: dict[str, Tensor] = {}
    for name, tensor in head.items():
        experts, _, kind = name.rpartition(".")
        if not experts.endswith(".mlp.experts"):
            found[name] = tensor
            continue
        parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
        for number, rows in enumerate(tensor):
            for part, weight in zip(parts, rows.chunk(len(parts)), strict=True):
                found[f"{experts}.{number}.{part}_proj.weight"] = weight
    return found


class MTPDrafter(Eagle3Drafter):
    """Step 0 at committed positions, then one step a token (or a depth of a tree), as Eagle3 drafts."""

    def _input_of(self, depth: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The first layer's input is ``fc`` of both; further layers read the one before."""
        model, norm = cast(MTPDraft, self.model), self._layers[depth].input_norm
        if depth:
            return lambda _, hidden: (norm(hidden), hidden)
        token_norm, state_norm = norm_of(model.pre_fc_norm_embedding), norm_of(model.pre_fc_norm_hidden)

        def joined(embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
            x = model.fc.forward(torch.cat((token_norm(embedded), state_norm(hidden)), dim=-1))
            return norm(x), x

        return joined


class MTP(Algorithm):
    """The published recipe: one layer, three steps, weights .6^k."""

    name = "mtp"
    config_class = MTPConfig
    model_class = MTPDraft
    drafter_class = MTPDrafter
    architecture = "MTPModel"
    own_fields = (
        OwnField("mtp_steps", "steps", training_only=True),
        OwnField("step_weight_decay", "step_weight_decay", training_only=True),
        OwnField("step_keys", "step_keys", training_only=True),
        OwnField(DRAFT_EXPERTS, "experts", default=False, optional=True),
    )
    tiny_section: ClassVar[dict[str, Any]] = {"target_layers": [4], "num_layers": 1, "steps": 3}

    def check_target(self, config: MTPConfig, target: TargetSpec) -> None:
        """The head continues the target's last state: after its final norm, or before."""
        super().check_target(config, target)
        depth = int(target.config.get("num_target_layers") or target.num_layers)  # a draft's config states both
        wanted = f"[{depth}], the state after the target's final norm, or [{depth - 1}], before it"
        layers = list(config.target_layers)
        require(depth - 1 <= layers[0] <= depth, "target_layers", layers, wanted)

    def layers(self, config: MTPConfig, target: TargetSpec) -> DraftLayers:
        """With ``experts`` those of the target's own heads.

        Raises:
            RecipeError: there are none, or ``layers`` states others.
        """
        if not config.experts:
            return super().layers(config, target)
        layers, wanted = target.expert_layers, f"false: {target.model_type} has no experts of a kind that is known here"
        require(layers is not None, "experts", True, wanted)
        require(config.layers is None, "layers", config.layers, "null with experts: its sizes are the target's")
        return cast(DraftLayers, layers)

    def config_json(self, config: MTPConfig, target: TargetSpec, dtype: str = "float32") -> dict[str, Any]:
        """See :meth:`Algorithm.config_json`; with the sizes of the experts, which other drafts have not."""
        published = super().config_json(config, target, dtype)
        if config.experts:
            published |= {key: target.config[key] for key in EXPERT_KEYS if key in target.config}
        return published

    def native(self, config: MTPConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | StackedTensor]:
        """See :meth:`Algorithm.native`: what Qwen3-Next and Qwen3.5 call ``mtp.*``.

        Raises:
            TargetError: a head of another kind.
        """
        other = next((name for name in stored if ".eh_proj." in name), None)
        if other is not None:
            problem = "the target's own head is of another kind: ours have standard attention, and names mtp.*"
            raise TargetError(problem, key=other, remedy="set train.init: random")
        head = {name.removeprefix(PREFIX): one for name, one in stored.items() if name.startswith(PREFIX)}
        found = stacked(head, StackedTensor)
        if bool(found) and any(".experts." in name for name in found) != config.experts:
            problem = "the target's own head is dense" if config.experts else "the target's own head has experts"
            remedy = f"set draft.experts: {'false' if config.experts else 'true'}, or train.init: random"
            raise TargetError(problem, key="draft.experts", found=config.experts, remedy=remedy)
        return found

    def plan(self, config: MTPConfig, supervision: Supervision) -> TTTPlan:
        """The supervised (step, slot) pairs; the weight is the sum of theirs."""
        slots_TBS = supervised_slots(supervision, config.steps)
        decay = config.step_weight_decay if config.d_pace is None else 1.0
        plan = TTTPlan.make(slots_TBS, torch.ones(len(supervision.lengths)), decay)
        return replace(plan, weight=plan.rows.weight_R.sum())

    def objective(self, model: MTPDraft, batch: Batch) -> LossTerms:
        """The loss of every step; without a target's distribution a step counts as accepted where the draft's most
        likely token is the answer's."""
        plan = cast(TTTPlan, batch.plan)
        where = (plan.active_BN, plan.num_steps, plan.max_context_len)
        hidden = model.train_hidden(batch.features, batch.input_ids, *where)
        hidden_RD = hidden.flatten(0, 2).index_select(0, plan.pair_R)
        return step_loss(model, batch, hidden_RD)


MTP_ALGORITHM = MTP()
