"""Reference cases of form D: losses of given logits, by four projects. One result for each of them.

An identity matrix serves as the head, so that hidden states are logits and the fused loss itself is compared: rows and
their gradients as speculators has them; every scalar with the masks, labels, weights and divisors of its source.

N blocks, B slots of a block, V vocabulary, R rows given to the loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reference_cases import CaseErrors
from safetensors.torch import load_file
from torch import Tensor

from deepspec.errors import EvaluationError
from deepspec.files import read_json
from deepspec.nn.chains import Chains, d_pace_weights
from deepspec.nn.heads import FrozenHead
from deepspec.nn.loss_table import LOSSES, LossWeights
from deepspec.nn.losses import HeadLoss, HeadRows, head_loss

NAMES = {name: name for name in ("ce", "kl", "jsd", "tv", "nla", "lk_hybrid")} | {"rkl": "reverse_kl"}
SPEC = "SPEC: label = the target's argmax, divided by the count of slots + 1e-5"
SPECFORGE = "SF: label = the text's token; D-PACE a sum over the batch's one row; its two ablations are not ours"
ANGEL = (
    "AS: slots 1.., divided by the weights; D-PACE without the mask in its sums, blocks weigh the same in e2e_tv; "
    "not ours: lk_alpha's clamp (its value from our rows), kl_top10, mtp_e2e_weighted_lk, the value of weighted_tv"
)
AUTOMODEL = "AM: mean over supervised rows of T^2 KL of logits / T; cross-entropy divided by the weights + 1e-6"


class Logits:
    """The case's logits, and our loss of any of their rows."""

    def __init__(self, case: Path) -> None:
        inputs = load_file(case / "inputs.safetensors")
        self.draft, self.target = inputs["logits_draft"], inputs["logits_target"]
        self.N, self.B, self.V = self.draft.shape
        self.mask, self.every = inputs["mask"].float(), inputs["mask_all_slots"].float()
        self.tokens, self.best = inputs["labels"], self.target.argmax(-1)
        slots = torch.arange(self.B)
        self.decay = torch.exp(-(slots - 1).clamp_min(0) / 4.0) * (slots > 0)
        self.decay_sfa = torch.exp(-slots / 4.0)

    def loss(
        self, weights: LossWeights, mask_NB: Tensor, weight_NB: Tensor | float = 1.0, labels: Tensor | None = None,
        alpha: float | None = None, temperature: float = 1.0,
    ) -> tuple[HeadLoss, Tensor, Tensor]:  # fmt: skip
        """(the loss of the rows in the mask, its gradient [N, B, V], the weights that it gave them [N, B])."""
        index_R = mask_NB.flatten().nonzero()[:, 0]
        rows = HeadRows.plan(torch.arange(len(index_R)), (mask_NB * weight_NB).flatten()[index_R])
        rows = rows.with_labels((self.best if labels is None else labels).flatten()[index_R])
        eye = torch.eye(self.V)
        leaf = self.draft.clone().requires_grad_()
        hidden, target = ((one / temperature).flatten(0, 1)[index_R] for one in (leaf, self.target))
        chains = Chains(index_R, self.N, self.B, alpha)
        head = head_loss(hidden, FrozenHead(eye, eye), rows, weights, target, chains=chains)
        (gradient,) = torch.autograd.grad(head.combined, leaf)
        return head, gradient, chains.spread(head.weight_R, 0.0)


class Source(CaseErrors):
    """What one project computed of the case."""

    def compare(self, kind: str, found: Tensor, wanted: Tensor) -> None:
        """The largest difference, relative to the largest value."""
        scale = wanted.abs().max().clamp_min(1.0 if kind == "loss" else 1e-12)
        self.worst(kind, float((found - wanted).abs().max() / scale))

    def scalar(self, found: Tensor, gradient: Tensor, wanted: dict[str, Any]) -> None:
        """A loss and the norm of its gradient."""
        self.compare("loss", found.detach().reshape(1), torch.tensor([wanted["loss"]]))
        self.compare("gradient", gradient.norm().reshape(1), torch.tensor([wanted["grad_norm"]]))


def check(case: Path) -> list[CaseErrors]:
    """Rows and scalars of every source."""
    train, outputs = read_json(case / "train.json", EvaluationError), load_file(case / "outputs.safetensors")
    logits = Logits(case)
    checks = {
        "rows": (_rows, SPEC), "spec": (_spec, SPEC), "specforge": (_specforge, SPECFORGE), "angel": (_angel, ANGEL),
        "automodel": (_automodel, AUTOMODEL),
    }  # fmt: skip
    results = []
    for name, (one, convention) in checks.items():
        source = Source(f"{case.name} {name}", convention=convention)
        one(source, logits, train.get(name, {}), outputs)
        results.append(source)
    return list(results)


def _rows(source: Source, logits: Logits, _: dict[str, Any], outputs: dict[str, Tensor]) -> None:
    everything = torch.ones(logits.N, logits.B)
    for theirs, ours in NAMES.items():
        head, gradient, _ = logits.loss(LossWeights(**{ours: 1.0}), everything)
        value = LOSSES[ours].value
        if value is not None:
            source.compare("loss", value(head.rows).view(logits.N, logits.B), outputs[f"row_{theirs}"])
        source.compare("gradient", gradient, outputs[f"rowgrad_{theirs}"])


