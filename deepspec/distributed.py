"""Ranks: who am I, how many are we; the same answer under deepspeed, torchrun, mpirun and as one process."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from deepspec.errors import DeepSpecError, system_error

if TYPE_CHECKING:
    import torch  # at run time only the functions that need it import it: logging asks for the rank without torch

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place: global rank, number of processes, rank on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes manifests."""
        return self.rank == 0


_LAUNCHER_VARIABLES = (  # (rank, size, local rank) of torchrun/deepspeed, Open MPI, MPICH/Hydra (PMI), Slurm
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def world_from_environment() -> World:
    """The place that the launcher gave this process by environment variables; (0, 1, 0) without a launcher."""
    for rank, size, local in _LAUNCHER_VARIABLES:
        if rank in os.environ and size in os.environ:
            number = int(os.environ[rank])
            return World(number, int(os.environ[size]), int(os.environ.get(local, number)))
    return World()


def together(world: World, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank; where it fails on any, all end, and rank 0 tells why once.

    Raises:
        DeepSpecError: on rank 0; the other ranks exit with code 1 and say nothing twice.
    """
    built: T | None = None
    error: DeepSpecError | None = None
    try:
        built = work()
    except DeepSpecError as problem:
        error = problem
    except OSError as problem:
        error = system_error(problem)
    errors = [error]
    if world.size > 1:
        import torch.distributed as dist

        texts: list[str | None] = [None] * world.size
        dist.all_gather_object(texts, None if error is None else str(error))
        errors = [None if text is None else DeepSpecError(text) for text in texts]
    failed = next((one for one in errors if one is not None), None)
    if failed is None:
        return built  # type: ignore[return-value]
    if world.is_main:
        raise failed
    sys.exit(1)


def pick_device(local_rank: int = 0) -> torch.device:
    """The GPU of this local rank where there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def multiplies_bfloat16() -> bool:
    """Whether this machine's products in bfloat16 are faster than in float32: a GPU's are, a CPU's with AVX-512 or AMX.

    A CPU without them rounds in software: one with AVX2 alone takes eight times as long as in float32.
    """
    import torch

    if torch.cuda.is_available():
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def free_port() -> int:
    """A TCP port that was free a moment ago on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
