"""The CPU's backend of :func:`deepspec.nn.attention.attend`: scores tile by tile, one softmax, chunk by chunk.

No mask over all groups is ever built, and only the scores of a chunk with a tile of its context are held, whatever the
context's length; the softmax is kept up as tiles come (maximum, sum, weighted values), and backward computes the
probabilities again.

B batch, N groups, n groups of a chunk, K queries of a group, M own keys of a group, S context, s context of a tile,
H query heads, G key/value heads, r = H / G, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspec.nn.cpu.matmul import exp_

_QUERIES_PER_CHUNK = 128  # rows of scores held at a time, per key/value head and query head of it
_TILE_KEYS = 4096  # columns of them: 2 MB of scores for each query head


def _heads_first(x_nKHE: Tensor, num_kv_heads: int) -> Tensor:
    """[n, K, H, E] -> [G, n, r*K, E]: the query heads that share a key head become rows of one matrix product."""
    n, K, H, E = x_nKHE.shape
    return x_nKHE.view(n, K, num_kv_heads, H // num_kv_heads, E).permute(2, 0, 3, 1, 4).reshape(num_kv_heads, n, -1, E)


def _heads_last(x_GnRE: Tensor, num_queries: int) -> Tensor:
    """The inverse of :func:`_heads_first`."""
    G, n, rows, E = x_GnRE.shape
    r = rows // num_queries
    return x_GnRE.view(G, n, r, num_queries, E).permute(1, 3, 0, 2, 4).reshape(n, num_queries, G * r, E)


@dataclass(frozen=True)
class Sees:
    """What the groups see of the context and of themselves; see :func:`deepspec.nn.attention.attend`."""

    limit: Tensor  # [B, N] int64
    scale: float
    causal: bool
    start: Tensor | None  # [B, N, K] int64


class _Chunk:
    """The queries of some groups of one batch row, heads first, with what they see."""

    def __init__(self, row: int, groups: slice, tensors: Sequence[Tensor], sees: Sees) -> None:
        query, ck, cv, ok, ov = (tensor[row] for tensor in tensors)
        self.limits, self.start = sees.limit[row, groups], None if sees.start is None else sees.start[row, groups]
        self.longest = int(self.limits.max())  # this backend runs on the CPU: no device waits
        self.first = 0 if self.start is None else min(max(int(self.start.min()), 0), self.longest)
        self.row, self.scale, self.causal, self.queries = row, sees.scale, sees.causal, query.shape[1]
        self.groups = (row, groups)  # index of its groups
        self.q = _heads_first(query[groups], ck.shape[1])  # [G, n, r*K, E]
        self.flat = (ck.shape[1], -1, self.q.shape[-1])
        self.keys, self.values = ck, cv
        self.own_k, self.own_v = ok[groups].permute(2, 0, 1, 3), ov[groups].permute(2, 0, 1, 3)  # [G, n, M, E]

    def tiles(self) -> Iterator[_Tile]:
        """The context that any of its groups sees."""
        everyone = int(self.limits.min()) if self.start is None else self.first  # all see the columns before
        for begin in range(self.first, self.longest, _TILE_KEYS):
            end = min(begin + _TILE_KEYS, self.longest)
            columns = torch.arange(min(max(everyone, begin), end), end)
            hidden = (columns >= self.limits[:, None])[:, None]  # [n, 1 or K, some of s]
            if self.start is not None:
                hidden = hidden | (columns < self.start[..., None])
            k, v = (part[begin:end].transpose(0, 1) for part in (self.keys, self.values))
            yield _Tile((self.row, slice(begin, end)), k, v, hidden)

    def scores(self, tile: _Tile) -> Tensor:
        """fp32 scores [G, n, r*K, s]; hidden ones are -inf."""
        found = (self.q.reshape(self.flat) @ tile.k.transpose(-1, -2)).float().mul_(self.scale)
        found = found.view(*self.q.shape[:3], tile.k.shape[1])
        if some := tile.hidden.shape[-1]:
            found.unflatten(2, (-1, self.queries))[..., -some:].masked_fill_(tile.hidden[:, None], -torch.inf)
        return found

    def own_scores(self) -> Tensor:
        """fp32 scores [G, n, r*K, M] of the groups' own keys."""
        own = (self.q @ self.own_k.transpose(-1, -2)).float().mul_(self.scale)
        if self.causal:
            K, M = self.queries, own.shape[-1]
            later = torch.ones(K, M, dtype=torch.bool).triu(M - K + 1)
            own.unflatten(2, (-1, K)).masked_fill_(later, -torch.inf)
        return own


@dataclass(frozen=True)
class _Tile:
    """Some of the context."""

    index: tuple[int, slice]  # in [B, S]
    k: Tensor  # [G, s, E]
    v: Tensor
    hidden: Tensor  # bool [n, 1 or K, h]: which groups or queries do not see the last h columns; the others all see


