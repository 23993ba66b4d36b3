"""What a feature source gives to an algorithm's objective.

B sequences of the batch, S their padded length, L target layers read, D the target's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from deepspec.errors import CacheError


@dataclass(frozen=True)
class Supervision:
    """Which tokens are supervised, and the key of every random draw: (seed, epoch, sample id).

    The part of a batch that is known before any hidden state is read: a loss plan is made from it alone. Its tensors
    stay on the CPU.
    """

    loss_mask: Tensor  # [B, S] bool, 1 where the token itself is part of an answer; 0 on padding
    lengths: Tensor  # [B] int64, real tokens of each row
    sample_ids: tuple[int, ...]  # B of them
    seed: int
    epoch: int

    def generator(self, row: int) -> torch.Generator:
        """The CPU generator of one row's draws, independent of batch, rank and worker."""
        key = (self.seed * 1_000_003 + self.epoch) * 1_000_000_007 + self.sample_ids[row]
        return torch.Generator().manual_seed(key % (2**63 - 1))


@dataclass(frozen=True)
class Part:
    """Of conversations that several ranks share: the ``number``-th rank of ``of``; 0 of 1 where each has its own."""

    number: int = 0
    of: int = 1

    def rows(self, count: int) -> int:
        """How many of ``count`` rows a rank has, at most: each has every ``of``-th."""
        return -(-count // self.of)


WHOLE = Part()


@dataclass(frozen=True)
class LossPlan:
    """What an objective computes of a micro-batch (anchors, rows, positions, weights), decided before the step.

    An algorithm adds the tensors that its objective reads, as fields of a subclass. Made on the CPU by the threads that
    read the data; it travels in the batch, so that an objective never waits for the GPU.
    """

    weight: Tensor  # scalar, the weight of all loss terms of the micro-batch

    def shared(self, part: Part) -> Self:
        """The rows of one of the ranks that share the conversations (``Algorithm.shares_sequences``).

        The weights of all ranks' plans, and the sums of their losses, add up to this one's. It has ``position_P``, the
        target positions that are compared with, as indices into [B, S] flattened.
        """
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory."""
        return _each_tensor(self, Tensor.pin_memory)


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it changed, those in fields that are dataclasses, or tuples of them, too."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _each_tensor(getattr(value, one.name), change) for one in fields(value)})
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return tuple(_each_tensor(one, change) for one in value)
    return value


@dataclass(frozen=True)
class Batch:
    """A padded batch of conversations with what the target computed for them.

    Where several ranks share it (``part``), each has all tokens, the features of every P-th position [B, ceil(S / P),
    L*D], and the last hidden states of the target positions of its own plan [1, positions, D].
    """

    supervision: Supervision
    input_ids: Tensor  # [B, S] int64
    features: Tensor  # [B, S, L*D], the outputs of the target layers, concatenated
    last_hidden: Tensor | None  # [B, S, D], the input of lm_head; None where the loss does not use it
    plan: LossPlan | None = None  # of the algorithm that trains; a source leaves it out
    part: Part = WHOLE

    def shared(self, part: Part) -> Batch:
        """The batch as one of the ranks that share it holds it, but for its plan: the features of its positions."""
        if part.of == 1:
            return self
        taken = self.features[:, part.number :: part.of]
        own = taken.new_zeros(len(taken), part.rows(self.features.shape[1]), taken.shape[2])
        own[:, : taken.shape[1]] = taken
        pinned = torch.cuda.is_available() and not own.is_cuda
        return replace(self, features=own.pin_memory() if pinned else own, part=part)

    def planned(self, plan: LossPlan) -> Batch:
        """The batch with its (or, where it is shared, this rank's) loss plan, which moves to the batch's device."""
        last, positions = self.last_hidden, getattr(plan, "position_P", None)
        if self.part.of > 1 and last is not None and positions is not None:
            last = last.flatten(0, 1)[positions.to(last.device)][None]
        return replace(self, plan=plan.to(self.input_ids.device), last_hidden=last)

    def target_states(self, position_P: Tensor, dtype: torch.dtype) -> Tensor:
        """The last hidden states [P, D] at the plan's target positions, indices into [B, S] flattened.

        Raises:
            CacheError: the feature source left them out.
        """
        if self.last_hidden is None:
            problem, remedy = "the loss compares with the target's distribution", "build the cache with last_hidden"
            raise CacheError(problem, key="last_hidden", found=None, remedy=remedy)
        states = self.last_hidden.flatten(0, 1)
        return (states if self.part.of > 1 else states[position_P]).to(dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy on ``device``, hidden states cast to ``dtype`` there; the supervision stays on the CPU.

        Features that ``dtype`` would widen stay as they are: the draft casts them as it reads them.
        """
        last = None if self.last_hidden is None else self.last_hidden.to(device, non_blocking=True).to(dtype)
        features = self.features.to(device, non_blocking=True)
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            features=features if dtype is None or dtype.itemsize > features.itemsize else features.to(dtype),
            last_hidden=last,
            plan=None if self.plan is None else self.plan.to(device),
        )
