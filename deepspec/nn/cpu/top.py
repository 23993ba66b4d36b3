"""The largest logits of rows whose vocabulary comes tile by tile, without sorting the tiles.

Sorting costs as much as the product that made a tile. So the first pass keeps one maximum for every 16 columns; the
largest logits are in the groups with the largest maxima, and the second pass takes those groups' columns out of the
tiles, which hold probabilities by then: the order is the same.

r rows, w columns of a tile, g groups of a tile, C tokens wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP = 16  # columns c, c + g, c + 2 g, .. of a tile: a maximum over groups is then one of whole rows, which is fast


class TopTokens:
    """The ``count`` likeliest tokens of each row: :meth:`see` every tile, then :meth:`collect` every tile."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._maxima: list[Tensor] = []  # [r, g] of each tile
        self._best = self._values = self._tokens = torch.empty(0)  # [r, C]; [r, C * 16] twice

    def see(self, logits_rw: Tensor) -> None:
        """First pass."""
        groups = -(-logits_rw.shape[1] // _GROUP)
        missing = groups * _GROUP - logits_rw.shape[1]
        padded = F.pad(logits_rw, (0, missing), value=-torch.inf) if missing else logits_rw
        self._maxima.append(padded.view(-1, _GROUP, groups).amax(1))

    def collect(self, number: int, probabilities_rw: Tensor, first: int) -> None:
        """Second pass: tile ``number``, whose first column is token ``first``."""
        if number == 0:
            maxima = torch.cat(self._maxima, dim=1)
            self._best = maxima.topk(min(self.count, maxima.shape[1]), dim=1, sorted=False).indices
            self._values = maxima.new_full((len(maxima), self._best.shape[1] * _GROUP), -1.0)
            self._tokens = torch.zeros_like(self._values, dtype=torch.int64)
        width, groups = probabilities_rw.shape[1], self._maxima[number].shape[1]
        local = self._best - sum(one.shape[1] for one in self._maxima[:number])
        columns = local[..., None] + groups * torch.arange(_GROUP, device=local.device)
        here = ((local >= 0) & (local < groups))[..., None] & (columns < width)
        columns, here = columns.clamp_(0, width - 1).flatten(1), here.flatten(1)
        self._values = torch.where(here, probabilities_rw.gather(1, columns), self._values)
        self._tokens = torch.where(here, columns + first, self._tokens)

    def tokens(self) -> Tensor:
        """[r, C] int64, the likeliest first."""
        return self._tokens.gather(1, self._values.topk(self.count, dim=1).indices)
