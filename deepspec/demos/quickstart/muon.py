"""Muon: momentum whose update matrices are made orthogonal, many matrices of one shape at a time.

A parameter of more than two dimensions is a stack of matrices (the experts of a layer).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from deepspec.distributed import multiplies_bfloat16

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # quintic coefficients: all singular values end near 1


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix by about 1: [N, rows, columns] -> the same shape.

    In bfloat16 where the CPU multiplies it: the iteration forgives the rounding.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    x = x.bfloat16() if multiplies_bfloat16() else x
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal updates, for the weight matrices of a network."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; one batched iteration per shape costs a fraction of one per matrix."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    shapes[parameter.shape].append((parameter, parameter.grad.lerp(buffer, group["momentum"])))
            for (*_, rows, columns), pairs in shapes.items():
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                parameters, updates = zip(*pairs, strict=True)
                stacked = torch.stack(updates)
                orthogonal = orthogonalize(stacked.flatten(0, -3)).view_as(stacked)
                for parameter, update in zip(parameters, orthogonal, strict=True):
                    parameter.sub_(update, alpha=scale)
