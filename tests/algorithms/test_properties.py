"""Properties of the objectives: supervision by its definition, no leakage, invariances, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from algorithm_tools import ALGORITHMS, MASK_TOKEN, random_batch, rows_of, tiny_draft, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import supervised_slots_NK

from deepspec.algorithms.block_plan import BlockPlan, draw_anchors
from deepspec.algorithms.eagle3 import TTTPlan, supervised_slots
from deepspec.algorithms.p_eagle import ChainPlan
from deepspec.testing.case import loss_and_gradients

TARGET = tiny_target("qwen3")


@given(seed=st.integers(0, 999), length=st.integers(2, 30), block=st.integers(1, 9), cap=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_block_plan_is_the_definition(seed: int, length: int, block: int, cap: int) -> None:
    supervision = random_batch([length, max(1, length - 3)], seed=seed).supervision
    anchors = draw_anchors(supervision, cap)
    plan = BlockPlan.make(supervision, anchors, block, 4.0)
    N, S = plan.anchor_BN.shape[1], supervision.loss_mask.shape[1]
    wanted, weight = [], 0.0
    for b, drawn in enumerate(anchors):
        mask, n = supervision.loss_mask[b], int(supervision.lengths[b])
        assert len(drawn) == min(cap, sum(bool(mask[a] and mask[a + 1]) for a in range(n - 1)))
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        slots = supervised_slots_NK(mask, n, drawn, block)
        for i, k in slots.nonzero().tolist():
            wanted.append((b * S + int(drawn[i]) + k, (b * N + i) * block + k))
            weight += 2.718281828 ** (-k / 4.0)
    found = list(zip(plan.position_P[plan.rows.position_R].tolist(), plan.slot_R.tolist(), strict=True))
    assert sorted(found) == sorted(wanted)
    assert [position for position, _ in found] == sorted(position for position, _ in found)
    assert plan.label_R.tolist() == [position + 1 for position, _ in found]
    assert float(plan.weight) == pytest.approx(weight, rel=1e-5)


@given(seed=st.integers(0, 999), length=st.integers(2, 30), steps=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_ttt_plan_is_the_definition(seed: int, length: int, steps: int) -> None:
    supervision = random_batch([length, max(2, length - 3)], seed=seed).supervision
    slots = supervised_slots(supervision, steps)
    B, S = supervision.loss_mask.shape
    wanted = {
        (j, b, t)
        for j in range(steps) for b in range(B) for t in range(S)
        if t + 2 + j < int(supervision.lengths[b]) and supervision.loss_mask[b, t + 2 + j]
    }  # fmt: skip
    assert {tuple(x) for x in slots.nonzero().tolist()} == wanted
    plan = TTTPlan.make(slots, supervision.lengths, 0.8)
    N = plan.active_BN.shape[1]
    found = set()
    for pair, position in zip(plan.pair_R.tolist(), plan.position_P[plan.rows.position_R].tolist(), strict=True):
        j, b, n = pair // (B * N), pair // N % B, pair % N
        t = int(plan.active_BN[b, n])
        assert position == b * S + t + 1 + j
        found.add((j, b, t))
    assert found == wanted


def test_anchors_depend_on_seed_epoch_and_sample_alone() -> None:
    batch = random_batch([40, 33, 40], share=1.0)
    whole = [a.tolist() for a in draw_anchors(batch.supervision, 5)]
    assert [a.tolist() for a in draw_anchors(rows_of(batch, [2, 0]).supervision, 5)] == [whole[2], whole[0]]
    again = dataclasses.replace(batch.supervision, epoch=2)
    assert [a.tolist() for a in draw_anchors(again, 5)] != whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_plan_weighs_what_its_rows_weigh_and_so_does_every_term(algorithm: str) -> None:
    model = tiny_draft(algorithm, TARGET)
    batch = random_batch([25, 14, 19], len(model.config.target_layers))
    plans = [model.algorithm.plan(model.config, rows_of(batch, [i]).supervision) for i in range(3)]
    weight = sum(float(plan.weight) for plan in plans)
    assert float(model.algorithm.plan(model.config, batch.supervision).weight) == pytest.approx(weight, rel=1e-6)
    for term in model(batch).terms.values():
        assert float(term.weight) == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_leaks_from_the_future(algorithm: str) -> None:
    """Features and tokens that a slot cannot know when decoding change nothing in it."""
    model = tiny_draft(algorithm, TARGET)
    batch = random_batch([30], len(model.config.target_layers), share=1.0)
    cut = 13
    tokens, features = batch.input_ids.clone(), batch.features.clone()
    features[:, cut:] += 5.0
    if algorithm in ("eagle3", "mtp"):  # slot t reads features <= t and, at step j, tokens <= t + 1 + j
        tokens[:, cut + 1 :] = 3
        slots = torch.arange(cut)[None]
        before = model.train_hidden(batch.features, batch.input_ids, slots, 3, 30)
        after = model.train_hidden(features, tokens, slots, 3, 30)
        for j in range(3):
            torch.testing.assert_close(after[j, 0, : cut - j], before[j, 0, : cut - j])
        assert (after[0, 0, cut - 1] - before[0, 0, cut - 1]).abs().max() == 0
        assert (after[1, 0, cut - 1] - before[1, 0, cut - 1]).abs().max() > 1e-4  # the test can see a leak
        return
    if algorithm == "p_eagle":  # anchor a reads features <= a and tokens <= a + 1, and nothing of what it predicts
        tokens[:, cut + 1 :] = 3
        reached = torch.zeros(1, 30, dtype=torch.int64).index_fill(1, torch.tensor([3, cut - 1, cut]), 3)
        plan = ChainPlan.make(
            torch.zeros(1, 30, dtype=torch.bool).index_fill(1, torch.tensor([cut - 1]), True), reached, 4
        )
        before = model.train_hidden(batch.features, batch.input_ids, plan)
        after = model.train_hidden(features, tokens, plan)
        torch.testing.assert_close(after[:7], before[:7])  # depth 0, then three depths of two chains
        assert (after[7:] - before[7:]).abs().amax(dim=1).min() > 1e-4  # the chain of an anchor that reads the change
        return
    tokens[:, cut + 1 :] = 3  # the block of anchor a reads features < a and token a
    anchors = torch.tensor([[3, cut, cut + 1]])
    before = model.train_slots(batch.features, batch.input_ids, anchors, 30)
    after = model.train_slots(features, tokens, anchors, 30)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert (after[:, 2] - before[:, 2]).abs().max() > 1e-4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_attention_backends_train_alike(algorithm: str) -> None:
    model = tiny_draft(algorithm, TARGET)
    batch = random_batch([25, 14], len(model.config.target_layers))
    loss, gradients = loss_and_gradients(model, batch)
    model.attention = "sdpa"
    again, changed = loss_and_gradients(model, batch)
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(changed[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("term", ["head", "confidence"])
def test_gradients_are_those_of_finite_differences(head: str, term: str) -> None:
    """Of each term alone; the confidence head's own parameters only, since its label moves with all others."""
    weights = {"confidence_weight": 0.0} if term == "head" else {"ce_weight": 0.0, "l1_weight": 0.0}
    model = tiny_draft("dspark", tiny_target("gemma4"), markov_head=head, **weights)
    batch = random_batch([20])
    _, gradients = loss_and_gradients(model, batch)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith("confidence_head") != (term == "confidence"):
            continue
        direction = torch.randn(parameter.shape, generator=generator) + gradients[name].sign()
        direction *= 2e-3 / direction.norm()
        wanted = float((gradients[name] * direction).sum())
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign)
                values.append(float(model(batch).loss()))
        with torch.no_grad():
            parameter.add_(direction)
        assert (values[0] - values[1]) / 2 == pytest.approx(wanted, abs=2e-6, rel=0.03), name


def test_mask_token_stands_behind_the_anchor() -> None:
    model = tiny_draft("dflash", TARGET)
    inputs = model.block_inputs(torch.tensor([[7]]))[0, 0]
    torch.testing.assert_close(inputs[0], TARGET.embed_weight[7])
    torch.testing.assert_close(inputs[1:], TARGET.embed_weight[MASK_TOKEN].expand(3, -1))
