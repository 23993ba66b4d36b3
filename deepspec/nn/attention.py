"""Attention of a draft over [context | own keys]: the one attention that all algorithms train with.

A *group* of queries sees the context up to its own limit, and the group's own keys, all of them or (``causal``) those
up to its own; with ``start`` each query sees the context only from there on (a sliding window):

- block drafters: a group is the block of one anchor a; limit a (strictly before the anchor); own keys are the K slots;
- token by token: a group is one slot t at TTT step j; limit t + 1; own keys are the slot's keys of steps 1..j;
- decoding: the same with the committed length as the limit.

Three backends compute the same: ``two_part`` (CPU: never a (N*K) x (S + N*M) mask; :mod:`deepspec.nn.cpu.two_part`),
``sdpa`` (the reference: concatenated keys and a boolean mask) and ``flex`` (CUDA).

B batch, N groups, K queries of a group, M own keys of a group, S context, H query heads, G key/value heads, E head
size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.errors import DeepSpecError, nearest
from deepspec.nn.cpu.two_part import TwoPart

_BLOCK = 128  # rows and columns of a block of flex_attention's mask


def attend(
    query_BNKHE: Tensor,
    context_BSGE: tuple[Tensor, Tensor],
    own_BNMGE: tuple[Tensor, Tensor] | None,
    limit_BN: Tensor,
    scale: float,
    backend: str = "auto",
    causal: bool = False,
    start_BNK: Tensor | None = None,
) -> Tensor:
    """Attention of every group over its visible context and its own keys.

    Args:
        query_BNKHE: queries.
        context_BSGE: (keys, values) of the context.
        own_BNMGE: (keys, values) of the groups themselves; M may be 0; None: the groups see only the context.
        limit_BN: int64; a group sees the context positions < limit.
        scale: factor of the scores.
        backend: "auto" (flex on CUDA, two_part elsewhere; the environment variable DEEPSPEC_ATTENTION overrides), or
            one of "two_part", "sdpa", "flex".
        causal: query k sees the own keys 0..k + M - K only.
        start_BNK: int64; a query sees the context positions >= start; None: all below the limit.

    Returns:
        [B, N, K, H, E]; zero for a group that sees nothing.
    """
    if backend == "auto":
        backend = os.environ.get("DEEPSPEC_ATTENTION") or ("flex" if query_BNKHE.is_cuda else "two_part")
    if backend not in BACKENDS:
        raise DeepSpecError("unknown attention backend", found=backend, remedy=nearest(backend, BACKENDS))
    if own_BNMGE is None:
        context = context_BSGE[0]
        own_BNMGE = (context.new_empty(*query_BNKHE.shape[:2], 0, *context.shape[2:]),) * 2
    if query_BNKHE.shape[1] == 0:  # no group: nothing to attend, but every input still gets its (zero) gradient
        zero = torch.stack([part.sum() for part in (*context_BSGE, *own_BNMGE)]).sum() * 0.0
        return query_BNKHE + zero.to(query_BNKHE.dtype)
    return BACKENDS[backend](query_BNKHE, *context_BSGE, *own_BNMGE, limit_BN, scale, causal, start_BNK)


def visibility_mask(
    limit_BN: Tensor, num_queries: int, num_own: int, context_length: int,
    causal: bool = False, start_BNK: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The boolean mask [B, N*K, S + N*M] (True = visible) of the reference."""
    B, N = limit_BN.shape
    columns = torch.arange(context_length, device=limit_BN.device)
    context = (columns < limit_BN[..., None]).repeat_interleave(num_queries, dim=1)  # [B, N*K, S]
    if start_BNK is not None:
        context &= columns >= start_BNK.flatten(1)[..., None]
    within = torch.ones(num_queries, num_own, dtype=torch.bool, device=limit_BN.device)
    within = within.tril(num_own - num_queries) if causal else within
    own = torch.block_diag(*[within] * N).bool() if N else within.new_zeros(0, 0)  # [N*K, N*M]
    return torch.cat((context, own.expand(B, -1, -1)), dim=-1)


