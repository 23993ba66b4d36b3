"""The heads of a draft: the target's own, frozen; a sequential (Markov) head that corrects its logits; confidence.

D hidden size, V vocabulary, R rank of the Markov head, K slots of a block; [..] any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.nn.cpu.matmul import Linear, linear


@dataclass(frozen=True)
class FrozenHead:
    """The target's embedding and output head, frozen, as a draft uses them.

    They are no parameters of the draft: no optimizer, gradient, checkpoint or ZeRO partition ever touches them, and all
    drafts of a process share the target's storage. A draft folder may carry them; see ``deepspec.drafts``.

    Args:
        embed_VD: the embedding matrix.
        head_VD: the output head.
        embed_scale: factor between a row and its token's embedding (Gemma: sqrt(D)).
        softcap: c of the final logits c * tanh(x / c), or None.
        target_VD: the target's output head where ``head_VD`` is one that the draft trained for itself.
    """

    embed_VD: Tensor
    head_VD: Tensor
    embed_scale: float = 1.0
    softcap: float | None = None
    target_VD: Tensor | None = None

    @property
    def teacher_VD(self) -> Tensor:
        """The head of the distribution that the draft is compared with."""
        return self.head_VD if self.target_VD is None else self.target_VD

    def embed(self, tokens: Tensor) -> Tensor:
        """[..] int64 -> [.., D], scaled as the target scales."""
        rows = F.embedding(tokens, self.embed_VD)
        if self.embed_scale == 1.0:
            return rows
        return rows * torch.tensor(self.embed_scale, dtype=rows.dtype)  # a number of the host's: no copy to wait for

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FrozenHead:
        """The same head on ``device`` in ``dtype``; shares storage where nothing changes."""
        teacher = None if self.target_VD is None else self.target_VD.to(device, dtype)
        embed, head = self.embed_VD.to(device, dtype), self.head_VD.to(device, dtype)
        return replace(self, embed_VD=embed, head_VD=head, target_VD=teacher)

    def scaled(self, factor: float) -> FrozenHead:
        """The head whose logits are ``factor`` times as large, before the softcap: another matrix, or itself for 1."""
        if factor == 1.0:
            return self
        teacher = None if self.target_VD is None else self.target_VD * factor
        return replace(self, head_VD=self.head_VD * factor, target_VD=teacher)

    def reduced(self, draft_vocab: Tensor | None) -> FrozenHead:
        """The head over the tokens ``draft_vocab`` [V'] int64; itself where it is None."""
        if draft_vocab is None:
            return self
        teacher = None if self.target_VD is None else self.target_VD[draft_vocab]
        return replace(self, head_VD=self.head_VD[draft_vocab], target_VD=teacher)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] -> softcapped logits [.., V]."""
        logits = linear(hidden.to(self.head_VD.dtype), self.head_VD)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class OutputMatrix(Linear):
    """A linear map that also returns its weight through ``forward``, where ZeRO-3's hooks see it and gather it."""

    def forward(self, x: Tensor | None) -> Tensor:
        """``weight @ x`` [.., R] -> [.., V]; for None the weight [V, R], a copy where ZeRO-3 will free the original."""
        if x is not None:
            return super().forward(x)
        return self.weight.clone() if hasattr(self.weight, "ds_id") else self.weight


class MarkovHead(nn.Module):
    """Low-rank bias W2 @ latent on the logits, from the token x before a slot and the slot's hidden state h.

    - vanilla: latent = W1[x]
    - gated: latent = sigmoid(gate_proj([h; W1[x]])) * W1[x]
    - rnn: joint_proj([s; W1[x]; h]) -> (g, c, o); latent = tanh(o); s' = sig(g) s + (1 - sig(g)) tanh(c), at first 0

    In training the token before each slot is known (teacher forcing), so the latents of all slots are computed at once,
    except the rnn's state, which runs over the K slots of a block. W2 has a row for each of the ``draft_vocab_size``
    tokens that the draft proposes from, by default all.
    """

    def __init__(
        self, kind: str, vocab_size: int, rank: int, hidden_size: int, draft_vocab_size: int | None = None
    ) -> None:
        super().__init__()
        self.kind, self.rank = kind, rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = OutputMatrix(rank, draft_vocab_size or vocab_size, bias=False)
        if kind == "gated":
            self.gate_proj = Linear(hidden_size + rank, rank)
        elif kind == "rnn":
            self.joint_proj = Linear(hidden_size + 2 * rank, 3 * rank)

    @property
    def depends_on_hidden(self) -> bool:
        """Whether the latent depends on the slot's hidden state, not on the token alone."""
        return self.kind != "vanilla"

    def latents(self, embedded_KR: Tensor, hidden_KD: Tensor) -> Tensor:
        """Latents [.., K, R] of the K slots of blocks, from W1[x] of their previous tokens and their hidden states."""
        if self.kind != "rnn":
            return self.step(embedded_KR, hidden_KD, None)[0]
        state, outs = None, []
        for k in range(embedded_KR.shape[-2]):
            out, state = self.step(embedded_KR[..., k, :], hidden_KD[..., k, :], state)
            outs.append(out)
        return torch.stack(outs, dim=-2)

    def step(self, embedded_R: Tensor, hidden_D: Tensor, state_R: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(latent, next state) of one slot; the state is None but for the rnn."""
        if self.kind == "vanilla":
            return embedded_R, None
        if self.kind == "gated":
            return self.gate_proj(torch.cat((hidden_D, embedded_R), dim=-1)).sigmoid() * embedded_R, None
        state_R = torch.zeros_like(embedded_R) if state_R is None else state_R
        gate, candidate, out = self.joint_proj(torch.cat((state_R, embedded_R, hidden_D), dim=-1)).chunk(3, dim=-1)
        gate = gate.sigmoid()
        return out.tanh(), gate * state_R + (1 - gate) * candidate.tanh()


class ConfidenceHead(nn.Module):
    """One logit per slot: will the target accept this slot, given that it accepted the ones before?"""

    def __init__(self, hidden_size: int, markov_rank: int) -> None:
        super().__init__()
        self.proj = Linear(hidden_size + markov_rank, 1)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """[.., D] and W1[x] [.., R] (None without Markov features) -> logits [..], fp32."""
        joined = hidden if embedded is None else torch.cat((hidden, embedded.to(hidden.dtype)), dim=-1)
        return self.proj(joined).squeeze(-1).float()
