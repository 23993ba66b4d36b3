"""One draft layer for every algorithm and family, and its modules: norm, rotary table, projections.

The layer does not build the mask: an algorithm gets queries and keys and values from it, calls
:func:`deepspec.nn.attention.attend`, and passes the result to :meth:`DraftLayer.finish`.

S sequence, D hidden size, H query heads, G key/value heads, E head size; [..] any leading shape.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.families.base import Family, Rope, Shape
from deepspec.nn.cpu.matmul import Linear
from deepspec.nn.mlp import ExpertMLP, GatedMLP, computed_again
from deepspec.nn.short_conv import ShortConvolution

RotaryTable = tuple[Tensor, Tensor]  # (cos, sin) of a rotary embedding


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of ``x`` in its dtype, and the factor of each row in fp32."""
    wide = x.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    normed = wide * scale
    return (normed if weight is None else normed.mul_(weight.float())).to(x.dtype), scale


class _Normalise(torch.autograd.Function):
    """RMS norm in fp32 that keeps its input and one number a row for backward, not the fp32 copies autograd would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        normed, scale = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

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
    """Root-mean-square norm over the last axis, computed in fp32; ``scale=False``: without a weight."""

    def __init__(self, size: int, eps: float, scale: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Norm of ``x`` [.., size], in the dtype of ``x``."""
        if not torch.is_grad_enabled():
            return _normalised(x, self.weight, self.eps)[0]
        normed: Tensor = _Normalise.apply(x, self.weight, self.eps)
        return normed


