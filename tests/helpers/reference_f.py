"""MTP heads (form F): one row of packed documents, each with its own positions, and every document alone.

The case's source trains on the state before the target's final norm, each step sees its own step's keys, all steps use
the n = S - steps - 1 rows that have every label, and each step's mean is over its own count. Those four are passed in.
Rows at a document's end read the next document's tokens there, so each of ours takes the packed row's tokens on from
its own start.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from reference_cases import CaseErrors
from safetensors.torch import load_file
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.eagle3 import TTTPlan
from deepspec.batch import Batch, Supervision
from deepspec.errors import EvaluationError
from deepspec.export.forms.mtp import as_ours, from_library
from deepspec.files import read_json
from deepspec.targets.load import family_of

CONVENTION = "the source's: state before the final norm, own step's keys, rows, counts"


def check(case: Path) -> CaseErrors:
    """The packed row's outputs, loss and gradients, and those of every document alone."""
    train = read_json(case / "train.json", EvaluationError)
    outputs = load_file(case / "outputs.safetensors")
    errors = CaseErrors(case.name, convention=CONVENTION)
    model = _model(case, train)
    _check_packed(case, model, train, outputs, errors)
    for number in range(2):
        _check_document(case, model, train, outputs, number, errors)
    return errors


def _model(case: Path, train: dict[str, Any]) -> Any:
    layer = read_json(case / "config.json", EvaluationError)["transformer_layer_config"]
    common = case.parent / f"common_s{train['seed']}"
    family, owner = family_of(layer["model_type"]), registry.algorithm("mtp")
    depth = read_json(common / "config.json", EvaluationError)["num_hidden_layers"]
    config = owner.config_class(
        target_layers=(depth - 1,), steps=train["steps"], num_layers=1, step_weight_decay=0.6, step_keys="own"
    )
    model = owner.build_model(config, family.read_shape(layer), family)
    model.load_state_dict(as_ours(from_library(load_file(case / "model.safetensors")), family))
    frozen = load_file(common / "model.safetensors")
    model.attach(frozen["model.embed_tokens.weight"], frozen["lm_head.weight"])
    return model


