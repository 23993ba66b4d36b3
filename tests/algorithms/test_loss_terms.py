"""``draft.loss`` and ``draft.d_pace``: the same terms and slot weights for every drafter."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from algorithm_tools import ALGORITHMS, draft_section, random_batch, tiny_draft, tiny_target
from plain_losses import plain_d_pace, plain_end_to_end, plain_rows

from deepspec import registry
from deepspec.algorithms.block_plan import BlockPlan, draw_anchors
from deepspec.algorithms.eagle3 import supervised_slots
from deepspec.errors import RecipeError
from deepspec.nn.loss_table import LOSSES
from deepspec.testing.case import Case, loss_and_gradients, terms_of
from deepspec.testing.drafter import TrainingLossSuite

TERMS = [{"name": "lk_hybrid", "weight": 0.7}, {"name": "ce", "weight": 0.2}, {"name": "e2e_tv", "weight": 0.5}]


class TestCoupledSlots(TrainingLossSuite):
    """What couples the slots of a chain stays free of padding, order and cut."""

    algorithms = ALGORITHMS
    families = ("qwen3",)
    section: ClassVar[dict[str, Any]] = {"loss": TERMS, "d_pace": 0.5}

    def test_a_few_steps_lower_the_loss(self, case: Case) -> None:
        """That of the table's terms without D-PACE: under it a slot weighs more the better the draft is.

        A selector's term may rise too, as more labels come among its candidates.
        """
        model, batch = case.draft(), case.batch([40, 25])
        plain = case.draft(d_pace=None)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(4):
            plain.load_state_dict(model.state_dict())
            losses.append(float(next(iter(terms_of(plain, batch).terms.values())).value().detach()))
            loss_and_gradients(model, batch)
            optimizer.step()
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_a_recipe_cannot_mean_is_refused_by_key(algorithm: str) -> None:
    def parse(**changes: Any) -> Any:
        return registry.algorithm(algorithm).parse(draft_section(algorithm, **changes), None)

    for loss, text in (
        ([{"name": "lk_hybird"}], r"draft\.loss\[0\]\.name.*did you mean 'lk_hybrid'"),
        ([{"name": "ce"}, {"name": "tv", "weight": 0.0}], r"draft\.loss\[1\]\.weight.*above 0"),
        ([{"name": "ce", "factor": 1.0}], r"draft\.loss\[0\]\.factor"),
        ([{"name": "ce"}, {"name": "ce"}], r"draft\.loss: a loss twice"),
        ([], r"draft\.loss: no loss"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=text):
            parse(loss=loss)
    for alpha in (-0.1, 1.5):
        with pytest.raises(RecipeError, match=r"draft\.d_pace.*from 0 to 1"):
            parse(d_pace=alpha)


def test_a_key_that_the_terms_replace_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"draft\.ce_weight.*left out where loss is given"):
        registry.algorithm("dspark").parse(draft_section("dspark", ce_weight=0.3, loss=TERMS), None)


def test_the_last_hidden_states_are_needed_where_a_term_compares() -> None:
    for name, loss in LOSSES.items():
        for algorithm in ("dflash", "eagle3"):
            owner = registry.algorithm(algorithm)
            config = owner.parse(draft_section(algorithm, loss=[{"name": name}]), None)
            assert owner.needs_last_hidden(config) == loss.compares, (algorithm, name)


def plain_chain(model: Any, states: list[Any], batch: Any, labels: list[int], weights: list[float]) -> Any:
    """TERMS of one chain by D-PACE: hidden states and labels (of [B, S] flattened) of its supervised slots."""
    tokens, last = batch.input_ids.flatten(), batch.last_hidden.flatten(0, 1)
    where = torch.tensor(labels)
    rows = plain_rows(model.frozen.logits(torch.stack(states)), model.frozen.logits(last[where - 1]), tokens[where])
    pace = plain_d_pace(torch.exp(-rows["ce"].detach()).tolist(), [True] * len(labels), model.config.d_pace)
    slots = torch.tensor(weights) * torch.tensor(pace) * (0.7 * rows["lk_hybrid"] + 0.2 * rows["ce"])
    return slots.sum() + 0.5 * sum(weights) * plain_end_to_end(list(1 - rows["tv"]))


def test_the_chain_of_a_block_drafter_is_its_block() -> None:
    target = tiny_target("qwen3")
    model, batch = tiny_draft("dflash", target, loss=TERMS, d_pace=0.5), random_batch([25, 14])
    K, S = model.config.max_draft, batch.input_ids.shape[1]
    plan = BlockPlan.make(batch.supervision, draw_anchors(batch.supervision, 5), K, None)
    hidden = model.train_slots(batch.features, batch.input_ids, plan.anchor_BN, S).flatten(0, 1)
    wanted = 0.0
    for block, anchor in enumerate(plan.anchor_BN.flatten().tolist()):
        slots = sorted(slot % K for slot in plan.slot_R.tolist() if slot // K == block)
        first = S * (block // plan.anchor_BN.shape[1]) + anchor + 1
        if slots:
            labels = [first + k for k in slots]
            wanted = wanted + plain_chain(model, [hidden[block, k] for k in slots], batch, labels, [1.0] * len(slots))
    found = model(batch).weighted_sum()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_the_chain_of_a_ttt_drafter_is_a_positions_steps() -> None:
    target = tiny_target("qwen3")
    model, batch = tiny_draft("eagle3", target, loss=TERMS, d_pace=0.5), random_batch([25, 14])
    steps, (B, S) = model.config.ttt_length, batch.input_ids.shape
    mask = supervised_slots(batch.supervision, steps)
    hidden = model.train_hidden(batch.features, batch.input_ids, torch.arange(S).expand(B, S), steps, S)
    wanted = 0.0
    for row in range(B):
        for t in range(S):
            held = [j for j in range(steps) if mask[j, row, t]]
            if held:
                states = [model.norm(hidden[j, row, t]) for j in held]
                labels = [S * row + t + 2 + j for j in held]
                weights = [1.0 / float(batch.supervision.lengths[row])] * len(held)
                wanted = wanted + plain_chain(model, states, batch, labels, weights)
    torch.testing.assert_close(model(batch).weighted_sum(), wanted, atol=1e-4, rtol=1e-5)


def test_the_published_loss_is_what_its_terms_say() -> None:
    target, batch = tiny_target("qwen3"), random_batch([25, 14])
    for algorithm, terms in (
        ("dflash", [("ce", 1.0)]), ("dspark", [("ce", 0.1), ("l1", 0.9)]), ("eagle3", [("soft_ce", 1.0)]),
    ):  # fmt: skip
        loss = [{"name": name, "weight": weight} for name, weight in terms]
        published, given = tiny_draft(algorithm, target)(batch), tiny_draft(algorithm, target, loss=loss)(batch)
        assert torch.equal(published.weighted_sum(), given.weighted_sum())
        assert set(published.terms) == set(given.terms)
        assert set(published.metrics) == set(given.metrics)


@pytest.mark.parametrize("algorithm", ["dflash", "eagle3"])
def test_a_label_outside_a_reduced_vocabulary_teaches_nothing(algorithm: str) -> None:
    """Here it is so of every label: nothing is left of any term, and the step's weight stays that of the masks."""
    changes: dict[str, Any] = {"draft_vocab_size": 20, "loss": TERMS}
    model, batch = tiny_draft(algorithm, tiny_target("qwen3"), **changes), random_batch([25])
    used = set(batch.input_ids[0].tolist())
    others = [token for token in range(model.shape.vocab_size) if token not in used]
    model.set_draft_vocab(torch.tensor(others[:20]))
    terms = model(batch)
    assert float(terms.weighted_sum().detach()) == 0.0
    assert all(float(term.weight) > 0 for term in terms.terms.values())
    terms.loss().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())
