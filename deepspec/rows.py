"""Rows of an unfinished job: a JSONL file that is only appended to, so that a killed job continues where it stopped.

Every line ends with a digest of its own bytes and of the file's name, under ``row_sha256``: a row that rotted, or that
is another file's, is refused where it is read.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from deepspec.errors import DeepSpecError
from deepspec.files import named, write_bytes

K = TypeVar("K", bound=Hashable)
Row = dict[str, Any]
DIGEST = "row_sha256"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_BEFORE, _AFTER = f',"{DIGEST}":"'.encode(), b'"}\n'
log = logging.getLogger(__name__)


def dump_row(row: Mapping[str, Any]) -> bytes:
    """One line of a file: compact UTF-8 JSON and a newline."""
    text = _ENCODER.encode(row)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate (in a server's error) stays JSON


def sealed_row(row: Mapping[str, Any], name: str) -> bytes:
    """The line of a row that is not empty, its last key 64 bits of the SHA-256 of ``name`` and all before."""
    body = dump_row(row)[:-2]
    return body + _BEFORE + _digest(body, name) + _AFTER


def _digest(body: bytes, name: str) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + body).hexdigest()[:16].encode()


def _opened(line: bytes, name: str) -> tuple[Row, bool]:
    """(row, whether the line has a digest).

    Raises:
        ValueError: no JSON, or another digest than that of ``name`` and these bytes.
    """
    body, mark, end = line.rpartition(_BEFORE)
    if mark and end != _digest(body, name) + _AFTER:
        raise ValueError("changed")
    row: Row = json.loads(body + b"}" if mark else line)
    return row, bool(mark)


class RowLog(Mapping[K, Row]):
    """The finished rows of a job by their keys; only their positions are in memory.

    Several processes may work on one job: rank 0 appends to ``<name>.jsonl``, rank r to ``<name>.rank<r>.jsonl``, and
    every rank reads all of them, so that their number may change between a start and the next. A last line without
    its end is what a kill left: it is no row, and it is removed before the next row is written.

    Args:
        path: rank 0's file; made with the first row.
        key: what a row is the result of.
        error: the class of the refusals.
        header: the first line of a file that is made here (what the rows depend on); None: files have none.
        check: called with the header that was found; raises where the job cannot continue with it.
        rank: of this process.
        sync_seconds: a row that is appended is on the disk at the latest when the next one is appended after so many
            seconds; 0: when :meth:`append` returns. The operating system has it at once.
        unsealed: whether rows without a digest count: their file has one of its own, or is a finished one of an
            earlier version. Otherwise they are passed over, to be made again, and a warning says so.
        name: in the digests of the rows; None: that of ``path``.

    Raises:
        DeepSpecError: of type ``error``: a line that is no row, that changed, or two rows of one key that differ.
    """

    def __init__(
        self,
        path: Path,
        key: Callable[[Row], K],
        error: type[DeepSpecError],
        header: Mapping[str, Any] | None = None,
        check: Callable[[Row], None] | None = None,
        rank: int = 0,
        sync_seconds: float = 0.0,
        unsealed: bool = False,
        name: str | None = None,
    ) -> None:
        self._name = name or path.name
        self.path, self.own = path, path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path
        self._key, self._error, self._header, self._check = key, error, header, check
        self._unsealed = unsealed
        self._sync_seconds, self._synced = sync_seconds, time.monotonic()
        self._handle: BinaryIO | None = None
        self._positions: dict[K, tuple[Path, int]] = {}  # file, and byte of the line
        self._read()

    def __getitem__(self, key: K) -> Row:
        path, position = self._positions[key]
        with open(path, "rb") as handle:
            handle.seek(position)
            try:
                return _opened(handle.readline(), self._name)[0]
            except ValueError:
                raise self._refusal("a row that changed", path, f"byte {position}") from None

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def __iter__(self) -> Iterator[K]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished row."""
        with named(self.own):
            handle = self._handle = self._handle or self._open()
            position = handle.seek(0, os.SEEK_END)
            handle.write(sealed_row(row, self._name))
            handle.flush()
            if time.monotonic() - self._synced >= self._sync_seconds:
                os.fsync(handle.fileno())
                self._synced = time.monotonic()
        self._positions[self._key(dict(row))] = self.own, position

    def close(self) -> None:
        """Make all rows of this process last."""
        if self._handle is not None:
            with named(self.own), self._handle:
                os.fsync(self._handle.fileno())
            self._handle = None

    def merge(self) -> None:
        """On one rank, when all have closed their files: write the rows of all of them, in order, into the first."""
        self._read()
        lines = b"".join(sealed_row(self[key], self._name) for key in sorted(self))  # type: ignore[type-var]
        write_bytes(self.path, (b"" if self._header is None else sealed_row(self._header, self._name)) + lines)
        for path in self._rank_files():
            path.unlink()
        self._read()

    def _rank_files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.rank*{self.path.suffix}"))

    def _read(self) -> None:
        self._positions.clear()
        for path in (self.path, *self._rank_files()):
            if path.exists():
                self._read_file(path)

    def _read_file(self, path: Path) -> None:
        position = passed = 0
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.endswith(b"\n") and line.strip():
                    passed += not self._read_line(line, number, path, position)
                position += len(line)
        if passed:
            log.warning("%s: rows without a digest, of an earlier version: %d, made again", path, passed)

    def _read_line(self, line: bytes, number: int, path: Path, position: int) -> bool:
        """Note where a row is; False: it does not count."""
        is_header, where = number == 1 and self._header is not None, f"line {number}"
        try:
            row, has_digest = _opened(line, self._name)
            key = None if is_header else self._key(row)
            hash(key)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._refusal("not a row of results, or one that changed", path, where) from None
        if key is None:
            if self._check is not None:
                self._check(row)
        elif not (has_digest or self._unsealed):
            return False
        elif key not in self._positions:
            self._positions[key] = path, position
        elif self[key] != row:
            raise self._refusal(f"another row for {key} than before", path, where)
        return True

    def _refusal(self, problem: str, path: Path, where: str) -> DeepSpecError:
        remedy = "remove the line and start again: a row that is missing is made again"
        return self._error(problem, file=path, key=where, remedy=remedy)

    def _open(self) -> BinaryIO:
        self.own.parent.mkdir(parents=True, exist_ok=True)
        handle = open(self.own, "a+b")  # noqa: SIM115 (closed by close)
        handle.truncate(_end_of_rows(handle))
        if handle.seek(0, os.SEEK_END) == 0 and self._header is not None:
            handle.write(sealed_row(self._header, self._name))
        return handle


def _end_of_rows(handle: BinaryIO, block: int = 1 << 20) -> int:
    """The byte after the last complete line."""
    end = handle.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - block)
        handle.seek(start)
        found = handle.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
