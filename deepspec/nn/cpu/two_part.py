"""The CPU's backend of :func:`deepspec.nn.attention.attend`: two score parts, one softmax, chunk by chunk.

No mask over all groups is ever built, and only a chunk's scores are held; backward computes the probabilities again.

B batch, N groups, n groups of a chunk, K queries of a group, M own keys of a group, S context, s context that a chunk
sees, H query heads, G key/value heads, r = H / G, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspec.nn.cpu.matmul import exp_

_QUERIES_PER_CHUNK = 128  # rows of scores held at a time, per key/value head and query head of it


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
        limits, start = sees.limit[row, groups], None if sees.start is None else sees.start[row, groups]
        longest = int(limits.max())  # this backend runs on the CPU: no device waits
        first = 0 if start is None else min(max(int(start.min()), 0), longest)
        self.scale, self.causal, self.queries = sees.scale, sees.causal, query.shape[1]
        self.groups, self.context = (row, groups), (row, slice(first, longest))  # indices of its groups, of its context
        self.q = _heads_first(query[groups], ck.shape[1])  # [G, n, r*K, E]
        self.flat = (ck.shape[1], -1, self.q.shape[-1])
        self.k, self.v = ck[first:longest].transpose(0, 1), cv[first:longest].transpose(0, 1)  # [G, s, E]
        self.own_k, self.own_v = ok[groups].permute(2, 0, 1, 3), ov[groups].permute(2, 0, 1, 3)  # [G, n, M, E]
        self.seen_by_all = int(limits.min()) - first if start is None else 0
        columns = torch.arange(first + self.seen_by_all, longest)
        self.hidden = (columns >= limits[:, None])[:, None]  # [n, 1 or K, s - seen_by_all]
        if start is not None:
            self.hidden = self.hidden | (columns < start[..., None])

    def scores(self) -> tuple[Tensor, Tensor]:
        """fp32 scores [G, n, r*K, s] (hidden ones -inf) and [G, n, r*K, M]."""
        context = (self.q.reshape(self.flat) @ self.k.transpose(-1, -2)).float().mul_(self.scale)
        context = context.view(*self.q.shape[:3], self.k.shape[1])
        by_query = context.unflatten(2, (-1, self.queries))  # [G, n, r, K, s]
        by_query[..., self.seen_by_all :].masked_fill_(self.hidden[:, None], -torch.inf)
        own = (self.q @ self.own_k.transpose(-1, -2)).float().mul_(self.scale)
        if self.causal:
            K, M = self.queries, own.shape[-1]
            later = torch.ones(K, M, dtype=torch.bool).triu(M - K + 1)
            own.unflatten(2, (-1, K)).masked_fill_(later, -torch.inf)
        return context, own


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
            p_context, p_own, total = _softmax_(*chunk.scores())
            mixed = (p_context.flatten(1, 2).to(chunk.v.dtype) @ chunk.v).view_as(chunk.q)
            mixed = mixed + p_own.to(chunk.own_v.dtype) @ chunk.own_v
            out[chunk.groups] = _heads_last(mixed, K)
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
        d_ck, d_cv = (torch.zeros(x.shape, dtype=torch.float32) for x in (ck, cv))
        for chunk in _chunks(tensors, ctx.sees):
            context, own = chunk.scores()
            total = lse[chunk.groups].view(-1, G, chunk.q.shape[2]).transpose(0, 1)[..., None]
            p_context, p_own = exp_(context.sub_(total)), exp_(own.sub_(total))
            grad = _heads_first(grad_out[chunk.groups], G)
            delta = (grad.float() * _heads_first(out[chunk.groups], G).float()).sum(-1, keepdim=True)
            flat, dtype = grad.reshape(chunk.flat), grad.dtype
            d_cv[chunk.context] += (p_context.flatten(1, 2).to(dtype).transpose(-1, -2) @ flat).transpose(0, 1)
            d_ov[chunk.groups] = (p_own.to(dtype).transpose(-1, -2) @ grad).permute(1, 2, 0, 3)
            s_context = (flat @ chunk.v.transpose(-1, -2)).float().view_as(p_context)
            s_context = s_context.sub_(delta).mul_(p_context).mul_(scale).to(dtype).flatten(1, 2)
            s_own = (grad @ chunk.own_v.transpose(-1, -2)).float()
            s_own = s_own.sub_(delta).mul_(p_own).mul_(scale).to(dtype)
            d_query[chunk.groups] = _heads_last((s_context @ chunk.k).view_as(chunk.q) + s_own @ chunk.own_k, K)
            d_ck[chunk.context] += (s_context.transpose(-1, -2) @ chunk.q.reshape(chunk.flat)).transpose(0, 1)
            d_ok[chunk.groups] = (s_own.transpose(-1, -2) @ chunk.q).permute(1, 2, 0, 3)
        return d_query, d_ck.to(ck.dtype), d_cv.to(cv.dtype), d_ok, d_ov, None, None, None, None


def _softmax_(context: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over two parts of the scores, in place; both parts and the log of their sum [G, n, r*K, 1].

    A row that sees nothing has probabilities 0 and log 0.
    """
    parts = [part for part in (context, own) if part.shape[-1]]
    tops = [part.amax(dim=-1, keepdim=True) for part in parts] or [context.new_zeros((*context.shape[:-1], 1))]
    top = torch.stack(tops).amax(dim=0)
    top.masked_fill_(top == -torch.inf, 0.0)
    total = torch.zeros_like(top)
    for part in parts:
        total += exp_(part.sub_(top)).sum(dim=-1, keepdim=True)
    total.masked_fill_(total == 0.0, 1.0)
    for part in parts:
        part.div_(total)
    return context, own, top.add_(total.log())
