"""Several processes on one cache: rank 0 decides and tells the others; nothing else is exchanged."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from deepspec.distributed import World, world_from_environment
from deepspec.errors import CacheError, DeepSpecError, system_error

T = TypeVar("T")


def _alone(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Ranks(World):
    """This process's place, and a broadcast from rank 0 (which is a barrier for the others)."""

    local_size: int = 1  # ranks on this machine
    broadcast: Callable[[Any], Any] = _alone
    barrier: Callable[[], None] = lambda: None

    def first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and give its result to all; its error is raised by all."""
        outcome: tuple[Any, DeepSpecError | None] | None = None
        if self.is_main:
            try:
                outcome = (work(), None)
            except DeepSpecError as problem:
                outcome = (None, problem)
            except OSError as problem:
                outcome = (None, system_error(problem, kind=CacheError))
        result, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return result


def _under_mpi() -> bool:
    return any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"))


@contextmanager
def connect() -> Iterator[Ranks]:
    """This process's :class:`Ranks` under mpirun (mpi4py), deepspeed, torchrun, srun, or alone.

    Without an MPI library the launcher's environment variables say who is who, and gloo carries the broadcast.
    """
    if _under_mpi():
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError):
            pass
        else:
            yield from _mpi(MPI)
            return
    world = world_from_environment()
    if world.size == 1:
        yield Ranks()
        return
    yield from _gloo(world)


def _mpi(mpi: Any) -> Iterator[Ranks]:
    everyone = mpi.COMM_WORLD
    here = everyone.Split_type(mpi.COMM_TYPE_SHARED)
    try:
        yield Ranks(
            everyone.Get_rank(),
            everyone.Get_size(),
            here.Get_rank(),
            here.Get_size(),
            broadcast=lambda value: everyone.bcast(value, root=0),
            barrier=everyone.Barrier,
        )
    except BaseException as problem:  # the others may wait for this rank: end them all, after saying why
        if everyone.Get_size() == 1:
            raise
        code = problem.code if isinstance(problem, SystemExit) and isinstance(problem.code, int) else 1
        print(f"error: {problem}", file=sys.stderr, flush=True)
        everyone.Abort(code)


def _gloo(world: World) -> Iterator[Ranks]:
    import torch.distributed as dist

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    mine = not dist.is_initialized()
    if mine:
        try:
            dist.init_process_group("gloo", rank=world.rank, world_size=world.size)
        except (RuntimeError, ValueError) as problem:
            raise CacheError(f"the ranks cannot reach each other ({problem})") from None

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    try:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        yield Ranks(world.rank, world.size, world.local_rank, here, broadcast, lambda: dist.barrier())
    finally:
        if mine:
            dist.destroy_process_group()
