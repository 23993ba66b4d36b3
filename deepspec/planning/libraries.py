"""What Python and libraries take of a training: its peak less what a plan counts, in a process for each drafter.

A process that has trained one drafter has loaded and kept what the others need too, so each has one of its own. On a
CPU that is the whole process; its allocator hands back at once what is freed, since what it would keep is no library's.
On a GPU it is what CUDA has taken beside torch's own memory.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from deepspec.errors import DeepSpecError
from deepspec.planning.machines import Machine
from deepspec.planning.memory import HANDED_BACK, rank_memory
from deepspec.planning.probes import DRAWS, RateProbe, engine_settings, time_step
from deepspec.training.engine import training_processes

Job = tuple[str, tuple[int, ...], str]  # drafter, a row of SIZES, precision


def library_bytes(job: Job, probe: RateProbe, machine: Machine) -> float:
    """Bytes of a process that trains ``job`` for a step beyond those that a plan counts.

    Args:
        job: what it trains.
        probe: the same, counted.
        machine: without bytes for libraries.

    Raises:
        DeepSpecError: the process failed.
    """
    words = [sys.executable, "-m", "deepspec.planning.libraries", json.dumps(job)]
    done = subprocess.run(words, env={**os.environ, **HANDED_BACK}, text=True, capture_output=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise DeepSpecError(f"a training of {job[0]} failed ({lines[-1]})", found=" ".join(words))
    taken = float(done.stdout.strip().splitlines()[-1])
    if machine.device != "cpu":
        return taken
    counted = rank_memory(probe.sizes, probe.cost, engine_settings(job[2]), 1, machine, workers=0)
    return taken - counted.total


def main() -> None:
    """Train the job that the command line names, and print bytes."""
    name, size, precision = json.loads(sys.argv[1])
    for loaded in ("deepspec.training.run", "zarr"):  # by a training with a cache
        importlib.import_module(loaded)
    with training_processes() as world:
        time_step(name, size, precision, world, DRAWS)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(total - free - torch.cuda.memory_reserved())
        return
    print(largest())


def largest() -> int:
    """Bytes of this process at its largest; where the system does not tell, as it is now.

    Not `resource.getrusage`: what it gives begins with the size of the process that started this one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return sizes[0] if sizes else psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
