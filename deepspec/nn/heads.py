"""A block drafter's small heads: a sequential (Markov) head that corrects the parallel logits, and a confidence head.

A sequential head gives a *latent* per slot; the correction of the logits is ``markov_w2 @ latent``. In training the
token before each slot is known (teacher forcing), so the latents of all slots are computed at once, except the rnn's
state, which runs over the K slots of a block.

D hidden size, R markov rank, V vocabulary (W2 has a row for each token that the draft can say); [..] any leading shape,
K slots of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec.nn.products import Linear

MARKOV_KINDS = ("vanilla", "gated", "rnn")


class OutputMatrix(Linear):
    """A linear map that also hands out its weight through ``forward``, where ZeRO-3's hooks see it and gather it."""

    def forward(self, x: Tensor | None) -> Tensor:
        """``weight @ x`` [.., R] -> [.., V]; for None the weight [V, R], a copy where ZeRO-3 will free the original."""
        if x is not None:
            return super().forward(x)
        return self.weight.clone() if hasattr(self.weight, "ds_id") else self.weight


class MarkovHead(nn.Module):
    """Low-rank bias on the logits from the token before a slot.

    - vanilla: latent = W1[x]
    - gated: latent = sigmoid(gate_proj([h; W1[x]])) * W1[x]
    - rnn: z = [s; W1[x]; h]; joint_proj(z) -> (g, c, o); s' = sig(g) s + (1 - sig(g)) tanh(c); latent = tanh(o); s_0 =
    0
    """

    def __init__(self, kind: str, vocab_size: int, rank: int, hidden_size: int, said: int | None = None) -> None:
        super().__init__()
        self.kind, self.rank = kind, rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = OutputMatrix(rank, said or vocab_size, bias=False)
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
