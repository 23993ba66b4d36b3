"""`sample_from_anchor: false`: K slots that give K - 1 drafts, trained and decoded as z-lab's DFlash is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithm_tools import random_batch, tiny_draft, tiny_target

from deepspec import registry
from deepspec.algorithms.block_plan import BlockPlan
from deepspec.checkpoints import Manifest
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.errors import CheckpointError, RecipeError
from deepspec.recipe import load_recipe
from deepspec.training.checkpoints import check_resume

PROMPTS = [[1, 5, 9, 12], [7], [3, 3, 8, 20, 33, 41, 50, 6, 9, 10, 11]]


def test_one_draft_less_than_slots() -> None:
    owner = registry.algorithm("dflash")
    section = {"target_layers": [1], "mask_token_id": 5, "block_size": 4, "sample_from_anchor": False}
    assert owner.parse(section, None).max_draft == 3
    with pytest.raises(RecipeError, match="at least 2"):
        owner.parse(section | {"block_size": 1}, None)
    assert "Qwen3" in owner.config_json(owner.parse(section, None), tiny_target("qwen3").spec)["architectures"][0]


def plain_loss(model: Any, batch: Any, anchors: list[torch.Tensor]) -> torch.Tensor:
    """Cross-entropy by its definition: slot j >= 1 of the block at anchor a predicts token a + j."""
    config, total = model.config, torch.zeros(())
    for row, drawn in enumerate(anchors):
        mask, length = batch.supervision.loss_mask[row], int(batch.supervision.lengths[row])
        for a in drawn.tolist():
            model.config = dataclasses.replace(config, sample_from_anchor=True)  # shows all slots
            features, ids = batch.features[row : row + 1, : a + 1], batch.input_ids[row : row + 1]
            hidden = model.train_slots(features, ids, torch.tensor([[a]]), a + 1)[0, 0]  # [K, D]
            model.config = config
            for j in range(1, config.block_size):
                if a + j >= length or not bool(mask[a + 1 : a + j + 1].all()):
                    break
                logits = model.frozen.logits(hidden[j])
                if model.markov_head is not None:
                    embedded = model.markov_head.markov_w1(ids[0, a + j - 1])
                    logits = logits + model.markov_head.markov_w2(embedded)
                weight = math.exp(-(j - 1) / config.loss_decay_gamma)
                total = total + weight * F.cross_entropy(logits[None], ids[0, a + j][None])
    return total


@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
def test_the_loss_is_that_of_its_definition(algorithm: str) -> None:
    target = tiny_target("qwen3")
    only_ce: dict[str, Any] = {"l1_weight": 0.0, "ce_weight": 1.0, "confidence_head": False,
                               "confidence_with_markov": False} if algorithm == "dspark" else {}  # fmt: skip
    model = tiny_draft(algorithm, target, sample_from_anchor=False, **only_ce)
    batch = random_batch([16, 11])
    anchors = [torch.tensor([1, 4, 8]), torch.tensor([2, 5])]
    mask = batch.supervision.loss_mask
    anchors = [drawn[mask[row, drawn] & mask[row, drawn + 1]] for row, drawn in enumerate(anchors)]
    config = model.config
    plan = BlockPlan.make(batch.supervision, anchors, config.max_draft, config.loss_decay_gamma)
    terms = model.algorithm.objective(model, batch.planned(plan))
    torch.testing.assert_close(terms.weighted_sum(), plain_loss(model, batch, anchors), atol=1e-4, rtol=1e-5)
    model(batch).loss().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("algorithm", "changes"), [("dflash", {}), ("dspark", {}), ("dspark", {"markov_head": "rnn"})], ids=str
)
def test_decoding_is_lossless(algorithm: str, changes: dict[str, Any]) -> None:
    target = tiny_target("qwen3")
    model = tiny_draft(algorithm, target, sample_from_anchor=False, **changes).eval()
    settings = DecodeSettings(temperature=0.0, max_new_tokens=24, stop_token_ids=(2,))
    plain = generate(target, None, PROMPTS, settings, 3)
    for batch_size in (1, 3):
        drafter = model.algorithm.drafter(model, batch_size, 64)
        drafted = generate(target, drafter, PROMPTS, settings, batch_size)
        assert [one.output_ids for one in drafted] == [one.output_ids for one in plain]
        assert all(round_.length <= 3 for one in drafted for round_ in one.rounds)


def test_training_raises_what_is_accepted() -> None:
    """A shift by one would be seen at once: the draft would learn the token beside."""
    target = tiny_target("qwen3", initializer_range=0.5)
    settings = DecodeSettings(temperature=0.0, max_new_tokens=24)
    model = tiny_draft("dflash", target, sample_from_anchor=False, num_anchors=30)
    answers = generate(target, None, PROMPTS[:1], settings, 1)
    ids = torch.tensor([PROMPTS[0] + answers[0].output_ids])
    seen = target.forward(ids, (-1, 1, 3))
    batch = random_batch([ids.shape[1]])
    mask = (torch.arange(ids.shape[1]) >= len(PROMPTS[0]))[None]
    supervision = dataclasses.replace(batch.supervision, loss_mask=mask)
    batch = dataclasses.replace(batch, supervision=supervision, input_ids=ids, features=seen.features)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch).loss().backward()
        optimizer.step()
    drafted = generate(target, model.algorithm.drafter(model.eval(), 1, 64), PROMPTS[:1], settings, 1)[0]
    lengths = drafted.acceptance_lengths
    assert drafted.output_ids == answers[0].output_ids
    assert sum(lengths) / len(lengths) > 2.5  # of at most 4


def test_a_run_that_began_before_the_option_goes_on() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart_dflash.yaml")
    values = recipe.to_dict()
    assert values["draft"].pop("sample_from_anchor") is True
    old = Manifest(1, 2, values, {}, "bytes:1", 1, 0, "float32", {}, {"target": {"weights": "bytes:1"}})
    assert check_resume(old, recipe, old, accept=False) == []
    other = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart_dflash.yaml", ["draft.block_size=5"])
    with pytest.raises(CheckpointError, match=r"draft\.block_size"):
        check_resume(old, other, old, accept=False)
