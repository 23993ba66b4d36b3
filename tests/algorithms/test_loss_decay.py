"""``loss_decay_gamma: null``, which the published configs allow: every supervised slot weighs the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithm_tools import draft_section, random_batch, tiny_draft, tiny_target
from reference_cases import check_folder
from safetensors.torch import save_file

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.batch import Batch, Supervision
from deepspec.drafts import save_draft
from deepspec.errors import RecipeError
from deepspec.recipe import load_recipe, recipe_from_dict

RECIPES = Path(__file__).parents[2] / "recipes"
BLOCK_DRAFTERS = ("dflash", "dspark")
ONLY_CE = {"ce_weight": 1.0, "l1_weight": 0.0, "confidence_head": False, "confidence_with_markov": False}
SUPERVISION = Supervision(torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0]]).bool(), torch.tensor([8]), (0,), 0, 0)


def draft_of(algorithm: str, target: Any, **changes: Any) -> DraftModel:
    return tiny_draft(algorithm, target, **(ONLY_CE if algorithm == "dspark" else {}), **changes)


@pytest.mark.parametrize("algorithm", BLOCK_DRAFTERS)
def test_the_weight_counts_the_supervised_slots(algorithm: str) -> None:
    """Anchors 1, 2 and 5 of the mask 0 1 1 1 0 1 1 0 have 2, 1 and 1 supervised slots."""
    owner = registry.algorithm(algorithm)

    def weight(gamma: float | None) -> float:
        config = owner.parse(draft_section(algorithm, loss_decay_gamma=gamma), None)
        return float(owner.plan(config, SUPERVISION).weight)

    assert weight(None) == 4.0
    assert weight(4.0) == pytest.approx(3.0 + math.exp(-0.25))
    for wrong in (0, -1.0):
        with pytest.raises(RecipeError, match=r"loss_decay_gamma.*above 0, or null"):
            weight(wrong)


def slot_losses(model: Any, batch: Batch, anchors: list[tuple[int, int]]) -> torch.Tensor:
    """Cross-entropy of the supervised slots of SUPERVISION's blocks, one after the other; ``anchors``: (a, slots)."""
    ids, losses = batch.input_ids, []
    for a, slots in anchors:
        hidden = model.train_slots(batch.features, ids, torch.tensor([[a]]), ids.shape[1])[0, 0]
        for k in range(slots):
            logits = model.frozen.logits(hidden[k])
            if model.markov_head is not None:
                logits = logits + model.markov_head.markov_w2(model.markov_head.markov_w1(ids[0, a + k]))
            losses.append(F.cross_entropy(logits[None], ids[0, a + k + 1][None]))
    return torch.stack(losses)


@pytest.mark.parametrize("algorithm", BLOCK_DRAFTERS)
def test_the_loss_is_the_plain_mean_in_training_and_in_reference_cases(algorithm: str, tmp_path: Path) -> None:
    target = tiny_target("qwen3")
    model = draft_of(algorithm, target, loss_decay_gamma=None)
    given = random_batch([8])
    batch = Batch(SUPERVISION, given.input_ids, given.features, given.last_hidden)
    losses = slot_losses(model, batch, [(1, 2), (2, 1), (5, 1)])
    wanted = float(losses.detach().mean())
    assert float(model(batch).loss().detach()) == pytest.approx(wanted, abs=1e-5)
    write_case(tmp_path / "case", model, batch, wanted, gamma=None)
    (found,) = check_folder(tmp_path)
    assert found.holds
    assert found.loss is not None
    write_case(tmp_path / "case", model, batch, wanted, gamma=4.0)
    (found,) = check_folder(tmp_path)
    assert found.loss > 1e-4, "another decay is another loss"


def write_case(folder: Path, model: Any, batch: Batch, loss: float, gamma: float | None) -> None:
    """A reference case of the published form, its total loss computed by hand."""
    anchors, kept = torch.tensor([[1, 2, 5]]), torch.ones(1, 3, dtype=torch.bool)
    config = model.algorithm.config_json(model.config, tiny_target("qwen3").spec)
    frozen = {"embed_tokens.weight": model.frozen.embed_VD, "lm_head.weight": model.frozen.head_VD}
    if not (folder / "config.json").exists():
        save_draft(folder, {**model.state_dict(), **frozen}, config, {})
    with torch.no_grad():
        hidden = model.train_slots(batch.features, batch.input_ids, anchors, 8)
        logits = model.frozen.logits(hidden)
    none = torch.zeros(1, 3, hidden.shape[2], dtype=torch.bool)
    save_file({"eval_mask": none, "output_hidden": hidden, "draft_logits": logits}, folder / "outputs.safetensors")
    inputs = {
        "input_ids": batch.input_ids, "loss_mask": SUPERVISION.loss_mask.long(),
        "attention_mask": torch.ones(1, 8, dtype=torch.int64), "target_hidden_states": batch.features,
        "target_last_hidden_states": batch.last_hidden, "anchor_positions": anchors, "block_keep_mask": kept,
    }  # fmt: skip
    save_file(inputs, folder / "inputs.safetensors")
    arguments = {"loss_decay_gamma": gamma, "ce_loss_alpha": 1.0, "l1_loss_alpha": 0.0, "confidence_head_alpha": 0.0}
    train = {"model_args": arguments, "terms": {}, "total_loss": loss, "grads": {}}
    (folder / "train.json").write_text(json.dumps(train))


@pytest.mark.parametrize("name", ["dflash_qwen3_4b", "dspark_gemma4_12b"])
def test_a_recipe_carries_no_decay_to_the_draft_folder_and_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["draft.loss_decay_gamma=null"])
    assert recipe.draft.loss_decay_gamma is None
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").draft.loss_decay_gamma is None
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))).digest() == recipe.digest()
    assert recipe.digest() != load_recipe(RECIPES / f"{name}.yaml").digest()
