"""The candidate selector: which of a slot's likeliest tokens follows the token before it.

    S(a, b) = U(b) + <A[a] * H h, B[b]>

over the C tokens b with the largest unary logits U(b) of the slot; a the token before, h the slot's hidden state. A
block is drafted by a walk: the anchor is the first slot's a, each slot's choice the next one's. In training a is the
text's own token. B starts at zero: the walk is then that of the unary logits.

The gradients of A and B are as large as they are, though a step reads few of their rows. Held from the beginning of
backward they would be there beside all activations of the layers: :class:`LateGradients` makes them when the layers'
backward is over, out of what the rows have left.

R rows, C candidates of a row, V vocabulary, V' the draft's own, D hidden size, M rank; [..] any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.nn.cpu.matmul import Linear
from deepspec.nn.heads import FrozenHead

_START = 0.02  # standard deviation of A
CHUNK_BYTES = {"cpu": 2 << 20}  # of rows that are held at a time
ACCELERATOR_BYTES = 256 << 20  # the same on any other device


class CandidateSelector(nn.Module):
    """The codebooks A [V, M] and B [V', M], and H [M, D]."""

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(draft_vocab_size, rank))
        self.hidden_projection = Linear(hidden_size, rank, bias=False)

    def start(self, generator: torch.Generator) -> None:
        """At zero effect."""
        self.predecessor_codebook.normal_(0.0, _START, generator=generator)
        self.successor_codebook.zero_()

    def forward(
        self, hidden_D: Tensor | None, previous: Tensor, candidates_C: Tensor, late: LateGradients | None = None
    ) -> Tensor:
        """What is added to the unary logits, fp32 [.., C].

        Args:
            hidden_D: [.., D]; None: the pass before the layers, in which ``late`` begins. Both are passes of this
                module, so that ZeRO-3's hooks see every use of its parameters.
            previous: [..], the token before each slot.
            candidates_C: [.., C], by their ids in the draft's vocabulary.
            late: where the gradients of the codebooks are kept; the leading shape is then [R].
        """
        books = self.predecessor_codebook, self.successor_codebook
        if hidden_D is None:
            begun: Tensor = _Begin.apply(*books, late)
            return begun
        projected_M = self.hidden_projection(hidden_D)
        if late is not None and late.begun is not None:
            scores: Tensor = _Scores.apply(projected_M, *books, previous, candidates_C, late.begun, late)
            return scores
        query_M = F.embedding(previous, books[0]) * projected_M
        return (F.embedding(candidates_C, books[1]) @ query_M[..., None]).squeeze(-1).float()


