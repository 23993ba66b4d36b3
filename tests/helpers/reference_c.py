"""Reference cases of DFlash 2 (``C_dflash2_*``), by speculators (packed rows) and by Automodel (padded rows).

What the sources choose otherwise is passed in: speculators labels a slot with the target's likeliest token and puts a
label that is no candidate in the weakest candidate's place, divides by the number of supervised slots, and lets a
sliding window begin at the same position for all slots of a block; Automodel divides the selector's term by the
weights of the slots whose label is a candidate (ours: of all supervised slots, which the masks alone give).

B documents, T their padded length, N blocks, K slots, C candidates, R supervised slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from reference_cases import CaseErrors
from safetensors.torch import load_file
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.block import BlockDraft
from deepspec.algorithms.block_plan import BlockPlan
from deepspec.algorithms.dflash import Selected, SlotLoss, select
from deepspec.batch import Batch, Supervision
from deepspec.drafts import build_draft
from deepspec.errors import EvaluationError
from deepspec.export.parts import DraftCheckpoint, ImportHints
from deepspec.files import read_json
from deepspec.nn.attention import visibility_mask
from deepspec.nn.chains import Chains
from deepspec.nn.loss_table import LossWeights
from deepspec.nn.losses import head_loss
from deepspec.targets.load import TargetSpec, family_of

FEATURE_LAYERS = (1, 2, 3, 5, 6)
LOSSES = {
    "kl_div": LossWeights(kl=1.0),
    "ce": LossWeights(ce=1.0),
    '{"ce": 0.1, "tv": 0.9}': LossWeights(ce=0.1, tv=0.9),
}


def check(case: Path) -> CaseErrors:
    """Hidden states, masks, losses, gradients and greedy walks of one case."""
    return check_padded(case) if "automodel" in case.name else check_packed(case)


# -- what both sources share ------------------------------------------------------------------------------------------


def common(case: Path, train: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], TargetSpec]:
    """(weights, inputs, identity) of the frozen target that all cases of a seed have."""
    folder = case.parent / f"common_s{train['seed']}"
    config = read_json(folder / "config.json", EvaluationError)
    spec = TargetSpec(str(folder), family_of(config["model_type"], folder), config, config["model_type"])
    return load_file(folder / "model.safetensors"), load_file(folder / "inputs.safetensors"), spec


def imported(case: Path, engine: str, config: dict[str, Any], state: dict[str, Tensor], spec: TargetSpec) -> BlockDraft:
    """The source's draft, read as an import reads it."""
    hints = ImportHints(target=spec, target_layers=FEATURE_LAYERS)
    draft = registry.engine(engine).read(DraftCheckpoint(config, state, case / "config.json"), hints)
    model = cast(BlockDraft, build_draft(draft.config, case / "config.json"))
    model.load_state_dict(draft.state)
    return model.train()


def weights_of(case: Path, train: Mapping[str, Any]) -> dict[str, Tensor]:
    """The draft's weights, which several cases of a seed share."""
    own = case / "model.safetensors"
    shared = case.parent / str(train["weights"]).split()[0]
    found = own if own.is_file() else shared
    if not found.is_file():
        found = case.parent / f"C_dflash2_b8_s{train['seed']}" / "model.safetensors"
    return load_file(found)


def padded_batch(inputs: Mapping[str, Tensor]) -> Batch:
    """The two documents of a seed, right-padded."""
    ids, lengths = inputs["input_ids"], inputs["attention_mask"].sum(dim=1)
    supervision = Supervision(inputs["loss_mask"].bool(), lengths, tuple(range(len(ids))), 0, 0)
    return Batch(supervision, ids, inputs["target_hidden_states"], inputs["target_last_hidden_states"])


