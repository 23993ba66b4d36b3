"""Rows on disk as they finish: a killed run loses only the prompts that were being decoded.

Rank 0 appends to ``<name>.jsonl``, rank r to ``<name>.rank<r>.jsonl``; every reader takes all of them, so the number of
processes may change between a run and its continuation. At the end rank 0 merges them into the first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from deepspec.errors import EvaluationError
from deepspec.files import named, write_bytes

Key = tuple[str, float, int]  # task, temperature, the prompt's place


def row_key(row: dict[str, Any]) -> Key:
    """What a row is of."""
    return row["task"], row["temperature"], row["index"]


class RowLog:
    """A JSONL file that many ranks write, each row once.

    Args:
        folder: the results folder.
        name: of the file, without ``.jsonl``.
        rank: of this process.

    Raises:
        EvaluationError: a broken row that a kill cannot explain.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0) -> None:
        self.folder, self.name = folder, name
        self.merged = folder / f"{name}.jsonl"
        self.own = folder / f"{name}.rank{rank}.jsonl" if rank else self.merged
        self._handle: BinaryIO | None = None
        self.rows = self._read()

    def _read(self) -> dict[Key, dict[str, Any]]:
        return {row_key(row): row for path in self._files() for row in read_rows(path)}

    def _files(self) -> list[Path]:
        others = sorted(self.folder.glob(f"{self.name}.rank*.jsonl"))
        return [path for path in (self.merged, *others) if path.exists()]

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to this rank's file and make it last."""
        with named(self.own):
            if self._handle is None:
                self._handle = open(self.own, "ab")  # noqa: SIM115
                self._handle.truncate(_whole(self.own))  # half a row of a killed run
            self._handle.write(_line(row))
            self._handle.flush()
            os.fsync(self._handle.fileno())
        self.rows[row_key(row)] = row

    def close(self) -> None:
        """Close this rank's file."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def merge(self) -> None:
        """Once, when all ranks are done: read all their rows and write them, in order, into the one file."""
        self.close()
        self.rows = self._read()
        write_bytes(self.merged, b"".join(_line(self.rows[key]) for key in sorted(self.rows)))
        for path in self._files():
            if path != self.merged:
                path.unlink()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a log; a last line without its end is what a killed run left, and is not one.

    Raises:
        EvaluationError: no such file, or a line that is not a row.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise EvaluationError("no such file", file=path, remedy="is this a results folder?") from None
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
                row_key(rows[-1])
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                raise EvaluationError(
                    "not a row of results",
                    file=path,
                    key=f"line {number}",
                    remedy="remove the line; it is decoded again",
                ) from None
    return rows


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _whole(path: Path) -> int:
    """Bytes up to the end of the last whole row."""
    return path.read_bytes().rfind(b"\n") + 1
