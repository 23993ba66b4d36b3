"""A target's decoder without its modules' calls, where its layers are those of its family's drafts (Qwen3, Llama).

The reference is the model of transformers, which every other target runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.nn.fused import FusedLayer, RotaryRows, RotaryTable, norm_of
from deepspec.targets.capture import EMBEDDING, TargetOutput
from deepspec.targets.load import Target

# (queries [T, H, E], keys and values [T, G, E], number of the layer, scale) -> [T, H, E]
Attend = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
_OWN = {nn.Linear, nn.Embedding, nn.ModuleList}  # beside the classes of the model's own file


class FusedDecoder:
    """The decoder of ``target`` over packed tokens.

    It copies the small weights as they are now, and the rotary tables of as many positions as it has seen.
    """

    def __init__(self, target: Target) -> None:
        decoder: Any = target.decoder
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._layers = [FusedLayer(layer) for layer in decoder.layers[: target.spec.num_layers]]
        self._norm = norm_of(decoder.norm)
        self._compute_rotary: Callable[[Tensor, Tensor], RotaryTable] = decoder.rotary_emb
        self._rotary = RotaryRows(self._table)

    def _table(self, positions: Tensor) -> RotaryTable:
        cos, sin = self._compute_rotary(self._embedding, positions[None])
        return cos[0], sin[0]

    def hold(self, max_context_len: int) -> RotaryTable:
        """The rotary table, of at least so many positions."""
        return self._rotary.reserve(max_context_len, self._embedding.device)

    @staticmethod
    def of(target: Target) -> FusedDecoder | None:
        """None where the target has other layers, quantized or adapted ones, or hooks."""
        decoder: Any = target.decoder
        if any(type(layer).__name__ not in target.spec.family.plain_layers for layer in target.layers):
            return None
        return FusedDecoder(target) if all(_is_plain(module, decoder) for module in decoder.modules()) else None

    def forward(
        self, input_ids: Tensor, positions: Tensor, max_context_len: int, layers: Sequence[int], attend: Attend
    ) -> TargetOutput:
        """Features [T, L*D] of ``layers`` and last hidden states [T, D] of tokens [T] at ``positions`` [T].

        No position is ``max_context_len`` or more.
        """
        hidden = F.embedding(input_ids, self._embedding)
        table = self._rotary.at(positions, max_context_len)
        outputs = {EMBEDDING: hidden}
        for number, layer in enumerate(self._layers):
            queries, keys, values = layer.queries_keys_values(layer.input_norm(hidden), table)
            hidden = layer.finish(hidden, attend(queries, keys, values, number, layer.scale))
            outputs[number] = hidden
        outputs[len(self._layers)] = last = self._norm(hidden)
        features = torch.cat([outputs[layer] for layer in layers], dim=-1) if layers else hidden[..., :0]
        return TargetOutput(features, last)


def _is_plain(module: nn.Module, decoder: nn.Module) -> bool:
    """Whether a module's call is its class's forward, and its class one of the model's own or of PyTorch."""
    kind = type(module)
    known = kind in _OWN or kind.__module__ in (
        type(decoder).__module__,
        "transformers.activations",
        "torch.nn.modules.activation",
    )
    return known and "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
