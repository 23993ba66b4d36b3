"""The fused head loss: everything between a draft's hidden states and its loss terms, without holding logits.

The output head is frozen, so its weight needs no gradient: the supervised rows are taken in chunks; of each chunk both
logits, all terms and the closed-form gradient with respect to the rows' hidden states and the Markov head's factors
are computed, and only the gradients are kept. Rows come sorted by target position: the target's logits and, with a
vanilla Markov head, the bias are computed once per position.

    z = softcap(head h) + W2 latent,  p = softmax(z),  q = softmax(softcap(head h_target))
    CE = -log p[label]              dCE/dz     = p - onehot(label)
    soft CE = -sum_v q log p        dsoftCE/dz = p - q
    L1 = sum_v |p - q|              dL1/dz     = p (s - <s, p>),  s = sign(p - q)
    acceptance rate c* = 1 - L1 / 2 (no gradient)

Here: what a caller gives and gets, the cut into chunks, autograd. One chunk's computation: on a GPU
:mod:`deepspec.nn.loss_chunk`, on a CPU :mod:`deepspec.nn.cpu.tiles`.

R supervised rows, P distinct target positions, V vocabulary, D hidden size, M Markov rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepspec.nn.cpu.tiles import TileBuffers, TiledChunk
from deepspec.nn.heads import FrozenHead
from deepspec.nn.loss_chunk import Chunk, Gradients, HeadInputs, LossWeights, Markov, compute_chunk


@dataclass(frozen=True)
class HeadRows:
    """The supervised rows of a micro-batch, sorted by target position. Planned on the CPU, then moved."""

    position_R: Tensor  # index of the row's target position in 0..P-1, ascending
    weight_R: Tensor  # fp32
    label_R: Tensor  # the token to predict
    starts: tuple[int, ...]  # first row of each position, and R: P + 1 numbers

    @staticmethod
    def plan(position_R: Tensor, weight_R: Tensor) -> HeadRows:
        """Rows without labels from CPU tensors; ``position_R`` must be ascending and without gaps."""
        counts = torch.bincount(position_R) if len(position_R) else position_R.new_zeros(0)
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return HeadRows(position_R, weight_R.float(), torch.zeros_like(position_R), tuple(starts.tolist()))

    def with_labels(self, label_R: Tensor) -> HeadRows:
        """The same rows on the device of ``label_R`` [R] int64."""
        device = label_R.device
        return replace(self, position_R=self.position_R.to(device), weight_R=self.weight_R.to(device), label_R=label_R)

    def chunks(self, max_rows: int) -> Iterator[Chunk]:
        """Chunks of at most ``max_rows`` rows (more where one position has more), cut between positions."""
        first = 0
        while first < len(self.starts) - 1:
            last = first + 1
            while last < len(self.starts) - 1 and self.starts[last + 1] - self.starts[first] <= max_rows:
                last += 1
            rows = slice(self.starts[first], self.starts[last])
            local_r = self.position_R[rows] - first
            yield Chunk(slice(first, last), rows, local_r, self.label_R[rows], self.weight_R[rows])
            first = last


@dataclass(frozen=True)
class HeadLoss:
    """What the fused head loss returns."""

    combined: Tensor  # scalar, fp32, differentiable: sum over rows of weight * (ce CE + soft_ce softCE + l1 L1)
    sums: dict[str, Tensor]  # detached weighted sums of the terms that were computed
    accept_R: Tensor | None  # detached c* of each row; None without a target distribution
    hit_R: Tensor  # detached 0/1: the label is the draft's most likely token
    candidates_RC: Tensor  # each row's C likeliest tokens, the likeliest first


def head_loss(
    hidden_RD: Tensor,
    frozen: FrozenHead,
    rows: HeadRows,
    weights: LossWeights,
    target_hidden_PD: Tensor | None = None,
    latent: Tensor | None = None,
    w2_VM: Tensor | None = None,
    backend: str = "auto",
    candidates: int = 0,
) -> HeadLoss:
    """Loss terms of the supervised rows with gradients for ``hidden_RD``, ``latent`` and ``w2_VM``.

    Args:
        hidden_RD: the draft's normed hidden states.
        frozen: the target's head (reduced to the draft's vocabulary where there is one).
        rows: labels, weights and target positions.
        weights: coefficients of the terms; a term with coefficient 0 and no gradient may still be reported.
        target_hidden_PD: the target's last hidden states; None where no term needs the target distribution.
        latent: of the Markov head: [P, M] where it depends on the position's token alone, else [R, M].
        w2_VM: the Markov head's output matrix.
        backend: "tiled" (in place, tile by tile of the vocabulary), "compiled" (torch.compile of the elementwise part)
            or "auto" (compiled on CUDA, else tiled; the environment variable DEEPSPEC_LOSS overrides).
        candidates: C, how many of each row's likeliest tokens are wanted.
    """
    if backend == "auto":
        backend = os.environ.get("DEEPSPEC_LOSS") or ("compiled" if hidden_RD.is_cuda else "tiled")
    learns = any(x is not None and x.requires_grad for x in (hidden_RD, latent, w2_VM))
    differentiate = torch.is_grad_enabled() and learns
    markov = None
    if latent is not None and w2_VM is not None:
        per_row = len(latent) == len(hidden_RD) != len(rows.starts) - 1
        markov = Markov(latent.detach(), w2_VM.detach(), per_row)
    inputs = HeadInputs(hidden_RD.detach(), markov, target_hidden_PD, frozen, weights, candidates)
    combined, sums, accept, hit, top = _HeadLoss.apply(hidden_RD, latent, w2_VM, inputs, rows, differentiate, backend)
    compared = target_hidden_PD is not None
    computed = {"ce": True, "soft_ce": bool(weights.soft_ce) and compared, "l1": compared}
    terms = {name: total for (name, known), total in zip(computed.items(), sums, strict=True) if known}
    return HeadLoss(combined, terms, accept if compared else None, hit, top)


class _HeadLoss(torch.autograd.Function):
    """The gradients are computed with the values; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, latent: Tensor | None, w2: Tensor | None, inputs: HeadInputs, rows: HeadRows,
        differentiate: bool, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        buffers = TileBuffers(inputs.frozen.head_VD.shape[0], hidden.device)
        gradients = Gradients(inputs) if differentiate else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        accept = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        hit = torch.zeros_like(accept)
        candidates = torch.zeros(len(hidden), inputs.candidates, dtype=torch.int64, device=hidden.device)
        for chunk in rows.chunks(buffers.max_rows):
            if backend == "compiled":
                terms = compute_chunk(inputs, chunk, gradients)
            else:
                terms = TiledChunk(inputs, chunk, buffers).run(gradients)
            sums += terms.sums
            hit[chunk.rows] = terms.hit_r
            if terms.accept_r is not None:
                accept[chunk.rows] = terms.accept_r
            if terms.candidates_rC is not None:
                candidates[chunk.rows] = terms.candidates_rC
        del buffers  # before the last copies
        ctx.gradients = None if gradients is None else gradients.finished()
        ctx.mark_non_differentiable(sums, accept, hit, candidates)
        weights = inputs.weights
        combined = weights.ce * sums[0] + weights.soft_ce * sums[1] + weights.l1 * sums[2]
        return combined, sums, accept, hit, candidates

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place and returned: one backward a forward
        return (*(None if x is None else x.mul_(grad.to(x.dtype)) for x in gradients), None, None, None, None)