def _joined(query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first, own keys after the context: [B, H, N*K, E], [B, G, S + N*M, E] twice."""
    keys = torch.cat((ck, ok.flatten(1, 2)), dim=1).transpose(1, 2)
    values = torch.cat((cv, ov.flatten(1, 2)), dim=1).transpose(1, 2)
    return query.flatten(1, 2).transpose(1, 2), keys, values


def _sdpa(
    query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, limit: Tensor, scale: float,
    causal: bool, start: Tensor | None,
) -> Tensor:  # fmt: skip
    mask = visibility_mask(limit, query.shape[2], ok.shape[2], ck.shape[1], causal, start)[:, None]
    q, k, v = _joined(query, ck, cv, ok, ov)
    blind = ~mask.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, scale=scale, enable_gqa=True)
    return out.masked_fill(blind, 0.0).transpose(1, 2).reshape(query.shape)


def _flex(
    query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, limit: Tensor, scale: float,
    causal: bool, start: Tensor | None,
) -> Tensor:  # fmt: skip
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    K, N, S, M = query.shape[2], query.shape[1], ck.shape[1], ok.shape[2]
    q, k, v = _joined(query, ck, cv, ok, ov)

    def visible(b: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        group, key = row // K, column - S
        own = (key >= 0) & (key // max(M, 1) == group)
        if causal:
            own = own & (key % max(M, 1) <= row % K + (M - K))
        context = (key < 0) & (column < limit[b, group])
        if start is not None:
            context = context & (column >= start[b, group, row % K])
        return context | own

    blocks = [_ordered(part) for part in visible_blocks(limit, (K, M, S), start)]
    lengths = (N * K, S + N * M)
    mask = BlockMask.from_kv_blocks(*blocks[0], *blocks[1], BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=lengths)
    run: Any = _compiled_flex() if query.is_cuda else flex_attention
    return run(q, k, v, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2).reshape(query.shape)


def visible_blocks(limit_BN: Tensor, sizes: tuple[int, int, int], start_BNK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which blocks of the mask [N*K, S + N*M] hold something visible, some of it hidden; and which are all visible.

    Found from what each block's rows and columns are: torch's own way goes through the mask itself, which has more than
    10^10 elements at 128k tokens. The first may hold a block too many (where nothing is visible), never one too few.

    Args:
        limit_BN: see :func:`attend`.
        sizes: (K, M, S).
        start_BNK: see :func:`attend`.

    Returns:
        bool, [B, 1, blocks of rows, blocks of columns] each.
    """
    N, (K, M, S), device = limit_BN.shape[1], sizes, limit_BN.device
    row = torch.arange(0, N * K, _BLOCK, device=device)  # the first of each block
    column = torch.arange(0, S + N * M, _BLOCK, device=device)
    whole = row + _BLOCK <= N * K
    index = (row[:, None] + torch.arange(_BLOCK, device=device)).clamp_max(N * K - 1)  # [blocks of rows, _BLOCK]
    limits = limit_BN[:, index // K]  # [B, blocks of rows, _BLOCK]
    seen = column < limits.amax(-1, keepdim=True).clamp_max(S)
    full = (column + _BLOCK <= limits.amin(-1, keepdim=True)) & whole[:, None]
    if start_BNK is not None:
        starts = start_BNK.flatten(1)[:, index]
        seen &= column + _BLOCK > starts.amin(-1, keepdim=True)
        full &= column >= starts.amax(-1, keepdim=True)
    if M:
        first, last = (column - S).clamp_min(0) // M, (column + _BLOCK - 1 - S) // M  # groups of the own keys
        of_rows = index[:, :1] // K, index[:, -1:] // K
        own = (first <= of_rows[1]) & (last >= of_rows[0]) & (column + _BLOCK > S)
        seen = seen | own
    return (seen & ~full)[:, None], full[:, None]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row are set, and their indices first: the form that flex_attention reads."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1).to(torch.int32), order.to(torch.int32)


@cache
def _compiled_flex() -> Callable[..., Any]:
    """flex_attention compiled once a process (uncompiled it materialises the scores)."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


BACKENDS: dict[str, Callable[..., Tensor]] = {"two_part": TwoPart.apply, "sdpa": _sdpa, "flex": _flex}
