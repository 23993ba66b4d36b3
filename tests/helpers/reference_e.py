"""Reference cases of JetSpec (``E_jetspec_*``), by Automodel: a causal block and forward KL, and DFlash beside it.

A temperature divides both logits; here it divides the states that the head reads, and the loss is T^2 KL.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from reference_c import (
    all_slots,
    common,
    compare_gradients,
    compare_padded_states,
    gap,
    imported,
    padded_batch,
    weights_of,
)
from reference_cases import CaseErrors
from safetensors.torch import load_file

from deepspec.algorithms.block_plan import BlockPlan
from deepspec.errors import EvaluationError
from deepspec.files import read_json
from deepspec.nn.loss_table import LossWeights
from deepspec.nn.losses import head_loss

PARTS = ("_conv.", "candidate_selector.")  # of the weights' file that these drafts lack


def check(case: Path) -> CaseErrors:
    """Hidden states, masks, losses and gradients of one case."""
    train = read_json(case / "train.json", EvaluationError)
    weights, shared, spec = common(case, train)
    config = dict(read_json(case / "config.json", EvaluationError))
    config.pop("is_causal")  # the source writes false whatever it trained
    given = {"weights": f"C_dflash2_b8_s{train['seed']}/model.safetensors"}
    state = {n: x for n, x in weights_of(case, given).items() if not any(part in n for part in PARTS)}
    model = imported(case, "zlab", config, state, spec)
    model.attach(weights["model.embed_tokens.weight"], weights["lm_head.weight"])
    inputs, out = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    errors = CaseErrors(case.name, convention="supervised slots of Automodel; T by scaled states")
    batch, anchors, keep = padded_batch(shared), inputs["anchors"], inputs["keep"].bool()
    hidden, _ = all_slots(model, batch, anchors)
    compare_padded_states(model, hidden, inputs, out, errors)
    supervised = out["supervised"].bool()[..., 1:] & keep[..., None]
    plan = BlockPlan.of_slots(anchors, supervised, batch.input_ids.shape[1], None)
    labels = batch.input_ids.flatten()[plan.label_R]
    errors.worst("index", float((labels != out["label_ids"][..., 1:].flatten()[plan.slot_R]).sum()))
    for name in (key for key in train if key.startswith("T")):
        temperature, reference = float(name[1:]), train[name]
        slots = model.train_slots(batch.features, batch.input_ids, anchors, batch.input_ids.shape[1])
        hidden_RD = slots.flatten(0, 2).index_select(0, plan.slot_R) / temperature
        target_PD = batch.last_hidden.flatten(0, 1)[plan.position_P] / temperature  # type: ignore[union-attr]
        head = head_loss(hidden_RD, model.head, plan.rows.with_labels(labels), LossWeights(kl=1.0), target_PD)
        loss = temperature**2 * head.combined / plan.weight
        compare_gradients(model, loss, reference["loss"], reference["grads"], errors)
    reference = train["contrast_dflash_bidirectional_ce_gamma4"]
    model.config = replace(model.config, causal=False)
    hidden, _ = all_slots(model, batch, anchors)
    errors.worst("logits", gap(hidden[keep], out["hidden_bidirectional"].view(hidden.shape)[keep]))
    plan = BlockPlan.of_slots(anchors, supervised, batch.input_ids.shape[1], 4.0)
    plan = replace(plan, weight=plan.weight + 1e-6)
    compare_gradients(model, model(batch.planned(plan)).loss(), reference["loss"], reference["grads"], errors)
    return errors
