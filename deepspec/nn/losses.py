"""The fused head loss: everything between a draft's hidden states and its loss terms, without holding logits.

The output head is frozen, so its weight needs no gradient: the supervised rows are taken in chunks; of each chunk both
logits, all terms and the closed-form gradient with respect to the rows' hidden states and the Markov head's factors
are computed, and only the gradients are kept. Rows come sorted by target position: the target's logits and, with a
vanilla Markov head, the bias are computed once per position.

    z = softcap(head h) + W2 latent,  p = softmax(z),  q = softmax(softcap(head h_target))

:mod:`deepspec.nn.loss_table` has the losses of p, q and the label by name, :mod:`deepspec.nn.chains` what couples the
slots of a chain: D-PACE's weights and end-to-end TV. Those are known only when all rows of a chain are, and the rows
come in chunks. Where one factor a row turns what was computed into what is wanted (D-PACE; end-to-end TV over L1 or
TV), the gradients of rows are computed without weights and scaled afterwards. Else (a sequential head's factors, whose
gradients are sums over rows; end-to-end TV beside another direction) a first pass finds the rows' values, a second one
the gradients.

Here: what a caller gives and gets, the cut into chunks, autograd. One chunk's computation: on a GPU
:mod:`deepspec.nn.loss_chunk`, on a CPU :mod:`deepspec.nn.cpu.tiles`.

R supervised rows, P distinct target positions, V vocabulary, D hidden size, M Markov rank.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepspec.metrics import LossTerms, WeightedSum
from deepspec.nn.chains import ChainedRows, Chains, chained_rows
from deepspec.nn.cpu.tiles import TileBuffers, TiledChunk
from deepspec.nn.heads import FrozenHead
from deepspec.nn.loss_chunk import Chunk, Gradients, HeadInputs, Markov, compute_chunk
from deepspec.nn.loss_table import LOSSES, LossWeights, RowValues


@dataclass(frozen=True)
class HeadRows:
    """The supervised rows of a micro-batch, sorted by target position. Planned on the CPU, then moved."""

    position_R: Tensor  # index of the row's target position in 0..P-1, ascending
    weight_R: Tensor  # fp32
    label_R: Tensor  # the token to predict
    starts: tuple[int, ...]  # first row of each position, and R: P + 1 numbers
    tv_R: Tensor | None = None  # coefficient of each row's TV beside the terms (deepspec.nn.chains)

    @staticmethod
    def plan(position_R: Tensor, weight_R: Tensor) -> HeadRows:
        """Rows without labels from CPU tensors; ``position_R`` must be ascending and without gaps."""
        counts = torch.bincount(position_R) if len(position_R) else position_R.new_zeros(0)
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return HeadRows(position_R, weight_R.float(), torch.zeros_like(position_R), tuple(starts.tolist()))

    def kept(self, keep_R: Tensor) -> tuple[HeadRows, Tensor]:
        """The rows where ``keep`` [R] bool, still without labels, and which of the P positions they have."""
        distinct, position_R = torch.unique_consecutive(self.position_R[keep_R], return_inverse=True)
        return HeadRows.plan(position_R, self.weight_R[keep_R]), distinct

    def with_labels(self, label_R: Tensor) -> HeadRows:
        """The same rows on the device of ``label_R`` [R] int64."""
        device = label_R.device
        return replace(self, position_R=self.position_R.to(device), weight_R=self.weight_R.to(device), label_R=label_R)

    def with_tokens(self, draft_id_R: Tensor, in_vocab_R: Tensor | None) -> HeadRows:
        """The same rows with labels as :meth:`DraftModel.draft_ids` gives them.

        A token outside the draft's vocabulary teaches nothing, and no draft of it is accepted: its row weighs nothing.
        """
        rows = self.with_labels(draft_id_R)
        return rows if in_vocab_R is None else replace(rows, weight_R=rows.weight_R * in_vocab_R)

    def chunks(self, max_rows: int) -> Iterator[Chunk]:
        """Chunks of at most ``max_rows`` rows (more where one position has more), cut between positions."""
        first = 0
        while first < len(self.starts) - 1:
            last = max(first + 1, bisect_right(self.starts, self.starts[first] + max_rows) - 1)
            rows = slice(self.starts[first], self.starts[last])
            local_r = self.position_R[rows] - first
            tv_r = None if self.tv_R is None else self.tv_R[rows]
            yield Chunk(slice(first, last), rows, local_r, self.label_R[rows], self.weight_R[rows], tv_r)
            first = last


@dataclass(frozen=True)
class HeadLoss:
    """What the fused head loss returns."""

    combined: Tensor  # scalar, fp32, differentiable: sum over terms of coefficient * weighted sum over rows
    weights: LossWeights
    sums: dict[str, Tensor]  # detached weighted sums of the terms of the loss, and of l1 where it is to be reported
    rows: RowValues  # detached, of each row without its weight
    weight_R: Tensor  # of each row in the sums: as given, times D-PACE's
    accept_R: Tensor | None  # detached a of each row; None without a target distribution
    hit_R: Tensor  # detached 0/1: the label is the draft's most likely token
    candidates_RC: Tensor  # each row's C likeliest tokens, the likeliest first

    @property
    def measured_R(self) -> Tensor:
        """What acceptance is told by: a; without a target's distribution the hits. 0 of a row that weighs nothing."""
        return (self.hit_R if self.accept_R is None else self.accept_R) * (self.weight_R > 0)

    def terms(self, weight: Tensor, metrics: Mapping[str, WeightedSum]) -> LossTerms:
        """The loss as one term, with every term's mean beside ``metrics``."""
        means = {name: WeightedSum(total, weight) for name, total in self.sums.items()}
        used = self.weights.used
        name = next(iter(used)) if set(used.values()) == {1.0} and len(used) == 1 else "head"
        means.pop(name, None)
        return LossTerms({name: WeightedSum(self.combined, weight)}, {name: 1.0}, {**metrics, **means})