def _spec(source: Source, logits: Logits, train: dict[str, Any], outputs: dict[str, Tensor]) -> None:
    ones = torch.ones(logits.B)
    weights = {"uniform": (logits.mask, ones), "fixed4": (logits.mask, logits.decay)}
    weights["fixed4_sfa"] = (logits.every, logits.decay_sfa)
    for kind in ("fixed4", "fixed4_sfa"):
        source.compare("loss", weights[kind][1].expand(logits.N, -1), outputs[f"spec_w_{kind}"])
    for theirs, ours in NAMES.items():
        for kind, (mask, decay) in weights.items():
            head, gradient, _ = logits.loss(LossWeights(**{ours: 1.0}), mask, decay)
            count = mask.sum() + 1e-5
            source.scalar(head.combined / count, gradient / count, train[f"{theirs}_{kind}"])
    mixed = train["ce0.1_tv0.9_fixed4"]
    head, gradient, _ = logits.loss(LossWeights(ce=0.1, tv=0.9), logits.mask, logits.decay)
    count = logits.mask.sum() + 1e-5
    source.scalar(head.combined / count, gradient / count, mixed)
    for name, total in head.sums.items():
        source.compare("loss", (total / count).reshape(1), torch.tensor([mixed["terms"][f"{name}_loss"]]))
    for alpha in (0.5, 0.2):
        for kind, mask in (("mask", logits.mask), ("mask_all_slots", logits.every)):
            head, gradient, weight = logits.loss(LossWeights(ce=1.0), mask, alpha=alpha)
            count = mask.sum() + 1e-5
            source.scalar(head.combined / count, gradient / count, train[f"ce_dpace{alpha}_{kind}"])
            source.compare("loss", weight, outputs[f"spec_w_dpace{alpha}_{kind}"])
            if f"spec_grad_dpace{alpha}_{kind}" in outputs:
                source.compare("gradient", gradient / count, outputs[f"spec_grad_dpace{alpha}_{kind}"])


def _specforge(source: Source, logits: Logits, train: dict[str, Any], outputs: dict[str, Tensor]) -> None:
    head, gradient, weight = logits.loss(LossWeights(ce=1.0), logits.mask, labels=logits.tokens, alpha=0.5)
    source.scalar(head.combined, gradient, train["dpace"])
    source.compare("gradient", gradient, outputs["specforge_grad_dpace"])
    source.compare("loss", weight, outputs["specforge_w_dpace"])
    head, gradient, weight = logits.loss(LossWeights(ce=1.0), logits.mask, logits.decay, logits.tokens)
    source.scalar(head.combined / weight.sum(), gradient / weight.sum(), train["dflash_gamma4"])


def _angel(source: Source, logits: Logits, train: dict[str, Any], outputs: dict[str, Tensor]) -> None:
    mask, decay, tokens = logits.mask, logits.decay, logits.tokens
    total = (mask * decay).sum()
    for kind, weights in (
        ("ce_gamma4", LossWeights(ce=1.0)), ("lk_hybrid", LossWeights(lk_hybrid=1.0)), ("l1", LossWeights(l1=1.0)),
    ):  # fmt: skip
        head, gradient, _ = logits.loss(weights, mask, decay, tokens)
        source.scalar(head.combined / total, gradient / total, train[kind])
        if f"angel_grad_{kind}" in outputs:
            source.compare("gradient", gradient / total, outputs[f"angel_grad_{kind}"])
    least = -head.rows.accept.clamp_min(1e-10).log()
    found = (head.weight_R * least).sum() / total
    source.compare("loss", found.reshape(1), torch.tensor([train["lk_alpha"]["loss"]]))
    behind = torch.ones_like(mask)
    behind[:, 0] = 0.0
    probability, _, _ = logits.loss(LossWeights(ce=1.0), behind, labels=tokens)
    chains = Chains(behind.flatten().nonzero()[:, 0], logits.N, logits.B)
    weight = mask * d_pace_weights(chains.spread(torch.exp(-probability.rows.ce), 1.0), behind, 0.5)
    source.compare("loss", weight, mask * outputs["angel_w_dpace"])
    head, gradient, _ = logits.loss(LossWeights(ce=1.0), mask, weight, tokens)
    source.scalar(head.combined / weight.sum(), gradient / weight.sum(), train["dpace"])
    source.compare("gradient", gradient / weight.sum(), outputs["angel_grad_dpace"])
    count = mask.sum(1, keepdim=True)
    blocks = (count > 0).sum()
    e2e, slope, _ = logits.loss(LossWeights(e2e_tv=1.0), mask, 1 / count.clamp_min(1))
    source.scalar(e2e.combined / blocks, slope / blocks, train["e2e_tv"])
    source.compare("gradient", slope / blocks, outputs["angel_grad_e2e_tv"])
    head, gradient, _ = logits.loss(LossWeights(ce=1.0), mask, decay, tokens)
    both = head.combined / total + e2e.combined / blocks
    source.scalar(both, gradient / total + slope / blocks, train["ce_plus_e2e"])
    complete = behind * (count == logits.B - 1)
    if complete.any():
        direct, slope, _ = logits.loss(LossWeights(e2e_tv=1.0), complete, 1 / complete.sum())
        source.scalar(direct.combined, slope, train["mtp_e2e_direct_tv"])
        for kind in ("direct", "weighted"):
            source.compare("gradient", slope, outputs[f"angel_grad_mtp_e2e_{kind}_tv"])


def _automodel(source: Source, logits: Logits, train: dict[str, Any], outputs: dict[str, Tensor]) -> None:
    count = logits.mask.sum()
    for temperature in (1.0, 2.0):
        head, gradient, _ = logits.loss(LossWeights(kl=temperature**2), logits.mask, temperature=temperature)
        source.scalar(head.combined / count, gradient / count, train[f"forward_kl_T{temperature}"])
        source.compare("gradient", gradient / count, outputs[f"automodel_grad_kl_T{temperature}"])
    head, gradient, weight = logits.loss(LossWeights(ce=1.0), logits.mask, logits.decay, logits.tokens)
    total = weight.sum() + 1e-6
    source.scalar(head.combined / total, gradient / total, train["ce_gamma4"])
