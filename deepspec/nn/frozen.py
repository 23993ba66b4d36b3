"""The target's embedding and head, frozen, as a draft uses them.

They are no parameters of the draft: no optimizer, gradient, checkpoint or ZeRO partition ever touches them, and all
drafts of a process share the target's storage. A draft folder may carry them; see ``deepspec.drafts``.

V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.nn.products import product


@dataclass(frozen=True)
class FrozenHead:
    """Embedding and output head of the target.

    Args:
        embed_VD: the embedding matrix.
        head_VD: the output head.
        embed_scale: factor between a row and its token's embedding (Gemma: sqrt(D)).
        softcap: c of the final logits c * tanh(x / c), or None.
    """

    embed_VD: Tensor
    head_VD: Tensor
    embed_scale: float = 1.0
    softcap: float | None = None

    def embed(self, tokens: Tensor) -> Tensor:
        """[..] int64 -> [.., D], scaled as the target scales."""
        rows = F.embedding(tokens, self.embed_VD)
        return rows if self.embed_scale == 1.0 else rows * self.embed_VD.new_tensor(self.embed_scale)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FrozenHead:
        """The same head on ``device`` in ``dtype``; shares storage where nothing changes."""
        return replace(self, embed_VD=self.embed_VD.to(device, dtype), head_VD=self.head_VD.to(device, dtype))

    def reduced(self, kept_V: Tensor | None) -> FrozenHead:
        """The head over the reduced vocabulary ``kept_V`` [V'] int64; itself where it is None."""
        return self if kept_V is None else replace(self, head_VD=self.head_VD[kept_V])

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] -> softcapped logits [.., V]."""
        logits = product(hidden.to(self.head_VD.dtype), self.head_VD)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()
