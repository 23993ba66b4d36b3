"""What the system refuses: one line with the file and a remedy, exit code 1, and no temporary file left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from safetensors import SafetensorError

from deepspec import drafts, files
from deepspec.data.conversations import ConversationWriter
from deepspec.errors import DataError, DeepSpecError, run_main, shown, system_error
from deepspec.evaluate.results import open_rows
from deepspec.files import named, undone_on_error, write_bytes, write_json
from deepspec.rows import RowLog

ROOT = Path(__file__).parents[2]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write raises it: without a file


def ended(main: Callable[[], int | None], capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """Exit code and lines on stderr of an entry point."""
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code, capsys.readouterr().err.splitlines()


def raising(problem: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise problem

    return main


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/f"), ["/x/f", "No space left", "make room"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x/f"), ["/x/f", "denied", "permissions"]),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/f"), ["/x/f", "name another path"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"/x/f"), ["/x/f", "No such file", "check"]),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x/f"), ["/x/f", "name a file"]),
        (OSError(errno.EXDEV, "Invalid link", "/x/a", None, "/x/f"), ["/x/f", "Invalid link"]),
        (ConnectionError("no route\nto the hub"), ["no route", "network"]),
        (
            SafetensorError("while serializing: IoError(No space left on device (os error 28))"),
            ["No space", "make room"],
        ),
        (DeepSpecError("two\nlines", file="f"), ["f: two lines"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_it_is_one_line_with_file_and_remedy(problem: BaseException, words: list[str], capsys: Any) -> None:
    code, lines = ended(raising(problem), capsys)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert not [word for word in words if word not in lines[0]], lines[0]


def test_a_defect_of_our_own_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a defect"):
        run_main(raising(ValueError("a defect")))
    assert system_error(ValueError("a defect")) is None


@pytest.mark.parametrize(("stdout", "said"), [("/dev/full", 1), ("| true", 0)])
def test_output_that_nobody_takes_ends_the_command_without_a_traceback(stdout: str, said: int) -> None:
    program = "from deepspec.errors import run_main\nrun_main(lambda: print('x' * 100_000))"
    where = stdout if stdout.startswith("|") else f"> {stdout}"
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {where}', sys.executable, program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == said, done.stderr
    assert all(line.startswith("error: No space left on device") for line in lines)


def test_values_in_messages_are_cut() -> None:
    bomb: Any = "lol"
    for _ in range(12):
        bomb = [bomb] * 9
    assert len(shown(bomb)) < 600
    assert len(shown({"key": "x" * 10_000})) < 600
    assert shown(0x10**9999) == "a number of thousands of digits"
    assert shown(["a", 1]) == "['a', 1]"


class Disk:
    """A disk that is full after some syncs; a sync is what every writer here ends with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room, self.sync = 0, os.fsync
        monkeypatch.setattr(files.os, "fsync", self.take)

    def take(self, handle: int) -> None:
        if self.room == 0:
            raise OSError(FULL.errno, FULL.strerror)
        self.room -= 1
        self.sync(handle)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def save_draft(folder: Path) -> None:
    state = {f"w{n}": torch.full((300,), float(n)) for n in range(3)}
    drafts.save_draft(folder / "draft", state, {"a": 1}, {"b": 2}, "name: x\n", shard_bytes=2000)


def write_rows(folder: Path) -> None:
    with ConversationWriter(folder / "rows.jsonl", {}) as writer:
        writer.write({"id": "a", "messages": [{"role": "user", "content": "Why?"}]})


WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda folder: write_bytes(folder / "new" / "f", b"x"),
    "json": lambda folder: write_json(folder / "f.json", {}),
    "conversations": write_rows,
    "draft": save_draft,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_no_temporary_one(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    write_bytes(tmp_path / "f", b"older")
    disk = Disk(monkeypatch)
    for room in range(8 if name == "draft" else 1):
        disk.room = room
        with pytest.raises(OSError, match="No space left") as caught:
            WRITERS[name](tmp_path)
        assert str(tmp_path) in str(caught.value.filename)
        assert everything(tmp_path) <= {"f", "new"}, (room, everything(tmp_path))
    disk.room = 99
    WRITERS[name](tmp_path)


def test_rows_that_do_not_fit_name_their_file(tmp_path: Path, monkeypatch: Any) -> None:
    row = {"id": "a", "messages": []}
    partial = RowLog(tmp_path / "o.partial", str, DataError)
    log = open_rows(tmp_path, "results")
    Disk(monkeypatch)
    with pytest.raises(OSError, match=r"No space left.*o\.partial"):
        partial.append(row)
    with pytest.raises(OSError, match=r"No space left.*results\.jsonl"):
        log.append({"task": "t", "temperature": 0.0, "index": 0})
    assert not log


def test_errors_of_rust_libraries_get_the_files_name(tmp_path: Path, monkeypatch: Any) -> None:
    def full(_state: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(drafts, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*model-00001-of-00003\.safetensors"):
        save_draft(tmp_path)
    assert everything(tmp_path) == set()
    with pytest.raises(DataError, match="as it is"), named(tmp_path):
        raise DataError("as it is")


def test_what_came_into_a_folder_goes_again_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")

    def make() -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "f").touch()
        raise FULL

    with pytest.raises(OSError, match="No space"), undone_on_error(tmp_path):
        make()
    assert everything(tmp_path) == {"kept"}


def test_an_output_below_a_file_is_one_line_in_every_command(tmp_path: Path) -> None:
    """The quickest of the commands as processes of their own; the others share `run_main`."""
    (tmp_path / "file").touch()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "messages": [{"role": "user", "content": "Why?"}]}\n')
    command = ["tools/prepare_data.py", "--quiet", "--source", str(rows), "--output", str(tmp_path / "file" / "x")]
    done = fork_server.run([sys.executable, *command])
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"error: {tmp_path}/file/x: Not a directory; a file is where a folder is wanted" in done.stderr


def test_a_file_never_takes_the_place_of_a_device_or_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=name):
            write_bytes(tmp_path / name, b"x")
        with pytest.raises(OSError, match=name):
            ConversationWriter(tmp_path / name, {})
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()
