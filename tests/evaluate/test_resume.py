"""Killed runs go on: every prompt once, the same figures; processes share the prompts; what kills leave is read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fork_server
import pytest
from evaluate_tools import Folders, make_folders, rows_of, untimed, write_task

from deepspec.distributed import World, free_port, process_group, world_from_environment
from deepspec.errors import EvaluationError
from deepspec.evaluate.results import Results, open_rows

PROMPTS = 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("resume")
    folders = make_folders(root)
    write_task(root / "many" / "many.jsonl", [[f"Say {n}"] for n in range(PROMPTS)])
    return Folders(folders.target, folders.draft, root / "many" / "many.jsonl")


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_in_the_middle(command: list[str], path: Path) -> int:
    """Start, wait for some rows in ``path``, kill -9; the rows that are there then."""
    with open(path.parent.with_suffix(".log"), "w+b") as log:
        process = fork_server.start(command, subprocess.DEVNULL, log)
        deadline = time.monotonic() + 120
        while lines(path) < 5:
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return lines(path)


@pytest.mark.parametrize("phase", ["results", pytest.param("plain", marks=pytest.mark.slow)])
def test_killed_and_finished_by_two_processes(folders: Folders, tmp_path: Path, phase: str) -> None:
    """Killed while it decodes with the draft, or before that, the baseline."""
    output = tmp_path / "killed"
    command = [sys.executable, *folders.command(output, "--batch-size", "2")]
    assert kill_in_the_middle(command, output / f"{phase}.jsonl") < PROMPTS
    assert (output / "results.jsonl").exists() == (phase == "results")
    assert not (output / "results.json").exists()
    before = {row["index"]: row for row in rows_of_whole(output / "results.jsonl")}

    if phase == "results":  # ranks without a launcher, in a fraction of the time
        done = fork_server.run_ranks(command, 2, free_port(), os.environ)
    else:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        done = subprocess.run([sys.executable, *torchrun, *command[1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("greedy equal") == 1  # rank 0 alone prints
    assert "rank 0 of 2" in done.stdout + done.stderr
    rows = rows_of(output)
    assert [row["index"] for row in rows] == list(range(PROMPTS))
    assert all(row == before.get(row["index"], row) for row in rows)  # what was there is not decoded again
    assert not list(output.glob("*.rank*"))
    results = Results.load(output)
    assert results.provenance.processes == 2

    undisturbed = folders.run(tmp_path / "undisturbed", batch_size=2)
    assert untimed(results) == untimed(undisturbed)
    assert undisturbed.summaries[0].equal_to_baseline == 1.0


def rows_of_whole(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def row(index: int, **more: Any) -> dict[str, Any]:
    return {"task": "t", "temperature": 0.0, "index": index, "text": "a\u2028b", **more}


def test_rows_of_all_ranks_are_read_whatever_the_number_of_ranks(tmp_path: Path) -> None:
    for rank in range(3):
        log = open_rows(tmp_path, "results", rank)
        for index in range(rank, 9, 3):
            log.append(row(index, rank=rank))
        log.close()
        with open(log.own, "ab") as handle:
            handle.write(b'{"task": "t", "index": 99')  # killed while it wrote
    log = open_rows(tmp_path, "results", 1)
    assert sorted(index for _, _, index in log) == list(range(9))
    log.append(row(9, rank=1))
    assert log.own.read_bytes().count(b"99") == 0  # half a row is gone before the next is written
    log.merge()
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    again = open_rows(tmp_path, "results")
    assert list(again) == [("t", 0.0, index) for index in range(10)]
    assert again["t", 0.0, 4] == row(4, rank=1)


def test_a_merge_that_was_cut_leaves_every_row_once(tmp_path: Path) -> None:
    first, second = open_rows(tmp_path, "results"), open_rows(tmp_path, "results", 1)
    second.append(row(1))
    second.close()
    first.append(row(0))
    first.append(row(1))  # the merged file was renamed, rank 1's not yet removed
    first.close()
    assert list(open_rows(tmp_path, "results")) == [("t", 0.0, 0), ("t", 0.0, 1)]


def test_a_broken_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(row(0)) + "\nnot json\n" + json.dumps(row(1)) + "\n")
    with pytest.raises(EvaluationError, match="line 2"):
        open_rows(tmp_path, "results")


def test_ranks_that_do_not_know_each_other_s_address_are_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # pytest's process may be in a group
    with pytest.raises(EvaluationError, match="torchrun"), process_group(World(0, 2), error=EvaluationError):
        pass
    assert "MASTER_ADDR" not in os.environ


@pytest.mark.parametrize("size", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_ranks_of_mpirun_that_leftovers_of_another_launcher_hide(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK=0 and WORLD_SIZE=1 around mpirun -n 2 would make two worlds of one process, both of them rank 0."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", size: "2"}.items():
        monkeypatch.setenv(name, value)
    wanted = f"WORLD_SIZE: .*found '?1, and {size} 2'?.*unset RANK"
    with pytest.raises(EvaluationError, match=wanted), process_group(world_from_environment(), error=EvaluationError):
        pass
    monkeypatch.setenv("WORLD_SIZE", "16")  # torchrun of 8, started by mpirun on each of two hosts
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("deepspec.distributed._watched", lambda *_: nullcontext())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with process_group(world_from_environment()) as world:
        assert world.size == 16
