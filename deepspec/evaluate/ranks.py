"""Several processes on one run: they meet twice, at the start and at the end, and talk through the results folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from deepspec.distributed import World
from deepspec.errors import EvaluationError


@contextmanager
def meeting(world: World) -> Iterator[Callable[[], None]]:
    """Yield a function that waits for all ranks of ``world``; one process alone never waits.

    Raises:
        EvaluationError: a launcher that does not say where the ranks meet.
    """
    if world.size == 1:
        yield lambda: None
        return
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise EvaluationError(
            "the ranks do not know where to meet", key="MASTER_ADDR, MASTER_PORT",
            remedy="start with torchrun or deepspeed, or set both",
        )  # fmt: skip
    from torch import distributed

    # days: a rank with short prompts waits for one with long prompts
    distributed.init_process_group("gloo", rank=world.rank, world_size=world.size, timeout=timedelta(days=7))
    try:
        yield distributed.barrier
    finally:
        distributed.destroy_process_group()
