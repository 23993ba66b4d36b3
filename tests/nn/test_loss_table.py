"""The table of losses: what the documentation says of it, and what its weights tell the kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from deepspec.nn.loss_table import DIRECTIONS, LOSSES, LossTerm, LossWeights

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"


def test_the_page_has_the_row_of_every_loss() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, loss in LOSSES.items():
        assert f"| `{name}` | {loss.formula} | {'yes' if loss.compares else 'no'} | {loss.source} |" in page


def test_every_loss_can_be_given_a_weight_and_has_a_gradient() -> None:
    for name, loss in LOSSES.items():
        weights = LossWeights.of([LossTerm(name=name, weight=0.5)])
        assert weights.used == {name: 0.5}
        assert weights.needs_target == loss.compares
        assert any(weights.reads(one) for one in DIRECTIONS) == (loss.value is not None)


def test_factors_add_up_and_are_numbers_where_they_can_be() -> None:
    accept = torch.tensor([0.0, 0.5, 1.0])
    assert LossWeights(l1=0.9, tv=0.2).share("l1", accept) == 1.0
    assert LossWeights(l1=0.9, tv=0.2, e2e_tv=1.0).only_l1
    assert not LossWeights(l1=0.9, nla=0.2).only_l1
    assert not LossWeights(l1=0.9, ce=0.2).only_l1
    hybrid = LossWeights(lk_hybrid=2.0)
    trust = torch.exp(-3 * accept)
    torch.testing.assert_close(hybrid.share("soft", accept), 2 * trust)
    torch.testing.assert_close(hybrid.share("l1", accept), 1 - trust)
    assert float(LossWeights(nla=1.0).share("l1", accept)[0]) == 0.0, "no gradient below the least acceptance"
