"""Complete trainings from feature servers: whatever servers and trainer go through, the losses are the cache's."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import training_tools as tools
from cache_tools import conversation_rows
from feature_server import RunningServer

from deepspec.cache.build import build_cache
from deepspec.checkpoints import steps_of
from deepspec.data.conversations import write_conversations
from deepspec.distributed import World, free_port
from deepspec.errors import SourceLost
from deepspec.recipe import load_recipe
from deepspec.targets import load_target
from deepspec.training import run
from deepspec.training.prefetch import TrainStep

pytest_plugins = ["training_fixtures"]
FEW = 200_000  # bytes of hidden states in flight: those of a few samples, so that a server's end is noticed
RENDERING = {"max_length": 96, "min_supervised": 4}


@dataclass(frozen=True)
class Project:
    """A target, conversations, their cache and a recipe."""

    folder: Path
    target: Path

    def recipe(self, name: str, data: dict[str, object], **train: object) -> Path:
        given = {**RENDERING, "conversations": str(self.folder / "data.jsonl"), **data}
        return tools.write_recipe(self.folder / name, self.target, data=given, **train)

    def from_cache(self, name: str, **train: object) -> Path:
        return self.recipe(name, {"cache": [str(self.folder / "cache")]}, **train)

    def from_servers(self, name: str, *urls: str, patience: float = 60.0, memory: int = FEW, **train: object) -> Path:
        data = {"source": "served", "servers": list(urls), "server_patience": patience, "server_memory": memory}
        return self.recipe(name, data, **train)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("streaming")
    made = Project(folder, tools.make_talking_target(folder / "target"))
    write_conversations(folder / "data.jsonl", conversation_rows(24), {"made by": "a test"})
    build_cache(load_recipe(made.from_cache("build")), folder / "data.jsonl", folder / "cache")
    return made


def train(recipe: Path, world: World) -> list[float]:
    """Train in this process from the newest checkpoint on; the losses of the run's log."""
    prepared = run.prepare(load_recipe(recipe), world, False)
    trainer = run.assemble(prepared, world, False)
    try:
        assert trainer.run(prepared.start.step)
    finally:
        trainer.engine.close()
        prepared.source.close()
    return losses_of(recipe)


def losses_of(recipe: Path) -> list[float]:
    rows = tools.log_of(recipe.parent / "run")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # each once
    return [row["loss"] for row in rows]


@contextlib.contextmanager
def running(project: Project, port: int = 0) -> Iterator[RunningServer]:
    server = RunningServer(load_target(project.target, torch.float32), port)
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_two_servers_give_the_losses_of_the_cache_however_few_bytes_are_in_flight(
    project: Project, world: World, memory: int
) -> None:
    wanted = train(project.from_cache(f"cache-{memory}", max_steps=12), world)
    with running(project) as one, running(project) as other:
        recipe = project.from_servers(f"served-{memory}", one.url, other.url, memory=memory, max_steps=12, workers=3)
        assert train(recipe, world) == pytest.approx(wanted, abs=1e-5)
        counts = [server.server.batcher.counts.conversations for server in (one, other)]
    assert min(counts) > 0
    assert sum(counts) == 12 * 4  # each sample once a step, and none besides


def test_without_a_server_the_finished_steps_are_saved_and_the_run_continues_later(
    project: Project, world: World
) -> None:
    wanted = train(project.from_cache("cache-lost", max_steps=12), world)
    with running(project) as server:
        recipe = project.from_servers("lost", server.url, patience=0.2, memory=1, max_steps=12)
        prepared = run.prepare(load_recipe(recipe), world, False)
        trainer = run.assemble(prepared, world, False)
        optimize, done = trainer._optimize, list[int]()

        def until_step_5(step: TrainStep, weight: float) -> None:
            if step.number == 5:
                server.stop()
            optimize(step, weight)
            done.append(step.number)

        trainer._optimize = until_step_5
        with pytest.raises(SourceLost, match=r"data\.servers: no server is left \(.*refused.*saved after step \d/12; "):
            trainer.run(0)
        trainer.engine.close()
        prepared.source.close()
        port = server.port
    assert 4 <= done[-1] < 11
    assert list(steps_of(recipe.parent / "run")) == [done[-1] + 1]
    with running(project, port):
        assert train(recipe, world) == pytest.approx(wanted, abs=1e-5)


def start(*words: str, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "deepspec", *words], cwd=tools.ROOT, env=tools.own_environment(), stdout=file,
            stderr=file,
        )  # fmt: skip


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_that_lose_their_server_save_together_and_say_so_once(project: Project, world: World) -> None:
    wanted = train(project.from_cache("cache-two", max_steps=60), world)
    launcher = tools.ROOT / "launch" / "train.py"
    with running(project) as server:
        recipe = project.from_servers("served-two", server.url, patience=1.0, max_steps=60)
        path = recipe.parent / "run" / "log.jsonl"
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(tools.launch, launcher, ["--recipe", str(recipe)], 2)
            wait_for(lambda: run.done() or (path.exists() and path.read_text().count("\n") >= 10))
            server.stop()
            said = run.result()
        port = server.port
    assert said.returncode != 0
    lines = [line for line in (said.stdout + said.stderr).splitlines() if "error: " in line]
    assert len(lines) == 1, said.stdout + said.stderr
    assert re.search(r"no server is left \(.*\); saved after step (\d+)/60; ", lines[0])
    with running(project, port):
        done = tools.launch(launcher, ["--recipe", str(recipe)], 2)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(recipe) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_60_steps_with_a_server_killed_and_restarted_and_the_trainer_killed_and_resumed(
    project: Project, world: World
) -> None:
    wanted = train(project.from_cache("cache-60", max_steps=60), world)
    ports, log = (free_port(), free_port()), project.folder / "processes.log"
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    recipe = project.from_servers("served-60", *urls, max_steps=60, save_every=10)
    path = recipe.parent / "run" / "log.jsonl"

    def steps() -> int:
        return path.read_text().count("\n") if path.exists() else 0

    def serve(port: int) -> subprocess.Popen[bytes]:
        return start("serve-features", "--recipe", str(recipe), "--port", str(port), log=log)

    servers = [serve(port) for port in ports]
    try:
        wait_for(lambda: log.read_text().count("serves hidden states") == 2)
        trainer = start("train", "--recipe", str(recipe), log=log)
        wait_for(lambda: steps() >= 20 or trainer.poll() is not None)
        os.kill(servers[0].pid, signal.SIGKILL)
        servers[0].wait()
        servers[0] = serve(ports[0])
        wait_for(lambda: steps() >= 35 or trainer.poll() is not None)
        trainer.kill()
        assert trainer.wait() == -signal.SIGKILL, log.read_text()[-3000:]
        wait_for(lambda: log.read_text().count("serves hidden states") == 3)
        assert start("train", "--recipe", str(recipe), log=log).wait() == 0, log.read_text()[-3000:]
    finally:
        for server in servers:
            server.kill()
            server.wait()
    found = losses_of(recipe)
    assert len(found) == 60
    assert f"server {urls[0]}: " in log.read_text()  # the run had to do with its end
    assert max(abs(here - there) for here, there in zip(found, wanted, strict=True)) < 1e-5
    print("largest difference of a loss:", max(abs(a - b) for a, b in zip(found, wanted, strict=True)))
