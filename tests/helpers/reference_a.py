"""Reference cases of Eagle3 and EAGLE-3.1: five variants of one draft, forward and gradients of two trainings each.

Their packed row is two documents side by side: its rows are our slots, document by document. Their mask belongs to the
input's token and their step's loss is divided by the count of its rows: both are passed in as weights. Their loss is
KL, which ``draft.loss`` names.

J steps, S slots of a document, R rows of the packed row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from reference_cases import CaseErrors
from safetensors.torch import load_file
from torch import Tensor, nn

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.algorithms.eagle3 import TTTPlan
from deepspec.batch import Batch, Supervision
from deepspec.drafts import FROZEN, build_draft, check_weights
from deepspec.errors import EvaluationError
from deepspec.export.parts import DraftCheckpoint, ImportHints
from deepspec.files import read_json
from deepspec.nn.loss_table import LossTerm
from deepspec.targets import load_spec

PACKED = "SPEC: mask of the input's token, KL pooled over the packed row"
OPTIONAL = {"fc_norm": "fc_norm.", "norm_before_fc": "input_norm."}  # of a file that serves several variants


@dataclass(frozen=True)
class Common:
    """The target and the two documents that every case of a seed shares."""

    folder: Path
    batch: Batch  # the documents as rows, padded
    embed: Tensor
    head: Tensor

    @staticmethod
    def of(case: Path) -> Common:
        """That of a case's seed."""
        folder = case.parent / f"common_{case.name.rpartition('_')[2]}"
        given, weights = load_file(folder / "inputs.safetensors"), load_file(folder / "model.safetensors")
        lengths = given["attention_mask"].sum(dim=1)
        supervision = Supervision(given["loss_mask"].bool(), lengths, tuple(range(len(lengths))), 0, 0)
        hidden = given["target_hidden_states"], given["target_last_hidden_states"]
        batch = Batch(supervision, given["input_ids"], *hidden)
        return Common(folder, batch, weights["model.embed_tokens.weight"], weights["lm_head.weight"])

    def draft(self, config: dict[str, Any], state: Mapping[str, Tensor], file: Path) -> DraftModel:
        """The draft of a config of the library's and tensors by its names, as we import them."""
        lacking = tuple(prefix for key, prefix in OPTIONAL.items() if not config.get(key))
        own = {name: tensor for name, tensor in state.items() if not name.startswith(lacking)}
        named = DraftCheckpoint(config, own, file)
        ours = registry.engine("speculators").read(named, ImportHints(target=load_spec(str(self.folder))))
        model = build_draft(ours.config, file)
        tensors = {name: tensor for name, tensor in ours.state.items() if name not in FROZEN}
        check_weights(model, tensors, file)
        model.load_state_dict(tensors)
        model.attach(self.embed, self.head)
        return model


