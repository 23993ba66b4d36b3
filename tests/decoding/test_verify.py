"""Verification and admission against references, a row and a token at a time: random shapes, fp32 and bf16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspec.decoding.scheduler import FixedLength, StepCosts, Threshold, Throughput
from deepspec.decoding.verify import Uniforms, VerifyResult, sample, verify_greedy, verify_sampled
from deepspec.files import write_json

LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def packed_case(lengths: list[int], vocab: int, dtype: torch.dtype, seed: int):
    """Packed logits [T, V], drafts [B, K] that are often the target's choice, probs [B, K, V], index, lengths."""
    generator = torch.Generator().manual_seed(seed)
    sent = torch.tensor(lengths)
    slots = int(sent.max())
    starts = torch.cumsum(sent + 1, 0) - (sent + 1)
    index = starts[:, None] + torch.minimum(torch.arange(slots + 1), sent[:, None])
    logits = torch.randn(int((sent + 1).sum()), vocab, generator=generator).mul(2).to(dtype)
    random = torch.randint(vocab, (len(lengths), slots), generator=generator)
    alike = torch.rand(len(lengths), slots, generator=generator) < 0.7
    drafts = torch.where(alike, logits[index[:, :slots]].float().argmax(-1), random)
    probs = torch.softmax(torch.randn(len(lengths), slots, vocab, generator=generator), -1)
    numbers = torch.rand(len(lengths), 2 * slots + 1, generator=generator, dtype=torch.float64)
    uniforms = Uniforms(numbers[:, :slots], numbers[:, slots : 2 * slots], numbers[:, -1])
    return logits, drafts, probs, index, sent, uniforms


def verify_reference(
    logits: Tensor,
    drafts: Tensor,
    draft_probs: Tensor | None,
    index: Tensor,
    lengths: Tensor,
    temperature: float,
    uniforms: Uniforms | None,
) -> VerifyResult:
    """``verify_greedy`` and ``verify_sampled``, a row and a token at a time."""
    accepted, tokens = [], []
    for row in range(len(drafts)):
        count, token = 0, -1
        for slot in range(int(lengths[row]) + 1):
            here = logits[int(index[row, slot])].float()
            last = slot == int(lengths[row])
            if draft_probs is None or uniforms is None:
                choice = int(here.argmax())
                token = choice
                if last or choice != int(drafts[row, slot]):
                    break
            else:
                weights = torch.softmax(here / temperature, -1)
                if not last:
                    drafted = draft_probs[row, slot]
                    x = int(drafts[row, slot])
                    if uniforms.accept[row, slot] * drafted[x] < weights[x]:
                        count += 1
                        continue
                    residual = (weights - drafted).clamp_min(0)
                    weights = residual if residual.sum() > 0 else weights
                token = int(sample(weights[None], uniforms.last[row : row + 1]))
                break
            count += 1
        accepted.append(count)
        tokens.append(token)
    return VerifyResult(torch.tensor(accepted, device=drafts.device), torch.tensor(tokens, device=drafts.device))


def admit_reference(survival: np.ndarray, costs: StepCosts) -> np.ndarray:
    """``Throughput.admit`` token by token, from survival [R, K]."""
    rows, slots = survival.shape
    lengths = np.zeros(rows, dtype=np.int64)
    expected, tokens = float(rows), rows
    best = expected / float(costs.seconds(rows, np.array([tokens]))[0])
    while lengths.sum() < rows * slots:
        heads = [
            (-survival[row, lengths[row]], row * slots + lengths[row]) for row in range(rows) if lengths[row] < slots
        ]
        gain, index = min(heads)
        expected, tokens = expected - gain, tokens + 1
        rate = expected / float(costs.seconds(rows, np.array([tokens]))[0])
        if rate < best:
            break
        best = rate
        lengths[index // slots] += 1
    return lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, vocab=st.integers(2, 9), seed=st.integers(0, 10_000))
