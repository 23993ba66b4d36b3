"""The table of losses that every drafter's ``draft.loss`` names: value, closed-form gradient, source.

Of a supervised slot with draft logits z: p = softmax(z) the draft's distribution, q the target's, a = sum_v min(p, q)
the probability that the target accepts the draft. A loss is a function of few numbers of a row (:class:`RowValues`),
and its gradient d/dz a combination of few directions, with factors that are constants or depend on a alone:

    hard        p - onehot(label)
    soft        p - q
    l1          p (s - <s, p>),  s = sign(p - q)
    reverse     p (g - <g, p>),  g = log p - log q
    middle      p (g - <g, p>) / 2,  g = log p - log m,  m = (p + q) / 2

So :mod:`deepspec.nn.loss_chunk` and :mod:`deepspec.nn.cpu.tiles` know values and directions, and no loss by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspec.errors import RecipeError, nearest

Share = float | Callable[[Tensor], Tensor]  # the factor of a direction: a constant, or a function of a
LEAST_ACCEPTED = 1e-5  # nla: below it the gradient, 1 / a, is cut off


class RowValues(NamedTuple):
    """What a kernel computes of each row, [R] each; zeros where no loss of the call reads it."""

    ce: Tensor  # -log p[label]
    soft_ce: Tensor  # -sum q log p
    distance: Tensor  # sum |p - q|
    entropy: Tensor  # -sum q log q
    reverse_kl: Tensor  # sum p (log p - log q)
    jsd: Tensor  # KL(p || m) / 2 + KL(q || m) / 2

    @property
    def accept(self) -> Tensor:
        """a: sum min(p, q) = 1 - |p - q| / 2."""
        return 1.0 - 0.5 * self.distance


@dataclass(frozen=True)
class Loss:
    """One row of the table."""

    formula: str
    source: str
    value: Callable[[RowValues], Tensor] | None  # None: of a chain of slots (deepspec.nn.chains)
    compares: bool = True  # with the target's distribution
    hard: Share = 0.0
    soft: Share = 0.0
    l1: Share = 0.0
    reverse: Share = 0.0
    middle: Share = 0.0


def _kl(row: RowValues) -> Tensor:
    return row.soft_ce - row.entropy


def _trust(accept: Tensor) -> Tensor:
    """The share of KL in ``lk_hybrid``, which falls as the draft is accepted."""
    return torch.exp(-3.0 * accept)


def _lk_hybrid(row: RowValues) -> Tensor:
    trust = _trust(row.accept)
    return trust * _kl(row) + (1.0 - trust) * 0.5 * row.distance


def _nla_slope(accept: Tensor) -> Tensor:
    return torch.where(accept > LEAST_ACCEPTED, 0.5 / accept.clamp_min(LEAST_ACCEPTED), 0.0)


LOSSES: dict[str, Loss] = {
    "ce": Loss("-log p[label]", "the DFlash paper", lambda row: row.ce, compares=False, hard=1.0),
    "soft_ce": Loss("-sum q log p", "the Eagle3 paper; its gradient is that of kl", lambda row: row.soft_ce, soft=1.0),
    "kl": Loss("sum q (log q - log p)", "P-EAGLE, arXiv 2602.01469; JetSpec", _kl, soft=1.0),
    "reverse_kl": Loss("sum p (log p - log q)", "kl the other way round", lambda row: row.reverse_kl, reverse=1.0),
    "jsd": Loss(
        "half of sum p (log p - log m) + q (log q - log m), m = (p + q) / 2", "both ways, bounded by log 2",
        lambda row: row.jsd, middle=1.0,
    ),
    "l1": Loss("sum abs(p - q) = 2 tv", "the DSpark paper", lambda row: row.distance, l1=1.0),
    "tv": Loss("1 - a", "half of l1", lambda row: 0.5 * row.distance, l1=0.5),
    "nla": Loss(
        "-log max(a, 1e-5)", "the acceptance's logarithm",
        lambda row: -row.accept.clamp_min(LEAST_ACCEPTED).log(), l1=_nla_slope,
    ),
    "lk_hybrid": Loss(
        "c kl + (1 - c) tv, c = exp(-3 a) without gradient", "arXiv 2602.23881", _lk_hybrid, soft=_trust,
        l1=lambda accept: 0.5 - 0.5 * _trust(accept),
    ),
    "e2e_tv": Loss("1 - mean over a chain's slots k of a_1 .. a_k", "AngelSpec", None),
}  # fmt: skip
DIRECTIONS = ("hard", "soft", "l1", "reverse", "middle")


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One entry of ``draft.loss``."""

    name: str  # of the table of losses in docs/algorithms.md
    weight: float = 1.0  # its factor in the loss

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise RecipeError("no such loss", key="name", found=self.name, remedy=nearest(self.name, LOSSES))
        if not self.weight > 0:
            raise RecipeError("value out of range", key="weight", found=self.weight, wanted="above 0")


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of the terms of the head loss, by the names of the table."""

    ce: float = 0.0
    soft_ce: float = 0.0
    l1: float = 0.0
    report_l1: bool = False  # the distance is wanted though its coefficient is 0 (the confidence head's label)
    kl: float = 0.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    tv: float = 0.0
    nla: float = 0.0
    lk_hybrid: float = 0.0
    e2e_tv: float = 0.0

    @staticmethod
    def of(terms: Iterable[LossTerm]) -> LossWeights:
        """The weights of a ``draft.loss``.

        Raises:
            RecipeError: no term, or one twice.
        """
        weights: dict[str, Any] = {}
        for term in terms:
            if term.name in weights:
                raise RecipeError("a loss twice", key="loss", found=term.name, remedy="give it one weight")
            weights[term.name] = term.weight
        if not weights:
            raise RecipeError("no loss", key="loss", found=[], wanted="at least one term, or null")
        return LossWeights(**weights)

    @property
    def used(self) -> dict[str, float]:
        """The terms with a weight."""
        return {name: weight for name in LOSSES if (weight := getattr(self, name))}

    @property
    def needs_target(self) -> bool:
        """Whether a term needs the target's distribution."""
        return self.report_l1 or any(LOSSES[name].compares for name in self.used)

    @property
    def needs_entropy(self) -> bool:
        """Whether a term needs the entropy of the target's distribution."""
        return self.kl != 0.0 or self.lk_hybrid != 0.0

    @property
    def only_l1(self) -> bool:
        """Whether every row's gradient is the direction ``l1`` times a constant."""
        rows = [LOSSES[name] for name in self.used]
        others = [getattr(row, one) for row in rows for one in DIRECTIONS if one != "l1"]
        return not any(others) and not any(callable(row.l1) for row in rows)

    @property
    def reported(self) -> tuple[str, ...]:
        """The terms whose mean is told: those of the loss, and L1 where it is wanted."""
        return tuple(name for name in LOSSES if name in self.used or (name == "l1" and self.report_l1))

    def reads(self, direction: str) -> bool:
        """Whether the gradient has a part along ``direction``."""
        return any(getattr(LOSSES[name], direction) for name in self.used)

    def share(self, direction: str, accept: Tensor) -> float | Tensor:
        """The factor of ``direction`` in the gradient of rows with acceptance ``accept``: a number where it is one."""
        total: float | Tensor = 0.0
        for name, weight in self.used.items():
            part: Share = getattr(LOSSES[name], direction)
            if callable(part):
                total = total + weight * part(accept)
            elif part:
                total = total + weight * part
        return total


def log_ratio(p: Tensor, other: Tensor) -> Tensor:
    """p (log p - log other), elementwise; 0 where p is 0, and ``other`` counts as at least the least normal number."""
    least = torch.finfo(other.dtype).tiny
    return torch.special.xlogy(p, p) - torch.special.xlogy(p, other.clamp_min(least))
