"""Build a cache while being killed: processes forked from here, so that a kill costs no import.

    python tests/helpers/cache_kill.py RECIPE DATA OUTPUT KILLS SEED

Prints the number of finished parts after each kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from deepspec.cache.build import build_cache
from deepspec.distributed import free_port, process_group, world_from_environment
from deepspec.recipe import load_recipe


def rank(recipe: str, data: str, output: str, number: int, size: int, port: int) -> None:
    if size > 1:
        os.environ.update(RANK=str(number), WORLD_SIZE=str(size), LOCAL_RANK=str(number))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group(world_from_environment()) as world:
        build_cache(load_recipe(recipe), data, output, world)


def start(recipe: str, data: str, output: str, size: int) -> list[int]:
    port, children = free_port(), []
    for number in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                rank(recipe, data, output, number, size, port)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return children


def finished(output: str) -> int:
    return len([path for path in Path(output).glob("parts/0*") if (path / "part.json").exists()])


def main() -> int:
    recipe, data, output, kills, seed = sys.argv[1:]
    dice = random.Random(int(seed))
    begun = time.monotonic()
    for child in start(recipe, data, f"{output}-timing", 1):
        os.waitpid(child, 0)
    whole = time.monotonic() - begun
    for _ in range(int(kills)):
        children = start(recipe, data, output, dice.choice((1, 1, 2, 3)))
        time.sleep(dice.uniform(0.1, 0.9) * whole)
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        print(finished(output), flush=True)
    codes = [os.waitpid(child, 0)[1] for child in start(recipe, data, output, 2)]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
