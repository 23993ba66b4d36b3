"""One conversation shared by several ranks: DeepSpeed's Ulysses (arXiv 2309.14509) for a draft's attention.

Rank r of P holds the positions r, r + P, r + 2 P, .. of the context (of a conversation whose supervised tokens are at
its end every rank then has as many of them), and every P-th of the groups of queries. Around attention, all-to-alls
turn "my rows of every head" into "every row of my heads", and back: attention itself runs as on one rank, over 1/P of
the heads. Everything else is computed for a rank's own rows. The loss is a sum over rows, so the ranks' losses add up
to the step's as those of data parallel ranks do.

B batch, n rows of this rank, N = P * n rows of all, rank by rank, S context, K queries of a group, M own keys of a
group, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspec.batch import WHOLE, Part
from deepspec.nn.attention import attend

Pair = tuple[Tensor, Tensor]


def _alone(x: Tensor, _scatter: int, _gather: int) -> Tensor:
    return x


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a conversation; by itself, one rank alone."""

    part: Part = WHOLE
    all_to_all: Callable[[Tensor, int, int], Tensor] = _alone  # of [B, rows, heads, E]: dim to scatter, dim to gather

    def positions(self, count: int, device: torch.device) -> Tensor:
        """This rank's of the first ``count`` positions, [ceil(count / P)]; the last may be one too many."""
        return torch.arange(self.part.rows(count), device=device) * self.part.of + self.part.number

    def all_positions(self, count: int, device: torch.device) -> Tensor:
        """:meth:`positions` of every rank, rank by rank, [P * ceil(count / P)]."""
        own = torch.arange(self.part.rows(count), device=device) * self.part.of
        return (own + torch.arange(self.part.of, device=device)[:, None]).flatten()

    def own_keys(self, kv_BnMGE: Pair, num_heads: int) -> Pair:
        """Keys and values of all ranks' groups for this rank's heads, [B, N, M, G', E], rank by rank.

        Where G is no multiple of P each head is there several times, so that every rank has those of its queries.

        Args:
            kv_BnMGE: of this rank's groups.
            num_heads: H; a multiple of P.
        """
        of, heads = self.part.of, kv_BnMGE[0].shape[3]
        if of == 1:
            return kv_BnMGE
        if num_heads % of:
            raise ValueError(f"{num_heads} heads for {of} ranks")
        copies = math.lcm(heads, of) // heads
        keys, values = (self._all_rows(part.repeat_interleave(copies, dim=3)) for part in kv_BnMGE)
        return keys, values

    def context(self, kv_BnGE: Pair, num_heads: int) -> Pair:
        """:meth:`own_keys` of a context in the order of its positions, [B, S, G', E]; S is a multiple of P."""
        if self.part.of == 1:
            return kv_BnGE
        keys, values = self.own_keys((kv_BnGE[0][:, :, None], kv_BnGE[1][:, :, None]), num_heads)
        return self._by_position(keys), self._by_position(values)

    def _by_position(self, x_BN1GE: Tensor) -> Tensor:
        return x_BN1GE[:, :, 0].unflatten(1, (self.part.of, -1)).transpose(1, 2).flatten(1, 2)

    def _all_rows(self, x_BnKHE: Tensor) -> Tensor:
        """My rows of every head -> every row of my heads, [B, N, K, H / P, E]."""
        return _split(self.all_to_all(_joined(x_BnKHE), 2, 1), x_BnKHE.shape[2])

    def attend(
        self, query_BnKHE: Tensor, context_BSGE: Pair, own_BNMGE: Pair | None, limit_BN: Tensor, scale: float,
        backend: str = "auto", causal: bool = False, start_BNK: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """:func:`deepspec.nn.attention.attend` of this rank's queries; everything else is of all ranks' rows.

        Returns:
            [B, n, K, H, E].
        """
        if self.part.of > 1:
            query_BnKHE = self._all_rows(query_BnKHE)
        mixed = attend(query_BnKHE, context_BSGE, own_BNMGE, limit_BN, scale, backend, causal, start_BNK)
        return mixed if self.part.of == 1 else _split(self.all_to_all(_joined(mixed), 1, 2), mixed.shape[2])


ALONE = SequenceGroup()


def _joined(x_BnKHE: Tensor) -> Tensor:
    """[B, n, H, K*E]: all that goes with a head together."""
    return x_BnKHE.transpose(2, 3).flatten(3)


def _split(x_BnHF: Tensor, num_queries: int) -> Tensor:
    """The inverse of :func:`_joined`."""
    return x_BnHF.unflatten(3, (num_queries, -1)).transpose(2, 3)
