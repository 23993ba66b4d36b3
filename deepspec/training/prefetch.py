"""Read ahead of the step: one ordered queue of loss plans and micro-batches, filled by worker threads.

The order is the run plan's, whatever the number of workers; memory is bounded by the queue's length.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspec.batch import WHOLE, Batch, LossPlan, Part, Supervision
from deepspec.distributed import World
from deepspec.sources.base import FeatureSource
from deepspec.training.plan import RunPlan


@dataclass
class TrainStep:
    """One optimizer step's data on this rank."""

    number: int
    epoch: int
    weight: torch.Tensor  # scalar fp64: this rank's share of the step's loss weight
    count: int  # of its micro-batches, the same on every rank
    batches: Iterator[Batch] = field(repr=False)  # with their loss plans


class Prefetcher:
    """The data of optimizer steps ``start`` .. ``stop - 1`` on one rank.

    Args:
        source: where samples come from.
        plan: which samples make which step.
        plan_loss: the algorithm's plan of a micro-batch, from its masks; this rank's part where several share it.
        seed: of the recipe.
        world: this process's rank, among groups where several share the micro-batches.
        part: which of those that share them it is.
        workers: threads that read ahead; 0 = read when needed.
    """

    def __init__(
        self, source: FeatureSource, plan: RunPlan, plan_loss: Callable[[Supervision], LossPlan], *, seed: int,
        world: World, workers: int, part: Part = WHOLE,
    ) -> None:  # fmt: skip
        self.source, self.plan, self.plan_loss = source, plan, plan_loss
        self.seed, self.world, self.part = seed, world, part
        self.workers = workers if source.reads_ahead else 0
        self.wait_seconds = 0.0  # time that the step spent waiting for data, to be read and reset by the loop

    def _plans(self, share: list[list[int]], epoch: int) -> list[LossPlan]:
        """The loss plans of this rank's micro-batches of a step."""
        self.source.announce([number for numbers in share for number in numbers])
        plans = [self.plan_loss(self.source.supervision(numbers, self.seed, epoch)) for numbers in share]
        return [plan.pin_memory() for plan in plans] if torch.cuda.is_available() else plans

    def _batch(self, numbers: list[int], epoch: int) -> Batch:
        return self.source.batch(numbers, self.seed, epoch).shared(self.part)

    def _tasks(self, start: int, stop: int) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
        for number in range(start, stop):
            step = self.plan.step(number)
            share = [numbers.tolist() for numbers in step.share(self.world.rank, self.world.size)]
            yield self._plans, (share, step.epoch)
            for numbers in share:
                yield self._batch, (numbers, step.epoch)

    def _results(self, start: int, stop: int) -> Iterator[Any]:
        tasks = self._tasks(start, stop)
        if not self.workers:
            yield from (self._timed(call, *arguments) for call, arguments in tasks)
            return
        queue: deque[Future[Any]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="prefetch")
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

    def steps(self, start: int, stop: int) -> Iterator[TrainStep]:
        """The steps in order; each one's batches must be consumed before the next step is taken."""
        results = self._results(start, stop)
        try:
            for number in range(start, stop):
                plans: list[LossPlan] = next(results)
                weight = torch.stack([plan.weight.double() for plan in plans]).sum()
                batches = (next(results).planned(plan) for plan in plans)
                yield TrainStep(number, number // self.plan.steps_per_epoch, weight, len(plans), batches)
        finally:
            results.close()  # type: ignore[attr-defined]
