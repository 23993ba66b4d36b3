"""Capture of the hidden states that a draft reads: the OUTPUT of decoder layers, by forward hooks.

The id after the last layer's is the state after the final norm: a feature as every other where a draft continues it.

``output_hidden_states`` of transformers returns the normed state in its last entry, so for the last layer it disagrees
with the hooks; and it keeps every layer. One function serves the cache, online training and decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EMBEDDING = -1  # the layer id that means the output of the embedding


@dataclass(frozen=True)
class TargetOutput:
    """What one pass over the decoder gives."""

    features: Tensor  # [B, S, L*D], the layers' outputs in the order asked for
    last_hidden: Tensor  # [B, S, D], after the final norm


class FeatureCapture:
    """Hooks on a decoder's layers, for one pass.

    Args:
        decoder: the module that owns ``layers`` and ``embed_tokens``.
        layers: 0-based layer ids; -1 is the embedding, the number of layers the final norm.
    """

    def __init__(self, decoder: nn.Module, layers: Sequence[int]) -> None:
        self.decoder, self.layers = decoder, tuple(layers)
        self._seen: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> FeatureCapture:
        for layer in set(self.layers):
            self._handles.append(self._module(layer).register_forward_hook(self._keep(layer)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _module(self, layer: int) -> nn.Module:
        decoder: Any = self.decoder
        if layer == EMBEDDING:
            found: nn.Module = decoder.embed_tokens
        else:
            found = decoder.norm if layer == decoder.config.num_hidden_layers else decoder.layers[layer]
        return found

    def _keep(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def features(self) -> Tensor:
        """[B, S, L*D] of the pass that just ended."""
        return torch.cat([self._seen[layer] for layer in self.layers], dim=-1)
