"""Attention of a draft over [context | own keys]: the one attention that all three algorithms use.

A *group* of queries sees the context up to its own limit, and the group's own keys, all of them:

- block drafters: a group is the block of one anchor a; limit a (strictly before the anchor); own keys are the K slots;
- token by token: a group is one slot t at TTT step j; limit t + 1; own keys are the slot's keys of steps 1..j;
- decoding: the same with the committed length as the limit.

Three backends compute the same: ``two_part`` (CPU: one softmax over two score parts, recomputed in backward, no
(N*K) x (S + N*M) mask ever), ``sdpa`` (the plain twin: concatenated keys and a boolean mask) and ``flex`` (CUDA).

B batch, N groups, K queries of a group, M own keys of a group, S context, H query heads, G key/value heads, E head
size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.errors import DeepSpecError, nearest
from deepspec.nn.exponential import exp_

_QUERIES_PER_CHUNK = 128  # rows of scores held at a time, per key/value head and query head of it


def attend(
    query_BNKHE: Tensor,
    context_BSGE: tuple[Tensor, Tensor],
    own_BNMGE: tuple[Tensor, Tensor],
    limit_BN: Tensor,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """Attention of every group over its visible context and its own keys.

    Args:
        query_BNKHE: queries.
        context_BSGE: (keys, values) of the context.
        own_BNMGE: (keys, values) of the groups themselves; M may be 0.
        limit_BN: int64; a group sees the context positions < limit.
        scale: factor of the scores.
        backend: "auto" (flex on CUDA, two_part elsewhere; the environment variable DEEPSPEC_ATTENTION overrides), or
            one of "two_part", "sdpa", "flex".

    Returns:
        [B, N, K, H, E]; zero for a group that sees nothing.
    """
    if backend == "auto":
        backend = os.environ.get("DEEPSPEC_ATTENTION") or ("flex" if query_BNKHE.is_cuda else "two_part")
    if backend not in BACKENDS:
        raise DeepSpecError("unknown attention backend", found=backend, remedy=nearest(backend, BACKENDS))
    if query_BNKHE.shape[1] == 0:  # no group: nothing to attend, but every input still gets its (zero) gradient
        tied = torch.stack([part.sum() for part in (*context_BSGE, *own_BNMGE)]).sum() * 0.0
        return query_BNKHE + tied.to(query_BNKHE.dtype)
    return BACKENDS[backend](query_BNKHE, *context_BSGE, *own_BNMGE, limit_BN, scale)


def no_own_keys(context_BSGE: tuple[Tensor, Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """Own keys and values [B, N, 0, G, E] of ``groups`` groups that see the context alone."""
    B, _, G, E = context_BSGE[0].shape
    empty = context_BSGE[0].new_empty(B, groups, 0, G, E)
    return empty, empty


def visibility_mask(limit_BN: Tensor, num_queries: int, num_own: int, context_length: int) -> Tensor:
    """The boolean mask [B, N*K, S + N*M] (True = visible) that :func:`attend` never builds."""
    B, N = limit_BN.shape
    columns = torch.arange(context_length, device=limit_BN.device)
    context = (columns < limit_BN[..., None]).repeat_interleave(num_queries, dim=1)  # [B, N*K, S]
    own = torch.eye(N, dtype=torch.bool, device=limit_BN.device)
    own = own.repeat_interleave(num_queries, dim=0).repeat_interleave(num_own, dim=1)  # [N*K, N*M]
    return torch.cat((context, own.expand(B, -1, -1)), dim=-1)


def _joined(query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first, own keys behind the context: [B, H, N*K, E], [B, G, S + N*M, E] twice."""
    keys = torch.cat((ck, ok.flatten(1, 2)), dim=1).transpose(1, 2)
    values = torch.cat((cv, ov.flatten(1, 2)), dim=1).transpose(1, 2)
    return query.flatten(1, 2).transpose(1, 2), keys, values


