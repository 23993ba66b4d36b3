"""Nothing hangs and nothing is written twice: dead ranks are named, slow ones waited for, locks have one holder."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import rank_job
from cache_tools import ROOT, make_setup, tool_environment
from fsspec.implementations.memory import MemoryFileSystem
from kill_tools import exit_code, start

from deepspec import heartbeat
from deepspec.cache import remote_lock
from deepspec.cache.store import RemoteStore, build_lock
from deepspec.cli.train import train
from deepspec.distributed import free_port
from deepspec.errors import CacheError, CheckpointError, DataError
from deepspec.files import temporary_file
from deepspec.locks import LOCK, ends_in_order, one_writer

NAMED = r"error: rank 1 \(process \d+ on \S+\) "
RANKS = 3


def run_ranks(folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, who: int = 1) -> tuple[list[int], list[str]]:
    """Exit codes and output of three ranks, of which rank ``who`` does ``what`` (see rank_job.py)."""
    world = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world |= {key: value for key, value in os.environ.items() if key == heartbeat.PATIENCE}
    # a fork of this process would inherit the locks of threads that other tests left
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["rank_job"])
    children = []
    for rank in range(RANKS):
        environment = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = [str(folder), f"{who}:{what}"]
        job = (words, environment, str(folder / f"said{rank}"), heartbeat.GRACE, heartbeat.STARTING)
        children.append(server.Process(target=rank_job.as_rank, args=job))
        children[-1].start()
    for rank in sorted(range(RANKS), key=lambda rank: rank == who):
        if rank == who and what == "freeze":
            children[who].kill()
        children[rank].join()
    return [child.exitcode for child in children], [(folder / f"said{rank}").read_text() for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("what", "line", "own"),
    [
        ("fail", "failed: rows.jsonl: no such row", 1),
        ("vanish", "ended without a word", -signal.SIGKILL),
        ("freeze", r"gave no sign of life for 3 s \(DEEPSPEC_PATIENCE\)", -signal.SIGKILL),
    ],
)
def test_a_rank_that_is_lost_is_named_once_and_all_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, line: str, own: int
) -> None:
    monkeypatch.setenv(heartbeat.PATIENCE, "3" if what == "freeze" else "1000")
    monkeypatch.setattr(heartbeat, "GRACE", 1.0)
    codes, said = run_ranks(tmp_path, what, monkeypatch)
    assert codes == [1, own, 1], said
    assert len(re.findall(NAMED + line, "".join(said))) == 1
    assert "Traceback" not in "".join(said)


@pytest.mark.parametrize("what", [pytest.param("freeze", marks=pytest.mark.slow), "vanish"])
def test_rank_0_whose_store_the_others_need_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv(heartbeat.PATIENCE, "3")
    monkeypatch.setattr(heartbeat, "GRACE", 1.0)
    codes, said = run_ranks(tmp_path, what, monkeypatch, who=0)
    assert codes == [-signal.SIGKILL, 1, 1], said
    assert re.search(NAMED.replace("rank 1", "rank 0"), "".join(said).replace("),", ") "))


@pytest.mark.slow
def test_a_rank_slower_than_the_patience_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(heartbeat.PATIENCE, "3")
    codes, said = run_ranks(tmp_path, "slow", monkeypatch)
    assert codes == [0, 0, 0], said


def test_a_rank_that_is_asked_to_stop_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, said = run_ranks(tmp_path, "stop", monkeypatch)
    assert codes == [143, 1, 143], said
    assert "".join(said).count("error: ") == 1


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(heartbeat.PATIENCE, "2")
    monkeypatch.setattr(heartbeat, "STARTING", 2)
    codes, said = run_ranks(tmp_path, "leave", monkeypatch)
    assert codes == [1, 3, 1], said
    assert "rank 1 did not connect within 4 s" in "".join(said)


def test_patience_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("soon", "0", "nan", "-1", "inf"):
        monkeypatch.setenv(heartbeat.PATIENCE, text)
        with pytest.raises(DataError, match=r"DEEPSPEC_PATIENCE: not a number of seconds; found .*wanted 2 or more"):
            heartbeat.patience(DataError)


def test_sigterm_ends_a_writer_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with one_writer(tmp_path / "out", "export"), temporary_file(tmp_path / "out" / "weights") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    assert exit_code(start(write)) == 143
    assert not list(tmp_path.iterdir())


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    """A place in memory, its locks renewed and stale in a moment."""
    monkeypatch.setattr(remote_lock, "RENEWED", 0.1)
    monkeypatch.setattr(remote_lock, "STALE", 1.0)
    return RemoteStore(f"memory://bucket/{uuid.uuid4().hex}")


def holder(**values: Any) -> bytes:
    return json.dumps({"holder": "process 1 on elsewhere", "host": "elsewhere", "pid": 1, **values}).encode()


def test_a_holder_at_a_url_lives_as_long_as_it_renews_whatever_its_clock_says(store: RemoteStore) -> None:
    stop = threading.Event()

    def renew() -> None:
        beat = 0
        while not stop.wait(0.1):
            store.write(LOCK, holder(beat=(beat := beat + 1), time=0))

    thread = threading.Thread(target=renew)
    store.write(LOCK, holder(time=0))
    thread.start()
    try:
        with pytest.raises(CacheError, match=r"another process works here.*process 1 on elsewhere"), build_lock(store):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_dead_holder_at_a_url_is_followed_by_one(store: RemoteStore) -> None:
    store.write(LOCK, holder(time=time.time() + 1e6))  # its clock is ahead by days
    inside, most, taken, refused = 0, 0, 0, 0
    guard = threading.Lock()

    def build() -> None:
        nonlocal inside, most, taken, refused
        try:
            with build_lock(store):
                with guard:
                    inside, taken = inside + 1, taken + 1
                    most = max(most, inside)
                time.sleep(0.5)
                with guard:
                    inside -= 1
        except CacheError:
            with guard:
                refused += 1

    threads = [threading.Thread(target=build) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert most == 1
    assert taken >= 1
    assert taken + refused == 4
    assert store.names("") == []


def test_a_killed_builder_of_this_host_is_followed_at_once(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "STALE", 1e6)
    child = start(lambda: None)
    exit_code(child)
    store.write(LOCK, holder(host=remote_lock.host(), pid=child, started=1.0))
    with build_lock(store), pytest.raises(CacheError, match=f"another process works here.*process {os.getpid()} on"):
        remote_lock.RemoteLock(store).take()


class Careless(MemoryFileSystem):
    """Looks whether an object is there, and writes; as fsspec does where a file system has nothing better."""

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        super().pipe_file(path, value)


class Deaf(MemoryFileSystem):
    """Takes the condition and ignores it."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value)


