"""Ranks: which one this is, how many there are, how they agree; under deepspeed, torchrun, mpirun, srun and alone."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from deepspec.errors import DeepSpecError, system_error
from deepspec.heartbeat import RankLost, Watch

if TYPE_CHECKING:
    import torch  # at run time only the functions that need it import it: logging needs the rank without torch

T = TypeVar("T")
FOREVER = timedelta(days=7)  # of a wait for another rank: heartbeats find a dead one
LOCAL_ADDRESS = ("127.0.0.1", "29511")  # where the ranks of one machine connect unless the launcher sets it


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, and the same two on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes manifests."""
        return self.rank == 0

    def groups_of(self, count: int) -> World:
        """The world whose members are groups of ``count`` neighbouring ranks: this rank's group, and how many."""
        return World(self.rank // count, self.size // count)


_LAUNCHER_VARIABLES = (  # rank, size, local rank, local size of torchrun/deepspeed, Open MPI, MPICH/Hydra (PMI), Slurm
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)
_MPI_SIZES = tuple(size for _, size, *_ in _LAUNCHER_VARIABLES[1:3])
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *_ADDRESS)  # that a process group sets while it is open


def world_from_environment() -> World:
    """This process among those of its launcher, by environment variables; alone without a launcher."""
    for names in _LAUNCHER_VARIABLES:
        rank, size, local_rank, local_size = (os.environ.get(name) for name in names)
        if rank is not None and size is not None:
            return World(int(rank), int(size), int(local_rank or rank), int(local_size or size))
    return World()


def _refuse_left_over_ranks(world: World, error: type[DeepSpecError]) -> None:
    """Under mpirun, RANK and WORLD_SIZE of a shell or a job around it would make every process a world of its own."""
    if "WORLD_SIZE" not in os.environ:
        return
    for name in _MPI_SIZES:
        if int(os.environ.get(name, "1")) > world.size:
            raise error(
                "mpirun started more processes than RANK and WORLD_SIZE know of", key="WORLD_SIZE",
                found=f"{world.size}, and {name} {os.environ[name]}",
                remedy="unset RANK, WORLD_SIZE and LOCAL_RANK, which something else left, before mpirun",
            )  # fmt: skip


