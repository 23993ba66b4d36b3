"""A target's embedding and head without its layers: all that training from a cache reads of it.

The whole model stays on disk; its digest is that of its files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deepspec.targets.digests import weights_digest
from deepspec.targets.load import Target, TargetSpec, load_spec, load_target, say_untied
from deepspec.targets.stored import open_stored


class TargetEmbeddings:
    """Embedding and head of a target on disk; the same attributes as :class:`Target` without what runs the model."""

    def __init__(self, spec: TargetSpec, embed_weight: Tensor, head_weight: Tensor) -> None:
        self.spec, self.embed_weight, self.head_weight = spec, embed_weight, head_weight  # [V, D] each

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embed_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embed_weight.dtype

    def weights_digest(self) -> str:
        """The digest of the whole target's files, equal to :meth:`Target.weights_digest` of it loaded."""
        return weights_digest(self.spec.path, self.spec.revision)


def load_target_embeddings(
    path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu", revision: str | None = None
) -> TargetEmbeddings | Target:
    """Load embedding and head of a target in ``dtype``.

    The whole target comes instead where it is quantized or its files are not safetensors.

    Raises:
        TargetError: nothing to load there, an unknown family, or tensors that are not those of its config.
    """
    spec = load_spec(path, revision)
    stored = open_stored(path, dtype, revision)
    if stored is None:
        return load_target(path, dtype, device, revision)
    tied = stored.tied()
    embed, head = (stored.weight_name(end) for end in stored.ends())
    embed_weight = stored.read(embed if stored.holds(embed) else head).to(device, copy=True)
    head_weight = embed_weight if tied else stored.read(head).to(device, copy=True)
    say_untied(spec, tied)
    return TargetEmbeddings(spec, embed_weight, head_weight)
