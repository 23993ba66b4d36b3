"""Matrix products through oneDNN against PyTorch's own, values and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepspec.nn.cpu import matmul
from deepspec.nn.cpu.matmul import Linear, linear, uses_onednn


@pytest.fixture(autouse=True, scope="module")
def _small_products_too() -> Iterator[None]:
    before, matmul._MIN_MULTIPLICATIONS = matmul._MIN_MULTIPLICATIONS, 0
    yield
    matmul._MIN_MULTIPLICATIONS = before


DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SIZES = st.integers(1, 70)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans(), st.sampled_from(list(DTYPES)), st.integers(0, 2**16))
def test_a_product_is_that_of_torch(
    m: int, k: int, n: int, left: bool, right: bool, dtype: torch.dtype, seed: int
) -> None:
    """Also of transposed factors, which are not contiguous."""
    a = normal(k, m, seed=seed, dtype=dtype).T if left else normal(m, k, seed=seed, dtype=dtype)
    b = normal(k, n, seed=seed + 1, dtype=dtype).T if right else normal(n, k, seed=seed + 1, dtype=dtype)
    wanted = a.double() @ b.double().T
    torch.testing.assert_close(linear(a, b).double(), wanted, rtol=DTYPES[dtype], atol=DTYPES[dtype] * k)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), SIZES, SIZES, st.booleans(), st.sampled_from(list(DTYPES)))
def test_a_linear_layer_and_its_gradients_are_those_of_torch(
    leading: list[int], inputs: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    ours, theirs = Linear(inputs, outputs, bias=bias), nn.Linear(inputs, outputs, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(dtype), theirs.double()
    x = normal(*leading, inputs, seed=0, dtype=dtype).requires_grad_()
    y = x.detach().double().requires_grad_()
    scale = normal(*leading, outputs, seed=1)
    for module, given_x in ((ours, x), (theirs, y)):
        (module(given_x) * scale.to(given_x.dtype)).sum().backward()
    tolerance = DTYPES[dtype] * 4
    close = {"rtol": tolerance, "atol": tolerance * 64}
    torch.testing.assert_close(ours(x).double(), theirs(y), **close)
    torch.testing.assert_close(x.grad.double(), y.grad, **close)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, msg=name, **close)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).double(), theirs(y), **close)


def test_only_what_is_wanted_gets_a_gradient() -> None:
    layer = Linear(6, 5)
    layer.weight.requires_grad_(False)
    x = normal(8, 6, seed=0).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((5,), 8.0))
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(8, 6))


def test_without_the_operator_everything_works_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(9, 6, seed=0), normal(7, 6, seed=1)
    assert uses_onednn(a, b) == torch.backends.mkldnn.is_available()
    with_it = linear(a, b)
    monkeypatch.setattr(matmul, "_has_onednn", lambda: False)
    assert not uses_onednn(a, b)
    torch.testing.assert_close(linear(a, b), with_it)
    layer = Linear(6, 7)
    assert torch.equal(layer(a), nn.functional.linear(a, layer.weight, layer.bias))
