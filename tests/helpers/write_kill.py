"""Train while being killed: processes forked from here, so that a kill costs no import.

    python tests/helpers/write_kill.py RECIPE OUTPUT CACHE KILLS RANKS [KEY=VALUE ...]

Trains twice: OUTPUT/calm, undisturbed, from the cache CACHE; and OUTPUT/rough, killed KILLS times with SIGKILL, which
writes its own cache OUTPUT/written. Prints, after each kill, how many steps are saved, how many parts are complete and
how many batches wait.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deepspec.checkpoints import steps_of
from deepspec.distributed import free_port
from deepspec.training.run import train


def start(recipe: str, overrides: list[str], size: int) -> list[int]:
    port, children = free_port(), []
    for number in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if size > 1:
                    os.environ.update(RANK=str(number), WORLD_SIZE=str(size), LOCAL_RANK=str(number))
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                train(recipe, overrides)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return children


def end(children: list[int]) -> None:
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit(f"a run failed: {codes}")


def kill(children: list[int], after: float) -> None:
    time.sleep(after)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def disturb(begin: Callable[[], list[int]], rough: Path, written: Path, kills: int, dice: random.Random) -> None:
    """Each run is killed within the second after its first new checkpoint or part, a third of them while it starts."""

    def state() -> tuple[int, int, int]:
        parts = len(list(written.glob("parts/0*/part.json")))
        return max(steps_of(rough), default=0), parts, len(list(written.glob("spool/parts/0*/part.json")))

    for number in range(kills):
        before, children, begun = state(), begin(), time.monotonic()
        while number % 3 != 2 and state() == before and time.monotonic() - begun < 60:
            time.sleep(0.01)
        kill(children, dice.uniform(0, 0.5 if number % 3 != 2 else 3.0))
        print(*state(), flush=True)


def main() -> None:
    recipe, output, cache, kills, ranks, *overrides = sys.argv[1:]
    dice, folder, size = random.Random(1), Path(output), int(ranks)
    read = [*overrides, "data.source=cache", f"data.cache=[{cache}]", f"output={folder}/calm"]
    end(start(recipe, read, size))
    write = [*overrides, f"data.write_cache={folder}/written", f"output={folder}/rough"]
    disturb(lambda: start(recipe, write, size), folder / "rough", folder / "written", int(kills), dice)
    end(start(recipe, write, size))


if __name__ == "__main__":
    main()
