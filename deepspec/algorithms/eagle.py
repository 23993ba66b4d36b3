"""What the drafters share whose first layer reads the projected features beside the embedding: Eagle3 and P-EAGLE.

A wide layer reads [embedding of the token | g], each normed, where g = fc(features of the target's layers). The norms
of EAGLE-3.1 are options: of every target layer's features before fc (``fc_norm``), of all of them together
(``norm_before_fc``), and the normed g as the residual of the first layer (``norm_before_residual``).

L target layers, D hidden size; [..] any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.algorithms.base import Algorithm, DraftConfig, DraftModel, require
from deepspec.algorithms.own_fields import OwnField
from deepspec.batch import Batch
from deepspec.families.base import Family, Shape
from deepspec.nn.chains import Chains
from deepspec.nn.fused import FusedLayer, norm_of
from deepspec.nn.layer import RMSNorm
from deepspec.nn.losses import HeadLoss, HeadRows, head_loss


@dataclass(frozen=True, kw_only=True)
class EagleConfig(DraftConfig):
    """What the drafters share whose first layer reads the projected features beside the embedding."""

    fc_norm: bool = False  # each target layer's features pass a norm of their own before fc
    norm_before_fc: bool = False  # all features together pass one norm before fc; excludes fc_norm
    norm_before_residual: bool = False  # the first layer adds to the normed g = fc(features), not to g itself

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.fc_norm and self.norm_before_fc), "fc_norm", True, "false where norm_before_fc is true")


NORM_FIELDS = tuple(OwnField(key, key, False) for key in ("fc_norm", "norm_before_fc", "norm_before_residual"))


class EagleDraft(DraftModel):
    """Projected features; the first layers read [embedding | hidden state], each normed, 2D wide.

    Args:
        algorithm: the algorithm that owns it.
        config: its frozen config.
        shape: sizes of its layers.
        family: their parts.
        wide_layers: how many layers read the embedding too.
    """

    def __init__(
        self, algorithm: Algorithm, config: EagleConfig, shape: Shape, family: Family, wide_layers: int
    ) -> None:
        super().__init__(algorithm, config, shape, family, wide_layers)
        size, eps, count = shape.hidden_size, shape.norm_eps, len(config.target_layers)
        for depth, layer in enumerate(self.layers[:wide_layers]):
            layer.hidden_norm = RMSNorm(size, eps)
            layer.normed_residual = config.norm_before_residual and depth == 0
        self.fc_norm = nn.ModuleList(RMSNorm(size, eps) for _ in range(count)) if config.fc_norm else None
        self.input_norm = RMSNorm(count * size, eps) if config.norm_before_fc else None

    def start(self, features: Tensor) -> Tensor:
        """g [.., D] = fc(features [.., L*D]), the features normed as the config says."""
        if self.input_norm is not None:
            features = self.input_norm(features.to(self.dtype))
        if self.fc_norm is not None:
            parts = features.to(self.dtype).split(self.shape.hidden_size, dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)


def wide_input(layer: Any, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What a wide layer reads, [.., 2D], and what it adds to, [.., D]."""
    normed = layer.hidden_norm(hidden)
    joined = torch.cat((layer.input_layernorm(embedded), normed), dim=-1)
    return joined, normed if layer.normed_residual else hidden


def chain_loss(
    model: DraftModel, batch: Batch, rows: HeadRows, position_P: Tensor, hidden_RD: Tensor, chains: Chains
) -> HeadLoss:
    """The head loss of rows that are verified along ``chains``; each predicts the token after its target position.

    Over a reduced vocabulary the target's distribution is renormalised, as the draft's is.
    """
    config, weights = model.config, model.config.loss_weights
    target_PD = batch.target_states(position_P, model.dtype) if weights.needs_target else None
    if weights.ce or config.d_pace is not None:
        label_R = batch.input_ids.flatten()[position_P + 1][rows.position_R]
        rows = rows.with_tokens(*model.draft_ids(label_R))
    return head_loss(hidden_RD, model.head, rows, weights, target_PD, backend=model.loss, chains=chains)


class WideInput:
    """:func:`wide_input` as decoding runs it.

    Args:
        layer: a wide layer.
        fused: the same as decoding runs it.
    """

    def __init__(self, layer: Any, fused: FusedLayer) -> None:
        self._embedding_norm, self._norm = fused.input_norm, norm_of(layer.hidden_norm)
        self._normed_residual: bool = layer.normed_residual

    def __call__(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and result of :func:`wide_input`."""
        normed = self._norm(hidden)
        joined = torch.cat((self._embedding_norm(embedded), normed), dim=-1)
        return joined, normed if self._normed_residual else hidden
