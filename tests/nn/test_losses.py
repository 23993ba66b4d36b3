"""The fused head loss against its reference: values, gradients, softcap, sequential head, reduced vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_losses import plain_d_pace, plain_end_to_end, plain_head_terms, plain_rows
from torch import Tensor
from torch._dynamo.utils import counters

from deepspec.nn import loss_chunk
from deepspec.nn.chains import Chains
from deepspec.nn.cpu import tiles
from deepspec.nn.heads import FrozenHead
from deepspec.nn.loss_table import LOSSES, LossWeights
from deepspec.nn.losses import HeadLoss, HeadRows, head_loss

V, D, M = 61, 12, 5
CASES = {
    "seed": st.integers(0, 9999), "R": st.integers(0, 90), "latent": st.sampled_from([None, "position", "row"]),
    "softcap": st.sampled_from([None, 4.0]), "ce": st.sampled_from([0.0, 0.1, 1.0]),
    "l1": st.sampled_from([0.0, 0.9]), "soft": st.sampled_from([0.0, 0.7]), "reduced": st.booleans(),
}  # fmt: skip


class Problem:
    """Random rows with everything that the loss reads."""

    def __init__(
        self, seed: int, R: int, latent: str | None, softcap: float | None, reduced: bool, dtype: torch.dtype
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int, grad: bool = False) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype).requires_grad_(grad)

        self.draft_vocab = torch.randperm(V, generator=g)[: V // 2].sort().values if reduced else None
        size = V if self.draft_vocab is None else len(self.draft_vocab)
        position = torch.randint(0, max(1, R // 2), (R,), generator=g).sort().values
        _, position = torch.unique_consecutive(position, return_inverse=True)
        P = int(position.max()) + 1 if R else 0
        self.frozen = FrozenHead(normal(V, D), normal(V, D) * 0.5, 1.0, softcap).reduced(self.draft_vocab)
        self.rows = HeadRows.plan(position, torch.rand(R, generator=g)).with_labels(
            torch.randint(0, size, (R,), generator=g)
        )
        self.hidden, self.target = normal(R, D, grad=True), normal(P, D)
        self.latent = None if latent is None else normal(R if latent == "row" else P, M, grad=True)
        self.w2 = None if latent is None else normal(size, M, grad=True)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.latent, self.w2) if x is not None]

    def fused(self, weights: LossWeights, backend: str = "tiled") -> HeadLoss:
        return head_loss(self.hidden, self.frozen, self.rows, weights, self.target, self.latent, self.w2, backend)

    def logits(self) -> tuple[Tensor, Tensor]:
        logits = self.frozen.logits(self.hidden).float()
        if self.latent is not None and self.w2 is not None:
            bias = self.latent.float() @ self.w2.float().T
            logits = logits + (bias if len(bias) == len(logits) else bias[self.rows.position_R])
        return logits, self.frozen.logits(self.target)[self.rows.position_R]

    def plain_table(self, weights: LossWeights, chains: Chains) -> Tensor:
        """Any terms of the table over ``chains``, slot by slot."""
        rows = plain_rows(*self.logits(), self.rows.label_R)
        label = torch.exp(-rows["ce"].detach()).tolist()
        row_of = {slot: row for row, slot in enumerate(chains.index_R.tolist())}
        total = 0.0 * rows["ce"].sum()
        for chain in range(chains.count):
            slots = [row_of.get(chain * chains.length + k) for k in range(chains.length)]
            held = [row for row in slots if row is not None]
            pace = dict.fromkeys(held, 1.0)
            if chains.d_pace is not None:
                given = [0.0 if row is None else label[row] for row in slots]
                found = plain_d_pace(given, [row is not None for row in slots], chains.d_pace)
                pace = {row: weight for row, weight in zip(slots, found, strict=True) if row is not None}
            for row in held:
                terms = sum(weight * rows[name][row] for name, weight in weights.used.items() if name in rows)
                total = total + self.rows.weight_R[row] * pace[row] * terms
            if held and weights.e2e_tv:
                survival = plain_end_to_end([1 - rows["tv"][row] for row in held])
                total = total + weights.e2e_tv * self.rows.weight_R[held].sum() * survival
        return total

    def plain(self, weights: LossWeights) -> tuple[Tensor, Tensor]:
        logits, target = self.logits()
        terms = plain_head_terms(logits, target, self.rows.label_R, self.rows.weight_R)
        return weights.ce * terms.ce + weights.soft_ce * terms.soft_ce + weights.l1 * terms.l1, terms.accept


@given(**CASES)
@settings(max_examples=60, deadline=None)
def test_fused_equals_plain(
    seed: int, R: int, latent: str | None, softcap: float | None, ce: float, l1: float, soft: float, reduced: bool
) -> None:
    problem = Problem(seed, R, latent, softcap, reduced, torch.float32)
    weights = LossWeights(ce, soft, l1, report_l1=True)
    fused, (plain, accept) = problem.fused(weights), problem.plain(weights)
    torch.testing.assert_close(fused.combined, plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(fused.accept_R, accept, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(fused.combined * 1.7, problem.leaves)
    wanted = torch.autograd.grad(plain * 1.7, problem.leaves, allow_unused=True)
    for one, other, leaf in zip(found, wanted, problem.leaves, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(leaf) if other is None else other, atol=2e-5, rtol=1e-4)


ROW_LOSSES = [name for name, loss in LOSSES.items() if loss.value is not None]
BACKENDS = ("tiled", "compiled")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The body that torch.compile fuses on CUDA, run uncompiled here."""
    monkeypatch.setattr("deepspec.nn.loss_chunk.compiled_chunk_terms", lambda: loss_chunk.chunk_terms)


