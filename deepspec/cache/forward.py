"""The target's side of a build: conversations in, packed rows of hidden states out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from deepspec.cache.parts import Block, next_supervised
from deepspec.data.chat import Rendered
from deepspec.targets import Target
from deepspec.targets.served import ServedTarget

RenderedConversation = tuple[int, str, Rendered]  # sample id, the conversation's own id, tokens


def forward_batch(
    target: Target | ServedTarget, layers: Sequence[int], keeps_last: bool, rows: Sequence[RenderedConversation]
) -> tuple[int, Callable[[], Block]]:
    """One padded batch through the target.

    Returns:
        The bytes of its hidden states, and what waits for their copy to the host and gives the block.
    """
    lengths = [len(rendered.input_ids) for _, _, rendered in rows]
    ids, loss_mask = (
        np.concatenate([np.asarray(getattr(rendered, name), kind) for _, _, rendered in rows])
        for name, kind in (("input_ids", np.int32), ("loss_mask", np.uint8))
    )
    valid = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]  # [B, S]
    padded = torch.zeros(valid.shape, dtype=torch.int64)
    padded[valid] = torch.from_numpy(ids).long()
    device = target.device
    output = target.forward(padded.to(device), layers, attention_mask=valid.long().to(device))
    filled = valid.flatten().nonzero()[:, 0]  # found on the host: on the device it would wait for the forward
    features = _to_host(output.features.flatten(0, 1)[filled.to(device)])
    last = None
    if keeps_last:
        chosen = filled[torch.from_numpy(next_supervised(loss_mask, lengths))]
        last = _to_host(output.last_hidden.flatten(0, 1)[chosen.to(device)])
    event = torch.cuda.Event() if device.type == "cuda" else None
    if event is not None:
        event.record()

    def block() -> Block:
        if event is not None:
            event.synchronize()
        hidden = None if last is None else _as_stored(last)
        samples, names = [sample for sample, _, _ in rows], [name for _, name, _ in rows]
        return Block(samples, names, lengths, ids, loss_mask, _as_stored(features), hidden)

    return features.nbytes + (0 if last is None else last.nbytes), block


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start the copy to pinned memory; on a CPU there is nothing to copy."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _as_stored(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
