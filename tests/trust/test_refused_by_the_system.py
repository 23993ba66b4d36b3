"""Commands on a full disk, below a file (which stops root too), and at a store that is down: one line, nothing left."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from deepspec.cache.store import open_store
from deepspec.cli import main
from deepspec.errors import CacheError, run_main

ARTEFACTS = Path(__file__).parents[1] / "house" / "artefacts"
COMMANDS = {
    "recode": "cache recode build/old/cache OUT --level near",
    "export of a cache": "cache export build/old/cache OUT",
    "consolidation": "consolidate build/old/run OUT --without-embeddings",
    "export of a draft": "export build/old/draft OUT --format deepspec",
    "prepare": "prepare --source rows.jsonl --output OUT",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ARTEFACTS, tmp_path / "build" / "old")
    (tmp_path / "file").touch()
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "messages": [{"role": "user", "content": "Why?"}]}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def no_room() -> Iterator[None]:
    """No file can grow beyond some bytes: what a full disk does, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def ended(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, list[str]]:
    """Exit code and lines on stderr of a verb."""
    monkeypatch.setattr(sys, "argv", ["deepspec", *words])
    with pytest.raises(SystemExit) as end:
        run_main(main)
    lines = capsys.readouterr().err.splitlines()
    return end.value.code, [line for line in lines if line.startswith(("error:", "Traceback"))]


SLOW = ("consolidation", "export of a draft")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in COMMANDS]
)
def test_what_the_system_refuses_is_one_line_and_nothing_is_left(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path for path in place.rglob("*") if path.is_file()}
    code, lines = ended(COMMANDS[name].replace("OUT", "file/x").split(), monkeypatch, capsys)
    assert (code, len(lines)) == (1, 1), lines
    assert "file/x" in lines[0]
    with no_room():
        code, lines = ended(COMMANDS[name].replace("OUT", "out").split(), monkeypatch, capsys)
    assert (code, len(lines)) == (1, 1), lines
    assert "File too large" in lines[0]
    assert "make room" in lines[0]
    left = {path for path in place.rglob("*") if path.is_file()} - before
    assert not [path for path in left if path.suffix == ".tmp" or path.parent.name == "out"], left


class Down(MemoryFileSystem):
    """A store whose library has errors of its own, as botocore has."""

    protocol = "down"

    class NoCredentials(Exception):
        """No OSError, as theirs."""

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise self.NoCredentials("Unable to locate credentials\nfor http://me:secret@s3")

    cat_file = size = info = ls = pipe_file = put_file = exists = rm = _fail


def test_a_store_that_is_down_or_wants_credentials_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.register_implementation("down", Down, clobber=True)
    store = open_store("down://me:secret@bucket/c")
    (place / "part").mkdir()
    (place / "part" / "part.json").touch()
    for act in (
        lambda: store.read("a"), lambda: store.size("a"), lambda: store.names(""), lambda: store.write("a", b""),
        lambda: store.remove("a"), lambda: store.commit(place / "part", "p", "part.json"),
        lambda: store.read_into("a", 0, [memoryview(bytearray(3))]),
    ):  # fmt: skip
        with pytest.raises(CacheError, match=r"down://bucket/c.*cannot \w+ \(Unable to locate credentials\)") as caught:
            act()
        assert "secret" not in str(caught.value)
    code, lines = ended(["cache", "inspect", "down://me:secret@bucket/c"], monkeypatch, capsys)
    assert (code, len(lines)) == (1, 1)
    assert "the credentials" in lines[0]
    assert "secret" not in lines[0]
