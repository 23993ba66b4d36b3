"""What can happen to a build: kill -9, a full disk, a read-only folder, two at once. Nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cache_tools import ROOT, Setup, contents, make_setup, run_tool, tool_environment

from deepspec.cache.build import ByteQueue, build_cache
from deepspec.cache.reader import TargetCache
from deepspec.cache.store import FolderStore, build_lock
from deepspec.cache.verify import verify_cache
from deepspec.errors import CacheError


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("cache"), samples=80)


@pytest.fixture(scope="module")
def built(setup: Setup) -> Path:
    output = setup.recipe.parent / "built"
    done = run_tool("tools/build_cache.py", "--recipe", setup.recipe, "--data", setup.data, "--output", output)
    assert done.returncode == 0, done.stderr
    return output


def kill_again_and_again(setup: Setup, output: Path, kills: int) -> list[int]:
    done = run_tool("tests/helpers/cache_kill.py", setup.recipe, setup.data, output, kills, 1)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split() if line.isdigit()]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_with_changing_ranks(setup: Setup, built: Path, tmp_path: Path, kills: int) -> None:
    finished = kill_again_and_again(setup, tmp_path / "c", kills)
    assert len(finished) == kills
    assert finished == sorted(finished)  # a finished part never goes
    assert contents(tmp_path / "c") == contents(built)


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A small tmpfs; skipped where mounting is not allowed."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_is_named_and_finished_parts_stay(setup: Setup, built: Path, tmp_path: Path) -> None:
    needed = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    with mounted(tmp_path / "small", f"size={needed // 2}") as place:
        with pytest.raises(CacheError, match=r"small/c.*(No space left|cannot write).*make room"):
            build_cache(setup.load(), setup.data, place / "c")
        whole = {name for name in contents(place / "c") if name.endswith("part.json") and "/." not in name}
        assert len(whole) > 2
        assert not [path for path in (place / "c/parts").iterdir() if path.name.startswith(".")]
        subprocess.run(["mount", "-o", f"remount,size={8 * needed}", place], check=True)
        build_cache(setup.load(), setup.data, place / "c")
        assert verify_cache(place / "c") == []
        assert set(contents(place / "c")) == set(contents(built))


def test_a_read_only_folder_is_named_but_can_be_read(setup: Setup, built: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "size=16m") as place:
        shutil.copytree(built, place / "c")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(CacheError, match=r"fixed/c.*Read-only file system"):
            build_cache(setup.load(), setup.data, place / "c")
        with pytest.raises(CacheError, match=r"fixed.*Read-only file system"):
            build_cache(setup.load(), setup.data, place / "new")
        assert verify_cache(place / "c") == []
        assert len(TargetCache.open(place / "c").sample(0).input_ids)


def test_a_failed_write_keeps_the_parts_before_it(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as the full disk, on machines that do not allow mounting."""
    from deepspec.cache import shard

    write, calls = shard.ShardWriter.finish, 0

    def full(self: shard.ShardWriter, level: str) -> object:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.part))
        return write(self, level)

    monkeypatch.setattr(shard.ShardWriter, "finish", full)
    with pytest.raises(CacheError, match=r"No space left on device.*make room"):
        build_cache(setup.load(), setup.data, tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c/parts").iterdir()) == ["00000", "00001", "00002"]


@pytest.mark.slow
def test_sigterm_and_a_second_builder_from_the_command_line(setup: Setup, built: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/build_cache.py", "--recipe", setup.recipe, "--data", setup.data]
    command += ["--output", tmp_path / "c", "--set", "cache.tokens_per_batch=1"]
    first = subprocess.Popen(command, cwd=ROOT, env=tool_environment(), text=True, stdout=-1, stderr=subprocess.STDOUT)
    while not (tmp_path / "c/parts/00000").exists():
        assert first.poll() is None
        time.sleep(0.005)
    with (
        pytest.raises(CacheError, match=f"another process works here.*process {first.pid} on "),
        build_lock(FolderStore(tmp_path / "c")),
    ):
        pass
    first.send_signal(signal.SIGTERM)
    said = first.communicate()[0]
    assert first.returncode == 143, said
    assert "start the same command again, it continues" in said
    done = run_tool(*command[1:])
    assert done.returncode == 0
    assert verify_cache(tmp_path / "c") == []


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "torchrun", "deepspeed"])
def test_launchers_end_in_the_same_bytes(setup: Setup, built: Path, tmp_path: Path, launcher: str) -> None:
    prefix = Path(sys.executable).parent
    arguments = ["--recipe", setup.recipe, "--data", setup.data, "--output", tmp_path / "c"]
    commands = {
        "mpirun": [prefix / "mpirun", "-n", "2", sys.executable],
        "torchrun": [prefix / "torchrun", "--nproc-per-node", "2"],
        "deepspeed": [prefix / "deepspeed", "--num_gpus", "2"],
    }
    command = [*map(str, commands[launcher]), "tools/build_cache.py", *map(str, arguments)]
    if not Path(command[0]).exists():
        pytest.skip(f"{launcher} is not installed")
    done = subprocess.run(command, cwd=ROOT, env=tool_environment(), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "c") == contents(built)
    failed = subprocess.run(
        [*command, "--set", "data.max_length=64"], cwd=ROOT, env=tool_environment(), text=True, capture_output=True
    )
    assert failed.returncode != 0
    assert "the folder holds another cache" in failed.stdout + failed.stderr


def test_the_queue_is_bounded_by_bytes_and_reports_errors() -> None:
    queue, done = ByteQueue(100), []
    for number in range(20):
        queue.put(lambda number=number: done.append(number), 40)  # type: ignore[misc]
    queue.drain()
    assert done == list(range(20))
    assert queue.peak <= 100
    queue.put(lambda: None, 1000)  # larger than the limit: alone
    queue.drain()

    def fail() -> None:
        raise ValueError("broken")

    queue.put(fail, 1)
    with pytest.raises(ValueError, match="broken"):
        queue.drain()
    with pytest.raises(ValueError, match="broken"):
        queue.put(lambda: None, 1)
    queue.close(cancel=True)