def chains_of(problem: Problem, alpha: float | None) -> Chains:
    """The rows in random slots of chains of four."""
    R = len(problem.rows.label_R)
    count = R // 3 + 1
    index = torch.randperm(4 * count, generator=torch.Generator().manual_seed(R))[:R]
    return Chains(index, count, 4, alpha)


def equals_plain(problem: Problem, weights: LossWeights, chains: Chains, backend: str) -> None:
    where = (problem.target, problem.latent, problem.w2, backend, chains)
    fused = head_loss(problem.hidden, problem.frozen, problem.rows, weights, *where)
    plain = problem.plain_table(weights, chains)
    torch.testing.assert_close(fused.combined, plain, atol=1e-4, rtol=1e-5)
    assert list(fused.sums) == [*weights.used]
    total = sum((weights.used[name] * term for name, term in fused.sums.items()), torch.zeros(()))
    torch.testing.assert_close(fused.combined.detach(), total)
    found = torch.autograd.grad(fused.combined * 1.7, problem.leaves)
    wanted = torch.autograd.grad(plain * 1.7, problem.leaves, allow_unused=True)
    for one, other, leaf in zip(found, wanted, problem.leaves, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(leaf) if other is None else other, atol=5e-5, rtol=2e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_every_loss_of_the_table_equals_its_plain_twin(name: str) -> None:
    cases = [("tiled", None, 4.0, False), ("tiled", "position", None, True), ("compiled", "row", 4.0, True)]
    for seed, (backend, latent, softcap, reduced) in enumerate([*cases, ("compiled", None, None, False)]):
        problem = Problem(seed, 40, latent, softcap, reduced, torch.float32)
        equals_plain(problem, LossWeights(**{name: 0.8}), chains_of(problem, None), backend)


@pytest.mark.usefixtures("uncompiled")
@given(
    seed=st.integers(0, 9999), R=st.integers(0, 50), latent=st.sampled_from([None, "position", "row"]),
    backend=st.sampled_from(BACKENDS), alpha=st.sampled_from([None, 0.0, 0.5, 1.0]), e2e=st.sampled_from([0.0, 0.6]),
    base=st.lists(st.sampled_from(ROW_LOSSES), max_size=3, unique=True),
)  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chains_couple_their_slots_as_the_plain_twin_does(
    seed: int, R: int, latent: str | None, backend: str, alpha: float | None, e2e: float, base: list[str]
) -> None:
    """D-PACE's weights and end-to-end TV, over any terms, with and without a sequential head."""
    problem = Problem(seed, R, latent, None, False, torch.float32)
    weights = LossWeights(**dict.fromkeys(base, 0.7), e2e_tv=e2e)
    equals_plain(problem, weights, chains_of(problem, alpha), backend)


def test_a_row_without_weight_is_never_accepted() -> None:
    """Its label is outside the draft's vocabulary: the slots behind it are not reached."""
    problem = Problem(5, 4, None, None, False, torch.float32)
    rows = replace(problem.rows, weight_R=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    chains = Chains(torch.arange(4), 1, 4, 0.5)
    weights = LossWeights(ce=1.0, e2e_tv=1.0)
    found = head_loss(problem.hidden, problem.frozen, rows, weights, problem.target, chains=chains)
    first = float(found.rows.accept[0])
    assert float(found.sums["e2e_tv"]) == pytest.approx(3 * (1 - first / 4), rel=1e-5)
    label = torch.exp(-found.rows.ce) * torch.tensor([1.0, 0.0, 1.0, 1.0])
    wanted = plain_d_pace(label.tolist(), [True] * 4, 0.5)
    assert found.weight_R.tolist() == pytest.approx([wanted[0], 0.0, *wanted[2:]], rel=1e-5)
    assert not torch.autograd.grad(found.combined, problem.hidden)[0][1].any()


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_every_loss_in_bf16(name: str) -> None:
    """A sign of p - q may flip in bf16, so the gradients of losses along it agree less."""
    problem = Problem(6, 50, None, None, False, torch.bfloat16)
    weights, chains = LossWeights(**{name: 1.0}), chains_of(problem, 0.5)
    fused = head_loss(problem.hidden, problem.frozen, problem.rows, weights, problem.target, chains=chains)
    plain = problem.plain_table(weights, chains)
    torch.testing.assert_close(fused.combined, plain, atol=0.05, rtol=0.02)
    found, wanted = (torch.autograd.grad(one, problem.hidden)[0].float() for one in (fused.combined, plain))
    assert (found - wanted).norm() <= (0.3 if weights.reads("l1") else 0.03) * wanted.norm() + 1e-3


@given(seed=st.integers(0, 999), latent=st.sampled_from([None, "position", "row"]))
@settings(max_examples=10, deadline=None)
def test_bf16_accumulates_in_fp32(seed: int, latent: str | None) -> None:
    problem = Problem(seed, 50, latent, None, False, torch.bfloat16)
    with_l1, smooth = LossWeights(0.1, 0.0, 0.9), LossWeights(0.1, 0.9, 0.0)  # a sign of p - q may flip in bf16
    torch.testing.assert_close(problem.fused(with_l1).combined, problem.plain(with_l1)[0], atol=0.05, rtol=0.02)
    found = torch.autograd.grad(problem.fused(smooth).combined, problem.leaves)
    wanted = torch.autograd.grad(problem.plain(smooth)[0], problem.leaves)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other.float()).norm() <= 0.03 * other.float().norm() + 1e-3


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = LossWeights(0.1, 0.5, 0.9)
    problem = Problem(1, 90, "position", 4.0, False, torch.float32)
    whole = problem.fused(weights)
    gradients = torch.autograd.grad(whole.combined, problem.leaves)
    monkeypatch.setattr(tiles, "CHUNK_BYTES", {"cpu": 0})
    monkeypatch.setattr(tiles, "_ROW_MULTIPLE", 7)
    monkeypatch.setattr(tiles, "_TILE_COLUMNS", 13)
    pieces = problem.fused(weights)
    torch.testing.assert_close(pieces.combined, whole.combined)
    for one, other in zip(torch.autograd.grad(pieces.combined, problem.leaves), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_compiled_body_equals_the_tiles() -> None:
    for weights in (LossWeights(0.1, 0.0, 0.9), LossWeights(soft_ce=1.0), LossWeights(ce=1.0)):
        problem = Problem(2, 40, "position", 4.0, False, torch.float32)
        one, other = problem.fused(weights, "compiled"), problem.fused(weights, "tiled")
        torch.testing.assert_close(one.combined, other.combined)
        torch.testing.assert_close(one.hit_R, other.hit_R)
        pairs = zip(*(torch.autograd.grad(loss.combined, problem.leaves) for loss in (one, other)), strict=True)
        for left, right in pairs:
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_by_inductor_on_the_cpu() -> None:
    everything = LossWeights(**dict.fromkeys(ROW_LOSSES, 0.3), e2e_tv=0.4)
    for latent, weights in (
        ("position", LossWeights(0.1, 0.0, 0.9)),
        ("row", everything),
        (None, LossWeights(nla=1.0)),
    ):
        problem = Problem(3, 40, latent, None, False, torch.float32)
        equals_plain(problem, weights, chains_of(problem, 0.5), "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_by_inductor_equals_the_tiles(name: str) -> None:
    """Forward and gradients of what was really compiled: past dynamo's limit of recompilations it would run eagerly."""
    torch._dynamo.reset()
    counters.clear()
    weights = LossWeights(**{name: 0.8})
    for seed, (latent, softcap) in enumerate([(None, None), ("position", 4.0)]):
        problem = Problem(seed, 40, latent, softcap, False, torch.float32)
        where = (problem.hidden, problem.frozen, problem.rows, weights, problem.target, problem.latent, problem.w2)
        chains = chains_of(problem, None)
        one, other = (head_loss(*where, backend, chains) for backend in ("compiled", "tiled"))
        torch.testing.assert_close(one.combined, other.combined, atol=1e-4, rtol=1e-5)
        found, wanted = (torch.autograd.grad(loss.combined, problem.leaves) for loss in (one, other))
        for left, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(left, right, atol=5e-5, rtol=2e-4)
    assert counters["inductor"], "nothing was compiled"


def test_without_gradients_nothing_is_kept() -> None:
    problem = Problem(4, 20, None, None, False, torch.float32)
    with torch.no_grad():
        loss = problem.fused(LossWeights(soft_ce=1.0))
    assert not loss.combined.requires_grad
    torch.testing.assert_close(loss.combined, problem.plain(LossWeights(soft_ce=1.0))[0].detach())
