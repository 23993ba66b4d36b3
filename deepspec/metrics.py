"""Sums with their weights: what a loss returns, before anyone divides. And how a measured length is written.

A loss is pure: it returns sums and the weights that belong to them. Only the training loop reduces over ranks and
accumulation steps and divides, so that the loss of a step does not depend on how the step was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class WeightedSum:
    """A numerator and its denominator, summable over micro-batches and ranks."""

    total: Tensor  # scalar or vector
    weight: Tensor  # of the same shape, or a scalar

    def __add__(self, other: WeightedSum) -> WeightedSum:
        return WeightedSum(self.total + other.total, self.weight + other.weight)

    def value(self) -> Tensor:
        """total / weight, 0 where the weight is 0."""
        return self.total / self.weight.clamp_min(1e-12)


@dataclass(frozen=True)
class LossTerms:
    """Loss terms and metrics of one micro-batch.

    The loss of a step is ``sum_name coefficients[name] * sum(terms[name].total) / sum(terms[name].weight)``, the inner
    sums running over all micro-batches and ranks of the step. The weights of all terms of an algorithm are equal and
    known from the supervision alone (``LossPlan.weight``).
    """

    terms: Mapping[str, WeightedSum]
    coefficients: Mapping[str, float]
    metrics: Mapping[str, WeightedSum] = field(default_factory=dict)

    def weighted_sum(self) -> Tensor:
        """sum_name coefficient * total: the scalar to differentiate, to be divided by the step's weight."""
        parts = [self.coefficients[name] * ratio.total for name, ratio in self.terms.items()]
        return sum(parts[1:], parts[0])

    def loss(self) -> Tensor:
        """The loss of this micro-batch on its own (used by tests and the reference check)."""
        parts = [self.coefficients[name] * ratio.value() for name, ratio in self.terms.items()]
        return sum(parts[1:], parts[0])


def length_text(row: Mapping[str, Any]) -> str:
    """The accepted length of a summary's row: ``3.93 (3.71-4.15)``, ``3.93 (one prompt)``, ``none`` without rounds."""
    if row["accepted_length"] is None:
        return "none"
    if row["interval"] is None:
        alone = row["prompts"] - row.get("without_rounds", 0) == 1
        return f"{row['accepted_length']:.2f} ({'one prompt' if alone else 'no interval'})"
    low, high = row["interval"]
    return f"{row['accepted_length']:.2f} ({low:.2f}-{high:.2f})"


def equality_text(row: Mapping[str, Any]) -> str:
    """Greedy outputs of a summary's row that equal the baseline's: ``100%``, ``6% (100% or tied within rounding)``."""
    if row.get("equal_to_plain") is None:
        return ""
    equal, tied = f"{row['equal_to_plain']:.0%}", row.get("equal_or_tied")
    return equal if tied is None or tied == row["equal_to_plain"] else f"{equal} ({tied:.0%} or tied within rounding)"