class _Softmax:
    """The softmax of one chunk over parts that come one after the other, and the values weighted by it."""

    def __init__(self, q: Tensor) -> None:
        self.mixed = torch.zeros_like(q, dtype=torch.float32)  # [G, n, r*K, E]
        self.top = self.mixed.new_full((*q.shape[:-1], 1), -torch.inf)
        self.total = torch.zeros_like(self.top)

    def weights(self, scores: Tensor) -> Tensor:
        """exp(scores - maximum so far), in place; what was summed before is scaled to the same maximum."""
        top = torch.maximum(self.top, scores.amax(dim=-1, keepdim=True))
        base = top.masked_fill(top == -torch.inf, 0.0)
        factor = torch.exp(self.top - base)
        weights = exp_(scores.sub_(base))
        self.total.mul_(factor).add_(weights.sum(dim=-1, keepdim=True))
        self.mixed.mul_(factor)
        self.top = top
        return weights

    def finished(self) -> tuple[Tensor, Tensor]:
        """The weighted mean of the values, and the log of the sum of exponentials [G, n, r*K, 1].

        A row that saw nothing has 0 and 0.
        """
        total = self.total.masked_fill(self.total == 0.0, 1.0)
        return self.mixed.div_(total), self.top.masked_fill(self.top == -torch.inf, 0.0).add_(total.log())


def _chunks(tensors: Sequence[Tensor], sees: Sees) -> Iterator[_Chunk]:
    B, N, K = tensors[0].shape[:3]
    step = max(1, _QUERIES_PER_CHUNK // K)
    for row in range(B):
        for start in range(0, N, step):
            yield _Chunk(row, slice(start, min(N, start + step)), tensors, sees)


class TwoPart(torch.autograd.Function):
    """Attention of queries over context keys and values (ck, cv) and the groups' own (ok, ov)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, limit: Tensor, scale: float,
        causal: bool, start: Tensor | None,
    ) -> Tensor:  # fmt: skip
        tensors, sees = (query, ck, cv, ok, ov), Sees(limit, scale, causal, start)
        B, N, K, H, _ = query.shape
        out = torch.empty_like(query)
        lse = query.new_empty((B, N, K * H), dtype=torch.float32)
        for chunk in _chunks(tensors, sees):
            softmax = _Softmax(chunk.q)
            if ok.shape[2]:
                softmax.mixed += softmax.weights(chunk.own_scores()).to(ov.dtype) @ chunk.own_v
            for tile in chunk.tiles():
                weights = softmax.weights(chunk.scores(tile)).flatten(1, 2).to(cv.dtype)
                softmax.mixed += (weights @ tile.v).view_as(chunk.q)
            mixed, total = softmax.finished()
            out[chunk.groups] = _heads_last(mixed, K).to(out.dtype)
            lse[chunk.groups] = total.squeeze(-1).transpose(0, 1).flatten(1)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.sees = sees
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        query, ck, cv, ok, ov = tensors
        G, K, scale = ck.shape[2], query.shape[2], ctx.sees.scale
        d_query, d_ok, d_ov = torch.empty_like(query), torch.empty_like(ok), torch.empty_like(ov)
        d_ck, d_cv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (ck, cv))
        for chunk in _chunks(tensors, ctx.sees):
            total = lse[chunk.groups].view(-1, G, chunk.q.shape[2]).transpose(0, 1)[..., None]
            grad = _heads_first(grad_out[chunk.groups], G)
            delta = (grad.float() * _heads_first(out[chunk.groups], G).float()).sum(-1, keepdim=True)
            flat, dtype = grad.reshape(chunk.flat), grad.dtype
            p_own = exp_(chunk.own_scores().sub_(total))
            d_ov[chunk.groups] = (p_own.to(dtype).transpose(-1, -2) @ grad).permute(1, 2, 0, 3)
            s_own = (grad @ chunk.own_v.transpose(-1, -2)).float()
            s_own = s_own.sub_(delta).mul_(p_own).mul_(scale).to(dtype)
            d_ok[chunk.groups] = (s_own.transpose(-1, -2) @ chunk.q).permute(1, 2, 0, 3)
            d_q = (s_own @ chunk.own_k).float()
            for tile in chunk.tiles():
                p = exp_(chunk.scores(tile).sub_(total))
                d_cv[tile.index] += (p.flatten(1, 2).to(dtype).transpose(-1, -2) @ flat).transpose(0, 1)
                s = (flat @ tile.v.transpose(-1, -2)).float().view_as(p)
                s = s.sub_(delta).mul_(p).mul_(scale).to(dtype).flatten(1, 2)
                d_q += (s @ tile.k).view_as(chunk.q)
                d_ck[tile.index] += (s.transpose(-1, -2) @ chunk.q.reshape(chunk.flat)).transpose(0, 1)
            d_query[chunk.groups] = _heads_last(d_q, K).to(dtype)
        return d_query, d_ck.to(ck.dtype), d_cv.to(cv.dtype), d_ok, d_ov, None, None, None, None
