"""The candidate selector: which of a slot's likeliest tokens follows the token before it.

    S(a, b) = U(b) + <A[a] * H h, B[b]>

over the C tokens b with the largest unary logits U(b) of the slot; a the token before, h the slot's hidden state. A
block is drafted by a walk: the anchor is the first slot's a, each slot's choice the next one's. In training a is the
text's own token. B starts at zero: the walk is then that of the unary logits.

R rows, C candidates of a row, V vocabulary, V' the draft's own, D hidden size, M rank; [..] any leading shape.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.nn.cpu.matmul import Linear
from deepspec.nn.heads import FrozenHead

_START = 0.02  # standard deviation of A
CHUNK_BYTES = {"cpu": 8 << 20}  # of the head's rows of candidates that are held at a time
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

    def forward(self, hidden_D: Tensor, previous: Tensor, candidates_C: Tensor) -> Tensor:
        """What is added to the unary logits, fp32 [.., C].

        Args:
            hidden_D: [.., D].
            previous: [..], the token before each slot.
            candidates_C: [.., C], by their ids in the draft's vocabulary.
        """
        query_M = F.embedding(previous, self.predecessor_codebook) * self.hidden_projection(hidden_D)
        return (F.embedding(candidates_C, self.successor_codebook) @ query_M[..., None]).squeeze(-1).float()


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


def _chunks(head_VD: Tensor, candidates_RC: Tensor) -> list[slice]:
    R, C = candidates_RC.shape
    step = max(1, CHUNK_BYTES.get(head_VD.device.type, ACCELERATOR_BYTES) // (4 * max(1, C) * head_VD.shape[1]))
    return [slice(start, min(R, start + step)) for start in range(0, R, step)]
