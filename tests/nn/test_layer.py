"""The norm against that of torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.nn.layer import RMSNorm


@given(
    rows=st.integers(0, 5), size=st.integers(1, 40), scale=st.booleans(), seed=st.integers(0, 99), bf16=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_norm_and_its_gradients_equal_torch(rows: int, size: int, scale: bool, seed: int, bf16: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if bf16 else torch.float32
    norm = RMSNorm(size, 1e-6, scale).to(dtype)
    if norm.weight is not None:
        norm.weight.data.copy_(torch.randn(size, generator=generator))
    x = torch.randn(rows, 3, size, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(rows, 3, size, generator=generator).to(dtype)
    weight = None if norm.weight is None else norm.weight.float()
    plain = F.rms_norm(x.float(), (size,), weight, 1e-6).to(dtype)
    leaves = [x] if norm.weight is None else [x, norm.weight]
    found, wanted = ([y, *torch.autograd.grad(y, leaves, upstream)] for y in (norm(x), plain))
    tolerance = {"atol": 0.02, "rtol": 0.02} if bf16 else {"atol": 1e-5, "rtol": 1e-4}
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
