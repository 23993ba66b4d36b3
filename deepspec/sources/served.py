"""Training without a cache from a target that runs elsewhere: servers compute the hidden states of each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
from torch import Tensor

from deepspec.cache import forward as cache
from deepspec.cache.parts import Block, joined
from deepspec.cache.reader import stored_view
from deepspec.distributed import world_from_environment
from deepspec.recipe import Recipe
from deepspec.sources.answered import KeptStates, answer_prompts, kept_store
from deepspec.sources.online import OnlineSource
from deepspec.streaming.client import FeatureRequest, wanted_of
from deepspec.streaming.pool import ServerPool
from deepspec.targets import TargetEmbeddings


class ServedSource(OnlineSource):
    """As :class:`OnlineSource`, the hidden states from any of ``data.servers``.

    Conversations are asked for in the order of the run's steps, as many ahead as ``data.server_memory`` holds. What
    comes is the same from every server: which one computes a sample does not change a loss.

    Args:
        recipe: names servers, layers and rendering.
        target: whose embedding and head this process has; the servers have the rest.
        files: JSONL of prompts with the target's answers.

    Raises:
        TargetError: no server answers, or one serves something else.
        DataError: no such file, or no usable conversation in one.
    """

    name = "served"
    required: ClassVar[tuple[str, ...]] = ("conversations", "servers")
    needs_model = False
    reads_ahead = True
    samples_ahead = 256  # of a rank; their bytes are limited by `data.server_memory`
    can_be_lost = True
    answers = True
    kept: KeptStates | None = None  # of `data.answers`

    def __init__(self, recipe: Recipe, target: TargetEmbeddings, *files: str | Path) -> None:
        super().__init__(recipe, target, *files)
        data = recipe.data
        self.pool = ServerPool(
            data.servers, wanted_of(recipe, target, int(self.lengths.max())), limit=data.server_memory,
            patience=data.server_patience, first=world_from_environment().rank,
        )  # fmt: skip

    @classmethod
    def begin(cls, recipe: Recipe) -> None:
        """Have prompts answered, where the recipe names some instead of conversations."""
        if recipe.data.answers is not None:
            answer_prompts(recipe)

    @classmethod
    def open(cls, recipe: Recipe, target: TargetEmbeddings, held_out: bool = False) -> ServedSource:
        """See :meth:`FeatureSource.open`."""
        source = cast(ServedSource, super().open(recipe, target, held_out))
        if recipe.data.answers is not None and not held_out:
            source.kept = KeptStates(kept_store(recipe, target.spec))
        return source

    def _conversations(self, numbers: Sequence[int]) -> list[FeatureRequest]:
        return [FeatureRequest(number, self._ids[number], self._masks[number]) for number in numbers]

    def announce(self, numbers: Sequence[int]) -> None:
        """The samples of a step to come; where a cache is written, its batches are asked for instead."""
        if self.written is None:
            self.pool.announce(self._conversations(numbers))

    def forward_block(self, rows: Sequence[cache.RenderedConversation]) -> tuple[int, Callable[[], Block]]:
        """One batch of a cache: what was kept of it, the rest through a server in one pass of its own as in a build.

        Raises:
            SourceLost: no server is left.
        """
        kept = {row[0]: self.kept and self.kept.find(row, self.last_hidden) for row in rows}
        missing = [row for row in rows if kept[row[0]] is None]
        block = self._served_block(missing) if missing else None
        if block is None or len(missing) < len(rows):
            served = iter(block.split() if block is not None else ())
            block = joined([kept[sample] or next(served) for sample, _, _ in rows])
        found = block
        return block.nbytes, lambda: found

    def _served_block(self, rows: Sequence[cache.RenderedConversation]) -> Block:
        samples, names = [sample for sample, _, _ in rows], [name for _, name, _ in rows]
        lengths = [len(rendered.input_ids) for _, _, rendered in rows]
        ids = np.concatenate([np.asarray(rendered.input_ids, np.int32) for _, _, rendered in rows])
        mask = np.concatenate([np.asarray(rendered.loss_mask, np.uint8) for _, _, rendered in rows])
        asked = FeatureRequest(-1 - samples[0], ids, mask.astype(bool), tuple(lengths))
        states = next(self.pool.take([asked]))
        last = None
        if self.last_hidden and states.last_hidden is not None:
            last = stored_view(states.last_hidden)[asked.last_rows()]
        return Block(samples, names, lengths, ids, mask, stored_view(states.features), last)

    def hidden_states(self, numbers: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
        """Features [s, L*D] and last hidden states [s, D] of each, on the host; zeros where no loss reads the last.

        Raises:
            SourceLost: no server is left.
        """
        return [(one.features, one.last_hidden) for one in self.pool.take(self._conversations(numbers))]

    def close(self) -> None:
        """Leave the servers."""
        super().close()
        self.pool.close()
