"""A decoder layer as decoding runs it: one product for q, k and v, one for gate and up, and no module calls.

A round of a small model is bound by the number of operations and calls, not by arithmetic. The weights are those of a
:class:`deepspec.nn.layer.DraftLayer` or of a layer of transformers with the same parts, and each operation rounds as
that layer does; in float32 the norms go through PyTorch's own operator.

T tokens, D hidden size, I inner size of the MLP, H query heads, G key/value heads, E head size; [..] any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.nn.cpu.matmul import product

Table = tuple[Tensor, Tensor]
MOST_JOINED = 1 << 22  # weights of one product; larger ones are bound by reading them, and are not copied


class JoinedLinear:
    """Linear maps of the same input, one after the other in the output: one product where they are small.

    The joined weight is a copy of what ``maps`` hold now.
    """

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        pairs = [(one.weight.detach(), None if one.bias is None else one.bias.detach()) for one in maps]
        if len(pairs) > 1 and sum(weight.numel() for weight, _ in pairs) <= MOST_JOINED:
            biases = [bias for _, bias in pairs if bias is not None]
            pairs = [(torch.cat([weight for weight, _ in pairs]), torch.cat(biases) if biases else None)]
        self._pairs = pairs

    def __call__(self, x: Tensor) -> Tensor:
        """[.., inputs] -> [.., outputs of all maps]."""
        parts = [product(x, weight, bias) for weight, bias in self._pairs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def norm_of(module: Any) -> Callable[[Tensor], Tensor]:
    """What an RMSNorm computes, in float32 by one operator."""
    weight = module.weight
    if weight is None or weight.dtype != torch.float32:  # where the weight is rounded is the module's own matter
        forward: Callable[[Tensor], Tensor] = module.forward
        return forward
    weight, size = weight.detach(), list(weight.shape)
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return lambda x: torch.rms_norm(x, size, weight, eps)


def rotary_table(table: Table) -> Table:
    """(cos, sin), [.., E] each, as :func:`rotate_pairs` takes them: the first half of sin negated, a heads axis."""
    cos, sin = table
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(-2), torch.cat((-first, second), dim=-1).unsqueeze(-2)


def rotate_pairs(x: Tensor, table: Table) -> Tensor:
    """Heads [.., H, E] rotated by a :func:`rotary_table`, in the dtype of the table."""
    cos, sin = table
    wide = x.to(cos.dtype)
    return (wide * cos).add_(wide.roll(cos.shape[-1] // 2, -1) * sin).to(x.dtype)


class FusedLayer:
    """The layer's weights and what is computed with them; a copy of the small ones, as they are now.

    Args:
        layer: ``self_attn`` with ``q_proj`` .. ``o_proj``, ``mlp`` with ``gate_proj``, ``up_proj`` and ``down_proj``,
            ``input_layernorm`` and ``post_attention_layernorm``; of a ``DraftLayer`` also the sandwich of Gemma.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = int(attention.head_dim)
        self.scale = float(attention.scale if hasattr(attention, "scale") else attention.scaling)
        keys_values = [one for one in (attention.k_proj, attention.v_proj) if one is not None]
        self._qkv, self._kv = JoinedLinear([attention.q_proj, *keys_values]), JoinedLinear(keys_values)
        self._queries = attention.q_proj.out_features // self.head_dim  # H
        self._keys = attention.k_proj.out_features // self.head_dim  # G
        self._head_norms = [
            None if module is None else norm_of(module)
            for module in (getattr(attention, name, None) for name in ("q_norm", "k_norm", "v_norm"))
        ]
        self.input_norm, self._after_norm = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        self._out, self._down = JoinedLinear([attention.o_proj]), JoinedLinear([mlp.down_proj])
        self._gate_up = JoinedLinear([mlp.gate_proj, mlp.up_proj])
        activation = mlp.act if hasattr(mlp, "act") else mlp.act_fn
        self._act: Callable[[Tensor], Tensor] = activation.forward
        self._sandwich: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor] | None = None
        if getattr(layer, "sandwich", False):
            norms = norm_of(layer.pre_feedforward_layernorm), norm_of(layer.post_feedforward_layernorm)
            self._sandwich = (*norms, layer.layer_scalar)

    def queries_keys_values(self, x: Tensor, table: Table) -> tuple[Tensor, Tensor, Tensor]:
        """[.., D] -> rotated queries [.., H, E], rotated keys and values [.., G, E]; a :func:`rotary_table`."""
        heads = self._qkv(x).unflatten(-1, (-1, self.head_dim))
        queries, rest = heads.tensor_split((self._queries,), dim=-2)
        if self._head_norms[0] is not None:
            queries = self._head_norms[0](queries)
        return rotate_pairs(queries, table), *self._key_value_heads(rest, table)

    def keys_values(self, x: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """The keys and values alone."""
        return self._key_value_heads(self._kv(x).unflatten(-1, (-1, self.head_dim)), table)

    def _key_value_heads(self, heads: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        keys = heads[..., : self._keys, :]
        values = heads[..., -self._keys :, :]  # the keys before their norm where there is no v_proj
        _, key_norm, value_norm = self._head_norms
        keys = rotate_pairs(keys if key_norm is None else key_norm(keys), table)
        return keys, values if value_norm is None else value_norm(values)

    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """Everything after attention: ``residual`` [.., D] and attended heads [.., H, E] -> [.., D]."""
        attended = self._out(mixed.flatten(-2))
        if self._sandwich is None:
            hidden = residual + attended
            return hidden + self._mlp(self._after_norm(hidden))
        before, after, scalar = self._sandwich
        hidden = residual + self._after_norm(attended)
        return (hidden + after(self._mlp(before(hidden)))) * scalar

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(self._act(gate) * up)