def _inverse_frequencies(rope: Rope, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """(inv_freq, attention scaling) of a rotary embedding; [E / 2] fp32, or fewer where it turns a part of a head.

    "default" turns the first ``partial_factor`` of a head's values as a head of that size. "proportional" (Gemma4)
    turns that part of the pairs; the rest have frequency 0. Other kinds come from transformers.
    """
    if rope.kind == "default" and rope.partial_factor != 1.0:
        return _inverse_frequencies(replace(rope, partial_factor=1.0), int(rope.partial_factor * head_dim), 0)
    if rope.kind in ("default", "proportional"):
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        inv_freq = 1.0 / (rope.theta**exponent)
        inv_freq[int(rope.partial_factor * head_dim // 2) :] = 0.0
        return inv_freq, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=max_positions,
        rope_parameters={"rope_type": rope.kind, "rope_theta": rope.theta, **dict(rope.parameters)},
    )  # fmt: skip
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    return inv_freq.float(), float(scaling)


class Rotary(nn.Module):
    """cos and sin of the rotary embedding, always computed from an fp32 frequency table.

    The table is no buffer and no parameter, which ``module.to(bfloat16)`` would round.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        with torch.device("cpu"):  # values and no state: also where the draft is built on ``meta``
            self._inv_freq, self._scaling = _inverse_frequencies(shape.rope, shape.head_dim, shape.max_positions)

    def forward(self, positions: Tensor) -> RotaryTable:
        """(cos, sin), each [.., E] (or the part that is turned) fp32, of integer ``positions`` [..]."""
        if self._inv_freq.device != positions.device:
            self._inv_freq = self._inv_freq.to(positions.device)
        angles = positions[..., None].float() * self._inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self._scaling, angles.sin() * self._scaling


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Apply a rotary ``table`` (cos, sin: [.., S, E] fp32) to heads ``x`` [.., S, H, E], in fp32.

    A narrower table turns the first values of each head.
    """
    cos, sin = (part.unsqueeze(-2) for part in table)
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = rotate(x[..., : cos.shape[-1]], table), x[..., cos.shape[-1] :]
        return torch.cat((turned, rest.expand(*turned.shape[:-1], -1)), dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class DraftAttention(nn.Module):
    """Projections with separate query and key/value inputs; the family's table names the norms of the heads.

    Args:
        shape: sizes of the layer.
        family: its parts.
        input_size: width of the streams (D; 2D where a layer reads embedding and hidden state side by side).
        gated: each head's output is multiplied by a gate, whose projection follows the head's query in ``q_proj``.
    """

    def __init__(self, shape: Shape, family: Family, input_size: int, gated: bool = False) -> None:
        super().__init__()
        self.head_dim, self.gated, bias = shape.head_dim, gated, shape.attention_bias
        query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = Linear(input_size, 2 * query_size if gated else query_size, bias=bias)
        self.k_proj = Linear(input_size, kv_size, bias=bias)
        self.v_proj = None if shape.k_eq_v else Linear(input_size, kv_size, bias=bias)
        self.o_proj = Linear(query_size, shape.hidden_size, bias=bias)
        size, eps = shape.head_dim, shape.norm_eps
        self.q_norm = RMSNorm(size, eps) if family.head_norm else None
        self.k_norm = RMSNorm(size, eps) if family.head_norm else None
        self.v_norm = RMSNorm(size, eps, scale=False) if family.value_norm else None
        self.scale = family.attention_scale or shape.head_dim**-0.5

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor, table: RotaryTable) -> Tensor:
        """[.., input_size] -> rotated queries [.., H, E]."""
        return self.queries_gate(x, table)[0]

    def queries_gate(self, x: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor | None]:
        """:meth:`queries`, and what :meth:`DraftLayer.finish` multiplies the heads by; None where nothing gates."""
        heads, gate = self._heads(self.q_proj(x)), None
        if self.gated:
            heads, gate = heads.unflatten(-2, (-1, 2)).unbind(-2)
            gate = gate.sigmoid()
        return rotate(heads if self.q_norm is None else self.q_norm(heads), table), gate

    def keys_values(self, x: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
        """[.., input_size] -> rotated keys and values, [.., G, E] each."""
        keys = self._heads(self.k_proj(x))
        values = keys if self.v_proj is None else self._heads(self.v_proj(x))
        keys = rotate(keys if self.k_norm is None else self.k_norm(keys), table)
        return keys, values if self.v_norm is None else self.v_norm(values)

    def output(self, mixed: Tensor) -> Tensor:
        """Attended heads [.., H, E] -> [.., D]."""
        return self.o_proj(mixed.flatten(-2))


ADDED = ("attention_conv", "mlp_conv")  # parts of a layer that an algorithm sets; no family has them


class DraftLayer(nn.Module):
    """Attention and MLP with the family's residual arrangement; the arguments are those of :class:`DraftAttention`."""

    def __init__(self, shape: Shape, family: Family, input_size: int, gated: bool = False) -> None:
        super().__init__()
        size, eps = shape.hidden_size, shape.norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = DraftAttention(shape, family, input_size, gated)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(shape) if shape.experts is None else ExpertMLP(shape, shape.experts)
        self.attention_conv: ShortConvolution | None = None  # around attention and MLP, where an algorithm sets them
        self.mlp_conv: ShortConvolution | None = None
        self.sandwich = family.sandwich
        if self.sandwich:  # norms before and after the MLP, and after attention
            self.pre_feedforward_layernorm = RMSNorm(size, eps)
            self.post_feedforward_layernorm = RMSNorm(size, eps)
            self.register_buffer("layer_scalar", torch.ones(1))

    def enter(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What attention reads [.., D], and what its convolution gives to :meth:`finish`."""
        if self.attention_conv is None:
            return self.input_layernorm(hidden), None
        entered: tuple[Tensor, Tensor] = computed_again(
            self._convolved, self.input_layernorm, self.attention_conv, hidden
        )
        return entered

    @staticmethod
    def _convolved(norm: RMSNorm, convolution: ShortConvolution, hidden: Tensor) -> tuple[Tensor, Tensor]:
        convolved: tuple[Tensor, Tensor] = convolution(norm(hidden))
        return convolved

    def finish(
        self, residual: Tensor, mixed: Tensor, gate: Tensor | None = None, delta: Tensor | None = None
    ) -> Tensor:
        """Everything after attention: ``residual`` [.., D] and attended heads [.., H, E] -> [.., D].

        ``gate`` [.., H, E] of the heads, and ``delta`` of the convolution, where the layer has them.
        """
        mixed = mixed if gate is None else mixed * gate
        convolution = None if delta is None else self.attention_conv
        if convolution is None:
            attended = self.self_attn.output(mixed)
        else:
            attended = computed_again(lambda heads: convolution(self.self_attn.output(heads), delta)[0], mixed)
        if not self.sandwich:
            hidden = residual + attended
            return hidden + self._mlp(self.post_attention_layernorm, hidden)
        hidden = residual + self.post_attention_layernorm(attended)
        hidden = hidden + self.post_feedforward_layernorm(self._mlp(self.pre_feedforward_layernorm, hidden))
        return hidden * self.layer_scalar

    def _mlp(self, norm: RMSNorm, hidden: Tensor) -> Tensor:
        convolution = self.mlp_conv
        if convolution is None:
            return self.mlp(norm(hidden))
        convolved, delta = computed_again(self._convolved, norm, convolution, hidden)
        return self.mlp(convolved, lambda output: convolution(output, delta)[0])
