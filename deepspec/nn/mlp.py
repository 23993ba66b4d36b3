"""What a layer computes for each token by itself: a gated MLP, or a mixture of such experts.

T tokens, D hidden size, I width of an expert, E experts, k experts of a token; [..] any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepspec.families.base import Experts, Shape
from deepspec.nn.cpu.matmul import Linear

Then = Callable[[Tensor], Tensor]
ALIGNED = 16  # bytes: the strides that a grouped product takes


def computed_again(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``; backward computes it once more instead of keeping what it made."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def activation(name: str) -> nn.Module:
    """transformers' activation of that name."""
    from transformers.activations import ACT2FN  # seconds: a recipe is read without it

    found: nn.Module = ACT2FN[name]
    return found


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)
        self.act = activation(shape.activation)

    def forward(self, x: Tensor, then: Then | None = None) -> Tensor:
        """[.., D] -> [.., D], ``then`` of it where one is given."""
        # act(gate) and its product are the layer's widest activations and cost little to compute again in backward
        output: Tensor = computed_again(self._down, self.gate_proj(x), self.up_proj(x), then)
        return output

    def _down(self, gate: Tensor, up: Tensor, then: Then | None) -> Tensor:
        output: Tensor = self.down_proj(self.act(gate) * up)
        return output if then is None else then(output)


class ExpertWeights(nn.Module):
    """All experts' weights, one tensor a kind: each takes part in every step, whichever experts its tokens chose."""

    def __init__(self, hidden_size: int, sizes: Experts, act: str) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(sizes.count, 2 * sizes.width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(sizes.count, hidden_size, sizes.width))
        self.act = activation(act)

    def start(self, std: float, generator: torch.Generator) -> None:
        """Normal(0, std), as matrices start."""
        for weight in (self.gate_up_proj, self.down_proj):
            weight.normal_(0.0, std, generator=generator)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """[T, D] of tokens [T, D], the experts of each ``chosen`` [T, k] and their ``shares`` [T, k] of the output."""
        count, most = len(self.gate_up_proj), chosen.shape[1]
        by_expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(count, device=x.device), right=True, out_int32=True)
        rows = x[order // most]
        weights = self.gate_up_proj, self.down_proj
        product = grouped if x.is_cuda and all(map(_aligned, weights)) else looped
        # one call of the activation, a module: at ZeRO stage 3 every rank must call the same modules
        gate, up = product(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        outputs = product(self.act(gate) * up, self.down_proj, ends)
        outputs = outputs * shares.flatten()[order, None].to(outputs.dtype)
        return torch.empty_like(outputs).index_copy(0, order, outputs).unflatten(0, (-1, most)).sum(dim=1)


def looped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [n, in] sorted by expert times the weight [E, out, in] of theirs: [n, out], one expert after the other.

    ``ends`` [E] int32: the last row + 1 of each expert, read by the host. :func:`grouped` is the same without that.
    """
    ends[-1].item()  # a read that the dispatcher sees, so no graph captures it: a CPU tensor's tolist passes it by
    parts, start = [], 0
    for number, (end, one) in enumerate(zip(ends.tolist(), weight.unbind(), strict=True)):
        if end > start or not number:  # of the first also where it has no row: the weight stays in the graph
            parts.append(F.linear(rows[start:end], one))
        start = end
    return torch.cat(parts)


def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """:func:`looped` in one product, for which the host reads nothing."""
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _aligned(weight: Tensor) -> bool:
    """Whether a grouped product takes it on a GPU."""
    return weight.dtype == torch.bfloat16 and weight.shape[-1] * weight.itemsize % ALIGNED == 0


class ExpertMLP(nn.Module):
    """Of E gated MLPs the k that a router gives a token, weighed by it, and one that every token passes.

    The router's probabilities are a softmax over all experts; those of the k chosen sum to 1 where ``normalised``. The
    shared one is multiplied by a sigmoid of the token. Gradients reach the router through the weights of the chosen.
    """

    def __init__(self, shape: Shape, sizes: Experts) -> None:
        super().__init__()
        self.sizes = sizes
        self.gate = Linear(shape.hidden_size, sizes.count, bias=False)
        self.experts = ExpertWeights(shape.hidden_size, sizes, shape.activation)
        if sizes.shared_width:
            self.shared_expert = GatedMLP(replace(shape, intermediate_size=sizes.shared_width))
            self.shared_expert_gate = Linear(shape.hidden_size, 1, bias=False)

    def forward(self, x: Tensor, then: Then | None = None) -> Tensor:
        """[.., D] -> [.., D], ``then`` of it where one is given."""
        tokens = x.flatten(0, -2)
        shares, chosen = self.gate(tokens).softmax(dim=-1, dtype=torch.float32).topk(self.sizes.per_token)
        if self.sizes.normalised:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        mixed: Tensor = self.experts(tokens, chosen, shares)
        if self.sizes.shared_width:
            mixed = mixed + self.shared_expert_gate(tokens).sigmoid() * self.shared_expert(tokens)
        output = mixed.view_as(x)
        return output if then is None else then(output)
