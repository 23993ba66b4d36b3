"""A block drafter over a reduced vocabulary against whole logits that are masked outside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_tools import random_batch, tiny_draft, tiny_target

from deepspec.algorithms.dflash import block_loss
from deepspec.nn.loss_chunk import LossWeights


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("head", ["vanilla", "gated"])
def test_loss_and_gradients_are_those_of_whole_logits_masked_outside_it(head: str, seed: int) -> None:
    target = tiny_target("qwen3")
    model = tiny_draft("dspark", target, draft_vocab_size=40, markov_head=head)
    kept = torch.randperm(96, generator=torch.Generator().manual_seed(seed))[:40].sort().values
    model.set_draft_vocab(kept)
    batch = random_batch([25, 14])
    batch = batch.planned(model.algorithm.plan(model.config, batch.supervision))
    slots = block_loss(model, batch, LossWeights(ce=0.7, l1=0.4))
    slots.head.combined.backward()
    fused = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    plan = slots.plan
    label_R = batch.input_ids.flatten()[plan.label_R]
    previous_R = batch.input_ids.flatten()[plan.label_R - 1]
    hidden = model.train_slots(batch.features, batch.input_ids, plan.anchor_BN, plan.max_context_len)
    assert model.markov_head is not None
    embedded = model.markov_head.markov_w1(previous_R)
    hidden_RD = hidden.flatten(0, 2)[plan.slot_R]
    latent_R = model.markov_head.step(embedded, hidden_RD, None)[0]
    mask = torch.full((96,), -torch.inf).index_fill(0, kept, 0.0)
    bias = torch.zeros(len(label_R), 96).index_copy(1, kept, model.markov_head.markov_w2(latent_R))
    log_p = F.log_softmax(model.frozen.logits(hidden_RD) + bias + mask, dim=-1)
    states = batch.last_hidden.flatten(0, 1)[plan.label_R - 1]
    q = F.softmax(model.frozen.logits(states) + mask, dim=-1)
    l1 = (log_p.exp() - q).abs().sum(dim=-1)
    sayable = mask[label_R] == 0
    assert 0 < int(sayable.sum()) < len(label_R)  # both kinds of slots occur
    ce = F.nll_loss(log_p[sayable], label_R[sayable], reduction="none")
    weight_R = plan.rows.weight_R
    loss = 0.7 * (weight_R[sayable] * ce).sum() + 0.4 * (weight_R * l1)[sayable].sum()
    loss.backward()

    torch.testing.assert_close(slots.head.combined, loss, rtol=1e-5, atol=1e-5)
    assert float(plan.weight) == pytest.approx(float(weight_R.sum()))
    torch.testing.assert_close(slots.head.accept_R, torch.where(sayable, 1 - l1.detach() / 2, 0.0), rtol=0, atol=1e-5)
    hit_R = (log_p.argmax(dim=-1) == label_R).float()
    assert torch.equal(slots.head.hit_R, hit_R)
    for name, parameter in model.named_parameters():
        if name in fused:
            torch.testing.assert_close(fused[name], parameter.grad, rtol=1e-4, atol=1e-5)
