"""One chunk of the fused head loss: reused buffers and the elementwise body.

On the CPU a fresh 100 MB tensor costs ten times the arithmetic done on it (page faults), so all passes run in place
over buffers that live for the whole call. On CUDA the same body is compiled into a few kernels.

r rows of the chunk, p target positions of it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # of one fp32 buffer [r, V]
_MIN_ROWS, _MAX_ROWS = 32, 1024


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
class ChunkTerms:
    """Values of one chunk."""

    sums: Tensor  # [3]: weighted sums of CE, soft CE, L1
    accept: Tensor | None  # [r]
    hit: Tensor  # [r]
    gradient: Tensor | None  # [r, V]: d(combined)/d(logits)


class ChunkBuffers:
    """Named fp32 buffers of [rows, V], allocated once and sliced per chunk."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        limit = _CHUNK_BYTES["cuda" if device.type == "cuda" else "cpu"]
        self.max_rows = max(_MIN_ROWS, min(_MAX_ROWS, limit // (4 * vocab_size)))
        self.vocab_size, self.device = vocab_size, device
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first ``rows`` rows of buffer ``name``, contents undefined."""
        held = self._held.get((name, dtype))
        if held is None or len(held) < rows:
            size = max(rows, min(self.max_rows, rows + rows // 4))
            held = torch.empty(size, self.vocab_size, dtype=dtype, device=self.device)
            self._held[name, dtype] = held
        return held[:rows]

    def product(self, name: str, a: Tensor, weight: Tensor) -> Tensor:
        """a @ weight.T [rows, V] in fp32, in buffer ``name``."""
        if a.dtype == torch.float32:
            return torch.mm(a, weight.T, out=self.take(name, len(a)))
        if a.is_cuda:
            return torch.mm(a, weight.T, out_dtype=torch.float32)
        half = torch.mm(a, weight.T, out=self.take("half", len(a), a.dtype))
        return self.take(name, len(a)).copy_(half)

    def cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` [rows, V] in ``dtype``: itself, or a copy in buffer ``name``."""
        return x if x.dtype == dtype else self.take(name, len(x), dtype).copy_(x)

    def rows(self, name: str, source: Tensor, index: Tensor) -> Tensor:
        """source[index] in buffer ``name``."""
        return torch.index_select(source, 0, index, out=self.take(name, len(index)))

    def softcap_(self, logits: Tensor, cap: float | None, keep_slope: bool = False) -> Tensor | None:
        """c tanh(x / c) in place; returns its slope 1 - tanh^2 [rows, V] where asked for (None without a cap)."""
        if cap is None:
            return None
        logits.div_(cap).tanh_()
        slope = None
        if keep_slope:
            slope = torch.mul(logits, logits, out=self.take("slope", len(logits))).neg_().add_(1.0)
        logits.mul_(cap)
        return slope


def chunk_terms(
    logits: Tensor, target: Tensor | None, local: Tensor, label: Tensor, weight: Tensor, weights: LossWeights,
    differentiate: bool, buffers: ChunkBuffers,
) -> ChunkTerms:  # fmt: skip
    """Terms of one chunk, in place over ``logits`` [r, V] and ``target`` [p, V] (its logits); both are destroyed.

    ``local`` [r] is each row's position in the chunk. The gradient stands in one of the buffers until the next chunk.
    """
    top = logits.amax(dim=-1, keepdim=True)
    logits.sub_(top)
    at_label = logits.gather(1, label[:, None])[:, 0]  # label's logit minus the row's maximum
    q = None
    cross = torch.zeros_like(at_label)
    if target is not None:
        target.sub_(target.amax(dim=-1, keepdim=True)).exp_()
        target.div_(target.sum(dim=-1, keepdim=True))
        q = buffers.rows("scratch", target, local)
        if weights.soft_ce:
            cross = _dot(q, logits)
    total = logits.exp_().sum(dim=-1)
    p = logits.div_(total[:, None])
    ce, soft_ce = total.log() - at_label, total.log() - cross
    distance = torch.zeros_like(ce)
    if q is not None:
        difference = torch.sub(p, q, out=q)
        distance = torch.linalg.vector_norm(difference, ord=1, dim=-1)
    soft_ce = soft_ce if weights.soft_ce else torch.zeros_like(ce)
    sums = torch.stack([(weight * term).sum() for term in (ce, soft_ce, distance)])
    gradient = _gradient_(p, q, label, weight, weights, buffers) if differentiate else None
    return ChunkTerms(sums, None if q is None else 1.0 - 0.5 * distance, (at_label == 0).float(), gradient)


def _gradient_(
    p: Tensor, difference: Tensor | None, label: Tensor, weight: Tensor, weights: LossWeights, buffers: ChunkBuffers
) -> Tensor:
    """d(combined)/d(logits) [r, V] from p and p - q; both are destroyed."""
    soft = None
    if weights.soft_ce and difference is not None:
        if not (weights.l1 or weights.ce):
            return difference.mul_(weight[:, None] * weights.soft_ce)
        soft = torch.mul(difference, weights.soft_ce, out=buffers.take("soft", len(p)))
    if weights.l1 and difference is not None:
        sign = difference.sign_()
        inner = _dot(sign, p)
        gradient = sign.sub_(inner[:, None]).mul_(weights.l1).add_(weights.ce).mul_(p)
    else:
        gradient = p.mul_(weights.ce)
    gradient.scatter_add_(1, label[:, None], torch.full_like(weight[:, None], -weights.ce))
    if soft is not None:
        gradient.add_(soft)
    return gradient.mul_(weight[:, None])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot product [r] of two [r, V] without a temporary."""
    return torch.bmm(a[:, None], b[..., None])[:, 0, 0]


def functional_chunk_terms(
    logits: Tensor, target: Tensor | None, local: Tensor, label: Tensor, weight: Tensor, weights: LossWeights,
    differentiate: bool, buffers: ChunkBuffers | None = None,
) -> ChunkTerms:  # fmt: skip
    """:func:`chunk_terms` without in-place passes: what torch.compile fuses, and the in-place body's twin."""
    p = logits.softmax(dim=-1)
    log_total = logits.logsumexp(dim=-1)
    at_label = logits.gather(1, label[:, None])[:, 0]
    ce = log_total - at_label
    soft_ce = distance = torch.zeros_like(ce)
    one_hot = torch.zeros_like(p).scatter(1, label[:, None], 1.0)
    gradient = weights.ce * (p - one_hot)
    if target is not None:
        q = target.softmax(dim=-1)[local]
        difference = p - q
        distance = difference.abs().sum(dim=-1)
        sign = difference.sign()
        gradient = gradient + weights.l1 * p * (sign - (sign * p).sum(dim=-1, keepdim=True))
        if weights.soft_ce:
            soft_ce = log_total - (q * logits).sum(dim=-1)
            gradient = gradient + weights.soft_ce * difference
    sums = torch.stack([(weight * term).sum() for term in (ce, soft_ce, distance)])
    accept = None if target is None else 1.0 - 0.5 * distance
    hit = (at_label == logits.amax(dim=-1)).float()
    return ChunkTerms(sums, accept, hit, gradient * weight[:, None] if differentiate else None)


_COMPILED: list[Callable[..., ChunkTerms]] = []


def compiled_chunk_terms() -> Callable[..., ChunkTerms]:
    """:func:`functional_chunk_terms` compiled once a process."""
    if not _COMPILED:
        _COMPILED.append(torch.compile(functional_chunk_terms, dynamic=True))
    return _COMPILED[0]