def rows_of_documents(document_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(packed row, document, slot) of every row that belongs to a document."""
    row = (document_ids >= 0).nonzero()[:, 0]
    document = document_ids[row]
    first = torch.stack([row[document == one].min() for one in document.unique()])
    return row, document, row - first[document]


def relative_gap(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value wanted."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)) if wanted.numel() else 0.0


def compare_logits(errors: CaseErrors, logits: Tensor, given: Mapping[str, Tensor], rows: Tensor, step: str) -> None:
    """Complete logits [r, V] of packed ``rows`` with the first columns, logsumexp and argmax of a case."""
    if f"logits32{step}" in given:
        errors.worst("logits", relative_gap(logits[:, :32], given[f"logits32{step}"][rows]))
    errors.worst("logits", relative_gap(logits.logsumexp(-1), given[f"lse{step}"][rows]))
    errors.worst("index", (errors.index or 0.0) + (not torch.equal(logits.argmax(-1), given[f"argmax{step}"][rows])))


def compare_gradients(errors: CaseErrors, found: Mapping[str, Tensor | None], wanted: Mapping[str, Any]) -> None:
    """Norms by name; a name that is not ours is an error."""
    for name, one in wanted.items():
        norm, gradient = one["norm"], found[name]
        mine = 0.0 if gradient is None else float(gradient.norm())
        errors.worst("gradient", abs(mine - norm) / max(norm, 1e-12))


def check(case: Path) -> list[CaseErrors]:
    """Every variant of a case.

    Raises:
        EvaluationError: the folder holds none.
    """
    variants = sorted(path.stem.removeprefix("config_") for path in case.glob("config_*.json"))
    if not variants:
        raise EvaluationError("no variant", file=case, wanted="config_<variant>.json")
    common, state = Common.of(case), load_file(case / "model.safetensors")
    document_ids = load_file(case / "inputs.safetensors")["document_ids"][0]
    return [_check_variant(case, variant, common, state, document_ids) for variant in variants]


def _check_variant(
    case: Path, variant: str, common: Common, state: Mapping[str, Tensor], document_ids: Tensor
) -> CaseErrors:
    errors = CaseErrors(f"{case.name} {variant}", convention=PACKED)
    file = case / f"config_{variant}.json"
    model = common.draft(read_json(file, EvaluationError), state, file)
    given = load_file(case / f"outputs_{variant}.safetensors")
    _compare_steps(errors, model, common, given, document_ids)
    train = read_json(case / f"train_{variant}.json", EvaluationError)
    for name, reference in train.items():
        if name.startswith("ttt"):
            _compare_training(errors, model, common, reference)
    return errors


def _compare_steps(
    errors: CaseErrors, model: Any, common: Common, given: Mapping[str, Tensor], document_ids: Tensor
) -> None:
    batch, lengths = common.batch, common.batch.supervision.lengths
    row, document, slot = rows_of_documents(document_ids)
    J, (B, S) = len(given["row_kl"]), batch.input_ids.shape
    before: list[Tensor] = []  # the last layer's outputs, which the draft itself may keep only normed
    finished = _layer_outputs(model, before)
    with torch.no_grad():
        fed = model.train_hidden(batch.features, batch.input_ids, torch.arange(S).expand(B, S), J, S)
        errors.worst("logits", relative_gap(model.start(batch.features)[document, slot], given["fc_out"][row]))
    finished()
    for j in range(J):
        inside = slot + j < lengths[document] - 1  # the token that the row reads is of its own document
        r, d, t = row[inside], document[inside], slot[inside]
        if f"layer_out_step{j}" in given:
            errors.worst("logits", relative_gap(before[j][d, t], given[f"layer_out_step{j}"][r]))
        head_in = model.to_head(fed[j][d, t]).detach()
        if f"head_in_step{j}" in given:
            errors.worst("logits", relative_gap(head_in, given[f"head_in_step{j}"][r]))
        logits = model.frozen.logits(head_in)
        compare_logits(errors, logits, given, r, f"_step{j}")
        target = batch.last_hidden[d, t + 1 + j] @ common.head.T  # type: ignore[index]
        kl = nn.functional.kl_div(logits.log_softmax(-1), target.softmax(-1), reduction="none").sum(-1)
        errors.worst("logits", relative_gap(kl, given["row_kl"][j, r]))
        mask = torch.zeros_like(given["row_mask"][j]).index_copy(0, r, batch.supervision.loss_mask[d, t + 1 + j].byte())
        errors.worst("index", (errors.index or 0.0) + (not torch.equal(mask, given["row_mask"][j])))


def _layer_outputs(model: Any, into: list[Tensor]) -> Any:
    """Append what the last layer gives to ``into``; returns what ends it."""
    layer = model.layers[-1]
    finish = layer.finish

    def kept(*arguments: Tensor) -> Tensor:
        into.append(finish(*arguments))
        return into[-1]

    layer.finish = kept
    return lambda: delattr(layer, "finish")


def _compare_training(errors: CaseErrors, model: Any, common: Common, reference: Mapping[str, Any]) -> None:
    batch, count, decay = common.batch, reference["ttt_steps"], reference["ttt_step_loss_decay"]
    mask, lengths = batch.supervision.loss_mask, batch.supervision.lengths
    B, S = mask.shape
    slots = torch.zeros(count, B, S, dtype=torch.bool)
    for j in range(count):
        slots[j, :, : S - 1 - j] = mask[:, 1 + j :] & (torch.arange(1 + j, S) < lengths[:, None])
    plan = TTTPlan.make(slots, lengths, decay)
    step_R = plan.pair_R // plan.active_BN.numel()
    weight_R = decay**step_R / (torch.bincount(step_R, minlength=count) + 1e-5)[step_R]
    rows = replace(plan.rows, weight_R=weight_R.float())
    model.zero_grad(set_to_none=True)
    model.config = replace(model.config, loss=(LossTerm(name="kl"),))
    loss = model(batch.planned(replace(plan, weight=torch.tensor(1.0), rows=rows))).loss()
    loss.backward()
    wanted = reference["total_loss"]
    errors.worst("loss", abs(float(loss.detach()) - wanted) / max(1.0, abs(wanted)))
    compare_gradients(errors, {name: one.grad for name, one in model.named_parameters()}, reference["grads"])
