"""The first weights of a draft."""

from __future__ import annotations

import torch
from torch import nn

from deepspec.nn.mlp import ExpertWeights
from deepspec.nn.selector import CandidateSelector
from deepspec.nn.short_conv import ShortConvolution


def initialise(model: nn.Module, std: float, seed: int) -> None:
    """Normal(0, std) for matrices, 0 for biases, 1 for norms; the same bits for the same seed.

    Parts that start otherwise have a method ``start``.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for module in model.modules():
            if isinstance(module, ShortConvolution | CandidateSelector):
                module.start(generator)
            elif isinstance(module, ExpertWeights):
                module.start(std, generator)
