"""The plan of a run: which samples make optimizer step s, in which micro-batches, and its learning rate.

A pure function of (seed, epoch, sample lengths, global batch, cache weights). A step's samples are an unbiased draw:
their lengths have no influence on the step they come in. Lengths only decide how a step's own samples are cut into
micro-batches (by count, or by a budget of tokens) and dealt to ranks; the loss of a step does not depend on the cut. So
the same samples make the same step whatever the machine, and a resumed run needs nothing but its step number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from deepspec.errors import DataError


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    number: int  # 0-based over the complete run
    epoch: int
    samples: np.ndarray  # [global_batch] int64 sample numbers, the longest first
    lengths: np.ndarray  # [global_batch] int64, their tokens
    micro_batch: int  # samples of a micro-batch, where `micro_tokens` is None
    micro_tokens: int | None  # tokens of a micro-batch, padding included

    def micro_batches(self, world_size: int) -> list[np.ndarray]:
        """The step's samples in micro-batches of neighbours in length; their number is a multiple of ``world_size``."""
        if self.micro_tokens is None:
            edges = list(range(0, len(self.samples), self.micro_batch))
        else:
            edges = balanced_edges(self.lengths, self.micro_tokens, world_size)
        return np.split(self.samples, edges[1:])

    def share(self, rank: int, world_size: int) -> list[np.ndarray]:
        """The micro-batches of one rank, as many as every other rank's.

        Neighbours in length run at the same time on different ranks, so that no rank waits long for another. Who has
        the longest changes from step to step, so that over an epoch all ranks read and compute as many tokens.
        """
        return self.micro_batches(world_size)[(rank + self.number) % world_size :: world_size]


class RunPlan:
    """The steps of a complete run.

    Args:
        lengths: tokens of every sample, those of several groups (caches) one after the other.
        group_sizes: samples of each group.
        seed: of the recipe.
        global_batch: samples per step.
        micro_batch: samples per micro-batch.
        micro_tokens: tokens per micro-batch, padding included, instead of ``micro_batch``; a longer sample runs alone.
        group_weights: share of each group in an epoch; None: by its size.

    Raises:
        DataError: fewer samples than one global batch.
    """

    def __init__(
        self, lengths: np.ndarray, group_sizes: Sequence[int], *, seed: int, global_batch: int, micro_batch: int = 1,
        micro_tokens: int | None = None, group_weights: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        self.lengths, self.group_sizes, self.seed = np.asarray(lengths), tuple(group_sizes), seed
        self.global_batch, self.micro_batch, self.micro_tokens = global_batch, micro_batch, micro_tokens
        self.group_weights = tuple(group_weights or group_sizes)
        self.steps_per_epoch = len(self.lengths) // global_batch
        if self.steps_per_epoch == 0:
            raise DataError(
                "too few samples for one optimizer step", found=len(self.lengths),
                wanted=f"at least train.global_batch = {global_batch}",
                remedy="add conversations, or lower train.global_batch",
            )  # fmt: skip
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def step(self, number: int) -> StepPlan:
        """Optimizer step ``number`` (0-based over the complete run)."""
        epoch, inside = divmod(number, self.steps_per_epoch)
        drawn = self._epoch(epoch)[inside * self.global_batch :][: self.global_batch]
        samples = drawn[np.argsort(-self.lengths[drawn], kind="stable")]
        return StepPlan(number, epoch, samples, self.lengths[samples], self.micro_batch, self.micro_tokens)

    def _draw(self, epoch: int) -> np.ndarray:
        """The epoch's sample numbers in random order; no sample of a group repeats before all were drawn."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        total = len(self.lengths)
        weights = np.asarray(self.group_weights, dtype=np.float64)
        edges = np.rint(np.cumsum(weights) / weights.sum() * total).astype(np.int64)
        counts = np.diff(edges, prepend=0)
        drawn, start = [], 0
        for size, count in zip(self.group_sizes, counts, strict=True):
            rounds = -(-int(count) // max(size, 1))
            order = [random.permutation(size) for _ in range(rounds)]
            drawn.append(start + np.concatenate([np.zeros(0, dtype=np.int64), *order])[:count])
            start += size
        return random.permutation(np.concatenate(drawn).astype(np.int64))


def balanced_edges(lengths: np.ndarray, micro_tokens: int, world_size: int) -> list[int]:
    """Where micro-batches begin, so that each costs about as many tokens and all ranks get as many of them.

    The smallest number of micro-batches that ``micro_tokens`` allows, rounded up to a multiple of ``world_size``; for
    that number the smallest budget that suffices.

    Args:
        lengths: [N] tokens of a step's samples, the longest first; N is a multiple of ``world_size``.
        micro_tokens: tokens of one micro-batch, padding included; a sample longer than that runs alone.
        world_size: ranks.
    """
    wanted = -(-len(_edges_within(lengths, micro_tokens)) // world_size) * world_size
    low, high = 0, max(micro_tokens, int(lengths[0]))  # `high` suffices, `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_edges_within(lengths, middle)) <= wanted else (middle, high)
    edges = _edges_within(lengths, high)
    while len(edges) < wanted:  # halve the dearest micro-batch that has two samples
        counts = np.diff([*edges, len(lengths)])
        dearest = int(np.argmax(np.where(counts > 1, lengths[edges] * counts, 0)))
        edges.insert(dearest + 1, edges[dearest] + (int(counts[dearest]) + 1) // 2)
    return edges


def _edges_within(lengths: np.ndarray, budget: int) -> list[int]:
    """Beginnings of the longest runs whose padded tokens stay within ``budget``; one sample is always allowed."""
    edges, begin = [], 0
    while begin < len(lengths):
        edges.append(begin)
        begin += max(1, budget // int(lengths[begin]))
    return edges


def lr_factor(step: int, total: int, warmup_ratio: float) -> float:
    """The share of the peak rate at optimizer step ``step`` (0-based) of ``total``: linear warm-up, then cosine decay.

    With W = ceil(warmup_ratio * total): (step + 1) / W while step < W, then a half cosine that starts at 1 in step W
    and would reach 0 in step ``total``, one after the last. 0 from ``total`` on. A pure function of the step: a resumed
    run needs no state for it, and an extended run has the rate of its new horizon.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