def _common(case: Path, train: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(case.parent / f"common_s{train['seed']}" / "inputs.safetensors")


def _check_packed(
    case: Path, model: Any, train: dict[str, Any], outputs: dict[str, Tensor], errors: CaseErrors
) -> None:
    packed, common = load_file(case / "inputs.safetensors"), _common(case, train)
    ids, mask, reference = packed["input_ids"][0], packed["loss_mask"][0].bool(), train["packed"]
    steps, n = train["steps"], reference["valid_len"]
    sizes = common["attention_mask"].sum(dim=1).tolist()
    starts = [0, sizes[0]]
    width = max(sizes) + steps + 1
    rows = [slice(start, min(start + width, len(ids))) for start in starts]
    batch = _batch([ids[row] for row in rows], [mask[row] for row in rows], _states(common, sizes, width))
    counts = [min(size, n - start) for start, size in zip(starts, sizes, strict=True)]
    hidden = _train_hidden(model, batch, counts, steps)
    joined = torch.cat([hidden[:, row, :count] for row, count in enumerate(counts)], dim=1)  # [T, n, D]
    for k in range(steps):
        _compare(errors, "logits", joined[k], outputs[f"out_step{k}"])
        logits = model.head.logits(joined[k])
        _compare(errors, "logits", logits[:, :32], outputs[f"logits32_step{k}"])
        _compare(errors, "logits", logits.logsumexp(dim=-1), outputs[f"lse_step{k}"])
        differ = (logits.argmax(dim=-1) != outputs[f"argmax_step{k}"]).any()
        errors.worst("index", (errors.index or 0.0) + float(differ))
    proj = [
        model.joined(batch.input_ids[row, 1 : count + 1], batch.features[row, :count])
        for row, count in enumerate(counts)
    ]
    _compare(errors, "logits", torch.cat(proj), outputs["proj_step0"])
    _compare_loss(model, batch, counts, reference, train, errors)


def _check_document(
    case: Path, model: Any, train: dict[str, Any], outputs: dict[str, Tensor], number: int, errors: CaseErrors
) -> None:
    common, reference, steps = _common(case, train), train[f"doc{number}"], train["steps"]
    size = int(common["attention_mask"][number].sum())
    ids, mask = common["input_ids"][number, :size], common["loss_mask"][number, :size].bool()
    batch = _batch([ids], [mask], common["target_prenorm_hidden_states"][number : number + 1, :size])
    counts = [reference["valid_len"]]
    last = _train_hidden(model, batch, counts, steps)[-1, 0, : counts[0]]
    _compare(errors, "logits", last, outputs[f"doc{number}_out_step{steps - 1}"])
    _compare_loss(model, batch, counts, reference, train, errors)


def _states(common: dict[str, Tensor], sizes: list[int], width: int) -> Tensor:
    """[documents, width, D], the source's states, zeros after each document."""
    given = common["target_prenorm_hidden_states"]
    states = given.new_zeros(len(sizes), width, given.shape[-1])
    for row, size in enumerate(sizes):
        states[row, :size] = given[row, :size]
    return states


def _batch(ids: list[Tensor], masks: list[Tensor], states: Tensor) -> Batch:
    lengths = torch.tensor([len(one) for one in ids])
    padded, mask = (torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in (ids, masks))
    shape = (len(ids), states.shape[1])
    ids_BS, mask_BS = padded.new_zeros(shape), mask.new_zeros(shape)
    ids_BS[:, : padded.shape[1]], mask_BS[:, : mask.shape[1]] = padded, mask
    return Batch(Supervision(mask_BS, lengths, tuple(range(len(ids))), 0, 0), ids_BS, states, None)


@torch.no_grad()
def _train_hidden(model: Any, batch: Batch, counts: list[int], steps: int) -> Tensor:
    every = torch.arange(max(counts)).expand(len(counts), -1)
    hidden: Tensor = model.train_hidden(batch.features, batch.input_ids, every, steps, max(counts))
    return hidden


def _compare(errors: CaseErrors, field: str, found: Tensor, wanted: Tensor) -> None:
    """Relative to the largest value."""
    errors.worst(field, float((found.detach() - wanted).abs().max() / wanted.abs().max()))


def _compare_loss(
    model: Any, batch: Batch, counts: list[int], reference: dict[str, Any], train: dict[str, Any], errors: CaseErrors
) -> None:
    """The first ``counts`` rows of each document; row t of step k weighs w_k over the step's own count."""
    steps, mask = train["steps"], batch.supervision.loss_mask
    slots_TBS = torch.zeros(steps, *mask.shape, dtype=torch.bool)
    for row, count in enumerate(counts):
        for k in range(steps):
            slots_TBS[k, row, :count] = mask[row, 2 + k : 2 + k + count]
    found = slots_TBS.sum(dim=(1, 2)).tolist()
    errors.worst("index", (errors.index or 0.0) + float(found != reference["counts"]))
    plan = TTTPlan.make(slots_TBS, torch.ones(len(counts)), 1.0)
    each = torch.tensor(train["step_weights"]) / torch.tensor(found)
    step_R = plan.pair_R // plan.active_BN.numel()
    plan = replace(plan, weight=torch.tensor(1.0), rows=replace(plan.rows, weight_R=each[step_R].float()))
    model.zero_grad(set_to_none=True)
    loss = model(batch.planned(plan)).loss()
    loss.backward()
    total = reference["total_loss"]
    errors.worst("loss", abs(float(loss.detach()) - total) / max(1.0, abs(total)))
    if not reference["grads"]:
        return
    given = {name: torch.tensor(one["norm"]) for name, one in reference["grads"].items()}
    norms = from_library(given)
    for name, parameter in model.named_parameters():
        found_norm = float(parameter.grad.norm())
        errors.worst("gradient", abs(found_norm - float(norms[name])) / max(float(norms[name]), 1e-12))
