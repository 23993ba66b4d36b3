"""One chunk of the fused head loss: what it reads, what it gives, and how a GPU computes it, from complete logits.

A chunk is some target positions with all of their rows. :mod:`deepspec.nn.losses` cuts the chunks;
:mod:`deepspec.nn.cpu.tiles` is how a CPU computes one.

r rows of the chunk, p target positions of it, R and P of the complete call, V vocabulary, D hidden size, M Markov rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from deepspec.nn.cpu.matmul import add_matmul, matmul_fp32
from deepspec.nn.heads import FrozenHead
from deepspec.nn.loss_table import LossWeights, RowValues, log_ratio

_W2_ROWS = 4096  # rows of the Markov head's output matrix whose gradient is summed at a time


@dataclass(frozen=True)
class Chunk:
    """Some positions with all of their rows."""

    positions: slice  # of P
    rows: slice  # of R
    local_r: Tensor  # each row's position within the chunk
    label_r: Tensor
    weight_r: Tensor
    tv_r: Tensor | None = None  # coefficient of the row's TV beside the terms (deepspec.nn.chains)


@dataclass(frozen=True)
class Markov:
    """The factors of the Markov head's bias W2 @ latent, or their gradients."""

    latent: Tensor  # [P, M], or [R, M] where ``per_row``
    w2_VM: Tensor
    per_row: bool

    def span(self, chunk: Chunk) -> slice:
        """The chunk's part of the latents."""
        return chunk.rows if self.per_row else chunk.positions


@dataclass(frozen=True)
class HeadInputs:
    """What a call of the head loss reads."""

    hidden_RD: Tensor
    markov: Markov | None
    target_PD: Tensor | None
    frozen: FrozenHead
    weights: LossWeights
    candidates: int = 0  # C, how many of each row's likeliest tokens are wanted


@dataclass(frozen=True)
class ChunkTerms:
    """Values of one chunk."""

    values: RowValues  # [r] each
    hit_r: Tensor
    candidates_rC: Tensor | None = None


