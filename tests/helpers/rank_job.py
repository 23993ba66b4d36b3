"""One rank of a job for the tests of heartbeats: ``rank_job.py FOLDER RANK:WHAT ...``.

WHAT a rank does once all have met: ``fail``, ``vanish`` (kill -9), ``freeze`` (SIGSTOP), ``slow`` (comes to the barrier
late), ``leave`` (exits before it connects), ``stop`` (as a build that was sent SIGTERM), ``bug`` (any exception).
The others wait at a barrier. Each writes its number and process id to FOLDER.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from deepspec import heartbeat
from deepspec.distributed import World, barrier, process_group, world_from_environment
from deepspec.errors import DataError, run_main


class Stopped(DataError):
    asked = True


def act(what: str, world: World) -> None:
    if what == "fail":
        raise DataError("no such row", file="rows.jsonl")
    if what == "bug":
        raise KeyError("a defect")
    if what == "stop":
        raise Stopped("stopped when asked to")
    if what in ("vanish", "freeze"):
        os.kill(os.getpid(), signal.SIGKILL if what == "vanish" else signal.SIGSTOP)
    if what == "slow":
        time.sleep(7)
    if what == "busy":
        time.sleep(60)
    barrier(world)


def main() -> int:
    folder, *deeds = sys.argv[1:]
    world = world_from_environment()
    does = dict(one.split(":") for one in deeds).get(str(world.rank), "")
    if does == "leave":
        return 3
    Path(folder, f"rank{world.rank}").write_text(str(os.getpid()))
    with process_group(world, error=DataError) as world:
        barrier(world)
        act(does, world)
    print(f"rank {world.rank} is done")
    return 0


def as_rank(words: list[str], environment: dict[str, str], said: str, grace: float, starting: int) -> None:
    """Be one rank in a process of its own, its stdout and stderr in the file ``said``."""
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.stdout = sys.stderr = open(handle, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    heartbeat.GRACE, heartbeat.STARTING = grace, starting
    sys.argv = ["rank_job.py", *words]
    run_main(main)


if __name__ == "__main__":
    run_main(main)
