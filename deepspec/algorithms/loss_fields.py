"""What a recipe says of the loss: the same two keys for every drafter."""

from __future__ import annotations

from dataclasses import dataclass

from deepspec.errors import RecipeError
from deepspec.nn.loss_table import LossTerm, LossWeights


@dataclass(frozen=True, kw_only=True)
class LossFields:
    """Part of every ``draft:`` section."""

    loss: tuple[LossTerm, ...] | None = None  # its terms, [{name: l1, weight: 0.9}, ...]; null: as published
    d_pace: float | None = None  # alpha of D-PACE: a slot weighs by what it reaches, no decay; null: off

    def __post_init__(self) -> None:
        alpha = self.d_pace
        if alpha is not None and not 0 <= alpha <= 1:
            raise RecipeError("value out of range", key="d_pace", found=alpha, wanted="from 0 to 1, or null")
        if self.loss is not None:
            LossWeights.of(self.loss)

    @property
    def published_loss(self) -> LossWeights:
        """The terms without ``loss``."""
        return LossWeights(ce=1.0)

    @property
    def loss_weights(self) -> LossWeights:
        """The terms of the loss."""
        return self.published_loss if self.loss is None else LossWeights.of(self.loss)
