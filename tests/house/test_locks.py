"""One writer at a time in an output: the second is refused with the holder's name, a dead one blocks nobody."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deepspec import locks
from deepspec.data.prepare import PrepareOptions, prepare
from deepspec.data.regenerate import regenerate
from deepspec.errors import DataError, DeepSpecError
from deepspec.evaluate.study import StudyOptions, run_study
from deepspec.export.consolidate import consolidate
from deepspec.export.convert import ExportOptions, export_draft, import_draft
from deepspec.locks import LOCK, is_free, lock_file, one_writer

HOLD = """
import sys, time
from pathlib import Path
from deepspec.locks import lock_file
with lock_file(Path(sys.argv[1]), Path(sys.argv[1]).parent, "training"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock file ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_writer_is_refused_by_folder_host_pid_and_since(tmp_path: Path) -> None:
    with held(tmp_path / "run" / LOCK) as other:
        with pytest.raises(DataError) as caught, one_writer(tmp_path / "run", "training", DataError):
            pass
        line = str(caught.value)
        assert str(tmp_path / "run") in line
        assert re.search(rf"training, process {other.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", line)
        assert "\n" not in line
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (tmp_path / "run" / LOCK).exists()  # what a kill leaves
        with one_writer(tmp_path / "run", "training"):
            assert f"process {other.pid} " not in (tmp_path / "run" / LOCK).read_text()
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_lock_is_free_again_and_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with one_writer(tmp_path / "a" / "b", "training"):
            assert is_free(tmp_path / "a" / "b")
            with pytest.raises(DeepSpecError, match="another process"), one_writer(tmp_path / "a" / "b", "training"):
                pass
        assert not (tmp_path / "a").exists()
    with one_writer(tmp_path / "a" / "b", "training"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]
    assert not is_free(tmp_path / "a" / "b")


def test_a_lock_file_that_its_holder_removed_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: Any) -> None:
    """The holder ends between our open and our lock: two processes would each hold a lock of the same name."""
    path, flock = tmp_path / LOCK, locks.fcntl.flock

    def late(handle: int, how: int) -> None:
        monkeypatch.setattr(locks.fcntl, "flock", flock)
        path.unlink()
        flock(handle, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with (
        lock_file(path, tmp_path, "training"),
        pytest.raises(DeepSpecError, match="another process"),
        lock_file(path, tmp_path, "training"),
    ):
        pass


def test_a_file_system_without_locks_says_so_and_still_refuses_a_second(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def unsupported(_handle: int, _how: int) -> None:
        raise OSError(locks.errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    for _ in range(2):
        with one_writer(tmp_path, "training"):
            assert is_free(tmp_path)
            with (
                pytest.raises(DataError, match=rf"another process works here.*remove {tmp_path}/{LOCK}\.held where"),
                one_writer(tmp_path, "training", DataError),
            ):
                pass
    assert "is on a file system without locks (Operation not supported)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_writer_of_an_output_refuses_a_held_one(tmp_path: Path) -> None:
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"id": "a", "messages": [{"role": "user", "content": "Why?"}]}\n')
    out = tmp_path / "out"
    writers = {
        "prepare": lambda: prepare(PrepareOptions({str(rows): 1.0}), out),
        "consolidate": lambda: consolidate(tmp_path, out),
        "export": lambda: export_draft(tmp_path, out, ExportOptions()),
        "import": lambda: import_draft(tmp_path, out),
        "study": lambda: run_study(StudyOptions("target", "draft", str(out))),
    }
    with one_writer(out, "something"):
        for write in writers.values():
            with pytest.raises(DeepSpecError, match=rf"{out}: another process works here.*something, process"):
                write()
    lock = lock_file(tmp_path / ".o.jsonl.lock", out, "something")
    with lock, pytest.raises(DataError, match=r"o\.jsonl: another process works here.*something, process"):
        regenerate(rows, tmp_path / "o.jsonl", None, {})  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.tmp"))
    assert not out.exists()