def head_loss(
    hidden_RD: Tensor,
    frozen: FrozenHead,
    rows: HeadRows,
    weights: LossWeights,
    target_hidden_PD: Tensor | None = None,
    latent: Tensor | None = None,
    w2_VM: Tensor | None = None,
    backend: str = "auto",
    chains: Chains | None = None,
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
        chains: which rows form a chain, where the weights or a term ask for it.
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
    call = _Call(inputs, rows, chains, differentiate, backend)
    combined, sums, values, hit, weight_R, top = _HeadLoss.apply(hidden_RD, latent, w2_VM, call)
    compared = target_hidden_PD is not None
    found = RowValues(*values)
    totals = dict(zip(weights.reported, sums, strict=False))
    return HeadLoss(combined, weights, totals, found, weight_R, found.accept if compared else None, hit, top)


@dataclass(frozen=True)
class _Call:
    """All that a call of the head loss is about."""

    inputs: HeadInputs
    rows: HeadRows
    chains: Chains | None
    differentiate: bool
    backend: str

    def run(self) -> tuple[RowValues, Tensor, Gradients | None, Tensor, ChainedRows]:
        """(values of the rows, hits, gradients, candidates, weights of the rows)."""
        weights, chains, rows = self.inputs.weights, self.chains, self.rows
        if chains is None or (chains.d_pace is None and not weights.e2e_tv):
            if weights.e2e_tv:
                raise TypeError("end-to-end TV needs chains")
            return *self._pass(), ChainedRows(
                rows.weight_R, torch.zeros_like(rows.weight_R), rows.weight_R.new_zeros(())
            )
        scaled = self.inputs.markov is None and (not weights.e2e_tv or weights.only_l1)
        if scaled or not self.differentiate:
            bare = LossWeights(l1=1.0) if weights.e2e_tv and self.differentiate else weights
            ones = replace(rows, weight_R=torch.ones_like(rows.weight_R))
            values, hit, gradients, top = replace(self, inputs=replace(self.inputs, weights=bare), rows=ones)._pass()
            chained = chained_rows(values, rows.weight_R, chains, bool(weights.e2e_tv))
            if gradients is not None:
                gradients.scale_rows(self._factor(chained))
            return values, hit, gradients, top, chained
        target = self.inputs.target_PD if weights.e2e_tv else None
        known = replace(self.inputs, weights=LossWeights(), target_PD=target)
        values, *_ = replace(self, inputs=known, differentiate=False)._pass()
        chained = chained_rows(values, rows.weight_R, chains, bool(weights.e2e_tv))
        tv_R = weights.e2e_tv * chained.tv_R if weights.e2e_tv else None
        return *replace(self, rows=replace(rows, weight_R=chained.weight_R, tv_R=tv_R))._pass(), chained

    def _factor(self, chained: ChainedRows) -> Tensor:
        """Of each row's gradient that was computed without weights."""
        weights = self.inputs.weights
        if not weights.e2e_tv:
            return chained.weight_R
        return weights.share("l1", chained.weight_R) * chained.weight_R + 0.5 * weights.e2e_tv * chained.tv_R

    def _pass(self) -> tuple[RowValues, Tensor, Gradients | None, Tensor]:
        """Once through all chunks."""
        hidden = self.inputs.hidden_RD
        buffers = TileBuffers(self.inputs.frozen.head_VD.shape[0], hidden.device)
        gradients = Gradients(self.inputs) if self.differentiate else None
        values = torch.zeros(len(RowValues._fields), len(hidden), dtype=torch.float32, device=hidden.device)
        hit = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        top = torch.zeros(len(hidden), self.inputs.candidates, dtype=torch.int64, device=hidden.device)
        for chunk in self.rows.chunks(buffers.max_rows):
            if self.backend == "compiled":
                terms = compute_chunk(self.inputs, chunk, gradients)
            else:
                terms = TiledChunk(self.inputs, chunk, buffers).run(gradients)
            values[:, chunk.rows] = torch.stack(terms.values)
            hit[chunk.rows] = terms.hit_r
            if terms.candidates_rC is not None:
                top[chunk.rows] = terms.candidates_rC
        return RowValues(*values), hit, gradients, top


class _HeadLoss(torch.autograd.Function):
    """The gradients are computed with the values; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, latent: Tensor | None, w2: Tensor | None, call: _Call) -> tuple[Tensor, ...]:
        values, hit, gradients, top, chained = call.run()
        ctx.gradients = None if gradients is None else gradients.finished()
        weights, sums = call.inputs.weights, []
        combined = hidden.new_zeros((), dtype=torch.float32)
        for name in weights.reported:
            value = LOSSES[name].value
            sums.append(chained.e2e_tv if value is None else (chained.weight_R * value(values)).sum())
            combined = combined + getattr(weights, name) * sums[-1]
        results = torch.stack([*sums, combined]), torch.stack(values), hit, chained.weight_R.clone(), top
        ctx.mark_non_differentiable(*results)
        return combined, *results

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place and returned: one backward a forward
        return (*(None if x is None else x.mul_(grad.to(x.dtype)) for x in gradients), None)
