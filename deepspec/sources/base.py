"""Where the features of a batch come from. A source is one file here and one row in ``registry.SOURCES``.

B samples of a batch, S its padded length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from deepspec import registry
from deepspec.batch import Batch, Supervision
from deepspec.cache.memory import empty
from deepspec.errors import RecipeError
from deepspec.recipe import Recipe
from deepspec.targets import TargetEmbeddings


class FeatureSource(ABC):
    """Samples with the target's hidden states, by number: 0 .. N - 1, those of several groups one after the other."""

    required: ClassVar[tuple[str, ...]] = ()  # keys of the recipe's `data:` section that it cannot do without
    needs_model: ClassVar[bool] = False  # whether it runs the complete target in this process; else embedding and head
    reads_ahead: ClassVar[bool] = True  # whether several threads may call `batch`, ahead of the step
    computes: ClassVar[bool] = False  # whether hidden states are made in training, and can be kept: `data.write_cache`

    answers: ClassVar[bool] = False  # whether it can have prompts answered: `data.answers`

    samples_ahead: ClassVar[int] = 0  # that `announce` wants to know of beyond those of the step that begins
    can_be_lost: ClassVar[bool] = False  # whether `batch` may raise SourceLost in the middle of a run

    lengths: np.ndarray  # [N] int64, tokens of each sample
    group_sizes: tuple[int, ...]  # samples of each group (a cache, or a file of conversations); sums to N
    group_weights: tuple[float, ...] | None = None  # share of each group in an epoch; None: by its size

    @classmethod
    @abstractmethod
    def open(cls, recipe: Recipe, target: TargetEmbeddings, held_out: bool = False) -> FeatureSource:
        """The recipe's training data, or those of ``train.validation`` where ``held_out``.

        Raises:
            DeepSpecError: no such data, broken ones, or those of another recipe or target.
        """

    @classmethod  # noqa: B027 - most sources find what they read
    def begin(cls, recipe: Recipe) -> None:
        """Make what :meth:`open` reads, where that is not there yet: on rank 0, before any rank opens the source.

        Raises:
            DeepSpecError: it cannot be made.
        """

    @abstractmethod
    def sample_id(self, number: int) -> int:
        """The key of the sample's random draws; the same from every source of the same conversations."""

    @abstractmethod
    def loss_mask(self, number: int) -> np.ndarray:
        """[S] bool of one sample; computes no hidden states."""

    @abstractmethod
    def tokens(self, number: int) -> np.ndarray:
        """[S] int64, the sample's token ids; computes no hidden states."""

    @abstractmethod
    def batch(self, numbers: Sequence[int], seed: int, epoch: int) -> Batch:
        """These samples stacked, zeros after each."""

    @abstractmethod
    def fingerprint(self) -> dict[str, object]:
        """``{"source": name, "caches": [...]}``: all that identifies the data, compared when a run is resumed."""

    def announce(self, numbers: Sequence[int]) -> None:  # noqa: B027 - most sources need no notice
        """Note the samples of a step, in the order in which its batches will read them."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """End what runs for it, at the end of the run."""

    def finish(self) -> None:  # noqa: B027 - most sources leave nothing
        """Complete what it leaves on disk: the run is over, after an epoch or more. Every rank calls it."""

    def supervision(self, numbers: Sequence[int], seed: int, epoch: int) -> Supervision:
        """The masks of a batch, padded: all that its loss plan depends on."""
        masks = pad([torch.from_numpy(self.loss_mask(number)) for number in numbers])
        lengths = torch.from_numpy(self.lengths[list(numbers)])
        return Supervision(masks, lengths, tuple(self.sample_id(number) for number in numbers), seed, epoch)


def source_class(recipe: Recipe) -> type[FeatureSource]:
    """The class that ``data.source`` names.

    Raises:
        RecipeError: a key of the recipe that it needs is not set.
    """
    found: type[FeatureSource] = registry.source(recipe.data.source)
    for key in found.required:
        if not getattr(recipe.data, "files" if key == "conversations" else key):
            raise RecipeError(f"data.source {recipe.data.source} needs it, and it is not set", key=f"data.{key}")
    if recipe.data.answers and not found.answers:
        able = ", ".join(name for name in registry.SOURCES if registry.source(name).answers)
        problem, remedy = f"data.source {recipe.data.source} has no prompts answered", f"set data.source: {able}"
        raise RecipeError(problem, key="data.answers", found=recipe.data.answers, remedy=remedy)
    if recipe.data.write_cache and not found.computes:
        problem = f"data.source {recipe.data.source} computes nothing that could be written"
        raise RecipeError(problem, key="data.write_cache", found=recipe.data.write_cache, remedy="remove the key")
    return found


def batch_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the host: page-locked where there is a GPU to copy to."""
    if torch.cuda.is_available():
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    return empty(shape, dtype)


def stacked(
    supervision: Supervision, tokens: Sequence[np.ndarray], widths: tuple[int, int | None], dtype: torch.dtype,
    read_into: Callable[[int, Tensor, Tensor | None], object],
) -> Batch:  # fmt: skip
    """A batch whose hidden states are read in place.

    Args:
        supervision: of its B samples.
        tokens: of each.
        widths: of the features (L*D) and of the last hidden state (D), None where that is not read.
        dtype: of both.
        read_into: fills features [s, L*D] and last hidden state [s, D] of the b-th sample.
    """
    shape, lengths = tuple(supervision.loss_mask.shape), supervision.lengths.tolist()
    ids, features = batch_memory(shape, torch.int64), batch_memory((*shape, widths[0]), dtype)
    last = batch_memory((*shape, widths[1]), dtype) if widths[1] is not None else None
    for row, length in enumerate(lengths):
        read_into(row, features[row, :length], None if last is None else last[row, :length])
        ids[row, :length] = torch.from_numpy(tokens[row])
        for tensor in (ids, features) if last is None else (ids, features, last):
            tensor[row, length:] = 0
    return Batch(supervision, ids, features, last)


def pad(rows: Sequence[Tensor]) -> Tensor:
    """[B, S, ...] from B tensors [s_b, ...], zeros after each."""
    first = rows[0]
    if len(rows) == 1 and (first.is_cuda or not torch.cuda.is_available()):
        return first.unsqueeze(0)
    shape = (len(rows), max(map(len, rows)), *first.shape[1:])
    padded = first.new_empty(shape) if first.is_cuda else batch_memory(shape, first.dtype)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)], out[len(row) :] = row, 0
    return padded
