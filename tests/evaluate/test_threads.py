"""The thread count: the fastest that was measured, kept for continuations, never against OMP_NUM_THREADS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from evaluate_tools import Folders, make_folders

from deepspec.evaluate import run, threads
from deepspec.files import read_json
from deepspec.targets import load_target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("threads"))


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_seconds", lambda target, tokens, count: seconds[count])


def test_the_fastest_count_is_taken(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_target(folders.target)
    pretend(monkeypatch, {1: 0.004, 2: 0.002, 3: 0.003})
    assert threads.choose_threads(target, 8, 3) == 2
    assert torch.get_num_threads() == 2
    assert (
        "threads: 2 (a forward of 8 tokens by thread count: 1: 4.0 ms, 2: 2.0 ms, 3: 3.0 ms)" in capsys.readouterr().out
    )
    assert threads.choose_threads(target, 8, 1) is None  # one core: nothing to choose
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.choose_threads(target, 8, 3) is None


def test_the_probe_runs_the_target(folders: Folders) -> None:
    target = load_target(folders.target)
    calls = []
    forward = target.forward

    def counted(ids: torch.Tensor, layers: list[int]) -> object:
        calls.append((tuple(ids.shape), torch.get_num_threads()))
        return forward(ids, layers)

    target.forward = counted  # type: ignore[method-assign, assignment]
    assert threads._seconds(target, 5, 1) > 0
    assert calls == [((1, 5), 1)] * (threads.PROBES + 1)


def test_a_continued_run_keeps_the_count(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "own_cores", lambda local: 2)
    pretend(monkeypatch, {1: 0.001, 2: 0.002})
    folders.run(tmp_path / "out", baseline=False)
    assert read_json(tmp_path / "out" / "run.json")["threads"] == 1
    pretend(monkeypatch, {1: 0.002, 2: 0.001})
    again = folders.run(tmp_path / "out", baseline=False)
    assert again.provenance.threads == 1
