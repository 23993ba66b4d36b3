"""Train while being killed: processes forked from here, so that a kill costs no import.

    python tests/helpers/write_kill.py RECIPE OUTPUT CACHE KILLS RANKS SERVED [KEY=VALUE ...]

Trains twice: OUTPUT/calm, undisturbed, from the cache CACHE; and OUTPUT/rough, killed KILLS times with SIGKILL, which
writes its own cache OUTPUT/written. SERVED is 1 for hidden states of a feature server, which is killed in turn with the
run, else 0. Prints, after each kill, how many steps are saved, how many parts are complete and how many batches wait.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deepspec.checkpoints import steps_of
from deepspec.distributed import free_port
from deepspec.http import NoReply, request
from deepspec.recipe import load_recipe
from deepspec.streaming.batcher import Limits
from deepspec.streaming.server import FeatureServer, serve
from deepspec.targets import load_target
from deepspec.training.run import train


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def kill(*children: int) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


class Server:
    """The feature server of the recipe's target, in a process of its own."""

    def __init__(self, recipe: str, overrides: list[str]) -> None:
        self.recipe, self.port = load_recipe(recipe, overrides), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = fork(self._run)
        while True:
            try:
                request("GET", f"{self.url}/health", 1.0)
                return
            except NoReply:
                time.sleep(0.05)

    def _run(self) -> None:
        target = load_target(self.recipe.target.path, torch.float32)
        serve(FeatureServer(target, Limits(self.recipe.cache.tokens_per_batch), max_length=256), "127.0.0.1", self.port)


class Run:
    """A training of some ranks."""

    def __init__(self, recipe: str, overrides: list[str], size: int) -> None:
        port = free_port()
        self.ranks = [fork(lambda n=number: self._train(recipe, overrides, n, size, port)) for number in range(size)]

    def _train(self, recipe: str, overrides: list[str], number: int, size: int, port: int) -> None:
        if size > 1:
            os.environ.update(RANK=str(number), WORLD_SIZE=str(size), LOCAL_RANK=str(number))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        train(recipe, overrides)

    def end(self) -> None:
        codes = [os.waitpid(rank, 0)[1] for rank in self.ranks]
        if any(codes):
            sys.exit(f"a run failed: {codes}")


def disturb(begin: Callable[[], Run], server: Server | None, folder: Path, kills: int, dice: random.Random) -> None:
    """Kill shortly after the first new checkpoint, part or batch of a start, every third time while it starts."""
    written = folder / "written"

    def state() -> tuple[int, int, int]:
        parts = len(list(written.glob("parts/0*/part.json")))
        return max(steps_of(folder / "rough"), default=0), parts, len(list(written.glob("spool/parts/0*/part.json")))

    done = 0
    while done < kills:
        before, run, begun, early = state(), begin(), time.monotonic(), done % 3 == 2
        while not early and state() == before and time.monotonic() - begun < 60:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 3.0 if early else 0.5))
        if server is not None and done + 1 < kills:  # the run waits for its server, which comes back
            kill(server.process)
            time.sleep(dice.uniform(0, 1))
            server.start()
            done += 1
            print("server killed", *state(), flush=True)
            time.sleep(dice.uniform(0, 1))
        kill(*run.ranks)
        done += 1
        print("run killed", *state(), flush=True)


def main() -> None:
    recipe, output, cache, kills, ranks, served, *overrides = sys.argv[1:]
    folder, size = Path(output), int(ranks)
    read = [*overrides, "data.source=cache", f"data.cache=[{cache}]", f"output={folder}/calm"]
    Run(recipe, read, size).end()
    write = [*overrides, f"data.write_cache={folder}/written", f"output={folder}/rough"]
    server = Server(recipe, overrides) if int(served) else None
    if server is not None:
        write += ["data.source=served", f"data.servers=[{server.url}]"]
    disturb(lambda: Run(recipe, write, size), server, folder, int(kills), random.Random(1))
    Run(recipe, write, size).end()
    if server is not None:
        kill(server.process)


if __name__ == "__main__":
    main()
