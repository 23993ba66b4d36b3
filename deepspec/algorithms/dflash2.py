"""DFlash 2: DFlash with short convolutions inside the block and a candidate selector over each slot's likeliest tokens.

    loss = CE over the vocabulary + selector_weight * CE over the candidates, the true token before each slot known

Parallel slots do not know what their neighbours will say. The convolutions mix neighbouring slots in every layer; the
selector walks the block from the anchor and chooses each slot's token given the one before. Both start at zero effect,
so a fresh draft proposes what a DFlash draft with its weights would. The parts are in ``deepspec.nn.short_conv`` and
``deepspec.nn.selector``; every block drafter may have them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from deepspec.algorithms.base import require_at_least
from deepspec.algorithms.block import BlockConfig
from deepspec.algorithms.dflash import DFlash


@dataclass(frozen=True, kw_only=True)
class DFlash2Config(BlockConfig):
    """The ``draft:`` section of a DFlash 2 recipe."""

    algorithm: ClassVar[str] = "dflash2"
    block_size: int = 16
    num_anchors: int = 256
    loss_decay_gamma: float | None = 7.0
    sample_from_anchor: bool = False  # as engines run it
    conv_kernel_size: int = 2
    selector_rank: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "conv_kernel_size", "selector_rank")


class DFlash2(DFlash):
    """The published recipe: block 16, kernel 2 in groups of 16, rank 256 over 16 candidates."""

    name = "dflash2"
    config_class = DFlash2Config
    architecture = "DFlash2Model"
    starts_from = (DFlash.name,)
    tiny_section: ClassVar[dict[str, Any]] = {
        **DFlash.tiny_section, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 4,
    }  # fmt: skip


DFLASH2 = DFlash2()