def _sdpa(query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, limit: Tensor, scale: float) -> Tensor:
    K, M = query.shape[2], ok.shape[2]
    mask = visibility_mask(limit, K, M, ck.shape[1])[:, None]
    q, k, v = _joined(query, ck, cv, ok, ov)
    blind = ~mask.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, scale=scale, enable_gqa=True)
    return out.masked_fill(blind, 0.0).transpose(1, 2).reshape(query.shape)


def _flex(query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, limit: Tensor, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, N, K = query.shape[:3]
    S, M = ck.shape[1], ok.shape[2]
    q, k, v = _joined(query, ck, cv, ok, ov)

    def visible(b: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        group = row // K
        own = (column >= S) & ((column - S) // max(M, 1) == group)
        return ((column < S) & (column < limit[b, group])) | own

    mask = create_block_mask(visible, B, None, N * K, S + N * M, device=query.device)
    run: Any = _compiled_flex() if query.is_cuda else flex_attention
    out = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(query.shape)


_FLEX: list[Callable[..., Any]] = []


def _compiled_flex() -> Callable[..., Any]:
    """flex_attention compiled once a process (uncompiled it materialises the scores)."""
    if not _FLEX:
        from torch.nn.attention.flex_attention import flex_attention

        _FLEX.append(torch.compile(flex_attention, dynamic=True))
    return _FLEX[0]


def _two_part(query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, limit: Tensor, scale: float) -> Tensor:
    result: Tensor = _TwoPart.apply(query, ck, cv, ok, ov, limit, scale)
    return result


class _Chunk:
    """The queries of some groups of one batch row, heads first, with both parts of their scores."""

    def __init__(
        self, row: int, start: int, stop: int, tensors: tuple[Tensor, ...], limit: Tensor, scale: float
    ) -> None:
        query, ck, cv, ok, ov = tensors
        G = ck.shape[2]
        self.row, self.groups = row, slice(start, stop)
        limits = limit[row, self.groups]
        self.reach = int(limits.max())  # this backend runs on CPU: no device sync
        self.q = heads_first(query[row, self.groups], G)  # [G, n, r*K, E]
        self.k, self.v = ck[row, : self.reach].transpose(0, 1), cv[row, : self.reach].transpose(0, 1)  # [G, s, E]
        self.own_k = ok[row, self.groups].permute(2, 0, 1, 3)  # [G, n, M, E]
        self.own_v = ov[row, self.groups].permute(2, 0, 1, 3)
        self.scale = scale
        self.seen_by_all = int(limits.min())
        self.hidden = torch.arange(self.seen_by_all, self.reach) >= limits[:, None]  # [n, s - seen_by_all]
        self.flat = (G, -1, self.q.shape[-1])

    def scores(self) -> tuple[Tensor, Tensor]:
        """fp32 scores [G, n, r*K, s] (hidden ones -inf) and [G, n, r*K, M]."""
        context = (self.q.reshape(self.flat) @ self.k.transpose(-1, -2)).float().mul_(self.scale)
        context = context.view(*self.q.shape[:3], self.reach)
        context[..., self.seen_by_all :].masked_fill_(self.hidden[None, :, None], -torch.inf)
        own = (self.q @ self.own_k.transpose(-1, -2)).float().mul_(self.scale)
        return context, own


def heads_first(x_nKHE: Tensor, num_kv_heads: int) -> Tensor:
    """[n, K, H, E] -> [G, n, (H/G)*K, E]: the query heads that share a key head become rows of one product."""
    n, K, H, E = x_nKHE.shape
    return x_nKHE.view(n, K, num_kv_heads, H // num_kv_heads, E).permute(2, 0, 3, 1, 4).reshape(num_kv_heads, n, -1, E)


def heads_last(x_GnRE: Tensor, num_queries: int) -> Tensor:
    """The inverse of :func:`heads_first`."""
    G, n, rows, E = x_GnRE.shape
    r = rows // num_queries
    return x_GnRE.view(G, n, r, num_queries, E).permute(1, 3, 0, 2, 4).reshape(n, num_queries, G * r, E)


class _TwoPart(torch.autograd.Function):
    """Two score parts, one softmax, chunk by chunk; the probabilities are recomputed in backward."""

    @staticmethod
    def chunks(tensors: tuple[Tensor, ...], limit: Tensor, scale: float) -> Any:
        query = tensors[0]
        B, N, K, _H = query.shape[:4]
        step = max(1, _QUERIES_PER_CHUNK // K)
        for row in range(B):
            for start in range(0, N, step):
                yield _Chunk(row, start, min(N, start + step), tensors, limit, scale)

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, limit: Tensor, scale: float
    ) -> Tensor:
        tensors = (query, ck, cv, ok, ov)
        out = torch.empty_like(query)
        lse = query.new_empty((*query.shape[:2], query.shape[2] * query.shape[3]), dtype=torch.float32)  # [B, N, K*H]
        for chunk in _TwoPart.chunks(tensors, limit, scale):
            context, own = chunk.scores()
            p_context, p_own, total = _softmax_(context, own)
            mixed = (p_context.flatten(1, 2).to(chunk.v.dtype) @ chunk.v).view_as(chunk.q)
            mixed = mixed + p_own.to(chunk.own_v.dtype) @ chunk.own_v
            out[chunk.row, chunk.groups] = heads_last(mixed, query.shape[2])
            lse[chunk.row, chunk.groups] = total.squeeze(-1).transpose(0, 1).flatten(1)
        ctx.save_for_backward(*tensors, limit, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, limit, out, lse = ctx.saved_tensors
        query, ck, cv, ok, ov = tensors
        G, K = ck.shape[2], query.shape[2]
        d_query, d_ok, d_ov = torch.empty_like(query), torch.empty_like(ok), torch.empty_like(ov)
        d_ck = torch.zeros(ck.shape, dtype=torch.float32)
        d_cv = torch.zeros(cv.shape, dtype=torch.float32)
        for chunk in _TwoPart.chunks(tuple(tensors), limit, ctx.scale):
            context, own = chunk.scores()
            total = lse[chunk.row, chunk.groups].view(-1, G, chunk.q.shape[2]).transpose(0, 1)[..., None]
            p_context, p_own = exp_(context.sub_(total)), exp_(own.sub_(total))
            grad = heads_first(grad_out[chunk.row, chunk.groups], G)
            delta = (grad.float() * heads_first(out[chunk.row, chunk.groups], G).float()).sum(-1, keepdim=True)
            flat = grad.reshape(chunk.flat)
            d_cv[chunk.row, : chunk.reach] += (
                p_context.flatten(1, 2).to(flat.dtype).transpose(-1, -2) @ flat
            ).transpose(0, 1)
            d_ov[chunk.row, chunk.groups] = (p_own.to(grad.dtype).transpose(-1, -2) @ grad).permute(1, 2, 0, 3)
            s_context = (flat @ chunk.v.transpose(-1, -2)).float().view_as(p_context)
            s_context = s_context.sub_(delta).mul_(p_context).mul_(ctx.scale).to(flat.dtype).flatten(1, 2)
            s_own = (
                (grad @ chunk.own_v.transpose(-1, -2)).float().sub_(delta).mul_(p_own).mul_(ctx.scale).to(grad.dtype)
            )
            d_q = (s_context @ chunk.k).view_as(chunk.q) + s_own @ chunk.own_k
            d_query[chunk.row, chunk.groups] = heads_last(d_q, K)
            d_ck[chunk.row, : chunk.reach] += (s_context.transpose(-1, -2) @ chunk.q.reshape(chunk.flat)).transpose(
                0, 1
            )
            d_ok[chunk.row, chunk.groups] = (s_own.transpose(-1, -2) @ chunk.q).permute(1, 2, 0, 3)
        return d_query, d_ck.to(ck.dtype), d_cv.to(cv.dtype), d_ok, d_ov, None, None


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


BACKENDS: dict[str, Callable[..., Tensor]] = {"two_part": _two_part, "sdpa": _sdpa, "flex": _flex}