def gap(found: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the reference's largest value."""
    return float((found.detach() - wanted).abs().max() / wanted.abs().max()) if wanted.numel() else 0.0


def compare_gradients(
    model: BlockDraft, loss: Tensor, total: float, grads: Mapping[str, Any], errors: CaseErrors
) -> None:
    """The loss and the norm of every parameter's gradient."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    errors.worst("loss", abs(float(loss.detach()) - total) / max(1.0, abs(total)))
    own = dict(model.named_parameters())
    errors.worst("index", float(set(own) != set(grads)))
    for name, reference in grads.items():
        found = 0.0 if own[name].grad is None else float(own[name].grad.norm())
        errors.worst("gradient", abs(found - reference["norm"]) / max(reference["norm"], 1e-12))


def all_slots(model: BlockDraft, batch: Batch, anchor_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Normed hidden states [B, N, K, D] of every slot, the anchor's too, and what the first layer's parts saw."""
    seen: dict[str, Tensor] = {}

    def around(name: str) -> Any:
        def hook(_module: Any, given: tuple[Tensor, ...], found: tuple[Tensor, Tensor]) -> None:
            first = f"{name}_in0" not in seen
            seen[f"{name}_in0" if first else f"{name}_out0"] = found[0] if first else given[0]

        return hook

    first, second = model.layers[0], model.layers[1]
    hooks = [second.input_layernorm.register_forward_pre_hook(lambda _m, given: seen.update(layer0_out=given[0]))]
    if first.attention_conv is not None:
        hooks += [first.attention_conv.register_forward_hook(around("attn"))]
        hooks += [first.mlp_conv.register_forward_hook(around("mlp"))]
    config, model.config = model.config, replace(model.config, sample_from_anchor=True)
    with torch.no_grad():
        hidden = model.train_slots(batch.features, batch.input_ids, anchor_BN, batch.input_ids.shape[1])
    model.config = config
    for one in hooks:
        one.remove()
    return hidden, seen


def walk(model: BlockDraft, hidden_NKD: Tensor, anchor_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(path [N, K], candidates [N, K, C], scores [N, K, C]) of the greedy walk over drafting slots."""
    unary, candidates = model.head.logits(hidden_NKD).topk(model.config.selector_top_k, dim=-1)
    previous, path, scores = anchor_N, [], []
    for k in range(hidden_NKD.shape[1]):
        scores.append(unary[:, k] + model.candidate_selector(hidden_NKD[:, k], previous, candidates[:, k]))
        previous = candidates[:, k].gather(1, scores[-1].argmax(-1, keepdim=True))[:, 0]
        path.append(previous)
    return torch.stack(path, 1), candidates, torch.stack(scores, 1)


# -- speculators: packed rows -----------------------------------------------------------------------------------------


def check_packed(case: Path) -> CaseErrors:
    """A case by speculators; its packed row is cut into documents, each a row of ours."""
    train = read_json(case / "train.json", EvaluationError)
    config = read_json(case / "config.json", EvaluationError)
    weights, shared, spec = common(case, train)
    model = imported(case, "speculators", dict(config), weights_of(case, train), spec)
    model.attach(weights["model.embed_tokens.weight"], weights["lm_head.weight"])
    packed = Packed(case, model, shared, weights)
    errors = CaseErrors(case.name, convention="labels, candidates, normalisation and window of speculators")
    packed.compare_states(errors)
    packed.compare_walk(errors)
    for name in ("kl_fixed", "ce_dpace", "cetv_fixed"):
        if name in train:
            packed.compare_step(train[name], errors)
    return errors


class Packed:
    """A packed row's blocks as blocks of padded rows."""

    def __init__(self, case: Path, model: BlockDraft, shared: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        self.model, self.inputs = model, load_file(case / "inputs.safetensors")
        self.outputs = load_file(case / "outputs.safetensors")
        self.documents = self.inputs["document_ids"][0]
        batch = padded_batch(shared)
        B, T = batch.input_ids.shape
        starts = torch.tensor([int((self.documents == row).nonzero()[0]) for row in range(B)])
        anchors = self.inputs["anchors"]
        self.row_N = self.documents[anchors]
        local_N = anchors - starts[self.row_N]
        most = int(torch.bincount(self.row_N, minlength=B).max())
        self.anchor_BN = torch.zeros(B, most, dtype=torch.int64)
        self.column_N = torch.tensor([int((self.row_N[:n] == row).sum()) for n, row in enumerate(self.row_N)])
        self.anchor_BN[self.row_N, self.column_N] = local_N
        last = torch.zeros(B, T, spec_width(self.inputs))
        self.place_S = (
            self.documents.clamp_min(0),
            torch.arange(len(self.documents)) - starts[self.documents.clamp_min(0)],
        )
        real = self.documents >= 0
        norm = weights["model.norm.weight"]
        states = self.inputs["verifier_last_hidden_states"][0]
        states = torch.nn.functional.rms_norm(states, norm.shape, norm, 1e-6)
        last[self.place_S[0][real], self.place_S[1][real]] = states[real]
        self.batch = replace(batch, last_hidden=last)
        window = model.config.sliding_window
        if window is not None:  # the same for all slots
            model.window_start = lambda anchor_BN: (  # type: ignore[method-assign]
                (anchor_BN - window)[..., None].expand(-1, -1, model.config.block_size)
            )
        hidden, self.seen = all_slots(model, self.batch, self.anchor_BN)
        self.hidden_NKD = self.by_block(hidden)

    def by_block(self, x_BNK: Tensor) -> Tensor:
        """[N, K, ..] in the order of the packed row's anchors."""
        return x_BNK[self.row_N, self.column_N]

    def drafting(self, x_K: Tensor) -> Tensor:
        """The slots [.., K', ..] of the second axis that draft."""
        return x_K[:, self.model.config.block_size - self.model.config.max_draft :]

    def compare_states(self, errors: CaseErrors) -> None:
        """Hidden states inside and after, logits, and which positions the first layer sees."""
        out, N, K = self.outputs, len(self.row_N), self.model.config.block_size
        logits = self.model.head.logits(self.hidden_NKD).flatten(0, 1)
        found = {name: self.by_block(value).flatten(0, 1) for name, value in self.seen.items()}
        found |= {"hidden": self.hidden_NKD.flatten(0, 1), "logits32": logits[:, :32], "lse": logits.logsumexp(-1)}
        for name, value in found.items():
            errors.worst("logits", gap(value, out[name]))
        errors.worst("index", float((logits.argmax(-1) != out["argmax"]).sum()))
        config, T = self.model.config, self.batch.input_ids.shape[1]
        start = None if 0 in config.full_layers else self.model.window_start(self.anchor_BN)
        seen = visibility_mask(self.anchor_BN, K, K, T, config.causal, start)  # [B, N*K, T + N*K]
        context = self.by_block(seen[..., :T].unflatten(1, (-1, K)))  # [N, K, T]
        real = (self.documents == self.row_N[:, None]) & (self.documents >= 0)  # [N, S]
        wanted = self.inputs["attn_mask_layer0"].bool()
        S = len(self.documents)
        mine = (
            context[torch.arange(N)[:, None], :, self.place_S[1].clamp_max(T - 1)[None]] & real[..., None]
        )  # [N, S, K]
        errors.worst("index", float((mine.transpose(1, 2).flatten(0, 1) != wanted[:, :S]).sum()))
        own = torch.ones(K, K, dtype=torch.bool).tril(0 if config.causal else K)
        errors.worst("index", float((torch.block_diag(*[own] * N).bool() != wanted[:, S:]).sum()))

    def compare_walk(self, errors: CaseErrors) -> None:
        """Candidates, scores and path of the greedy walk."""
        out = self.outputs
        with torch.no_grad():
            path, candidates, scores = walk(
                self.model, self.drafting(self.hidden_NKD), out["walk_anchor_tokens"].long()
            )
        errors.worst("index", float((path != out["walk_path"]).sum()))
        errors.worst("index", float((candidates != out["walk_candidates"]).sum()))
        errors.worst("logits", gap(scores, out["walk_scores"]))

    def plan(self, gamma: float | None) -> BlockPlan:
        """The slots that the source supervises: by the mask of row a + k, the anchor's too where it drafts."""
        K, config = self.model.config.block_size, self.model.config
        row_NK = (self.inputs["anchors"][:, None] + torch.arange(K)).clamp_max(len(self.documents) - 1)
        mask_NK = self.inputs["loss_mask"][0].bool()[row_NK] & self.inputs["anchor_valid"].bool()[:, None]
        if not config.sample_from_anchor:
            mask_NK[:, 0] = False
        self.wrong_masks = float((mask_NK.flatten() != self.outputs["loss_mask"].bool()).sum())
        supervised = torch.zeros(*self.anchor_BN.shape, config.max_draft, dtype=torch.bool)
        supervised[self.row_N, self.column_N] = self.drafting(mask_NK)
        return BlockPlan.of_slots(self.anchor_BN, supervised, self.batch.input_ids.shape[1], gamma)

    def rows(self, plan: BlockPlan, values_R: Tensor) -> Tensor:
        """A value per supervised slot as [N * K] of the packed row, zeros elsewhere."""
        config = self.model.config
        flat = torch.zeros(self.anchor_BN.numel() * config.max_draft, *values_R.shape[1:], dtype=values_R.dtype)
        flat[plan.slot_R] = values_R.detach()
        grid = self.by_block(flat.view(*self.anchor_BN.shape, config.max_draft, *values_R.shape[1:]))
        missing = config.block_size - config.max_draft
        return torch.cat((grid.new_zeros(len(grid), missing, *grid.shape[2:]), grid), dim=1).flatten(0, 1)

    def compare_step(self, reference: Mapping[str, Any], errors: CaseErrors) -> None:
        """One training step: rows, both losses, gradients."""
        model, settings, out = self.model, reference["settings"], self.outputs
        alpha = settings["dpace_alpha"] if settings["per_position_loss_weight"] == "dpace" else None
        plan = self.plan(settings["gamma"] if alpha is None else None)
        errors.worst("index", self.wrong_masks)
        weights = LOSSES[settings["loss"]]
        hidden = model.train_slots(self.batch.features, self.batch.input_ids, plan.anchor_BN, plan.max_context_len)
        hidden_RD = hidden.flatten(0, 2).index_select(0, plan.slot_R)
        target_PD = self.batch.last_hidden.flatten(0, 1)[plan.position_P]  # type: ignore[union-attr]
        label_P = model.head.logits(target_PD).argmax(-1)
        rows = plan.rows.with_labels(label_P[plan.rows.position_R])
        chains = Chains(plan.slot_R, plan.anchor_BN.numel(), model.config.max_draft, alpha)
        count = model.config.selector_top_k
        head = head_loss(hidden_RD, model.head, rows, weights, target_PD, chains=chains, candidates=count)
        supervised = self.rows(plan, torch.ones(len(plan.slot_R))).bool()
        wanted = out["target_argmax"][supervised]
        errors.worst("index", float((self.rows(plan, rows.label_R)[supervised] != wanted).sum()))
        previous_R = self.batch.input_ids.flatten()[plan.position_P][rows.position_R]
        selected = self.selector(SlotLoss(head, plan, hidden_RD, rows, chains, previous_R, None), errors)
        selector_ce, weight_R = selected.ce_R, selected.weight_R
        names = {"row_ce": head.rows.ce, "row_selector_ce": selector_ce}
        names |= {"w_dpace_unary_ce": head.weight_R, "w_dpace_selector_ce": weight_R} if alpha is not None else {}
        names |= {"w_fixed_g4": head.weight_R} if alpha is None and settings["gamma"] == 4.0 else {}
        for name, value in names.items():
            errors.worst("loss", gap(self.rows(plan, value)[supervised], out[name][supervised]))
        total = len(plan.slot_R) + 1e-5
        unary, selected = head.combined / total, (weight_R * selector_ce).sum() / total
        for mine, theirs in ((unary, reference["unary_loss"]), (selected, reference["selector_loss"])):
            errors.worst("loss", abs(float(mine.detach()) - theirs) / max(1.0, abs(theirs)))
        loss = unary + settings["selector_loss_alpha"] * selected
        compare_gradients(model, loss, reference["total_loss"], reference["grads"], errors)

    def selector(self, slots: SlotLoss, errors: CaseErrors) -> Selected:
        """The selector over the candidates, a label that is none of them in the weakest one's place."""
        candidates, label_R = slots.head.candidates_RC, slots.rows.label_R
        found = (candidates == label_R[:, None]).any(-1)
        placed = candidates.clone()
        placed[:, -1] = torch.where(found, candidates[:, -1], label_R)
        supervised = self.rows(slots.plan, torch.ones(len(label_R))).bool()
        wanted = self.outputs["training_candidate_ids"][supervised]
        errors.worst("index", float((self.rows(slots.plan, placed)[supervised] != wanted).sum()))
        contains = self.outputs["contains_target"][supervised].bool()
        errors.worst("index", float((self.rows(slots.plan, found)[supervised] != contains).sum()))
        return select(self.model.candidate_selector, slots, self.model.head, placed)  # type: ignore[arg-type]


def spec_width(inputs: Mapping[str, Tensor]) -> int:
    """D."""
    return inputs["verifier_last_hidden_states"].shape[-1]


# -- Automodel: padded rows -------------------------------------------------------------------------------------------


def check_padded(case: Path) -> CaseErrors:
    """A case by Automodel; its step is our objective, with its supervised slots."""
    train = read_json(case / "train.json", EvaluationError)
    weights, shared, spec = common(case, train)
    config = dict(read_json(case / "config.json", EvaluationError))
    model = imported(case, "zlab", config, weights_of(case, train), spec)
    model.attach(weights["model.embed_tokens.weight"], weights["lm_head.weight"])
    model.config = replace(model.config, selector_weight=train["selector_loss_weight"])
    inputs, out = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    errors = CaseErrors(
        case.name,
        convention="supervised slots of Automodel; its selector's term by the weight of labels that are candidates",
    )
    batch, anchors, keep = padded_batch(shared), inputs["anchors"], inputs["keep"].bool()
    batch = replace(batch, input_ids=inputs["input_ids"])  # some labels are planted among the candidates
    hidden, _ = all_slots(model, batch, anchors)
    compare_padded_states(model, hidden, inputs, out, errors)
    with torch.no_grad():
        first = batch.input_ids.gather(1, anchors)[keep]
        path, candidates, _ = walk(model, hidden[keep][:, 1:], first)
    errors.worst("index", float((path != out["walk_path"][keep]).sum()))
    errors.worst("index", float((candidates != out["walk_candidates"][keep]).sum()))
    supervised = out["supervised"].bool()[..., 1:] & keep[..., None]
    plan = BlockPlan.of_slots(anchors, supervised, batch.input_ids.shape[1], train["gamma"])
    labels = batch.input_ids.flatten()[plan.label_R]
    errors.worst("index", float((labels != out["label_ids"][..., 1:].flatten()[plan.slot_R]).sum()))
    errors.worst("loss", abs(float(plan.weight) - train["loss_weight"]) / train["loss_weight"])
    plan = replace(plan, weight=plan.weight + 1e-6)
    terms = model(batch.planned(plan))
    known_R = out["has_target"].flatten()[plan.slot_R]
    ce, recall = terms.terms["ce"].value(), terms.metrics["candidate_recall"].value()
    selector = torch.as_tensor(terms.terms["selector"].total) / ((plan.rows.weight_R * known_R).sum() + 1e-6)
    for mine, theirs in ((ce, "base_loss"), (selector, "selector_loss"), (recall, "candidate_recall")):
        errors.worst("loss", abs(float(mine.detach()) - train[theirs]) / max(1.0, abs(train[theirs])))
    loss = ce + train["selector_loss_weight"] * selector
    compare_gradients(model, loss, train["loss"], train["grads"], errors)
    return errors


def compare_padded_states(
    model: BlockDraft, hidden: Tensor, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor], errors: CaseErrors
) -> None:
    """Hidden states [B, N, K, D], logits and the attention mask of a case by Automodel."""
    B, N, K = hidden.shape[:3]
    keep = inputs["keep"].bool()
    logits = model.head.logits(hidden)
    for name, value in {"hidden": hidden, "logits32": logits[..., :32], "lse": logits.logsumexp(-1)}.items():
        errors.worst("logits", gap(value[keep], out[name].view(B, N, K, *value.shape[3:])[keep]))
    errors.worst("index", float((logits.argmax(-1)[keep] != out["argmax"].view(B, N, K)[keep]).sum()))
    wanted = inputs["attn_mask"].bool()
    T = wanted.shape[-1] - N * K
    mine = visibility_mask(inputs["anchors"], K, K, T, model.config.causal, model.window_start(inputs["anchors"]))
    kept = keep.repeat_interleave(K, dim=1)
    errors.worst("index", float((mine != wanted)[kept].sum()))
