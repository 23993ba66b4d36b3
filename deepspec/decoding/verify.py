"""Exact verification of drafts: the committed tokens are distributed as the target alone would have produced them.

Greedy: a drafted token is accepted while it is the target's own choice. Sampling: token x, drafted from q, is accepted
with probability min(1, p(x) / q(x)); at the first rejection the token comes from the normalised positive part of p - q;
when all are accepted, one more token comes from p. The target's logits are *packed* ([T, V], row b's from
``index[b, 0]`` on: one per drafted token and one more), so that only the rows' own tokens are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VerifyResult:
    """What a round commits: ``accepted`` drafted tokens ([B]) and then ``token`` ([B])."""

    accepted: Tensor
    token: Tensor


@dataclass(frozen=True)
class Uniforms:
    """Numbers in [0, 1) for one round: float64, [B, K] to draft with, [B, K] to accept with, [B] for the last token."""

    draft: Tensor
    accept: Tensor
    last: Tensor


def verify_greedy(logits: Tensor, drafts: Tensor, index: Tensor, lengths: Tensor) -> VerifyResult:
    """Accept drafts [B, K], ``lengths`` [B] of which were sent, while they are the argmax of packed logits [T, V].

    ``index`` [B, K + 1] are the indices of each row's logits in T; after its last one any valid index.
    """
    choice = logits.argmax(-1)[index]  # [B, K + 1]
    matches = (choice[:, :-1] == drafts).cumprod(1).sum(1)
    accepted = torch.minimum(matches, lengths)  # what was not sent can only lengthen a run beyond what was
    return VerifyResult(accepted, choice.gather(1, accepted[:, None]).squeeze(1))


def verify_sampled(
    logits: Tensor,
    drafts: Tensor,
    draft_probs: Tensor,
    index: Tensor,
    lengths: Tensor,
    temperature: float,
    uniforms: Uniforms,
) -> VerifyResult:
    """Rejection sampling of drafts [B, K] from ``draft_probs`` [B, K, V] against packed target logits [T, V].

    Only the probabilities of the drafted tokens and one complete distribution a row are computed.
    """
    scaled = logits.float() / temperature
    normaliser = scaled.logsumexp(-1)  # [T]
    sent = drafts.shape[1]
    target = (scaled[index[:, :sent], drafts] - normaliser[index[:, :sent]]).exp()  # [B, K]
    drafted = draft_probs.gather(2, drafts[..., None]).squeeze(-1)
    passed = uniforms.accept[:, :sent] * drafted < target
    accepted = torch.minimum(passed.cumprod(1).sum(1), lengths)
    end = index.gather(1, accepted[:, None]).squeeze(1)
    weights = (scaled[end] - normaliser[end, None]).exp()  # [B, V], p at the first rejection or after the last draft

    if sent:
        rows = torch.arange(len(drafts), device=drafts.device)
        rejected = draft_probs[rows, accepted.clamp_max(sent - 1)]
        residual = (weights - rejected).clamp_min(0)
        # A residual of zero mass means p = q up to rounding: then the rejection itself had no probability.
        usable = (accepted < lengths) & (residual.sum(-1) > 0)
        weights = torch.where(usable[:, None], residual, weights)
    return VerifyResult(accepted, sample(weights, uniforms.last))


def sample(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One index a row from unnormalised weights [B, V] by inversion of the cumulated sum; uniforms [B] in [0, 1)."""
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    point = uniforms[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, point, right=True).squeeze(-1).clamp_max_(weights.shape[-1] - 1)
