"""The plan of a run: which samples make optimizer step s, in which micro-batches.

A pure function of (seed, epoch, sample lengths, global batch, micro batch, bucketing, cache weights). Ranks,
accumulation steps and workers only cut its lists, so the same samples meet in the same step whatever the machine, and a
resumed run needs nothing but its step number.

Length bucketing: the epoch is shuffled and cut into windows of ``bucket_batches`` steps; inside a window samples are
sorted by length into micro-batches of near-equal length, and the micro-batches are shuffled over the window's steps. A
step therefore still mixes all lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from deepspec.errors import DataError


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    epoch: int
    micro_batches: np.ndarray  # [global_batch / micro_batch, micro_batch] int64 sample numbers

    def share(self, rank: int, world_size: int) -> np.ndarray:
        """[accumulation, micro_batch]: the micro-batches of one rank.

        Neighbours in length run at the same time on different ranks, so that no rank waits long for another.
        """
        return self.micro_batches.reshape(-1, world_size, self.micro_batches.shape[1])[:, rank]


class Plan:
    """The steps of a whole run.

    Args:
        lengths: tokens of every sample, those of several groups (caches) one after the other.
        group_sizes: samples of each group.
        seed: of the recipe.
        global_batch: samples per step.
        micro_batch: samples per micro-batch.
        bucket_batches: steps per bucketing window; 0 = no bucketing.
        group_weights: share of each group in an epoch; None: by its size.

    Raises:
        DataError: fewer samples than one global batch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        group_sizes: Sequence[int],
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        bucket_batches: int,
        group_weights: Sequence[float] | None = None,
    ) -> None:
        self.lengths, self.group_sizes, self.seed = np.asarray(lengths), tuple(group_sizes), seed
        self.global_batch, self.micro_batch, self.bucket_batches = global_batch, micro_batch, bucket_batches
        self.group_weights = tuple(group_weights or group_sizes)
        self.steps_per_epoch = len(self.lengths) // global_batch
        if self.steps_per_epoch == 0:
            raise DataError(
                "too few samples for one optimizer step",
                found=len(self.lengths),
                wanted=f"at least train.global_batch = {global_batch}",
                remedy="add conversations, or lower train.global_batch",
            )
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def step(self, number: int) -> StepPlan:
        """Optimizer step ``number`` (0-based over the whole run)."""
        epoch, inside = divmod(number, self.steps_per_epoch)
        return StepPlan(epoch, self._epoch(epoch)[inside])

    def _draw(self, epoch: int, random: np.random.Generator) -> np.ndarray:
        """The epoch's sample numbers in random order; no sample of a group repeats before all of them came."""
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

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        """[steps_per_epoch, global_batch / micro_batch, micro_batch]"""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        samples = self._draw(epoch, random)[: self.steps_per_epoch * self.global_batch]
        per_step = self.global_batch // self.micro_batch
        if not self.bucket_batches:
            return samples.reshape(self.steps_per_epoch, per_step, self.micro_batch)
        window = self.bucket_batches * self.global_batch
        parts = [self._bucket(samples[i : i + window], random) for i in range(0, len(samples), window)]
        return np.concatenate(parts).reshape(self.steps_per_epoch, per_step, self.micro_batch)

    def _bucket(self, window: np.ndarray, random: np.random.Generator) -> np.ndarray:
        by_length = window[np.argsort(self.lengths[window], kind="stable")].reshape(-1, self.micro_batch)
        steps = random.permutation(by_length).reshape(-1, self.global_batch // self.micro_batch, self.micro_batch)
        longest_first = np.argsort(-self.lengths[steps].max(axis=2), axis=1, kind="stable")
        return np.take_along_axis(steps, longest_first[:, :, None], axis=1)

    def padding_share(self, steps: int) -> float:
        """Share of padding in all tokens computed over the first ``steps`` steps."""
        real = padded = 0
        for number in range(steps):
            lengths = self.lengths[self.step(number).micro_batches]
            real += int(lengths.sum())
            padded += int(lengths.max(axis=1).sum()) * lengths.shape[1]
        return 1.0 - real / padded
