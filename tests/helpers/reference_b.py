"""Reference cases of P-EAGLE: one pass over the elements that were drawn there, which are passed in.

Their packed row is two documents side by side (see ``reference_a``); rotary positions count on over it, of which only
differences matter. They train the whole embedding, we the mask token's row: here the rest of it gets gradients too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from reference_a import Common, compare_gradients, compare_logits, relative_gap, rows_of_documents
from reference_cases import CaseErrors
from safetensors.torch import load_file
from torch import Tensor, nn

from deepspec.algorithms.p_eagle import ChainPlan
from deepspec.drafts import FROZEN
from deepspec.errors import EvaluationError
from deepspec.files import read_json

CONVENTION = "SPEC: drawn elements, mask of the input's token, KL over all elements; the complete embedding's gradient"


def check(case: Path) -> CaseErrors:
    """Forward, loss and gradients of a case; weights that its file lacks are those of the Eagle3 case of its seed."""
    errors, common = CaseErrors(case.name, convention=CONVENTION), Common.of(case)
    config, train = (read_json(case / name, EvaluationError) for name in ("config.json", "train.json"))
    state = load_file(case / "model.safetensors")
    if "fc.weight" not in state:
        state |= load_file(case.parent / f"A_eagle3_{case.name.rpartition('_')[2]}" / "model.safetensors")
    model = common.draft(config, state | {FROZEN[0]: common.embed}, case / "config.json")
    inputs, given = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    row, document, slot = rows_of_documents(inputs["document_ids"][0])
    B, S = common.batch.input_ids.shape
    K = int(inputs["depth"].max()) + 1
    place = torch.full((len(inputs["document_ids"][0]),), -1).index_copy(0, row, document * S + slot)
    real = place[inputs["anchor_pos"]] >= 0  # padding rows are elements there too
    anchor, depth = place[inputs["anchor_pos"]][real], inputs["depth"][real]
    reached = torch.zeros(B * S, dtype=torch.int64).scatter_reduce(0, anchor, depth, "amax").view(B, S)
    every = torch.zeros(B * S, dtype=torch.bool).index_fill(0, place[row], True).view(B, S)
    plan = ChainPlan.make(every, reached, K)
    element = (anchor // S * plan.max_context_len + anchor % S) * K + depth
    grid, order = plan.grid_R.sort()
    mine = plan.element_R[order[torch.searchsorted(grid, element)]]
    errors.worst("index", float(not torch.equal(grid, element.sort().values)))
    _compare_forward(errors, model, common, plan, given, mine, real.nonzero()[:, 0])
    supervised = common.batch.supervision.loss_mask.roll(-1, dims=1) & every
    mask = torch.where(depth > 0, True, supervised.flatten()[anchor])  # all that are deeper were drawn among these
    errors.worst("index", (errors.index or 0.0) + (not torch.equal(mask, given["row_mask"].bool()[real])))
    _compare_training(errors, model, common, ChainPlan.make(supervised, reached, K), train)
    return errors


def _compare_forward(
    errors: CaseErrors, model: Any, common: Common, plan: ChainPlan, given: Mapping[str, Tensor], mine: Tensor,
    theirs: Tensor,
) -> None:  # fmt: skip
    """``mine`` and ``theirs``: the same elements among ours and among the case's."""
    batch = common.batch
    with torch.no_grad():
        hidden = model.train_hidden(batch.features, batch.input_ids, plan)[mine]
        errors.worst("logits", relative_gap(hidden, given["layer_out"][theirs]))
        start = model.start(batch.features[:, : plan.max_context_len]).gather(
            1, plan.active_BM[..., None].expand(-1, -1, model.shape.hidden_size)
        )
        start = torch.cat((start.flatten(0, 1), model.mask_inputs()[1].expand(len(plan.cell_C), -1)))[mine]
        errors.worst("logits", relative_gap(start, given["fc_out"][theirs]))
        logits = model.frozen.logits(model.norm(hidden))
    compare_logits(errors, logits, given, theirs, "")
    position = plan.position_P[plan.rows.position_R][plan.element_R.argsort()]  # by our elements, of which each is one
    found = torch.zeros(int(plan.element_R.max()) + 1, dtype=torch.int64).index_copy(
        0, plan.element_R.sort().values, position
    )
    target = batch.last_hidden.flatten(0, 1)[found[mine]] @ common.head.T  # type: ignore[union-attr]
    kl = nn.functional.kl_div(logits.log_softmax(-1), target.softmax(-1), reduction="none").sum(-1)
    errors.worst("logits", relative_gap(kl, given["row_kl"][theirs]))


def _compare_training(
    errors: CaseErrors, model: Any, common: Common, plan: ChainPlan, train: Mapping[str, Any]
) -> None:
    embedding = nn.Parameter(common.embed.clone())
    model._frozen = replace(model.frozen, embed_VD=embedding)
    weight = plan.weight + 1e-5
    loss = model(common.batch.planned(replace(plan, weight=weight))).loss()
    loss.backward()
    wanted = train["total_loss"]
    errors.worst("loss", abs(float(loss.detach()) - wanted) / max(1.0, abs(wanted)))
    gradients = {name: one.grad for name, one in model.named_parameters()}
    table = embedding.grad.clone()  # type: ignore[union-attr]
    table[model.config.mask_token_id] += model.mask.embedding.grad
    compare_gradients(errors, gradients | {FROZEN[0]: table, "mask_hidden": model.mask.hidden.grad}, train["grads"])
