"""A decoder layer as decoding runs it: one product for q, k and v, one for gate and up, and no module calls.

A round of a small model is bound by the number of operations and calls, not by arithmetic. The weights are those of a
:class:`deepspec.nn.layer.DraftLayer` or of a layer of transformers with the same parts, and each operation rounds as
that layer does, but for the norms in float32, which are computed in fewer operations.

T tokens, D hidden size, I inner size of the MLP, H query heads, G key/value heads, E head size; [..] any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RotaryTable = tuple[Tensor, Tensor]
MOST_JOINED = 1 << 22  # weights of one product; larger ones are bound by reading them, and are not copied


class JoinedLinear:
    """Linear maps of the same input, one after the other in the output: one product where they are small.

    The joined weight is a copy of what ``maps`` hold now.
    """

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        pairs: list[tuple[Tensor, Tensor | None]]
        pairs = [(one.weight.detach(), None if one.bias is None else one.bias.detach()) for one in maps]
        if len(pairs) > 1 and sum(weight.numel() for weight, _ in pairs) <= MOST_JOINED:
            biases = [bias for _, bias in pairs if bias is not None]
            pairs = [(torch.cat([weight for weight, _ in pairs]), torch.cat(biases) if biases else None)]
        self._pairs = pairs

    def __call__(self, x: Tensor) -> Tensor:
        """[.., inputs] -> [.., outputs of all maps]."""
        parts = [F.linear(x, weight, bias) for weight, bias in self._pairs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def norm_of(module: Any) -> Callable[[Tensor], Tensor]:
    """What an RMSNorm computes, in float32 in few operations; in other types, whose rounding is its own, the module."""
    if module.weight is None or module.weight.dtype != torch.float32:
        forward: Callable[[Tensor], Tensor] = module.forward
        return forward
    return _fp32_norm(module.weight.detach(), _eps(module))


def head_norm_of(modules: Sequence[Any], counts: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """Norms of heads [.., sum of counts, E], the first ``counts[0]`` by the first module and so on; None: no norms."""
    if any(module is None for module in modules):
        return None
    if any(module.weight.dtype != torch.float32 for module in modules):
        norms, sizes = [norm_of(module) for module in modules], list(counts)
        return lambda x: torch.cat([norm(part) for norm, part in zip(norms, x.split(sizes, -2), strict=True)], -2)
    rows = [module.weight.detach().expand(count, -1) for module, count in zip(modules, counts, strict=True)]
    return _fp32_norm(torch.cat(rows), _eps(modules[0]))


def _fp32_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    size = weight.shape[-1]
    if weight.is_cuda:  # one kernel; on the CPU it is eight operations
        return lambda x: torch.rms_norm(x, [size], None, eps).mul_(weight)
    scaled, least = weight * size**0.5, torch.tensor((size * eps) ** 0.5)
    # x / sqrt(mean(x^2) + eps) = sqrt(E) x / hypot(|x|, sqrt(E eps))
    return lambda x: torch.div(x, torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), least)).mul_(scaled)


def _eps(module: Any) -> float:
    return float(module.eps if hasattr(module, "eps") else module.variance_epsilon)


def rotary_table(table: RotaryTable) -> RotaryTable:
    """(cos, sin), [.., E] each, as :func:`rotate_pairs` takes them: the first half of sin negated, a heads axis."""
    cos, sin = table
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(-2), torch.cat((-first, second), dim=-1).unsqueeze(-2)


class RotaryRows:
    """Rows of a :func:`rotary_table` that is computed once, and again only for more positions.

    Args:
        compute: (cos, sin), [S, E] each, of positions [S].
    """

    def __init__(self, compute: Callable[[Tensor], RotaryTable]) -> None:
        self._compute = compute
        self._table: RotaryTable | None = None

    def at(self, positions: Tensor, num_positions: int) -> RotaryTable:
        """The table of ``positions`` [..], all below ``num_positions``: [.., 1, E] each."""
        cos, sin = self.reserve(num_positions, positions.device)
        return cos[positions], sin[positions]

    def reserve(self, num_positions: int, device: torch.device) -> RotaryTable:
        """The table, of at least ``num_positions``."""
        if self._table is None or len(self._table[0]) < num_positions:
            every = torch.arange(max(256, 2 * num_positions), device=device)
            self._table = rotary_table(self._compute(every))
        return self._table


def rotate_pairs(x: Tensor, table: RotaryTable) -> Tensor:
    """Heads [.., H, E] rotated by a :func:`rotary_table`, in the dtype of the table."""
    cos, sin = table
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = rotate_pairs(x[..., : cos.shape[-1]], table), x[..., cos.shape[-1] :]
        return torch.cat((turned, rest.expand(*turned.shape[:-1], -1)), dim=-1)
    wide = x.to(cos.dtype)
    return (wide * cos).add_(wide.roll(cos.shape[-1] // 2, -1) * sin).to(x.dtype)


def _parted(map_: nn.Linear, size: int) -> tuple[nn.Linear, nn.Linear]:
    """A linear map whose outputs are turns of ``size`` for one and ``size`` for another, as those two."""
    parts = []
    for number in range(2):
        half = nn.Linear(map_.in_features, map_.out_features // 2, bias=map_.bias is not None, device="meta")
        half.weight = nn.Parameter(_turn(map_.weight.detach(), size, number), requires_grad=False)
        if map_.bias is not None:
            half.bias = nn.Parameter(_turn(map_.bias.detach(), size, number), requires_grad=False)
        parts.append(half)
    return parts[0], parts[1]


def _turn(rows: Tensor, size: int, number: int) -> Tensor:
    return rows.unflatten(0, (-1, 2, size))[:, number].flatten(0, 1)


def _fused_mlp(mlp: Any) -> Callable[[Tensor], Tensor]:
    """What a gated MLP computes, gate and up in one product."""
    gate_up, down = JoinedLinear([mlp.gate_proj, mlp.up_proj]), JoinedLinear([mlp.down_proj])
    activation: Callable[[Tensor], Tensor] = (mlp.act if hasattr(mlp, "act") else mlp.act_fn).forward

    def forward(x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(activation(gate) * up)

    return forward


class FusedLayer:
    """The layer's weights and what is computed with them; a copy of the small ones, as they are now.

    Args:
        layer: ``self_attn`` with ``q_proj`` .. ``o_proj``, ``mlp`` with ``gate_proj``, ``up_proj`` and ``down_proj``
            (or with ``experts``, which then run as they are),
            ``input_layernorm`` and ``post_attention_layernorm``; of a ``DraftLayer`` also the sandwich of Gemma and
            the convolutions around attention and MLP.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = int(attention.head_dim)
        self.scale = float(attention.scale if hasattr(attention, "scale") else attention.scaling)
        keys_values = [one for one in (attention.k_proj, attention.v_proj) if one is not None]
        query, self._gate = attention.q_proj, None
        if getattr(attention, "gated", False):
            query, gate = _parted(query, self.head_dim)
            self._gate = JoinedLinear([gate])
        self._qkv, self._kv = JoinedLinear([query, *keys_values]), JoinedLinear(keys_values)
        self._queries = query.out_features // self.head_dim  # H
        self._keys = attention.k_proj.out_features // self.head_dim  # G
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._head_norm = head_norm_of(norms, (self._queries, self._keys))
        self._key_norm = head_norm_of(norms[1:], (self._keys,))
        value_norm = getattr(attention, "v_norm", None)
        self._value_norm = None if value_norm is None else norm_of(value_norm)
        self.input_norm, self._after_norm = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        self._out = JoinedLinear([attention.o_proj])
        self._plain_mlp: Callable[[Tensor], Tensor] = mlp.forward if hasattr(mlp, "experts") else _fused_mlp(mlp)
        self._attention_conv, self._mlp_conv = (getattr(layer, f"{name}_conv", None) for name in ("attention", "mlp"))
        self._sandwich: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor] | None = None
        if getattr(layer, "sandwich", False):
            before, after = norm_of(layer.pre_feedforward_layernorm), norm_of(layer.post_feedforward_layernorm)
            self._sandwich = (before, after, layer.layer_scalar)

    def enter(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What attention reads [.., D], and what its convolution gives to :meth:`finish`."""
        normed = self.input_norm(hidden)
        return (normed, None) if self._attention_conv is None else self._attention_conv.forward(normed)

    def queries_keys_values(self, x: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor, Tensor]:
        """[.., D] -> rotated queries [.., H, E], rotated keys and values [.., G, E]; a :func:`rotary_table`.

        Where a gate follows each query in ``q_proj`` it does here: see :meth:`parted`.
        """
        heads = self._qkv(x).unflatten(-1, (-1, self.head_dim))
        both = heads[..., : self._queries + self._keys, :]
        rotated = rotate_pairs(both if self._head_norm is None else self._head_norm(both), table)
        queries = rotated[..., : self._queries, :]
        if self._gate is not None:
            gates = self._gate(x).sigmoid_().unflatten(-1, (-1, self.head_dim))
            queries = torch.cat((queries, gates), dim=-1)
        return queries, rotated[..., self._queries :, :], self._values(heads)

    def parted(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """(queries, what :meth:`finish` multiplies the attended heads by) of :meth:`queries_keys_values`."""
        if self._gate is None:
            return queries, None
        return queries[..., : self.head_dim], queries[..., self.head_dim :]

    def keys_values(self, x: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
        """The keys and values alone."""
        heads = self._kv(x).unflatten(-1, (-1, self.head_dim))
        keys = heads[..., : self._keys, :]
        keys = rotate_pairs(keys if self._key_norm is None else self._key_norm(keys), table)
        return keys, self._values(heads)

    def _values(self, heads: Tensor) -> Tensor:
        values = heads[..., -self._keys :, :]  # where there is no v_proj: the keys before their norm
        return values if self._value_norm is None else self._value_norm(values)

    def finish(
        self, residual: Tensor, mixed: Tensor, gate: Tensor | None = None, delta: Tensor | None = None
    ) -> Tensor:
        """Everything after attention: ``residual`` [.., D] and attended heads [.., H, E] -> [.., D].

        ``gate`` [.., H, E] of the heads, and ``delta`` of the convolution, where the layer has them.
        """
        attended = self._out((mixed if gate is None else mixed * gate).flatten(-2))
        if self._attention_conv is not None and delta is not None:
            attended, _ = self._attention_conv.forward(attended, delta)
        if self._sandwich is None:
            hidden = residual + attended
            return hidden + self._mlp(self._after_norm(hidden))
        before, after, scalar = self._sandwich
        hidden = residual + self._after_norm(attended)
        return (hidden + after(self._mlp(before(hidden)))) * scalar

    def _mlp(self, x: Tensor) -> Tensor:
        if self._mlp_conv is None:
            return self._plain_mlp(x)
        convolved, delta = self._mlp_conv.forward(x)
        output: Tensor = self._mlp_conv.forward(self._plain_mlp(convolved), delta)[0]
        return output
