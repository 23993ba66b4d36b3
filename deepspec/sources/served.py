"""Training without a cache from a target that runs elsewhere: servers compute the hidden states of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from deepspec.distributed import world_from_environment
from deepspec.recipe import Recipe
from deepspec.sources.online import OnlineSource
from deepspec.targets import TargetEmbeddings
from deepspec.targets.served import ServedTarget


class ServedSource(OnlineSource):
    """As :class:`OnlineSource`, the hidden states from ``data.servers``: each process uses one of them, in turn.

    ``train.workers`` threads read ahead of the step, each a micro-batch at a time.

    Args:
        recipe: names servers, layers and rendering.
        target: not used: the servers have it.
        files: JSONL of prompts with the target's answers.

    Raises:
        TargetError: a server that does not answer.
        DataError: no such file, or no usable conversation in one.
    """

    name = "served"
    required: ClassVar[tuple[str, ...]] = ("conversations", "servers", "server_storage")
    needs_model = False
    reads_ahead = True

    def __init__(self, recipe: Recipe, target: TargetEmbeddings, *files: str | Path) -> None:
        section, data = recipe.target, recipe.data
        url = data.servers[world_from_environment().rank % len(data.servers)]
        dtype = getattr(torch, section.dtype)
        served = ServedTarget(url, section.path, section.layers, dtype, section.revision, storage=data.server_storage)
        super().__init__(recipe, served, *files)

    def announce(self, numbers: Sequence[int]) -> None:
        """Nothing: several threads read at once."""

    def hidden_states(self, numbers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Features [s, L*D] and last hidden states [s, D] of each."""
        return self.forward(numbers)