@contextmanager
def process_group(
    world: World,
    backend: str = "gloo",
    timeout: timedelta = FOREVER,
    even_alone: bool = False,
    error: type[DeepSpecError] = DeepSpecError,
) -> Iterator[World]:
    """Connect the ranks of ``world`` for the block; one process alone needs no group, and makes none.

    Each watches the others (:mod:`deepspec.heartbeat`): where one dies, fails or is asked to stop, all end.
    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set for the block where the launcher set none:
    libraries read them.

    Args:
        world: this process among them.
        backend: ``gloo``, or ``nccl`` for the tensors of GPUs.
        timeout: of a wait for another rank in a collective of the default group.
        even_alone: make a group of one process too (DeepSpeed needs it).
        error: the class of the refusals.

    Raises:
        error: the launcher gives no address to connect to, they cannot connect, or variables of another launcher hide
            that there are several processes.
        RankLost: another rank is dead or failed; SystemExit (1) on all but the one that reports it.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        yield world
        return
    _refuse_left_over_ranks(world, error)
    if world.size == 1 and not even_alone:
        yield world
        return
    device = pick_device(world.local_rank) if backend == "nccl" and world.size > 1 else None
    with _environment_of(world, error), _watched(world, error), _patient_groups():
        try:
            dist.init_process_group(backend, timeout=timeout, rank=world.rank, world_size=world.size, device_id=device)
        except (RuntimeError, ValueError) as problem:
            raise RankLost(f"the ranks cannot reach each other ({problem})") from None
        yield world


@contextmanager
def _watched(world: World, error: type[DeepSpecError]) -> Iterator[None]:
    """The heartbeats of several ranks, and the end of their process group once the others know of it."""
    import torch.distributed as dist

    watch, in_order = Watch(world.rank, world.size, error) if world.size > 1 else None, False
    try:
        yield
        in_order = True
    except BaseException as problem:
        if watch is None:
            raise
        found = watch.failed(problem)
        if found is problem:
            raise
        raise found from None
    finally:
        try:
            if dist.is_initialized():
                dist.destroy_process_group()
        finally:
            if watch is not None:
                watch.close(in_order)


@contextmanager
def _patient_groups() -> Iterator[None]:
    """Further groups over gloo (DeepSpeed makes some, and states no timeout) wait as long as the first."""
    from torch.distributed import distributed_c10d as c10d

    before, c10d.default_pg_timeout = c10d.default_pg_timeout, FOREVER
    try:
        yield
    finally:
        c10d.default_pg_timeout = before


@contextmanager
def _environment_of(world: World, error: type[DeepSpecError]) -> Iterator[None]:
    """Set what is missing during the block only: a process that is started later is no rank of the group."""
    given = set(os.environ)
    ranks = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    try:
        _set_address(world, error)
        for name, number in ranks.items():
            os.environ.setdefault(name, str(number))
        yield
    finally:
        for name in set(RANK_VARIABLES) - given:
            os.environ.pop(name, None)


def _set_address(world: World, error: type[DeepSpecError]) -> None:
    """Set MASTER_ADDR and MASTER_PORT where they are missing."""
    if all(name in os.environ for name in _ADDRESS):
        return
    under_mpi = any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"))
    address = LOCAL_ADDRESS
    if world.size == 1:
        address = (LOCAL_ADDRESS[0], str(free_port()))
    elif under_mpi:
        address = _address_by_mpi(world) or LOCAL_ADDRESS
    elif "SLURM_PROCID" not in os.environ:
        raise error(
            "the ranks have no address to connect to", key=", ".join(_ADDRESS),
            remedy="start with torchrun or deepspeed, or set both",
        )  # fmt: skip
    for name, value in zip(_ADDRESS, address, strict=True):
        os.environ.setdefault(name, value)


@cache
def _address_by_mpi(world: World) -> tuple[str, str] | None:
    """Rank 0's host and a free port of it, broadcast by MPI; None without an MPI library.

    MPI ends here: its own end waits for all ranks, so one that fails later would wait for those that wait for it.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    host = LOCAL_ADDRESS[0] if world.local_size == world.size else socket.gethostname()
    address: tuple[str, str] = MPI.COMM_WORLD.bcast((host, str(free_port())), root=0)
    MPI.Finalize()
    return address


def barrier(world: World) -> None:
    """Wait for all ranks.

    Raises:
        RankLost: another rank ended.
    """
    if world.size > 1:
        _exchange("barrier")


def _exchange(collective: str, *arguments: Any, **options: Any) -> None:
    """Run a collective of torch.distributed; it returns into its arguments."""
    import torch.distributed as dist

    try:
        getattr(dist, collective)(*arguments, **options)
    except RuntimeError as problem:
        raise RankLost(f"the other ranks do not answer ({problem})", remedy="see what they printed") from None


def on_rank0(world: World, work: Callable[[], T], error: type[DeepSpecError] = DeepSpecError) -> T:
    """Run ``work`` on rank 0 and return its result on every rank; where it fails all end, and rank 0 reports once.

    Raises:
        DeepSpecError: on rank 0 (what the system refused: as ``error``); the other ranks exit with code 1 silently.
    """
    result, problem = _outcome(work, error) if world.is_main else (None, None)
    if world.size > 1:
        told: list[Any] = [(result, problem is not None)]
        _exchange("broadcast_object_list", told, src=0)
        if not world.is_main:
            result, failed = told[0]
            if failed:
                sys.exit(1)
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]


def on_all_ranks(world: World, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank; where it fails on any, all end, and rank 0 reports once.

    Raises:
        DeepSpecError: on rank 0; the other ranks exit with code 1 silently.
    """
    result, error = _outcome(work, DeepSpecError)
    errors = [error]
    if world.size > 1:
        texts: list[str | None] = [None] * world.size
        _exchange("all_gather_object", texts, None if error is None else str(error))
        errors = [None if text is None else DeepSpecError(text) for text in texts]
    failed = next((one for one in errors if one is not None), None)
    if failed is None:
        return result  # type: ignore[return-value]
    if world.is_main:
        raise failed
    sys.exit(1)


def _outcome(work: Callable[[], T], error: type[DeepSpecError]) -> tuple[T | None, DeepSpecError | None]:
    try:
        return work(), None
    except DeepSpecError as problem:
        return None, problem
    except OSError as problem:
        return None, system_error(problem, kind=error)


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
