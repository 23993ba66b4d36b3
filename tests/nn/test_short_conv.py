"""The short convolution against its formula, slot by slot."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspec.nn.short_conv import ShortConvolution


def made(taps: int, seed: int, dtype: torch.dtype = torch.float32) -> ShortConvolution:
    """A random one over 12 channels in groups of 4."""
    conv, generator = ShortConvolution(12, taps, 4), torch.Generator().manual_seed(seed)
    for parameter in conv.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return conv.to(dtype)


def plain(conv: ShortConvolution, z: Tensor, x: Tensor, side: int) -> Tensor:
    """``x`` [.., K, 12] convolved, the corrections made of ``z``."""
    taps, rows = conv.base_kernel.shape[1], []
    delta = conv.kernel_projection(z).unflatten(-1, (2, taps, 3))[..., side, :, :].repeat_interleave(4, dim=-1)
    for t in range(x.shape[-2]):
        parts = [(conv.base_kernel[side, o] + delta[..., t, o, :]) * x[..., t - o, :] for o in range(min(taps, t + 1))]
        rows.append(sum(parts[1:], parts[0]))
    return torch.stack(rows, dim=-2)


@given(
    taps=st.integers(1, 4),
    slots=st.integers(1, 5),
    blocks=st.integers(0, 3),
    seed=st.integers(0, 99),
    bf16=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_both_sides_and_their_gradients_are_the_formula(
    taps: int, slots: int, blocks: int, seed: int, bf16: bool
) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    conv, generator = made(taps, seed, dtype), torch.Generator().manual_seed(seed)
    exact = copy.deepcopy(conv).float()  # the rounded weights, computed with in float32
    drawn = [torch.randn(2, blocks, slots, 12, generator=generator).to(dtype) for _ in range(3)]

    def with_gradients(of: ShortConvolution, twin: bool) -> list[Tensor]:
        z, between, upstream = (one.to(of.base_kernel.dtype) for one in drawn)
        z.requires_grad_()
        if twin:
            y = plain(of, z, plain(of, z, z, 0) * between, 1)
        else:
            inner, delta = of(z)
            y = of(inner * between, delta)[0]
        return [y, *torch.autograd.grad(y, [z, *of.parameters()], upstream)]

    for one, other in zip(with_gradients(conv, False), with_gradients(exact, True), strict=True):
        assert one.dtype == dtype
        error, size = (one.float() - other).norm(), other.norm()
        assert error <= (0.03 if bf16 else 1e-5) * size + 1e-6


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_it_starts_as_the_identity(taps: int) -> None:
    conv, x = made(taps, 0), torch.randn(2, 5, 12)
    with torch.no_grad():
        conv.start(torch.Generator())
        found, delta = conv(x)
        assert torch.equal(found, x)
        assert torch.equal(conv(3 * x, delta)[0], 3 * x)


def test_a_slot_reads_none_after_it_and_no_other_block() -> None:
    conv, x = made(3, 0), torch.randn(2, 5, 12)
    before = conv(x)[0]
    changed = x.clone()
    changed[0, 3] += 1.0
    after = conv(changed)[0]
    same = (before == after).all(-1)
    assert same.tolist() == [[True, True, True, False, False], [True] * 5]
