"""Matrix products: float32 on a CPU through oneDNN, everything else as PyTorch does it.

PyTorch hands float32 products on a CPU to MKL, which uses half of the vector width of other makers' processors:
110 against 250 GFLOP/s on one Zen 5 core. oneDNN comes with PyTorch, but by itself takes bfloat16 products alone.
The operator called here is the one that ``torch.compile`` calls; where a PyTorch lacks it, nothing is lost but speed.
The environment variable DEEPSPEC_PRODUCTS overrides: ``onednn`` for products of any size, ``torch`` for none.

M, N rows of the factors, K what is summed over; R rows of a linear map, I its inputs, O its outputs.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# multiplications: smaller products gain little, and MKL rounds them half as much
_LEAST = {"onednn": 0, "torch": sys.maxsize}.get(os.environ.get("DEEPSPEC_PRODUCTS", ""), 1 << 22)
_LEAST_ROWS = 4  # below, a product is bound by reading the matrix


@cache
def _has_onednn() -> bool:
    """Whether this PyTorch has the operator, and it multiplies."""
    try:
        return bool(torch.equal(_onednn(torch.ones(2, 3), torch.ones(4, 3)), torch.full((2, 4), 3.0)))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def is_fast(a: Tensor, b: Tensor) -> bool:
    """Whether ``a @ b.T`` goes to oneDNN."""
    fitting = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    enough = a.numel() * len(b) >= _LEAST and a.numel() >= _LEAST_ROWS * a.shape[-1]
    return fitting and enough and bool(torch.backends.mkldnn.enabled) and _has_onednn()


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``a @ b.T`` [M, N]; the operator knows no gradients, so where they are wanted PyTorch multiplies."""
    differentiable = torch.is_grad_enabled() and (a_MK.requires_grad or b_NK.requires_grad)
    return _onednn(a_MK, b_NK) if is_fast(a_MK, b_NK) and not differentiable else a_MK @ b_NK.T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.has_bias = bias is not None
        return _onednn(x, weight_OI, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_RO = grad.flatten(0, -2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        d_x = product(grad_RO, weight_OI.T).view_as(x) if wants_x else None
        d_weight = product(grad_RO.T, x.flatten(0, -2).T) if wants_weight else None
        return d_x, d_weight, grad_RO.sum(dim=0) if ctx.has_bias and wants_bias else None


class Linear(nn.Linear):
    """``nn.Linear`` whose products are those of this file."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] -> [.., O]."""
        if not is_fast(x, self.weight):
            return super().forward(x)
        if not torch.is_grad_enabled():
            return _onednn(x, self.weight, self.bias)
        out: Tensor = _Linear.apply(x, self.weight, self.bias)
        return out