@pytest.mark.parametrize(("kind", "line"), [(Careless, "cannot be locked"), (Deaf, "takes a second lock")])
def test_a_store_that_cannot_hold_one_lock_is_refused(
    store: RemoteStore, kind: type[MemoryFileSystem], line: str
) -> None:
    store.names("")
    store._filesystem = kind()
    with pytest.raises(CacheError, match=rf"{line}.*build into a local folder, and copy it"), build_lock(store):
        pass
    assert store.names("") == []


def test_a_script_learns_whether_a_run_reached_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The `deepspeed` command ends with 0 when its child is killed, whatever step its ranks save at."""
    run = Path(shutil.copytree(ROOT / "tests" / "house" / "artefacts" / "run", tmp_path / "run"))
    recipe = max(run.glob("recipe.yaml"))
    monkeypatch.setattr(sys, "argv", ["train", "--recipe", str(recipe), "--set", f"output={run}", "--check"])
    assert train() == 0
    assert "finished: " in capsys.readouterr().out
    path = max(run.glob("checkpoints/step_*/manifest.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_steps": 40}))
    with pytest.raises(CheckpointError, match=r"is not finished; found 'step \d+'; wanted step 40; run the same"):
        train()


@pytest.mark.parametrize("dropped", [False, True])
def test_sigterm_ends_a_block_whatever_c_code_makes_of_it(dropped: bool) -> None:
    """Seen in torch: the exit came up as a ValueError of its own."""

    def block() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except SystemExit:
            if not dropped:
                raise ValueError("could not determine the shape") from None

    with pytest.raises(SystemExit) as end, ends_in_order():
        block()
    assert end.value.code == 143


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("launcher", ["mpirun", "torchrun", "deepspeed"])
def test_a_signal_to_one_rank_of_a_build_ends_all(tmp_path: Path, launcher: str, number: int) -> None:
    setup = make_setup(tmp_path, samples=200)
    prefix = Path(sys.executable).parent
    commands = {
        "mpirun": [prefix / "mpirun", "-n", "2", sys.executable],
        "torchrun": [prefix / "torchrun", "--nproc-per-node", "2"],
        "deepspeed": [prefix / "deepspeed", "--master_port", free_port(), "--num_gpus", "2"],
    }
    command = [*commands[launcher], "tools/build_cache.py", "--recipe", setup.recipe, "--data", setup.data]
    command += ["--output", tmp_path / "c", "--set", "cache.tokens_per_batch=1"]
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    job = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=tool_environment(), stdout=log, stderr=log)
    while not (tmp_path / "c/parts/00001").exists():
        assert job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    holder = (tmp_path / "c" / LOCK).read_text()  # of rank 0
    first = int(re.findall(r"process (\d+)", holder)[0])
    found = subprocess.run(["pgrep", "-f", f"build_cache.py.*{tmp_path}/c"], capture_output=True, text=True).stdout
    ranks = [int(word) for word in found.split() if _is_rank(int(word)) and int(word) != first]
    os.kill(ranks[0], number)
    assert job.wait(timeout=120) != 0
    assert not [pid for pid in (first, *ranks) if heartbeat.alive(pid)], (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert "Traceback (most recent call last)" not in text.replace("torch/distributed", "") or launcher == "torchrun"
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=tool_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _is_rank(pid: int) -> bool:
    """Whether a process is Python on the tool itself, no launcher of it."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return any(word.endswith(b"tools/build_cache.py") for word in words[1:3])