class Gradients:
    """Where the closed-form gradients of a call are collected; that of W2, a sum over all chunks, in fp32."""

    def __init__(self, inputs: HeadInputs) -> None:
        self.hidden_RD = torch.zeros_like(inputs.hidden_RD)
        self.markov: Markov | None = None
        if (given := inputs.markov) is not None:
            self._w2_dtype = given.w2_VM.dtype
            w2 = torch.zeros_like(given.w2_VM, dtype=torch.float32)
            self.markov = Markov(torch.zeros_like(given.latent), w2, given.per_row)

    def scale_rows(self, factor_R: Tensor) -> None:
        """Weigh rows whose gradients were computed without weights (there are no Markov factors then)."""
        self.hidden_RD.mul_(factor_R[:, None].to(self.hidden_RD.dtype))

    def finished(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the hidden states, the latents and W2, each in the dtype of its input."""
        if self.markov is None:
            return self.hidden_RD, None, None
        return self.hidden_RD, self.markov.latent, self.markov.w2_VM.to(self._w2_dtype)


def compute_chunk(inputs: HeadInputs, chunk: Chunk, gradients: Gradients | None) -> ChunkTerms:
    """Values of a chunk from complete logits [r, V]; its gradients go to ``gradients``."""
    head, cap, markov = inputs.frozen.head_VD, inputs.frozen.softcap, inputs.markov
    logits_rV = matmul_fp32(inputs.hidden_RD[chunk.rows].to(head.dtype), head.T)
    slope_rV = None
    if cap is not None:
        logits_rV = (logits_rV / cap).tanh()
        slope_rV, logits_rV = 1.0 - logits_rV.square(), cap * logits_rV
    if markov is not None:
        bias = matmul_fp32(markov.latent[markov.span(chunk)].to(markov.w2_VM.dtype), markov.w2_VM.T)
        logits_rV = logits_rV + (bias if markov.per_row else bias[chunk.local_r])
    target_pV = None
    if inputs.target_PD is not None:
        target_pV = matmul_fp32(inputs.target_PD[chunk.positions].to(head.dtype), inputs.frozen.teacher_VD.T)
        target_pV = target_pV if cap is None else cap * (target_pV / cap).tanh()
    rows = (chunk.local_r, chunk.label_r, chunk.weight_r, chunk.tv_r)
    terms, gradient_rV = compiled_chunk_terms()(logits_rV, target_pV, *rows, inputs.weights, gradients is not None)
    if gradients is not None and gradient_rV is not None:
        _collect(inputs, chunk, gradients, gradient_rV, slope_rV)
    if inputs.candidates:
        return replace(terms, candidates_rC=logits_rV.topk(inputs.candidates, dim=-1).indices)
    return terms


def _collect(
    inputs: HeadInputs, chunk: Chunk, gradients: Gradients, gradient_rV: Tensor, slope_rV: Tensor | None
) -> None:
    head, markov = inputs.frozen.head_VD, inputs.markov
    d_head = gradient_rV if slope_rV is None else gradient_rV * slope_rV
    gradients.hidden_RD[chunk.rows] = (d_head.to(head.dtype) @ head).to(gradients.hidden_RD.dtype)
    if markov is None or gradients.markov is None:
        return
    d_bias, w2, span = gradient_rV, markov.w2_VM, markov.span(chunk)
    if not markov.per_row:
        positions = chunk.positions.stop - chunk.positions.start
        d_bias = gradient_rV.new_zeros(positions, gradient_rV.shape[1]).index_add_(0, chunk.local_r, gradient_rV)
    d_bias = d_bias.to(w2.dtype)
    gradients.markov.latent[span] = (d_bias @ w2).to(markov.latent.dtype)
    latent = markov.latent[span].to(w2.dtype)
    for start in range(0, len(w2), _W2_ROWS):  # so that no product grows large before its sum in fp32
        rows = slice(start, start + _W2_ROWS)
        add_matmul(gradients.markov.w2_VM[rows], d_bias[:, rows].T, latent)


def chunk_terms(
    logits_rV: Tensor, target_pV: Tensor | None, local_r: Tensor, label_r: Tensor, weight_r: Tensor,
    tv_r: Tensor | None, weights: LossWeights, differentiate: bool,
) -> tuple[ChunkTerms, Tensor | None]:  # fmt: skip
    """(values, d(combined)/d(logits) [r, V]) without in-place passes: what torch.compile fuses into a few kernels."""
    p = logits_rV.softmax(dim=-1)
    log_total = logits_rV.logsumexp(dim=-1)
    label = label_r[:, None]
    at_label = logits_rV.gather(1, label)[:, 0]
    ce = log_total - at_label
    hit = (at_label == logits_rV.amax(dim=-1)).float()
    zero = torch.zeros_like(ce)
    gradient = weights.ce * (p - torch.zeros_like(p).scatter(1, label, 1.0)) * weight_r[:, None]
    if target_pV is None:
        values = RowValues(ce, zero, zero, zero, zero, zero)
        return ChunkTerms(values, hit), gradient if differentiate else None
    q = target_pV.softmax(dim=-1)[local_r]
    difference = p - q
    distance = difference.abs().sum(dim=-1)
    accept = (1.0 - 0.5 * distance)[:, None]
    soft_ce = entropy = reverse_kl = jsd = zero
    if weights.reads("l1") or tv_r is not None:
        sign = difference.sign()
        factor = weights.share("l1", accept) * weight_r[:, None] + (0.0 if tv_r is None else 0.5 * tv_r[:, None])
        gradient = gradient + factor * p * (sign - (sign * p).sum(dim=-1, keepdim=True))
    if weights.reads("soft"):
        soft_ce = log_total - (q * logits_rV).sum(dim=-1)
        if weights.needs_entropy:
            entropy = torch.special.entr(q).sum(dim=-1)
        gradient = gradient + weights.share("soft", accept) * difference * weight_r[:, None]
    if weights.reads("reverse"):
        ratio = log_ratio(p, q)
        reverse_kl = ratio.sum(dim=-1)
        gradient = gradient + weights.share("reverse", accept) * (ratio - p * reverse_kl[:, None]) * weight_r[:, None]
    if weights.reads("middle"):
        ratio = log_ratio(p, 0.5 * (p + q))
        inner = ratio.sum(dim=-1)
        jsd = 0.5 * (inner + log_ratio(q, 0.5 * (p + q)).sum(dim=-1))
        middle = 0.5 * weights.share("middle", accept)
        gradient = gradient + middle * (ratio - p * inner[:, None]) * weight_r[:, None]
    values = RowValues(ce, soft_ce, distance, entropy, reverse_kl, jsd)
    return ChunkTerms(values, hit), gradient if differentiate else None


@cache
def compiled_chunk_terms() -> Callable[..., tuple[ChunkTerms, Tensor | None]]:
    """:func:`chunk_terms` compiled once a process."""
    return torch.compile(chunk_terms, dynamic=True)
