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

from deepspec.errors import TargetError

EMBEDDING = -1  # the layer id that means the output of the embedding


@dataclass(frozen=True)
class TargetOutput:
    """What one pass over the decoder gives."""

    features: Tensor  # [B, S, L*D], the layers' outputs in the order asked for
    last_hidden: Tensor  # [B, S, D], after the final norm


class FeatureCapture:
    """Hooks on a decoder's layers, for one pass.

    Args:
        modules: the decoder's layers.
        layers: 0-based layer ids; -1 is the embedding (what the first layer reads), the number of layers the final
            norm.
    """

    def __init__(self, modules: Sequence[nn.Module] | nn.ModuleList, layers: Sequence[int]) -> None:
        self._modules, self.layers = modules, tuple(layers)
        self._seen: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> FeatureCapture:
        for layer in set(self.layers) - {EMBEDDING, len(self._modules)}:
            self._handles.append(self._modules[layer].register_forward_hook(self._keep(layer)))
        if EMBEDDING in self.layers:
            self._handles.append(self._modules[0].register_forward_pre_hook(self._keep_input, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def _keep_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen[EMBEDDING] = args[0] if args else kwargs["hidden_states"]

    def features(self, last_hidden: Tensor) -> Tensor:
        """[B, S, L*D] of the pass that just ended with ``last_hidden`` [B, S, D].

        Raises:
            TargetError: a layer's output is no hidden state of that shape.
        """
        if not self.layers:
            return last_hidden[..., :0]
        self._seen[len(self._modules)] = last_hidden
        for layer in self.layers:
            found = tuple(self._seen[layer].shape) if layer in self._seen else None
            if found != tuple(last_hidden.shape):
                raise TargetError(
                    "what the layer gives is no hidden state that a draft could read", key=f"layer {layer}",
                    found=found, wanted=f"{tuple(last_hidden.shape)} [B, S, D]", remedy="read other target layers",
                )  # fmt: skip
        return torch.cat([self._seen[layer] for layer in self.layers], dim=-1)