def test_greedy_acceptance_equals_the_reference(dtype: torch.dtype, lengths: list[int], vocab: int, seed: int) -> None:
    logits, drafts, _, index, sent, _ = packed_case(lengths, vocab, dtype, seed)
    fast = verify_greedy(logits, drafts, index, sent)
    reference = verify_reference(logits, drafts, None, index, sent, 0.0, None)
    assert fast.accepted.tolist() == reference.accepted.tolist()
    assert fast.token.tolist() == reference.token.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS, vocab=st.integers(2, 9), seed=st.integers(0, 10_000), temperature=st.sampled_from([0.3, 0.7, 1.0])
)
def test_rejection_sampling_equals_the_reference(
    dtype: torch.dtype, lengths: list[int], vocab: int, seed: int, temperature: float
) -> None:
    logits, drafts, probs, index, sent, uniforms = packed_case(lengths, vocab, dtype, seed)
    fast = verify_sampled(logits, drafts, probs, index, sent, temperature, uniforms)
    reference = verify_reference(logits, drafts, probs, index, sent, temperature, uniforms)
    assert fast.accepted.tolist() == reference.accepted.tolist()
    assert fast.token.tolist() == reference.token.tolist()


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    logits, drafts, _, index, sent, uniforms = packed_case([3, 3, 3], 7, torch.float32, 0)
    probs = torch.softmax(logits, -1)[index[:, :3]]
    assert verify_sampled(logits, drafts, probs, index, sent, 1.0, uniforms).accepted.tolist() == [3, 3, 3]


def test_what_was_not_sent_is_never_accepted() -> None:
    logits, _, probs, index, _, uniforms = packed_case([3, 3], 7, torch.float32, 0)
    drafts = logits.argmax(-1)[index[:, :3]]
    sent = torch.tensor([1, 0])
    assert verify_greedy(logits, drafts, index, sent).accepted.tolist() == [1, 0]
    sampled = verify_sampled(logits, drafts, torch.zeros_like(probs), index, sent, 1.0, uniforms)
    assert sampled.accepted.tolist() == [1, 0]


@settings(max_examples=150, deadline=None)
@given(
    confidence=st.integers(1, 5).flatmap(
        lambda slots: st.lists(
            st.lists(st.sampled_from([0.05, 0.3, 0.5, 0.5, 0.8, 0.9, 1.0]), min_size=slots, max_size=slots),
            min_size=1,
            max_size=6,
        )
    ),
    per_token=st.floats(0.0, 0.4),
    step=st.integers(1, 8),
)
def test_admission_equals_the_reference(confidence: list[list[float]], per_token: float, step: int) -> None:
    """Also with a staircase of costs, and with the ties that equal confidences make."""
    values = np.array(confidence)
    rows, slots = values.shape
    tokens = np.arange(rows, rows * (slots + 1) + 1, dtype=float)
    seconds = 1.0 + per_token * np.ceil(tokens / step)
    costs = StepCosts({rows: (tokens, seconds)})
    fast = Throughput(costs).admit(values, slots, rows)
    assert fast.tolist() == admit_reference(values.cumprod(axis=1), costs).tolist()


def test_admission_is_causal() -> None:
    """What comes behind a row's last admitted token can be anything: the lengths stay."""
    generator = np.random.Generator(np.random.Philox(key=1))
    costs = StepCosts({4: (np.array([4.0, 8.0, 32.0]), np.array([1.0, 1.2, 3.0]))})
    for _ in range(200):
        confidence = generator.uniform(0.2, 1.0, (4, 7))
        lengths = Throughput(costs).admit(confidence, 7, 4)
        changed = confidence.copy()
        for row, length in enumerate(lengths):  # the token that was refused was looked at; those behind it were not
            changed[row, length + 1 :] = generator.uniform(0.0, 1.0, max(0, 7 - length - 1))
        assert Throughput(costs).admit(changed, 7, 4).tolist() == lengths.tolist()


def test_costs_are_read_back_as_written_also_those_of_an_earlier_version(tmp_path) -> None:
    costs = StepCosts({4: (np.array([4.0, 8.0]), np.array([1.0, 1.5]))})
    for more in ({}, {"saved": {"4": [0.5, 0.0]}, "even": {"4": 0.25}}):
        write_json(tmp_path / "costs.json", costs.to_row() | more)
        again = StepCosts.load(tmp_path / "costs.json")
        assert again.seconds(4, np.array([6])) == costs.seconds(4, np.array([6])) == 1.25
    assert costs.seconds(8, np.array([16])) == 1.5  # as many tokens a row


def test_thresholds_and_fixed_lengths_cut_prefixes() -> None:
    confidence = np.array([[0.9, 0.4, 0.9], [0.2, 0.9, 0.9], [0.6, 0.6, 0.6]])
    assert Threshold(0.5).admit(confidence, 3, 3).tolist() == [1, 0, 3]
    assert FixedLength(2).admit(None, 3, 2).tolist() == [2, 2]
