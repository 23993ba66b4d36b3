"""The small parts of a draft layer: norm, gated MLP, rotary table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from deepspec.families.base import Rope, Shape
from deepspec.nn.products import Linear


class _Normalise(torch.autograd.Function):
    """RMS norm in fp32 that keeps its input and one number a row for backward, not the fp32 copies autograd would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed = wide * scale
        return (normed if weight is None else normed.mul_(weight.float())).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, wide = x.float() * scale, grad.float()
        d_weight = None
        if weight is not None:
            d_weight = (wide * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
            wide = wide * weight.float()
        inner = (wide * normed).mean(dim=-1, keepdim=True)
        return (wide - normed.mul_(inner)).mul_(scale).to(x.dtype), d_weight, None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32 whatever the input's dtype.

    With ``scale=False`` it has no weight (Gemma4's norm of the value heads).
    """

    def __init__(self, size: int, eps: float, scale: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Norm of ``x`` [.., size], in the dtype of ``x``."""
        normed: Tensor = _Normalise.apply(x, self.weight, self.eps)
        return normed


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)
        self.act = ACT2FN[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            return self._down(gate, up)
        # act(gate) and its product are the layer's widest activations and cost little to compute again in backward
        return checkpoint(self._down, gate, up, use_reentrant=False, preserve_rng_state=False)

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(self.act(gate) * up)


def inverse_frequencies(rope: Rope, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """(inv_freq [head_dim / 2] fp32, attention scaling) of a rotary embedding.

    "proportional" (Gemma4) rotates only the first ``partial_factor`` of the pairs; the rest have frequency 0. Other
    kinds come from transformers. They are made on the CPU also where a draft is built on ``meta``: values, no state.
    """
    with torch.device("cpu"):
        return _inverse_frequencies(rope, head_dim, max_positions)


def _inverse_frequencies(rope: Rope, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    if rope.kind in ("default", "proportional"):
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        inv_freq = 1.0 / (rope.theta**exponent)
        rotated = int(rope.partial_factor * head_dim // 2)
        inv_freq[rotated:] = 0.0
        return inv_freq, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta, **dict(rope.parameters)}
    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_positions,
        rope_parameters=parameters,
    )
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    return inv_freq.float(), float(scaling)


class Rotary(nn.Module):
    """cos and sin of the rotary embedding, always computed from an fp32 frequency table.

    The table is no buffer and no parameter: ``module.to(bfloat16)`` would round it (0.4 % in frequency, a total
    variation of .17 at 4k context between training and decoding in the published code).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._inv_freq, self._scaling = inverse_frequencies(shape.rope, shape.head_dim, shape.max_positions)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [.., head_dim] fp32, of integer ``positions`` [..]."""
        if self._inv_freq.device != positions.device:
            self._inv_freq = self._inv_freq.to(positions.device)
        angles = positions[..., None].float() * self._inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self._scaling, angles.sin() * self._scaling


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply a rotary ``table`` (cos, sin: [.., S, head_dim] fp32) to heads ``x`` [.., S, H, head_dim], in fp32."""
    cos, sin = (part.unsqueeze(-2) for part in table)
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