class LateGradients:
    """The codebooks' gradients of one micro-batch, by rows until the end of backward.

    Autograd runs the node that was made first last: :meth:`begin` is called before the layers' forward.
    """

    def __init__(self) -> None:
        self.begun: Tensor | None = None  # the scores' backward leads through it to the codebooks
        self.rows: tuple[Tensor, ...] = ()  # previous_R, its gradient [R, M]; candidates, the scores' [R, C], query_RM

    @staticmethod
    def begin(selector: CandidateSelector | None) -> LateGradients | None:
        """None where there is no selector, or nothing is differentiated."""
        if selector is None or not torch.is_grad_enabled():
            return None
        late, empty = LateGradients(), torch.empty(0, dtype=torch.int64)
        late.begun = selector(None, empty, empty, late)
        return late

    def dense(self, books: tuple[torch.Size, torch.Size], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The gradients of A and B."""
        (previous_R, d_rows_RM, candidates_RC, d_RC, query_RM), self.rows = self.rows, ()
        first, second = (d_RC.new_zeros(size, dtype=dtype) for size in books)
        _add_rows(first, previous_R, lambda part: d_rows_RM[part].float())
        C, flat, d_flat = candidates_RC.shape[1], candidates_RC.flatten(), d_RC.flatten()
        _add_rows(second, flat, lambda part: query_RM[part // C].float().mul_(d_flat[part, None]))
        return first, second


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, late: LateGradients) -> Tensor:
        ctx.late, ctx.books, ctx.dtype = late, (first.shape, second.shape), first.dtype
        return first.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.late.dense(ctx.books, ctx.dtype), None


class _Scores(torch.autograd.Function):
    """The scores of rows in chunks: the candidates' rows [r, C, M] of B are read, and read again in backward."""

    @staticmethod
    def forward(
        ctx: Any, projected_RM: Tensor, first: Tensor, second: Tensor, previous_R: Tensor, candidates_RC: Tensor,
        begun: Tensor, late: LateGradients,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(projected_RM, first, second, previous_R, candidates_RC)
        ctx.late, ctx.begun = late, torch.zeros_like(begun)
        query_RM, scores = first[previous_R] * projected_RM, []
        for rows in _chunks(second, candidates_RC):
            scores.append((second[candidates_RC[rows]] @ query_RM[rows, :, None]).squeeze(-1).float())
        return torch.cat(scores) if scores else query_RM.new_zeros(candidates_RC.shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor | None, ...]:
        projected_RM, first, second, previous_R, candidates_RC = ctx.saved_tensors
        known_RM, d_query_RM = first[previous_R], torch.empty_like(projected_RM)
        d_RC = grad_RC.to(second.dtype)
        for rows in _chunks(second, candidates_RC):
            d_query_RM[rows] = (d_RC[rows, None] @ second[candidates_RC[rows]]).squeeze(1)
        ctx.late.rows = previous_R, d_query_RM * projected_RM, candidates_RC, d_RC, known_RM * projected_RM
        return d_query_RM.mul_(known_RM), None, None, None, None, ctx.begun, None


def _add_rows(total: Tensor, index_E: Tensor, of_part: Callable[[Tensor], Tensor]) -> None:
    """total[index[e]] += row e, in chunks in the order of the index: equal ones are summed in fp32 first.

    Args:
        of_part: rows [n, M] fp32 by their numbers [n].
    """
    order = index_E.argsort(stable=True)
    step = max(1, _chunk_bytes(total.device) // (4 * total.shape[1]))
    for start in range(0, len(order), step):
        part = order[start : start + step]
        index = index_E[part]
        place = F.pad((index[1:] != index[:-1]).long().cumsum(0), (1, 0))  # of each row among the distinct ones
        summed = torch.ops.aten.embedding_dense_backward(of_part(part), place, len(part), -1, False)
        target = index[:1].expand(len(part)).scatter(0, place, index)  # rows beyond the distinct ones are zero
        total.index_add_(0, target, summed.to(total.dtype))


def candidate_logits(hidden_RD: Tensor, frozen: FrozenHead, candidates_RC: Tensor) -> Tensor:
    """The unary logits of ``candidates`` alone, fp32 [R, C], with gradients for ``hidden``."""
    logits: Tensor = _CandidateLogits.apply(hidden_RD, frozen.head_VD, candidates_RC)
    return logits if frozen.softcap is None else frozen.softcap * (logits / frozen.softcap).tanh()


class _CandidateLogits(torch.autograd.Function):
    """The head's rows [r, C, D] of a chunk are gathered, and gathered again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, head_VD: Tensor, candidates_RC: Tensor) -> Tensor:
        ctx.save_for_backward(head_VD, candidates_RC)
        ctx.dtype = hidden_RD.dtype
        logits = torch.empty(candidates_RC.shape, dtype=torch.float32, device=hidden_RD.device)
        for rows in _chunks(head_VD, candidates_RC):
            head_rCD = head_VD[candidates_RC[rows]].float()
            logits[rows] = (head_rCD @ hidden_RD[rows].to(head_VD.dtype).float()[..., None]).squeeze(-1)
        return logits

    @staticmethod
    def backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor, None, None]:
        head_VD, candidates_RC = ctx.saved_tensors
        d_hidden = torch.empty(len(grad_RC), head_VD.shape[1], dtype=ctx.dtype, device=grad_RC.device)
        for rows in _chunks(head_VD, candidates_RC):
            head_rCD = head_VD[candidates_RC[rows]].float()
            d_hidden[rows] = (grad_RC[rows, None] @ head_rCD).squeeze(1).to(ctx.dtype)
        return d_hidden, None, None


def _chunks(table_VD: Tensor, candidates_RC: Tensor) -> list[slice]:
    R, C = candidates_RC.shape
    step = max(1, _chunk_bytes(table_VD.device) // (4 * max(1, C) * table_VD.shape[1]))
    return [slice(start, min(R, start + step)) for start in range(0, R, step)]


def _chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, ACCELERATOR_BYTES)
