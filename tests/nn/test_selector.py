"""The candidates of the fused pass against a sort of complete rows; their logits against the complete ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.nn import loss_chunk
from deepspec.nn.cpu.top import TopTokens
from deepspec.nn.heads import FrozenHead
from deepspec.nn.loss_table import LossWeights
from deepspec.nn.losses import HeadRows, head_loss
from deepspec.nn.selector import CandidateSelector, LateGradients, candidate_logits


@given(rows=st.integers(1, 4), widths=st.lists(st.integers(1, 50), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_top_tokens_of_tiles_are_those_of_complete_rows(rows: int, widths: list[int], seed: int) -> None:
    x = torch.randn(rows, sum(widths), generator=torch.Generator().manual_seed(seed))
    count = min(16, x.shape[1])
    top, tiles = TopTokens(count), x.split(widths, dim=1)
    for tile in tiles:
        top.see(tile)
    for number, tile in enumerate(x.softmax(-1).split(widths, dim=1)):
        top.collect(number, tile, sum(widths[:number]))
    assert torch.equal(top.tokens(), x.topk(count).indices)


@pytest.mark.parametrize("backend", ["tiled", "compiled"])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_pass_gives_the_likeliest_tokens(
    backend: str, cap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_chunk, "compiled_chunk_terms", lambda: loss_chunk.chunk_terms)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(5000, 12, generator=generator).to(dtype)
    frozen, hidden = FrozenHead(head, head, 1.0, cap), torch.randn(40, 12, generator=generator).to(dtype)
    rows = HeadRows.plan(torch.arange(40) // 2, torch.ones(40)).with_labels(torch.zeros(40, dtype=torch.int64))
    found = head_loss(hidden, frozen, rows, LossWeights(ce=1.0), backend=backend, candidates=9)
    logits = hidden.float() @ head.float().T
    logits = logits if cap is None else cap * (logits / cap).tanh()
    rounding = 1e-4 if dtype == torch.float32 else 0.1  # logits that are equal up to it come in any order
    torch.testing.assert_close(logits.gather(1, found.candidates_RC), logits.topk(9).values, atol=rounding, rtol=0.0)
    assert head_loss(hidden, frozen, rows, LossWeights(ce=1.0), backend=backend).candidates_RC.shape == (40, 0)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_candidate_logits_and_gradients_are_those_of_complete_rows(
    cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspec.nn.selector.CHUNK_BYTES", {"cpu": 2000})  # several chunks
    head = torch.randn(50, 12)
    frozen, hidden = FrozenHead(head, head, 1.0, cap), torch.randn(7, 12, requires_grad=True)
    candidates, upstream = torch.randint(0, 50, (7, 5)), torch.randn(7, 5)
    found, wanted = candidate_logits(hidden, frozen, candidates), frozen.logits(hidden).gather(1, candidates)
    for one, other in zip(*([y, *torch.autograd.grad(y, hidden, upstream)] for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_score_is_the_formula_and_starts_at_zero() -> None:
    selector = CandidateSelector(50, 40, 3, 12)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.normal_()
    hidden, previous, candidates = torch.randn(2, 12), torch.tensor([4, 49]), torch.tensor([[1, 39], [7, 0]])
    found = selector(hidden, previous, candidates)
    for row in range(2):
        query = selector.predecessor_codebook[previous[row]] * (selector.hidden_projection.weight @ hidden[row])
        for c in range(2):
            wanted = query @ selector.successor_codebook[candidates[row, c]]
            torch.testing.assert_close(found[row, c], wanted)
    with torch.no_grad():
        selector.start(torch.Generator().manual_seed(0))
    assert not selector(hidden, previous, candidates).any()
    assert selector.predecessor_codebook.any()  # else no gradient would ever reach the other codebook


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_late_gradients_are_those_of_the_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec.nn.selector.CHUNK_BYTES", {"cpu": 150})  # chunks that cut a token's rows
    selector = CandidateSelector(9, 7, 3, 12).to(dtype)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.normal_()
    previous, candidates = torch.randint(0, 9, (11,)), torch.randint(0, 7, (11, 4))
    hidden, upstream = torch.randn(11, 12, dtype=dtype, requires_grad=True), torch.randn(11, 4)
    late = LateGradients.begin(selector)
    inputs, found = [hidden, *selector.parameters()], []
    for one in (late, None):
        scores = selector(hidden, previous, candidates, one)
        found.append([scores, *torch.autograd.grad(scores, inputs, upstream)])
    exact = dtype == torch.float32
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 if exact else 0.1, rtol=1e-5 if exact else 0.02)


def test_the_codebooks_gradients_are_made_when_what_came_after_begin_is_done() -> None:
    """They are as large as the codebooks: made first they would be there beside every activation."""
    selector, order = CandidateSelector(9, 7, 3, 12), []
    late, start = LateGradients.begin(selector), torch.randn(11, 12, requires_grad=True)
    layer = start * 2.0  # stands for the layers
    start.register_hook(lambda _: order.append("layers"))
    selector.successor_codebook.register_hook(lambda _: order.append("codebook"))
    candidates = torch.randint(0, 7, (11, 4))
    selector(layer, torch.randint(0, 9, (11,)), candidates, late).sum().backward()
    assert order == ["layers", "codebook"]
    with torch.no_grad():
        assert LateGradients.begin(selector) is None
    assert LateGradients.begin(None) is None
