"""The short convolution against its formula, slot by slot."""

from __future__ import annotations

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
    z, between, upstream = (torch.randn(2, blocks, slots, 12, generator=generator).to(dtype) for _ in range(3))
    z.requires_grad_()
    leaves = [z, *conv.parameters()]
    inner, delta = conv(z)
    found = conv(inner * between, delta)[0]
    wanted = plain(conv, z, plain(conv, z, z, 0) * between, 1)
    tolerance = {"atol": 0.5, "rtol": 0.1} if bf16 else {"atol": 1e-4, "rtol": 1e-4}
    pairs = zip(*([y, *torch.autograd.grad(y, leaves, upstream)] for y in (found, wanted)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **tolerance)


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
