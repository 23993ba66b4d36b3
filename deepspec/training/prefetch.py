"""Read ahead of the step: one ordered queue of loss weights and micro-batches, filled by worker threads.

The order is the plan's, whatever the number of workers; memory is bounded by the queue's length.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deepspec.batch import Batch, Supervision
from deepspec.distributed import World
from deepspec.sources.base import FeatureSource, collate, supervision
from deepspec.training.plan import Plan


@dataclass
class Step:
    """One optimizer step's data on this rank."""

    number: int
    epoch: int
    weight: torch.Tensor  # scalar fp64: this rank's share of the step's loss weight
    count: int  # of its micro-batches, the same on every rank
    batches: Iterator[Batch] = field(repr=False)


class Prefetcher:
    """The data of optimizer steps ``start`` .. ``stop - 1`` on one rank.

    Args:
        source: where samples come from.
        plan: which samples make which step.
        loss_weight: the algorithm's weight of a micro-batch, from its masks alone.
        last_hidden: whether the loss reads the target's last hidden state.
        seed: of the recipe.
        world: this process's place.
        workers: threads that read ahead; 0 = read when asked.
    """

    def __init__(
        self,
        source: FeatureSource,
        plan: Plan,
        loss_weight: Callable[[Supervision], torch.Tensor],
        *,
        last_hidden: bool,
        seed: int,
        world: World,
        workers: int,
    ) -> None:
        self.source, self.plan, self.loss_weight, self.last_hidden = source, plan, loss_weight, last_hidden
        self.seed, self.world = seed, world
        self.workers = workers if source.reads_ahead else 0
        self.wait_seconds = 0.0  # time that the step spent waiting for data, to be read and reset by the loop

    def _weigh(self, share: list[list[int]], epoch: int) -> tuple[torch.Tensor, int]:
        """This rank's share of the step's loss weight, and the number of its micro-batches."""
        self.source.announce([number for numbers in share for number in numbers])
        weights = [self.loss_weight(supervision(self.source, numbers, self.seed, epoch)).double() for numbers in share]
        return torch.stack(weights).sum(), len(share)

    def batch(self, numbers: list[int], epoch: int) -> Batch:
        """One micro-batch, read now."""
        ids = [self.source.sample_id(number) for number in numbers]
        made = collate(self.source.load(numbers), ids, self.seed, epoch, self.last_hidden)
        return _pin(made) if torch.cuda.is_available() else made

    def _tasks(self, start: int, stop: int) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
        for number in range(start, stop):
            step = self.plan.step(number)
            share = [numbers.tolist() for numbers in step.share(self.world.rank, self.world.size)]
            yield self._weigh, (share, step.epoch)
            for numbers in share:
                yield self.batch, (numbers, step.epoch)

    def _results(self, start: int, stop: int) -> Iterator[Any]:
        tasks = self._tasks(start, stop)
        if not self.workers:
            yield from (self._timed(call, *arguments) for call, arguments in tasks)
            return
        queue: deque[Future[Any]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="feeder")
        try:
            for call, arguments in tasks:
                queue.append(pool.submit(call, *arguments))
                if len(queue) > 2 * self.workers + 1:
                    yield self._timed(queue.popleft().result)
            while queue:
                yield self._timed(queue.popleft().result)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.wait_seconds += time.perf_counter() - begun

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """The steps in order; each one's batches must be consumed before the next step is taken."""
        results = self._results(start, stop)
        try:
            for number in range(start, stop):
                weight, count = next(results)
                batches = (next(results) for _ in range(count))
                yield Step(number, number // self.plan.steps_per_epoch, weight, count, batches)
        finally:
            results.close()  # type: ignore[attr-defined]


def _pin(batch: Batch) -> Batch:
    """The batch in page-locked memory, so that its copy to the GPU runs beside the computation."""
    last = None if batch.last_hidden is None else batch.last_hidden.pin_memory()
    return replace(
        batch, input_ids=batch.input_ids.pin_memory(), features=batch.features.pin_memory(), last_hidden=last
    )
