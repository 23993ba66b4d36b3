"""One draft layer for every algorithm and family: projections, and what happens around attention and the MLP.

The layer does not decide who sees whom: an algorithm asks it for queries and for keys and values of its streams, calls
:func:`deepspec.nn.attention.attend`, and hands the result back to :meth:`DraftLayer.finish`.

D hidden size, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec.families.base import Family, Shape
from deepspec.nn.parts import GatedMLP, RMSNorm, rotate
from deepspec.nn.products import Linear

Table = tuple[Tensor, Tensor]


class DraftAttention(nn.Module):
    """Projections with separate query and key/value streams; the family's table says which norms stand on the heads.

    Args:
        shape: sizes of the layer.
        family: its parts.
        input_size: width of the streams (D; 2D where a layer reads embedding and hidden state side by side).
    """

    def __init__(self, shape: Shape, family: Family, input_size: int) -> None:
        super().__init__()
        self.head_dim, bias = shape.head_dim, shape.attention_bias
        query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = Linear(input_size, query_size, bias=bias)
        self.k_proj = Linear(input_size, kv_size, bias=bias)
        self.v_proj = None if shape.k_eq_v else Linear(input_size, kv_size, bias=bias)
        self.o_proj = Linear(query_size, shape.hidden_size, bias=bias)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if family.head_norm else None
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if family.head_norm else None
        self.v_norm = RMSNorm(shape.head_dim, shape.norm_eps, scale=False) if family.value_norm else None
        self.scale = family.attention_scale or shape.head_dim**-0.5

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor, table: Table) -> Tensor:
        """[.., input_size] -> rotated queries [.., H, E]."""
        heads = self._heads(self.q_proj(x))
        return rotate(heads if self.q_norm is None else self.q_norm(heads), table)

    def keys_values(self, x: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """[.., input_size] -> rotated keys and values, [.., G, E] each."""
        keys = self._heads(self.k_proj(x))
        values = keys if self.v_proj is None else self._heads(self.v_proj(x))
        keys = rotate(keys if self.k_norm is None else self.k_norm(keys), table)
        return keys, values if self.v_norm is None else self.v_norm(values)

    def output(self, mixed: Tensor) -> Tensor:
        """Attended heads [.., H, E] -> [.., D]."""
        return self.o_proj(mixed.flatten(-2))


class DraftLayer(nn.Module):
    """Attention and MLP with the family's residual arrangement.

    Args:
        shape: sizes of the layer.
        family: its parts.
        input_size: width of the attention's streams.
    """

    def __init__(self, shape: Shape, family: Family, input_size: int) -> None:
        super().__init__()
        size, eps = shape.hidden_size, shape.norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = DraftAttention(shape, family, input_size)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(shape)
        self.sandwich = family.sandwich
        if self.sandwich:
            self.pre_feedforward_layernorm = RMSNorm(size, eps)
            self.post_feedforward_layernorm = RMSNorm(size, eps)
            self.register_buffer("layer_scalar", torch.ones(1))

    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """Everything after attention: ``residual`` [.., D] and attended heads [.., H, E] -> [.., D]."""
        attended = self.self_attn.output(mixed)
        if not self.sandwich:
            hidden = residual + attended
            return hidden + self.mlp(self.post_attention_layernorm(hidden))
        hidden = residual + self.post_attention_layernorm(attended)
        hidden = hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))
        return hidden * self.layer_scalar
