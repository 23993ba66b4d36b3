"""One chunk of the fused head loss: its inputs, its values, its gradients; and the body that a GPU compiles.

r rows of the chunk, p target positions of it, R and P of the whole call, V vocabulary, D hidden size, M Markov rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspec.nn.frozen import FrozenHead
from deepspec.nn.products import is_fast, product

_W2_TILE = 4096  # rows of the sequential head's output matrix whose gradient is summed at a time


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of the terms of the head loss."""

    ce: float = 0.0
    soft_ce: float = 0.0
    l1: float = 0.0
    report_l1: bool = False  # the distance is wanted though its coefficient is 0 (the confidence head's label)

    @property
    def needs_target(self) -> bool:
        """Whether a term needs the target's distribution."""
        return self.soft_ce != 0.0 or self.l1 != 0.0 or self.report_l1


@dataclass(frozen=True)
class HeadInputs:
    """What a call of the head loss reads."""

    hidden_RD: Tensor
    latent: Tensor | None  # [P, M], or [R, M] where ``latent_per_row``
    w2_VM: Tensor | None
    target_PD: Tensor | None
    frozen: FrozenHead
    weights: LossWeights
    latent_per_row: bool


@dataclass(frozen=True)
class Chunk:
    """Some positions with all of their rows."""

    positions: slice  # of P
    rows: slice  # of R
    local_r: Tensor  # each row's position within the chunk
    label_r: Tensor
    weight_r: Tensor

    def latent_span(self, inputs: HeadInputs) -> slice:
        """The chunk's part of the latents."""
        return self.rows if inputs.latent_per_row else self.positions


@dataclass(frozen=True)
class ChunkTerms:
    """Values of one chunk."""

    sums: Tensor  # [3]: weighted sums of CE, soft CE, L1
    accept_r: Tensor | None
    hit_r: Tensor


class Gradients:
    """Where the closed-form gradients of a call are collected; the sum over rows, that of ``w2``, in fp32."""

    def __init__(self, inputs: HeadInputs) -> None:
        w2 = inputs.w2_VM
        self.hidden_RD = torch.zeros_like(inputs.hidden_RD)
        self.latent = None if inputs.latent is None else torch.zeros_like(inputs.latent)
        self.w2_VM = None if w2 is None else torch.zeros(w2.shape, dtype=torch.float32, device=w2.device)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32 (on the CPU a bf16 product is rounded to bf16 once)."""
    if a.dtype == torch.float32:
        return product(a, b.T)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in fp32."""
    if a.dtype == torch.float32 and not is_fast(a, b.T):
        total.addmm_(a, b)
    else:
        total.add_(matmul_fp32(a, b))


def whole_chunk(inputs: HeadInputs, chunk: Chunk, gradients: Gradients | None) -> ChunkTerms:
    """Terms and gradients of a chunk from whole logits [r, V]; the elementwise body is compiled into a few kernels."""
    head, cap, w2 = inputs.frozen.head_VD, inputs.frozen.softcap, inputs.w2_VM
    logits_rV = matmul_fp32(inputs.hidden_RD[chunk.rows].to(head.dtype), head.T)
    slope_rV = None
    if cap is not None:
        logits_rV = (logits_rV / cap).tanh()
        slope_rV, logits_rV = 1.0 - logits_rV.square(), cap * logits_rV
    if inputs.latent is not None and w2 is not None:
        bias = matmul_fp32(inputs.latent[chunk.latent_span(inputs)].to(w2.dtype), w2.T)
        logits_rV = logits_rV + (bias if inputs.latent_per_row else bias[chunk.local_r])
    target_pV = None
    if inputs.target_PD is not None:
        target_pV = matmul_fp32(inputs.target_PD[chunk.positions].to(head.dtype), head.T)
        target_pV = target_pV if cap is None else cap * (target_pV / cap).tanh()
    rows = (chunk.local_r, chunk.label_r, chunk.weight_r)
    terms, gradient_rV = compiled_chunk_terms()(logits_rV, target_pV, *rows, inputs.weights, gradients is not None)
    if gradients is not None and gradient_rV is not None:
        _collect(inputs, chunk, gradients, gradient_rV, slope_rV)
    return terms


def _collect(
    inputs: HeadInputs, chunk: Chunk, gradients: Gradients, gradient_rV: Tensor, slope_rV: Tensor | None
) -> None:
    head, w2 = inputs.frozen.head_VD, inputs.w2_VM
    d_head = gradient_rV if slope_rV is None else gradient_rV * slope_rV
    gradients.hidden_RD[chunk.rows] = (d_head.to(head.dtype) @ head).to(gradients.hidden_RD.dtype)
    if gradients.latent is None or gradients.w2_VM is None or inputs.latent is None or w2 is None:
        return
    d_bias = gradient_rV
    if not inputs.latent_per_row:
        positions = chunk.positions.stop - chunk.positions.start
        d_bias = gradient_rV.new_zeros(positions, gradient_rV.shape[1]).index_add_(0, chunk.local_r, gradient_rV)
    d_bias = d_bias.to(w2.dtype)
    span = chunk.latent_span(inputs)
    gradients.latent[span] = (d_bias @ w2).to(gradients.latent.dtype)
    latent = inputs.latent[span].to(w2.dtype)
    for start in range(0, len(w2), _W2_TILE):  # tiles: the product before its fp32 sum never grows large
        tile = slice(start, start + _W2_TILE)
        add_product(gradients.w2_VM[tile], d_bias[:, tile].T, latent)


def functional_chunk_terms(
    logits_rV: Tensor, target_pV: Tensor | None, local_r: Tensor, label_r: Tensor, weight_r: Tensor,
    weights: LossWeights, differentiate: bool,
) -> tuple[ChunkTerms, Tensor | None]:  # fmt: skip
    """(values, d(combined)/d(logits) [r, V]) without in-place passes: what torch.compile fuses; the tiles' twin."""
    p = logits_rV.softmax(dim=-1)
    log_total = logits_rV.logsumexp(dim=-1)
    label = label_r[:, None]
    at_label = logits_rV.gather(1, label)[:, 0]
    ce = log_total - at_label
    soft_ce = distance = torch.zeros_like(ce)
    gradient = weights.ce * (p - torch.zeros_like(p).scatter(1, label, 1.0))
    if target_pV is not None:
        q = target_pV.softmax(dim=-1)[local_r]
        difference = p - q
        distance = difference.abs().sum(dim=-1)
        sign = difference.sign()
        gradient = gradient + weights.l1 * p * (sign - (sign * p).sum(dim=-1, keepdim=True))
        if weights.soft_ce:
            soft_ce = log_total - (q * logits_rV).sum(dim=-1)
            gradient = gradient + weights.soft_ce * difference
    sums = torch.stack([(weight_r * term).sum() for term in (ce, soft_ce, distance)])
    accept = None if target_pV is None else 1.0 - 0.5 * distance
    hit = (at_label == logits_rV.amax(dim=-1)).float()
    return ChunkTerms(sums, accept, hit), gradient * weight_r[:, None] if differentiate else None


Body = Callable[..., tuple[ChunkTerms, Tensor | None]]
_COMPILED: list[Body] = []


def compiled_chunk_terms() -> Body:
    """:func:`functional_chunk_terms` compiled once a process."""
    if not _COMPILED:
        _COMPILED.append(torch.compile(functional_chunk_terms, dynamic=True))
    return _COMPILED[0]
