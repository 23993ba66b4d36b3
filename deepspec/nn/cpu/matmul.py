"""Matrix products on a CPU: float32 through oneDNN, everything else as PyTorch does it.

PyTorch hands float32 products on a CPU to MKL, which uses half of the vector width of other makers' processors:
110 against 250 GFLOP/s on one Zen 5 core. oneDNN comes with PyTorch, but by itself takes only bfloat16 products.
The operator called here is the one that ``torch.compile`` calls; where a PyTorch lacks it, nothing is lost but speed.
The environment variable DEEPSPEC_PRODUCTS overrides: ``onednn`` for products of any size, ``torch`` for none.

M rows of the input, I its columns; O rows of the weight (outputs); [..] any leading shape.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# multiplications: smaller products gain little, and MKL rounds them half as much
_MIN_MULTIPLICATIONS = {"onednn": 0, "torch": sys.maxsize}.get(os.environ.get("DEEPSPEC_PRODUCTS", ""), 1 << 22)
_MIN_ROWS = 4  # below, a product is bound by reading the matrix
_LOG2_E = 1.4426950408889634


def exp_(x: Tensor) -> Tensor:
    """exp in place, by way of exp2: three times faster on the CPU."""
    return x.mul_(_LOG2_E).exp2_()


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


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether ``x @ weight.T`` goes to oneDNN."""
    if x.numel() * len(weight) < _MIN_MULTIPLICATIONS or x.numel() < _MIN_ROWS * x.shape[-1]:
        return False
    fitting = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return fitting and bool(torch.backends.mkldnn.enabled) and _has_onednn()


def linear(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """``x @ weight.T`` [M, O]; oneDNN's operator has no gradient, so where one is wanted PyTorch multiplies."""
    differentiable = torch.is_grad_enabled() and (x_MI.requires_grad or weight_OI.requires_grad)
    return _onednn(x_MI, weight_OI) if uses_onednn(x_MI, weight_OI) and not differentiable else x_MI @ weight_OI.T


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated and returned in fp32 (on the CPU a bf16 product is rounded to bf16 once)."""
    if a.dtype == torch.float32:
        return linear(a, b.T)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, in fp32."""
    if a.dtype == torch.float32 and not uses_onednn(a, b.T):
        total.addmm_(a, b)
    else:
        total.add_(matmul_fp32(a, b))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.has_bias = bias is not None
        return _onednn(x, weight_OI, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_MO = grad.flatten(0, -2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        d_x = linear(grad_MO, weight_OI.T).view_as(x) if wants_x else None
        d_weight = linear(grad_MO.T, x.flatten(0, -2).T) if wants_weight else None
        return d_x, d_weight, grad_MO.sum(dim=0) if ctx.has_bias and wants_bias else None


class Linear(nn.Linear):
    """``nn.Linear`` whose products are those of this file."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] -> [.., O]."""
        if not uses_onednn(x, self.weight):
            return super().forward(x)
        if not torch.is_grad_enabled():
            return _onednn(x, self.weight, self.bias)
        out: Tensor = _Linear.apply(x, self.weight, self.bias)
        return out
