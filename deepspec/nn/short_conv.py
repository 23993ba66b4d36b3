"""A short convolution over the slots of a block, around a sublayer (attention or MLP) of a draft layer.

    y_t = sum_o (base[o] + delta_t[o, channel // group]) * x_{t - o},   o = 0 .. O - 1; x before the block is 0

Both sides' corrections delta come from the sublayer's normed input before it is convolved: one side convolves the
input, the other what the sublayer gives. At the start base[:, 0] = 1 and all else is 0: the identity.

K slots of a block, O taps, G groups of channels, D hidden size; [..] any leading shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspec.nn.cpu.matmul import Linear


class ShortConvolution(nn.Module):
    """Called twice around a sublayer: with its normed input, then with its output and what the first call gave.

    Both are passes of this module, so that ZeRO-3's hooks see every use of its parameters.
    """

    def __init__(self, hidden_size: int, kernel_size: int, group_size: int) -> None:
        super().__init__()
        groups = hidden_size // group_size
        self.sides = (2, kernel_size, groups)
        self.base_kernel = nn.Parameter(torch.zeros(2, kernel_size, hidden_size))  # [input, output]
        self.kernel_projection = Linear(hidden_size, 2 * kernel_size * groups, bias=False)

    def start(self, _generator: torch.Generator) -> None:
        """The identity."""
        self.base_kernel.zero_()[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def forward(self, x_KD: Tensor, delta_KOG: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolved ``x`` [.., K, D], and the output side's delta.

        Args:
            x_KD: the sublayer's normed input, or its output.
            delta_KOG: of the output side, [.., K, O, G]; None: ``x`` is the input.
        """
        if delta_KOG is not None:
            return _Convolve.apply(x_KD, self.base_kernel[1], delta_KOG), delta_KOG
        inner, outer = self.kernel_projection(x_KD).unflatten(-1, self.sides).unbind(-3)
        return _Convolve.apply(x_KD, self.base_kernel[0], inner), outer


class _Convolve(torch.autograd.Function):
    """Keeps its inputs alone: the kernels of all channels are made again in backward."""

    @staticmethod
    def forward(ctx: Any, x_KD: Tensor, base_OD: Tensor, delta_KOG: Tensor) -> Tensor:
        ctx.save_for_backward(x_KD, base_OD, delta_KOG)
        x, base, delta = _grouped(x_KD, base_OD, delta_KOG)
        K, y = x.shape[-3], torch.zeros_like(x)
        for o in range(min(len(base), K)):
            y[..., o:, :, :] += x[..., : K - o, :, :] * (base[o] + delta[..., o:, o, :, :])
        return y.flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_KD, base_OD, delta_KOG = ctx.saved_tensors
        x, base, delta = _grouped(x_KD, base_OD, delta_KOG)
        K, grad = x.shape[-3], grad_KD.unflatten(-1, x.shape[-2:])
        d_x, d_base, d_delta = torch.zeros_like(x), torch.zeros_like(base, dtype=torch.float32), torch.zeros_like(delta)
        for o in range(min(len(base), K)):
            later, earlier = grad[..., o:, :, :], x[..., : K - o, :, :]
            d_x[..., : K - o, :, :] += later * (base[o] + delta[..., o:, o, :, :])
            product = later * earlier
            d_delta[..., o:, o, :, 0] = product.sum(-1)
            d_base[o] = product.flatten(0, -3).sum(0, dtype=torch.float32)
        return d_x.flatten(-2), d_base.flatten(-2).to(base.dtype), d_delta.squeeze(-1)


def _grouped(x_KD: Tensor, base_OD: Tensor, delta_KOG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The channels of ``x`` and ``base`` by group, [.., G, D / G], and ``delta`` with an axis for those of a group."""
    groups = (delta_KOG.shape[-1], -1)
    return x_KD.unflatten(-1, groups), base_OD.unflatten(-1, groups), delta_KOG[..., None]
