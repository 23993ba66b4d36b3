"""The projection of the target's features, which may be of a narrower type than the draft's weights.

A long conversation's features are the largest tensor of a step: cast whole (bf16 to fp32) they would be there three
times. So they are cast in slices, in forward and again in backward.

[..] any leading shape, S rows, I width of the features, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspec.nn.cpu.matmul import Linear, add_matmul, linear

_ROWS = 4096  # of a slice


class _Sliced(torch.autograd.Function):
    """``features.to(weight.dtype) @ weight.T`` that keeps the features as they are."""

    @staticmethod
    def forward(ctx: Any, features_SI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(features_SI, weight_OI)
        out = weight_OI.new_empty(len(features_SI), len(weight_OI))
        for part, into in zip(features_SI.split(_ROWS), out.split(_ROWS), strict=True):
            into.copy_(linear(part.to(weight_OI.dtype), weight_OI))
        return out

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[None, Tensor | None]:
        features_SI, weight_OI = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None
        total = torch.zeros(weight_OI.shape, dtype=torch.float32, device=grad_SO.device)
        for part, grad in zip(features_SI.split(_ROWS), grad_SO.split(_ROWS), strict=True):
            add_matmul(total, grad.T, part.to(weight_OI.dtype))
        return None, total.to(weight_OI.dtype)


class FeatureLinear(Linear):
    """A linear map without bias of features of any floating type."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] of any type -> [.., O] of the weight's."""
        if x.requires_grad or x.dtype == self.weight.dtype or x.numel() == 0:
            return super().forward(x.to(self.weight.dtype))
        out: Tensor = _Sliced.apply(x.flatten(0, -2), self.weight)
        return out.view(*x.shape[:-1], -1)
